"""Where photos, captions and splits are found, in every layout, with their quirks."""
import csv
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from src.runs import CONFIG, HISTORY
from src.utils.captions import SPLIT_FILES, find_photo_folder, read_folder, read_split
from src.utils.duplicates import near_duplicates, signature
from src.utils.errors import DataError
from src.utils.synthetic import write_synthetic
from tests.conftest import main, open_dataset, read_captions


def test_text_files_may_lie_in_a_folder_of_their_own(dataset_dir):
    (dataset_dir / "Flickr8k_text").mkdir()
    for path in list(dataset_dir.glob("*.txt")):
        path.rename(dataset_dir / "Flickr8k_text" / path.name)
    assert len(open_dataset(dataset_dir)) == 30


def test_crlf_and_byte_order_mark(dataset_dir):
    plain = open_dataset(dataset_dir)
    for path in dataset_dir.glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    windows = open_dataset(dataset_dir)
    assert windows.names == plain.names and list(windows.captions) == list(plain.captions)


def test_captions_of_a_photo_that_does_not_exist_do_no_harm(dataset_dir):
    with open(dataset_dir / "Flickr8k.token.txt", "a") as file:
        file.write("2258277193_586949ec62.jpg.1#0\tA man rides .\n\n")
    assert len(open_dataset(dataset_dir)) == 30


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
        open_dataset(dataset_dir)


def test_a_caption_of_unknown_characters_only(dataset_dir):
    path = dataset_dir / "Flickr8k.token.txt"
    path.write_text(path.read_text() + "1000_abc.jpg#5\t\u72d7\n", encoding="utf-8")
    message = "line 56, 1000_abc.jpg: the text '\u72d7' has no character .*--tokenizer bpe"
    with pytest.raises(DataError, match=message):
        open_dataset(dataset_dir)
    kaggle(dataset_dir)
    with pytest.raises(DataError, match="captions.txt, line 7, 1000_abc.jpg: the text"):
        open_dataset(dataset_dir)


def test_text_that_is_not_utf8(dataset_dir):
    path = dataset_dir / "Flickr8k.token.txt"
    path.write_bytes(path.read_bytes() + b"1000_abc.jpg#5\tcaf\xe9\n")
    with pytest.raises(DataError, match="Flickr8k.token.txt: the file is not UTF-8 text"):
        open_dataset(dataset_dir)


def kaggle(root):
    """Turn the official layout into Kaggle's: another folder, CSV captions, no split files."""
    (root / "Flicker8k_Dataset").rename(root / "Images")
    rows = ["image,caption"]
    for name, captions in read_captions(root / "Flickr8k.token.txt").items():
        rows += [f'{name},"{caption}"' for caption in captions]
    (root / "captions.txt").write_text("\n".join(rows) + "\n")
    (root / "Flickr8k.token.txt").unlink()


def test_kaggle_layout(dataset_dir):
    official = open_dataset(dataset_dir)
    kaggle(dataset_dir)
    data = open_dataset(dataset_dir)
    # which have commas in them
    assert data.names == official.names and list(data.captions) == list(official.captions)
    for path in dataset_dir.glob("Flickr_8k.*"):
        path.unlink()
    with pytest.raises(
        DataError, match=r"Flickr_8k.trainImages.txt.*missing.*download_flickr8k.py --text_only"
    ):
        open_dataset(dataset_dir)


