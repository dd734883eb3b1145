"""The built-in dataset: what it holds, and how it is written and completed."""
import hashlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from src.utils.errors import DataError
from src.utils.synthetic import write_synthetic
from tests.conftest import open_dataset, read_captions

SMALL = {"train": 12, "val": 6, "test": 4}


def digest(root):
    """Hash the names and the contents of all files below a folder."""
    content = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            content.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return content.hexdigest()


def test_the_seed_determines_every_byte(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert write_synthetic(tmp_path / name, seed, SMALL)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_a_complete_dataset_is_not_written_again(tmp_path):
    assert write_synthetic(tmp_path / "a", num_pictures=SMALL)
    before = digest(tmp_path / "a")
    assert not write_synthetic(tmp_path / "a", num_pictures=SMALL)
    assert digest(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("missing", [
    "Flicker8k_Dataset/scene_00003.jpg", "Flickr_8k.devImages.txt", "Flickr8k.token.txt"])
def test_an_incomplete_dataset_is_completed(tmp_path, missing):
    write_synthetic(tmp_path / "a", num_pictures=SMALL)
    before = digest(tmp_path / "a")
    (tmp_path / "a" / missing).unlink()
    assert write_synthetic(tmp_path / "a", num_pictures=SMALL)
    assert digest(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_several_processes_may_write_the_dataset_at_once(tmp_path):
    write_synthetic(tmp_path / "alone", num_pictures=SMALL)
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
        for i in range(10):
            root = tmp_path / "data" / f"set {i}"
            jobs = [pool.submit(write_synthetic, root, num_pictures=SMALL) for _ in range(4)]
            assert any([job.result() for job in jobs])
            assert digest(root) == digest(tmp_path / "alone")
    assert len(list((tmp_path / "data").iterdir())) == 10  # no temporary folder is left


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="something other than the synthetic dataset"):
        write_synthetic(tmp_path / "b")
    assert (tmp_path / "b" / "thesis.txt").read_text() == "mine"


def test_a_folder_with_the_dataset_of_another_seed_is_refused_and_left_alone(tmp_path):
    write_synthetic(tmp_path / "a", seed=1, num_pictures=SMALL)
    before = digest(tmp_path / "a")
    with pytest.raises(DataError, match="something other than the synthetic dataset"):
        write_synthetic(tmp_path / "a", seed=0, num_pictures=SMALL)
    assert digest(tmp_path / "a") == before


def test_the_dataset_is_read_like_flickr8k(tmp_path):
    write_synthetic(tmp_path / "a", num_pictures=SMALL)
    for split, count in SMALL.items():
        data = open_dataset(tmp_path / "a", split)
        assert len(data.names) == count and len(data) == 5 * count


def test_each_scene_of_the_full_dataset_has_captions_of_its_own(tmp_path):
    write_synthetic(tmp_path / "a")
    captions = read_captions(tmp_path / "a" / "Flickr8k.token.txt")
    assert len(captions) == 2400
    assert {len(texts) for texts in captions.values()} == {5}
    # At most two captions of a photo have the same words, and no two photos have the same captions.
    assert all(len(set(texts)) >= 4 for texts in captions.values())
    assert len({tuple(texts) for texts in captions.values()}) == 2400
    splits = [(tmp_path / "a" / f"Flickr_8k.{split}Images.txt").read_text().split()
              for split in ("train", "dev", "test")]
    assert [len(names) for names in splits] == [2000, 200, 200]
    assert len(set(sum(splits, []))) == 2400
