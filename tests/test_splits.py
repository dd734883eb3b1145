"""Splits as they are read: which photos are refused or skipped, and what is reported."""
import logging
import shutil

import pytest
import torch

from src.settings import make_settings
from src.utils.errors import DataError
from src.utils.flickr8k_simple import Flickr8kImageTextDataset
from src.utils.folder import MAX_LENGTH
from src.utils.splits import hold_out, load_splits, read_pairs
from src.utils.tokenizers import CharTokenizer
from tests.conftest import colour_of_photo, open_dataset, truncated_jpeg

PHOTOS, CAPTIONS = "Flicker8k_Dataset", "Flickr8k.token.txt"


def assert_photos(data, indices):
    """Check that the photos are those of these indices, each with its own captions."""
    assert len(data.names) == len(data.photos) == len(data.digests) == len(indices)
    assert len(data) == len(data.texts) == 5 * len(indices)
    for index, photo in zip(indices, data.photos):
        colour = torch.tensor(colour_of_photo(index))
        assert (photo.float().mean((1, 2)) - colour).abs().max() < 4
    for caption, text, photo in zip(data.captions, data.texts, data.photo_of_caption.tolist()):
        assert f"of photo {indices[photo]} ," in caption
        assert CharTokenizer().encode(caption) == text.tolist()


def test_a_dataset_with_a_missing_photo_is_refused_unless_allowed(dataset_dir):
    (dataset_dir / PHOTOS / "1001_abc.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of the 6 photos of train are missing \(1001_abc.jpg\)"):
        open_dataset(dataset_dir)
    data = open_dataset(dataset_dir, allow_incomplete=True)
    assert data.skipped == ["1001_abc.jpg"]
    assert_photos(data, [0, 2, 3, 4, 5])


def test_a_missing_and_a_damaged_photo_can_be_skipped(dataset_dir):
    (dataset_dir / PHOTOS / "1001_abc.jpg").unlink()
    (dataset_dir / PHOTOS / "1003_abc.jpg").write_bytes(b"")
    data = open_dataset(dataset_dir, allow_incomplete=True)
    assert data.skipped == ["1001_abc.jpg", "1003_abc.jpg"]
    assert_photos(data, [0, 2, 4, 5])


def test_the_error_for_unreadable_photos_says_what_is_wrong_with_each(dataset_dir):
    for i in range(5):
        content = b"" if i else truncated_jpeg()
        (dataset_dir / PHOTOS / f"100{i}_abc.jpg").write_bytes(content)
    message = (r"5 of the 6 .*unreadable \(1000_abc.jpg: .*truncated.*, 1001_abc.jpg: the file is "
               r"empty, 1002_abc.jpg: the file is empty and 2 more\)")
    with pytest.raises(DataError, match=message):
        open_dataset(dataset_dir)


def test_a_photo_without_captions_is_refused(dataset_dir):
    path = dataset_dir / CAPTIONS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("1002_abc")))
    message = r"1 of the 6 photos of train are without captions \(1002_abc.jpg\)"
    with pytest.raises(DataError, match=message):
        open_dataset(dataset_dir)


def test_a_split_without_usable_photos_is_refused(dataset_dir):
    for path in (dataset_dir / PHOTOS).iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no photo of train"):
        open_dataset(dataset_dir, allow_incomplete=True)


def test_missing_captions_and_a_missing_folder_of_photos_are_reported(tmp_path, dataset_dir):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no captions in a known layout"):
        open_dataset(tmp_path / "empty")
    (dataset_dir / PHOTOS).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="6 of the 6 photos of train are missing"):
        open_dataset(dataset_dir)


def test_the_progress_of_reading_is_reported(dataset_dir):
    reports = []
    read_pairs(dataset_dir, "train", 16,
               progress=lambda done, total: reports.append((done, total)))
    assert reports == [(i, 6) for i in range(1, 7)]


@pytest.fixture
def with_copies(dataset_dir):
    """A dataset in which two photos of val are in train, too, one of them under another name."""
    shutil.copy(dataset_dir / PHOTOS / "1007_abc.jpg", dataset_dir / PHOTOS / "1002_abc.jpg")
    train = dataset_dir / "Flickr_8k.trainImages.txt"
    train.write_text(train.read_text() + "1006_abc.jpg\n")
    return dataset_dir


def test_photos_in_two_splits_are_refused(with_copies):
    train, val = (read_pairs(with_copies, split, 16) for split in ("train", "val"))
    with pytest.raises(DataError) as error:
        hold_out(train, [val], allow_incomplete=False)
    assert ("2 photos of train are in another split as well (1002_abc.jpg is 1007_abc.jpg of val, "
            "1006_abc.jpg is 1006_abc.jpg of val)") in str(error.value)


def test_photos_in_two_splits_are_left_out_if_that_is_allowed(with_copies):
    for _ in range(2):  # the second time, the photos come from the store
        train, val = (read_pairs(with_copies, split, 16) for split in ("train", "val"))
        pairs = hold_out(train, [val], allow_incomplete=True)
        assert pairs.skipped == ["1002_abc.jpg", "1006_abc.jpg"]
        assert_photos(Flickr8kImageTextDataset(pairs, CharTokenizer()), [0, 1, 3, 4, 5])


def test_leaving_photos_out_does_not_change_the_pairs_themselves(with_copies):
    train, val = (read_pairs(with_copies, split, 16) for split in ("train", "val"))
    names, captions = list(train.names), list(train.captions)
    hold_out(train, [val], allow_incomplete=True)
    assert train.names == names
    assert list(train.captions) == captions
    assert train.skipped == []


def test_a_split_that_is_in_the_other_splits_completely_is_refused(dataset_dir):
    train = read_pairs(dataset_dir, "train", 16)
    with pytest.raises(DataError, match="no photo of train is usable"):
        hold_out(train, [train], allow_incomplete=True)


def test_a_single_photo_can_be_left(dataset_dir):
    train = read_pairs(dataset_dir, "train", 16)
    pairs = train.without({0, 1, 2, 4, 5})
    assert_photos(Flickr8kImageTextDataset(pairs, CharTokenizer()), [3])


def test_long_captions_are_cut_and_counted(dataset_dir, caplog):
    path = dataset_dir / CAPTIONS
    path.write_text(path.read_text() + f"1000_abc.jpg#5\t{'a dog ' * 5000}\n"
                    + f"1001_abc.jpg#5\t{'x' * MAX_LENGTH}\n")
    with caplog.at_level(logging.INFO, "flickr8k_sgd"):
        splits, _ = load_splits(make_settings(data_dir=str(dataset_dir), model="tiny"))
    captions = splits["train"].captions
    assert captions[5] == ("a dog " * 5000)[:MAX_LENGTH]
    assert captions[11] == "x" * MAX_LENGTH
    assert "cut to 1,000 characters: 1 caption" in caplog.text


def test_the_store_of_photos_is_announced_when_it_is_made(dataset_dir, caplog):
    settings = make_settings(data_dir=str(dataset_dir), model="tiny")
    for times in (1, 0):
        caplog.clear()
        with caplog.at_level(logging.INFO, "flickr8k_sgd"):
            load_splits(settings)
        assert caplog.text.count("photo_store: decoded photos, or their") == times
