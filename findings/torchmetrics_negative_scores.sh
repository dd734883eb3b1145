#!/bin/bash
# torchmetrics 1.9.0 with torch 2.14.1, Python 3.11; 2026-11-28.
#
# In RetrievalRecall, RetrievalMRR, RetrievalMAP and RetrievalPrecision, a relevant item whose score is zero or less counts as
# not relevant, wherever it is ranked. A ranking that is perfect by cosines or logits below zero has a recall of 0 at every
# K, and of 1 if a constant is added to all scores. RetrievalHitRate, RetrievalNormalizedDCG and RetrievalRPrecision look at
# the order alone, so that Recall@1 and HitRate@1 of a query with one relevant item differ. The documentation says that the
# scores are "a float tensor"; nothing warns.
#
# Output seen: "RetrievalRecall: 0.00 for scores below zero, 1.00 for the same plus 1", alike for MRR, MAP and Precision;
# "RetrievalHitRate: 1.00 ..., 1.00 ...", alike for the others.
#
# Why it matters here: cosines of photos and captions are often below zero, above all early in a training, and scores that
# are corrected for hubs nearly always. Recalls by these classes are not those of the field, where only the order counts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torchmetrics==1.9.0 torch==2.14.1 2> "$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cd "$folder"
venv/bin/python - <<'EOF'
import torch
from torchmetrics import retrieval

# One query with four items; the relevant one has the highest score.
cosines = torch.tensor([-0.1, -0.2, -0.3, -0.4])
relevant = torch.tensor([True, False, False, False])
query = torch.zeros(4, dtype=torch.long)
expected = {"Recall": (0, 1), "MRR": (0, 1), "MAP": (0, 1), "Precision": (0, 1),
            "HitRate": (1, 1), "NormalizedDCG": (1, 1), "RPrecision": (1, 1)}
for name, values in expected.items():
    options = {} if name == "RPrecision" else {"top_k": 1}
    seen = tuple(getattr(retrieval, f"Retrieval{name}")(**options)(scores, relevant, indexes=query).item()
                 for scores in (cosines, cosines + 1))
    print(f"Retrieval{name}: {seen[0]:.2f} for scores below zero, {seen[1]:.2f} for the same plus 1")
    assert seen == values, (name, seen)
EOF
