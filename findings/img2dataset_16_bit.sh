#!/bin/bash
# img2dataset 1.47.0 with opencv-python-headless 4.14.0.94, albumentations 1.4.24, Python 3.11; 2026-11-28.
#
# A PNG or TIFF file of 16 bits a channel becomes an almost white JPEG, for each resize_mode that encodes anew ("border",
# the default, "center_crop" and "keep_ratio"). Its status is "success", and nothing is logged. The resizer decodes with
# cv2.IMREAD_UNCHANGED, which keeps the 16 bits, and encodes them as a JPEG, where OpenCV cuts every level above 255 to 255
# instead of dividing by 257. A picture of 8 bits that looks the same is written as it is.
#
# Output seen: mean level of the picture as 8 bits 120, as 16 bits 254; both "success".
#
# Why it matters here: shards of img2dataset are a layout that this project trains on. The captions of such photos are
# learned with white pictures, which no check of the files can notice.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"; kill ${server:-} 2> /dev/null || true' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q img2dataset==1.47.0 opencv-python-headless==4.14.0.94 albumentations==1.4.24 \
    "setuptools<81" 2> "$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cd "$folder"
mkdir photos
venv/bin/python - <<'EOF'
import cv2
import numpy as np

rows, columns = np.mgrid[0:300, 0:400]
picture = np.stack([columns * 160, rows * 200, (columns + rows) * 90], 2).clip(0, 65535)
cv2.imwrite("photos/bits16.png", picture.astype(np.uint16))
cv2.imwrite("photos/bits8.png", (picture / 257).astype(np.uint8))
EOF
port=$((20000 + RANDOM % 20000))
venv/bin/python -m http.server "$port" --bind 127.0.0.1 -d photos > server.log 2>&1 &
server=$!
sleep 2
printf 'url,caption\nhttp://127.0.0.1:%s/bits8.png,eight\nhttp://127.0.0.1:%s/bits16.png,sixteen\n' "$port" "$port" > urls.csv
NO_ALBUMENTATIONS_UPDATE=1 venv/bin/img2dataset --url_list urls.csv --input_format csv --url_col url \
    --caption_col caption --output_format webdataset --output_folder out --processes_count 1 --thread_count 1 \
    --resize_mode keep_ratio --image_size 256 > img2dataset.log 2>&1
venv/bin/python - <<'EOF'
import json
import tarfile

import cv2
import numpy as np

means = {}
with tarfile.open("out/00000.tar") as shard:
    content = {member.name: shard.extractfile(member).read() for member in shard}
for name in [name for name in content if name.endswith(".json")]:
    record = json.loads(content[name])
    pixels = cv2.imdecode(np.frombuffer(content[name.replace(".json", ".jpg")], np.uint8), 1)
    means[record["caption"]] = pixels.mean()
    print(f"{record['caption']} bits: mean level {pixels.mean():.0f} of 255, {record['status']}")
    assert record["status"] == "success"
assert 100 < means["eight"] < 140 and means["sixteen"] > 250, means
EOF
