"""Dataset folders of every layout: where their photos, captions and splits are found."""
import csv
import hashlib
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from src.runs import CONFIG, HISTORY
from src.utils.captions import read_folder, read_split
from src.utils.duplicates import near_duplicates, signature
from src.utils.errors import DataError
from src.utils.folder import SPLIT_FILES
from src.utils.synthetic import write_synthetic
from tests.conftest import (
    main,
    open_dataset,
    read_captions,
    write_lines,
    write_photo,
    write_table,
)


def test_the_text_files_may_be_in_flickr8k_text(dataset_dir):
    (dataset_dir / "Flickr8k_text").mkdir()
    for path in list(dataset_dir.glob("*.txt")):
        path.rename(dataset_dir / "Flickr8k_text" / path.name)
    assert len(open_dataset(dataset_dir)) == 30


def test_line_ends_of_windows_and_a_byte_order_mark_change_nothing(dataset_dir):
    plain = open_dataset(dataset_dir)
    for path in dataset_dir.glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    windows = open_dataset(dataset_dir)
    assert windows.names == plain.names and list(windows.captions) == list(plain.captions)


def test_captions_of_a_photo_in_no_split_are_ignored(dataset_dir):
    with open(dataset_dir / "Flickr8k.token.txt", "a") as file:
        file.write("2258277193_586949ec62.jpg.1#0\tA man rides .\n\n")
    assert len(open_dataset(dataset_dir)) == 30


def test_a_caption_without_tokens_is_reported_with_its_line(dataset_dir):
    path = dataset_dir / "Flickr8k.token.txt"
    path.write_text(path.read_text() + "1000_abc.jpg#5\t\u72d7\n", encoding="utf-8")
    message = "line 56, 1000_abc.jpg: the text '\u72d7' has no character .*--tokenizer bpe"
    with pytest.raises(DataError, match=message):
        open_dataset(dataset_dir)
    to_kaggle_layout(dataset_dir)
    with pytest.raises(DataError, match="captions.txt, line 7, 1000_abc.jpg: the text"):
        open_dataset(dataset_dir)


def to_kaggle_layout(root):
    """Turn Flickr8k's own layout into Kaggle's, which has another folder and captions in CSV. The
    splits, which Kaggle lacks, stay."""
    (root / "Flicker8k_Dataset").rename(root / "Images")
    rows = ["image,caption"]
    for name, captions in read_captions(root / "Flickr8k.token.txt").items():
        rows += [f'{name},"{caption}"' for caption in captions]
    (root / "captions.txt").write_text("\n".join(rows) + "\n")
    (root / "Flickr8k.token.txt").unlink()


def test_the_layout_of_kaggle_with_and_without_the_splits(dataset_dir):
    official = open_dataset(dataset_dir)
    to_kaggle_layout(dataset_dir)
    data = open_dataset(dataset_dir)
    # The captions have commas in them.
    assert data.names == official.names and list(data.captions) == list(official.captions)
    for path in dataset_dir.glob("Flickr_8k.*"):
        path.unlink()
    message = r"Flickr_8k.trainImages.txt.*missing.*download_flickr8k.py --text_only"
    with pytest.raises(DataError, match=message):
        open_dataset(dataset_dir)


def test_a_split_with_a_photo_twice_or_without_photos_is_refused(dataset_dir):
    path = dataset_dir / "Flickr_8k.devImages.txt"
    path.write_text(path.read_text() * 2)
    with pytest.raises(DataError, match="lists 1006_abc.jpg twice"):
        read_split(dataset_dir, "val")
    path.write_text("\n")
    with pytest.raises(DataError, match="lists no photos"):
        read_split(dataset_dir, "val")


@pytest.mark.parametrize("place", [
    "Flickr8k_Dataset/Flicker8k_Dataset", "Images/images", "images", "FLICKER8K_DATASET"])
def test_the_folder_of_the_photos_may_be_nested_or_in_other_case(dataset_dir, place):
    official = open_dataset(dataset_dir)
    (dataset_dir / "Flicker8k_Dataset").rename(dataset_dir / "photos")
    (dataset_dir / place).parent.mkdir(exist_ok=True)
    (dataset_dir / "photos").rename(dataset_dir / place)
    assert open_dataset(dataset_dir).photos[:].equal(official.photos[:])


