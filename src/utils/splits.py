"""The splits of a run, read from its dataset folders, with no photo in two of them.

A split is first read as `PairsOfSplit`, its decoded photos and its captions. Photos that are in
another split as well are then left out, and extra data is added. Finally the captions are
tokenized, which makes it a `Flickr8kImageTextDataset`."""
import collections
import logging
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from src.utils.captions import read_folder
from src.utils.console import ProgressLine, counted, first_three
from src.utils.duplicates import flickr_number, has_flickr_form, near_duplicates
from src.utils.errors import DataError
from src.utils.flickr8k_simple import Flickr8kImageTextDataset
from src.utils.folder import MAX_LENGTH, SPLIT_FILES, Folder, download_command
from src.utils.photo_store import (
    STORE_FOLDER,
    Pixels,
    Rows,
    announce_store,
    files_of_store,
    open_photo_store,
)
from src.utils.ragged import Texts
from src.utils.synthetic import write_synthetic
from src.utils.tokenizers import build_tokenizer

log = logging.getLogger("flickr8k_sgd")


@dataclass(frozen=True)
class PairsOfSplit:
    """The photos of a split and their captions, before the captions are tokenized.

    names: of the N photos, in the split's order. photos: `Rows`, pixels or features. digests: the
    SHA-256 of each photo's file. signatures: `Rows`, see `duplicates.py`. captions: M texts, photo
    by photo, and photo_of_caption (M,). text_features: `Rows` (M, width), or None. skipped: names
    of photos that were left out. extra_data: what config.json says about datasets that were
    added."""

    split: str
    folders: list
    names: list
    photos: Rows
    digests: np.ndarray
    signatures: Rows
    captions: Texts
    photo_of_caption: torch.Tensor
    text_features: Rows | None = None
    skipped: list = field(default_factory=list)
    extra_data: list = field(default_factory=list)

    def __len__(self):
        return len(self.captions)

    def without(self, rows):
        """Return these pairs without those of some photos, given by their rows. Raises DataError if
        no photo is left."""
        if not rows:
            return self
        kept = np.array([i for i in range(len(self.names)) if i not in rows], np.int64)
        if not len(kept):
            raise DataError(f"{self.folders[0].root}: no photo of {self.split} is usable, "
                            "because all of them are copies of photos that are in use already")
        photo_of_caption, text_features = self.photo_of_caption.numpy(), self.text_features
        pairs = np.flatnonzero(np.isin(photo_of_caption, kept))
        return replace(
            self, names=[self.names[i] for i in kept], photos=self.photos.choose(kept),
            digests=self.digests[kept], signatures=self.signatures.choose(kept),
            captions=self.captions.take(pairs),
            photo_of_caption=torch.from_numpy(np.searchsorted(kept, photo_of_caption[pairs])),
            text_features=None if text_features is None else text_features.choose(pairs),
            skipped=self.skipped + [self.names[i] for i in sorted(rows)])

    def joined_with(self, other):
        """Return these pairs followed by those of another dataset."""
        text_features = self.text_features
        return replace(
            self, folders=self.folders + other.folders, names=self.names + other.names,
            photos=self.photos + other.photos,
            digests=np.concatenate([self.digests, other.digests]),
            signatures=self.signatures + other.signatures, captions=self.captions + other.captions,
            photo_of_caption=torch.cat(
                [self.photo_of_caption, other.photo_of_caption + len(self.names)]),
            text_features=None if text_features is None else text_features + other.text_features)

    def copies_in(self, others, near=True):
        """Find the photos that are in one of the other `PairsOfSplit` as well.

        near: whether near-duplicates count. Returns {row: (the photo that it is a copy of, how that
        is known)}."""
        by_digest, by_number = {}, collections.defaultdict(list)
        for other in others:
            for row, (name, digest) in enumerate(zip(other.names, other.digests)):
                by_digest[digest.tobytes()] = other, row
                number = flickr_number(name)
                if number is not None:
                    by_number[number].append((other, row))
        copies = {}
        for row, (name, digest) in enumerate(zip(self.names, self.digests)):
            if digest.tobytes() in by_digest:
                other, other_row = by_digest[digest.tobytes()]
                copies[row] = f"{other.names[other_row]} of {other.split}", "equal content"
                continue
            for other, other_row in by_number.get(flickr_number(name), ()):
                if self.is_same_flickr_photo(row, other, other_row):
                    copies[row] = f"{other.names[other_row]} of {other.split}", "the Flickr number"
                    break
        for other in others if near else ():
            rows = near_duplicates(self.signatures, other.signatures[:])
            for row in np.nonzero(rows >= 0)[0].tolist():
                copies.setdefault(
                    row, (f"{other.names[rows[row]]} of {other.split}", "near-duplicates"))
        return copies

    def is_same_flickr_photo(self, row, other, other_row):
        """Whether two photos whose names have the same number are the same photo on Flickr. If both
        names are a bare number, it may be anything, such as a date, so the pictures are
        compared."""
        if has_flickr_form(self.names[row]) or has_flickr_form(other.names[other_row]):
            return True
        return near_duplicates(self.signatures[[row]], other.signatures[[other_row]])[0] == 0


