"""Every MoE family of transformers: its own greedy tokens on one rank and on three, or refused.

What is found is kept in `flexpert models`' table. `python tests/models/test_every_family.py` prints
it, and writes it anew together with docs/models.md; with PYTHONPATH=src:tests.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.checkpoints import prompt_of, random_weights
from support.local_ranks import greedy_on
from support.small_configs import VARIANTS, moe_families, small_config
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from flexpert.errors import ModelError
from flexpert.models import catalogue
from flexpert.models.architecture import model_classes
from flexpert.models.catalogue import ModelFamily
from flexpert.models.source import ModelSource

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
SAMPLE = (
    "qwen3_moe",
    "qwen3_vl_moe",
    "llama4_text",
    "qwen3_next",
    "jamba, attention only",
    "jetmoe",
    "dbrx",
)
"""What is tried after every edit."""

PROMPTS = [prompt_of(n, seed=n) for n in (33, 7, 21)]
TOKENS = 8
MOST = 50_000_000  # parameters of a small model


def found(case: str, folder: Path) -> ModelFamily:
    """What becomes of a family: tried out. Raises: AssertionError: other tokens than its own."""
    model = random_model(case)
    if model is None:  # refused by its configuration alone, or not to be made small
        some_config(case).save_pretrained(folder)
    else:
        random_weights(model)
        model.save_pretrained(folder)
        end_in_text_config(folder)
        if "thinker_config" in small_config(case).sub_configs:
            inside_of_omni(folder, small_config(case))
    try:
        source = ModelSource.open(str(folder), latent_cache=True)
    except ModelError as error:
        return ModelFamily(case, False, "", str(error).removeprefix(f"{folder}: "))
    assert model is not None, f"{case} is served: let small_configs.py make one"
    if "text_config" in model.config.sub_configs:
        assert source.info.eos_token_ids == (7,)
    for ranks in (1, 3):
        for prompt, answer in zip(PROMPTS, greedy_on(source, ranks, PROMPTS, TOKENS), strict=True):
            with torch.inference_mode():
                logits = of_text(model)(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
            expected = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
            assert answer == expected, f"{case} on {ranks} ranks gives other tokens"
    skipped = {part: keys for part, keys in source.checkpoint.left_out.items() if keys}
    note = f"without {', '.join(sorted(skipped))}" if skipped else ""
    return ModelFamily(case, True, source.info.architecture, note)


def random_model(case: str) -> PreTrainedModel | None:
    """Of the class that transformers saves a family with; None: see `found`."""
    try:
        config = small_config(case)
        chosen, settings = model_classes(config)[0]
        with torch.device("meta"):
            size = sum(p.numel() for p in chosen._from_config(settings).parameters())
        if size > MOST:
            return None
        model: PreTrainedModel = chosen._from_config(
            settings,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    except Exception:  # noqa: BLE001 - whatever a library's class raises on sizes it did not expect
        return None
    return model.eval()


def some_config(case: str) -> PreTrainedConfig:
    """Small if that is possible."""
    try:
        return small_config(case)
    except Exception:  # noqa: BLE001 - see random_model
        return AutoConfig.for_model(VARIANTS.get(case, (case,))[0])


def of_text(model: Any) -> Any:
    """What answers to text; transformers 5.24's own wrapper of Llama-4 fails on it."""
    broken = type(model).__name__ == "Llama4ForConditionalGeneration"
    return model.language_model if broken else model


def end_in_text_config(folder: Path) -> None:
    """Name the end token in the configuration of the text model alone, if there is one."""
    (folder / "generation_config.json").unlink(missing_ok=True)
    told = json.loads((folder / "config.json").read_text())
    if "text_config" in told:
        told["eos_token_id"] = None
        told["text_config"]["eos_token_id"] = 7
        (folder / "config.json").write_text(json.dumps(told))


def inside_of_omni(folder: Path, config: PreTrainedConfig) -> None:
    """Make a checkpoint the part that thinks of a whole that also speaks."""
    config.thinker_config.text_config.eos_token_id = 7
    config.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {f"thinker.{name}": tensor for name, tensor in load_file(file).items()}
    save_file({**tensors, "talker.nothing": torch.zeros(2)}, file, {"format": "pt"})


CASES = tuple(catalogue.FAMILIES)  # to ask transformers takes seconds


@pytest.mark.parametrize(
    "case", [c if c in SAMPLE else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_a_family_gives_its_own_tokens_or_is_refused(case: str, tmp_path: Path) -> None:
    if VARIANTS.get(case, (case,))[0] not in CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    family = found(case, tmp_path)
    if transformers.__version__ == catalogue.TRANSFORMERS:
        assert family == catalogue.FAMILIES[case], f"run {__file__}"


@pytest.mark.slow  # makes the configuration of everything that transformers has
def test_no_family_is_missing() -> None:
    if transformers.__version__ != catalogue.TRANSFORMERS:
        pytest.skip(f"the table is of transformers {catalogue.TRANSFORMERS}")
    assert set(CASES) == {*moe_families(), *VARIANTS}, f"run {__file__}"


def test_the_documentation_has_the_table() -> None:
    begin, _, rest = DOCS.read_text().partition("<!-- table -->\n")
    shown, _, end = rest.partition("<!-- /table -->")
    if shown.strip() != catalogue.as_markdown():
        DOCS.write_text(f"{begin}<!-- table -->\n{catalogue.as_markdown()}\n<!-- /table -->{end}")
        pytest.fail(f"{DOCS} was not up to date; it is now: look at it and commit it")


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows, wrong = [], 0
    for case in sys.argv[1:] or (*moe_families(), *VARIANTS):
        with tempfile.TemporaryDirectory() as folder:
            try:
                family = found(case, Path(folder))
            except Exception as error:  # noqa: BLE001 - the table goes on
                wrong += 1
                print(f"{case}: WRONG {type(error).__name__}: {error}", flush=True)
                continue
        rows.append(family)
        print(f"{case}: {'equal' if family.served else 'refused'} {family.note}", flush=True)
    served = sum(row.served for row in rows)
    print(f"{served} give their own tokens, {len(rows) - served} are refused, {wrong} are wrong")
    if not sys.argv[1:]:
        told = {"transformers": transformers.__version__, "families": [asdict(r) for r in rows]}
        catalogue.FILE.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
