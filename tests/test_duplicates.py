"""Copies of a photo are found, however they were made, and different photos are told apart."""
import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from src.utils.duplicates import (
    SIGNATURE,
    flickr_number,
    has_flickr_form,
    inside_border,
    near_duplicates,
    signature,
)

FLIP = Image.Transpose.FLIP_LEFT_RIGHT


def scene(seed):
    """Make a picture of blurred noise, whose large areas differ as much as those of photos."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC)


def recompressed(photo, quality=30):
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def cropped(photo):
    width, height = photo.size
    return photo.crop((width // 20, height // 20, width - width // 20, height - height // 20))


def bordered(photo, colour="white", size=256):
    """Like img2dataset's resize_mode "border": the photo in the middle of a square."""
    small = photo.copy()
    small.thumbnail((size, size))
    square = Image.new("RGB", (size, size), colour)
    square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return recompressed(square, 95)


def middle_square(photo):
    """Like img2dataset's resize_mode "center_crop"."""
    return recompressed(ImageOps.fit(photo, (256, 256)), 95)


def framed(photo):
    return ImageOps.expand(photo, (20, 20, 30, 50), (90, 40, 130))


COPIES = {
    "recompressed": recompressed,
    "resized": lambda photo: photo.resize((200, 150)),
    "squeezed": lambda photo: photo.resize((224, 224)),
    "brightened": lambda photo: ImageEnhance.Brightness(photo).enhance(1.2),
    "darkened": lambda photo: ImageEnhance.Brightness(photo).enhance(0.7),
    "mirrored": lambda photo: photo.transpose(FLIP),
    "cropped": cropped,
    "cropped and mirrored": lambda photo: cropped(photo).transpose(FLIP),
    "in a white border": bordered,
    "in a black border": lambda photo: bordered(photo, "black"),
    "in a grey border, compressed": lambda photo: recompressed(bordered(photo, "grey"), 60),
    "in a white border, mirrored": lambda photo: bordered(photo).transpose(FLIP),
    "in a frame": framed,
    "cropped to a square": middle_square,
    "its shorter side resized": lambda photo: ImageOps.scale(photo, 256 / min(photo.size)),
}


def signatures(photos):
    """Return the signatures of photos, (N, *SIGNATURE)."""
    result = np.stack([signature(photo) for photo in photos])
    assert result.shape == (len(photos), *SIGNATURE)
    assert result.dtype == np.uint8
    return result


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_found_among_originals_and_originals_among_copies(how):
    make_copy = COPIES[how]
    originals = signatures([scene(i) for i in range(20)])
    copies = signatures([make_copy(scene(i)) for i in range(10, 30)])
    assert near_duplicates(copies, originals).tolist() == [*range(10, 20)] + [-1] * 10
    assert near_duplicates(originals, copies).tolist() == [-1] * 10 + [*range(10)]


def test_different_photos_are_not_taken_for_copies():
    copy_of = near_duplicates(signatures([scene(i) for i in range(100)]),
                              signatures([scene(i) for i in range(100, 200)]))
    assert (copy_of == -1).all()


@pytest.mark.parametrize("make_copy", [bordered, framed, middle_square])
def test_different_photos_in_equal_borders_are_not_taken_for_copies(make_copy):
    known = signatures([make_copy(scene(i)) for i in range(60)])
    assert near_duplicates(known[:30], known[30:]).tolist() == [-1] * 30
    assert near_duplicates(known[:30], known).tolist() == [*range(30)]


def test_a_photo_in_a_white_border_is_found_in_a_black_one():
    white = signatures([bordered(scene(i)) for i in range(20)])
    black = signatures([bordered(scene(i), "black") for i in range(20)])
    assert near_duplicates(white, black).tolist() == [*range(20)]


def test_a_border_that_the_original_has_as_well_does_not_hide_its_copy():
    """Only the outer border of the copy is cut, so what is inside equals the original as it is."""
    originals = [ImageOps.expand(scene(i), 30, "black") for i in range(20)]
    copies = signatures([bordered(photo) for photo in originals])
    assert near_duplicates(copies, signatures(originals)).tolist() == [*range(20)]


def test_only_a_border_of_one_colour_is_cut():
    assert inside_border(scene(0)) == (0, 0, 400, 300)
    assert inside_border(Image.new("RGB", (80, 60), "white")) == (0, 0, 80, 60)
    square = Image.new("RGB", (256, 256), "white")
    square.paste(scene(0).resize((256, 192)), (0, 32))
    assert inside_border(square) == (0, 32, 256, 224)
    dot = Image.new("RGB", (256, 256), "white")
    dot.paste("black", (100, 100, 110, 200))  # a drawing on white, and not a photo in a border
    assert inside_border(dot) == (0, 0, 256, 256)


def test_a_photo_of_one_colour_is_not_taken_for_a_copy():
    plain = signatures([Image.new("RGB", (50, 50), (90, 20, 30))])
    assert near_duplicates(plain, plain).tolist() == [-1]


@pytest.fixture(scope="module")
def some_real_photos(real_photos):
    """About a thousand photos of Flickr8k."""
    photos = []
    for path in sorted((real_photos / "Flicker8k_Dataset").glob("*.jpg"))[::7]:
        with Image.open(path) as photo:
            photos.append(photo.convert("RGB"))
    assert len(photos) > 900
    return photos


def test_different_real_photos_are_told_apart(some_real_photos):
    """At most five in a million pairs are taken for copies, plus one."""
    known, number = signatures(some_real_photos), len(some_real_photos)
    mistakes = sum((near_duplicates(known[i:i + 1], known[i + 1:]) >= 0).sum()
                   for i in range(number - 1))
    assert mistakes <= 5e-6 * number * (number - 1) / 2 + 1


def test_different_real_photos_in_white_borders_are_told_apart(some_real_photos):
    known = signatures([bordered(photo) for photo in some_real_photos])
    mistakes = sum((near_duplicates(known[i:i + 1], known[i + 1:]) >= 0).sum()
                   for i in range(len(known) - 1))
    assert mistakes <= 5e-6 * len(known) * (len(known) - 1) / 2 + 1


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_real_photos_are_found(some_real_photos, how):
    copies = signatures([COPIES[how](photo) for photo in some_real_photos[:200]])
    copy_of = near_duplicates(copies, signatures(some_real_photos))
    assert (copy_of == np.arange(200)).mean() >= 0.99


@pytest.mark.parametrize("name, number, has_form", [
    ("1000268201_693b08cb0e.jpg", "1000268201", True),
    ("train/1000268201_693b08cb0e_z.jpg", "1000268201", True),
    ("1000268201.jpg", "1000268201", False),  # as in Flickr30k
    ("20240131.jpg", "20240131", False),  # a date, which only the picture can tell
    ("000000391895.jpg", None, False),  # as in COCO
    ("COCO_val2014_000000391895.jpg", None, False),
    ("IMG_1234567.jpg", None, False),
    ("20240131_120000.jpg", None, False),
    ("scene_00000.jpg", None, False),
    ("123.jpg", None, False),
])
def test_flickr_numbers_in_names(name, number, has_form):
    assert flickr_number(name) == number
    assert has_flickr_form(name) == has_form