@pytest.mark.parametrize("full, empty", [
    ("Images", "Flicker8k_Dataset"), ("Flicker8k_Dataset", "Images"),
    ("Flickr8k_Dataset/Images", "Flicker8k_Dataset")])
def test_the_folder_with_the_photos_is_preferred_to_an_empty_one(dataset_dir, full, empty):
    (dataset_dir / "Flicker8k_Dataset").rename(dataset_dir / "photos")
    (dataset_dir / full).parent.mkdir(exist_ok=True)
    (dataset_dir / "photos").rename(dataset_dir / full)
    (dataset_dir / empty).mkdir()
    (dataset_dir / empty / "README.jpg").write_text("the only file here")
    assert len(open_dataset(dataset_dir)) == 30
    assert read_folder(dataset_dir).photo_folder == dataset_dir / full


def test_the_names_of_photos_may_contain_a_folder(dataset_dir):
    (dataset_dir / "Flicker8k_Dataset" / "sub").mkdir()
    for path in (dataset_dir / "Flicker8k_Dataset").glob("*.jpg"):
        path.rename(path.parent / "sub" / path.name)
    for path in dataset_dir.glob("*.txt"):
        path.write_text("".join(f"sub/{line}" for line in path.read_text().splitlines(True)))
    data = open_dataset(dataset_dir)
    assert data.names[0] == "sub/1000_abc.jpg" and len(data) == 30


def test_an_incomplete_folder_is_reported_with_the_command_that_repairs_it(dataset_dir):
    moved = dataset_dir.with_name("my photos")
    dataset_dir.rename(moved)
    shutil.rmtree(moved / "Flicker8k_Dataset")
    (moved / "Images").mkdir()
    with pytest.raises(DataError) as error:
        open_dataset(moved)
    assert f"in {moved / 'Images'}." in str(error.value)
    assert f"`python download_flickr8k.py --data_dir '{moved}'` repairs it" in str(error.value)
    (moved / "Flickr_8k.testImages.txt").unlink()
    with pytest.raises(DataError) as error:
        read_split(moved, "test")
    assert f"`python download_flickr8k.py --text_only --data_dir '{moved}'`" in str(error.value)


# The following functions write the same dataset in different layouts. It is given as a folder of
# photos and a list of (name of a photo, its captions, its split).

@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """The folder of photos and the list. No photo is a near-duplicate of another, one is missing,
    one has a single caption, and one has ten, some of them with characters that must be quoted."""
    root = tmp_path_factory.mktemp("catalogue") / "shapes"
    write_synthetic(root, num_pictures={"train": 120, "val": 2, "test": 2})
    photos, captions = root / "Flicker8k_Dataset", read_captions(root / "Flickr8k.token.txt")
    rows, signatures = [], []
    for name in captions:
        with Image.open(photos / name) as photo:
            new = signature(photo)[None]
        if not signatures or near_duplicates(new, np.concatenate(signatures))[0] < 0:
            signatures.append(new)
            split = ("train", "train", "train", "val", "test")[len(rows) % 5]
            rows.append((name, captions[name], split))
    rows = rows[:40]
    rows[0][1][:] = rows[0][1][:1]
    rows[5][1].extend([f'The "{i}th" caption, with a comma | and a bar .' for i in range(5)])
    (photos / rows[6][0]).unlink()
    return photos, rows


def copy_photos(photos, rows, folder, rename=lambda name: name):
    for name, _, _ in rows:
        if (photos / name).exists():
            place = folder / rename(name)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(photos / name, place)


def numbered_captions(rows):
    """Yield (name of the photo, number of the caption among the photo's, caption)."""
    for name, captions, _ in rows:
        for i, caption in enumerate(captions):
            yield name, i, caption


def write_flickr8k(root, photos, rows):
    copy_photos(photos, rows, root / "Flicker8k_Dataset")
    write_lines(root / "Flickr8k.token.txt", (
        f"{name}#{i}\t{caption}" for name, i, caption in numbered_captions(rows)))
    for split, file in SPLIT_FILES.items():
        write_lines(root / file, [name for name, _, photo_split in rows if photo_split == split])


def write_flickr30k(root, photos, rows):
    copy_photos(photos, rows, root / "flickr30k-images")
    write_lines(root / "results_20130124.token", (
        f"{name}#{i}\t{caption}" for name, i, caption in numbered_captions(rows)))


