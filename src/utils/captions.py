"""A folder of photos and captions, in whichever layout -> its photos, captions and splits, as a
`Folder`. `read_folder` takes the first of these layouts that it finds:

    Flickr8k     Flickr8k.token.txt, or Kaggle's captions.txt (CSV: image,caption), with
                 Flickr_8k.{train,dev,test}Images.txt; all at the root or in Flickr8k_text/
    Flickr30k    results_20130124.token, or Kaggle's results.csv (image_name| comment_number|
                 comment)
    Karpathy's   dataset_flickr8k.json, dataset_flickr30k.json or dataset_coco.json
    COCO         annotations/captions_train2014.json, captions_val2014.json, or those of 2017
    a table      captions.csv, .tsv, .txt or .jsonl with columns image and caption, perhaps split
    texts        NAME.jpg with NAME.txt beside it, one caption per line, in the folder or below it
    shards       .tar files of NAME.jpg and NAME.txt, as img2dataset writes them

The photos are looked for below the folder, below one of PHOTO_FOLDERS in it (upper or lower case),
or below one such folder in another. The files themselves are read by `caption_files.py`."""
import collections
import hashlib
import shlex
from array import array
from pathlib import Path

import numpy as np

from src.utils.caption_files import (
    bar_rows,
    coco_rows,
    karpathy_rows,
    read_archives,
    read_lines,
    table_rows,
    text_rows,
    texts_beside,
    token_rows,
)
from src.utils.errors import DataError
from src.utils.ragged import Texts

SPLIT_FILES = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
CAPTION_FILES = ("Flickr8k.token.txt", "captions.txt")
FLICKR30K_FILES = ("results_20130124.token", "results.csv")
KARPATHY_FILES = ("dataset_flickr8k.json", "dataset_flickr30k.json", "dataset_coco.json")
TABLES = ("captions.csv", "captions.tsv", "captions.jsonl", "captions.txt")
PHOTO_FOLDERS = ("Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k-images", "flickr30k_images",
                 "Images")
TEXT_FOLDERS = ("", "Flickr8k_text", "flickr30k_images")
MAX_LENGTH = 1000  # characters of a text that are read; the longest of Flickr8k has 199
MAX_HELD_OUT = 1000  # the most photos that a hash takes for val, and as many for test
SAMPLE = 1000  # photos that are looked for in order to find their folder


def cut_text(text):
    """The part of a text that is read: its first MAX_LENGTH characters."""
    return text[:MAX_LENGTH]


def download_command(root_dir, *flags):
    """The command that fetches Flickr8k into a folder, as the user may paste it."""
    return shlex.join(["python", "download_flickr8k.py", *flags, "--data_dir", str(root_dir)])


