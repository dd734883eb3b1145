#!/bin/bash
# sentence-transformers 6.2.0 with transformers 5.24.0, torch 2.14.1, Python 3.11; 2026-11-28.
#
# The RerankingEvaluator of SentenceTransformer puts a query's positive texts before its negative ones and sorts by the
# scores in a way that leaves up to 16 equal scores in place. A model that gives all texts the same embedding therefore has
# an MRR@10 of 1.00 with one positive and up to 15 negatives, as the best model has; with more negatives it falls to 0.10 or
# 0.00. MAP, which sorts by itself, is at chance. The evaluator of the same name for CrossEncoder turns the order round, so
# that there a tie counts against the model.
#
# Output seen: "15 negatives: MRR@10 1.00, MAP 0.06"; "16 negatives: MRR@10 0.10, MAP 0.06"; "30 negatives: MRR@10 0.00,
# MAP 0.03".
#
# Why it matters here: a model that has collapsed, and one that knows none of the words, look perfect by a figure that is
# reported for captions with a few hard negatives. In this project a tie never counts in the model's favour.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q sentence-transformers==6.2.0 transformers==5.24.0 torch==2.14.1 2> "$folder/pip.log" ||
    { cat "$folder/pip.log"; exit 1; }
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python - 2> err.log <<'EOF' || { cat err.log; exit 1; }
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import RerankingEvaluator
from sentence_transformers.sentence_transformer.modules import BoW

# A bag of words that knows one word, which none of the texts has: all embeddings are equal.
model = SentenceTransformer(modules=[BoW(vocab=["unicycle"])], device="cpu")
is_perfect = {4: True, 15: True, 16: False, 30: False}
for number, perfect in is_perfect.items():
    samples = [{"query": f"a dog {i}", "positive": [f"a dog runs {i}"],
                "negative": [f"a cat {i} {j}" for j in range(number)]} for i in range(5)]
    seen = RerankingEvaluator(samples, at_k=10)(model)
    print(f"{number} negatives: MRR@10 {seen['mrr@10']:.2f}, MAP {seen['map']:.2f}")
    assert (seen["mrr@10"] == 1) == perfect and abs(seen["map"] - 1 / (number + 1)) < 1e-6, seen
EOF
