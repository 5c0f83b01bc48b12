#!/usr/bin/env bash
# A Mixture-of-Experts model that llm-compressor has written in asymmetric int4 does not load.
#
# Versions    transformers 5.17.0, compressed-tensors 0.19.0, llmcompressor 0.14.0.1, torch 2.13.0.
# Expected    as with symmetric int4, for which the same program is run: what llm-compressor writes with
#             save_compressed=True, AutoModelForCausalLM.from_pretrained reads.
# Seen        the symmetric checkpoint loads and computes. For the asymmetric one, which differs in its
#             zero points only, from_pretrained ends with a RuntimeError about the conversion of weights:
#             the experts' parts are put together from more tensors than it reckons with. Whoever serves
#             such checkpoints must unpack codes, scales and zero points by himself.
#
# Runs in a temporary folder. Exits with 0 if it is seen, 1 if it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.17.0 compressed-tensors==0.19.0 \
	llmcompressor==0.14.0.1
cat > "$folder/run.py" <<'PY'
import sys
import tempfile

import compressed_tensors
import llmcompressor
import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__, "compressed-tensors", compressed_tensors.__version__)
print("llmcompressor", llmcompressor.__version__, "torch", torch.__version__)


def loads(symmetric: bool) -> str:
    """Why a checkpoint does not load that llm-compressor has quantized and written; "": it does."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=160, hidden_size=128, intermediate_size=128, moe_intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts=4, num_experts_per_tok=2,
    )
    base = tempfile.mkdtemp(dir=sys.argv[1])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    four_bits = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=four_bits)
    recipe = QuantizationModifier(config_groups={"all": scheme}, ignore=["lm_head", "re:.*mlp.gate$"])
    oneshot(model=model, recipe=recipe)
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
        model.save_pretrained(folder, save_compressed=True)
        try:
            loaded = AutoModelForCausalLM.from_pretrained(folder)
            loaded(torch.arange(4)[None])
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""


results = {name: loads(name == "symmetric") for name in ("symmetric", "asymmetric")}
for name, why in results.items():
    print(f"int4 with groups of 32, {name}:", why or "loads and computes")
sys.exit(0 if not results["symmetric"] and results["asymmetric"] else 1)
PY
"$folder/venv/bin/python" "$folder/run.py" "$folder" 2>/dev/null
