#!/bin/bash
# transformers 5.24.0 with torch 2.14.1, Python 3.11; 2026-11-28.
#
# The text half of AIMv2 reads from left to right: a token sees those before it. With the default attention ("sdpa")
# this holds only if a text of the batch is padded. A text alone, or a batch of texts of the same length, has a mask of
# ones; the library then makes no mask, expecting the attention to be causal by itself, and this model's is not. All
# tokens see each other, and the text has other features than in a batch with a longer one. There is no warning. With
# attn_implementation="eager" the features are the same.
#
# Output seen, of a small model with random weights: "sdpa: a text alone and beside a longer one: cosine 0.563" and
# "eager: ... cosine 1.000".
#
# Why it matters here: captions are encoded in batches and a query is encoded alone, so that a search would compare
# features of two kinds. So this model is loaded with the eager attention.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 torch==2.14.1 2> "$folder/pip.log" ||
    { cat "$folder/pip.log"; exit 1; }
"$folder/venv/bin/python" - 2> "$folder/err.log" <<'EOF' || { cat "$folder/err.log"; exit 1; }
import torch
import transformers

text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=12, num_attention_heads=2, vocab_size=40,
            eos_token_id=2)
vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
              patch_size=8)
config = transformers.Aimv2Config(text_config=text, vision_config=vision, projection_dim=12)
both = torch.tensor([[5, 6, 7, 2, 0, 0], [5, 6, 7, 8, 9, 2]])  # 2 ends a text, 0 is padding
for attention in ("sdpa", "eager"):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        beside, alone = (
            model.get_text_features(input_ids=ids, attention_mask=(ids > 0).long()).pooler_output
            for ids in (both, both[:1, :4]))
    cosine = torch.cosine_similarity(alone[0], beside[0], dim=0).item()
    print(f"{attention}: a text alone and beside a longer one: cosine {cosine:.3f}")
    assert cosine < 0.9 if attention == "sdpa" else cosine > 0.999
EOF
