#!/bin/bash
# sentence-transformers 6.2.0 with transformers 5.24.0, torch 2.14.1, Python 3.11; 2026-11-28.
#
# SentenceTransformer("a/model") takes any text model of transformers and pools what its encoder makes. For M2M100 (to
# which NLLB belongs), Marian (the opus-mt models), Pegasus and Blenderbot it loads the weights into the class of the
# encoder alone. There the weights have other names than in the file ("layers.0..." and not "encoder.layers.0..."), so
# that none is loaded: the encoder is random, and each load gives other features. There is no error; transformers prints
# a report in which every weight is MISSING. The encoder of T5 is loaded as it should be.
#
# Output seen: "M2M100: two loads give the same features: False, cosine to those of the saved encoder: 0.277", and alike for
# the three others (-0.264, -0.024, -0.163; these vary); "T5: two loads give the same features: True, ... 1.000".
#
# Why it matters here: these are encoders that one would try for captions in other languages than English. Features that
# are stored would be those of random weights, and none of the next day's would fit to them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q sentence-transformers==6.2.0 transformers==5.24.0 torch==2.14.1 2> "$folder/pip.log" ||
    { cat "$folder/pip.log"; exit 1; }
"$folder/venv/bin/python" - 2> "$folder/err.log" <<'EOF' || { cat "$folder/err.log"; exit 1; }
import tempfile

import tokenizers
import torch
import transformers
from sentence_transformers import SentenceTransformer

TEXTS = ["a dog runs", "two red cats"]
SMALL = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
             encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=16)
T5 = dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
words = {word: i for i, word in enumerate("[PAD] [UNK] [EOS] a dog runs two red cats".split())}
own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=own, pad_token="[PAD]", unk_token="[UNK]",
                                                 model_max_length=16)

for family in ("M2M100", "Marian", "Pegasus", "Blenderbot", "T5"):
    config = getattr(transformers, family + "Config")(
        **(T5 if family == "T5" else SMALL), vocab_size=len(words), pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2)
    model = getattr(transformers, family + "Model")(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.5)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        first, second = (SentenceTransformer(folder, device="cpu").encode(TEXTS, convert_to_tensor=True)
                         for _ in range(2))
    tokens = tokenizer(TEXTS, return_tensors="pt")
    with torch.no_grad():
        saved = model.get_encoder()(tokens["input_ids"]).last_hidden_state.mean(1)
    same = torch.allclose(first, second, atol=1e-4)
    print(f"{family}: two loads give the same features: {same}, cosine to those of the saved encoder: "
          f"{torch.cosine_similarity(first, saved).mean().item():.3f}")
    assert same == torch.allclose(first, saved, atol=1e-4) == (family == "T5")
EOF
