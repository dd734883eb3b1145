#!/bin/bash
# sentence-transformers 6.2.0 with transformers 5.24.0, torch 2.14.1, Python 3.11; 2026-11-28.
#
# A model for sentences is often made from a decoder such as Qwen3: Transformer("a/decoder"), then pooling of the last
# token. If the tokenizer of that decoder has a chat template, which those of chat models have, the new model puts each
# text of encode() into the template, as the words of a user, although no conversation was given and no option was set.
# The same weights without the template give other embeddings. Nothing is printed. The choice is saved with the model,
# in its sentence_bert_config.json, and stays even if the template is an ordinary one. A model whose files were written
# by an older version, without that entry, encodes the texts as they are.
#
# Output seen: "cosine of a text with and without a chat template in the folder: -0.05", and
# "with the files of an older version: 1.00".
#
# Why it matters here: features of the same decoder differ with the version of the package that wrote its files. This
# project refuses such a model instead of giving features that its authors do not mean.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q sentence-transformers==6.2.0 transformers==5.24.0 torch==2.14.1 2> "$folder/pip.log" ||
    { cat "$folder/pip.log"; exit 1; }
"$folder/venv/bin/python" - "$folder" 2> "$folder/err.log" <<'PYTHON' || { cat "$folder/err.log"; exit 1; }
import json
import sys
from pathlib import Path

import tokenizers
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer

TEMPLATE = "{% for m in messages %}the user says {{ m['content'] }} now{% endfor %}"
folder = Path(sys.argv[1])
words = {word: i for i, word in enumerate("[PAD] [UNK] the user says now a red circle".split())}
own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=own, pad_token="[PAD]", unk_token="[UNK]")
torch.manual_seed(0)
model = transformers.Qwen3Model(transformers.Qwen3Config(
    vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=8)).eval()
for weight in model.parameters():
    if weight.ndim > 1:
        torch.nn.init.normal_(weight, std=0.5)


def embedding(model):
    return model.encode(["a red circle"], convert_to_tensor=True)[0]


def make(name, template):
    tokenizer.chat_template = template
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return SentenceTransformer(modules=[Transformer(str(folder / name)), Pooling(16, "lasttoken")], device="cpu")


plain, chat = make("plain", None), make("chat", TEMPLATE)
cosine = torch.cosine_similarity(embedding(plain), embedding(chat), dim=0).item()
print(f"cosine of a text with and without a chat template in the folder: {cosine:.2f}")
assert cosine < 0.9
chat.save_pretrained(str(folder / "saved"))
again = torch.cosine_similarity(
    embedding(chat), embedding(SentenceTransformer(str(folder / "saved"), device="cpu")), dim=0).item()
assert again > 0.999
(folder / "saved" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))
older = embedding(SentenceTransformer(str(folder / "saved"), device="cpu"))
cosine = torch.cosine_similarity(embedding(plain), older, dim=0).item()
print(f"with the files of an older version: {cosine:.2f}")
assert cosine > 0.999
PYTHON
