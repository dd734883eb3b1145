"""Copies are found however they were made; other photos are not."""
import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from src.utils.duplicates import (
    SIGNATURE,
    flickr_number,
    has_flickr_form,
    near_duplicates,
    signature,
)

FLIP = Image.Transpose.FLIP_LEFT_RIGHT


def scene(seed):
    """Blurred noise: as much at a large scale as in photos."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC)


def recompressed(photo):
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=30)
    return Image.open(file).convert("RGB")


def cropped(photo):
    width, height = photo.size
    return photo.crop((width // 20, height // 20, width - width // 20, height - height // 20))


COPIES = {
    "recompressed": recompressed,
    "resized": lambda photo: photo.resize((200, 150)),
    "squeezed": lambda photo: photo.resize((224, 224)),
    "brightened": lambda photo: ImageEnhance.Brightness(photo).enhance(1.2),
    "darkened": lambda photo: ImageEnhance.Brightness(photo).enhance(0.7),
    "mirrored": lambda photo: photo.transpose(FLIP),
    "cropped": cropped,
    "cropped and mirrored": lambda photo: cropped(photo).transpose(FLIP),
}


def signatures(photos):
    found = np.stack([signature(photo) for photo in photos])
    assert found.shape[1:] == SIGNATURE and found.dtype == np.uint8
    return found


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_found_both_ways_round(how):
    originals = signatures([scene(i) for i in range(20)])
    copies = signatures([COPIES[how](scene(i)) for i in range(10, 30)])
    assert near_duplicates(copies, originals).tolist() == [*range(10, 20)] + [-1] * 10
    assert near_duplicates(originals, copies).tolist() == [-1] * 10 + [*range(10)]


def test_other_photos_are_not_taken():
    found = near_duplicates(signatures([scene(i) for i in range(100)]),
                            signatures([scene(i) for i in range(100, 200)]))
    assert (found == -1).all()


def test_a_photo_of_one_colour_is_a_copy_of_nothing():
    plain = signatures([Image.new("RGB", (50, 50), (90, 20, 30))])
    assert near_duplicates(plain, plain).tolist() == [-1]


def test_real_photos(real_photos):
    """Of a thousand photos' pairs, no more than five in a million are taken for copies."""
    paths = sorted((real_photos / "Flicker8k_Dataset").glob("*.jpg"))[::7]
    photos = [Image.open(path).convert("RGB") for path in paths]
    known, pairs = signatures(photos), len(photos) * (len(photos) - 1) / 2
    taken = sum((near_duplicates(known[i:i + 1], known[i + 1:]) >= 0).sum()
                for i in range(len(photos) - 1))
    assert len(photos) > 900 and taken <= 5e-6 * pairs + 1
    for how, copy in COPIES.items():
        found = near_duplicates(signatures([copy(photo) for photo in photos[:200]]), known)
        assert (found == range(200)).mean() >= 0.99, how


@pytest.mark.parametrize("name, number", [
    ("1000268201_693b08cb0e.jpg", "1000268201"),
    ("1000268201.jpg", "1000268201"),
    ("train/1000268201_693b08cb0e_z.jpg", "1000268201"),
    ("000000391895.jpg", None),  # COCO's
    ("COCO_val2014_000000391895.jpg", None),
    ("IMG_1234567.jpg", None),
    ("20240131_120000.jpg", None),
    ("scene_00000.jpg", None),
    ("123.jpg", None),
])
def test_flickr_numbers_in_names(name, number):
    assert flickr_number(name) == number
    assert has_flickr_form(name) == ("_693b08cb0e" in name)