def repair_of(folder, can_download=True, usable=True):
    """Return what to do about an incomplete folder, as the second line of an error message.
    can_download: whether the fault may lie in the files. usable: whether no split would be empty
    without the photos at fault."""
    repairs = []
    if can_download and folder.layout == "Flickr8k":
        repairs.append(f"`{download_command(folder.root)}` repairs it")
    repairs.append("--allow_incomplete trains without them" if usable else
                   "--allow_incomplete cannot help, as a split would be empty")
    return "; ".join(repairs) + "."


def fault_of_captions(folder, names):
    """Return an error message if some captions of these photos are empty, else None."""
    empty = [name for name in names if folder.empty_captions[name]]
    if not empty:
        return None
    count = sum(folder.empty_captions[name] for name in empty)
    return (f"{folder.source}: empty captions ({count:,}, such as one of {empty[0]}).\n"
            + repair_of(folder))


def read_pairs(folder, split, image_size, allow_incomplete=False, cache=True, progress=None,
               image_encoder=None, text_encoder=None):
    """Read a split of a dataset folder as `PairsOfSplit`. Each photo is decoded, or encoded, once.

    folder: a `Folder`, or the path of one. split: "train", "val" or "test", or "all" of them.
    image_size: side of the decoded photos in pixels. cache: whether to keep them in files below the
    folder. progress(done, total): called while photos are read. image_encoder, text_encoder:
    PretrainedEncoder or None. With frozen encoders, `photos` are features, float16 (N, views,
    width), of the photo and, in training, of its mirror image, and `text_features` are (M, width).
    With an image encoder that is trained, `photos` are pixels as it takes them.

    Raises DataError if a photo is missing, unreadable or without captions. With allow_incomplete
    such photos are skipped."""
    folder = folder if isinstance(folder, Folder) else read_folder(folder)
    skipped = []

    def drop_or_raise(names, fault, faulty, place):
        """Return the names without the faulty ones, which are given as a set, or as a dict {name:
        error message}. Raises DataError unless such photos may be skipped."""
        if not faulty:
            return names
        dropped = [name for name in names if name in faulty]
        if not allow_incomplete:
            details = [faulty[name] if isinstance(faulty, dict) else name for name in dropped]
            raise DataError(
                f"{folder.root} is incomplete: {len(dropped)} of the {len(names)} photos of "
                f"{split} are {fault} ({first_three(details)}) in {place}.\n"
                # A photo that an encoder cannot take is not damaged.
                + repair_of(folder, fault != "unreadable" or image_encoder is None,
                            len(dropped) < len(names)))
        if len(dropped) == len(names):
            raise DataError(f"{folder.root}: no photo of {split} is usable")
        skipped.extend(dropped)
        return [name for name in names if name not in faulty]

    names = folder.names(split)
    missing = {name: folder.missing[name] for name in names if name in folder.missing}
    names = drop_or_raise(names, "missing", missing, folder.photo_folder)
    counts = folder.captions_of(names)[1].tolist()
    without_captions = {name for name, count in zip(names, counts) if not count}
    names = drop_or_raise(names, "without captions", without_captions, folder.source)
    fault = fault_of_captions(folder, names)
    if fault and not allow_incomplete:
        raise DataError(fault)
    row_format = Pixels(image_size)
    if image_encoder is not None:
        row_format = image_encoder.row_format(1 if split in ("val", "test") else 2)
    store = folder.root / STORE_FOLDER / split if cache else None
    photos, digests, signatures, unreadable = open_photo_store(
        store, names, folder.path, row_format, progress)
    names = drop_or_raise(names, "unreadable", unreadable, folder.photo_folder)

    captions, counts = folder.captions_of(names)
    photo_of_caption = torch.arange(len(names)).repeat_interleave(torch.from_numpy(counts))
    text_features = None
    if text_encoder is not None and text_encoder.frozen:
        text_features = text_encoder.text_features(store, captions, progress)
    return PairsOfSplit(split, [folder], names, photos, digests, signatures, captions,
                        photo_of_caption, text_features, skipped)