@pytest.mark.parametrize("content, message", [
    ("name,text\n", "line 1: expected the header"),
    ("", "line 1: expected the header"),
    ("image,caption\na.jpg,one, two\n", "line 2: expected 'image,caption'"),
    ("image,caption\na.jpg\n", "line 2: expected 'image,caption'"),
    ('image,caption\na.jpg,"open\n', "not valid CSV"),
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
    official = open_dataset(dataset_dir)
    (dataset_dir / "Flicker8k_Dataset").rename(dataset_dir / "photos")
    (dataset_dir / place).parent.mkdir(exist_ok=True)
    (dataset_dir / "photos").rename(dataset_dir / place)
    assert open_dataset(dataset_dir).photos[:].equal(official.photos[:])


@pytest.mark.parametrize("full, empty", [
    ("Images", "Flicker8k_Dataset"), ("Flicker8k_Dataset", "Images"),
    ("Flickr8k_Dataset/Images", "Flicker8k_Dataset")])
def test_an_empty_folder_beside_the_full_one(dataset_dir, full, empty):
    (dataset_dir / "Flicker8k_Dataset").rename(dataset_dir / "photos")
    (dataset_dir / full).parent.mkdir(exist_ok=True)
    (dataset_dir / "photos").rename(dataset_dir / full)
    (dataset_dir / empty).mkdir()
    (dataset_dir / empty / "README.jpg").write_text("empty but for this")
    assert len(open_dataset(dataset_dir)) == 30
    names = read_split(dataset_dir, "val")
    assert find_photo_folder(dataset_dir, names) == dataset_dir / full


def test_photos_in_folders_of_their_own(dataset_dir):
    (dataset_dir / "Flicker8k_Dataset" / "sub").mkdir()
    for path in (dataset_dir / "Flicker8k_Dataset").glob("*.jpg"):
        path.rename(path.parent / "sub" / path.name)
    for path in dataset_dir.glob("*.txt"):
        path.write_text("".join(f"sub/{line}" for line in path.read_text().splitlines(True)))
    data = open_dataset(dataset_dir)
    assert data.names[0] == "sub/1000_abc.jpg" and len(data) == 30


def test_missing_photos_name_the_folder_and_the_users_own_command(dataset_dir):
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


# One data set in each layout: [(photo's name, its captions, split)], photos in `shapes`.

@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """-> (folder of photos, rows), no two photos being alike; one is not there."""
    root = tmp_path_factory.mktemp("catalogue") / "shapes"
    write_synthetic(root, num_pictures={"train": 120, "val": 2, "test": 2})
    photos, captions = root / "Flicker8k_Dataset", read_captions(root / "Flickr8k.token.txt")
    rows, seen = [], []
    for name in captions:
        with Image.open(photos / name) as photo:
            known = signature(photo)[None]
        if not seen or near_duplicates(known, np.concatenate(seen))[0] < 0:
            seen.append(known)
            rows.append((name, captions[name], ("train", "train", "train", "val", "test")[
                len(rows) % 5]))
    rows = rows[:40]
    rows[0][1][:] = rows[0][1][:1]  # one caption
    rows[5][1].extend([f'The "{i}th" caption, with a comma | and a bar .' for i in range(5)])
    (photos / rows[6][0]).unlink()
    return photos, rows


def copy_photos(photos, rows, folder, rename=lambda name: name):
    for name, _, _ in rows:
        if (photos / name).exists():
            place = folder / rename(name)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(photos / name, place)


def write_lines(path, lines, end="\r\n"):
    """With a byte order mark, an empty line, and ends as Windows has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xef\xbb\xbf" + "".join(f"{line}{end}" for line in [*lines, ""]).encode())


def write_flickr8k(root, photos, rows):
    copy_photos(photos, rows, root / "Flicker8k_Dataset")
    write_lines(root / "Flickr8k.token.txt", (
        f"{name}#{i}\t{caption}" for name, own, _ in rows for i, caption in enumerate(own)))
    for split, file in SPLIT_FILES.items():
        write_lines(root / file, [name for name, _, its in rows if its == split])


def write_flickr30k(root, photos, rows):
    copy_photos(photos, rows, root / "flickr30k-images")
    write_lines(root / "results_20130124.token", (
        f"{name}#{i}\t{caption}" for name, own, _ in rows for i, caption in enumerate(own)))


def write_kaggle_flickr30k(root, photos, rows):
    copy_photos(photos, rows, root / "flickr30k_images" / "flickr30k_images")
    lines = [f"{name}| {i}| {caption}" for name, own, _ in rows for i, caption in enumerate(own)]
    lines[3] = lines[3].replace("| 2|", "| 2  ")  # as in Kaggle's line 19999
    assert lines[3].count("|") == 1
    write_lines(root / "flickr30k_images" / "results.csv",
                ["image_name| comment_number| comment", *lines])


def write_karpathy(root, photos, rows):
    copy_photos(photos, rows, root / "Flicker8k_Dataset")
    images = [{"filename": name, "split": "restval" if i == 0 else split,
               "sentences": [{"raw": caption, "tokens": []} for caption in own]}
              for i, (name, own, split) in enumerate(rows)]
    write_lines(root / "dataset_flickr8k.json", [json.dumps({"images": images})])


def write_karpathy_coco(root, photos, rows):
    copy_photos(photos, rows, root / "val2014")
    images = [{"filename": name, "filepath": "val2014", "split": split,
               "sentences": [{"raw": caption} for caption in own]} for name, own, split in rows]
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
    for number, (name, own, split) in enumerate(rows):
        table.writerows([number, caption, name, split.upper()] for caption in own)
    write_lines(root / "captions.csv", file.getvalue().split("\r\n"))


def write_tsv(root, photos, rows):
    copy_photos(photos, rows, root / "Images")
    file = io.StringIO()
    table = csv.writer(file, "excel-tab")
    table.writerow(["file_name", "id", "comment"])
    for number, (name, own, _) in enumerate(rows):
        table.writerows([name, number, caption] for caption in own)
    write_lines(root / "captions.tsv", file.getvalue().split("\r\n"))


def write_jsonl(root, photos, rows):
    copy_photos(photos, rows, root / "below", lambda name: f"it/{name}")
    dev = {"train": "training", "val": "dev", "test": "test"}
    write_lines(root / "captions.jsonl", (
        json.dumps({"filepath": f"./below/it/{name}", "text": own, "split": dev[split]})
        for name, own, split in rows))


def write_texts(root, photos, rows):
    folder = root / "some" / "photos"
    copy_photos(photos, rows, folder)
    for name, own, _ in rows:
        write_lines(folder / f"{name.removesuffix('.jpg')}.txt", own)
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
    """An epoch -> its history, less the seconds."""
    assert main("--model", "tiny", "--data_dir", data_dir, "--output_dir", output_dir, "--epochs",
                1, "--batch_size", 10, "--device", "cpu", "--allow_incomplete") == 0
    history = json.loads((output_dir / HISTORY).read_text())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_as_flickr8ks_does(catalogue, tmp_path, capsys, layout):
    photos, rows = catalogue
    LAYOUTS[layout](tmp_path / "data", photos, rows)
    folder = read_folder(tmp_path / "data")
    assert layout.split(",")[0].split(" (")[0] in folder.layout
    known = {name: (own, split) for name, own, split in rows}
    expected = []
    for split, names in folder.splits.items():
        for name in (name.rpartition("/")[2] for name in names):
            # Lists of several lines are read as one caption a line.
            expected.append((name, [" ".join(text.split()) for text in known[name][0]], split))
            if not folder.by_hash:
                assert split == known[name][1]
    there = {name for name, *_ in expected}
    assert there == set(known) - ({rows[6][0]} if "beside" in layout or "shards" in layout
                                  else set())
    write_flickr8k(tmp_path / "flickr8k", photos, expected)
    one, other = (train(tmp_path / name, tmp_path / f"{name}_run") for name in ("data", "flickr8k"))
    assert one == other and len(one) == 1
    out = capsys.readouterr().out
    captions = sum(len(own) for _, own, _ in expected)
    assert f"data: layout of {folder.layout}, {len(there)} photos, {captions} captions" in out
    assert ("by a hash of the photos' names" in out) == folder.by_hash
    config = json.loads((tmp_path / "data_run" / CONFIG).read_text())
    assert config["layout"] == folder.layout and config["data"]["train"]["photos"] > 20


def test_check_says_what_is_there_and_trains_nothing(catalogue, tmp_path, capsys):
    photos, rows = catalogue
    write_tsv(tmp_path / "data", photos, rows)
    before = sorted(tmp_path.rglob("*"))
    given = ["--data_dir", tmp_path / "data", "--output_dir", tmp_path / "run", "--check"]
    assert main(*given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        f"{tmp_path / 'data'}: layout of a table of captions, 40 photos, 201 captions",
        "train 32 photos, 165 captions; val 4 photos, 20 captions; test 4 photos, 16 captions "
        "(split by a hash of the photos' names)",
        f"1 of the 40 photos are missing in {tmp_path / 'data' / 'Images'}, such as {rows[6][0]}"]
    assert sorted(tmp_path.rglob("*")) == before


def table(root, *lines, name="captions.csv"):
    root.mkdir()
    write_lines(root / name, lines)
    return root


def test_a_split_that_is_not_there_follows_from_the_names_alone(tmp_path):
    names = [f"{i}.jpg" for i in range(200)]
    one = read_folder(table(tmp_path / "one", "image,text", *(f"{n},a dog" for n in names)))
    assert one.by_hash and [len(one.splits[split]) for split in SPLIT_FILES] == [160, 20, 20]
    assert sorted(one.names("all")) == sorted(names)
    other = read_folder(table(tmp_path / "other", "title,path", *(
        f"a cat,{n}" for n in reversed(names))))
    for split in SPLIT_FILES:  # in the order of each file
        assert one.splits[split] == [name for name in names if name in one.splits[split]]
        assert one.splits[split] == other.splits[split][::-1]


def test_a_split_of_its_own_is_kept_and_half_of_it_stands_in_for_one_that_lacks(tmp_path):
    rows = [f"{i}.jpg,a dog,{'train' if i < 20 else 'validation'}" for i in range(60)]
    folder = read_folder(table(tmp_path / "a", "image,caption,split", *rows))
    assert folder.by_hash and folder.splits["train"] == [f"{i}.jpg" for i in range(20)]
    assert len(folder.splits["val"]) == len(folder.splits["test"]) == 20


BAD = {
    "nothing": ((), "no captions in a known layout. Known are Flickr8k.token.txt or"),
    "no such column": (("captions.csv", "image,url", "a.jpg,b"),
                       "line 1: expected the header 'image,caption', found 'image,url"),
    "too many cells": (("captions.csv", "image,caption", "a.jpg,one, two"),
                       "captions.csv, line 2: expected 'image,caption', found 'a.jpg,one, two'"),
    "no caption": (("captions.tsv", "image\tcaption", "a.jpg\t "),
                   "captions.tsv, line 2: expected image and caption, found ['a.jpg', ' ']"),
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


@pytest.mark.parametrize("fault", BAD)
def test_bad_folders_are_said_in_a_line(tmp_path, capsys, fault):
    content, message = BAD[fault]
    (tmp_path / "data").mkdir()
    if content:
        write_lines(tmp_path / "data" / content[0], content[1:])
    status = main("--data_dir", tmp_path / "data", "--output_dir", tmp_path / "run")
    err = capsys.readouterr().err
    assert status == 2 and message in err and not (tmp_path / "run").exists()
    assert err.startswith("error: ") and err.count("\n") == 1 + ("incomplete" in err)


def test_a_text_or_a_table_that_is_not_utf8(tmp_path):
    for name in ("captions.csv", "a.txt"):
        folder = tmp_path / name.removesuffix(".txt")
        folder.mkdir()
        Image.new("RGB", (9, 9)).save(folder / "a.jpg")
        (folder / name).write_bytes(b"image,caption\na.jpg,caf\xe9\n")
        with pytest.raises(DataError, match=f"{name}: the file is not UTF-8 text"):
            read_folder(folder)


def test_a_truncated_archive(catalogue, tmp_path):
    write_img2dataset(tmp_path, *catalogue)
    path = tmp_path / "00001.tar"
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(DataError, match="00001.tar: this is not a complete .tar file"):
        read_folder(tmp_path)


def test_a_table_named_as_kaggles_captions_are(tmp_path):
    folder = read_folder(table(tmp_path / "a", "image_name,comment_number,comment", *(
        f"{i}.jpg,0,a dog" for i in range(9)), name="captions.txt"))
    assert folder.layout == "a table of captions" and folder.texts_of("3.jpg") == ["a dog"]
    assert folder.texts_of("no.jpg") == []


def test_a_caption_that_the_tokenizer_cannot_read_is_named_with_its_line(tmp_path, capsys):
    root = table(tmp_path / "a", "image,caption", *(f"{i}.jpg,a dog" for i in range(9)),
                 "9.jpg,\u72d7")
    for i in range(10):
        Image.new("RGB", (9, 9), (25 * i, 250 - 25 * i, 0)).save(root / f"{i}.jpg")
    assert main("--data_dir", root, "--output_dir", tmp_path / "run", "--model", "tiny",
                "--tokenizer", "char") == 2
    assert "captions.csv, line 11, 9.jpg: the text '\u72d7' has no char" in capsys.readouterr().err
