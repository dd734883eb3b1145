#!/bin/bash
# transformers 5.24.0 with tokenizers 0.23.3, Python 3.11; 2026-11-28.
#
# A folder that a model was saved to without its tokenizer (model.save_pretrained alone) has a config.json and weights.
# AutoTokenizer.from_pretrained gives a tokenizer for it all the same: one of the class that fits the config, whose
# vocabulary holds nothing but special tokens. There is no error and no warning. All words become the unknown token, or,
# by class, nothing at all, so that two texts differ at most in their length: BERT gives [unk] for each word, CLIP the end
# token for each character, RoBERTa and GPT-2 nothing. Its model_max_length is 10^30.
#
# Output seen: "BertConfig: 5 entries, a dog runs -> [2, 1, 1, 1, 3], two red cats -> [2, 1, 1, 1, 3]"; RobertaConfig
# [2, 3] for both; GPT2Config [] for both.
#
# Why it matters here: a text encoder that a user has fine-tuned and saved this way would train without an error on
# features that are the same for most captions. So a tokenizer that knows no words is refused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3 2> "$folder/pip.log" ||
    { cat "$folder/pip.log"; exit 1; }
"$folder/venv/bin/python" - 2> "$folder/err.log" <<'EOF' || { cat "$folder/err.log"; exit 1; }
import tempfile

import transformers

TOKENS = {"BertConfig": [2, 1, 1, 1, 3], "RobertaConfig": [2, 3], "GPT2Config": [], "CLIPConfig": None}
for name, expected in TOKENS.items():
    with tempfile.TemporaryDirectory() as folder:
        getattr(transformers, name)().save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        one, other = (tokenizer(text)["input_ids"] for text in ("a dog runs", "two red cats"))
        print(f"{name}: {len(tokenizer)} entries, a dog runs -> {one}, two red cats -> {other}")
        assert set(tokenizer.get_vocab()) == set(tokenizer.all_special_tokens)
        assert expected is None or one == other == expected
EOF
