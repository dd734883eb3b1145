"""The dataset of photo-caption pairs, and its batches."""
import collections
import copy
import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from src.utils.captions import (
    MAX_LENGTH,
    SPLIT_FILES,
    Folder,
    cut_text,
    download_command,
    read_folder,
)
from src.utils.console import ProgressLine, first_three
from src.utils.duplicates import flickr_id, near_duplicates
from src.utils.errors import DataError
from src.utils.photo_store import STORE_FOLDER, Pixels, open_photo_store
from src.utils.ragged import Ragged
from src.utils.synthetic import write_synthetic
from src.utils.tokenizers import build_tokenizer

GPU_SHARE = 0.5  # photos stay on the GPU if they take no more than this share of its free memory
TEXT_BUCKET = 16  # a batch's text is as long as a multiple of this: few shapes
WINDOW_BYTES = 8e9  # of photos: more are shuffled in windows of this size, which memory can hold


class Flickr8kImageTextDataset:
    """One split of a dataset folder as photo-caption pairs, each photo decoded once
    (`open_photo_store`).

    folder: a `Folder`, or the path of one. split: "train", "val", "test", or "all" of them.
    `photos` (N, 3, image_size, image_size), uint8 `Rows`, and `names` stand in the split's order;
    `captions` (`Texts`), `texts` (`Ragged` token ids of their first MAX_LENGTH characters, from
    `encode`) and `photo_of_caption` (M,) by photo, those of one in the file's order. image_encoder,
    text_encoder: PretrainedEncoder or None. Of a frozen one `photos` are features, float16 (N, 2,
    width) of the photo and of its mirror image in training, (N, 1, width) in val and test, and
    `text_features` (M, width).

    Raises DataError when a photo is missing, cannot be read or has no captions; with
    `allow_incomplete`, such photos are left out and listed in `skipped`. `cache` keeps the decoded
    photos in files under the folder's root."""

    def __init__(self, folder, split, image_size, tokenizer=None, allow_incomplete=False,
                 cache=True, progress=None, image_encoder=None, text_encoder=None):
        folder = folder if isinstance(folder, Folder) else read_folder(folder)
        self.folders, self.split, self.allow_incomplete = [folder], split, allow_incomplete
        names = folder.names(split)
        self.skipped, self.joined = [], []  # what config.json says of datasets that have joined

        missing = {name for name in names if not folder.path(name).is_file()}
        names = self._without(names, "missing", missing, folder.photo_folder)
        counts = folder.captions_of(names)[1].tolist()
        silent = {name for name, count in zip(names, counts) if not count}
        names = self._without(names, "without captions", silent, folder.source)
        kind = Pixels(image_size)
        if image_encoder is not None and image_encoder.frozen:
            kind = image_encoder.photo_features(1 if split in ("val", "test") else 2)
        store = folder.root / STORE_FOLDER / split if cache else None
        self.photos, self.digests, self.signatures, unreadable = open_photo_store(
            store, names, folder.path, kind, progress)
        self.names = self._without(names, "unreadable", unreadable, folder.photo_folder)

        self.captions, counts = folder.captions_of(self.names)
        self.photo_of_caption = torch.arange(len(self.names)).repeat_interleave(
            torch.from_numpy(counts))
        self.texts = self.text_features = self.tokenize = None
        self.fisher_vectors = None  # of the photos (N, width), see `with_fisher_vectors`
        if text_encoder is not None and text_encoder.frozen:
            self.text_features = text_encoder.text_features(store, self.captions, progress)
        elif text_encoder is not None:
            self.tokenize = text_encoder.prepare
        if tokenizer is not None:
            self.encode(tokenizer)

    def encode(self, tokenizer):
        """Make `texts` of the captions. Raises DataError for one that has no tokens."""
        def ids():
            for i, caption in enumerate(self.captions):
                try:
                    yield tokenizer.encode(cut_text(caption))
                except ValueError as error:
                    name = self.names[self.photo_of_caption[i]]
                    folder = next(folder for folder in self.folders if name in folder.row_of)
                    raise DataError(f"{folder.place_of(name, caption)}: {error}") from None

        self.texts = Ragged.of(ids(), "H")

    def _without(self, names, fault, faulty, place):
        """The names less the faulty ones, {name} or {name: what is wrong}, if that is allowed."""
        if not faulty:
            return names
        found, root = [name for name in names if name in faulty], self.folders[0].root
        if not self.allow_incomplete:
            said = [faulty[name] if isinstance(faulty, dict) else name for name in found]
            mends = ""
            if self.folders[0].layout == "Flickr8k":
                mends = f"`{download_command(root)}` mends it; "
            raise DataError(
                f"{root} is incomplete: {len(found)} of the {len(names)} photos of {self.split} "
                f"are {fault} ({first_three(said)}) in {place}.\n"
                f"{mends}--allow_incomplete trains without them.")
        if len(found) == len(names):
            raise DataError(f"{root}: not one photo of {self.split} is usable")
        self.skipped += found
        return [name for name in names if name not in faulty]

    def hold_out(self, others):
        """Leave out the photos whose files' content is in one of those datasets; where a hash has
        made the splits, near-duplicates too -> how many. Raises DataError where there are any
        and the folder's own lists put them there, unless allow_incomplete."""
        by_hash, root = self.folders[0].by_hash, self.folders[0].root
        copies = self.copies_in(others, near=by_hash)
        twice = [f"{self.names[i]} is {copy}" for i, (copy, _) in copies.items()]
        if twice and not (self.allow_incomplete or by_hash):
            raise DataError(f"{root}: {len(twice)} photos of {self.split} are in another "
                            f"split as well ({first_three(twice)}).\nTake them out of one "
                            f"list; --allow_incomplete leaves them out of {self.split}.")
        self.leave_out(copies)
        return len(copies)

    def copies_in(self, others, near=True):
        """{row: (what of the others it is, how that is known)} of the photos that are in one of
        those datasets, too. near: near-duplicates count."""
        known = {}
        for other in others:
            for name, digest in zip(other.names, other.digests):
                known[digest.tobytes()] = f"{name} of {other.split}", "equal content"
                known.setdefault(flickr_id(name), (f"{name} of {other.split}", "the Flickr number"))
        found = {}
        for i, (name, digest) in enumerate(zip(self.names, self.digests)):
            copy = known.get(digest.tobytes()) or (flickr_id(name) and known.get(flickr_id(name)))
            if copy:
                found[i] = copy
        for other in others if near else ():
            rows = near_duplicates(self.signatures, other.signatures[:])
            for i in np.nonzero(rows >= 0)[0].tolist():
                found.setdefault(i, (f"{other.names[rows[i]]} of {other.split}", "near-duplicates"))
        return found

    def leave_out(self, rows):
        """Without those photos and their pairs. Raises DataError where none is left."""
        if not rows:
            return
        kept = torch.tensor([i for i in range(len(self.names)) if i not in rows])
        if not len(kept):
            raise DataError(f"{self.folders[0].root}: not one photo of {self.split} is usable")
        self.skipped += [self.names[i] for i in sorted(rows)]
        self.names = [self.names[i] for i in kept]
        self.photos, self.signatures = self.photos.choose(kept), self.signatures.choose(kept)
        self.digests = self.digests[kept]
        pairs = torch.isin(self.photo_of_caption, kept).nonzero().flatten()
        self.photo_of_caption = torch.searchsorted(kept, self.photo_of_caption[pairs])
        self.captions = self.captions.take(pairs.numpy())
        if self.texts is not None:
            self.texts = self.texts.take(pairs.numpy())
        if self.text_features is not None:
            self.text_features = self.text_features.choose(pairs)

    def join(self, other):
        """Add the pairs of another dataset, neither being encoded yet."""
        self.photo_of_caption = torch.cat(
            [self.photo_of_caption, other.photo_of_caption + len(self.names)])
        self.names = self.names + other.names
        self.photos = self.photos + other.photos
        self.signatures = self.signatures + other.signatures
        self.digests = np.concatenate([self.digests, other.digests])
        self.captions = self.captions + other.captions
        if self.text_features is not None:
            self.text_features = self.text_features + other.text_features
        self.folders = self.folders + other.folders

    def with_fisher_vectors(self, vectors):
        """-> this dataset with the Fisher vectors (N, width) of its photos."""
        dataset = copy.copy(self)
        dataset.fisher_vectors = vectors
        return dataset

    def first(self, number):
        """-> its first photos and their captions alone, to train with."""
        part = copy.copy(self)
        part.photos = self.photos.choose(np.arange(min(number, len(self.photos))))
        part.photo_of_caption = self.photo_of_caption[self.photo_of_caption < number]
        return part

    def epoch(self, captions_per_image, batch_size, seed):
        """An epoch's pairs by `epoch_batches`, in windows where the photos take more than
        WINDOW_BYTES."""
        shard_of_photo, together = None, 1
        if self.photos.nbytes > WINDOW_BYTES:
            shard_of_photo = torch.from_numpy(self.photos.part_of(np.arange(len(self.photos))))
            shards = int(shard_of_photo.max()) + 1
            together = max(1, int(shards * WINDOW_BYTES / self.photos.nbytes))
        return epoch_batches(self.photo_of_caption, captions_per_image, batch_size, seed,
                             shard_of_photo, together)

    def text_inputs(self, captions, multiple=1):
        """Rows of captions -> the model's inputs: {"text": (B, L), padded to a multiple}, with a
        pretrained text encoder also "text_features", (B, width) or what the encoder takes."""
        captions = np.asarray(captions)
        inputs = {"text": torch.from_numpy(self.texts.padded(captions, multiple))}
        if self.text_features is not None:
            inputs["text_features"] = self.text_features[captions]
        elif self.tokenize is not None:
            inputs["text_features"] = self.tokenize([cut_text(self.captions[i])
                                                     for i in captions])
        return inputs

    def __len__(self):
        return len(self.captions)

    def counts(self):
        """What config.json says of the split; "captions_per_photo" is {captions: photos}."""
        captions = torch.bincount(self.photo_of_caption)
        photos = dict(enumerate(torch.bincount(captions).tolist()))
        form = "pixels" if self.photos.dtype == torch.uint8 else "features"
        return {"photos": len(self.names), form: self.photos.shape[-1], "captions": len(self),
                "skipped": len(self.skipped),
                "captions_per_photo": {str(k): n for k, n in photos.items() if n}}

    def fingerprint(self):
        """Changes with names, order, captions and the content of photo files."""
        content = hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogatepass"))
        content.update(np.ascontiguousarray(self.digests))
        content.update(self.photo_of_caption.numpy())
        self.captions.update_hash(content)
        return content.hexdigest()


