"""What attention to latents (MLA) costs on a CPU beside attention to expanded keys and values.

    PYTHONPATH=tests python tools/latent_attention.py [HEADS]

Two layers of DeepSeek-V3's attention with random weights and hardly anything beside it, in bf16 on
one thread: a prompt of 2,048 tokens in chunks of 256, then tokens one by one; both ways in turn,
the least of five rounds.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from support.checkpoints import make_checkpoint, prompt_of, single_runner

PROMPT, CHUNK, DECODED, ROUNDS = 2048, 256, 6, 5


def main(heads: int) -> None:
    torch.set_num_threads(1)
    times: dict[tuple[bool, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(
            "deepseek_v3",
            Path(folder),
            torch.bfloat16,
            num_hidden_layers=2,
            hidden_size=512,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            v_head_dim=128,
            max_position_embeddings=4096,
        )
        kinds = {
            latent: single_runner(path, blocks=150, block_size=16, latent_cache=latent)
            for latent in (False, True)
        }
        for _ in range(ROUNDS):
            for latent, sequences in kinds.items():
                sequences.drop("a")
                pieces = [prompt_of(CHUNK, seed=at) for at in range(PROMPT // CHUNK)]
                pieces += [[5]] * DECODED
                for number, piece in enumerate(pieces):
                    begun = time.perf_counter()
                    sequences.step({"a": piece})
                    what = f"chunk {number + 1}" if len(piece) > 1 else "a token behind them"
                    times[latent, what].append(time.perf_counter() - begun)
    for latent, sequences in kinds.items():
        size = sequences.runner.info.kv_bytes_per_token() // 2
        print(f"{'latent' if latent else 'expanded'}: {size} bytes a token and layer")
    for what in dict.fromkeys(what for _, what in times):
        expanded, latent_s = min(times[False, what]), min(times[True, what])
        print(
            f"{what}: {expanded * 1e3:.1f} ms expanded, {latent_s * 1e3:.1f} ms latent, "
            f"{latent_s / expanded:.2f}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16)
