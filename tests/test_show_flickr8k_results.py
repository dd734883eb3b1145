"""The results script, on runs that are written by hand, so that every figure can be compared with
the files."""
import dataclasses
import json
import os
import queue
import re
import shutil
import sys
import webbrowser

import pytest
from PIL import Image

import show_flickr8k_results
from src import server
from src.retrieval import chance_metrics, with_summaries
from src.runs import BANK, BEST, CONFIG, HISTORY, TEST
from src.settings import make_settings
from tests.conftest import run_script


def metrics(seed):
    """Made-up figures, all different, so that a test notices one in the place of another."""
    recalls = [f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)]
    values = {key: seed + i + 0.17 for i, key in enumerate(recalls)}
    values |= {"i2t_medr": seed * 3.0, "t2i_medr": seed * 4.0}
    return with_summaries(values)


def write_run(folder, avg_r1=(11, 31, 21), epochs=3, **changes):
    """Write a run of made-up figures. changes: settings that differ."""
    folder.mkdir()
    history = [
        {
            "epoch": i,
            "train": {"loss": 4.5 - i / 7},
            "val": metrics(seed),
            "lr": 0.01 / i,
            "seconds": 61.3 + i,
        }
        for i, seed in enumerate(avg_r1, start=1)
    ]
    split = {
        "photos": 100,
        "pixels": 91,
        "captions": 500,
        "skipped": 0,
        "captions_per_photo": {"5": 100},
    }
    settings = {
        "model": "small",
        "epochs": epochs,
        "data_dir": "some/where",
        "seed": 77,
        "batch_size": 96,
        "latent_dim": 192,
        "momentum": 0.87,
    }
    config = {
        "settings": dataclasses.asdict(make_settings(**settings | changes)),
        "layout": "Flickr8k",
        "extra_data": [],
        "data": {
            "train": split | {"photos": 1234, "captions": 6170, "skipped": 4},
            "val": split,
            "test": split | {"photos": 50, "captions": 250, "captions_per_photo": {"5": 50}},
        },
        "parameters": 7654321,
        "device": "Some GPU 4711",
        "precision": "mixed, bfloat16",
        "date": "2026-02-03",
        "command": "python train_flickr8k_sgd.py --seed 77",
        "versions": {"torch": "2.99", "python": "3.14.1"},
    }
    (folder / HISTORY).write_text(json.dumps(history))
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / BEST).write_bytes(b"no weights are read for the tables" * 100_000)
    return folder


