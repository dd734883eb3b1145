"""The page of a run."""
import json
import re
import shutil
from html import unescape

import pytest
import torch

import show_flickr8k_results
from src import run_page
from src.runs import BEST, CONFIG, HISTORY, TEST, Run
from src.utils.errors import UsageError


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    return shutil.copytree(finished[0], tmp_path_factory.mktemp("page") / "run")


def write_page(capsys, out, *runs, more=()):
    status = show_flickr8k_results.main(["--page", str(out), *more, "--output_dir",
                                         *map(str, runs)])
    return status, *capsys.readouterr()


def test_the_page_of_a_run(run, tmp_path, capsys):
    out = tmp_path / "new" / "run.html"
    status, printed, err = write_page(capsys, out, run)
    assert (status, printed, err) == (0, "", f"wrote {out}\n")
    html = out.read_text("utf-8")
    assert len(html) < 2_000_000
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import|https?://', html)  # stands alone
    config, history = (json.loads((run / name).read_text()) for name in (CONFIG, HISTORY))
    text = unescape(html)
    best = max(history, key=lambda row: row["val"]["avg_r1"])
    for words in (config["command"], config["device"], "built-in shapes", "chance",
                 "40 photos, 200 captions", "3 of 3 epochs", "with the bank", "Test, best model",
                 f"{best['val']['avg_r1']:.2f}"):
        assert words in text, words
    for figure in ("i2t_r1", "t2i_r10"):
        for row in (best, history[-1]):
            assert f"<td>{row['val'][figure]:.2f}" in html
    assert html.count("<svg") == 3 and html.count("<polyline") == 6
    drawn = []
    for points in re.findall('polyline points="(.*?)"', html):
        places = [tuple(map(float, point.split(","))) for point in points.split()]
        assert [x for x, _ in places] == [48, 48, 259, 470]  # the first one is drawn twice
        assert all(20 <= y <= 220 for _, y in places)
        drawn.append([y for _, y in places[1:]])
    for line, values in zip(drawn[-2:], ([row["train"]["loss"] for row in history],
                                         [row["lr"] for row in history])):
        top = run_page.round_ticks(max(values))[-1]
        assert line == [pytest.approx(220 - 200 * value / top, abs=0.1) for value in values]
    photos = re.findall(r'src="data:image/jpeg;base64,(.*?)"', html)
    hits, misses = text.count("<h3>hit: "), text.count("<h3>miss: ")
    assert 0 < hits + misses <= 8 and len(photos) == 2 * (hits + misses)
    test = json.loads((run / TEST).read_text())
    headline = re.search('<table class="headline">(.*?)</table>', html)[1]
    assert f"photo to text, R@1 (%)<td>{test['i2t_r1']:.2f}<td>" in headline
    assert "with the bank" in headline and "chance" in headline
    order = [html.index(what) for what in ('"headline"', "<img", "<svg", "Validation: ", "command")]
    assert order == sorted(order)
    counts = dict(re.findall(r'<tr><th scope="row">([^<]*)<td>([\d,]+)<td>', html))
    assert counts["all"] == "40" and 0 < int(counts["colours"]) <= 40


def test_the_page_of_several_runs_one_of_which_is_still_training(run, tmp_path, capsys):
    training = shutil.copytree(run, tmp_path / "<i>training")
    rows = json.loads((run / HISTORY).read_text())
    (training / HISTORY).write_text(json.dumps(rows[:1]))
    lost = shutil.copytree(run, tmp_path / "lost")
    (lost / BEST).unlink()
    out = tmp_path / "runs.html"
    status, printed, err = write_page(capsys, out, run, training, lost, more=["--split", "val"])
    assert status == 0 and err.count("\n") == 2 and "lost: no photos on the page" in err
    html = out.read_text("utf-8")
    assert html.count("<section>") == 3 and "1 of 3 epochs" in html and "<i>" not in html
    assert "no best model yet" in html and html.count("<svg") == 9


def test_curves_of_a_single_epoch_and_of_missing_values():
    html = run_page.svg_curves("loss", [3], {"": [2.5]})
    points = re.search('points="(.*?)"', html)[1].split()
    assert points == ["48.0,20.0"] * 2  # two equal points are drawn as a square
    assert re.findall('text-anchor="middle">(.*?)<', html) == ["3", "4"]
    html = run_page.svg_curves("loss", [1, 2, 3], {"a": [1, None, 2], "b": [None] * 3})
    assert re.findall('points="(.*?)"', html) == ["48.0,120.0 48.0,120.0 470.0,20.0", ""]
    html = run_page.svg_curves("loss", [1, 2], {"": [0.0, 0.0]})
    assert re.findall('points="(.*?)"', html) == ["48.0,220.0 48.0,220.0 470.0,220.0"]


def test_a_run_whose_history_lacks_figures(tmp_path):
    run = Run(tmp_path, [{"epoch": 1}], config={}, settings=None, test=None, bank=None)
    with pytest.raises(UsageError, match=str(tmp_path)):
        run_page.run_section(run)


def test_recall_by_category_of_caption():
    texts = ["Two dogs", "a man in red", "a doggy", "one two three four five six seven eight nine"]
    html = run_page.recall_by_category("title", texts, torch.tensor([1, 3, 20, 7]))
    rows = {}
    for row in html.replace("</table></div>", "").split('<th scope="row">')[1:]:
        name, *cells = row.removesuffix("<tr>").split("<td>")
        rows[name] = cells
    assert rows["all"] == ["4", "25.00", "50.00", "75.00"]
    assert rows["dogs"] == ["1", "100.00", "100.00", "100.00"]
    assert rows["numbers"] == ["2", "50.00", "50.00", "100.00"]
    assert rows["colours"] == rows["people"] == ["1", "0.00", "100.00", "100.00"]
    assert rows["8 words or less"] == ["3", "33.33", "66.67", "66.67"]
    assert rows["15 words or more"] == ["0"]


@pytest.mark.parametrize("top, expected", [
    (2.6, [0, 1, 2, 3]), (100, [0, 20, 40, 60, 80, 100]), (13.7, [0, 5, 10, 15]), (1, None),
    (0.0042, [0, 0.001, 0.002, 0.003, 0.004, 0.005]), (30, [0, 10, 20, 30]), (3, [0, 1, 2, 3]),
    (7e5, [0, 2e5, 4e5, 6e5, 8e5])])
def test_round_ticks(top, expected):
    expected = expected or [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert run_page.round_ticks(top) == pytest.approx(expected)
