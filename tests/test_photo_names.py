"""Photos that are found by their names, and photos that are stored more than once."""
import io
import json
import logging
import os
import tarfile
import unicodedata

import pytest

from src.settings import make_settings
from src.utils.captions import read_folder
from src.utils.errors import DataError
from src.utils.folder import SPLIT_FILES
from src.utils.photo_names import PHOTO_FOLDERS, Listing, PhotoFiles, find_copies
from src.utils.splits import check_folders, load_splits
from tests.conftest import write_dataset
from tests.test_extra_data import noise

PHOTO = noise(0)
OTHERS = [f"photo {i}.jpg" for i in range(20)]


def write_files(root, *names):
    """Write files of different content, which begin like photos."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PHOTO + name.encode())


def write_table(root, names, name="captions.csv"):
    """Write a table of captions, one for each name."""
    root.mkdir(parents=True, exist_ok=True)
    rows = "".join(f'"{photo}",caption {i}\n' for i, photo in enumerate(names))
    (root / name).write_text(f"image,caption\n{rows}", encoding="utf-8")
    return root


def files_of(folder):
    """Return {name: its file, relative to the root} of the photos that are there."""
    return {name: folder.path(name).relative_to(folder.root).as_posix()
            for name in folder.names("all") if name not in folder.missing}


def read_names(root, files, names):
    """Write these files and a table of these names and of OTHERS, which are there. Return the
    folder and {name: file} of the former."""
    write_files(root, *files, *OTHERS)
    folder = read_folder(write_table(root, [*names, *OTHERS]))
    found = files_of(folder)
    assert {name: found.pop(name) for name in OTHERS} == {name: name for name in OTHERS}
    return folder, found


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café.jpg") for form in ("NFC", "NFD"))
NEARLY = [  # (the name in the table, the file)
    ("images\\x.jpg", "images/x.jpg"),
    ("x.jpg", "x.JPG"),
    ("x.JPG", "x.jpg"),
    ("x.jpeg", "x.jpg"),
    ("x.jpg", "x.JPEG"),
    ("x.tif", "x.tiff"),
    ("x", "x.jpg"),
    ("x.y", "x.y.png"),
    ("x.jpg", "x"),
    ("images/x", "images/x.JPG"),
    (COMPOSED, DECOMPOSED),
    (DECOMPOSED, COMPOSED),
    ("Images/Photo X.jpg", "images/photo x.jpg"),
    ("42", "000000000042.jpg"),
    ("42.0", "000000000042.jpg"),
    ("0", "000.jpg"),
    ("images/42.jpg", "images/00042.jpg"),
    (".\\images\\x.jpg", "images/x.jpg"),
    ("../images/x.jpg", "images/x.jpg"),
    ("/images/x.jpg", "images/x.jpg"),
    ("/home/other/data/images/x.jpg", "images/x.jpg"),
    ("/home/other/data/images/x.jpg", "x.jpg"),
    ("C:\\Users\\me\\data\\images\\x.jpg", "images/x.jpg"),
    ("C:\\Users\\me\\data\\images\\x.jpg", "pictures/x.jpg"),
    ("file:///home/other/images/X.jpeg", "images/x.jpg"),
    ("x.jpg", "deep/in/folders/x.jpg"),
    ("images/x.jpg", "images\\x.jpg"),
    ("images/photo%20x%281%29.jpg", "images/photo x(1).jpg"),
    ("images%2Fx.jpg", "images/x.jpg"),
    ("photo x.jpg", "photo%20x.jpg"),
]


@pytest.mark.parametrize("name, file", NEARLY)
def test_a_name_that_nearly_fits_finds_its_file(tmp_path, name, file):
    folder, found = read_names(tmp_path, [file], [name])
    [spelled] = found  # the table itself drops a leading ./
    assert found == {spelled: file} and not folder.missing
    assert folder.texts_of(spelled) == ["caption 0"]
    assert folder.describe()[2:] == ["1 of the 21 photos are found under slightly different names; "
                                     f"for example, {spelled} is read from {file}"]


def test_numbers_of_a_jsonl_find_their_files(tmp_path):
    write_files(tmp_path, *(f"images/{i:012d}.jpg" for i in range(30)))
    lines = [json.dumps({"image": i, "caption": f"caption {i}"}) for i in range(30)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    folder = read_folder(tmp_path)
    assert files_of(folder) == {str(i): f"images/{i:012d}.jpg" for i in map(int, folder.row_of)}
    assert not folder.missing and folder.texts_of("7") == ["caption 7"]


NOT_SURE = [  # (the names in the table, the files, {name: how it is described})
    (["x"], ["x.jpg", "x.png"], {"x": "x found as x.jpg or x.png"}),
    (["x.jpg"], ["x.png"], {"x.jpg": "x.jpg found as x.png"}),
    (["x.jpg"], ["a/x.jpg", "b/x.jpg"], {"x.jpg": "x.jpg found as a/x.jpg or b/x.jpg"}),
    (["x.jpg"], [], {"x.jpg": "x.jpg"}),
    (["7"], ["07.jpg", "007.jpg"], {"7": "7 found as 007.jpg or 07.jpg"}),
    (["007.jpg"], ["7.jpg"], {"007.jpg": "007.jpg"}),
    # The folder of the name is there, without the photo.
    (["a/1.jpg", "b/1.jpg"], ["a/1.jpg", "b/2.jpg"], {"b/1.jpg": "b/1.jpg found as a/1.jpg"}),
    # Two names would have one file.
    (["a/1.jpg", "b/1.jpg"], ["1.jpg"],
     {"a/1.jpg": "a/1.jpg and b/1.jpg both found as 1.jpg",
      "b/1.jpg": "b/1.jpg and a/1.jpg both found as 1.jpg"}),
    (["1.jpg", "b/1.jpg"], ["1.jpg"], {"b/1.jpg": "b/1.jpg and 1.jpg both found as 1.jpg"}),
    (["/cam1/1.jpg", "/cam2/1.jpg"], ["1.jpg"],
     {"/cam1/1.jpg": "/cam1/1.jpg and /cam2/1.jpg both found as 1.jpg",
      "/cam2/1.jpg": "/cam2/1.jpg and /cam1/1.jpg both found as 1.jpg"}),
    (["7.jpg", "007.jpg"], ["007.jpg"], {"7.jpg": "7.jpg and 007.jpg both found as 007.jpg"}),
    # A caption in the column of names is no file, and is too long to be one.
    (["a dog " * 60], [], {("a dog " * 60).strip(): ("a dog " * 60).strip()}),
]


@pytest.mark.parametrize("names, files, missing", NOT_SURE)
def test_a_name_that_does_not_fit_exactly_one_file_is_missing(tmp_path, names, files, missing):
    folder, _ = read_names(tmp_path, files, names)
    assert folder.missing == missing
    assert folder.describe()[2:] == []


def test_the_error_for_missing_photos_says_what_was_found(tmp_path):
    write_files(tmp_path, "x.png", *OTHERS)
    write_table(tmp_path, ["x.jpg", *OTHERS])
    with pytest.raises(DataError, match=r"1 of the 1?\d photos of \w+ are missing \(x.jpg found as "
                       r"x.png\) in "):
        load_splits(make_settings(data_dir=str(tmp_path), model="tiny"))


@pytest.mark.parametrize("names", [
    ["images/x.jpg", "images\\x.jpg"],
    ["x.jpg", "X.JPG", "./x.jpeg", "x"],
    ["images/x.jpg", "/home/other/data/images/x.jpg"],
    ["images/x.jpg", "x.jpg"],
    ["42", "42.0"],
])
def test_two_spellings_of_one_file_are_one_photo(tmp_path, names):
    file = "images/00042.jpg" if "42" in names else "images/x.jpg"
    folder, found = read_names(tmp_path, [file], names)
    assert list(found.values()) == [file] and list(found) == names[:1]
    assert folder.texts_of(names[0]) == [f"caption {i}" for i in range(len(names))]
    assert len(folder.names("all")) == 21


def test_no_listing_is_made_if_all_names_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(Listing, "__init__", lambda *_: pytest.fail("a listing was made"))
    _, found = read_names(tmp_path, ["x.jpg", "X.jpg", "a/x.jpg"], ["x.jpg", "a/x.jpg"])
    assert found == {"x.jpg": "x.jpg", "a/x.jpg": "a/x.jpg"}


def test_names_that_fit_are_not_touched_by_a_missing_one(tmp_path):
    files = ["x.jpg", "X.jpg", "a/x.jpg", "a\\x.jpg"]
    folder, found = read_names(tmp_path, files, [*files, "y.jpg"])
    assert found == {name: name for name in files} and folder.missing == {"y.jpg": "y.jpg"}
    assert [folder.path(name) for name in OTHERS] == [tmp_path / name for name in OTHERS]


@pytest.mark.parametrize("place", ["photos", "my images", "data/images", "a/b/c", "Images"])
def test_the_photos_may_lie_in_any_folder(tmp_path, place):
    write_files(tmp_path / place, *OTHERS)
    write_files(tmp_path, "a few others/photo 3.jpg")
    write_files(tmp_path / ".hidden", *OTHERS)
    write_files(tmp_path / "@eaDir", *OTHERS)
    folder = read_folder(write_table(tmp_path, OTHERS))
    assert folder.photo_folder == tmp_path / place and not folder.missing
    assert files_of(folder) == {name: f"{place}/{name}" for name in folder.names("all")}
    assert folder.describe()[2:] == [] if place == "Images" else [
        "2 folders hold photos of the same names, such as a few others; those in "
        f"{place} are read"]


def test_the_folder_with_most_photos_is_taken_and_a_known_one_among_equals(tmp_path):
    write_files(tmp_path / "all", *OTHERS)
    write_files(tmp_path / "Images", *OTHERS[:5])
    assert PhotoFiles(tmp_path, OTHERS).folder == tmp_path / "all"
    write_files(tmp_path / "Images", *OTHERS)
    assert PhotoFiles(tmp_path, OTHERS).folder == tmp_path / "Images"


@pytest.mark.parametrize("in_thumbs", [OTHERS, OTHERS[:3]])
def test_a_note_says_if_several_unknown_folders_hold_the_photos(tmp_path, in_thumbs):
    write_files(tmp_path / "photos", *OTHERS)
    write_files(tmp_path / "thumbs", *in_thumbs)
    files = PhotoFiles(tmp_path, OTHERS)
    assert files.folder == tmp_path / "photos"
    assert files.notes == ["2 folders hold photos of the same names, such as thumbs; those in "
                           "photos are read"]


def test_photos_in_several_folders_are_found_one_by_one(tmp_path):
    write_files(tmp_path / "first", *OTHERS[:15])
    write_files(tmp_path / "second", *OTHERS[15:])
    folder = read_folder(write_table(tmp_path, OTHERS))
    assert set(files_of(folder).values()) == (
        {f"first/{name}" for name in OTHERS[:15]} | {f"second/{name}" for name in OTHERS[15:]})
    assert folder.describe()[2:] == [
        "5 of the 20 photos are found under slightly different names; for example, photo 15.jpg is "
        "read from second/photo 15.jpg"]


def test_a_name_that_is_no_valid_text_gets_a_split(tmp_path):
    write_files(tmp_path, *OTHERS)
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        (tmp_path / name).touch()
    except OSError:
        pytest.skip("the file system wants valid names")
    for photo in [*OTHERS, name]:
        (tmp_path / photo).with_suffix(".txt").write_text("a dog")
    assert name in read_folder(tmp_path).names("all")


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    write_files(tmp_path / "elsewhere", *OTHERS)
    root = write_table(tmp_path / "data", OTHERS)
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(root)
    folder = read_folder(root)
    assert folder.photo_folder == root / "link" and not folder.missing


# Photos of equal content.

def content(i):
    return f"the photo {i:02d}, which is as long as the others".encode()


def write_copies(root, layout):
    """Write 20 photos of the same size, each five times under other names, with a caption each. One
    of the captions is told twice."""
    root.mkdir()
    rows = [(f"{5 * i + k:04d}", content(i), f"photo {i} told in way {max(k, 1)}")
            for i in range(20) for k in range(5)]
    if layout == "shards":
        with tarfile.open(root / "00000.tar", "w") as archive:
            for stem, photo, text in rows:
                for name, data in ((f"{stem}.jpg", photo), (f"{stem}.txt", text.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        return "00000.tar/"
    for stem, photo, text in rows:
        (root / f"{stem}.jpg").write_bytes(photo)
        if layout == "texts":
            (root / f"{stem}.txt").write_text(text)
    if layout == "table":
        (root / "captions.csv").write_text("image,caption\n" + "".join(
            f"{stem}.jpg,{text}\n" for stem, _, text in rows))
    return ""


@pytest.mark.parametrize("layout", ["shards", "texts", "table"])
def test_photos_of_equal_content_are_one_photo_with_all_their_captions(tmp_path, layout):
    prefix = write_copies(tmp_path / "data", layout)
    folder = read_folder(tmp_path / "data")
    assert sorted(folder.names("all")) == [f"{prefix}{5 * i:04d}.jpg" for i in range(20)]
    assert [len(names) for names in folder.splits.values()] == [16, 2, 2]
    for i in range(20):
        name = f"{prefix}{5 * i:04d}.jpg"
        assert folder.texts_of(name) == [f"photo {i} told in way {k}" for k in range(1, 5)]
        assert folder.path(name).read_bytes() == content(i)
    assert folder.describe()[2:] == [
        "80 of the 100 photos have the same content as another one and add their captions to it; "
        f"for example, {prefix}0001.jpg is {prefix}0000.jpg"]


def test_only_merged_photos_lose_repeated_captions(tmp_path):
    write_files(tmp_path, *OTHERS)
    names = [*OTHERS, OTHERS[0], OTHERS[1], "copy.jpg"]
    (tmp_path / "copy.jpg").write_bytes((tmp_path / OTHERS[1]).read_bytes())
    (tmp_path / "captions.csv").write_text("image,caption\n" + "".join(
        f"{name},a dog\n" for name in names))
    folder = read_folder(tmp_path)
    assert [folder.texts_of(name) for name in OTHERS[:3]] == [["a dog"] * 2, ["a dog"], ["a dog"]]
    assert folder.row_of.keys() == set(OTHERS)


def test_copies_of_fewer_photos_than_there_are_splits_are_not_merged(tmp_path):
    for i, name in enumerate(OTHERS):
        (tmp_path / name).write_bytes(content(i % 2))
    folder = read_folder(write_table(tmp_path, OTHERS))
    assert list(folder.row_of) == OTHERS
    assert len(folder.describe()) == 2


def test_photos_of_equal_size_whose_middles_agree_are_still_compared(tmp_path):
    middle = bytes(100_000)
    for i, name in enumerate(OTHERS):
        (tmp_path / name).write_bytes(b"%02d" % (i // 2) + middle)
    folder = read_folder(write_table(tmp_path, OTHERS))
    assert list(folder.row_of) == OTHERS[::2]


def test_equal_files_of_which_one_is_turned_are_two_photos(tmp_path):
    paths = {name: tmp_path / name for name in ("a.jpg", "b.jpg", "c.jpg")}
    for path in paths.values():
        path.write_bytes(PHOTO)
    (tmp_path / "b.json").write_text('{"exif": {"Image Orientation": "Rotated 90 CW"}}')
    assert find_copies(paths, dict.fromkeys(paths)) == {"c.jpg": "a.jpg"}


def test_empty_files_are_not_one_photo(tmp_path):
    write_files(tmp_path, *OTHERS)
    for name in OTHERS[:2]:
        (tmp_path / name).write_bytes(b"")
    assert list(read_folder(write_table(tmp_path, OTHERS)).row_of) == OTHERS


def test_equal_photos_are_merged_within_a_given_split_only(tmp_path):
    rows = []
    for i in range(12):
        split = ("train", "val", "test")[i % 3]
        (tmp_path / f"{i}.jpg").write_bytes(noise(i))
        (tmp_path / f"{i} again.jpg").write_bytes(noise(i))
        rows += [f"{i}.jpg,photo {i},{split}", f"{i} again.jpg,the photo {i},{split}"]
    table = tmp_path / "captions.csv"
    table.write_text("\n".join(["image,caption,split", *rows]))
    splits, _ = load_splits(make_settings(data_dir=str(tmp_path), model="tiny"))
    assert splits["val"].names == [f"{i}.jpg" for i in (1, 4, 7, 10)]
    assert list(splits["val"].captions)[:2] == ["photo 1", "the photo 1"]
    table.write_text("\n".join(["image,caption,split", *rows]).replace(
        "the photo 1,val", "the photo 1,train"))
    with pytest.raises(DataError, match=r"1 photos of train .* \(1 again.jpg is 1.jpg of val\)"):
        load_splits(make_settings(data_dir=str(tmp_path), model="tiny"))


def test_official_lists_keep_their_photos_even_if_two_are_equal(dataset_dir):
    photos = dataset_dir / PHOTO_FOLDERS[0]
    (photos / "1001_abc.jpg").write_bytes((photos / "1000_abc.jpg").read_bytes())
    folder = read_folder(dataset_dir)
    assert [len(folder.splits[split]) for split in SPLIT_FILES] == [6, 3, 2]
    assert len(folder.describe()) == 2


def test_extra_data_is_found_and_merged_alike(dataset_dir, tmp_path, caplog):
    extra = tmp_path / "extra"
    for i in range(20):
        for copy in range(2):
            path = extra / "photos" / f"{2 * i + copy:04d}.JPG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(noise(i))
    write_table(extra, [f"C:\\data\\{i}.jpg" for i in range(40)])
    with caplog.at_level(logging.INFO, "flickr8k_sgd"):
        splits, _ = load_splits(make_settings(
            data_dir=str(dataset_dir), extra_data=[str(extra)], extra_all=True, model="tiny"))
    assert "40 of the 40 photos are found under slightly different names; for example, " in (
        caplog.text)
    [description] = splits["train"].extra_data
    assert description["photos"] == 20 and description["captions"] == 40


# The flag --check.

def test_check_asks_only_for_the_photos_that_training_would_read(tmp_path):
    main, extra = write_dataset(tmp_path / "main"), write_dataset(tmp_path / "extra")
    settings = {"data_dir": str(main), "extra_data": [str(extra)], "model": "tiny"}
    for path in sorted((extra / PHOTO_FOLDERS[0]).iterdir())[6:]:  # all but those of train
        path.unlink()
    check_folders(make_settings(**settings))
    with pytest.raises(DataError, match=r"extra: 5 of the 11 photos are missing, such as 1006_abc"):
        check_folders(make_settings(**settings, extra_all=True))
    check_folders(make_settings(**settings, extra_all=True, allow_incomplete=True))


def test_check_fails_if_a_split_has_no_photo_left_even_where_some_may_be_missing(dataset_dir):
    for name in ("1009_abc.jpg", "1010_abc.jpg"):
        (dataset_dir / PHOTO_FOLDERS[0] / name).unlink()
    settings = make_settings(data_dir=str(dataset_dir), model="tiny", allow_incomplete=True)
    with pytest.raises(DataError, match=r"2 of the 11 photos .*\nNo photo of test is usable."):
        check_folders(settings)
    settings = make_settings(data_dir=str(dataset_dir), model="tiny")
    with pytest.raises(DataError, match="--allow_incomplete cannot help, as a split would be"):
        check_folders(settings)


def test_check_fails_if_photos_have_no_captions(tmp_path, caplog):
    write_files(tmp_path, *OTHERS)
    for name in OTHERS:
        (tmp_path / name).with_suffix(".txt").write_text(" \n" if name == OTHERS[3] else "a dog")
    with pytest.raises(DataError, match="1 of the 20 photos are without captions, such as photo"):
        check_folders(make_settings(data_dir=str(tmp_path), model="tiny"))
    caplog.set_level(logging.INFO)
    check_folders(make_settings(data_dir=str(tmp_path), model="tiny", allow_incomplete=True))
    assert "such as photo 3.jpg; --allow_incomplete trains without them" in caplog.text