def open_split(folder, split, image_size, tokenizer, allow_incomplete=False, **options):
    """Open one split of a folder as a `Flickr8kImageTextDataset`. For the options see
    `read_pairs`."""
    pairs = read_pairs(folder, split, image_size, allow_incomplete, **options)
    return Flickr8kImageTextDataset(pairs, tokenizer, options.get("text_encoder"))


def read_folders(settings):
    """Read --data_dir and each --extra_data. Return the list of `Folder`.

    With --synthetic, the built-in dataset is written first if it is not there yet."""
    if settings.synthetic and write_synthetic(settings.data_dir):
        log.info(f"made the built-in dataset in {settings.data_dir}")
    folders = []
    for root in [settings.data_dir, *settings.extra_data]:
        folders.append(read_folder(root))
        folders[-1].check_splits()
        for line in folders[-1].describe():
            log.info(line)
    return folders


def check_folders(settings):
    """Log what the folders hold, as the flag --check does.

    Raises DataError if photos that training would read are missing or without captions; with
    --allow_incomplete, only if a split has no other photos."""
    faults = []
    for number, folder in enumerate(read_folders(settings)):
        splits = list(folder.splits)
        if number:  # a folder of --extra_data
            splits = ["all"] if settings.extra_all else ["train"]
        names = [name for split in splits for name in folder.names(split)]
        missing = [folder.missing[name] for name in names if name in folder.missing]
        without = [name for name, count in zip(names, folder.captions_of(names)[1].tolist())
                   if not count and name not in folder.missing]
        unusable = {*folder.missing, *without}
        fault = fault_of_captions(folder, names)
        if fault and not settings.allow_incomplete:
            faults.append(fault)
            without = [name for name in without if not folder.empty_captions[name]]
        found = []
        if missing:
            found.append(f"{folder.root}: {len(missing):,} of the {len(names):,} photos are "
                         f"missing, such as {missing[0]}; they were looked for in "
                         f"{folder.photo_folder} and everywhere below {folder.root}")
        if without:
            found.append(f"{folder.source}: {len(without):,} of the {len(names):,} photos are "
                         f"without captions, such as {without[0]}")
        emptied = [split for split in splits if unusable >= set(folder.names(split))]
        for fault in found:
            if settings.allow_incomplete and not emptied:
                log.info(f"{fault}; --allow_incomplete trains without them")
            elif settings.allow_incomplete:
                faults.append(f"{fault}.\nNo photo of {emptied[0]} is usable.")
            else:
                faults.append(f"{fault}.\n{repair_of(folder, usable=not emptied)}")
    if faults:
        raise DataError("\n".join(faults))


