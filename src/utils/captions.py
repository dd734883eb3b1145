"""The known layouts of a dataset folder, each with a function that reads it as a `Folder`.

`read_folder` takes the first of these layouts that it finds:

    Flickr8k     Flickr8k.token.txt, or Kaggle's captions.txt (CSV: image,caption), with
                 Flickr_8k.{train,dev,test}Images.txt; all at the root or in Flickr8k_text/
    Flickr30k    results_20130124.token, or Kaggle's results.csv (image_name| comment_number|
                 comment, or with commas)
    Karpathy's   dataset_flickr8k.json, dataset_flickr30k.json, dataset_coco.json or dataset.json
    COCO         annotations/captions_train2014.json, captions_val2014.json, or those of 2017,
                 whichever photos are there
    a table      captions.csv, .tsv, .jsonl, .txt or .json with the columns image and caption, and
                 optionally split; .json may also hold {photo: captions}
    ImageFolder  metadata.csv or .jsonl, as Hugging Face has it, with the columns file_name and
                 text, at the root or in train/, validation/ and test/
    texts        NAME.jpg with NAME.txt beside it, one caption a line, in the folder or below it
    shards       .tar files of NAME.jpg and NAME.txt, as img2dataset and webdataset write them

The single files are read by `caption_files.py`, texts and shards by `samples.py`; the photos are
found by `photo_names.py`. This module must not import torch."""
import collections
import itertools
import re
from pathlib import Path, PurePosixPath

from src.utils.caption_files import (
    TOKEN_LINE,
    bar_rows,
    coco_rows,
    is_karpathys,
    karpathy_rows,
    token_rows,
)
from src.utils.errors import DataError
from src.utils.folder import SPLIT_FILES, Folder, download_command
from src.utils.samples import archive_rows, find_archives, folder_rows, list_files
from src.utils.tables import SPLIT_NAMES, find_header, has_columns, table_rows
from src.utils.text_files import read_json, read_lines

CAPTION_FILES = ("Flickr8k.token.txt", "captions.txt")
FLICKR30K_FILES = ("results_20130124.token", "results.csv")
KARPATHY_FILES = {
    "dataset_flickr8k.json": "Flickr8k, Karpathy's splits",
    "dataset_flickr30k.json": "Flickr30k, Karpathy's splits",
    "dataset_coco.json": "COCO, Karpathy's splits",
    "dataset.json": "Karpathy's splits",
}
TABLES = ("captions.csv", "captions.tsv", "captions.jsonl", "captions.txt", "captions.json")
METADATA = ("metadata.csv", "metadata.jsonl")
BAR_HEADER = ("|", ("image_name", "comment_number", "comment"))
FLICKR8K_NAME = re.compile(r"\d+_[0-9a-f]+\.jpg")
TEXT_FOLDERS = ("", "Flickr8k_text", "flickr30k_images")
SAMPLE = 1000  # rows of which the photos' names tell whether they are Flickr8k's


def find_text_file(root, names):
    """Return the path of the first of these files that is in one of TEXT_FOLDERS, or None."""
    for name in names:
        for folder in TEXT_FOLDERS:
            if (root / folder / name).is_file():
                return root / folder / name
    return None


def find_tables(folder, names):
    """Return the paths of those of these files that are in a folder, perhaps in capitals."""
    paths = {path.name.lower(): path
             for path in sorted(path for path in folder.iterdir() if path.name.lower() in names)
             if path.is_file()}
    return [paths[name] for name in names if name in paths]


def read_split(root_dir, split, notes=None):
    """Return the names of the photos of Flickr8k's "train", "val" or "test", in the order of its
    file.

    A name may contain a folder, as in sub/photo.jpg. notes: see `read_lines`. Raises DataError if
    the file is missing, is empty or lists a photo twice."""
    path = find_text_file(Path(root_dir), [SPLIT_FILES[split]])
    if path is None:
        raise DataError(f"{root_dir}: {SPLIT_FILES[split]} is missing. "
                        f"`{download_command(root_dir, '--text_only')}` downloads it (2 MB).")
    names = [line.strip() for line in read_lines(path, notes) if line.strip()]
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
    notes = []
    if source.name == CAPTION_FILES[0]:
        rows = token_rows(source, notes)
    else:
        _, delimiter, names = find_header(source)
        if delimiter is None or [name.lower() for name in names] != ["image", "caption"]:
            return None  # not Kaggle's file, but a table for `read_table`
        lists = [find_text_file(root, [name]) for name in SPLIT_FILES.values()]
        names = [name for name, _, _ in itertools.islice(table_rows(source, []), SAMPLE)]
        if not any(lists) and not all(map(FLICKR8K_NAME.fullmatch, names)):
            return None
        rows = table_rows(source, notes)
    splits = {split: read_split(root, split, notes) for split in SPLIT_FILES}
    return Folder(root, "Flickr8k", source, rows, splits, notes=notes, merge_copies=False)