def show(folder, capsys):
    status = show_flickr8k_results.main(["--output_dir", str(folder)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_every_figure_comes_from_the_files_of_the_run(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    (folder / TEST).write_text(json.dumps(metrics(70)))
    status, out, err = show(folder, capsys)
    assert (status, err) == (0, "")
    for expected in (
        "best (epoch 2)",
        "final (epoch 3)",
        "3 of 3 epochs in 3.2 minutes\n",
        "1,234 photos of 91 px, 6,170 captions, 4 photos left out",
        "Validation: 100 photos of 91 px, 500 captions",
        "7,654,321",
        "Some GPU 4711",
        "mixed, bfloat16",
        "some/where",
        "standard protocol",
        "original: by the measure of the original run, 1/5 of the standard one",
        "chance",
    ):
        assert expected in out, expected
    chance, test_chance = chance_metrics([5] * 100), chance_metrics([5] * 50)
    rows = [line.split() for line in out.splitlines()]
    for row in (
        ["preset", "small"],
        ["latent_dim", "192"],
        ["momentum", "0.87"],
        ["batch_size", "96"],
        ["seed", "77"],
        ["PyTorch", "2.99"],
        ["Python", "3.14.1"],
        ["date", "2026-02-03"],
    ):
        assert row in rows, row
    names = {f"{arrow} R@{k} (%)": f"{direction}_r{k}" for k in (1, 5, 10)
             for arrow, direction in (("I->T", "i2t"), ("T->I", "t2i"))}
    for name, key in (names | {"Avg R@1 (%)": "avg_r1", "rsum": "rsum"}).items():
        val = [f"{m[key]:.2f}" for m in (metrics(31), metrics(21), chance)]
        test = [f"{m[key]:.2f}" for m in (metrics(70), test_chance)]
        assert [*name.split(), *val] in rows and [*name.split(), *test] in rows
    original = [f"{m['avg_r1'] / 5:.2f}" for m in (metrics(31), metrics(21), chance)]
    assert ["original", "Avg", "R@1", "(%)", *original] in rows
    assert ["1", "4.3571", "12.67", "11.17", "14.17", "0.01", "62.3"] in rows
    assert ["2", "4.2143", "32.67", "31.17", "34.17", "0.005", "63.3"] in rows


def test_the_figures_with_the_bank_stand_beside_the_plain_ones(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    (folder / TEST).write_text(json.dumps(metrics(70)))
    bank = {split: {"without_bank": metrics(seed), "with_bank": metrics(seed + 1),
                    "hub_share": {"without_bank": seed + 0.4, "with_bank": seed + 0.3},
                    "photo_and_text": {name: {f"r{k}": seed + i + k / 100 for k in (1, 5, 10)}
                                 for i, name in enumerate(("caption", "photo", "both"))}}
            for split, seed in (("val", 80), ("test", 90))}
    (folder / BANK).write_text(json.dumps(bank))
    status, out, err = show(folder, capsys)
    assert (status, err) == (0, "") and out.count("with the bank") == 4
    assert "80.4 % of val's captions find one of the ten commonest photos first, 80.3 % with" in out
    for i, seed in enumerate((81, 91)):
        part = out.split("Test, best model")[i]
        for value in metrics(seed).values():
            assert f" {value:.2f} " in part
    rows = [line.split() for line in out.splitlines()]
    for k in (1, 5, 10):
        assert [f"R@{k}", "(%)", *(f"{80 + i + k / 100:.2f}" for i in range(3))] in rows
    assert show_flickr8k_results.main(["--compare", str(folder), "--format", "markdown"]) == 0
    head, _, row = (line.split(" | ") for line in capsys.readouterr().out.splitlines())
    assert row[head.index("with the bank")] == f"{metrics(81)['avg_r1']:.2f}"
    assert head.index("with the bank") == head.index("avg R@1") + 1


def test_a_run_of_one_epoch_that_is_still_training(tmp_path, capsys):
    folder = write_run(tmp_path / "run", avg_r1=(5,), epochs=40)
    (folder / BEST).unlink()
    status, out, err = show(folder, capsys)
    assert (status, err) == (0, "")
    assert "1 of 40 epochs in 1.0 minutes: not finished" in out
    assert "Test" not in out


def test_a_long_run_is_shown_in_steps(tmp_path, capsys):
    _, out, _ = show(write_run(tmp_path / "run", avg_r1=range(1, 121), epochs=120), capsys)
    shown = [int(epoch) for epoch in re.findall(r"^  +(\d+) +-?\d+\.\d{4} ", out, re.MULTILINE)]
    assert shown == sorted(set(shown)) and {1, 60, 120} <= set(shown) and len(shown) < 20


def test_synthetic_results_are_marked_as_such(tmp_path, capsys):
    folder = write_run(tmp_path / "run", synthetic=True)
    assert "NOT FLICKR8K" in show(folder, capsys)[1]


def break_file(name, content):
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / HISTORY).unlink(), "has not finished its first epoch"),
        (
            lambda folder: [path.unlink() for path in folder.iterdir()],
            "holds no run; train first",
        ),
        (lambda folder: (folder / CONFIG).unlink(), f"{CONFIG}: there is no such file"),
        (break_file(HISTORY, '[{"epoch": 1'), f"{HISTORY}: damaged"),
        (break_file(HISTORY, "[]"), f"{HISTORY}: holds no epochs"),
        (break_file(HISTORY, '[{"epoch": 1}]'), "lacks an entry"),
        (break_file(HISTORY, "[3]"), "lacks an entry"),
        (break_file(CONFIG, "{}"), "the run is of another version"),
        (break_file(CONFIG, '{"arguments": {}}'), "the run is of another version"),
        (break_file(CONFIG, "[]"), "the run is of another version"),
        (break_file(TEST, "nonsense"), f"{TEST}: damaged"),
    ],
)
def test_missing_or_damaged_files(tmp_path, capsys, damage, message):
    folder = write_run(tmp_path / "run")
    damage(folder)
    status, out, err = show(folder, capsys)
    assert status == 2 and out == "" and message in err and len(err.splitlines()) == 1


def test_a_folder_that_does_not_exist(tmp_path):
    status, out, err = run_script("show_flickr8k_results.py", "--output_dir", tmp_path / "none")
    assert status == 2 and "there is no such folder" in err
    assert "python train_flickr8k_sgd.py" in err


