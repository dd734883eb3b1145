"""Photos decoded once into a store, the dataset of photo-caption pairs, and its batches."""
import contextlib
import hashlib
import io
import json
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from src.utils.layouts import (
    DataError,
    download_command,
    find_caption_file,
    find_photo_folder,
    place_of_caption,
    read_captions,
    read_split,
)

STORE_FOLDER = "photo_store"
STORE_VERSION = 4  # to be raised with any change to what `load_photo` gives
DIGEST_BYTES = 32  # of SHA-256
SECONDS_TO_BUILD = 3600  # a half-written store that old is nobody's any more
GPU_SHARE = 0.5  # photos stay on the GPU if they take no more than this share of its free memory
MAX_LENGTH = 1000  # characters of a text that are read; Flickr8k's longest caption has 199
TEXT_BUCKET = 16  # a batch's text is as long as a multiple of this: few shapes
# Pillow warns of odd tags and of pictures of over 89 megapixels, which are read all the same.
warnings.filterwarnings("ignore", module=r"PIL\.")


def to_8_bits(photo):
    """A grey PIL image of more than 8 bits, or of floats -> of 8. Integers are scaled by as many
    bits as the brightest needs of 8, 10, 12, 14 and 16, for cameras store fewer in 16; floats, and
    integers beyond 16 bits, by their range. Raises ValueError where no pixel is finite."""
    values = np.asarray(photo, np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("not one pixel is a finite number")
    low, high = finite.min(), finite.max()
    if photo.mode != "F" and low >= 0 and high < 2 ** 16:
        low, high = 0, next(2 ** bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2 ** bits)
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-9)
    scaled[values == photo.info.get("transparency", np.nan)] = 1.0  # a PNG's transparent grey
    return Image.fromarray(np.rint(255 * scaled).astype(np.uint8))


def open_photo(path, size):
    """A photo file of any mode Pillow reads -> PIL image, RGB, upright by EXIF, what is transparent
    on white. JPEG is decoded to a smaller scale, no less than size, which is faster. Raises
    DataError with the file's name for one that is missing, empty, truncated or no image."""
    try:
        with Image.open(path) as photo:
            photo.draft("RGB", (size, size))
            ImageOps.exif_transpose(photo, in_place=True)
            if photo.mode in ("I", "F") or photo.mode.startswith("I;"):
                photo = to_8_bits(photo)
            if photo.has_transparency_data:
                photo = photo.convert("RGBA")
                photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
            return photo.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: the file is missing") from None
    except UnidentifiedImageError:
        fault = "not an image" if os.path.getsize(path) else "the file is empty"
        raise DataError(f"{path}: {fault}") from None
    except Exception as error:  # Pillow's decoders raise anything for a damaged file
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path}: {' '.join(reason.split())}") from None


def load_photo(path, size):
    """A photo file -> uint8 array (3, size, size), squeezed to a square, so that no margin is lost.
    Raises DataError as `open_photo` does: no photo becomes a blank one."""
    pixels = torch.from_numpy(np.array(open_photo(path, size))).permute(2, 0, 1)
    # Pillow's own bicubic to within one level of 255, in a sixth of its time.
    return F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0].numpy()


