#!/usr/bin/env bash
# DeepSeek-V3.2's indexer with few heads: a model gives other answers with a cache than without.
#
# Versions    transformers 5.24.0, torch 2.13.0, on a CPU.
# Expected    a causal model gives a token the same logits, but for rounding, whether all tokens are computed
#             at once or one after the other with a cache. (It does with 32 index heads: they differ by 1e-5.)
# Seen        with 2 index heads by as much as the logits are large. The indexer sums its heads' scores after
#             ReLU, so a key that no head likes scores exactly 0. Where fewer keys than index_topk score more,
#             keys that tie at 0 are picked among; which of them topk gives depends on how many keys there are
#             in all, and those of later tokens, masked with -inf, are counted. So a query attends to other
#             keys. With the 64 heads of the published model no key is liked by none; a shrunk configuration,
#             as tests make it, has them, and nothing says so.
#
# Runs in a temporary folder. Exits with 0 if it is seen, 1 if it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cat > "$folder/run.py" <<'PY'
import sys

import torch
import transformers
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

TOKENS, PICKED = 64, 8
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__, "torch", torch.__version__)


def differ(heads):
    """How many queries of the first layer pick other keys with a cache, and by how much logits differ."""
    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, index_n_heads=heads, index_head_dim=16, index_topk=PICKED,
        max_position_embeddings=256, initializer_range=0.3,
    )
    model = DeepseekV32ForCausalLM(config).eval()
    picked = []
    for module in model.modules():
        if type(module).__name__.endswith("Indexer"):
            module.register_forward_hook(lambda module, given, out: picked.append(out[0].tolist()))
    tokens = torch.randint(0, 64, (1, TOKENS))
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits[0]
        at_once = picked[0]
        cache, logits, others = None, [], 0
        for place in range(TOKENS):
            picked.clear()
            out = model(tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0, -1])
            others += place >= PICKED and set(picked[0][-1]) != set(at_once[place])
    gap = float((whole - torch.stack(logits)).abs().max())
    print(f"{heads} index heads: {others} of {TOKENS - PICKED} queries pick other keys; logits of up to "
          f"{float(whole.abs().max()):.1f} differ by {gap:.2g}")
    return others, gap


few, many = differ(2), differ(32)
sys.exit(0 if few[0] > 0 and few[1] > 1 and many[0] == 0 and many[1] < 1e-3 else 1)
PY
"$folder/venv/bin/python" "$folder/run.py" 2>/dev/null
