#!/usr/bin/env bash
# Llama-4's multimodal class fails on a prompt that is text only.
#
# Versions    transformers 5.24.0, torch 2.13.0.
# Expected    as with other multimodal classes of transformers (Qwen3-VL-MoE is run beside it): without
#             images they are language models, and a forward pass over token ids gives logits.
# Seen        Llama4ForConditionalGeneration raises AttributeError: its output is made of an attribute
#             image_outputs, which the output of the model inside has only where there were images.
#             Llama4ForCausalLM over the same language model gives logits. So Llama-4 is to be served, or
#             tried at load, by its text class, whatever config.json names.
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
from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

print("transformers", transformers.__version__, "torch", torch.__version__)
text = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16, pad_token_id=0,
)
llama = Llama4Config(
    text_config=dict(text, intermediate_size_mlp=32, num_local_experts=2),
    vision_config=dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        vision_output_dim=32, projector_input_dim=32, projector_output_dim=32,
    ),
)
qwen = Qwen3VLMoeConfig(
    text_config=dict(text, moe_intermediate_size=16, num_experts=2, num_experts_per_tok=1),
    vision_config=dict(
        depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32,
        deepstack_visual_indexes=[0],
    ),
)


def answer(model: torch.nn.Module) -> str:
    """What a forward pass over six tokens of text gives."""
    try:
        with torch.no_grad():
            return f"logits of shape {tuple(model(input_ids=torch.arange(3, 9)[None]).logits.shape)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


models = [
    Qwen3VLMoeForConditionalGeneration(qwen),
    Llama4ForCausalLM(llama.text_config),
    Llama4ForConditionalGeneration(llama),
]
said = [answer(model.eval()) for model in models]
for model, text in zip(models, said, strict=True):
    print(f"{type(model).__name__}: {text}")
right = said[0].startswith("logits") and said[1].startswith("logits")
sys.exit(0 if right and said[2].startswith("AttributeError") else 1)
PY
"$folder/venv/bin/python" "$folder/run.py"
