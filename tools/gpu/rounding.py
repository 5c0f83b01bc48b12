"""How far bf16 is from float32, layer by layer: ours, and transformers' own on the same device.

    PYTHONPATH=src:tests python tools/gpu/rounding.py [--family qwen3_next]

A small random checkpoint in bf16, whose weights transformers also computes with in float32. Printed
is, behind each decoder layer and of the logits, the difference to float32 relative to its size: of
the median token and of the worst one, and for how many tokens the routers so far have chosen other
experts.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from support.checkpoints import make_checkpoint, prompt_of, single_runner
from support.device_runner import device_runner
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


class Seen:
    """What the decoder layers of a model gave, and which experts were chosen.

    hidden: by layer, [tokens, width]; chosen: by layer, [tokens, experts of a token], in order.
    """

    def __init__(self, model: Any) -> None:
        self.hidden: dict[int, Tensor] = {}
        self.chosen: dict[int, Tensor] = {}
        for number, layer in enumerate(model.model.layers):
            layer.register_forward_hook(self._layer(number))
            for name, module in layer.named_modules():
                if name.endswith("experts"):
                    module.register_forward_pre_hook(self._experts(number), with_kwargs=True)

    def _layer(self, number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            self.hidden[number] = hidden.detach().reshape(-1, hidden.shape[-1]).float().cpu()

        return hook

    def _experts(self, number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, named: Any) -> None:
            given = [one for one in (*inputs, *named.values()) if isinstance(one, Tensor)]
            ids = next(one for one in given if not one.is_floating_point())
            self.chosen[number] = ids.detach().reshape(-1, ids.shape[-1]).sort(-1).values.cpu()

        return hook


def errors(ours: Tensor, exact: Tensor) -> Tensor:
    """[tokens]: relative to the size of each row."""
    return (ours - exact).norm(dim=-1) / exact.norm(dim=-1)


def compare(family: str, tokens: int, seed: int, device: torch.device, found: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(family, Path(folder), torch.bfloat16, seed)
        prompt = prompt_of(tokens, seed)
        seen, logits = {}, {}
        for name, dtype in (("float32", torch.float32), ("transformers", torch.bfloat16)):
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
            ).to(device)
            seen[name] = Seen(model)
            with torch.inference_mode():
                given = torch.tensor([prompt], device=device)
                logits[name] = model(given).logits[0].float().cpu()
        if device.type == "cuda":
            ours = device_runner(path, device, dtype="bfloat16")
        else:
            ours = single_runner(path, dtype="bfloat16", block_size=16)
        seen["flexpert"] = Seen(ours.runner._model)
        logits["flexpert"] = ours.step({"a": prompt})["a"].float().cpu()
    exact = seen["float32"]
    for name in ("transformers", "flexpert"):
        other = torch.zeros(tokens, dtype=torch.bool)
        for number, hidden in exact.hidden.items():
            if number in exact.chosen:
                other |= (seen[name].chosen[number][:tokens] != exact.chosen[number]).any(-1)
            wrong = errors(seen[name].hidden[number][:tokens], hidden)  # ours has padding
            found[f"layer {number}"][name].append((wrong, other.clone()))
        wrong = errors(logits[name], logits["float32"])
        found["logits"][name].append((wrong, other))
        most = (logits[name] - logits["float32"]).abs().amax(-1)
        found["logits, absolute"][name].append((most, other))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", default="qwen3_next")
    parser.add_argument("--tokens", type=int, default=70)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    found: Any = defaultdict(lambda: defaultdict(list))
    for seed in range(args.seeds):
        compare(args.family, args.tokens, seed, torch.device(args.device), found)
    print(f"{args.family}, {args.seeds} times {args.tokens} tokens on {args.device}")
    for place, kinds in found.items():
        for name, pairs in kinds.items():
            wrong = torch.cat([one for one, _ in pairs])
            other = torch.cat([one for _, one in pairs])
            same = wrong[~other]
            most = f"{float(same.max()):.4f}" if len(same) else "none"
            print(
                f"{place:17} {name:13} median {float(wrong.median()):.4f}, most "
                f"{float(wrong.max()):.4f}; other experts for {int(other.sum())} tokens, without "
                f"them at most {most}"
            )


if __name__ == "__main__":
    main()
