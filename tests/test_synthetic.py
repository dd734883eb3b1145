import hashlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from src.utils.errors import DataError
from src.utils.splits import open_split
from src.utils.synthetic import write_synthetic
from src.utils.tokenizers import CharTokenizer
from tests.conftest import read_captions

SMALL = {"train": 12, "val": 6, "test": 4}


def digest(root):
    sha = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            sha.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return sha.hexdigest()


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert write_synthetic(tmp_path / name, seed, SMALL)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_written_once_and_left_alone(tmp_path):
    assert write_synthetic(tmp_path / "a", num_pictures=SMALL)
    before = digest(tmp_path / "a")
    assert not write_synthetic(tmp_path / "a", num_pictures=SMALL)
    assert digest(tmp_path / "a") == before and [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("lost", [
    "Flicker8k_Dataset/scene_00003.jpg", "Flickr_8k.devImages.txt", "Flickr8k.token.txt"])
def test_one_that_is_not_whole_is_noticed_and_made_anew(tmp_path, lost):
    write_synthetic(tmp_path / "a", num_pictures=SMALL)
    before = digest(tmp_path / "a")
    (tmp_path / "a" / lost).unlink()
    assert write_synthetic(tmp_path / "a", num_pictures=SMALL)
    assert digest(tmp_path / "a") == before and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_several_processes_may_make_it_at_once(tmp_path):
    write_synthetic(tmp_path / "alone", num_pictures=SMALL)
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
        for i in range(10):
            root = tmp_path / "data" / f"set {i}"
            made = [pool.submit(write_synthetic, root, num_pictures=SMALL) for _ in range(4)]
            assert any([job.result() for job in made])
            assert digest(root) == digest(tmp_path / "alone")
    assert len(list((tmp_path / "data").iterdir())) == 10  # nothing else is left


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="something other than the synthetic dataset"):
        write_synthetic(tmp_path / "b")
    assert (tmp_path / "b" / "thesis.txt").read_text() == "mine"


def test_the_same_loader_reads_it(tmp_path):
    write_synthetic(tmp_path / "a", num_pictures=SMALL)
    for split, count in SMALL.items():
        data = open_split(tmp_path / "a", split, 16, CharTokenizer())
        assert len(data.names) == count and len(data) == 5 * count


def test_full_size_scenes_are_told_apart_by_their_captions(tmp_path):
    write_synthetic(tmp_path / "a")
    captions = read_captions(tmp_path / "a" / "Flickr8k.token.txt")
    assert len(captions) == 2400 and {len(five) for five in captions.values()} == {5}
    assert all(len(set(five)) >= 4 for five in captions.values())  # differently worded
    assert len({tuple(five) for five in captions.values()}) == 2400
    names = [
        (tmp_path / "a" / f"Flickr_8k.{split}Images.txt").read_text().split()
        for split in ("train", "dev", "test")
    ]
    assert [len(split) for split in names] == [2000, 200, 200] and len(set(sum(names, []))) == 2400