def load_splits(settings, tokenizer=None, image_encoder=None, text_encoder=None, announce=True):
    """Load the splits of a run, so that no photo is in two of them.

    tokenizer: if it is None, one is made from the training captions. image_encoder, text_encoder:
    see `read_pairs`. announce: whether to say where decoded photos are kept. Returns ({split:
    Flickr8kImageTextDataset}, tokenizer). Raises DataError if the data cannot be used as it is."""
    folder, *extra_folders = read_folders(settings)
    line = ProgressLine()

    def load(folder, split, image_size):
        try:
            return read_pairs(
                folder, split, image_size, settings.allow_incomplete,
                progress=line.counter(f"reading {split}"), image_encoder=image_encoder,
                text_encoder=text_encoder)
        finally:
            line.clear()

    files_before = files_of_store(folder.root)
    splits = {split: load(folder, split, settings.stored_pixels(split)) for split in SPLIT_FILES}
    if announce:
        announce_store(folder.root, files_before)
    train, val, test = splits["train"], splits["val"], splits["test"]
    before = len(train.names) + len(val.names)
    val = hold_out(val, [test], settings.allow_incomplete)
    train = hold_out(train, [val, test], settings.allow_incomplete)
    copies = before - len(train.names) - len(val.names)
    if copies:
        are, they = ("is", "it is a copy or near-duplicate") if copies == 1 else (
            "are", "they are copies or near-duplicates")
        log.info(f"{counted(copies, 'photo')} {are} left out, because {they} of photos in a later "
                 "split (the order is train, val, test)")
    for extra_folder in extra_folders:
        split = "all" if settings.extra_all else "train"
        files_before = files_of_store(extra_folder.root)
        extra = load(extra_folder, split, settings.stored_pixels("train"))
        if announce:
            announce_store(extra_folder.root, files_before)
        train = join_extra(train, extra, [val, test])
    if len(train.names) < 2:
        raise DataError(f"{settings.data_dir}: training needs at least two photos")

    tokenizer = tokenizer or build_tokenizer(settings.tokenizer, train.captions)
    datasets = {}
    for split, pairs in {"train": train, "val": val, "test": test}.items():
        datasets[split] = Flickr8kImageTextDataset(pairs, tokenizer, text_encoder)
        if pairs.skipped:
            log.info(f"{split}: {counted(len(pairs.skipped), 'photo')} left out, such as "
                     f"{pairs.skipped[0]}")
    cut = sum(folder.cut_captions for folder in train.folders)
    if cut:
        log.info(f"cut to {MAX_LENGTH:,} characters: {counted(cut, 'caption')}")
    if text_encoder is not None:
        cut = sum(text_encoder.count_cut(data.captions) for data in datasets.values())
        if cut:
            log.info(f"cut to the {text_encoder.max_tokens:,} tokens that {text_encoder.name} "
                     f"reads: {counted(cut, 'caption')}")
    return datasets, tokenizer


def hold_out(pairs, others, allow_incomplete):
    """Return the pairs without the photos that are also in one of the other splits.

    If a hash made the splits, near-duplicates are left out, too. Raises DataError if the lists of
    the folder itself put a photo into two splits, unless allow_incomplete."""
    folder = pairs.folders[0]
    copies = pairs.copies_in(others, near=folder.by_hash)
    if copies and not (allow_incomplete or folder.by_hash):
        examples = [f"{pairs.names[row]} is {copy}" for row, (copy, _) in copies.items()]
        raise DataError(f"{folder.root}: {len(examples)} photos of {pairs.split} are in another "
                        f"split as well ({first_three(examples)}).\nTake them out of one list; "
                        f"--allow_incomplete leaves them out of {pairs.split}.")
    return pairs.without(copies)


def join_extra(train, extra, held_out):
    """Return the training split with the pairs of another dataset added.

    Photos that are in val or test, even if they are only near-duplicates, and photos that the
    training split has already are left out. Raises DataError if no photo remains."""
    folder, skipped = extra.folders[0], collections.Counter()
    if extra.skipped:
        skipped["missing, unreadable or without captions"] = len(extra.skipped)
    for others, place, near in ((held_out, "val or test", True), ([train], "training", False)):
        copies = extra.copies_in(others, near)
        skipped.update(f"{how} of a photo in {place}" for _, how in copies.values())
        reasons = "".join(f"; {number:,} left out: {reason}" for reason, number in skipped.items())
        if len(copies) == len(extra.names):
            raise DataError(f"{folder.root}: no photo of this folder can join the training "
                            f"split{reasons}")
        extra = extra.without(copies)
    join = "joins" if len(extra.names) == 1 else "join"
    log.info(f"{folder.root}: {counted(len(extra.names), 'photo')} with "
             f"{counted(len(extra), 'caption')} {join} the training split{reasons}")
    description = {"folder": str(folder.root), "layout": folder.layout, "split": extra.split,
                   "photos": len(extra.names), "captions": len(extra), "skipped": dict(skipped)}
    train = train.joined_with(extra)
    return replace(train, extra_data=[*train.extra_data, description])
