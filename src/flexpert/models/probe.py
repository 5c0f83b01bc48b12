"""What a model asks of us, found by running it on the meta device: no weights, no family lists.

The model class of transformers is built on the meta device and walked once. What its attention
and experts modules pass to the registered functions tells the shapes of the KV cache, the MoE
layers and the router's k; and whatever we would not compute faithfully is refused here, with the
reason, instead of being ignored in silence.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization

from flexpert.errors import ModelError, UnsupportedModel
from flexpert.models import registrations
from flexpert.models.architecture import (
    KEEPING_BOTH,
    KEEPING_INDEXED,
    KEEPING_NOTHING,
    KEEPING_STATES,
    leave_out,
    model_classes,
    pad_vocabulary,
    says_experts,
    untouched_parts,
)
from flexpert.models.draft_layer import draft_layer, graft
from flexpert.models.latent_attention import LatentShape, keep_latents, kept_latent
from flexpert.models.meta_kernels import with_meta_kernels
from flexpert.models.meta_walk import walk
from flexpert.models.position_cache import asks_for_length
from flexpert.models.state_probe import INDEX_ANSWER, StateProbe, cached_modules, probed_states
from flexpert.models.state_view import StateShape
from flexpert.models.undispatched_experts import dispatch_experts

_CACHES_SINCE: Final = (5, 24)
"""Version of transformers since which layers with states get their cache by one name, `CACHE`."""

UNDERSTOOD: Final = {"scaling", "sliding_window", "s_aux", "softcap", "dropout", "is_causal"}
"""Arguments of an attention call that `model_runner` honours."""

HARMLESS: Final = {
    "cache_position",
    "logits_to_keep",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
}
"""Arguments that do not change the result of causal attention without padding."""

_OF_STATES: Final = KEEPING_STATES | KEEPING_BOTH

_USUAL_CONTEXT: Final = 1 << 17


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What one attention layer keeps of each token: kv_heads keys and as many values.

    value_in_key: a value is the first part of its key. indexed: it attends to what an indexer
    picks. indexer: name of its own, inside of its module, which keeps a key of index_dim numbers;
    "": it has none, or that of another layer. chunk: a token sees those before it in its own chunk
    of so many; 0: all, or those of a window that it names.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    value_in_key: bool = False
    indexed: bool = False
    indexer: str = ""
    index_dim: int = 0
    chunk: int = 0

    @property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        """(heads, numbers of each) of all that is kept: keys, values if they are none of these, and
        the indexer's keys."""
        kept = [(self.kv_heads, self.key_dim)]
        if not self.value_in_key:
            kept.append((self.kv_heads, self.value_dim))
        if self.index_dim:
            kept.append((1, self.index_dim))
        return tuple(kept)


@dataclass(frozen=True, slots=True)
class ExpertsCall:
    """One MoE layer: the name of its experts module and what it was called with."""

    name: str
    experts: int
    hidden: int
    topk: int