def write_kaggle_flickr30k(root, photos, rows):
    copy_photos(photos, rows, root / "flickr30k_images" / "flickr30k_images")
    lines = [f"{name}| {i}| {caption}" for name, i, caption in numbered_captions(rows)]
    lines[3] = lines[3].replace("| 2|", "| 2  ")  # line 19999 of Kaggle's file has this fault
    assert lines[3].count("|") == 1
    write_lines(root / "flickr30k_images" / "results.csv",
                ["image_name| comment_number| comment", *lines])


def write_karpathy(root, photos, rows):
    copy_photos(photos, rows, root / "Flicker8k_Dataset")
    images = [{"filename": name, "split": "restval" if i == 0 else split,
               "sentences": [{"raw": caption, "tokens": []} for caption in captions]}
              for i, (name, captions, split) in enumerate(rows)]
    write_lines(root / "dataset_flickr8k.json", [json.dumps({"images": images})])


def write_karpathy_coco(root, photos, rows):
    copy_photos(photos, rows, root / "val2014")
    images = [{"filename": name, "filepath": "val2014", "split": split,
               "sentences": [{"raw": caption} for caption in captions]}
              for name, captions, split in rows]
    write_lines(root / "dataset_coco.json", [json.dumps({"images": images})])


def write_coco(root, photos, rows):
    for split in ("train", "val"):
        chosen = [row for row in rows if (row[2] == "train") == (split == "train")]
        copy_photos(photos, chosen, root / f"{split}2014")
        content = {
            "images": [{"id": 7 * i, "file_name": row[0]} for i, row in enumerate(chosen)],
            "annotations": [{"image_id": 7 * i, "caption": f"{caption}\n"}
                            for i, row in enumerate(chosen) for caption in row[1]]}
        write_lines(root / "annotations" / f"captions_{split}2014.json", [json.dumps(content)])


def write_csv(root, photos, rows):
    copy_photos(photos, rows, root)
    file = io.StringIO()
    table = csv.writer(file)
    table.writerow(["", "Caption ", "image", "split"])
    for number, (name, captions, split) in enumerate(rows):
        table.writerows([number, caption, name, split.upper()] for caption in captions)
    write_lines(root / "captions.csv", file.getvalue().split("\r\n"))


def write_tsv(root, photos, rows):
    copy_photos(photos, rows, root / "Images")
    file = io.StringIO()
    table = csv.writer(file, "excel-tab")
    table.writerow(["file_name", "id", "comment"])
    for number, (name, captions, _) in enumerate(rows):
        table.writerows([name, number, caption] for caption in captions)
    write_lines(root / "captions.tsv", file.getvalue().split("\r\n"))


def write_jsonl(root, photos, rows):
    copy_photos(photos, rows, root / "below", lambda name: f"it/{name}")
    dev = {"train": "training", "val": "dev", "test": "test"}
    write_lines(root / "captions.jsonl", (
        json.dumps({"filepath": f"./below/it/{name}", "text": captions, "split": dev[split]})
        for name, captions, split in rows))


def write_texts(root, photos, rows):
    folder = root / "some" / "photos"
    copy_photos(photos, rows, folder)
    for name, captions, _ in rows:
        write_lines(folder / f"{name.removesuffix('.jpg')}.txt", captions)
    (root / "README.txt").write_text("about these photos")


def write_img2dataset(root, photos, rows):
    write_texts(root / "unpacked", photos, rows)
    (root / "unpacked" / "README.txt").unlink()
    content = sorted((root / "unpacked" / "some" / "photos").iterdir())
    for number in range(2):
        with tarfile.open(root / f"0000{number}.tar", "w") as archive:
            for path in content:
                if int(path.stem[-1]) % 2 == number:
                    archive.add(path, path.name)
                    archive.addfile(tarfile.TarInfo(f"{path.stem}.json"))
    shutil.rmtree(root / "unpacked")


LAYOUTS = {
    "Flickr8k": write_flickr8k,
    "Flickr30k": write_flickr30k,
    "Flickr30k, Kaggle's": write_kaggle_flickr30k,
    "Flickr8k, Karpathy's splits": write_karpathy,
    "COCO, Karpathy's splits": write_karpathy_coco,
    "COCO 2014": write_coco,
    "a table of captions (csv)": write_csv,
    "a table of captions (tsv)": write_tsv,
    "a table of captions (jsonl)": write_jsonl,
    "texts beside photos": write_texts,
    "shards of img2dataset": write_img2dataset,
}


