"""What the results script finds, by its own command line."""
import functools
import json
import os
import re
import shutil
import sqlite3
import tarfile

import pytest
import torch
from PIL import Image

from src import gallery, search
from src.bank import Bank
from src.gallery import cache_of_run, photos_of_split
from src.runs import BEST
from src.search import load_model
from src.utils.folder import MAX_LENGTH
from tests.conftest import arguments, main, read_captions
from tests.test_show_flickr8k_results import use


def ranking(printed):
    """The printed results -> [(marked, rank, cosine, the rest of the line)]."""
    return [(mark == "*", int(rank), float(score), rest) for mark, rank, score, rest in
            re.findall(r"^([ *]) +(\d+) +(-?\d\.\d+) +(.*)$", printed, re.MULTILINE)]


def test_photos_for_a_text(run_dir, shapes, capsys, tmp_path):
    captions = read_captions(shapes / "Flickr8k.token.txt")
    photos, _ = photos_of_split(shapes, "test")
    query = captions[photos[3].name][0]
    found = tmp_path / "found.html"
    status, out, err = use(run_dir, capsys, "--query", query.upper(), "two red circles", "--top", 8,
                           "--no-bank", "--page", found)
    assert (status, err) == (0, f"wrote {found}\n") and "near to any" not in out
    rows = ranking(out)
    assert [rank for _, rank, _, _ in rows] == [*range(1, 9)] * 2 and "8 photos of test" in out
    assert sorted(rest.split()[0] for *_, rest in rows[:8]) == sorted(map(str, photos))
    scores = [score for _, _, score, _ in rows[:8]]
    assert scores == sorted(scores, reverse=True)
    (marked,) = [(rank, rest) for mark, rank, _, rest in rows if mark]
    assert marked[1] == f"{photos[3]}  {captions[photos[3].name][0]}"
    assert f"the correct one is ranked {marked[0]}" in out
    html = found.read_text("utf-8")
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
        assert (status, err) == (0, "") and "12 photos of val" in out and "near to any" in out
        order = expected.argsort(descending=True)
        assert [rest.split()[0] for *_, rest in ranking(out)] == [str(photos[i]) for i in order]
    scores = [score for _, _, score, _ in ranking(out)]
    # That is the score of the bank, but for a constant.
    assert (torch.tensor(scores) - expected[order]).std() < 1e-3
    plain = use(run_dir, capsys, *given, "--no-bank")[1]
    cosine = {str(photo): score for photo, score in zip(photos, (texts @ rows.T)[0].tolist())}
    for _, _, score, rest in ranking(plain):
        assert score == pytest.approx(cosine[rest.split()[0]], abs=6e-4)
    assert [row[3] for row in ranking(plain)] != [row[3] for row in ranking(out)]

    texts = [caption for photo_captions in captions for caption in photo_captions]
    latents = cache.texts(texts)
    image = search.embed_photos(cache.model, cache.transform, [photos[3]])[0]
    by_bank = bank.text_gallery(latents) @ bank.photo_queries(image[None])[0]
    order = by_bank.argsort(descending=True).tolist()
    out = use(run_dir, capsys, "--image", photos[3], "--split", "val", "--top", 60)[1]
    assert [rest.rsplit("  (", 1)[0] for *_, rest in ranking(out)] == [texts[i] for i in order]
    scores = torch.tensor([score for _, _, score, _ in ranking(out)])
    assert (scores - by_bank[order]).std() < 1e-3


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
    assert (status, err) == (0, f"wrote {tmp_path / 'a.html'}\n")
    assert f'{photos[3]} and "two red circles" in 11 photos of val' in out
    order = sorted((i for i in range(12) if i != 3), key=lambda i: -cosine[i])
    assert [rest.split()[0] for *_, rest in ranking(out)] == [str(photos[i]) for i in order]
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
        assert "near to any" not in out
        assert err == (f"{run_dir}: has no bank yet, because training makes it at the end; ranking "
                       "by plain cosines\n")
        assert use(run_dir, capsys, *given, "--no-bank")[2] == ""


