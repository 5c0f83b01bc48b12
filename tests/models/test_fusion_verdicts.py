"""A load that is given an earlier one's verdicts tries nothing, and replaces the same modules."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from support.checkpoints import FAMILIES, LocalMoE, Sequences, prompt_of
from torch import Tensor, nn

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from flexpert.kernels.kernel_set import Kernels, cpu_kernels, gpu_kernels
from flexpert.models import fused, fused_modules, registrations
from flexpert.models.fused import fuse
from flexpert.models.fused_modules import fuse_modules
from flexpert.models.fusion_verdicts import (
    MOST_BYTES,
    AttentionFusion,
    FusionVerdicts,
    LayerFusion,
    NormFusion,
    RouterFusion,
    Verdict,
    decode_verdicts,
    encode_verdicts,
)
from flexpert.models.model_runner import ModelRunner
from flexpert.models.source import ModelSource

Trials = Counter[str]


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Trials:
    """How often each trial was made."""
    made: Trials = Counter()
    for where, name in (
        (fused, "_is_norm"),
        (fused_modules, "_try_attention"),
        (fused_modules, "_try_router"),
    ):
        monkeypatch.setattr(where, name, counted(getattr(where, name), name, made))
    return made


def counted(trial: Callable[..., Any], name: str, made: Trials) -> Callable[..., Any]:
    def count(*args: Any, **options: Any) -> Any:
        made[name] += 1
        return trial(*args, **options)

    return count


def all_kernels() -> Kernels:
    """A CPU's, and those of a GPU for whole modules in Triton's interpreter."""
    return dataclasses.replace(
        cpu_kernels(), fusions=gpu_kernels(torch.device("cpu")).fusions, pads_batches=False
    )


def load(source: ModelSource, verdicts: FusionVerdicts) -> tuple[Sequences, list[str]]:
    laps: list[str] = []
    runner = ModelRunner.load(
        source,
        moe=LocalMoE(source),
        kv_blocks=16,
        kv_block_size=8,
        deterministic=False,
        kernels=all_kernels(),
        verdicts=verdicts,
        lap=laps.append,
    )
    return Sequences(runner, 8), laps


def replaced(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_load_tries_nothing_and_computes_the_same_bits(
    family: str, checkpoint: Callable[..., Path], trials: Trials
) -> None:
    source = ModelSource.open(str(checkpoint(family)))
    first, laps = load(source, {})
    assert trials["_is_norm"] > 0
    assert laps[-1] == "kernels by trials"
    encoded = encode_verdicts(first.runner.verdicts)
    assert encoded

    trials.clear()
    second, laps = load(source, decode_verdicts(encoded))
    assert not trials
    assert laps[-1] == "kernels by verdicts"
    assert second.runner.verdicts == first.runner.verdicts
    assert replaced(second.runner._model) == replaced(first.runner._model) != set()
    prompt = prompt_of(6, 1)
    for step in ({"a": prompt[:5]}, {"a": prompt[5:]}):
        assert torch.equal(first.step(step)["a"], second.step(step)["a"])


def test_every_kind_of_module_has_a_verdict(checkpoint: Callable[..., Path]) -> None:
    found = load(ModelSource.open(str(checkpoint("qwen3_moe"))), {})[0].runner.verdicts
    kinds = {type(verdict.fusion) for verdict in found.values()}
    assert kinds == {NormFusion, AttentionFusion, RouterFusion, LayerFusion}
    mixtral = load(ModelSource.open(str(checkpoint("mixtral"))), {})[0].runner.verdicts
    windows = {v.fusion.sliding_window for v in mixtral.values() if is_attention(v)}
    assert windows == {19}


def is_attention(verdict: Verdict) -> bool:
    return isinstance(verdict.fusion, AttentionFusion)


class NoNorm(nn.Module):
    """Looks like an RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


NO_NORM = f"{NoNorm.__module__}.{NoNorm.__qualname__}"


def test_what_was_tried_in_vain_is_not_tried_again(trials: Trials) -> None:
    with torch.inference_mode():
        found = fuse(NoNorm(), cpu_kernels(), deterministic=False)
        assert found == {"": Verdict(NO_NORM)}
        assert trials.pop("_is_norm") == 2
        module = NoNorm()
        assert fuse(module, cpu_kernels(), deterministic=False, known=found) == found
    assert not trials
    assert not replaced(module)


@pytest.mark.parametrize(
    "wrong",
    [
        Verdict("elsewhere.NoNorm", NormFusion(early=True)),
        Verdict("elsewhere.NoNorm"),
        Verdict(NO_NORM, RouterFusion(normalised=True, dtype="float32")),
        Verdict(NO_NORM, AttentionFusion(early=True)),
    ],
    ids=["another class", "another class in vain", "a router", "attention"],
)
def test_a_verdict_that_does_not_fit_the_module_is_ignored(wrong: Verdict, trials: Trials) -> None:
    module = NoNorm()
    with torch.inference_mode():
        found = fuse(module, cpu_kernels(), deterministic=False, known={"": wrong})
    assert trials["_is_norm"] == 2
    assert found == {"": Verdict(NO_NORM)}
    assert not replaced(module)


