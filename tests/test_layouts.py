"""Where photos, captions and splits are found, in both layouts, with their quirks."""
import shutil

import pytest

from src.utils.layouts import DataError, find_photo_folder, read_split
from tests.conftest import read_captions
from tests.test_flickr8k_simple import dataset


def test_text_files_may_lie_in_a_folder_of_their_own(dataset_dir):
    (dataset_dir / "Flickr8k_text").mkdir()
    for path in list(dataset_dir.glob("*.txt")):
        path.rename(dataset_dir / "Flickr8k_text" / path.name)
    assert len(dataset(dataset_dir)) == 30


def test_crlf_and_byte_order_mark(dataset_dir):
    plain = dataset(dataset_dir)
    for path in dataset_dir.glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    windows = dataset(dataset_dir)
    assert windows.names == plain.names and list(windows.captions) == list(plain.captions)


def test_captions_of_a_photo_that_does_not_exist_do_no_harm(dataset_dir):
    with open(dataset_dir / "Flickr8k.token.txt", "a") as file:
        file.write("2258277193_586949ec62.jpg.1#0\tA man rides .\n\n")
    assert len(dataset(dataset_dir)) == 30


@pytest.mark.parametrize(
    "line",
    [
        "no tab here",
        "1000_abc.jpg\tno number",
        "1000_abc.jpg#x\tno number",
        "#0\tno name",
        "1000_abc.jpg#0\t  ",
    ],
)
def test_a_caption_line_that_does_not_parse(dataset_dir, line):
    path = dataset_dir / "Flickr8k.token.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"Flickr8k.token.txt, line 56: expected"):
        dataset(dataset_dir)


def test_a_caption_of_unknown_characters_only(dataset_dir):
    path = dataset_dir / "Flickr8k.token.txt"
    path.write_text(path.read_text() + "1000_abc.jpg#5\t\u72d7\n", encoding="utf-8")
    message = "line 56, 1000_abc.jpg: the text '\u72d7' has no character .*--tokenizer bpe"
    with pytest.raises(DataError, match=message):
        dataset(dataset_dir)
    kaggle(dataset_dir)
    with pytest.raises(DataError, match="captions.txt, line 7, 1000_abc.jpg: the text"):
        dataset(dataset_dir)


def test_text_that_is_not_utf8(dataset_dir):
    path = dataset_dir / "Flickr8k.token.txt"
    path.write_bytes(path.read_bytes() + b"1000_abc.jpg#5\tcaf\xe9\n")
    with pytest.raises(DataError, match="Flickr8k.token.txt: not UTF-8"):
        dataset(dataset_dir)


def kaggle(root):
    """Turn the official layout into Kaggle's: another folder, CSV captions, no split files."""
    (root / "Flicker8k_Dataset").rename(root / "Images")
    rows = ["image,caption"]
    for name, captions in read_captions(root / "Flickr8k.token.txt").items():
        rows += [f'{name},"{caption}"' for caption in captions]
    (root / "captions.txt").write_text("\n".join(rows) + "\n")
    (root / "Flickr8k.token.txt").unlink()


def test_kaggle_layout(dataset_dir):
    official = dataset(dataset_dir)
    kaggle(dataset_dir)
    data = dataset(dataset_dir)
    # which have commas in them
    assert data.names == official.names and list(data.captions) == list(official.captions)
    for path in dataset_dir.glob("Flickr_8k.*"):
        path.unlink()
    with pytest.raises(
        DataError, match=r"Flickr_8k.trainImages.txt.*missing.*download_flickr8k.py --text_only"
    ):
        dataset(dataset_dir)


