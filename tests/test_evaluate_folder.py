"""A search and its evaluation with a pair of encoders alone, and R@K on folders of captions."""
import json
import os

import pytest
import torch
from PIL import Image

import show_flickr8k_results
from src import gallery, server
from src.evaluate_folder import chance
from src.gallery import cache_folder, cache_of_pair
from src.retrieval import chance_metrics
from src.utils.errors import UsageError
from tests.test_show_flickr8k_results import use

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (99, 99, 99)}
PAIR_FILE = '''
import torch
from torchvision.transforms import v2

WORDS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}


class Texts(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width = torch.nn.Parameter(torch.ones(width))

    def forward(self, colours):
        return colours @ torch.eye(3, len(self.width)) * self.width


class Photos(Texts):
    def forward(self, images):
        return super().forward(images.mean((2, 3)))


def tokenize(texts):
    words = [[WORDS.get(word, (0.1, 0.1, 0.1)) for word in text.lower().split()] for text in texts]
    return {"colours": torch.stack([torch.tensor(word).float().mean(0) for word in words])}


def photos():
    return Photos(3), v2.Compose([v2.Resize((16, 16)), v2.ToImage(),
                                  v2.ToDtype(torch.float32, scale=True)])


def texts():
    return Texts(3), tokenize


def wide_texts():
    return Texts(5), tokenize
'''


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """The flags of a pair of encoders that know three colours, and a cache folder for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "pair.py").write_text(PAIR_FILE)
    path = tmp_path / "pair.py"
    return ["--image_encoder", f"{path}:photos", "--text_encoder", f"{path}:texts"]


@pytest.fixture
def album(tmp_path):
    """Photos of one colour each, without captions."""
    folder = tmp_path / "album"
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (60, 40), colour).save(folder / f"{name}.png")
    return folder


def show(capsys, *given):
    status = show_flickr8k_results.main(list(map(str, given)))
    out, err = capsys.readouterr()
    return status, out, err


def test_a_pair_of_encoders_searches_without_a_run(pair, album, tmp_path, capsys, monkeypatch):
    given = [*pair, "--photos", album, "--format", "paths", "--top", 1]
    for query in ("red", "green", "blue"):
        status, out, err = show(capsys, *given, "--query", query)
        assert (status, out) == (0, f"{album / query}.png\n")
        assert "are taken for the two halves of one contrastive model" in err
        assert f"embeddings are kept in {tmp_path / 'cache' / 'flickr8k_sgd'}\n" in err
    status, out, _ = show(capsys, *given, "--image", album / "red.png", "--query", "blue")
    assert (status, out) == (0, f"{album / 'blue.png'}\n")
    Image.new("RGB", (60, 40), (250, 20, 0)).save(tmp_path / "like.png")
    status, out, _ = show(capsys, *given, "--image", tmp_path / "like.png")
    assert (status, out) == (0, f"{album / 'red.png'}\n")
    # The photos are embedded once, and another pair has another cache.
    embedded, embed = [], gallery.embed_photo_batches

    def embed_photo_batches(model, transform, paths, **options):
        embedded.extend(paths)
        return embed(model, transform, paths, **options)

    monkeypatch.setattr(gallery, "embed_photo_batches", embed_photo_batches)
    assert show(capsys, *given, "--query", "red")[1] == f"{album / 'red.png'}\n"
    assert not embedded
    (tmp_path / "pair.py").write_text(PAIR_FILE + "\n")
    assert show(capsys, *given, "--query", "red")[1] == f"{album / 'red.png'}\n"
    assert len(embedded) == len(COLOURS)
    assert len(list((tmp_path / "cache" / "flickr8k_sgd").glob("*.sqlite3"))) == 2


def test_the_cache_of_a_pair_lies_in_the_home_of_the_user_by_default(pair, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    cache = cache_of_pair(pair[1], pair[3])
    assert cache.file.path.parent == tmp_path / ".cache" / "flickr8k_sgd"
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")  # relative, which its standard forbids
    assert cache_folder() == tmp_path / ".cache" / "flickr8k_sgd"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where there is no home
    with pytest.raises(UsageError, match="no home folder; set XDG_CACHE_HOME"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "pair.py"))  # no folder
    cache = cache_of_pair(pair[1], pair[3])
    texts = cache.texts(["red", "red blue"])
    assert torch.allclose(texts[1], torch.tensor([0.5, 0, 0.5]) * 2 ** 0.5)


def test_a_cache_folder_that_cannot_be_written_is_no_error(pair, album, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(album / "red.png"))
    status, out, err = show(capsys, *pair, "--photos", album, "--query", "red", "--top", 1)
    assert status == 0 and f"{album / 'red.png'}" in out
    assert f"embeddings are not kept, as {album / 'red.png'}" in err


def test_encoders_that_are_no_pair_are_refused(pair, album, capsys):
    given = ["--photos", album, "--query", "red"]
    other = pair[3].replace("texts", "wide_texts")
    status, out, err = show(capsys, *pair[:3], other, *given)
    assert (status, out) == (2, "") and "are not the two halves of one contrastive model" in err
    with pytest.raises(SystemExit):
        show_flickr8k_results.main([*pair[:2], *map(str, given)])
    assert "needs a --text_encoder" in capsys.readouterr().err


def write_table(album, rows):
    lines = ["image,caption,split", *(f"{name}.png,{caption},{split}"
                                      for name, caption, split in rows)]
    (album / "captions.csv").write_text("\n".join(lines))


def figures(out):
    """The printed table -> {metric: [figures]}."""
    rows = [line.rsplit(None, 2) for line in out.splitlines() if "R@" in line and "(%)" in line]
    return {name.strip(): list(map(float, values)) for name, *values in rows}


def test_a_pair_is_evaluated_on_a_folder_of_which_all_is_test(pair, album, capsys):
    rows = [(name, name, "test") for name in COLOURS] + [("red", "red red", "test")]
    write_table(album, rows)
    status, out, _ = show(capsys, *pair, "--evaluate", album)
    assert status == 0 and f"on test of {album}: 4 photos, 5 captions" in out
    table = figures(out)
    assert table["I->T R@1 (%)"][0] == table["T->I R@1 (%)"][0] == 100
    expected = chance_metrics([2, 1, 1, 1])
    assert table["I->T R@1 (%)"][1] == pytest.approx(expected["i2t_r1"], abs=0.01)
    assert table["T->I R@1 (%)"][1] == pytest.approx(25)
    assert show(capsys, *pair, "--evaluate", album, "--split", "all")[1].endswith(
        out.partition("captions")[2])
    status, _, err = show(capsys, *pair, "--evaluate", album, "--split", "val")
    assert status == 2 and "holds no photos of val, but of test" in err
    write_table(album, [(*row[:2], "val") for row in rows])
    status, _, err = show(capsys, *pair, "--evaluate", album)
    assert status == 2 and "holds no photos of test, but of val" in err
    # Without splits, as many photos are ranked as a training would test on.
    (album / "captions.csv").write_text("image,caption\n" + "\n".join(
        f"{name}.png,{name}" for name in COLOURS))
    out = show(capsys, *pair, "--evaluate", album)[1]
    assert "1 photo, 1 caption\n" in out and "--split all takes all of them" in out
    assert "one photo moves I->T R@1 by 100.0 points" in out
    # A wrong caption is found to be wrong.
    write_table(album, [("red", "blue", "test"), ("blue", "red", "test"), *rows[1:2]])
    table = figures(show(capsys, *pair, "--evaluate", album)[1])
    assert table["T->I R@1 (%)"][0] == pytest.approx(33.33)


def test_a_pair_that_serves_a_folder_takes_examples_from_the_data(pair, album, shapes, capsys,
                                                                  monkeypatch):
    pages = []
    monkeypatch.setattr(server.Server, "serve_forever", lambda http: pages.append(http.pages))
    show(capsys, *pair, "--serve", 0, "--no-browser", "--photos", album, "--data_dir", shapes)
    _, captions = gallery.photos_of_split(shapes, "val")
    assert {texts[0] for texts in captions} == set(pages[0].example_queries)


def test_missing_photos_are_counted(pair, album, capsys):
    write_table(album, [(name, name, "test") for name in ("red", "gone", "lost")])
    status, out, err = show(capsys, *pair, "--evaluate", album)
    assert (status, out) == (2, "")
    assert f"{album}: of 3 photos of test, 2 are missing, such as gone.png; add them" in err
    assert str(album / "captions.csv") in err


def test_a_run_is_evaluated_as_the_training_did(run_dir, shapes, capsys):
    status, out, _ = use(run_dir, capsys, "--evaluate", shapes, "--split", "val")
    recorded = json.loads((run_dir / "bank_results_flickr8k.json").read_text())["val"]
    assert status == 0 and "with the bank" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("  rsum")]
    expected = [recorded["without_bank"]["rsum"], recorded["with_bank"]["rsum"]]
    assert [float(value) for value in rows[0][1:3]] == pytest.approx(expected, abs=10)
    assert "with the bank" not in use(run_dir, capsys, "--evaluate", shapes, "--no-bank")[1]
    assert "the figures are too good" not in out
    assert "the figures are too good" in use(run_dir, capsys, "--evaluate", shapes, "--split",
                                             "train")[1]


def test_chance_where_photos_share_captions():
    # Three photos; the first two share a text, and the first has it twice.
    metrics = chance([0, 0, 0, 1, 2], text_ids=torch.tensor([1, 1, 2, 1, 3]))
    assert metrics == chance_metrics([2, 1, 1], [2, 2, 1, 2, 1], 3)
    assert chance([0, 0, 1], None) == chance_metrics([2, 1])


def test_json_of_a_gallery_in_another_folder_holds_absolute_paths(pair, album, capsys, monkeypatch):
    monkeypatch.chdir(album.parent)
    out = show(capsys, *pair, "--photos", "album", "--query", "red", "--format", "json")[1]
    assert json.loads(out)[0]["path"] == os.path.join(album, "red.png")
