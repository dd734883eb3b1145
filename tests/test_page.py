import base64
import io
import re
from html import unescape

import pytest
import torch
from PIL import Image

from src import page
from src.runs import Run
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
    expected = (("", (180, 90), "red"), ("right", (40, 80), "blue"), ("", (5, 5), "plum"))
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


def test_curves_of_a_single_epoch_and_of_missing_values():
    html = page.svg_curves("loss", [3], {"": [2.5]})
    points = re.search('points="(.*?)"', html)[1].split()
    assert points == ["48.0,20.0"] * 2  # two equal points are drawn as a square
    html = page.svg_curves("loss", [1, 2, 3], {"a": [1, None, 2], "b": [None] * 3})
    assert re.findall('points="(.*?)"', html) == ["48.0,120.0 48.0,120.0 470.0,20.0", ""]
    html = page.svg_curves("loss", [1, 2], {"": [0.0, 0.0]})
    assert re.findall('points="(.*?)"', html) == ["48.0,220.0 48.0,220.0 470.0,220.0"]


def test_a_run_whose_history_lacks_figures(tmp_path):
    run = Run(tmp_path, [{"epoch": 1}], config={}, settings=None, test=None, bank=None)
    with pytest.raises(UsageError, match=str(tmp_path)):
        page.run_section(run, "")


def test_recall_by_category_of_caption():
    texts = ["Two dogs", "a man in red", "a doggy", "one two three four five six seven eight nine"]
    html = page.recall_by_category("title", texts, torch.tensor([1, 3, 20, 7]))
    rows = {cells[0]: cells[1:] for cells in
            (row.split("<td>")[1:] for row in html.replace("</table></div>", "").split("<tr>"))
            if cells}
    assert rows["all"] == ["4", "25.00", "50.00", "75.00"]
    assert rows["dogs"] == ["1", "100.00", "100.00", "100.00"]
    assert rows["numbers"] == ["2", "50.00", "50.00", "100.00"]
    assert rows["colours"] == rows["people"] == ["1", "0.00", "100.00", "100.00"]
    assert rows["8 words or less"] == ["3", "33.33", "66.67", "66.67"]
    assert rows["15 words or more"] == ["0"]
