"""The known layouts of a dataset folder, each with a function that reads it as a `Folder`.

`read_folder` takes the first of these layouts that it finds:

    Flickr8k     Flickr8k.token.txt, or Kaggle's captions.txt (CSV: image,caption), with
                 Flickr_8k.{train,dev,test}Images.txt; all at the root or in Flickr8k_text/
    Flickr30k    results_20130124.token, or Kaggle's results.csv (image_name| comment_number|
                 comment)
    Karpathy's   dataset_flickr8k.json, dataset_flickr30k.json or dataset_coco.json
    COCO         annotations/captions_train2014.json, captions_val2014.json, or those of 2017
    a table      captions.csv, .tsv, .txt or .jsonl with the columns image and caption, and
                 optionally split
    texts        NAME.jpg with NAME.txt beside it, one caption a line, in the folder or below it
    shards       .tar files of NAME.jpg and NAME.txt, as img2dataset and webdataset write them

The single files are read by `caption_files.py`, texts and shards by `samples.py`; the photos are
found by `photo_names.py`. This module must not import torch."""
import collections
import itertools
from pathlib import Path

from src.utils.caption_files import bar_rows, coco_rows, karpathy_rows, token_rows
from src.utils.captions import SPLIT_FILES, Folder, download_command
from src.utils.errors import DataError
from src.utils.samples import archive_rows, find_archives, folder_rows, list_files
from src.utils.tables import table_rows
from src.utils.text_files import read_lines

CAPTION_FILES = ("Flickr8k.token.txt", "captions.txt")
FLICKR30K_FILES = ("results_20130124.token", "results.csv")
KARPATHY_FILES = ("dataset_flickr8k.json", "dataset_flickr30k.json", "dataset_coco.json")
TABLES = ("captions.csv", "captions.tsv", "captions.jsonl", "captions.txt")
TEXT_FOLDERS = ("", "Flickr8k_text", "flickr30k_images")


def find_text_file(root, names):
    """Return the path of the first of these files that is in one of TEXT_FOLDERS, or None."""
    for name in names:
        for folder in TEXT_FOLDERS:
            if (root / folder / name).is_file():
                return root / folder / name
    return None


def read_split(root_dir, split):
    """Return the names of the photos of Flickr8k's "train", "val" or "test", in the order of its
    file.

    A name may contain a folder, as in sub/photo.jpg. Raises DataError if the file is missing, is
    empty or lists a photo twice."""
    path = find_text_file(Path(root_dir), [SPLIT_FILES[split]])
    if path is None:
        raise DataError(f"{root_dir}: {SPLIT_FILES[split]} is missing. "
                        f"`{download_command(root_dir, '--text_only')}` downloads it (2 MB).")
    names = [line.strip() for line in read_lines(path) if line.strip()]
    if not names:
        raise DataError(f"{path}: the file lists no photos")
    name, count = collections.Counter(names).most_common(1)[0]
    if count > 1:
        raise DataError(f"{path}: the file lists {name} twice")
    return names


def read_flickr8k(root):
    source = find_text_file(root, CAPTION_FILES)
    if source is None:
        return None
    rows = token_rows(source)
    if source.name == CAPTION_FILES[1]:
        header = next(read_lines(source), "").strip().lower().replace(" ", "")
        if header != "image,caption":  # not Kaggle's file, but a table for `read_table`
            return None
        rows = table_rows(source)
    splits = {split: read_split(root, split) for split in SPLIT_FILES}
    return Folder(root, "Flickr8k", source, rows, splits, merge_copies=False)


def read_flickr30k(root):
    source = find_text_file(root, FLICKR30K_FILES)
    if source is None:
        return None
    rows = bar_rows(source) if source.suffix == ".csv" else token_rows(source)
    return Folder(root, "Flickr30k", source, rows, merge_copies=False)


def read_karpathy(root):
    source = find_text_file(root, KARPATHY_FILES)
    if source is None:
        return None
    titles = {"flickr8k": "Flickr8k", "flickr30k": "Flickr30k", "coco": "COCO"}
    title = titles[source.stem.removeprefix("dataset_")]
    return Folder(root, f"{title}, Karpathy's splits", source, karpathy_rows(source),
                  merge_copies=False)


def read_coco(root):
    for year in ("2014", "2017"):
        paths = {split: root / "annotations" / f"captions_{split}{year}.json"
                 for split in ("train", "val")}
        paths = {split: path for split, path in paths.items() if path.is_file()}
        if paths:
            return Folder(root, f"COCO {year}", next(iter(paths.values())), coco_rows(paths),
                          merge_copies=False)
    return None


def read_table(root):
    for name in TABLES:
        if (root / name).is_file():
            return Folder(root, "a table of captions", root / name, table_rows(root / name))
    return None


def read_texts(root):
    photos, notes = {}, []  # filled by `folder_rows`
    rows = folder_rows(root, photos, notes)
    first = next(rows, None)
    if first is None:
        return None
    rows = itertools.chain([first], rows)
    return Folder(root, "texts beside photos", root, rows, photos=photos, notes=notes)


def read_shards(root):
    archives, compressed = find_archives(root)
    if not archives and not compressed:
        return None
    photos, notes = {}, []  # filled by `archive_rows`
    if compressed:
        note = f"compressed archives ({len(compressed):,}, such as {compressed[0]}) are not read"
        if not archives:
            raise DataError(f"{root}: {note}; please unpack them")
        notes.append(note)
    rows = archive_rows(archives, root, photos, notes)
    return Folder(root, "shards of img2dataset", root, rows, photos=photos, notes=notes)


# Each returns a `Folder`, or None if the folder does not have its layout.
READERS = (read_flickr8k, read_flickr30k, read_karpathy, read_coco, read_table, read_texts,
           read_shards)


def read_folder(root_dir):
    """Read a dataset folder in any known layout, see above, as a `Folder`.

    Raises DataError if the folder does not exist, has no known layout, or has files that do not fit
    their layout."""
    root = Path(root_dir)
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder. To download Flickr8k: "
                        f"{download_command(root)}\n"
                        "To train on the built-in shapes: python train_flickr8k_sgd.py --synthetic")
    for read in READERS:
        folder = read(root)
        if folder is not None:
            return folder
    raise DataError(
        f"{root}: this folder holds no captions in a known layout.{list_files(root)} "
        f"Known are {' or '.join(CAPTION_FILES)} (Flickr8k), {' or '.join(FLICKR30K_FILES)} "
        f"(Flickr30k), {', '.join(KARPATHY_FILES)} (Karpathy's), "
        "annotations/captions_train2014.json or captions_train2017.json (COCO), captions.csv, "
        ".tsv or .jsonl, NAME.jpg with NAME.txt beside it, and .tar files of these")