def test_a_verdict_gives_no_module_a_kernel_that_it_has_not_the_form_for() -> None:
    model = nn.ModuleDict({"layer": nn.LayerNorm(32), "table": nn.Embedding(4, 32)})
    wrong = {
        name: Verdict(f"{type(module).__module__}.{type(module).__qualname__}", fusion)
        for (name, module), fusion in zip(
            model.items(),
            (NormFusion(early=True), RouterFusion(normalised=True, dtype="float32")),
            strict=True,
        )
    }
    kernels = all_kernels()
    assert kernels.fusions
    with torch.inference_mode():
        assert fuse(model, kernels, deterministic=False, known=wrong) == {}
        assert fuse_modules(model, kernels.fusions, wrong) == {}
    assert not replaced(model)


class SinkAttention(nn.Module):
    """Passes a tensor of its own to attention."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 16
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(24, 32) for _ in range(3))
        self.o_proj = nn.Linear(32, 24)
        self.sinks = nn.Parameter(torch.zeros(2))
        self.doubled = False

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
    ) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, 16)
        q, k, v = (
            linear(hidden_states).view(shape).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = (part.unsqueeze(1) for part in position_embeddings)
        q, k = (x * cos + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin for x in (q, k))
        sinks = 2 * self.sinks if self.doubled else self.sinks
        out = registrations.bound(self).attention(self, q, k, v, None, s_aux=sinks)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


def test_attention_with_a_parameter_among_its_options_is_tried_once(trials: Trials) -> None:
    kernels = all_kernels().fusions
    assert kernels
    known: FusionVerdicts = {}
    for _ in range(2):
        module = SinkAttention()
        registrations.bind(module, SimpleNamespace(chunk=0))
        with torch.inference_mode():
            known = fuse_modules(module, kernels, known)
        fusion = known[""].fusion
        assert isinstance(fusion, AttentionFusion)
        assert fusion.sinks == "sinks"
        assert replaced(module) == {""}
    assert trials["_try_attention"] == 1


def test_attention_with_a_tensor_made_anew_among_its_options_is_left_alone() -> None:
    kernels = all_kernels().fusions
    assert kernels
    module = SinkAttention()
    module.doubled = True
    registrations.bind(module, SimpleNamespace(chunk=0))
    with torch.inference_mode():
        assert fuse_modules(module, kernels)[""].fusion is None
    assert not replaced(module)


# ---- on their way -------------------------------------------------------------------------------

FOUND = {
    "a": Verdict("m.Norm", NormFusion(early=False)),
    "b": Verdict("m.Norm", NormFusion(early=False)),
    "c": Verdict("m.Attention", AttentionFusion(True, False, 0.25, 9, sinks="sinks")),
    "d": Verdict("m.Router", RouterFusion(normalised=False, dtype="bfloat16")),
    "e": Verdict("m.Other"),
}


def test_verdicts_survive_their_way() -> None:
    assert decode_verdicts(encode_verdicts(FOUND)) == FOUND
    assert encode_verdicts({}) == b""


def test_the_verdicts_of_a_hundred_layers_fit() -> None:
    names = ("input_layernorm", "self_attn", "self_attn.q_norm", "self_attn.k_norm", "mlp.gate")
    verdict = Verdict("transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeAttention")
    large = {f"model.layers.{i}.{name}": verdict for i in range(100) for name in names}
    assert decode_verdicts(encode_verdicts(large)) == large


def test_too_many_verdicts_are_not_sent() -> None:
    assert encode_verdicts({str(i) * 50: Verdict("m.Norm") for i in range(MOST_BYTES // 50)}) == b""


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"\xc1",
        encode_verdicts(FOUND)[:-1],
        encode_verdicts(FOUND) + b"\x00",
        msgspec.msgpack.encode([[{"of": 1}, ["a"]]]),
        msgspec.msgpack.encode([[{"of": "m", "fusion": {"type": "norm", "early": 7}}, ["a"]]]),
        b"\x91\x92\x81\xa1x" + b"\x91" * 20_000 + b"\xc0\x90",
        b"\x91\x92\x81\xa2of\xa1\xff\x90",
        bytes(MOST_BYTES + 1),
    ],
    ids=["none", "junk", "cut", "more", "type", "field", "deep", "text", "long"],
)
def test_what_is_not_understood_is_no_verdict(broken: bytes) -> None:
    assert decode_verdicts(broken) == {}
