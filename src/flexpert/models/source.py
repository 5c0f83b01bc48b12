"""A checkpoint, opened: what it is, what it needs, and its experts' weights on demand."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal

import torch
from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer as grammar_tokenizer
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flexpert.errors import ConfigError, ModelError, UnsupportedModel
from flexpert.kernels import block_fp8 as fp8
from flexpert.kernels.experts import ExpertShape, ExpertWeights
from flexpert.kernels.weight_formats import FORMATS, FP8, MXFP4, WeightFormat
from flexpert.models.accounting import account
from flexpert.models.architecture import leave_out, pad_vocabulary
from flexpert.models.checkpoint import Checkpoint, TensorFiles
from flexpert.models.draft_layer import DraftNames
from flexpert.models.expert_reader import ExpertReader
from flexpert.models.probe import AttentionShape, Probe, find_architecture
from flexpert.models.quantization import read_quantization
from flexpert.models.quantized_files import QuantizedFiles
from flexpert.models.remote_code import CODE_FILES, brought_class, read_config
from flexpert.models.state_view import StateShape
from flexpert.models.tokenizer_files import open_tokenizer
from flexpert.parallel import read_threads, run_parallel
from flexpert.reading import read_text, shown

logger = logging.getLogger(__name__)

TINY: Final = "tiny"
"""The name of the model that comes with the package."""

DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}

ExpertFormat = Literal["unquantized", "stored", "fp8", "mxfp4", "int8", "int4"]
"""How experts lie in memory.

unquantized: in the model's dtype.
fp8, mxfp4, int8, int4: in that format (see `flexpert.kernels.weight_formats`), quantized at load if
the files do not have it.
stored: fp8 or mxfp4 if the files have it, else unquantized.
"""

_MOST_CONFIG_BYTES: Final = 8 * 2**20
_MOST_PARTS: Final = 100_000  # of one kind in a model: layers, heads, experts
_WORTH_THREADS: Final = 8 * 2**20  # bytes; to start threads takes as long as to read less
_MOST_SAID: Final = 600  # characters of what a library says

WANTED_FILES: Final = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


@dataclass(frozen=True)
class ModelInfo:
    """What the engine needs to know of a model.

    attention: one entry per attention layer, in the order of the forward pass.
    max_model_len: tokens of prompt and answer together.
    states: what each layer that keeps a state has of a sequence, in the order of the forward pass.
    drafts: the last one of attention and MoE layers, as far as it is either, proposes tokens.
    """

    name: str
    model_type: str
    architecture: str
    hidden: int
    vocab: int
    moe_layers: int
    experts: int
    topk: int
    dtype: torch.dtype
    attention: tuple[AttentionShape, ...]
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    states: tuple[tuple[StateShape, ...], ...] = ()
    drafts: bool = False

    @property
    def state_nbytes(self) -> int:
        """Bytes of one sequence's states at all layers; 0: the model has none."""
        return sum(state.nbytes for layer in self.states for state in layer)

    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        elements = sum(heads * dim for a in self.attention for heads, dim in a.pieces)
        return elements * self.dtype.itemsize


