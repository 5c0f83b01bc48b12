"""What is served of which models, as `flexpert models` and docs/models.md tell.

families.json is written by tests/models/test_every_family.py, which tries every row of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """A model type of transformers, and what becomes of its checkpoints.

    name: the model type, and which of its configurations. served: on CPUs; GPUs run the same
    modules. architecture: transformers' class that computes it. note: what is left out, or why it
    is refused.
    """

    name: str
    served: bool
    architecture: str
    note: str


@dataclass(frozen=True, slots=True)
class ServedFormat:
    """How weights may be stored. cpu, gpu: what becomes of them there. checked: by what."""

    name: str
    cpu: str
    gpu: str
    checked: str


FILE: Final = Path(__file__).parent / "families.json"

_told: Mapping[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))

TRANSFORMERS: Final[str] = _told["transformers"]
"""The release that was tried."""

FAMILIES: Final[Mapping[str, ModelFamily]] = {
    row["name"]: ModelFamily(**row) for row in _told["families"]
}

_LAYOUTS: Final = "tests/models/test_stored_formats.py"
_WHOLE: Final = "tests/models/test_quantized_checkpoints.py"

FORMATS: Final = (
    ServedFormat("bfloat16, float32", "as stored", "as stored", "tests/models/test_loading.py"),
    ServedFormat("float16", "as bfloat16", "as bfloat16", "tests/models/test_loading.py"),
    *(
        ServedFormat(name, "read", "read", checked)
        for name, checked in (
            ("fp8 (e4m3) by tensor, row or block: fp8, fbgemm_fp8", _WHOLE),
            ("mxfp4 (GPT-OSS)", _WHOLE),
            ("compressed-tensors: int2 to int8, fp8, NVFP4, MXFP4, MXFP8", _LAYOUTS),
            ("modelopt: fp8, int8, NVFP4, MXFP4, MXFP8", _LAYOUTS),
            ("gptq: 2, 3, 4, 8 bits", _LAYOUTS),
            ("awq: 4 bits, gemm", _LAYOUTS),
        )
    ),
)
"""In short; docs/quantization.md says which layouts of each, and what stays packed in memory."""


def as_markdown() -> str:
    """Both tables, for the documentation."""
    rows = [
        "Formats of weights, in safetensors files; [quantization.md](quantization.md) says more:",
        "",
        "| format | on a CPU | on a GPU | checked by |",
        "|---|---|---|---|",
        *(f"| {one.name} | {one.cpu} | {one.gpu} | `{one.checked}` |" for one in FORMATS),
        "",
        f"Families of transformers {TRANSFORMERS}, by `model_type`:",
        "",
        "| family | served by | note |",
        "|---|---|---|",
        *(
            f"| {one.name} | {one.architecture or '(refused)'} | {_cell(one.note)} |"
            for one in FAMILIES.values()
        ),
    ]
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