def test_the_newest_run_is_shown_by_default(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("new", "old")):
        (tmp_path / "outputs").mkdir(exist_ok=True)
        folder = write_run(tmp_path / "outputs" / name)
        os.utime(folder / HISTORY, (1000 - i, 1000 - i))
    (tmp_path / "outputs" / "began_just_now").mkdir()
    assert show_flickr8k_results.main([]) == 0
    out, err = capsys.readouterr()
    assert "outputs/new" in out and "outputs/old" not in out and err == ""
    (tmp_path / "outputs" / "new" / BEST).unlink()
    Image.new("RGB", (9, 9)).save("a.png")
    given = ["--query", "red", "--photos", "."]
    assert show_flickr8k_results.main(given) == 2  # which names the run
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "using the newest run, outputs/new" and "outputs/new: has no best" in err[-1]


@pytest.mark.parametrize("given", [[], ["--query", "red"], ["--serve"], ["--page", "a.html"]])
def test_without_any_run_the_error_says_to_train_first(tmp_path, capsys, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert show_flickr8k_results.main(given) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1
        assert f"{tmp_path / 'outputs'}: holds no run; train first: python train" in err
        (tmp_path / "outputs").mkdir(exist_ok=True)


def use(run_dir, capsys, *given):
    which = [] if "--compare" in given else ["--output_dir", str(run_dir)]
    status = show_flickr8k_results.main([*which, *map(str, given)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_runs_side_by_side(tmp_path, capsys):
    for name, seed in (("one", 20), ("other", 30)):
        write_run(tmp_path / name, avg_r1=(seed,), epochs=1)
    given = ["--compare", str(tmp_path / "one"), str(tmp_path / "other")]
    for form in ("lines", "markdown"):
        assert show_flickr8k_results.main([*given, "--format", form]) == 0
        out = capsys.readouterr().out
        assert out.index("other ") < out.index("one ")
        for seed in (20, 30):
            assert f"{metrics(seed)['avg_r1']:.2f}" in out


def test_other_files_are_skipped_in_the_comparison_with_a_message(tmp_path, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "ladder").mkdir()
    (tmp_path / "benchmark.json").write_text("{}")
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    (tmp_path / "old" / CONFIG).write_text('{"arguments": {}}')
    paths = sorted(map(str, tmp_path.iterdir()))
    assert show_flickr8k_results.main(["--compare", *paths, "--format", "markdown"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3 and out.splitlines()[2].startswith("| run |")
    names = ("benchmark.json", "ladder", "old")
    lines = [f"skipped {tmp_path / name}: not a run of this version" for name in names]
    assert err.splitlines() == lines
    given = ["--compare", str(tmp_path / "run"), str(tmp_path / "rum")]  # a typing error
    assert show_flickr8k_results.main(given) == 2
    assert "rum: there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("given, message", [
    (["--query", ""], "has nothing that the model"),
    (["--query", "  "], "has nothing that the model"),
    (["--query", "a dog", "日本語"], "has nothing that the model"),
    (["--image", "none.jpg"], "none.jpg: the file is missing"),
    (["--image", "notes.txt"], "notes.txt: not an image"),
    (["--query", "a dog", "--photos", "none"], "there is no such folder"),
    (["--query", "a dog", "--photos", "empty"], "holds no photos"),
    (["--query", "a dog", "--photos", "broken"], "broken/b.jpg: the file is empty"),
    (["--query", "a dog", "--data_dir", "empty"], "no captions in a known layout"),
    (["--query", "a dog", "--page", "notes.txt/a.html"], "a.html: cannot be written"),
    (["--compare", "empty"], "holds no run"),
    (["--page", "a.html", "--output_dir", "empty"], "holds no run"),
    (["--query", "a dog", "--output_dir", "empty"], "holds no run"),
])
def test_bad_input(run_dir, tmp_path, capsys, monkeypatch, given, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "b.jpg").touch()
    (tmp_path / "notes.txt").write_text("no photo")
    monkeypatch.chdir(tmp_path)
    status, _, err = use(run_dir, capsys, *given)
    assert (
        status == 2 and message in err and len(err.splitlines()) == 1 and err.startswith("error: ")
    )


@pytest.mark.parametrize(
    "given",
    [
        ["--page", "sheet.png"],
        ["--query", "a", "--serve"],
        ["--image", "b", "--compare", "c"],
        ["--photos", "c"],
        ["--top", "0"],
        ["--query", "a", "--output_dir", "b", "c"],
        ["--query", "a", "--photos", ""],
        ["--query", "a", "--data_dir", ""],
        ["--image", ""],
        ["--page", ""],
        ["--compare", ""],
    ],
)
def test_wrong_arguments(given, capsys):
    with pytest.raises(SystemExit) as stopped:
        show_flickr8k_results.main(given)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1


@pytest.mark.parametrize("given, message", [
    (["--data_dir", "d"], "--data_dir has no effect without --query or --image or --serve or"),
    (["--split", "val"], "--split has no effect without --query or --image or --serve or --page"),
    (["--top", "3"], "--top has no effect without --query or --image"),
    (["--bank"], "--bank has no effect without --query or --image or --serve"),
    (["--no-bank"], "--no-bank has no effect without"),
    (["--format", "lines"], "--format has no effect without --query or --image or --compare"),
    (["--photos", "p"], "--photos has no effect without --query or --image or --serve"),
    (["--text_encoder", "t", "--query", "q"], "--text_encoder has no effect without --image_enc"),
    (["--image_encoder", "i"], "--image_encoder needs --photos"),
    (["--image_encoder", "i", "--photos", "p", "--compare", "c"], "--photos has no effect"),
    (["--image_encoder", "i", "--query", "q", "--output_dir", "d"], "--image_encoder and --output"),
    (["--image_encoder", "i", "--photos", "p", "--page", "a.html"], "--page shows runs"),
    (["--image_encoder", "i", "--photos", "p", "--query", "q", "--bank"], "--bank has no effect"),
    (["--evaluate", "d", "--data_dir", "e"], "--data_dir has no effect"),
    (["--evaluate", "d", "--top", "3"], "--top has no effect"),
    (["--query", "q", "--no-browser"], "--no-browser has no effect without --serve"),
    (["--page", "a.html", "--top", "3"], "--top has no effect"),
    (["--page", "a.html", "--no-bank"], "--no-bank has no effect"),
    (["--serve", "--top", "3"], "--top has no effect"),
    (["--query", "q", "--format", "markdown"], "--format markdown is not one of --query"),
    (["--compare", "a", "--data_dir", "d"], "--data_dir has no effect"),
    (["--compare", "a", "--output_dir", "b"], "--output_dir has no effect with --compare"),
    (["--query", "q", "--photos", "p", "--split", "val"], "--split has no effect with --photos"),
    (["--serve", "--photos", "p", "--split", "val"], "--split has no effect with --photos"),
    (["--query", "q", "--photos", "p", "--data_dir", "d"], "--data_dir has no effect with"),
])
def test_a_flag_that_would_have_no_effect_is_an_error(given, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        show_flickr8k_results.parse_args(given)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith(f"error: {message}"), err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("given", [
    ["--query", "q", "--data_dir", "d", "--split", "val", "--top", "3", "--no-bank"],
    ["--image", "i", "--data_dir", "d", "--split", "val", "--top", "3", "--no-bank"],
    ["--query", "q", "--image", "i", "--photos", "p", "--top", "3", "--page", "a.html"],
    ["--page", "a.html", "--data_dir", "d", "--split", "val"],
    ["--serve", "--data_dir", "d", "--split", "val", "--bank"],
    ["--serve", "--photos", "p", "--data_dir", "d"],  # whose captions are the examples
    ["--compare", "a", "b", "--format", "markdown"],
    ["--serve", "--photos", "p", "--image_encoder", "i", "--device", "cpu", "--no-browser"],
    ["--evaluate", "d", "--split", "val", "--image_encoder", "i", "--text_encoder", "t"],
])
def test_flags_that_go_together(given):
    args = show_flickr8k_results.parse_args(given)
    assert args.split == ("val" if "val" in given else "test")
    assert args.top == (3 if "3" in given else 5) and args.bank == ("--no-bank" not in given)
    assert args.format == ("markdown" if "markdown" in given else "lines")


@pytest.mark.parametrize("more, environment, is_opened", [
    ([], {"DISPLAY": ":0"}, True),
    ([], {"WAYLAND_DISPLAY": "wayland-0"}, True),
    (["--no-browser"], {"DISPLAY": ":0"}, False),
    ([], {}, False),
    ([], {"DISPLAY": ":0", "SSH_CONNECTION": "a b c d"}, False),
])
def test_the_page_is_opened_in_a_browser_where_there_is_a_display(
        run_dir, shapes, capsys, monkeypatch, more, environment, is_opened):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    addresses = queue.Queue()
    monkeypatch.setattr(webbrowser, "open", addresses.put)
    opened = []

    def serve_forever(self):
        if is_opened:
            opened.append(addresses.get(timeout=60))

    monkeypatch.setattr(server.Server, "serve_forever", serve_forever)
    status, out, _ = use(run_dir, capsys, "--serve", 0, "--data_dir", shapes, *more)
    assert status == 0 and out.startswith("http://127.0.0.1:")
    assert opened == ([out.split()[0]] if is_opened else []) and addresses.empty()
