import base64
import io
import re
from html import unescape

import pytest
from PIL import Image

from src import page
from src.utils.errors import DataError, UsageError


def test_a_sheet_shows_the_right_photos_and_marks(tmp_path):
    colours = {"red": (250, 0, 0), "blue": (0, 0, 250), "plum": (99, 0, 99)}
    for name, size in (("red", (800, 400)), ("blue", (40, 80)), ("plum", (5, 5))):
        Image.new("RGB", size, colours[name]).save(tmp_path / f"{name}.png")
    label = "<b>donn\udce9es ж 狗 & \"\U0001f436"
    rows = [("first", [(tmp_path / "red.png", "1.", False), (tmp_path / "blue.png", label, True)]),
            ("<i>second", [(tmp_path / "plum.png", "only", False)])]
    page.write(tmp_path / "made" / "sheet.html", "<title>", page.photo_sheet(rows))
    html = (tmp_path / "made" / "sheet.html").read_text("utf-8")
    assert "<b>" not in html and "<i>" not in html and "<title><title>" not in html
    assert label.replace("\udce9", "?") in unescape(html)
    first, second = html.split("<h2>")[1:]
    shown = []
    for css, image in re.findall('<img class="(.*?)" src="data:image/jpeg;base64,(.*?)"', html):
        image = Image.open(io.BytesIO(base64.b64decode(image)))
        shown.append((css, image.size, image.getpixel((2, 2))))
    expected = (("", (240, 120), "red"), ("right", (40, 80), "blue"), ("", (5, 5), "plum"))
    for (css, size, pixel), (expected_css, expected_size, name) in zip(
            shown, expected, strict=True):
        assert (css, size) == (expected_css, expected_size)
        assert all(abs(a - b) < 6 for a, b in zip(pixel, colours[name]))
    assert first.count("<img") == 2 and second.count("<img") == 1


def test_a_photo_that_cannot_be_read_and_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    with pytest.raises(DataError, match="broken.jpg"):
        page.photo_sheet([("", [(tmp_path / "broken.jpg", "", False)])])
    with pytest.raises(UsageError, match="cannot be written"):
        page.write(tmp_path / "broken.jpg" / "sheet.html", "", "")