@pytest.mark.parametrize("content, message", [
    ("name,text\n", "line 1: expected the header"),
    ("", "line 1: expected the header"),
    ("image,caption\na.jpg,one, two\n", "line 2: expected 'image,caption'"),
    ("image,caption\na.jpg\n", "line 2: expected 'image,caption'"),
    ('image,caption\na.jpg,"open\n', "not CSV"),
])
def test_kaggle_captions_that_do_not_parse(tmp_path, content, message):
    (tmp_path / "captions.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        read_captions(tmp_path / "captions.txt")


def test_kaggle_captions_with_quotes(tmp_path):
    (tmp_path / "captions.txt").write_text(
        'image,caption\na.jpg,"A dog , ""big"" , runs ."\na.jpg,Plain .\n'
    )
    assert read_captions(tmp_path / "captions.txt") == {
        "a.jpg": ['A dog , "big" , runs .', "Plain ."]
    }


def test_split_files(dataset_dir):
    path = dataset_dir / "Flickr_8k.devImages.txt"
    path.write_text(path.read_text() * 2)
    with pytest.raises(DataError, match="lists 1006_abc.jpg twice"):
        read_split(dataset_dir, "val")
    path.write_text("\n")
    with pytest.raises(DataError, match="lists no photos"):
        read_split(dataset_dir, "val")


def test_a_line_break_inside_a_quoted_caption_is_a_space(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_bytes(b'image,caption\na.jpg,"two\ndogs"\na.jpg,"a \r\n red\r\n\r\n hat"\n')
    assert read_captions(path) == {"a.jpg": ["two dogs", "a red hat"]}
    path.write_bytes(path.read_bytes() + b"b.jpg\n")  # lines are counted as an editor does
    with pytest.raises(DataError, match="line 8: expected 'image,caption'"):
        read_captions(path)


@pytest.mark.parametrize("place", [
    "Flickr8k_Dataset/Flicker8k_Dataset", "Images/images", "images", "FLICKER8K_DATASET"])
def test_photos_in_a_nested_folder_or_one_of_other_capitals(dataset_dir, place):
    official = dataset(dataset_dir)
    (dataset_dir / "Flicker8k_Dataset").rename(dataset_dir / "photos")
    (dataset_dir / place).parent.mkdir(exist_ok=True)
    (dataset_dir / "photos").rename(dataset_dir / place)
    assert dataset(dataset_dir).photos[:].equal(official.photos[:])


@pytest.mark.parametrize("full, empty", [
    ("Images", "Flicker8k_Dataset"), ("Flicker8k_Dataset", "Images"),
    ("Flickr8k_Dataset/Images", "Flicker8k_Dataset")])
def test_an_empty_folder_beside_the_full_one(dataset_dir, full, empty):
    (dataset_dir / "Flicker8k_Dataset").rename(dataset_dir / "photos")
    (dataset_dir / full).parent.mkdir(exist_ok=True)
    (dataset_dir / "photos").rename(dataset_dir / full)
    (dataset_dir / empty).mkdir()
    (dataset_dir / empty / "README.jpg").write_text("empty but for this")
    assert len(dataset(dataset_dir)) == 30
    names = read_split(dataset_dir, "val")
    assert find_photo_folder(dataset_dir, names) == dataset_dir / full


def test_photos_in_folders_of_their_own(dataset_dir):
    (dataset_dir / "Flicker8k_Dataset" / "sub").mkdir()
    for path in (dataset_dir / "Flicker8k_Dataset").glob("*.jpg"):
        path.rename(path.parent / "sub" / path.name)
    for path in dataset_dir.glob("*.txt"):
        path.write_text("".join(f"sub/{line}" for line in path.read_text().splitlines(True)))
    data = dataset(dataset_dir)
    assert data.names[0] == "sub/1000_abc.jpg" and len(data) == 30


def test_missing_photos_name_the_folder_and_the_users_own_command(dataset_dir):
    moved = dataset_dir.with_name("my photos")
    dataset_dir.rename(moved)
    shutil.rmtree(moved / "Flicker8k_Dataset")
    (moved / "Images").mkdir()
    with pytest.raises(DataError) as error:
        dataset(moved)
    assert f"in {moved / 'Images'}." in str(error.value)
    assert f"`python download_flickr8k.py --data_dir '{moved}'` mends it" in str(error.value)
    (moved / "Flickr_8k.testImages.txt").unlink()
    with pytest.raises(DataError) as error:
        read_split(moved, "test")
    assert f"`python download_flickr8k.py --text_only --data_dir '{moved}'`" in str(error.value)