class Probe:
    """Records the calls of one walk; see `registrations` for what its methods are called with.

    left_out: names of the modules that no token of text passes through, such as encoders of images.
    states: by module that keeps a state of each sequence, in the order of the walk: its shapes.
    state_layers: numbers of the layers that these are in.
    padded_vocab: tokens for which the files have embeddings, if these are more than the vocabulary.
    context: tokens within which attention is what we compute. chunk: of layers that attend within
    chunks, tokens; 0: there are none. latents: see `keep_latents`.
    drafts: the model has its draft layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = (type(model), model.config)
        self.drafts = draft_layer(model) is not None
        text = model.config.get_text_config()
        self.chunk = _chunk(text)
        self.context = _attention_context(model, text, self.chunk)
        self._names = {module: name for name, module in model.named_modules()}
        self.attention_shapes: dict[str, AttentionShape] = {}
        self.experts_calls: list[ExpertsCall] = []
        self.states: dict[str, tuple[StateShape, ...]] = {}
        self.state_layers: set[int] = set()
        self.left_out: tuple[str, ...] = ()
        self.padded_vocab: int | None = None
        self.latents = False
        self._answers: dict[str, tuple[int, ...]] = {}  # of indexers, as attention gets them

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: object,
        **kwargs: Any,
    ) -> Tensor:
        name = self._names[module]
        picked = kwargs.pop("indices", None)
        if isinstance(picked, Tensor):
            self._answers[name] = tuple(picked.shape)
        for argument, given in kwargs.items():
            if given is None or argument in HARMLESS or argument in UNDERSTOOD:
                continue
            raise UnsupportedModel(
                f"{name} passes {argument!r} to attention, which we do not compute"
            )
        if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise UnsupportedModel(f"{name} is not causal")
        chunk = self._chunk_of(name, mask, kwargs.get("sliding_window"))
        if name in self.attention_shapes:
            raise UnsupportedModel(f"{name} attends twice in one pass")
        if key.shape[1] == 0 or query.shape[1] % key.shape[1] or key.shape[2] != query.shape[2]:
            raise UnsupportedModel(f"{name} attends to keys that are not those of its own tokens")
        latent = kept_latent(module)
        self.attention_shapes[name] = AttentionShape(
            key.shape[1], key.shape[3], value.shape[3], latent is not None, chunk=chunk
        )
        if latent is None:
            return query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))
        return self._of_latents(name, module, query, (key, value), latent)

    def _chunk_of(self, name: str, mask: object, window: int | None) -> int:
        """The chunks within which a layer attends; 0: to all before, or to a window of them.

        Raises: UnsupportedModel: it attends to something else.
        """
        if isinstance(mask, registrations.AskedMask):
            for chunk in (0, self.chunk)[: 1 + (self.chunk > 0 and window is None)]:
                if _sees(mask, window, chunk, self.context):
                    return chunk
        raise UnsupportedModel(
            f"{name} asks for a mask that is neither causal nor the sliding window it names"
        )

    def _of_latents(
        self,
        name: str,
        module: Any,
        query: Tensor,
        kept: tuple[Tensor, Tensor],
        shape: LatentShape,
    ) -> Tensor:
        """Raises: UnsupportedModel: it attends to something else than the latents."""
        self.latents = True
        if self.attention_shapes[name].chunk:
            raise UnsupportedModel(f"{name} attends to latents in chunks, which we do not compute")
        found = (*query.shape[1::2], *(one.shape[axis] for one in kept for axis in (1, 3)))
        key_dim = shape.rank + shape.rope
        if found != (shape.heads, shape.nope + shape.rope, 1, key_dim, 1, shape.rank):
            raise UnsupportedModel(f"{name} attends to something else than its latents")
        module.kv_b_proj.weight.t()  # has a part in it, which attention calls otherwise
        return query.new_empty((1, query.shape[2], shape.heads, shape.value_dim))

    def experts(self, module: nn.Module, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        name = self._names[module]
        if getattr(module, "has_post_expert_norm", False):
            raise UnsupportedModel(
                f"{name} normalises each expert's result, which we do not compute"
            )
        if name in (call.name for call in self.experts_calls):
            raise UnsupportedModel(f"{name} is used twice in one pass")
        experts = int(getattr(module, "num_experts", 0))
        self.experts_calls.append(ExpertsCall(name, experts, x.shape[-1], expert_ids.shape[-1]))
        return torch.empty_like(x)

    def keep_states(self, probes: Mapping[str, StateProbe]) -> None:
        """Takes over what modules have asked of a cache."""
        for name, probe in probes.items():
            if probe.layer is not None and probe.shapes:
                self.states[name] = probe.shapes
                self.state_layers.add(probe.layer)

    def keep_indexers(self, probes: Mapping[str, StateProbe]) -> None:
        """Takes over which modules pick what attention attends to.

        Raises: UnsupportedModel: it is not seen which of them picks what.
        """
        dims = {name: probe.index_dim for name, probe in probes.items() if probe.index_dim}
        for name, answer in self._answers.items():
            if answer != INDEX_ANSWER:
                raise UnsupportedModel(
                    f"{name} attends to picked keys, and it is not seen what picks them"
                )
            own = [one for one in dims if one.startswith(f"{name}.")]
            if len(own) > 1:
                raise UnsupportedModel(f"{name} has several indexers")
            shape = replace(self.attention_shapes[name], indexed=True)
            for one in own:
                inside = one.removeprefix(f"{name}.")
                shape = replace(shape, indexer=inside, index_dim=dims.pop(one))
            self.attention_shapes[name] = shape
        if dims:
            raise UnsupportedModel(f"{min(dims)} picks keys for no layer of attention")

    def build(self, dtype: torch.dtype, *, attention: str) -> PreTrainedModel:
        """The same model once more, without what is left out; see `build_skeleton`."""
        chosen, config = self._model
        model = build_skeleton(config, dtype, chosen, attention=attention, drafts=self.drafts)
        if self.latents:
            keep_latents(model)
        leave_out(model, self.left_out)
        if self.padded_vocab is not None:
            pad_vocabulary(model, self.padded_vocab)
        return model


def _version() -> tuple[int, ...]:
    """(major, minor) of transformers."""
    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def find_architecture(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    own: type[PreTrainedModel] | None = None,
    *,
    latent_cache: bool = False,
    drafts: bool = False,
) -> tuple[PreTrainedModel, Probe]:
    """The model that serves a checkpoint, on the meta device, and what its walk told.

    own: its class, if the checkpoint brings one. latent_cache: where a model compresses keys and
    values, and it can be done, they are kept so. drafts: with its draft layer (`draft_layer`).

    Raises:
        UnsupportedModel: none does; says why not the likeliest one.
        ModelError: the configuration is incomplete or contradicts itself.
    """
    refusal: ModelError | None = None
    classes = model_classes(config) if own is None else [(own, config)]
    for chosen, settings in classes:
        build = functools.partial(
            build_skeleton, settings, dtype, chosen, attention=registrations.PROBE, drafts=drafts
        )
        try:
            skeleton = build()
            if latent_cache and keep_latents(skeleton):
                with contextlib.suppress(UnsupportedModel):
                    return skeleton, probe(skeleton)
                skeleton = build()
            return skeleton, probe(skeleton)
        except ModelError as error:
            refusal = refusal or error
    assert refusal is not None  # there is a class, or model_classes raises
    raise refusal


def build_skeleton(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    chosen: type[PreTrainedModel],
    *,
    attention: str,
    drafts: bool = False,
) -> PreTrainedModel:
    """The model on the meta device: every module, no memory, weights not tied.

    Args:
        config: of the class, see `model_classes`.
        chosen: its class.
        drafts: with its draft layer.

    Raises:
        ModelError: the configuration is incomplete or contradicts itself.
        UnsupportedModel: the class can have no draft layer.
    """
    registrations.register()
    config = copy.deepcopy(config)
    for flag in ("use_cache", "output_router_logits", "output_attentions", "output_hidden_states"):
        for part in (config, config.get_text_config()):
            if getattr(part, flag, False):
                setattr(part, flag, False)
    try:
        with (
            torch.device("meta"),
            initialization.no_init_weights(),
            initialization.no_tie_weights(),
            initialization.meta_device_safe_creation_ops(),
        ):
            model: PreTrainedModel = with_meta_kernels(
                lambda: chosen._from_config(
                    config,
                    dtype=dtype,
                    attn_implementation=_implementations(config, attention),
                    experts_implementation=registrations.IMPLEMENTATION,
                )
            )
            if drafts:
                graft(model, dtype)
    except UnsupportedModel:
        raise
    except Exception as error:  # whatever a model's constructor raises on odd settings
        raise ModelError(
            f"transformers cannot build {chosen.__name__} from this config.json "
            f"({type(error).__name__}: {error})"
        ) from error
    dispatch_experts(model)
    return model.eval()


def probe(model: PreTrainedModel) -> Probe:
    """Walk a skeleton built with `registrations.PROBE`.

    Raises:
        UnsupportedModel: the model is dense or asks for something that we do not compute.
    """
    family = model.config.model_type
    if not any(hasattr(m, "has_gate") and hasattr(m, "is_transposed") for m in model.modules()):
        raise UnsupportedModel(f"{family} does not fit: {says_experts(model)}")
    try:
        found, touched = _walked(model)
        probes: dict[str, StateProbe] = {}
        if (_OF_STATES | KEEPING_INDEXED).intersection(_layer_kinds(model)):
            cached = cached_modules(model, found.attention_shapes)
            if not cached and _version() < _CACHES_SINCE:
                since = ".".join(map(str, _CACHES_SINCE))
                raise UnsupportedModel(
                    f"transformers {transformers.__version__} gives its layers no cache that can "
                    f"be ours; install a newer one: pip install 'transformers>={since}'"
                )
            with probed_states(cached, model.dtype) as probes:
                found, touched = _walked(model)
            found.keep_states(probes)
        found.keep_indexers(probes)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{family} does not fit: {error}") from None
    except Exception as error:  # any failure of foreign code means: does not fit
        raise UnsupportedModel(
            f"{family} does not fit: its forward pass needs more than token ids and positions, "
            f"such as masks or caches of its own ({type(error).__name__}: "
            f"{str(error).partition('. ')[0]})"
        ) from error
    _check_layers(model, found)
    called = (*found.attention_shapes, *(call.name for call in found.experts_calls))
    found.left_out = untouched_parts(model, touched.union(f"{name}." for name in called))
    return found


def _walked(model: PreTrainedModel) -> tuple[Probe, set[str]]:
    """A walk: what was recorded, and the names of what had a part in it."""
    found = Probe(model)
    for module in model.modules():
        registrations.bind(module, found)
    return found, walk(model)


def _layer_kinds(model: PreTrainedModel) -> list[str]:
    """The type of each layer, as the configuration says; "" where it does not."""
    text = model.config.get_text_config()
    return list(getattr(text, "layer_types", None) or [""] * text.num_hidden_layers)


def _check_layers(model: PreTrainedModel, found: Probe) -> None:
    family = model.config.model_type
    kinds = _layer_kinds(model)
    if found.drafts:
        kinds.append(kinds[-1])
    attention = sum(kind not in (KEEPING_NOTHING | KEEPING_STATES) for kind in kinds)
    if len(found.attention_shapes) != attention:
        raise UnsupportedModel(
            f"{family} does not fit: {attention - len(found.attention_shapes)} of its {attention} "
            "layers of attention keep something else than keys and values"
        )
    if attention == 0:
        raise UnsupportedModel(f"{family} does not fit: none of its layers is attention")
    indexed = sum(shape.indexed for shape in found.attention_shapes.values())
    if indexed != sum(kind in KEEPING_INDEXED for kind in kinds):
        raise UnsupportedModel(
            f"{family} does not fit: of some of its layers of indexed attention it cannot be seen "
            "what picks the keys"
        )
    with_states = {number for number, kind in enumerate(kinds) if kind in _OF_STATES}
    if with_states != found.state_layers:
        raise UnsupportedModel(
            f"{family} does not fit: of its layers {sorted(with_states ^ found.state_layers)} it "
            "cannot be seen which state they keep"
        )
    calls = found.experts_calls
    if not calls:
        raise UnsupportedModel(f"{family} is configured without a Mixture-of-Experts layer")
    for what in ("experts", "hidden", "topk"):
        values = sorted({getattr(call, what) for call in calls})
        if len(values) > 1 or values[0] < 1:
            raise UnsupportedModel(
                f"{family} does not fit: its MoE layers differ in {what}: {values}"
            )


def _chunk(text: PreTrainedConfig) -> int:
    """Tokens of the chunks within which some layers attend; 0: none does."""
    if "chunked_attention" not in (getattr(text, "layer_types", None) or ()):
        return 0
    return max(1, int(text.attention_chunk_size))


def _attention_context(model: PreTrainedModel, text: PreTrainedConfig, chunk: int) -> int:
    """Within its first chunk, attention in chunks is attention to all tokens before. A model of an
    older transformers, where layers do not ask for their cache, is served no further: what of it
    depends on positions, such as Llama-4's temperatures, cannot be told them."""
    context = getattr(text, "max_position_embeddings", None)
    if not isinstance(context, int) or context < 1:
        context = _USUAL_CONTEXT  # refused where the context is asked for
    if chunk and not any(asks_for_length(module) for module in model.modules()):
        context = min(context, chunk)
    return context


