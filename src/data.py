"""The folders that a run names -> what it trains on and is measured by."""
import collections
import logging

import numpy as np

from src.pretrained import NO_ENCODERS
from src.utils.flickr8k_simple import MAX_LENGTH, Flickr8kImageTextDataset
from src.utils.layouts import SPLIT_FILES, DataError, read_folder
from src.utils.report import ProgressLine
from src.utils.synthetic import write_synthetic
from src.utils.tokenizers import build_tokenizer

log = logging.getLogger("flickr8k_sgd")


def read_folders(settings):
    """--data_dir, made if it is the built-in dataset, and each --extra_data -> [Folder]."""
    if settings.synthetic and write_synthetic(settings.data_dir):
        log.info(f"made the built-in dataset in {settings.data_dir}")
    folders = []
    for root in [settings.data_dir, *settings.extra_data]:
        folders.append(read_folder(root))
        for line in folders[-1].describe():
            log.info(line)
    return folders


def check_folders(settings):
    """--check: what is there, and how many photos are not."""
    for folder in read_folders(settings):
        names = folder.names("all")
        missing = [name for name in names if not folder.path(name).is_file()]
        if missing:
            log.info(f"{len(missing):,} of the {len(names):,} photos are missing in "
                     f"{folder.photo_folder}, such as {missing[0]}")


def load_data(settings, encoders=NO_ENCODERS, tokenizer=None):
    """-> {split: dataset}, no photo in two of them, and the tokenizer, made of the training
    captions where none is given."""
    folder, *extra = read_folders(settings)
    line = ProgressLine()

    def load(folder, split, size):
        data = Flickr8kImageTextDataset(
            folder, split, size, None, settings.allow_incomplete, num_workers=settings.num_workers,
            progress=line.counter(f"reading {split}"), image_encoder=encoders.image,
            text_encoder=encoders.text)
        line.clear()
        return data

    splits = {split: load(folder, split, settings.stored_pixels(split)) for split in SPLIT_FILES}
    val, test, train = splits["val"], splits["test"], splits["train"]
    copies = val.hold_out([test]) + train.hold_out([val, test])
    if copies:
        log.info(f"{copies:,} photos are copies, or nearly so, of photos in a split that comes "
                 "after theirs, and are left out")
    for folder in extra:
        data = load(folder, "all" if settings.extra_all else "train",
                    settings.stored_pixels("train"))
        join_extra(train, data, [val, test])
    if len(train.names) < 2:
        raise DataError(f"{settings.data_dir}: training needs at least two photos")
    tokenizer = tokenizer or build_tokenizer(settings.tokenizer, train.captions)
    for split, data in splits.items():
        data.encode(tokenizer)
        if data.left_out:
            log.info(f"{split}: {len(data.left_out)} photos left out, such as {data.left_out[0]}")
        # No character has more than four bytes.
        long = [i for i in np.nonzero(data.captions.lengths > MAX_LENGTH)[0]
                if len(data.captions[i]) > MAX_LENGTH]
        if long:
            log.info(f"{split}: {len(long)} captions are cut to {MAX_LENGTH:,} characters")
    return splits, tokenizer


def join_extra(train, extra, held_out):
    """Add to the training split the pairs of another dataset, less the photos that are in val or
    test, however they are known, or in training already."""
    left_out = collections.Counter()
    if extra.left_out:
        left_out["missing, unreadable or without captions"] = len(extra.left_out)
    for others, where, near in ((held_out, "val or test", True), ([train], "training", False)):
        copies = extra.copies_in(others, near)
        left_out.update(f"{how} of a photo in {where}" for _, how in copies.values())
        extra.leave_out(copies)
    folder = extra.folders[0]
    train.join(extra)
    log.info(f"{folder.root}: {len(extra.names):,} photos with {len(extra):,} captions join the "
             "training split" + "".join(f"; {n:,} left out: {why}" for why, n in left_out.items()))
    train.joined.append(
        {"folder": str(folder.root), "layout": folder.layout, "split": extra.split,
         "photos": len(extra.names), "captions": len(extra), "left_out": dict(left_out)})