@contextlib.contextmanager
def decoding_threads(number=0):
    """A pool of threads, 0: one a core; Pillow decodes outside Python's lock. What is not begun
    when the block is left, by Ctrl-C for one, is not done."""
    pool = ThreadPoolExecutor(number or os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def store_key(*parts):
    """A short name for what JSON can say, which changes with any of it."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def open_store(store, num_bytes, write):
    """A file that is made once -> its bytes, an array, and what `write(file)`, which makes them,
    gives back: {name: fault}.

    store: path of the file, its name ending in _KEY.SUFFIX, or None. It is moved into place when it
    is whole and opened by memory map, and those of the same name but another key are deleted;
    nothing is kept where there are faults or the folder cannot be written. Raises DataError for a
    full disk."""
    partial = None
    if store is not None:
        if store.is_file() and store.stat().st_size == num_bytes:
            return np.memmap(store, np.uint8, "c"), {}
        try:
            store.parent.mkdir(exist_ok=True)
            partial = store.with_suffix(f".partial{os.getpid()}")
            partial.touch()
        except OSError:
            partial = None
    try:
        with io.BytesIO() if partial is None else open(partial, "w+b") as file:
            faults = write(file)
            if partial is None or faults:
                file.seek(0)
                return np.frombuffer(bytearray(file.read()), np.uint8), faults
            file.flush()
            os.fsync(file.fileno())  # before the name points to the bytes
        name = store.name.rpartition("_")[0]
        for old in store.parent.glob(f"{name}_*"):  # of other files, or a kill's
            if old.suffix == store.suffix or time.time() - old.stat().st_mtime > SECONDS_TO_BUILD:
                old.unlink(missing_ok=True)
        os.replace(partial, store)
    except OSError as error:
        raise DataError(f"{store}: {error.strerror}; the store takes {num_bytes / 1e6:.0f} MB"
                        ) from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
    return open_store(store, num_bytes, write)


def read_photo(path, load):
    """-> (load(path), the SHA-256 of the file, None), or (None, None, what is wrong)."""
    try:
        return load(path), hashlib.sha256(path.read_bytes()).digest(), None
    except DataError as error:
        return None, None, str(error).removeprefix(f"{path.parent}{os.sep}")


class Pixels:
    """What a store keeps of a photo: its pixels, as `load_photo` gives them. Pretrained encoders
    have their own of this kind, for features; see `open_photo_store`."""

    dtype = np.uint8

    def __init__(self, size):
        self.shape, self.name, self.key = (size, size, 3), size, STORE_VERSION

    def rows(self, paths, num_workers):
        """Yields what `read_photo` gives, for each path."""
        def load(path):  # channels last
            return load_photo(path, self.shape[0]).transpose(1, 2, 0)

        with decoding_threads(num_workers) as pool:
            yield from pool.map(lambda path: read_photo(path, load), paths)

    @staticmethod
    def view(rows):
        return rows.permute(0, 3, 1, 2)


def open_photo_store(store, folder, names, kind, num_workers=0, progress=None):
    """Photos of a folder, read once -> what `kind` makes of them, such as uint8 (N, 3, size, size)
    by `Pixels`, their files' digests, and {name: fault} of those that cannot be read, which are
    left out.

    store: folder of the file, rows and then digests, which is kept as `open_store` says, or None;
    any change to the photos' files or to the kind changes its name. num_workers: threads that
    decode, 0 for one a core. `progress(done, total)` is called as photos are read."""
    row_bytes = int(np.prod(kind.shape)) * np.dtype(kind.dtype).itemsize

    def write(file):
        digests, faults = [], {}
        rows = kind.rows([folder / name for name in names], num_workers)
        for done, (name, (row, digest, fault)) in enumerate(zip(names, rows), start=1):
            if fault:
                faults[name] = fault
            else:
                file.write(row.tobytes())
                digests.append(digest)
            if progress:
                progress(done, len(names))
        file.write(b"".join(digests))
        return faults

    if store is not None:
        stats = [(name, (folder / name).stat()) for name in names]
        key = store_key(kind.key, [(name, s.st_size, s.st_mtime_ns) for name, s in stats])
        store = store.with_name(f"{store.name}_{kind.name}_{key}.{np.dtype(kind.dtype).name}")
    content, faults = open_store(store, len(names) * (row_bytes + DIGEST_BYTES), write)
    num_photos = len(content) // (row_bytes + DIGEST_BYTES)
    rows = content[:num_photos * row_bytes].view(kind.dtype).reshape(-1, *kind.shape)
    digests = content[num_photos * row_bytes:].reshape(-1, DIGEST_BYTES)
    return kind.view(torch.from_numpy(rows)), [row.tobytes() for row in digests], faults


def first_three(items):
    """"a, b, c and 9 more" for a message."""
    items = list(items)
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more


class Flickr8kImageTextDataset:
    """One split of Flickr8k as photo-caption pairs, each photo decoded once (`open_photo_store`).

    `photos` (N, 3, image_size, image_size), uint8, and `names` stand in the split file's order;
    `captions` (strings), `texts` (token ids of their first MAX_LENGTH characters) and
    `photo_of_caption` (M,) in the caption file's. image_encoder, text_encoder: PretrainedEncoder or
    None. Of a frozen one `photos` are features, float16 (N, 2, width) of the photo and of its
    mirror image in the training split, (N, 1, width) in the others, and `text_features` (M, width).

    Raises DataError when a photo is missing, cannot be read or has no captions; with
    `allow_incomplete`, such photos are left out and listed in `left_out`. `cache` keeps the decoded
    photos in a file under root_dir."""

    def __init__(self, root_dir, split, image_size, tokenizer, allow_incomplete=False, cache=True,
                 num_workers=0, progress=None, image_encoder=None, text_encoder=None):
        root_dir = Path(root_dir)
        caption_file, names = find_caption_file(root_dir), read_split(root_dir, split)
        captions_of, photo_folder = read_captions(caption_file), find_photo_folder(root_dir, names)
        self.split, self.root_dir, self.allow_incomplete = split, root_dir, allow_incomplete
        self.left_out = []

        missing = {name for name in names if not (photo_folder / name).is_file()}
        names = self._without(names, "missing", missing, photo_folder)
        silent = set(names) - captions_of.keys()
        names = self._without(names, "without captions", silent, caption_file)
        kind = Pixels(image_size)
        if image_encoder is not None and image_encoder.frozen:
            kind = image_encoder.photo_features(2 if split == "train" else 1)
        store = root_dir / STORE_FOLDER / split if cache else None
        self.photos, self.digests, unreadable = open_photo_store(
            store, photo_folder, names, kind, num_workers, progress)
        self.names = self._without(names, "unreadable", unreadable, photo_folder)

        self.captions = [caption for name in self.names for caption in captions_of[name]]
        counts = torch.tensor([len(captions_of[name]) for name in self.names])
        self.photo_of_caption = torch.arange(len(self.names)).repeat_interleave(counts)
        self.texts = []
        for caption, photo in zip(self.captions, self.photo_of_caption.tolist()):
            try:
                self.texts.append(torch.tensor(tokenizer.encode(caption[:MAX_LENGTH])))
            except ValueError as error:
                place = place_of_caption(caption_file, self.names[photo], caption)
                raise DataError(f"{place}: {error}") from None
        self.text_features = self.tokenize = None
        if text_encoder is not None and text_encoder.frozen:
            texts = [caption[:MAX_LENGTH] for caption in self.captions]
            self.text_features = text_encoder.text_features(store, texts, progress)
        elif text_encoder is not None:
            self.tokenize = text_encoder.prepare

    def _without(self, names, fault, faulty, place):
        """The names less the faulty ones, {name} or {name: what is wrong}, if that is allowed."""
        found = [name for name in names if name in faulty]
        if found and not self.allow_incomplete:
            said = [faulty[name] if isinstance(faulty, dict) else name for name in found]
            raise DataError(
                f"{self.root_dir} is incomplete: {len(found)} of the {len(names)} photos of "
                f"{self.split} are {fault} ({first_three(said)}) in {place}.\n"
                f"`{download_command(self.root_dir)}` mends it; --allow_incomplete trains without "
                "them.")
        if len(found) == len(names):
            raise DataError(f"{self.root_dir}: not one photo of {self.split} is usable")
        self.left_out += found
        return [name for name in names if name not in faulty]

    def hold_out(self, others):
        """Leave out the photos whose files' content is in one of those datasets. Raises DataError
        where there are any, unless allow_incomplete."""
        seen = {digest: f"{name} of {other.split}" for other in others
                for digest, name in zip(other.digests, other.names)}
        twice = {name: f"{name} is {seen[digest]}"
                 for name, digest in zip(self.names, self.digests) if digest in seen}
        if not twice:
            return
        if not self.allow_incomplete:
            raise DataError(f"{self.root_dir}: {len(twice)} photos of {self.split} are in another "
                            f"split as well ({first_three(twice.values())}).\nTake them out of one "
                            f"list; --allow_incomplete leaves them out of {self.split}.")
        kept = torch.tensor([i for i, name in enumerate(self.names) if name not in twice])
        self.names = self._without(self.names, "in another split", twice, self.root_dir)
        self.photos, self.digests = self.photos[kept], [self.digests[i] for i in kept]
        pairs = torch.isin(self.photo_of_caption, kept).nonzero().flatten()
        self.photo_of_caption = torch.searchsorted(kept, self.photo_of_caption[pairs])
        self.captions = [self.captions[i] for i in pairs]
        self.texts = [self.texts[i] for i in pairs]
        if self.text_features is not None:
            self.text_features = self.text_features[pairs]

    def text_inputs(self, captions, multiple=1):
        """Rows of captions -> the model's inputs: {"text": (B, L), padded to a multiple}, with a
        pretrained text encoder also "text_features", (B, width) or what the encoder takes."""
        inputs = {"text": pad_texts([self.texts[i] for i in captions], multiple)}
        if self.text_features is not None:
            inputs["text_features"] = self.text_features[captions]
        elif self.tokenize is not None:
            inputs["text_features"] = self.tokenize([self.captions[i][:MAX_LENGTH]
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
                "left_out": len(self.left_out),
                "captions_per_photo": {str(k): n for k, n in photos.items() if n}}

    def fingerprint(self):
        """Changes with names, order, captions and the content of photo files."""
        content = [self.names, [digest.hex() for digest in self.digests], self.captions,
                   self.photo_of_caption.tolist()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def epoch_batches(photo_of_caption, captions_per_image, batch_size, seed):
    """One epoch's batches, a list of lists of pairs, in an order that follows from the seed.

    The captions of a photo stand side by side in groups of captions_per_image, or of half the batch
    if that is fewer, drawn anew each epoch; a photo with fewer captions gives them all. What fills
    no group, and no batch at the end, sits this epoch out. All batches have batch_size pairs, or
    all that there are; a group that lies across the end of one is divided."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(photo_of_caption), generator=generator)
    order = order[torch.argsort(photo_of_caption[order], stable=True)]  # by photo, then shuffled
    together = min(captions_per_image, batch_size // 2)  # a batch of one photo has no negatives
    groups = []
    for captions in order.split(torch.bincount(photo_of_caption).tolist()):
        whole = min(together, len(captions))
        groups += [group for group in captions.split(together) if len(group) == whole]
    shuffled = torch.randperm(len(groups), generator=generator).tolist()
    pairs = torch.cat([groups[i] for i in shuffled])
    batch_size = min(batch_size, len(pairs))
    return [batch.tolist() for batch in pairs.split(batch_size) if len(batch) == batch_size]


def map_tensors(function, value):
    """The function of a tensor, or of each in a dict, which may hold dicts of them."""
    if isinstance(value, dict):
        return {name: map_tensors(function, part) for name, part in value.items()}
    return function(value)


def place_photos(photos, device):
    """The photos, moved to a GPU if they take no more than GPU_SHARE of its free memory."""
    if device.type == "cuda" and photos.nbytes <= GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
        return photos.to(device)
    return photos


def iterate_batches(data, photos, batches, device):
    """Lists of pairs (see `epoch_batches`) -> batches on the device; for a GPU, the next is
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


def pad_texts(texts, multiple=1):
    """List of (L,) -> (B, longest L, rounded up to a multiple), filled up with padding, 0."""
    text = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    return F.pad(text, (0, -text.shape[1] % multiple))
