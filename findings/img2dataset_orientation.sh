#!/bin/bash
# img2dataset 1.47.0 with ExifRead-nocycle 3.0.1, opencv-python-headless 4.14.0.94, albumentations 1.4.24, Python 3.11;
# 2026-11-28.
#
# A phone's photo that was taken upright (EXIF orientation 6: 400 x 300 pixels, shown as 300 x 400) is written lying on its
# side, without EXIF. The turn survives only in the JSON file, as the words of a text that is itself JSON:
# "exif": "{\"Image Orientation\": \"Rotated 90 CW\"}". The width and height beside it are those of the picture on its side.
# Every resize_mode that encodes anew does so ("border", the default, "center_crop", "keep_ratio"). With
# disable_all_reencoding the file keeps its EXIF, and the JSON file says the same words: who turns by them turns twice.
#
# Output seen: keep_ratio: 341 x 256, no EXIF in the file, "Rotated 90 CW" in the JSON file; original bytes: 400 x 300,
# EXIF in the file, "Rotated 90 CW" in the JSON file.
#
# Why it matters here: shards of img2dataset are a layout that this project trains on, and a search over photos that are
# upright finds little with a model that has learned them lying on their side. So the field is read, but only for a file
# without an orientation of its own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"; kill ${server:-} 2> /dev/null || true' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q img2dataset==1.47.0 ExifRead-nocycle==3.0.1 opencv-python-headless==4.14.0.94 \
    albumentations==1.4.24 "setuptools<81" 2> "$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cd "$folder"
mkdir photos
venv/bin/python - <<'EOF'
import struct

import cv2
import numpy as np

picture = np.zeros((300, 400, 3), np.uint8)
picture[:60] = 255
jpeg = cv2.imencode(".jpg", picture)[1].tobytes()
# An EXIF segment of one tag, 0x112 (orientation), with the value 6.
tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x112, 3, 1, 6, 0, 0)
segment = b"\xff\xe1" + struct.pack(">H", 2 + 6 + len(tiff)) + b"Exif\0\0" + tiff
open("photos/upright.jpg", "wb").write(jpeg[:2] + segment + jpeg[2:])
assert cv2.imread("photos/upright.jpg").shape == (400, 300, 3)  # OpenCV shows it upright
EOF
port=$((20000 + RANDOM % 20000))
venv/bin/python -m http.server "$port" --bind 127.0.0.1 -d photos > server.log 2>&1 &
server=$!
sleep 2
printf 'url,caption\nhttp://127.0.0.1:%s/upright.jpg,a photo\n' "$port" > urls.csv
make() {
    NO_ALBUMENTATIONS_UPDATE=1 venv/bin/img2dataset --url_list urls.csv --input_format csv --url_col url \
        --caption_col caption --output_format webdataset --processes_count 1 --thread_count 1 --image_size 256 "$@" \
        > img2dataset.log 2>&1
}
make --output_folder encoded --resize_mode keep_ratio
make --output_folder original --resize_mode no --disable_all_reencoding True
venv/bin/python - <<'EOF'
import json
import tarfile

import cv2
import numpy as np

for folder, size, has_exif in (("encoded", (256, 341), False), ("original", (300, 400), True)):
    with tarfile.open(f"{folder}/00000.tar") as shard:
        content = {member.name: shard.extractfile(member).read() for member in shard}
    jpeg, record = content["000000000.jpg"], json.loads(content["000000000.json"])
    pixels = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_UNCHANGED)
    exif = "EXIF" if b"Exif" in jpeg else "no EXIF"
    print(f"{folder}: {pixels.shape[1]} x {pixels.shape[0]}, {exif} in the file, in the JSON file {record['exif']}")
    assert pixels.shape[:2] == size and (b"Exif" in jpeg) == has_exif
    assert isinstance(record["exif"], str)
    assert json.loads(record["exif"])["Image Orientation"] == "Rotated 90 CW"
EOF