def test_photos_of_a_folder(run_dir, shapes, capsys, tmp_path):
    folder = tmp_path / "folder"
    (folder / "more").mkdir(parents=True)
    for name, target in (("scene_00003.jpg", "a.jpg"), ("scene_00007.jpg", "more/b.JPG")):
        shutil.copy(shapes / "Flicker8k_Dataset" / name, folder / target)
    status, out, _ = use(run_dir, capsys, "--photos", folder, "--query", "a small red circle")
    assert status == 0 and "*" not in out
    assert sorted(rest for *_, rest in ranking(out)) == [
        str(folder / "a.jpg"), str(folder / "more" / "b.JPG")]
    # nothing is written there
    assert sorted(path.name for path in folder.rglob("*")) == ["a.jpg", "b.JPG", "more"]


def test_what_is_wrong_is_said_before_what_takes_long(run_dir, shapes, capsys, tmp_path,
                                                      monkeypatch):
    monkeypatch.setattr(gallery, "embed_photo_batches", None)  # of the gallery
    photos = ["--photos", shapes / "Flicker8k_Dataset"]
    for given in (photos, [*photos, "--query", "red"], []):
        status, out, err = use(run_dir, capsys, "--image", tmp_path / "gone.jpg", *given)
        assert (status, out) == (2, "") and "gone.jpg: the file is missing" in err
    monkeypatch.setattr("src.search_results.cache_of_run", None)  # the model
    for given in (["--query", "red"], ["--serve", 0], ["--image", tmp_path]):
        status, out, err = use(run_dir, capsys, *given, "--photos", tmp_path / "gone")
        assert (status, out) == (2, "") and "there is no such folder" in err