def rows_of_table(path, notes):
    """Return the rows of a table, which may also have the bars of Kaggle's results.csv or the lines
    of Flickr8k.token.txt."""
    if path.suffix.lower() in (".csv", ".txt"):
        if find_header(path)[1:] == BAR_HEADER:
            return bar_rows(path, notes)
        if TOKEN_LINE.fullmatch(next(read_lines(path), "").rstrip()):
            return token_rows(path, notes)
    return table_rows(path, notes)


def read_flickr30k(root):
    source = find_text_file(root, FLICKR30K_FILES)
    if source is None:
        return None
    notes = []
    if source.suffix == ".csv":
        if find_header(source)[1] is None:
            return None  # other results than Flickr30k's
        rows = rows_of_table(source, notes)
    else:
        rows = token_rows(source, notes)
    return Folder(root, "Flickr30k", source, rows, notes=notes, merge_copies=False)


def read_karpathy(root):
    source = find_text_file(root, KARPATHY_FILES)
    if source is None:
        return None
    notes = []
    content = read_json(source, notes)
    if source.name == "dataset.json" and not is_karpathys(content):
        return None  # many programs write files of this name
    return Folder(root, KARPATHY_FILES[source.name], source, karpathy_rows(source, content),
                  notes=notes, merge_copies=False)


def read_coco(root):
    folders = []
    for year in ("2014", "2017"):
        paths = {split: root / "annotations" / f"captions_{split}{year}.json"
                 for split in ("train", "val")}
        paths = {split: path for split, path in paths.items() if path.is_file()}
        if paths:
            notes = []
            folders.append(Folder(root, f"COCO {year}", next(iter(paths.values())),
                                  coco_rows(paths, notes), notes=notes, merge_copies=False))
    if not folders:
        return None
    # The annotations of both years fit into one folder, and often only one year's photos are there.
    folder = min(folders, key=lambda folder: len(folder.missing) / len(folder.row_of))
    there = {each.layout: f"{len(each.row_of) - len(each.missing):,} of the {len(each.row_of):,} "
                          f"photos of {each.layout}" for each in folders}
    folder.notes += [f"the captions of {layout} are not read: {photos} are there, and "
                     f"{there[folder.layout]}"
                     for layout, photos in there.items() if layout != folder.layout]
    return folder


def read_table(root):
    tables = find_tables(root, TABLES)
    if not tables:
        return None
    notes = [f"{path} is not read, as there is {tables[0].name}" for path in tables[1:]]
    return Folder(root, "a table of captions", tables[0], rows_of_table(tables[0], notes),
                  notes=notes)


def metadata_rows(paths, root, notes):
    """Yield the rows of the files metadata.csv or .jsonl, in which the photos' names are relative
    to the file. Without a column for it, the split is that of the folder, if all photos are in
    folders with the names of splits."""
    rows = []
    for path in paths:
        folder = path.parent.relative_to(root)
        rows += [(str(PurePosixPath(folder.as_posix(), name)), caption, split)
                 for name, caption, split in table_rows(path, notes)]
    folder_splits = [SPLIT_NAMES.get(name.partition("/")[0].lower()) for name, _, _ in rows]
    if all(folder_splits) and not any(split for _, _, split in rows):
        rows = [(name, caption, split) for (name, caption, _), split in zip(rows, folder_splits)]
    yield from rows


def read_imagefolder(root):
    folders = [path for path in sorted(root.iterdir())
               if path.is_dir() and path.name.lower() in SPLIT_NAMES]
    paths, notes = [], []
    for folder in [root, *folders]:
        for path in find_tables(folder, METADATA):
            if has_columns(path):
                paths.append(path)
            else:
                notes.append(f"{path} is not read, as it has no columns of photos and captions")
    if not paths:
        return None
    # One file counts in each folder, and that at the root counts for the folders below it.
    chosen = list({path.parent: path for path in reversed(paths)}.values())[::-1]
    if chosen[0].parent == root:
        chosen = chosen[:1]
    notes += [f"{path} is not read, as there is {chosen[0]}"
              for path in paths if path not in chosen]
    return Folder(root, "an ImageFolder of Hugging Face", chosen[0] if len(chosen) == 1 else root,
                  metadata_rows(chosen, root, notes), notes=notes)


def read_texts(root):
    photos, notes = {}, []  # filled by `folder_rows`
    rows = folder_rows(root, photos, notes)
    first = next(rows, None)
    if first is None:
        return None
    archives = list(itertools.chain(*find_archives(root)))
    if archives:
        notes.append(f"archives ({len(archives):,}, such as {archives[0]}) are not read, as there "
                     "are texts beside photos")
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
READERS = (read_flickr8k, read_flickr30k, read_karpathy, read_coco, read_table, read_imagefolder,
           read_texts, read_shards)


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
        ".tsv, .jsonl or .json, metadata.csv or .jsonl (ImageFolder), NAME.jpg with NAME.txt "
        "beside it, and .tar files of these")
