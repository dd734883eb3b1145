"""A dataset folder: its splits, its notes, and captions that are shared or empty."""
import pytest

from src.utils.captions import read_folder
from src.utils.errors import DataError
from src.utils.folder import SPLIT_FILES, Folder
from src.utils.splits import read_pairs
from tests.conftest import main, write_photo, write_table


def test_what_is_noted_while_rows_are_read_follows_the_two_lines(tmp_path):
    notes = []

    def rows():
        yield from ((f"{i}.jpg", f"photo {i}", None) for i in range(10))
        notes.append("2 lines are empty, such as line 3")

    folder = Folder(tmp_path, "a table", tmp_path, rows(), notes=notes)
    folder.notes.append("1 more thing")
    assert folder.describe()[2:] == ["2 lines are empty, such as line 3", "1 more thing"]


def test_a_hash_of_the_names_makes_the_same_splits_in_any_order(tmp_path):
    names = [f"{i}.jpg" for i in range(200)]
    one = read_folder(write_table(tmp_path / "one", "image,text", *(f"{n},a dog" for n in names)))
    assert one.by_hash and [len(one.splits[split]) for split in SPLIT_FILES] == [160, 20, 20]
    assert sorted(one.names("all")) == sorted(names)
    other = read_folder(write_table(tmp_path / "other", "title,path", *(
        f"a cat,{n}" for n in reversed(names))))
    for split in SPLIT_FILES:  # the photos of a split are in the order of the file
        assert one.splits[split] == [name for name in names if name in one.splits[split]]
        assert one.splits[split] == other.splits[split][::-1]


def test_if_one_of_val_and_test_is_missing_it_gets_half_of_the_other(tmp_path):
    rows = [f"{i}.jpg,a dog,{'train' if i < 20 else 'validation'}" for i in range(60)]
    folder = read_folder(write_table(tmp_path / "a", "image,caption,split", *rows))
    assert folder.by_hash and folder.splits["train"] == [f"{i}.jpg" for i in range(20)]
    assert len(folder.splits["val"]) == len(folder.splits["test"]) == 20


@pytest.mark.parametrize("captions, different", [
    (["a dog", "A dog ", "a cat", "a cat"], 2),
    (["one", "two", "three", "two"], 3),  # more than a tenth are shared
    ([f"caption {i}" for i in range(39)] + ["caption 0"], None),  # by chance
    (["a dog"] * 4, 1),
])
def test_photos_that_share_captions_are_noticed(tmp_path, captions, different):
    splits = ["val", "test"] + ["train"] * len(captions)
    lines = [f"{i}.jpg,{captions[i]},{splits[i]}" for i in range(len(captions))]
    folder = read_folder(write_table(tmp_path / "own", "image,caption,split", *lines))
    assert folder.different_captions == different
    said = folder.describe()[2:]
    if different is None:
        assert said == []
    else:
        assert said == [f"photos share captions, {different} different ones for {len(captions)} "
                        "photos: a caption is right for every photo that has it"]


def test_a_caption_that_one_photo_has_twice_is_not_shared(tmp_path):
    lines = [f"{i}.jpg,caption {i},{split}" for i, split in enumerate(["val", "test", "train"])]
    table = write_table(tmp_path / "own", "image,caption,split", *lines, *lines)
    folder = read_folder(table)
    assert folder.different_captions is None


@pytest.mark.parametrize("only", [True, False])
def test_an_empty_caption_is_an_error_unless_it_may_be_left_out(tmp_path, capsys, only):
    """only: whether it is the only caption of its photo."""
    splits = ["val", "test"] + ["train"] * 8
    rows = [f"{i}.jpg,a dog {i},{split}" for i, split in enumerate(splits)]
    if only:
        rows[5] = "5.jpg, ,train"
    else:
        rows[5:5] = ["5.jpg,,train"]
    root = write_table(tmp_path / "own", "image,caption,split", *rows)
    for i in range(10):
        write_photo(root / f"{i}.jpg", i)
    folder = read_folder(root)
    assert folder.describe()[2] == "empty captions (1, such as one of 5.jpg) are left out"
    message = "(5.jpg) in" if only else "own/captions.csv: empty captions (1, such as one of 5.jpg)"
    with pytest.raises(DataError) as error:
        read_pairs(folder, "train", 8, cache=False)
    assert message in str(error.value) and "--allow_incomplete" in str(error.value)
    assert len(read_pairs(folder, "val", 8, cache=False).names) == 1
    pairs = read_pairs(folder, "train", 8, allow_incomplete=True, cache=False)
    assert list(pairs.captions) == [f"a dog {i}" for i in range(2, 10) if i != 5 or not only]
    assert pairs.skipped == ["5.jpg"] * only
    assert main("--data_dir", root, "--output_dir", tmp_path / "run", "--check") == 2
    assert "such as one of 5.jpg" in capsys.readouterr().err
    assert main("--data_dir", root, "--output_dir", tmp_path / "run", "--check",
                "--allow_incomplete") == 0