def epoch_batches(photo_of_caption, captions_per_image, batch_size, seed, shard_of_photo=None,
                  shards_together=1):
    """One epoch's batches, pairs (steps, batch_size), in an order that follows from the seed.

    The captions of a photo stand side by side in groups of captions_per_image, or of half the batch
    if that is fewer, drawn anew each epoch; a photo with fewer captions gives them all. What fills
    no group, and no batch at the end, sits this epoch out. All batches have batch_size pairs, or
    all that there are; a group that lies across the end of one is divided.

    shard_of_photo: (N,), where photos are more than memory holds. As many shards as are to stand
    together, drawn at random, are then shuffled, and then the next."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(photo_of_caption), generator=generator)
    order = order[torch.argsort(photo_of_caption[order], stable=True)]  # by photo, then shuffled
    together = min(captions_per_image, batch_size // 2)  # a batch of one photo has no negatives
    counts = torch.bincount(photo_of_caption)
    sizes = counts.clamp(max=together)  # of a photo's groups
    groups = torch.where(sizes > 0, counts // sizes.clamp(min=1), 0)
    photo = torch.arange(len(counts)).repeat_interleave(groups)  # of each group
    number = torch.arange(len(photo)) - (groups.cumsum(0) - groups)[photo]  # among its photo's
    first = (counts.cumsum(0) - counts)[photo] + number * sizes[photo]
    shuffled = torch.randperm(len(photo), generator=generator)
    if shard_of_photo is not None:
        drawn = torch.randperm(int(shard_of_photo.max()) + 1, generator=generator)
        window = drawn[shard_of_photo[photo[shuffled]]] // shards_together
        shuffled = shuffled[torch.argsort(window, stable=True)]
    first, size = first[shuffled], sizes[photo[shuffled]]
    ends = size.cumsum(0)
    place = torch.arange(int(ends[-1])) - (ends - size).repeat_interleave(size)
    pairs = order[first.repeat_interleave(size) + place]
    batch_size = min(batch_size, len(pairs))
    return pairs[:len(pairs) // batch_size * batch_size].view(-1, batch_size)


def map_tensors(function, value):
    """The function of a tensor, or of each in a dict, which may hold dicts of them."""
    if isinstance(value, dict):
        return {name: map_tensors(function, part) for name, part in value.items()}
    return function(value)


def place_photos(photos, device):
    """The photos, moved to a GPU if they take no more than GPU_SHARE of its free memory."""
    if device.type == "cuda" and photos.nbytes <= GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
        return photos[:].to(device)
    return photos


def iterate_batches(data, photos, batches, device):
    """Pairs (steps, B) of `epoch_batches` -> batches on the device; for a GPU, the next is
    prepared while one is in use. photos: `data.photos`, or a copy of them. A batch is a dict of
    - "images": uint8 (P, 3, H, W) or features (P, 2, width), a photo being there once for its
      captions
    - "photo_ids": (P,) their rows in `data.photos`
    - "text": (B, L), padded to a multiple of TEXT_BUCKET, and perhaps "text_features", see
      `Flickr8kImageTextDataset.text_inputs`
    - "photo_of_pair": (B,) from 0 to P - 1, rising: the photo of each caption"""
    def prepare(pairs):
        photo_ids, photo_of_pair = torch.unique_consecutive(data.photo_of_caption[pairs],
                                                            return_inverse=True)
        batch = {"photo_ids": photo_ids, "photo_of_pair": photo_of_pair}
        batch |= data.text_inputs(pairs, TEXT_BUCKET)
        if photos.device.type == "cpu":
            batch["images"] = photos[photo_ids]
        if device.type == "cuda":  # the host need not wait for a copy from pinned memory
            with torch.cuda.device(device):  # else pinning in this thread would touch the first GPU
                batch = map_tensors(torch.Tensor.pin_memory, batch)
        batch = map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)
        return batch if "images" in batch else batch | {"images": photos[batch["photo_ids"]]}

    if device.type == "cpu":  # where a thread would take more from the step than a batch costs
        yield from map(prepare, batches)
        return
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for pairs in batches:
            prepared, ahead = ahead, pool.submit(prepare, pairs)
            if prepared:
                yield prepared.result()
        if ahead:
            yield ahead.result()


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


def load_splits(settings, tokenizer=None, image_encoder=None, text_encoder=None):
    """-> {split: dataset}, no photo in two of them, and the tokenizer, made of the training
    captions where none is given."""
    folder, *extra = read_folders(settings)
    line = ProgressLine()

    def load(folder, split, size):
        data = Flickr8kImageTextDataset(
            folder, split, size, None, settings.allow_incomplete,
            progress=line.counter(f"reading {split}"), image_encoder=image_encoder,
            text_encoder=text_encoder)
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
        if data.skipped:
            log.info(f"{split}: {len(data.skipped)} photos left out, such as {data.skipped[0]}")
        # No character has more than four bytes.
        long = [i for i in np.nonzero(data.captions.lengths > MAX_LENGTH)[0]
                if len(data.captions[i]) > MAX_LENGTH]
        if long:
            log.info(f"{split}: {len(long)} captions are cut to {MAX_LENGTH:,} characters")
    return splits, tokenizer


def join_extra(train, extra, held_out):
    """Add to the training split the pairs of another dataset, less the photos that are in val or
    test, however they are known, or in training already."""
    skipped = collections.Counter()
    if extra.skipped:
        skipped["missing, unreadable or without captions"] = len(extra.skipped)
    for others, where, near in ((held_out, "val or test", True), ([train], "training", False)):
        copies = extra.copies_in(others, near)
        skipped.update(f"{how} of a photo in {where}" for _, how in copies.values())
        extra.leave_out(copies)
    folder = extra.folders[0]
    train.join(extra)
    log.info(f"{folder.root}: {len(extra.names):,} photos with {len(extra):,} captions join the "
             "training split" + "".join(f"; {n:,} left out: {why}" for why, n in skipped.items()))
    train.joined.append(
        {"folder": str(folder.root), "layout": folder.layout, "split": extra.split,
         "photos": len(extra.names), "captions": len(extra), "skipped": dict(skipped)})