def _implementations(config: PreTrainedConfig, attention: str) -> dict[str, str]:
    """By configuration inside of the whole one: ours for the text model, and for others, which
    nothing passes through, what they all know."""
    text = config.get_text_config()
    inner = {name: getattr(config, name, None) for name in config.sub_configs}
    return {"": attention, **{n: attention if c is text else "eager" for n, c in inner.items()}}


def _sees(mask: registrations.AskedMask, window: int | None, chunk: int, within: int) -> bool:
    """Whether the mask means: see every key up to the query, of the last `window` if given, of the
    same chunk if that is not 0.

    within: positions are below it.
    """
    edges = {0, within, *(2**power for power in range(1, 24))}
    for size in (window, chunk):
        edges |= {size, 2 * size} if size else set()
    near = {position + step for position in edges for step in (-1, 0, 1, 2)}
    positions = torch.tensor(sorted(p for p in near if 0 <= p < within), device="cpu")
    query, key = positions[:, None], positions[None, :]
    expected = key <= query
    if window is not None:
        expected = expected & (key > query - window)
    if chunk:
        expected = expected & (key // chunk == query // chunk)
    zero = torch.zeros((), dtype=torch.int64, device="cpu")
    try:
        seen = mask.sees(zero, zero, query, key)
    except Exception:  # noqa: BLE001 - a mask that needs more than positions is not ours
        return False
    return bool(torch.equal(torch.broadcast_to(seen, expected.shape), expected))
