"""The results script, on runs that are written by hand, so that every figure can be compared with
the files."""
import dataclasses
import functools
import json
import os
import re
import shutil
import sqlite3

import pytest
import torch
from PIL import Image

import show_flickr8k_results
from src import search
from src.gallery import cache_of_run, photos_of_split
from src.retrieval import chance_metrics, with_summaries
from src.runs import BANK, BEST, CONFIG, HISTORY, TEST
from src.search import load_model
from src.settings import make_settings
from src.utils.folder import MAX_LENGTH
from tests.conftest import arguments, main, read_captions, run_script


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
    assert show_flickr8k_results.main(["--query", "red"]) == 2  # which names the run
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "using the newest run, outputs/new" and "outputs/new: has no best" in err[1]


@pytest.mark.parametrize("given", [[], ["--query", "red"], ["--serve"], ["--page", "a.html"]])
def test_without_any_run_the_error_says_to_train_first(tmp_path, capsys, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert show_flickr8k_results.main(given) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1
        assert f"{tmp_path / 'outputs'}: holds no run; train first: python train" in err
        (tmp_path / "outputs").mkdir(exist_ok=True)


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of a finished run, which a test may change."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def use(run_dir, capsys, *given):
    which = [] if "--compare" in given else ["--output_dir", str(run_dir)]
    status = show_flickr8k_results.main([*which, *map(str, given)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def ranking(printed):
    """The printed results -> [(marked, rank, cosine, the rest of the line)]."""
    return [(mark == "*", int(rank), float(score), rest) for mark, rank, score, rest in
            re.findall(r"^([ *]) +(\d+) +(-?\d\.\d+) +(.*)$", printed, re.MULTILINE)]


def test_photos_for_a_text(run_dir, shapes, capsys, tmp_path):
    captions = read_captions(shapes / "Flickr8k.token.txt")
    names = (shapes / "Flickr_8k.testImages.txt").read_text().split()
    query = captions[names[3]][0]
    status, out, err = use(
        run_dir,
        capsys,
        "--query",
        query.upper(),
        "two red circles",
        "--top",
        8,
        "--no-bank",
        "--page",
        tmp_path / "found.html",
    )
    assert (status, err) == (0, "") and "bank" not in out
    found = ranking(out)
    assert [rank for _, rank, _, _ in found] == [*range(1, 9)] * 2 and "8 photos of test" in out
    assert sorted(rest.split()[0] for *_, rest in found[:8]) == sorted(names)
    scores = [score for _, _, score, _ in found[:8]]
    assert scores == sorted(scores, reverse=True)
    (marked,) = [(rank, rest) for mark, rank, _, rest in found if mark]
    assert (
        marked[1] == f"{names[3]}  {captions[names[3]][0]}"
        and f"the correct one is ranked {marked[0]}" in out
    )
    html = (tmp_path / "found.html").read_text("utf-8")
    assert f"wrote {tmp_path / 'found.html'}" in out
    assert html.count("<img") == 16 and html.count('class="right"') == 1
    assert all(f"{score:.3f}" in html for score in scores)


def test_ranking_with_the_bank(run_dir, shapes, capsys):
    cache, bank = cache_of_run(run_dir), search.load_bank(run_dir)
    photos, captions = photos_of_split(shapes, "val")
    rows = cache.photos(photos)
    texts = search.embed_texts(cache.model, cache.tokenizer, ["two red circles"])
    expected = (bank.text_queries(texts) @ bank.photo_gallery(rows).T)[0]
    given = ["--query", "two red circles", "--split", "val", "--top", 12]
    for _ in range(2):  # the second time from the cache
        status, out, err = use(run_dir, capsys, *given)
        assert (status, err) == (0, "") and "12 photos of val, ranked with the bank" in out
        order = [photos[i].name for i in expected.argsort(descending=True)]
        assert [rest.split()[0] for *_, rest in ranking(out)] == order
    cosine = {photo.name: score for photo, score in zip(photos, (texts @ rows.T)[0].tolist())}
    for _, _, score, rest in ranking(out):  # the cosine is shown in either case
        assert score == pytest.approx(cosine[rest.split()[0]], abs=6e-4)
    plain = use(run_dir, capsys, *given, "--no-bank")[1]
    assert sorted(ranking(plain), key=lambda row: row[3]) != ranking(plain)
    assert {row[3]: row[2] for row in ranking(plain)} == {row[3]: row[2] for row in ranking(out)}

    texts = [caption for photo_captions in captions for caption in photo_captions]
    latents = cache.texts(texts)
    image = search.embed_photos(cache.model, cache.transform, [photos[3]])[0]
    by_bank = bank.text_gallery(latents) @ bank.photo_queries(image[None])[0]
    order = by_bank.argsort(descending=True).tolist()
    out = use(run_dir, capsys, "--image", photos[3], "--split", "val", "--top", 60)[1]
    assert [rest.rsplit("  (", 1)[0] for *_, rest in ranking(out)] == [texts[i] for i in order]


def test_photos_for_a_photo_and_a_text(run_dir, shapes, capsys, tmp_path):
    model, tokenizer, transform = load_model(run_dir)
    photos, _ = photos_of_split(shapes, "val")
    ids = torch.tensor([tokenizer.encode("two red circles")])
    with torch.no_grad():
        both = model(text=ids, images=transform(photos[3])[None])["central_latent"]
    both = torch.nn.functional.normalize(both, dim=-1)
    cosine = (search.embed_photos(model, transform, photos) @ both[0]).tolist()
    status, out, err = use(run_dir, capsys, "--image", photos[3], "--query", "two red circles",
                           "--split", "val", "--top", 12, "--no-bank",
                           "--page", tmp_path / "a.html")
    assert (status, err) == (0, "")
    assert f'{photos[3]} and "two red circles" in 11 photos of val' in out
    order = sorted((i for i in range(12) if i != 3), key=lambda i: -cosine[i])
    assert [rest.split()[0] for *_, rest in ranking(out)] == [photos[i].name for i in order]
    for i, (_, _, score, _) in zip(order, ranking(out)):
        assert score == pytest.approx(cosine[i], abs=6e-4)
    alone = use(run_dir, capsys, "--query", "two red circles", "--split", "val", "--no-bank",
                "--top", 12, "--page", tmp_path / "b.html")[1]
    assert ranking(alone) != ranking(out)
    images = [(tmp_path / name).read_text("utf-8").count("<img") for name in ("a.html", "b.html")]
    assert images == [12, 12]  # the photo of --image comes first, and is not a result
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(photos[3], folder / "a.png")
    status, out, err = use(run_dir, capsys, "--image", folder / "a.png", "--query", "red",
                           "--photos", folder)
    assert (status, out) == (2, "") and "no photos" in err and "other than that of --image" in err


@pytest.mark.parametrize("bank", [None, "missing"])
def test_a_run_without_a_bank_ranks_by_the_cosines_with_a_message(run_dir, capsys, bank):
    best = torch.load(run_dir / BEST, weights_only=True)
    if bank == "missing":  # a run of a version that had no bank
        del best["bank"]
    else:  # a run that is still training
        best["bank"] = None
    torch.save(best, run_dir / BEST)
    for given in (["--query", "red"], ["--image", "IMAGE"]):
        given = [run_dir / "curve.png" if value == "IMAGE" else value for value in given]
        Image.new("RGB", (50, 40), "red").save(run_dir / "curve.png")
        status, out, err = use(run_dir, capsys, *given)
        scores = [score for _, _, score, _ in ranking(out)]
        assert status == 0 and scores == sorted(scores, reverse=True)
        assert "ranked with the bank" not in out
        assert err == (f"{run_dir}: has no bank yet, because training makes it at the end; ranking "
                       "by plain cosines\n")
        assert use(run_dir, capsys, *given, "--no-bank")[2] == ""


def test_photos_of_a_folder(run_dir, shapes, capsys, tmp_path):
    folder = tmp_path / "folder"
    (folder / "more").mkdir(parents=True)
    for name, target in (("scene_00003.jpg", "a.jpg"), ("scene_00007.jpg", "more/b.JPG")):
        shutil.copy(shapes / "Flicker8k_Dataset" / name, folder / target)
    status, out, _ = use(run_dir, capsys, "--photos", folder, "--query", "a small red circle")
    assert (
        status == 0
        and sorted(rest for *_, rest in ranking(out)) == ["a.jpg", "more/b.JPG"]
        and "*" not in out
    )
    # nothing is written there
    assert sorted(path.name for path in folder.rglob("*")) == ["a.jpg", "b.JPG", "more"]


def test_an_unreadable_photo_of_a_folder_is_skipped_with_a_message(
        run_dir, shapes, capsys, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(3):
        shutil.copy(shapes / "Flicker8k_Dataset" / f"scene_0000{i}.jpg", folder / f"{i}.jpg")
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:700])
    (folder / "._0.jpg").write_bytes(b"Mac OS X")
    (folder / "IMG_0001.HEIC").touch()
    for _ in range(2):
        given = ["--photos", folder, "--query", "red", "--page", tmp_path / "found.html"]
        status, out, err = use(run_dir, capsys, *given)
        assert status == 0 and f'"red" in 2 photos in {folder}' in out
        assert sorted(rest for *_, rest in ranking(out)) == ["0.jpg", "2.jpg"]
        first, hidden, second = err.splitlines()
        assert first == "skipped, because they are not photos that can be read: 1 .heic"
        assert hidden == ("left out: 1 thumbnails, deleted or hidden photos, such as "
                          f"{folder / '._0.jpg'}")
        assert second.startswith("skipped photos that cannot be read (1): ")
        assert f"{folder / '1.jpg'}: image file is truncated" in second


def test_photos_of_odd_names(run_dir, shapes, capsys, tmp_path):
    names = ["my photo (1).jpg", "F\u00fc\u00dfe & Gr\u00f6\u00dfe.jpg", "\u7167\u7247.jpg",
             "\U0001f436\u200d.jpg", "quote'\".jpg", "new\nline\x07.jpg", "-dash.jpg",
             "x;rm -rf.jpg", "$x_{1}$.jpg", "a\u0301\u0644\u0627.jpg"]
    for name in names:
        shutil.copy(shapes / "Flicker8k_Dataset" / "scene_00000.jpg", tmp_path / name)
    given = ["--photos", tmp_path, "--query", "red", "--top", 20, "--page", tmp_path / "s.html"]
    status, out, err = use(run_dir, capsys, *given)
    assert status == 0 and len(ranking(out)) == len(names) and "new?line?.jpg" in out
    assert len(out.splitlines()) == len(names) + 3


def test_an_unreadable_photo_of_the_dataset_is_an_error(run_dir, shapes, capsys, tmp_path):
    shutil.copytree(shapes, tmp_path / "data")
    name = (shapes / "Flickr_8k.testImages.txt").read_text().split()[5]
    (tmp_path / "data" / "Flicker8k_Dataset" / name).write_bytes(b"")
    status, _, err = use(run_dir, capsys, "--query", "red", "--data_dir", tmp_path / "data")
    assert status == 2 and f"{name}: the file is empty" in err


def test_interrupted_while_photos_are_embedded(run_dir, shapes, capsys, monkeypatch):
    fifth, load = photos_of_split(shapes, "test")[0][4], search.load_photo

    def load_four(path, size):
        if path == fifth:
            raise KeyboardInterrupt
        return load(path, size)

    monkeypatch.setattr(search, "load_photo", load_four)
    monkeypatch.setattr(
        search, "embed_photo_batches", functools.partial(search.embed_photo_batches, batch_size=2))
    status, out, err = use(run_dir, capsys, "--query", "red")
    assert (status, err) == (130, "interrupted; what was embedded is kept\n")
    connection = sqlite3.connect(run_dir / search.CACHE)
    assert connection.execute("SELECT COUNT(*) FROM photos").fetchone() == (4,)
    connection.close()


def test_data_that_was_moved(shapes, tmp_path, capsys, monkeypatch):
    shutil.copytree(shapes, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert main(*arguments("data", tmp_path / "run", epochs=1)[1:], "--model", "tiny") == 0
    capsys.readouterr()
    (tmp_path / "data").rename(tmp_path / "moved")
    image = tmp_path / "moved" / "Flicker8k_Dataset" / "scene_00000.jpg"
    for given in (["--query", "red"], ["--image", image]):
        status, _, err = use(tmp_path / "run", capsys, *given)
        assert status == 2 and len(err.splitlines()) == 1
        assert "the folder data, which the run was trained on, does not exist" in err
        assert "name it with --data_dir" in err
        status, _, _ = use(tmp_path / "run", capsys, *given, "--data_dir", "moved")
        assert status == 0
    assert main("--resume", "--output_dir", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert "the folder data, which the run was trained on, does not exist" in err
    assert "name it with --data_dir" in err
    assert main("--resume", "--output_dir", tmp_path / "run", "--data_dir", "moved") == 0


def test_a_long_query_is_cut_to_the_documented_length(run_dir, capsys):
    status, out, err = use(run_dir, capsys, "--query", "a red circle " * 8000)
    assert status == 0 and err == f"the query is cut to its first {MAX_LENGTH:,} characters\n"
    assert ranking(out) == ranking(use(run_dir, capsys, "--query", "a red circle " * 77)[1])


def test_captions_for_a_photo(run_dir, shapes, capsys, tmp_path):
    captions = read_captions(shapes / "Flickr8k.token.txt")
    name = (shapes / "Flickr_8k.devImages.txt").read_text().split()[2]
    status, out, _ = use(
        run_dir,
        capsys,
        "--image",
        shapes / "Flicker8k_Dataset" / name,
        "--split",
        "val",
        "--top",
        60,
    )
    found = ranking(out)
    assert status == 0 and len(found) == 60 and "among 60 different captions of val" in out
    assert sorted(rest for mark, *_, rest in found if mark) == sorted(
        f"{text}  ({name})" for text in captions[name]
    )
    Image.new("L", (50, 10)).save(tmp_path / "grey.png")
    status, out, _ = use(
        run_dir, capsys, "--image", tmp_path / "grey.png", "--page", tmp_path / "grey.html"
    )
    assert (
        status == 0
        and len(ranking(out)) == 5
        and "*" not in out
        and (tmp_path / "grey.html").read_text("utf-8").count("<img") == 6
    )


def test_runs_side_by_side(tmp_path, capsys):
    for name, seed in (("one", 20), ("other", 30)):
        write_run(tmp_path / name, avg_r1=(seed,), epochs=1)
    given = ["--compare", str(tmp_path / "one"), str(tmp_path / "other")]
    for form in ("terminal", "markdown"):
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
    (["--format", "terminal"], "--format has no effect without --compare"),
    (["--photos", "p"], "--photos has no effect without --query or --serve"),
    (["--image", "i", "--photos", "p"], "--photos has no effect without"),
    (["--page", "a.html", "--top", "3"], "--top has no effect"),
    (["--page", "a.html", "--no-bank"], "--no-bank has no effect"),
    (["--serve", "--top", "3"], "--top has no effect"),
    (["--query", "q", "--format", "markdown"], "--format has no effect"),
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
])
def test_flags_that_go_together(given):
    args = show_flickr8k_results.parse_args(given)
    assert args.split == ("val" if "val" in given else "test")
    assert args.top == (3 if "3" in given else 5) and args.bank == ("--no-bank" not in given)
    assert args.format == ("markdown" if "markdown" in given else "terminal")
