"""The orientation of a photo whose file has lost its EXIF.

img2dataset stores a photo anew, as its pixels lie and without EXIF, and lists the tags that it had
in NAME.json. This module must not import torch."""
import json
from pathlib import Path

MAX_BYTES = 1 << 20  # of a NAME.json; one of img2dataset has a few thousand
# How the package exifread, and so img2dataset, spells the values of EXIF's orientation.
ORIENTATIONS = {
    "Horizontal (normal)": 1,
    "Mirrored horizontal": 2,
    "Rotated 180": 3,
    "Mirrored vertical": 4,
    "Mirrored horizontal then rotated 90 CCW": 5,
    "Rotated 90 CW": 6,
    "Mirrored horizontal then rotated 90 CW": 7,
    "Rotated 90 CCW": 8,
}


def parse_json(content):
    """Return the content of a JSON file, or None if it is not valid."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def orientation_in(content):
    """Return the value of EXIF's orientation, 1 to 8, in the bytes of a NAME.json. It is 1 if there
    is none."""
    if b"Image Orientation" not in content:
        return 1
    content = parse_json(content)
    exif = content.get("exif") if isinstance(content, dict) else None
    exif = parse_json(exif) if isinstance(exif, str) else exif
    value = exif.get("Image Orientation") if isinstance(exif, dict) else None
    return ORIENTATIONS.get(value, 1) if isinstance(value, str) else 1


def lost_orientation(path):
    """Return the value of EXIF's orientation that counts for a photo file without such a tag.

    path: a Path, beside which NAME.json is looked for, or an object that has the value as an
    attribute `orientation`, like a TarMember."""
    if not isinstance(path, Path):
        return getattr(path, "orientation", 1)
    try:
        path = path.with_suffix(".json")
        if not path.is_file():  # a pipe would be waited for
            return 1
        with path.open("rb") as file:
            return orientation_in(file.read(MAX_BYTES))
    except (OSError, ValueError):  # it cannot be read, or the name cannot have a suffix
        return 1
