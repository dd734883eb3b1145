"""A dataset folder: its photos, captions and splits, as a `Folder`.

Which layout a folder has is decided in `captions.py`, and the photos are found by `photo_names.py`.
This module must not import torch."""
import collections
import functools
import hashlib
import itertools
from array import array

import numpy as np

from src.utils.console import shell_command
from src.utils.errors import DataError
from src.utils.photo_names import PhotoFiles, find_copies
from src.utils.ragged import Texts
from src.utils.text_files import read_lines
from src.utils.tokenizers import different_pairs, number_texts

SPLIT_FILES = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
MAX_LENGTH = 1000  # characters of a text that are read; the longest of Flickr8k has 199
MAX_HELD_OUT = 1000  # the most photos that a hash takes for val, and as many for test
SHARED_CAPTIONS = 0.1  # Flickr8k has 0.01, the built-in shapes have 0.05, class names have 1


def cut_text(text):
    """Return the part of a text that is read, which is its first MAX_LENGTH characters."""
    return text[:MAX_LENGTH]


def download_command(root_dir, *flags):
    """Return the command that downloads Flickr8k into a folder, quoted for a shell."""
    return shell_command(["python", "download_flickr8k.py", *flags, "--data_dir", root_dir])


class Folder:
    """The photos, captions and splits of a dataset folder.

    root: its path. layout: the name of its layout. source: the file or folder that the captions
    come from. splits: {"train", "val", "test": [names of photos]}. by_hash: whether some of the
    splits were made by a hash of the photos' names. row_of: {name of a photo: its row}.
    cut_captions: how many captions were longer than MAX_LENGTH and were cut. empty_captions: {name
    of a photo: how many of its captions are empty}. photo_folder: the folder that the photos are
    in. missing: {name of a photo that is not there: how a message describes it}. notes: sentences
    on what was read otherwise than a user may expect, each with a number and an example."""

    def __init__(self, root, layout, source, rows, splits=None, photos=None,
                 notes=None, merge_copies=True):
        """rows: an iterable of rows as the readers in `caption_files.py` yield them. splits: given
        if the layout lists the splits in files of their own. photos: {name: path}; by default the
        folder of the photos is looked for. notes: a list to which the iterable may append sentences
        while its rows are read. merge_copies: whether photos of equal content are read as one photo
        with all their captions, unless their splits differ. Raises DataError if a photo is in two
        splits."""
        self.root, self.layout, self.source = root, layout, source
        self.notes = [] if notes is None else notes
        self.row_of, split_of = {}, []
        owners = array("i")  # the row of each caption's photo
        self.cut_captions = 0
        self.empty_captions = collections.Counter()
        texts, lengths = bytearray(), array("i")
        for name, caption, split in rows:
            row = self.row_of.setdefault(name, len(split_of))
            if row == len(split_of):
                split_of.append(split)
            elif split_of[row] != split:
                raise DataError(f"{source}: {name} is in two splits, {split_of[row]} and {split}")
            if caption == "":
                self.empty_captions[name] += 1
            elif caption is not None:
                owners.append(row)
                self.cut_captions += len(caption) > MAX_LENGTH
                caption = cut_text(caption).encode("utf-8", "surrogatepass")
                texts += caption
                lengths.append(len(caption))
        # The captions are kept photo by photo, those of each photo in the file's order.
        owners, lengths = np.array(owners, np.int32), np.array(lengths, np.int32)
        captions = Texts(np.frombuffer(texts, np.uint8), np.cumsum(lengths) - lengths, lengths)
        self.photos, self.photo_folder, self.missing = photos, root, {}
        if photos is None:
            names = splits.values() if splits else [self.row_of]
            files = PhotoFiles(root, list(itertools.chain(*names)))
            self.photos, self.photo_folder, self.missing = files.others, files.folder, files.missing
            self.notes += files.notes
        else:  # a name in a folder may be a link to a file that is gone
            self.missing = {name: name for name, path in photos.items() if not path.is_file()}
        if merge_copies:
            captions, owners, split_of = self._merge_copies(captions, owners, split_of)
        self.captions = captions.take(np.argsort(owners, kind="stable"))
        self.counts = np.bincount(owners, minlength=len(self.row_of))
        self.first = np.cumsum(self.counts) - self.counts
        self.by_hash = False
        self.splits = self._splits(split_of) if splits is None else splits

    def _merge_copies(self, captions, owners, split_of):
        """Make one photo of those that have equal content and the same split. It has the name of
        the first of them, and each of their captions once.

        captions: M texts. owners: (M,) rows of their photos. split_of: the split of each row.
        Changes row_of, and returns what is left of the three."""
        photos = {name: self.path(name) for name in self.row_of if name not in self.missing}
        copies = find_copies(photos, dict(zip(self.row_of, split_of)))
        # With fewer photos than splits, nothing could be trained; the copies are reported later on.
        if not copies or len(self.row_of) - len(copies) < len(SPLIT_FILES):
            return captions, owners, split_of
        name, first = next(iter(copies.items()))
        self.notes.append(
            f"{len(copies):,} of the {len(self.row_of):,} photos have the same content as another "
            f"one and add their captions to it; for example, {name} is {first}")
        split_of = [split for name, split in zip(self.row_of, split_of) if name not in copies]
        names = list(self.row_of)
        self.row_of = {name: row for row, name in enumerate(
            name for name in names if name not in copies)}
        row_of_owner = np.array([self.row_of[copies.get(name, name)] for name in names])
        owners = row_of_owner[owners]
        merged = {self.row_of[first] for first in copies.values()}
        kept, seen = [], set()
        for i, owner in enumerate(owners.tolist()):
            if owner in merged:
                if (owner, captions[i]) in seen:
                    continue
                seen.add((owner, captions[i]))
            kept.append(i)
        return captions.take(kept), owners[kept], split_of

    def _splits(self, split_of):
        """Sort the photos into splits. split_of: for each row, the name of its split or None. In a
        folder without photos for training, which can only be evaluated, the other splits stay as
        they are, and may be empty."""
        names = {split: [] for split in SPLIT_FILES}
        without_split = []
        for name, split in zip(self.row_of, split_of):
            photos = without_split if split is None else names[split]
            photos.append(name)
        if len(without_split) == len(split_of):
            names["train"] = without_split
        elif without_split:
            raise DataError(f"{self.source}: {len(without_split)} photos are in no split, such as "
                            f"{without_split[0]}")
        missing = [split for split in ("test", "val") if not names[split]]
        if missing and names["train"]:
            self.by_hash = True
            split_by_hash(names, missing)
        return names

    def check_splits(self):
        """Raise DataError if a split is empty."""
        for split, names in self.splits.items():
            if not names:
                raise DataError(f"{self.source}: there are {len(self.row_of)} photos, and none is "
                                f"left for {split}")

    def names(self, split):
        """Return the names of the photos of a split, or those of all splits for "all"."""
        if split != "all":
            return self.splits[split]
        return [name for names in self.splits.values() for name in names]

    def path(self, name):
        """Return where a photo lies, which is a Path, or a TarMember of a shard."""
        photo = self.photos.get(name)
        return self.photo_folder / name if photo is None else photo

    def captions_of(self, names):
        """Return the captions of N photos.

        They come as `Texts`, photo by photo, and with the number of captions of each photo, an
        array (N,). A photo that the folder does not know has no captions."""
        rows = np.array([self.row_of.get(name, -1) for name in names], np.int64)
        counts = np.where(rows < 0, 0, self.counts[rows] if len(self.counts) else 0)
        ends = np.cumsum(counts)
        shifts = np.repeat(self.first[rows] - (ends - counts), counts)
        return self.captions.take(np.arange(len(shifts)) + shifts), counts

    def texts_of(self, name):
        """Return the captions of a photo as a list of strings."""
        return list(self.captions_of([name])[0])

    def place_of(self, name, caption):
        """Describe where a caption stands, for a message: "captions.txt, line 12, photo.jpg". The
        line is omitted for a caption of several lines, and for a file that has no lines."""
        if self.source.is_file() and self.source.suffix.lower() in (
                ".txt", ".token", ".csv", ".tsv"):
            for number, line in enumerate(read_lines(self.source), start=1):
                if name in line and caption in line:
                    return f"{self.source}, line {number}, {name}"
        return f"{self.source}, {name}"

    @functools.cached_property
    def different_captions(self):
        """How many captions differ, if photos share captions, as class names are shared. It is None
        if at most SHARED_CAPTIONS of them are also those of another photo, which happens by chance.
        """
        numbers = number_texts(self.captions)
        photo_of_caption = np.repeat(np.arange(len(self.counts)), self.counts)
        _, texts = different_pairs(photo_of_caption, numbers)
        photos_with_text = np.bincount(texts)[1:]
        shared = photos_with_text[photos_with_text > 1].sum()
        return len(photos_with_text) if shared > SHARED_CAPTIONS * len(texts) else None

    def describe(self):
        """Return the lines that a run logs about the folder, which are two and the notes."""
        counts = {split: int(self.captions_of(names)[1].sum())
                  for split, names in self.splits.items()}
        parts = [f"{split} {len(names):,} photos, {counts[split]:,} captions"
                 for split, names in self.splits.items()]
        shared = []
        if self.different_captions is not None:
            shared = [f"photos share captions, {self.different_captions:,} different ones for "
                      f"{len(self.names('all')):,} photos: a caption is right for every photo that "
                      "has it"]
        empty = []
        if self.empty_captions:
            empty = [f"empty captions ({self.empty_captions.total():,}, such as one of "
                     f"{next(iter(self.empty_captions))}) are left out"]
        by_hash = " (split by a hash of the photos' names)" if self.by_hash else ""
        return [f"{self.root}: layout of {self.layout}, {len(self.names('all')):,} photos, "
                f"{sum(counts.values()):,} captions", "; ".join(parts) + by_hash,
                *self.notes, *empty, *shared]


def split_by_hash(names, missing):
    """Take photos for the missing ones of val and test, by a hash of the photos' names, so that
    everybody who has these photos gets the same splits.

    names: {split: [names of photos]}, which is changed in place. missing: ["test"], ["val"] or both
    of them. If both are missing, each gets a tenth of the training photos, but at least one and at
    most MAX_HELD_OUT. If one is missing, it gets half of the other."""
    if len(missing) == 2:
        source, share, most = "train", 10, MAX_HELD_OUT
    else:
        source, share = "test" if missing == ["val"] else "val", 2
        most = len(names[source])
    order = sorted(names[source], key=lambda name: hashlib.sha256(
        name.encode("utf-8", "surrogatepass")).digest())  # a file's name may be no valid text
    number = min(max(len(order) // share, 1), most)
    for split in missing:
        taken, order = set(order[:number]), order[number:]
        names[split] = [name for name in names[source] if name in taken]
        names[source] = [name for name in names[source] if name not in taken]