def train(data_dir, output_dir):
    """Train for an epoch. Return the history without the seconds."""
    assert main("--model", "tiny", "--data_dir", data_dir, "--output_dir", output_dir, "--epochs",
                1, "--batch_size", 10, "--device", "cpu", "--allow_incomplete") == 0
    history = json.loads((output_dir / HISTORY).read_text())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_in_every_layout(catalogue, tmp_path, capsys, layout):
    photos, rows = catalogue
    LAYOUTS[layout](tmp_path / "data", photos, rows)
    folder = read_folder(tmp_path / "data")
    assert layout.split(",")[0].split(" (")[0] in folder.layout
    catalogue_rows = {name: (captions, split) for name, captions, split in rows}
    expected = []
    for split, names in folder.splits.items():
        for name in (name.rpartition("/")[2] for name in names):
            captions, catalogue_split = catalogue_rows[name]
            # A line break in a caption is read as a space.
            expected.append((name, [" ".join(caption.split()) for caption in captions], split))
            if not folder.by_hash:
                assert split == catalogue_split
    names = {name for name, *_ in expected}
    # In these two layouts a missing photo leaves no trace.
    missing = {rows[6][0]} if "beside" in layout or "shards" in layout else set()
    assert names == set(catalogue_rows) - missing

    write_flickr8k(tmp_path / "flickr8k", photos, expected)
    history = train(tmp_path / "data", tmp_path / "data_run")
    assert history == train(tmp_path / "flickr8k", tmp_path / "flickr8k_run")
    assert len(history) == 1
    out = capsys.readouterr().out
    count = sum(len(captions) for _, captions, _ in expected)
    assert f"data: layout of {folder.layout}, {len(names)} photos, {count} captions" in out
    assert ("by a hash of the photos' names" in out) == folder.by_hash
    config = json.loads((tmp_path / "data_run" / CONFIG).read_text())
    assert config["layout"] == folder.layout and config["data"]["train"]["photos"] > 20


def first_by_hash(names, number):
    """Return the names whose hashes come first, in the order of the names."""
    first = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:number]
    return [name for name in names if name in first]