class ModelSource:
    """A checkpoint directory, opened: configuration, index and conversion rules; no weights.

    Made by `open`. Experts may be read from any thread.

    Attributes:
        expert_format: of experts in memory; None: they are unquantized.
        trusted: the checkpoint's own code may be run.
        left_out: names of the modules that no token of text passes through, and whose tensors are
            not read (`Checkpoint.left_out`).
        accounting: what became of every tensor of the files.
    """

    path: Path
    info: ModelInfo
    config: PreTrainedConfig
    expert_format: WeightFormat | None
    trusted: bool = False

    def __init__(
        self,
        path: Path,
        config: PreTrainedConfig,
        info: ModelInfo,
        skeleton: PreTrainedModel,
        found: Probe,
        files: TensorFiles,
        experts: ExpertFormat,
    ) -> None:
        self.path = path
        self.config = config
        self.info = info
        self.skeleton = skeleton
        self.attention_names = tuple(found.attention_shapes)
        self.state_names = tuple(found.states)
        self.experts_names = tuple(call.name for call in found.experts_calls)
        self._found = found
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.left_out = found.left_out
        self.checkpoint = Checkpoint(files, skeleton, self.left_out, self._draft_names(files))
        leave_out(skeleton, self.left_out)
        rows = self._embedded_tokens()
        if rows > info.vocab:  # rows that no token has; the logits are cut to the vocabulary
            found.padded_vocab = rows
            pad_vocabulary(skeleton, rows)
        self.accounting = account(self.checkpoint, skeleton, self.expert_parameters)
        self._say_what_is_not_read()
        self.expert_format = self._format_in_memory(experts, files)
        self._experts = ExpertReader(
            self.checkpoint,
            skeleton,
            self.experts_names,
            info.experts,
            self._as_stored(files),
        )
        self._check_format()

    @classmethod
    def open(
        cls,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        experts: ExpertFormat = "unquantized",
        trust_remote_code: bool = False,
        latent_cache: bool = False,
        drafts: bool = False,
    ) -> ModelSource:
        """Open a model by name.

        Args:
            model: "tiny", the model in the package; a directory; or an id on the Hugging Face hub.
            revision: of the hub repository.
            dtype: "auto" (the checkpoint's; float16 becomes bfloat16), "bfloat16" or "float32".
            max_model_len: a shorter limit of prompt and answer than the model's.
            experts: their format in memory.
            trust_remote_code: run the Python code that a checkpoint brings along.
            latent_cache: attention that compresses keys and values (MLA) keeps what they are
                compressed to.
            drafts: with the layer that proposes tokens (`draft_layer`).

        Raises:
            UnsupportedModel: a dense model, a quantization that is not served, or a family
                that does not fit; says why. Or there is no layer that proposes tokens.
            ModelError: files are missing, damaged or cannot be had.
        """
        path = locate(model, revision, code=trust_remote_code)
        config = _read_config(path, trusted=trust_remote_code)
        try:
            quantization = read_quantization(path)
            _forget_quantization(config)  # weights come to the model dequantized
            own = brought_class(path, config) if trust_remote_code else None
            named = getattr(config, "transformers_weights", None)

            def open_files() -> TensorFiles:
                return (
                    QuantizedFiles(path, quantization, named)
                    if quantization
                    else TensorFiles(path, named)
                )

            stored, files = _stored_dtype(config), None
            if stored is None and dtype == "auto":
                with contextlib.suppress(ModelError):  # what is wrong with the family goes first
                    files = open_files()
                    stored = files.main_dtype
            of_weights = _dtype(stored or torch.float32, dtype)
            skeleton, found = find_architecture(
                config, of_weights, own, latent_cache=latent_cache, drafts=drafts
            )
            info = _info(model, path, config, skeleton, found, max_model_len)
            files = files or open_files()
            source = cls(path, config, info, skeleton, found, files, experts)
            source.trusted = trust_remote_code
            return source
        except ModelError as error:
            if str(path) in str(error):
                raise
            raise type(error)(f"{path}: {error}") from error
        except Exception as error:  # whatever the library makes of numbers that fit nowhere
            raise ModelError(
                f"{path / 'config.json'} describes no model that can be built "
                f"({type(error).__name__}: {_short(error)})"
            ) from error

    def _draft_names(self, files: TensorFiles) -> DraftNames | None:
        """Raises: UnsupportedModel: the files have no draft layer."""
        if not self.info.drafts:
            return None
        layers = int(self.config.get_text_config().num_hidden_layers)
        names = DraftNames.find(files.keys(), layers)
        if names is None:
            raise UnsupportedModel(
                f"{self.path} has no layer for multi-token prediction that flexpert knows (tensors "
                f"named mtp.fc, or eh_proj in a layer {layers}); leave --speculate mtp out, or use "
                "--speculate ngram"
            )
        return names

    def _embedded_tokens(self) -> int:
        """The rows of the embeddings in the files; 0: not plain to see."""
        embeddings = self.skeleton.get_input_embeddings()
        for name, parameter in self.skeleton.named_parameters():
            recipe = self.checkpoint.recipes.get(name)
            if parameter is embeddings.weight and recipe and recipe.converter is None:
                shape = self.checkpoint.files.shape(recipe.sources[""][-1])
                return shape[0] if shape[1:] == parameter.shape[1:] else 0
        return 0

    def build(self, *, attention: str) -> PreTrainedModel:
        """The model on the meta device, without what is left out; see `build_skeleton`."""
        return self._found.build(self.info.dtype, attention=attention)

    def _say_what_is_not_read(self) -> None:
        files = self.checkpoint.files
        if files.passed_over:
            logger.warning(
                "%s: %s not read, as transformers would read %s in their place",
                self.path,
                f"{', '.join(files.passed_over[:3])}{' …' if len(files.passed_over) > 3 else ''}",
                ", ".join(files.names[:3]),
            )
        for kind in self.accounting.skipped:
            logger.info(
                "%s: %d tensors of %s are skipped: %s",
                self.path,
                len(kind.keys),
                kind.kind,
                kind.reason,
            )

    # ---- sizes ------------------------------------------------------------------------------

    def expert_nbytes(self) -> int:
        """Bytes of one expert of one layer in memory."""
        return self.expert_shape().nbytes

    def dense_nbytes(self) -> int:
        """Bytes of everything but the experts in memory."""
        tied = self.skeleton.all_tied_weights_keys
        return sum(
            tensor.numel() * self.dtype_of(name).itemsize
            for name, tensor in self.skeleton.state_dict().items()
            if name not in self.expert_parameters and not (name in tied and name not in self.held)
        )

    # ---- names ------------------------------------------------------------------------------

    @cached_property
    def expert_parameters(self) -> frozenset[str]:
        """Names of all experts' fused parameters, which `ModelRunner` never allocates."""
        return frozenset(
            f"{name}.{parameter}"
            for name in self.experts_names
            for parameter, _ in self.skeleton.get_submodule(name).named_parameters(recurse=False)
        )

    @cached_property
    def held(self) -> frozenset[str]:
        """Names of all parameters that the files hold."""
        return frozenset(self.checkpoint.targets)

    @cached_property
    def _kept_in_float32(self) -> re.Pattern[str] | None:
        plan = self.skeleton._get_dtype_plan(self.info.dtype)
        patterns = [p.replace("*", ".*") for p, kept in plan.items() if kept == torch.float32]
        return re.compile("|".join(patterns)) if patterns else None

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a parameter in memory; some families keep a few in float32."""
        if self._kept_in_float32 is not None and self._kept_in_float32.search(name):
            return torch.float32
        tensor = self.skeleton.get_parameter_or_buffer(name)
        dtype: torch.dtype = tensor.dtype
        return dtype

    def _check_format(self) -> None:
        """Raises: UnsupportedModel: the experts' sizes are none that their format has."""
        try:
            for shape in self._shapes:
                _ = shape.nbytes
        except ValueError as error:
            raise UnsupportedModel(f"{self.path}: the experts: {error}") from None

    # ---- weights ----------------------------------------------------------------------------

    def expert_shape(self, layer: int = 0) -> ExpertShape:
        """The shape of every expert of a MoE layer, in our layout."""
        return self._shapes[layer]

    def expert_shapes(self) -> list[ExpertShape]:
        """The shape of the experts of each MoE layer."""
        return list(self._shapes)

    @cached_property
    def _shapes(self) -> tuple[ExpertShape, ...]:
        return tuple(self._shape(name) for name in self.experts_names)

    def _shape(self, name: str) -> ExpertShape:
        """name: of the module that has a layer's experts."""
        module: Any = self.skeleton.get_submodule(name)

        def shape(parameter: str) -> tuple[int, ...]:
            found = tuple(self.skeleton.get_parameter(f"{name}.{parameter}").shape[1:])
            return found[::-1] if module.is_transposed else found

        height, hidden = shape("gate_up_proj" if module.has_gate else "up_proj")
        _, inter = shape("down_proj")
        dtype = self.info.dtype
        return ExpertShape(
            hidden,
            height,
            inter,
            self.expert_format or dtype,
            biases=dtype if module.has_bias else None,
        )

    def hold_files(self) -> None:
        """Forks of this process read these files, though others are put in their place. Raises:
        ModelError: they have been already."""
        self.checkpoint.files.hold()

    def try_extents(self) -> None:
        """Find out now how experts are read, which the first one would otherwise wait for; forks of
        this process know it then. Raises: ModelError: they cannot be read."""
        self.read_expert(0, 0, torch.empty(self.expert_shape(0).nbytes, dtype=torch.uint8))

    def read_expert(self, layer: int, expert: int, into: Tensor) -> None:
        """Read one expert of a MoE layer; any number of threads may do so at once.

        Args:
            layer: index among the MoE layers, in the order of the forward pass.
            expert: logical expert of the checkpoint.
            into: [`expert_shape(layer).nbytes`] uint8 on the host, pinned or not, contiguous; its
                tensors are those of `ExpertShape.over`.

        Raises:
            ModelError: the files do not hold it, cannot be read, or have changed.
        """
        self._check_numbers(layer, [expert])
        shape = self.expert_shape(layer)
        if (
            into.shape != (shape.nbytes,)
            or into.dtype != torch.uint8
            or into.device.type != "cpu"
            or not into.is_contiguous()
        ):
            raise ValueError(
                f"an expert of layer {layer} is read into [{shape.nbytes}] contiguous uint8 on the "
                f"host, not into {tuple(into.shape)} {into.dtype} on {into.device}"
            )
        self._experts.read(layer, expert, shape.over(into))

    def load_experts(
        self,
        layer: int,
        experts: Sequence[int],
        place: Callable[[int], ExpertWeights] | None = None,
    ) -> dict[int, ExpertWeights]:
        """Some experts of one MoE layer; reads only their rows of the files.

        What is read into memory of the host is read by several threads, if it is large.

        Args:
            layer: index among the MoE layers, in the order of the forward pass.
            experts: logical experts of the checkpoint.
            place: where an expert goes; default: memory of its own.

        Raises:
            ModelError: the files do not hold them.
        """
        self._check_numbers(layer, experts)
        self.checkpoint.files.check_unchanged()
        shape = self.expert_shape(layer)
        try:
            loaded = {expert: place(expert) if place else shape.empty() for expert in experts}
        except (RuntimeError, MemoryError) as error:
            raise ModelError(
                f"{self.path}: there is no memory for {len(experts)} experts of {shape.nbytes} "
                f"bytes ({_short(error)})"
            ) from error

        def read(expert: int) -> None:
            self._experts.read(layer, expert, loaded[expert])

        on_host = all(into.gate_up.device.type == "cpu" for into in loaded.values())
        large = len(loaded) * shape.nbytes >= _WORTH_THREADS
        run_parallel(list(loaded), read, read_threads() if on_host and large else 1)
        return loaded

    def map_experts(self, layer: int, experts: Sequence[int]) -> dict[int, ExpertWeights]:
        """Those of some experts of one MoE layer that can be used where the page cache has them,
        shared by all processes that map them. Their numbers are checked, by several threads.

        Raises:
            ModelError: the files do not hold them, cannot be read, or have changed.
        """
        self._check_numbers(layer, experts)
        shape, found = self.expert_shape(layer), dict[int, ExpertWeights]()

        def find(expert: int) -> None:
            weights = self._experts.mapped(layer, expert, shape)
            if weights is not None:
                found[expert] = weights

        large = len(experts) * shape.nbytes >= _WORTH_THREADS
        run_parallel(list(experts), find, read_threads() if large else 1)
        return found

    def _check_numbers(self, layer: int, experts: Sequence[int]) -> None:
        """Raises: ValueError"""
        if not 0 <= layer < self.info.moe_layers:
            raise ValueError(f"there is no MoE layer {layer}: the model has {self.info.moe_layers}")
        for expert in experts:
            if not 0 <= expert < self.info.experts:
                raise ValueError(f"there is no expert {expert}: the model has {self.info.experts}")

    def _format_in_memory(self, asked: ExpertFormat, files: TensorFiles) -> WeightFormat | None:
        """Of experts; None: unquantized."""
        if asked not in {"stored", "int4"} or not isinstance(files, QuantizedFiles):
            return FORMATS.get(asked)
        found = {self._stored_format(name, files) for name in self._expert_matrices()}
        if asked == "int4":  # with the groups that the files have
            only = next(iter(found)) if len(found) == 1 else None
            return only if only is not None and only.name == asked else FORMATS[asked]
        # fp8 is kept where some are: without it these would take twice the memory
        return FP8 if FP8 in found else MXFP4 if found == {MXFP4} else None

    def _expert_matrices(self) -> set[str]:
        """Names of the experts' parameters that are no biases."""
        names = self.expert_parameters & self.checkpoint.recipes.keys()
        return {name for name in names if self.skeleton.get_parameter(name).ndim == 3}

    def _stored_format(self, name: str, files: QuantizedFiles) -> WeightFormat | None:
        """The format in which all sources of a parameter lie in the files, and nothing else."""
        sources = self.checkpoint.recipes[name].sources
        found = {files.format_in_memory(key) for keys in sources.values() for key in keys}
        return found.pop() if len(found) == 1 else None

    def _as_stored(self, files: TensorFiles) -> set[str]:
        """Parameters of experts whose weights and scales are taken as they lie in the files.

        Else they are dequantized and quantized anew: blocks of another size or layout, or gate and
        up projections that would share a block.
        """
        if not isinstance(files, QuantizedFiles) or self.expert_format is None:
            return set()
        return {
            name
            for name in self._expert_matrices()
            if self._stored_format(name, files) is self.expert_format
            and self._fits_as_stored(name, files)
        }

    def _fits_as_stored(self, name: str, files: QuantizedFiles) -> bool:
        experts: Any = self.skeleton.get_submodule(name.rpartition(".")[0])
        rows = self.skeleton.get_parameter(name).shape[1]
        sources = self.checkpoint.recipes[name].sources
        return (
            all(files.has_blocks(key) for keys in sources.values() for key in keys)
            and all(
                files.is_turned(k) == experts.is_transposed for ks in sources.values() for k in ks
            )
            and (
                self.expert_format is not FP8 or not experts.has_gate or rows // 2 % fp8.BLOCK == 0
            )
            and self.checkpoint.joins_only(name)
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer; the same one every time.

        Raises:
            ModelError: it has none, or it cannot be read.
        """
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self.path, trusted=self.trusted)
        return self._tokenizer

    @cached_property
    def grammar_tokens(self) -> LLTokenizer:
        """The vocabulary as grammars of structured output read it; takes 10 ms for each thousand
        tokens, with Python's lock held.

        Raises:
            ModelError: there is no tokenizer of the kind that can be read for it.
        """
        try:
            return grammar_tokenizer(
                self.tokenizer(),
                n_vocab=self.info.vocab,
                eos_token=list(self.info.eos_token_ids) or None,
            )
        except ValueError as error:
            raise ModelError(
                f"structured output needs a tokenizer of the 'tokenizers' library: {error}"
            ) from error

    def try_grammar_tokens(self) -> None:
        """Reads `grammar_tokens` if they can be had."""
        with contextlib.suppress(ModelError):
            _ = self.grammar_tokens


def locate(model: str, revision: str | None = None, *, code: bool = False) -> Path:
    """The directory of a model; downloads it if it is on the hub, with its code if that is wanted.

    Raises:
        ModelError: there is no such directory, or the hub cannot be reached and nothing is cached.
    """
    if model == TINY:
        return Path(str(resources.files("flexpert.models").joinpath("tiny")))
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if model.startswith(("/", ".", "~")) or model.count("/") > 1 or path.exists():
        raise ModelError(f"{model} is not a directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        wanted = [*WANTED_FILES, *(CODE_FILES if code else [])]
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ModelError(
            f"{model} is neither a directory nor a model on the hub that you may read ({error})"
        ) from error
    except Exception as error:
        raise ModelError(
            f"{model} is not a directory, and the hub cannot be reached for it "
            f"({type(error).__name__}: {error}); download it elsewhere and give its path, "
            f"or use {TINY!r}, which is part of the package"
        ) from error


def _read_config(path: Path, *, trusted: bool) -> PreTrainedConfig:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: it is not a checkpoint of transformers")
    _check_settings(path / "config.json")
    try:
        return read_config(path, trusted=trusted)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{path / 'config.json'} cannot be read: {_short(error)}") from error


def _forget_quantization(config: PreTrainedConfig) -> None:
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def _check_settings(file: Path) -> None:
    """Before the library makes a layer of each that a number promises.

    Raises: ModelError: it is no configuration, or no machine could hold the model.
    """
    try:
        settings = json.loads(read_text(file, "the configuration", most=_MOST_CONFIG_BYTES))
    except (ConfigError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {_short(error)}") from None
    if not isinstance(settings, dict):
        raise ModelError(f"{file} cannot be read: it is no JSON object")
    inner = [value for value in settings.values() if isinstance(value, dict)]
    for name, value in (pair for each in (settings, *inner) for pair in each.items()):
        counts = name.startswith(("num_", "n_")) or name.endswith("_layers")
        if counts and isinstance(value, int | float) and not value <= _MOST_PARTS:
            raise ModelError(f"{file}: {name} is {value!r}, more than any model has")


def _short(error: BaseException) -> str:
    """What a library says, on one line."""
    text = " ".join(str(error).split()).encode(errors="replace").decode()
    return text if len(text) <= _MOST_SAID else f"{text[:_MOST_SAID]}…"


def _stored_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """What config.json says its weights are in."""
    stored: torch.dtype | str | None = config.get_text_config().dtype or config.dtype
    return getattr(torch, stored) if isinstance(stored, str) else stored


def _dtype(stored: torch.dtype, asked: str) -> torch.dtype:
    if asked != "auto":
        if asked not in DTYPES:
            raise ModelError(f"dtype {asked!r} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[asked]
    if stored == torch.float16:
        logger.warning("the checkpoint is float16, which CPUs compute slowly; using bfloat16")
        return torch.bfloat16
    if stored not in DTYPES.values():
        raise UnsupportedModel(f"weights of dtype {stored} are not supported")
    return torch.bfloat16 if stored == torch.bfloat16 else torch.float32


def _info(
    model: str,
    path: Path,
    config: PreTrainedConfig,
    skeleton: PreTrainedModel,
    found: Probe,
    max_model_len: int | None,
) -> ModelInfo:
    text = config.get_text_config()
    call = found.experts_calls[0]
    eos, bos = (_stated(config, text, name) for name in ("eos_token_id", "bos_token_id"))
    if (path / "generation_config.json").is_file():
        try:
            generation = GenerationConfig.from_pretrained(path)
        except Exception as error:
            raise ModelError(
                f"{path / 'generation_config.json'} cannot be read: {_short(error)}"
            ) from error
        eos = generation.eos_token_id if generation.eos_token_id is not None else eos
        bos = generation.bos_token_id if generation.bos_token_id is not None else bos
    ends = _token_ids(path, "eos_token_id", eos, text.vocab_size)
    begins = _token_ids(path, "bos_token_id", bos, text.vocab_size)
    return ModelInfo(
        name=model,
        model_type=config.model_type,
        architecture=type(skeleton).__name__,
        hidden=call.hidden,
        vocab=text.vocab_size,
        moe_layers=len(found.experts_calls),
        experts=call.experts,
        topk=call.topk,
        dtype=skeleton.dtype,
        attention=tuple(found.attention_shapes.values()),
        max_model_len=_context_limit(text, found.context, max_model_len),
        eos_token_ids=ends,
        bos_token_id=begins[0] if begins else None,
        states=tuple(found.states.values()),
        drafts=found.drafts,
    )


def _stated(config: PreTrainedConfig, text: PreTrainedConfig, name: str) -> object:
    """A setting of the whole model, or else of the text model inside of it."""
    stated = getattr(config, name, None)
    return getattr(text, name, None) if stated is None else stated


def _token_ids(path: Path, name: str, value: object, vocab: int) -> tuple[int, ...]:
    """One, several or none. What is not in the vocabulary never comes.

    Raises: ModelError: they are no token ids.
    """
    given = value if isinstance(value, list | tuple) else [] if value is None else [value]
    ids = [one for one in given if isinstance(one, int) and not isinstance(one, bool)]
    if len(ids) < len(given):
        raise ModelError(
            f"{path}: {name} in generation_config.json or config.json is {shown(value)}, not the "
            "number of a token"
        )
    return tuple(one for one in ids if 0 <= one < vocab)


def _context_limit(config: PreTrainedConfig, attention: int, asked: int | None) -> int:
    """The model's context, or the shorter one asked for.

    attention: tokens within which attention is what we compute, see `Probe.context`.

    With rope type "longrope" the frequencies of all tokens of a batch depend on the longest of
    them; within the original context they do not.
    """
    limit = config.max_position_embeddings
    if not isinstance(limit, int) or not 0 < limit < 2**31:
        raise ModelError(
            f"max_position_embeddings in config.json is {shown(limit)}, "
            "which is no number of tokens"
        )
    reason = "its max_position_embeddings"
    if attention < limit:
        limit = attention
        reason = "beyond it some of its layers attend to chunks of that many tokens"
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):
        kind = parameters.get("rope_type", "default") if isinstance(parameters, dict) else "default"
        if kind == "longrope":
            limit = min(limit, int(parameters["original_max_position_embeddings"]))
            reason = "longrope frequencies beyond it would make requests change each other"
    if asked is None:
        return limit
    if not 0 < asked <= limit:
        raise ModelError(f"max_model_len {asked} is not within 1 … {limit} ({reason})")
    return asked