def test_paths_alone_may_be_handed_to_other_programs(run_dir, shapes, capsysbinary, tmp_path,
                                                     monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a b.jpg", "\u7167.jpg", "not utf-8 \udcff.jpg"]
    (tmp_path / "folder").mkdir()
    for name in names:
        shutil.copy(shapes / "Flicker8k_Dataset" / "scene_00003.jpg", tmp_path / "folder" / name)
    status, out, _ = use(run_dir, capsysbinary, "--photos", "folder", "--query", "red", "xqzv",
                         "--format", "paths")
    expected = sorted(os.fsencode(tmp_path / "folder" / name) for name in names)
    assert status == 0 and out.endswith(b"\n")
    assert sorted(out.splitlines()[:3]) == expected == sorted(out.splitlines()[3:])


def test_paths_that_other_programs_cannot_use_are_counted(run_dir, shapes, capsys, tmp_path):
    for name in ("a\nb.jpg", "c.jpg"):
        shutil.copy(shapes / "Flicker8k_Dataset" / "scene_00003.jpg", tmp_path / name)
    given = ["--photos", tmp_path, "--query", "red", "--format"]
    status, out, err = use(run_dir, capsys, *given, "paths")
    assert status == 0 and out.count("\n") == 3
    assert f"1 path with a line break, such as {tmp_path}{os.sep}a?b.jpg: --format json" in err
    assert "line break" not in use(run_dir, capsys, *given, "json")[2]

    (tmp_path / "data").mkdir()
    (tmp_path / "a.txt").write_text("a red circle")
    with tarfile.open(tmp_path / "data" / "0.tar", "w") as shard:
        shard.add(tmp_path / "c.jpg", "a.jpg")
        shard.add(tmp_path / "a.txt", "a.txt")
    status, out, err = use(run_dir, capsys, "--data_dir", tmp_path / "data", "--split", "all",
                           *given[2:], "paths")
    path = tmp_path / "data" / "0.tar" / "a.jpg"
    assert (status, out) == (0, f"{path}\n")
    assert f"1 photo in .tar files, such as {path}: other programs" in err


def test_results_as_json(run_dir, shapes, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(shapes.parent)
    given = ["--query", "red", "two \"blue\" squares", "--data_dir", shapes.name, "--top", 3]
    status, out, _ = use(run_dir, capsys, *given, "--format", "json", "--page", tmp_path / "a.html")
    rows, lines = json.loads(out), ranking(use(run_dir, capsys, *given)[1])
    assert status == 0 and len(rows) == len(lines) == 6
    for row, (_, rank, score, rest) in zip(rows, lines):
        path, _, caption = rest.partition("  ")
        assert row["path"] == os.path.abspath(path) and row["caption"] == caption
        assert row["rank"] == rank and row["score"] == pytest.approx(score, abs=6e-4)
    assert [row["query"] for row in rows] == ["red"] * 3 + ["two \"blue\" squares"] * 3


def test_photos_like_a_photo(run_dir, shapes, capsys, tmp_path):
    photos, _ = photos_of_split(shapes, "val")
    folder = tmp_path / "folder"
    folder.mkdir()
    for photo in photos:
        shutil.copy(photo, folder)
    cosines = cache_of_run(run_dir).photos(photos) @ cache_of_run(run_dir).photos(photos[4:5]).T
    order = [i for i in cosines[:, 0].argsort(descending=True).tolist() if i != 4]
    for image, expected in ((photos[4], [4, *order]), (folder / photos[4].name, order)):
        status, out, err = use(run_dir, capsys, "--image", image, "--photos", folder, "--top", 20,
                               "--page", tmp_path / "a.html")
        assert (status, err) == (0, f"wrote {tmp_path / 'a.html'}\n")
        assert [rest for *_, rest in ranking(out)] == [
            str(folder / photos[i].name) for i in expected]
        assert [score for _, _, score, _ in ranking(out)] == [
            pytest.approx(cosines[i].item(), abs=6e-4) for i in expected]
        assert f"photos like {image} among {len(expected)} photos in {folder}" in out


@pytest.mark.parametrize("is_familiar", [True, False])
def test_words_that_fit_nothing_are_said_to(run_dir, capsys, monkeypatch, is_familiar):
    monkeypatch.setattr(Bank, "is_familiar", lambda self, text: is_familiar)
    given = ["--query", "two red circles", "--split", "val"]
    for more in ([], ["--no-bank"]):
        out = use(run_dir, capsys, *given, *more)[1]
        assert ("\nnothing fits well" in out) == (not is_familiar)
    status, out, err = use(run_dir, capsys, *given, "--format", "paths")
    assert "fits" not in out
    assert err.startswith('"two red circles": nothing fits well') == (not is_familiar)


def test_an_unreadable_photo_of_a_folder_is_skipped_with_a_message(
        run_dir, shapes, capsys, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(3):
        shutil.copy(shapes / "Flicker8k_Dataset" / f"scene_0000{i}.jpg", folder / f"{i}.jpg")
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:700])
    (folder / "._0.jpg").write_bytes(b"Mac OS X")
    (folder / "IMG_0001.mov").touch()
    for _ in range(2):
        given = ["--photos", folder, "--query", "red", "--page", tmp_path / "found.html"]
        status, out, err = use(run_dir, capsys, *given)
        assert status == 0 and f'"red" in 2 photos in {folder}' in out
        assert sorted(rest for *_, rest in ranking(out)) == [
            str(folder / "0.jpg"), str(folder / "2.jpg")]
        first, hidden, second, _ = err.splitlines()
        assert first == "skipped, because they are not photos that can be read: 1 .mov"
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
    assert len(out.splitlines()) == len(names) + 3 + ("nothing fits well" in out)


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
        gallery, "embed_photo_batches", functools.partial(search.embed_photo_batches, batch_size=2))
    status, out, err = use(run_dir, capsys, "--query", "red")
    assert (status, err) == (130, "interrupted; what was embedded is kept\n")
    connection = sqlite3.connect(run_dir / gallery.CACHE)
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
        f"{text}  ({shapes / 'Flicker8k_Dataset' / name})" for text in captions[name]
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
