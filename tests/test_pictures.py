import sys

import pytest
from PIL import Image, ImageFont

from src.settings import UsageError
from src.utils.checkpoint import CheckpointError, Run
from src.utils.layouts import DataError
from src.utils.pictures import (
    CELL,
    GAP,
    NO_CHARACTER,
    RIGHT,
    contact_sheet,
    drawable,
    load_font,
    plot_curves,
    wrap,
)
from tests.test_show_flickr8k_results import metrics

WORDS = (
    "a very_long_file_name_without_any_space_in_it_that_is_wider_than_a_cell.jpg of two dogs "
    "that run"
)


def test_no_line_is_wider_than_asked_and_nothing_is_lost():
    font = ImageFont.load_default(14)
    for width in (30, 100, 400):
        lines = wrap(WORDS, font, width)
        assert all(font.getlength(line) <= width for line in lines)
        assert "".join(lines).replace(" ", "") == WORDS.replace(" ", "")
    assert wrap("two dogs", font, 400) == ["two dogs"] and wrap("", font, 100) == []


def test_a_sheet_shows_the_right_photos_and_marks(tmp_path):
    for name, size, colour in (
        ("red", (80, 40), (250, 0, 0)),
        ("blue", (40, 80), (0, 0, 250)),
        ("plum", (5, 5), (99, 0, 99)),
    ):
        Image.new("RGB", size, colour).save(tmp_path / f"{name}.png")
    rows = [("first", [(tmp_path / "red.png", "1.", False), (tmp_path / "blue.png", WORDS, True)]),
            ("second " * 40, [(tmp_path / "plum.png", "only", False)])]
    contact_sheet(rows, tmp_path / "made" / "sheet.png")
    sheet = Image.open(tmp_path / "made" / "sheet.png")
    assert sheet.width == 3 * CELL + 4 * GAP
    pixels = sheet.load()
    where = {
        colour: [
            (x, y)
            for x in range(sheet.width)
            for y in range(sheet.height)
            if pixels[x, y] == colour
        ]
        for colour in ((250, 0, 0), (0, 0, 250), (99, 0, 99), RIGHT)
    }
    boxes = {
        colour: (
            min(x for x, _ in found),
            min(y for _, y in found),
            max(x for x, _ in found),
            max(y for _, y in found),
        )
        for colour, found in where.items()
    }
    # left of it, in the same row
    assert boxes[(250, 0, 0)][2] < boxes[(0, 0, 250)][0] < boxes[(0, 0, 250)][2]
    assert boxes[(99, 0, 99)][1] > boxes[(0, 0, 250)][3] and boxes[(99, 0, 99)][2] < GAP + CELL
    blue, mark = boxes[(0, 0, 250)], boxes[RIGHT]
    assert (
        mark[0] < blue[0]
        and mark[1] < blue[1]
        and mark[2] > blue[2]
        and mark[0] > boxes[(250, 0, 0)][2]
    )


def test_a_sheet_of_what_cannot_be_read_or_written(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    with pytest.raises(DataError, match="broken.jpg"):
        contact_sheet([("", [(tmp_path / "broken.jpg", "", False)])], tmp_path / "sheet.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    for name in ("sheet.abc", "broken.jpg/sheet.png"):
        with pytest.raises(UsageError, match="cannot be written"):
            contact_sheet([("", [(tmp_path / "good.png", "", False)])], tmp_path / name)


def test_letters_of_other_alphabets_and_what_no_font_has(tmp_path):
    font = load_font(14)
    assert drawable("Plain text, 3 $", font) == "Plain text, 3 $"
    strange = "donn\udce9es \ud83d\x00\n\u200d"  # a name that is not UTF-8, half an emoji
    assert drawable(strange, font) == "donn?es ????"
    assert drawable("e\u0301", ImageFont.load_default(14)) == "e"  # whose letters are ASCII's
    assert drawable("\u72d7", ImageFont.load_default(14)) == "?"
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    contact_sheet([(strange, [(tmp_path / "a.png", strange + "\U0001f436", True)])],
                  tmp_path / "sheet.png")
    if font.getname()[0] == "Aileron":
        pytest.skip("no font with Greek and Cyrillic letters on this machine")
    text = "Füße café Łódź ñ αβγΩ жЯ"
    assert drawable(text, font) == text
    masks = [bytes(font.getmask(letter)) for letter in text.replace(" ", "")]
    assert bytes(font.getmask(NO_CHARACTER)) not in masks


def runs(tmp_path):
    return [
        Run(
            tmp_path / name,
            [
                {"epoch": i, "train": {"loss": 4 / i}, "val": metrics(i), "lr": 0.1 / i}
                for i in range(1, 5)
            ],
            config={},
            settings=None,
            test=None,
            bank=None,
        )
        for name in ("one", "other")
    ]


@pytest.mark.extra
def test_curves(tmp_path, monkeypatch):
    figure = pytest.importorskip(
        "matplotlib.figure", reason="matplotlib is an extra (requirements-extra.txt)"
    )
    drawn = []
    monkeypatch.setattr(
        figure.Figure,
        "savefig",
        lambda self, *given, save=figure.Figure.savefig, **options: (
            drawn.append(self),
            save(self, *given, **options),
        )[1],
    )
    plot_curves(runs(tmp_path), tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 1000
    loss, i2t, rate, t2i = drawn[0].axes
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [
        str(tmp_path / "one"),
        str(tmp_path / "other"),
    ]
    assert [list(line.get_ydata()) for line in loss.lines] == [[4, 2, 4 / 3, 1]] * 2
    assert [list(line.get_ydata()) for line in rate.lines] == [[0.1, 0.05, 0.1 / 3, 0.025]] * 2
    for axes, way in ((i2t, "i2t"), (t2i, "t2i")):
        assert [list(line.get_ydata()) for line in axes.lines] == [
            [metrics(i)[f"{way}_r{k}"] for i in range(1, 5)] for k in (1, 5, 10)] * 2
    one_epoch = runs(tmp_path)[0]
    del one_epoch.history[1:]
    one_epoch.dir = tmp_path / "donn\udce9es $"
    plot_curves([one_epoch], tmp_path / "curves.png")  # a point that can be seen
    for axes in drawn[1].axes:
        assert all(line.get_marker() == "o" for line in axes.lines) and axes.lines
        assert all(tick % 1 == 0 for tick in axes.get_xticks())  # whole epochs
    broken = runs(tmp_path)
    del broken[1].history[2]["lr"]
    with pytest.raises(CheckpointError, match="other: an epoch of its history lacks"):
        plot_curves(broken, tmp_path / "curves.png")
    with pytest.raises(UsageError, match="cannot be written"):
        plot_curves(runs(tmp_path), tmp_path / "curves.png" / "more.png")


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="pip install -r requirements-extra.txt"):
        plot_curves(runs(tmp_path), tmp_path / "curves.png")
