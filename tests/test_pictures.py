"""Photos as browsers show them."""
import datetime
import io
import json

import pytest
from PIL import Image

from src import pictures
from src.utils.errors import DataError

pytestmark = pytest.mark.filterwarnings(r"ignore::Warning:PIL\.")  # of odd and of large photos
RED, BLUE = (250, 0, 0), (0, 0, 250)


def half_and_half(mode="RGB"):
    """A wide photo: its left half is red, its right half blue."""
    photo = Image.new("RGB", (80, 40), RED)
    photo.paste(BLUE, (40, 0, 80, 40))
    return photo.convert(mode)


def exif(**tags):
    made = Image.Exif()
    if "orientation" in tags:
        made[0x0112] = tags["orientation"]
    if "date" in tags:
        made.get_ifd(0x8769)[36867] = tags["date"]
    return made


def is_near(pixel, colour):
    return all(abs(a - b) < 20 for a, b in zip(pixel, colour))


@pytest.mark.parametrize("name, mode, media_type", [
    ("a.jpg", "RGB", "image/jpeg"), ("a.jpg", "CMYK", "image/jpeg"), ("a.png", "P", "image/png"),
    ("a.gif", "RGB", "image/gif"), ("a.webp", "RGBA", "image/webp"), ("a.bmp", "RGB", "image/bmp"),
    ("no suffix", "RGB", "image/png")])
def test_a_file_that_browsers_show_is_sent_as_it_is(tmp_path, name, mode, media_type):
    path = tmp_path / name
    half_and_half(mode).save(path, None if "." in name else "PNG")
    assert pictures.full_size(path) == (media_type, path.read_bytes())


@pytest.mark.parametrize("what", ["tiff", "16 bits", "turned png", "turned webp", "turned by json",
                                  "turned by XMP", "too many pixels"])
def test_other_files_are_encoded_anew(tmp_path, what, monkeypatch):
    path = tmp_path / {"tiff": "a.tif", "16 bits": "a.png", "turned png": "a.png",
                       "turned webp": "a.webp"}.get(what, "a.jpg")
    photo, more = half_and_half(), {}
    if what == "16 bits":
        photo = half_and_half("L").convert("I;16")
    elif what in ("turned png", "turned webp"):
        more = {"exif": exif(orientation=6)}
    elif what == "turned by json":
        path.with_suffix(".json").write_text(json.dumps(
            {"exif": json.dumps({"Image Orientation": "Rotated 90 CW"})}))
    elif what == "turned by XMP":
        more = {"xmp": b'<x tiff:Orientation="6"/>', "exif": exif(date="")}
    elif what == "too many pixels":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80 * 40 - 1)
    photo.save(path, **more)
    media_type, content = pictures.full_size(path)
    shown = Image.open(io.BytesIO(content))
    assert media_type == "image/jpeg" and shown.format == "JPEG" and content != path.read_bytes()
    assert shown.size == ((40, 80) if "turned" in what else (80, 40))
    if "turned" in what:
        assert is_near(shown.getpixel((20, 10)), RED) and is_near(shown.getpixel((20, 70)), BLUE)


def test_a_jpeg_that_browsers_turn_is_sent_as_it_is(tmp_path):
    path = tmp_path / "a.jpg"
    half_and_half().save(path, exif=exif(orientation=6))
    assert pictures.full_size(path) == ("image/jpeg", path.read_bytes())


def test_the_size_of_what_is_encoded_anew_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "FULL_SIZE", 50)
    half_and_half().save(tmp_path / "a.tif")
    content = pictures.full_size(tmp_path / "a.tif")[1]
    assert Image.open(io.BytesIO(content)).size == (50, 25)
    (tmp_path / "b.jpg").write_text("no photo")
    with pytest.raises(DataError, match="b.jpg: not an image"):
        pictures.full_size(tmp_path / "b.jpg")


@pytest.mark.parametrize("date, expected", [
    ("2014:05:02 10:30:05", datetime.datetime(2014, 5, 2, 10, 30, 5)),
    ("2014:05:02 10:30:05\0", datetime.datetime(2014, 5, 2, 10, 30, 5)),
    ("0000:00:00 00:00:00", None), ("    :  :     :  :  ", None), ("", None), ("yesterday", None)])
def test_the_date_of_a_photo(tmp_path, date, expected):
    half_and_half().save(tmp_path / "a.jpg", exif=exif(date=date))
    assert pictures.date_taken(tmp_path / "a.jpg") == expected


def test_no_date(tmp_path):
    half_and_half().save(tmp_path / "a.jpg")
    half_and_half().save(tmp_path / "b.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    (tmp_path / "c.jpg").write_text("no photo")
    for name in ("a.jpg", "b.jpg", "c.jpg", "missing.jpg"):
        assert pictures.date_taken(tmp_path / name) is None