def without(names, taken):
    return [name for name in names if name not in taken]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_read_as_it_was_written(catalogue, tmp_path, layout):
    photos, rows = catalogue
    LAYOUTS[layout](tmp_path, photos, rows)
    folder = read_folder(tmp_path)
    assert "are found under" not in str(folder.notes) and "same content" not in str(folder.notes)
    captions_of = {name: captions for name, captions, _ in rows}
    full_name = {name.rpartition("/")[2]: name for name in folder.names("all")}
    splits = {split: [full_name[name] for name, _, its in rows if its == split and
                      name in full_name] for split in SPLIT_FILES}
    if layout.startswith("COCO 2014"):  # has no test split
        val = [full_name[name] for name, _, split in rows if split != "train"]
        test = first_by_hash(val, len(val) // 2)
        splits = {"train": splits["train"], "val": without(val, test), "test": test}
    elif folder.by_hash:
        names = [full_name[name] for name in captions_of if name in full_name]
        if "shards" in layout:  # one of them has the photos with even numbers
            names.sort(key=lambda name: name.partition("/")[0])
        test = first_by_hash(names, len(names) // 10)
        val = first_by_hash(without(names, test), len(names) // 10)
        splits = {"train": without(names, test + val), "val": val, "test": test}
    assert folder.splits == splits
    assert folder.missing.keys() == {name for name in full_name.values()
                                     if name.endswith(rows[6][0])}
    files = {path.name: path for path in tmp_path.rglob("*.jpg")}
    for name, full in full_name.items():
        assert folder.texts_of(full) == [" ".join(text.split()) for text in captions_of[name]]
        if full not in folder.missing:
            assert folder.path(full).read_bytes() == (photos / name).read_bytes()
            if "shards" not in layout:
                assert folder.path(full) == files[name]


def test_check_describes_the_folder_without_training(catalogue, tmp_path, capsys):
    photos, rows = catalogue
    write_tsv(tmp_path / "data", photos, rows)
    before = sorted(tmp_path.rglob("*"))
    given = ["--data_dir", tmp_path / "data", "--output_dir", tmp_path / "run", "--check"]
    assert main(*given) == 2
    printed = capsys.readouterr()
    lines = [
        f"{tmp_path / 'data'}: layout of a table of captions, 40 photos, 201 captions",
        "train 32 photos, 165 captions; val 4 photos, 20 captions; test 4 photos, 16 captions "
        "(split by a hash of the photos' names)"]
    missing = (f"{tmp_path / 'data'}: 1 of the 40 photos are missing, such as {rows[6][0]}; they "
               f"were looked for in {tmp_path / 'data' / 'Images'} and everywhere below "
               f"{tmp_path / 'data'}")
    assert printed.out.splitlines() == lines
    assert printed.err == f"error: {missing}.\n--allow_incomplete trains without them.\n"
    assert main(*given, "--allow_incomplete") == 0
    lines.append(f"{missing}; --allow_incomplete trains without them")
    assert capsys.readouterr().out.splitlines() == lines
    shutil.copy(photos / rows[5][0], tmp_path / "data" / "Images" / rows[6][0])
    with open(tmp_path / "data" / "Images" / rows[6][0], "ab") as file:
        file.write(b"x")
    assert main(*given) == 0
    assert capsys.readouterr().out.splitlines() == lines[:2]
    (tmp_path / "data" / "Images" / rows[6][0]).unlink()
    assert sorted(tmp_path.rglob("*")) == before


# {what is wrong: ((name of a file, its lines), the error message)}
INVALID = {
    "nothing": ((), "no captions in a known layout. Known are Flickr8k.token.txt or"),
    "no such column": (("captions.csv", "image,url", "a.jpg,b"),
                       "line 1: expected the header 'image,caption', found 'image,url"),
    "too many cells": (("captions.csv", "image,caption", "a.jpg,one, two"),
                       "captions.csv, line 2: expected 'image,caption', found 'a.jpg,one, two'"),
    "no name": (("captions.tsv", "image\tcaption", " \ta dog"),
                "captions.tsv, line 2: expected image and caption, found [' ', 'a dog']"),
    "an open quote": (("captions.csv", "image,caption", 'a.jpg,"open'), "not valid CSV"),
    "no JSON": (("captions.jsonl", '{"image": "a.jpg", "caption": "a dog"', ""),
                "captions.jsonl, line 1: the line is not valid JSON"),
    "another split": (("captions.csv", "image,caption,split", "a.jpg,a dog,holdout"),
                      "captions.csv, line 2: 'holdout' is not the name of a split; use train"),
    "two splits": (("captions.csv", "image,caption,split", "a.jpg,a dog,test", "a.jpg,a cat,val"),
                   "captions.csv: a.jpg is in two splits, test and val"),
    "no number": (("results_20130124.token", "a.jpg\ta dog"),
                  "results_20130124.token, line 1: expected 'photo.jpg#0<tab>caption'"),
    "no bar": (("results.csv", "image_name| comment_number| comment", "a.jpg a dog"),
               "results.csv, line 2: expected 'photo.jpg| 0| caption'"),
    "not Karpathy's": (("dataset_coco.json", '{"images": [{"filename": "a.jpg"}]}'),
                       "coco.json: the file is not in Karpathy's format (KeyError: 'split')"),
    "not COCO's": (("annotations/captions_val2017.json", '{"images": []}'),
                   "2017.json: the file is not in COCO's format (KeyError: 'annotations')"),
    "no archive": (("00000.tar", "something else"), "00000.tar: this is not a complete .tar file"),
    "no photos": (("captions.csv", "image,caption", *(f"{i}.jpg,a dog" for i in range(30))),
                  "24 of the 24 photos of train are missing ("),
    "two photos": (("captions.csv", "image,caption", "a.jpg,a dog", "b.jpg,a cat"),
                   "captions.csv: there are 2 photos, and none is left for train"),
}


@pytest.mark.parametrize("fault", INVALID)
def test_an_invalid_folder_ends_the_script_with_one_error(tmp_path, capsys, fault):
    content, message = INVALID[fault]
    (tmp_path / "data").mkdir()
    if content:
        write_lines(tmp_path / "data" / content[0], content[1:])
    status = main("--data_dir", tmp_path / "data", "--output_dir", tmp_path / "run")
    err = capsys.readouterr().err
    assert status == 2 and message in err and not (tmp_path / "run").exists()
    assert err.startswith("error: ") and err.count("\n") == 1 + ("incomplete" in err)


def test_a_folder_with_a_truncated_archive_is_refused(catalogue, tmp_path):
    write_img2dataset(tmp_path, *catalogue)
    path = tmp_path / "00001.tar"
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(DataError, match="00001.tar: this is not a complete .tar file"):
        read_folder(tmp_path)


def test_a_caption_of_a_table_without_tokens_is_reported_with_its_line(tmp_path, capsys):
    root = write_table(tmp_path / "a", "image,caption", *(f"{i}.jpg,a dog" for i in range(9)),
                 "9.jpg,\u72d7")
    for i in range(10):
        Image.new("RGB", (9, 9), (25 * i, 250 - 25 * i, 0)).save(root / f"{i}.jpg")
    assert main("--data_dir", root, "--output_dir", tmp_path / "run", "--model", "tiny",
                "--tokenizer", "char") == 2
    assert "captions.csv, line 11, 9.jpg: the text '\u72d7' has no char" in capsys.readouterr().err


def named(form, folder=""):
    """Return the names of ten photos. form: a pattern with the number of the photo in it."""
    return [f"{folder}{form.format(i)}" for i in range(10)]


def coco_files(year, root):
    """Write COCO's files of captions for ten photos in train and in val. Return the photos."""
    photos = []
    for split in ("train", "val"):
        names = named(f"{year}_{split}_{{}}.jpg")
        write_lines(root / "annotations" / f"captions_{split}{year}.json", [json.dumps({
            "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
            "annotations": [{"image_id": i, "caption": f"{split} {i} of {year}"}
                            for i in range(10)]})])
        photos += [f"{split}{year}/{name}" for name in names]
    return photos


@pytest.mark.parametrize("year, other, prefix", [
    ("2014", "2017", ""), ("2017", "2014", ""), ("2017", "2014", "images/")])
def test_of_two_years_of_coco_the_one_with_photos_is_read(tmp_path, year, other, prefix):
    photos, _ = coco_files(year, tmp_path), coco_files(other, tmp_path)
    for i, name in enumerate(photos):
        write_photo(tmp_path / prefix / name, i)
    folder = read_folder(tmp_path)
    assert folder.layout == f"COCO {year}" and not folder.missing
    assert folder.texts_of(photos[3]) == [f"train 3 of {year}"]
    assert folder.describe()[2] == (
        f"the captions of COCO {other} are not read: 0 of the 20 photos of COCO {other} are there, "
        f"and 20 of the 20 photos of COCO {year}")


@pytest.mark.parametrize("header, row", [
    ("image,caption", "{},a dog {}"),
    ('"image","caption"', "{},a dog {}"),
    ("image_name,comment_number,comment", "{},0,a dog {}"),
    ("image_name| comment_number| comment", "{}| 0| a dog {}"),
    ("image\tcaption", "{}\ta dog {}"),
    ("{}#0\ta dog {}", "{}#0\ta dog {}"),
])
def test_a_file_captions_txt_may_be_of_another_dataset(tmp_path, header, row):
    rows = [row.format(name, i) for i, name in enumerate(named("IMG_{}.jpg"))]
    lines = rows if "#" in header else [header, *rows]
    folder = read_folder(write_table(tmp_path / "own", *lines, name="captions.txt"))
    assert folder.layout == "a table of captions" and folder.by_hash
    assert folder.texts_of("IMG_3.jpg") == ["a dog 3"] and folder.texts_of("no.jpg") == []
    assert sorted(folder.names("all")) == named("IMG_{}.jpg")


def test_the_results_of_flickr30k_may_have_commas(tmp_path):
    folder = read_folder(write_table(
        tmp_path / "own", "image_name,comment_number,comment",
        *(f'{i}.jpg,0,"two dogs , {i}"' for i in range(10)), name="results.csv"))
    assert folder.layout == "Flickr30k" and folder.texts_of("3.jpg") == ["two dogs , 3"]


@pytest.mark.parametrize("name, content", [
    ("results.csv", "epoch,loss\n1,2\n"), ("metadata.csv", "a,b\n1,2\n"),
    ("metadata.jsonl", '{"a": 1}\n'), ("dataset.json", '{"labels": [["a.jpg", 1]]}'),
    ("dataset.json", '{"images": [1, 2]}')])
def test_other_files_of_the_same_name_do_not_hide_a_layout(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    for i in range(3):
        write_photo(tmp_path / f"{i}.jpg", i)
        (tmp_path / f"{i}.txt").write_text(f"photo {i}")
    assert read_folder(tmp_path).layout == "texts beside photos"


def test_karpathys_file_may_have_the_name_that_neuraltalk_gave_it(catalogue, tmp_path):
    write_karpathy(tmp_path, *catalogue)
    folder = read_folder(tmp_path)
    (tmp_path / "dataset_flickr8k.json").rename(tmp_path / "dataset.json")
    other = read_folder(tmp_path)
    assert other.layout == "Karpathy's splits" and other.splits == folder.splits
    assert list(other.captions) == list(folder.captions)


def metadata(path, names, **columns):
    """Write a metadata.jsonl for these photos."""
    write_lines(path, (json.dumps({"file_name": name, "text": f"a dog {name}", **columns})
                       for name in names))


def test_the_metadata_of_an_imagefolder_may_lie_in_the_folders_of_the_splits(tmp_path):
    for folder in ("train", "validation", "Test"):
        metadata(tmp_path / folder / "metadata.jsonl", named("{}.jpg"))
    folder = read_folder(tmp_path)
    assert folder.layout == "an ImageFolder of Hugging Face" and not folder.by_hash
    assert folder.splits == {"train": named("{}.jpg", "train/"),
                             "val": named("{}.jpg", "validation/"),
                             "test": named("{}.jpg", "Test/")}
    assert folder.texts_of("validation/3.jpg") == ["a dog 3.jpg"]


def test_the_metadata_of_an_imagefolder_may_lie_at_its_root(tmp_path):
    names = named("{}.jpg", "train/") + named("{}.jpg", "test/")
    lines = ["file_name,caption", *(f"{name},a dog" for name in names)]
    write_lines(tmp_path / "metadata.csv", lines)
    metadata(tmp_path / "train" / "metadata.jsonl", named("{}.jpg"))
    folder = read_folder(tmp_path)
    assert folder.splits["train"] == named("{}.jpg", "train/")
    assert sorted(folder.splits["val"] + folder.splits["test"]) == named("{}.jpg", "test/")
    assert folder.notes[0] == (f"{tmp_path / 'train' / 'metadata.jsonl'} is not read, as there is "
                               f"{tmp_path / 'metadata.csv'}")
    # With one photo elsewhere, the folders are not those of the splits.
    write_lines(tmp_path / "metadata.csv", [*lines, "other/0.jpg,a dog"])
    folder = read_folder(tmp_path)
    assert folder.by_hash and len(folder.splits["train"]) == 17
    metadata(tmp_path / "metadata.jsonl", ["train/0.jpg"])
    assert len(read_folder(tmp_path).names("all")) == 21


def test_a_second_table_is_not_read_without_a_word(tmp_path):
    root = write_table(tmp_path / "own", "image,caption", *(f"{n},a dog" for n in named("{}.jpg")))
    write_lines(root / "captions.tsv", ["image\tcaption"])
    assert f"{root / 'captions.tsv'} is not read, as there is captions.csv" in read_folder(
        root).notes


@pytest.mark.parametrize("name", ["Captions.CSV", "METADATA.csv"])
def test_the_name_of_a_table_may_be_in_capitals(tmp_path, name):
    write_lines(tmp_path / name, ["Image,Caption,Split", "0.jpg,one,TRAIN", "1.jpg,two,Dev",
                                  "2.jpg,three,Test"])
    folder = read_folder(tmp_path)
    assert folder.splits == {"train": ["0.jpg"], "val": ["1.jpg"], "test": ["2.jpg"]}


def test_metadata_of_a_split_without_captions_is_not_left_out_without_a_word(tmp_path):
    metadata(tmp_path / "train" / "metadata.jsonl", named("{}.jpg"))
    write_lines(tmp_path / "test" / "metadata.csv", ["file_name", "0.jpg"])
    assert read_folder(tmp_path).notes[0] == (
        f"{tmp_path / 'test' / 'metadata.csv'} is not read, as it has no columns of photos and "
        "captions")