class Folder:
    """The photos, captions and splits of a folder.

    root: Path. layout: its name. source: the file that the captions came from. splits: {"train",
    "val", "test": [names of photos]}. by_hash: whether a hash of the names made some of the splits.
    cut_captions: how many captions were longer than MAX_LENGTH and have been cut."""

    def __init__(self, root, layout, source, rows, splits=None, photos=None):
        """rows: an iterable of (name of a photo, caption, split). The caption is None in a row that
        only names a photo, the split if the layout has none. splits: given if the layout lists
        them in files of their own. photos: {name: path}; by default they are looked for. Raises
        DataError for a photo in two splits, and for splits that would be empty."""
        self.root, self.layout, self.source = root, layout, source
        self.row_of, split_of = {}, []
        owners = array("i")  # the row of each caption's photo
        self.cut_captions = 0
        texts, lengths = bytearray(), array("i")
        for name, caption, split in rows:
            row = self.row_of.setdefault(name, len(split_of))
            if row == len(split_of):
                split_of.append(split)
            elif split_of[row] != split:
                raise DataError(f"{source}: {name} is in two splits, {split_of[row]} and {split}")
            if caption is not None:
                owners.append(row)
                self.cut_captions += len(caption) > MAX_LENGTH
                caption = cut_text(caption).encode("utf-8", "surrogatepass")
                texts += caption
                lengths.append(len(caption))
        # The captions are kept photo by photo, those of each photo in the file's order.
        owners, lengths = np.array(owners, np.int32), np.array(lengths, np.int32)
        captions = Texts(np.frombuffer(texts, np.uint8), np.cumsum(lengths) - lengths, lengths)
        self.captions = captions.take(np.argsort(owners, kind="stable"))
        self.counts = np.bincount(owners, minlength=len(self.row_of))
        self.first = np.cumsum(self.counts) - self.counts
        self.by_hash = False
        self.splits = self._splits(split_of) if splits is None else splits
        self.photos, self.photo_folder = photos, root
        if photos is None:
            names = self.names("all")
            self.photo_folder = find_photo_folder(root, names[::len(names) // SAMPLE + 1])

    def _splits(self, split_of):
        names = {split: [] for split in SPLIT_FILES}
        rest = []
        for name, split in zip(self.row_of, split_of):
            (rest if split is None else names[split]).append(name)
        if len(rest) == len(split_of):
            names["train"] = rest
        elif rest:
            raise DataError(f"{self.source}: {len(rest)} photos are in no split, such as {rest[0]}")
        held_out = sorted({"val", "test"} - {split for split in names if names[split]})
        # Without val and test, each gets a tenth of the training photos. If one of them is missing,
        # it gets half of the other.
        if held_out:
            self.by_hash, share, source = True, 10, "train"
            if len(held_out) == 1:
                share, source = 2, "test" if held_out == ["val"] else "val"
            most = MAX_HELD_OUT if source == "train" else len(split_of)
            order = sorted(names[source], key=lambda name: hashlib.sha256(name.encode()).digest())
            number = min(len(order) // share or 1, most)
            for split in held_out:
                taken, order = set(order[:number]), order[number:]
                names[split] = [name for name in names[source] if name in taken]
                names[source] = [name for name in names[source] if name not in taken]
        for split in names:
            if not names[split]:
                raise DataError(f"{self.source}: there are {len(split_of)} photos, and none is "
                                f"left for {split}")
        return names

    def names(self, split):
        """The names of the photos of a split, or of "all" splits."""
        if split != "all":
            return self.splits[split]
        return [name for names in self.splits.values() for name in names]

    def path(self, name):
        """Where a photo lies: a Path, or a TarMember of a shard."""
        return self.photo_folder / name if self.photos is None else self.photos[name]

    def captions_of(self, names):
        """-> (the captions of these photos as Texts, photo by photo; the number of captions of each
        photo (N,)). A photo that the folder does not know has none."""
        rows = np.array([self.row_of.get(name, -1) for name in names], np.int64)
        counts = np.where(rows < 0, 0, self.counts[rows] if len(self.counts) else 0)
        ends = np.cumsum(counts)
        shift = np.repeat(self.first[rows] - (ends - counts), counts)
        return self.captions.take(np.arange(len(shift)) + shift), counts

    def texts_of(self, name):
        """The captions of a photo, a list of strings."""
        return list(self.captions_of([name])[0])

    def place_of(self, name, caption):
        """Where a caption stands, for a message, as in "captions.txt, line 12, photo.jpg". The line
        is left out for a caption of several lines, and for files that do not consist of lines."""
        if self.source.is_file() and self.source.suffix in (".txt", ".token", ".csv", ".tsv"):
            for number, line in enumerate(read_lines(self.source), start=1):
                if name in line and caption in line:
                    return f"{self.source}, line {number}, {name}"
        return f"{self.source}, {name}"

    def describe(self):
        """The two lines that a run begins with."""
        counts = {split: int(self.captions_of(names)[1].sum())
                  for split, names in self.splits.items()}
        parts = [f"{split} {len(names):,} photos, {counts[split]:,} captions"
                 for split, names in self.splits.items()]
        by_hash = " (split by a hash of the photos' names)" if self.by_hash else ""
        return [f"{self.root}: layout of {self.layout}, {len(self.names('all')):,} photos, "
                f"{sum(counts.values()):,} captions", "; ".join(parts) + by_hash]


def find_photo_folder(root, names):
    """The folder, root or one of PHOTO_FOLDERS, that holds most of the photos of these names."""
    order = [name.lower() for name in PHOTO_FOLDERS]

    def folders_in(folder):
        found = [path for path in folder.iterdir() if path.name.lower() in order and path.is_dir()]
        return sorted(found, key=lambda path: order.index(path.name.lower()))

    folders = folders_in(root)
    folders += [inner for folder in folders for inner in folders_in(folder)]
    # If no photo is found, this is the first of PHOTO_FOLDERS, which is what a message should name.
    return max([*folders, root],
               key=lambda folder: sum((folder / name).is_file() for name in names))


def find_text_file(root, names):
    """The path of the first of these files that is in one of TEXT_FOLDERS, or None."""
    for name in names:
        for folder in TEXT_FOLDERS:
            if (root / folder / name).is_file():
                return root / folder / name
    return None


def read_split(root_dir, split):
    """The names of the photos of Flickr8k's "train", "val" or "test", in the order of its file. A
    name may contain a folder, as in sub/photo.jpg. Raises DataError if the file is missing, empty
    or lists a photo twice."""
    path = find_text_file(Path(root_dir), [SPLIT_FILES[split]])
    if path is None:
        raise DataError(f"{root_dir}: {SPLIT_FILES[split]} is missing. "
                        f"`{download_command(root_dir, '--text_only')}` (2 MB) fetches it.")
    names = [line.strip() for line in read_lines(path) if line.strip()]
    if not names:
        raise DataError(f"{path}: lists no photos")
    name, count = collections.Counter(names).most_common(1)[0]
    if count > 1:
        raise DataError(f"{path}: lists {name} twice")
    return names


def read_flickr8k(root):
    source = find_text_file(root, CAPTION_FILES)
    if source is None:
        return None
    rows = token_rows(source)
    if source.name == CAPTION_FILES[1]:
        first = next(read_lines(source), "").strip().lower().replace(" ", "")
        if first != "image,caption":  # a table of something else
            return None
        rows = table_rows(source)
    splits = {split: read_split(root, split) for split in SPLIT_FILES}
    return Folder(root, "Flickr8k", source, rows, splits)


def read_flickr30k(root):
    source = find_text_file(root, FLICKR30K_FILES)
    if source is None:
        return None
    rows = bar_rows(source) if source.suffix == ".csv" else token_rows(source)
    return Folder(root, "Flickr30k", source, rows)


def read_karpathy(root):
    source = find_text_file(root, KARPATHY_FILES)
    if source is None:
        return None
    name = {"flickr8k": "Flickr8k", "flickr30k": "Flickr30k", "coco": "COCO"}
    return Folder(root, f"{name[source.stem.removeprefix('dataset_')]}, Karpathy's splits", source,
                  karpathy_rows(source))


def read_coco(root):
    for year in ("2014", "2017"):
        paths = {split: root / "annotations" / f"captions_{split}{year}.json"
                 for split in ("train", "val")}
        paths = {split: path for split, path in paths.items() if path.is_file()}
        if paths:
            return Folder(root, f"COCO {year}", next(iter(paths.values())), coco_rows(paths))
    return None


def read_table(root):
    for name in TABLES:
        if (root / name).is_file():
            return Folder(root, "a table of captions", root / name, table_rows(root / name))
    return None


def read_texts(root):
    texts = texts_beside(root)
    if not texts:
        return None
    rows = (row for name, path in texts.items() for row in text_rows(path.read_bytes(), name, path))
    return Folder(root, "texts beside photos", root, rows)


def read_shards(root):
    archives = sorted(root.rglob("*.tar"))
    if not archives:
        return None
    photos = {}
    return Folder(root, "shards of img2dataset", root, read_archives(archives, root, photos),
                  photos=photos)


READERS = (read_flickr8k, read_flickr30k, read_karpathy, read_coco, read_table, read_texts,
           read_shards)


def read_folder(root_dir):
    """Read a folder in whichever layout -> `Folder`. Raises DataError for a folder that does not
    exist, that has no known layout, or whose files do not fit their layout."""
    root = Path(root_dir)
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder. To fetch Flickr8k: "
                        f"{download_command(root)}\n"
                        "To train on the built-in shapes: python train_flickr8k_sgd.py --synthetic")
    for read in READERS:
        folder = read(root)
        if folder is not None:
            return folder
    raise DataError(
        f"{root}: holds no captions in a known layout. Looked for {' or '.join(CAPTION_FILES)} "
        f"(Flickr8k), {' or '.join(FLICKR30K_FILES)} (Flickr30k), {', '.join(KARPATHY_FILES)} "
        "(Karpathy's), annotations/captions_train2014.json (COCO; 2017 alike), captions.csv, .tsv "
        "or .jsonl, NAME.jpg with NAME.txt beside it, and .tar files of these")
