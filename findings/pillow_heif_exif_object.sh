#!/bin/bash
# pillow-heif 1.8.1 with Pillow 12.0.0, Python 3.11; 2026-11-28.
#
# A JPEG of 80 x 40 pixels with the EXIF orientation 6 is shown upright, as 40 x 80. It is saved as HEIC with its EXIF in
# the two ways that Pillow knows. With the bytes of info["exif"], pillow-heif writes the turn as a property of the picture
# ("irot"), by which readers of HEIC turn, and it opens as 40 x 80. With the object of getexif(), it writes no such property,
# but the EXIF as it is, which readers of HEIC have to ignore: it opens as 80 x 40, with the orientation 1, and
# ImageOps.exif_transpose leaves it lying on its side. JPEG, WebP and AVIF are turned in both ways.
#
# Output seen: HEIF bytes: (40, 80), object: (80, 40); WEBP bytes: (40, 80), object: (40, 80).
#
# Why it matters here: photos of an iPhone are HEIC, and people convert others to save space. A photo that lies on its side
# is not found by its words, and nothing that Pillow tells of an opened file says that it should be turned, but for
# info["original_orientation"], which is there for files that are turned already, too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pillow-heif==1.8.1 pillow==12.0.0 2> "$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cd "$folder"
venv/bin/python - <<'EOF'
import io

import pillow_heif
from PIL import Image, ImageOps

pillow_heif.register_heif_opener()
exif = Image.Exif()
exif[0x112] = 6
jpeg = io.BytesIO()
Image.new("RGB", (80, 40), "red").save(jpeg, "JPEG", exif=exif)
seen = {}
for name in ("HEIF", "WEBP"):
    for how in ("bytes", "object"):
        with Image.open(jpeg) as photo:
            assert ImageOps.exif_transpose(photo).size == (40, 80)
            saved = io.BytesIO()
            photo.save(saved, name, exif=photo.info["exif"] if how == "bytes" else photo.getexif())
        with Image.open(saved) as photo:
            seen[name, how] = ImageOps.exif_transpose(photo).size, photo.info.get("original_orientation")
        print(f"{name}, EXIF as {how}: {seen[name, how][0]}, original_orientation {seen[name, how][1]}")
assert seen["HEIF", "bytes"] == ((40, 80), 6)
assert seen["HEIF", "object"] == ((80, 40), 6)
assert seen["WEBP", "bytes"][0] == seen["WEBP", "object"][0] == (40, 80)
EOF
