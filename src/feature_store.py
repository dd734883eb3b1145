"""Stores of the features of frozen encoders: each photo and each text is encoded once.

The files lie beside those of the photo store. Their names change with the encoder, its precision,
and the photos or the texts."""
import os

import numpy as np
import torch

from src.device import full_memory
from src.utils.errors import DataError, UsageError, first_line
from src.utils.photo_store import (
    STORE_VERSION,
    Pixels,
    Rows,
    decoding_threads,
    delete_other_shards,
    open_shard,
    read_photo,
    store_key,
)

PHOTO_BATCH, TEXT_BATCH = 64, 128
# On a CPU a larger batch takes twice as long per photo: the outputs of the layers become so large
# that the allocator returns them to the system and has to get them again each time.
CPU_PHOTO_BATCH = 4
TOLERANCE = 3.0  # levels of 255, by which a photo's pixels may be rounded or clipped
TEXT_SHARD = 10_000  # texts in each file of a feature store


class PhotoFeatures:
    """The row format of a feature store, see `open_photo_store`.

    A row is float16 (views, width): the features of the photo as it is and, with two views, those
    of its mirror image.
    """

    dtype = np.float16

    def __init__(self, encoder, views):
        self.encoder, self.shape = encoder, (views, encoder.width)
        self.name, self.key = encoder.store_name, views
        self.has_encoded = False  # whether the encoder has worked for any photo

    def rows(self, paths):
        """Yield for each path what `read_photo` returns, with the row in the photo's place. A photo
        that the encoder fails for, or to which it gives NaN, counts as one that cannot be read.

        Raises UsageError for an encoder that fails for all photos."""
        encoder = self.encoder
        on_cpu = encoder.device.type == "cpu"
        size = CPU_PHOTO_BATCH if on_cpu else PHOTO_BATCH

        def read(path):
            # On a CPU the threads only decode. If they prepared photos, too, torch's work in them
            # would take the cores from the encoder.
            def prepare(photo):
                return photo if on_cpu else encoder.prepare_photo(path, photo)

            return read_photo(path, encoder.decode, prepare)

        batches = [paths[i:i + size] for i in range(0, len(paths), size)]
        with decoding_threads() as pool:
            def start_reading(batch):
                return [pool.submit(read, path) for path in batch]

            reading = start_reading(batches[0])
            for batch, next_batch in zip(batches, [*batches[1:], []]):
                results = [future.result() for future in reading]
                reading = start_reading(next_batch)  # they are read while the encoder computes
                if on_cpu:
                    results = [self._prepare(path, *result)
                               for path, result in zip(batch, results)]
                rows = iter(self._encode_each([photo for photo, _, fault in results if not fault]))
                for path, (_, known, fault) in zip(batch, results):
                    row = None
                    if not fault:
                        row, fault = next(rows)
                        fault = fault and f"{path.name}: {fault}"
                    yield row, known, fault

    def _prepare(self, path, photo, known, fault):
        """Replace the photo in what `read_photo` has returned by what the encoder takes."""
        if fault:
            return photo, known, fault
        try:
            return self.encoder.prepare_photo(path, photo), known, None
        except DataError as error:
            return None, None, str(error).removeprefix(f"{path.parent}{os.sep}")

    def _encode_each(self, photos):
        """Return (row, None), or (None, error message), for each of these tensors."""
        if not photos:
            return []
        name = self.encoder.name
        try:
            rows = self.encode(torch.stack(photos))
        except Exception as error:  # other people's code may raise anything
            if full_memory(error):
                raise
            fault = f"{name} fails for it ({first_line(error)})"
            if len(photos) == 1:
                return [(None, fault)]
            results = [self._encode_each([photo])[0] for photo in photos]
            if not self.has_encoded:
                hint = "; try --no-amp" if self.encoder.amp_dtype is not None else ""
                raise UsageError(f"{name} fails ({first_line(error)}){hint}") from None
            return results
        self.has_encoded = True
        fault = f"its features by {name} are NaN or too large for float16"
        return [(row, None) if np.isfinite(row).all() else (None, fault) for row in rows]

    def encode(self, photos):
        """Photos (B, 3, H, W) -> rows (B, views, width)."""
        views = [photos, photos.flip(-1)][:self.shape[0]]
        return np.stack([self.encoder.encode(view) for view in views], 1)

    @staticmethod
    def view(rows):
        return rows


class PreparedPixels:
    """The row format of a store of photos as an encoder takes them, but for its normalisation:
    uint8 (side, side, 3). They are resized and cropped by the encoder's own preprocessing.

    Raises UsageError if that preprocessing ends with anything but the normalisation of each channel
    by constants."""

    dtype = np.uint8

    def __init__(self, encoder):
        self.encoder, self.shape = encoder, (*encoder.pixels, 3)
        self.name = f"pixels_{encoder.preprocessing_hash}"
        self.key = STORE_VERSION
        black, white = encoder.black_and_white()
        self.shift, self.scale = black[0], (white - black)[0] / 255
        inputs = encoder.example_input()
        error = self.to_pixels(inputs) * self.scale + self.shift - inputs
        if not (error.abs() <= TOLERANCE * self.scale.abs()).all():  # also NaN
            raise UsageError(f"--finetune: the preprocessing of {encoder.name} normalises each "
                             "photo by itself, which is not supported; leave --finetune out")

    def to_pixels(self, photos):
        """Photos (..., 3, H, W) as the encoder takes them -> uint8, without the normalisation."""
        return ((photos - self.shift) / self.scale).round().clamp(0, 255).to(torch.uint8)

    def load(self, path):
        """Read a photo file as uint8 (3, H, W). Raises DataError."""
        return self.to_pixels(self.encoder.load(path))

    def rows(self, paths):
        """Yield what `read_photo` returns for each path."""
        encoder = self.encoder

        def read(path):
            return read_photo(path, encoder.decode, lambda photo: self.to_pixels(
                encoder.prepare_photo(path, photo)).permute(1, 2, 0).contiguous().numpy())

        with decoding_threads() as pool:
            yield from pool.map(read, paths)

    view = staticmethod(Pixels.view)


def open_text_store(encoder, store, texts, progress=None):
    """Return the features of texts as `Rows` (N, width), float16.

    store: the path that the names of the store's files begin with, or None to store nothing.
    `progress(done, total, "captions")` is called while texts are encoded. Raises DataError for a
    text that the encoder fails for, or to which it gives NaN.
    """
    shards, paths = [], []
    for start in range(0, len(texts), TEXT_SHARD):
        stop = min(start + TEXT_SHARD, len(texts))
        shard = [texts[i] for i in range(start, stop)]

        def write(file, shard=shard, start=start):
            file.write(encode_shard(encoder, shard, start, len(texts), progress).tobytes())
            return {}

        path = None
        if store is not None:
            number = start // TEXT_SHARD
            path = store.with_name(f"{store.name}_{encoder.store_name}_{number:05d}_"
                                   f"{store_key(shard)}.float16")
        content, _ = open_shard(path, len(shard) * encoder.width * 2, write)
        shards.append(content.view(np.float16).reshape(-1, encoder.width))
        paths.append(path)
    if store is not None:
        delete_other_shards(store.with_name(f"{store.name}_{encoder.store_name}"), paths)
    return Rows(shards)


def encode_shard(encoder, texts, done_before, total, progress):
    """Encode the texts of one shard. Texts of similar length share a batch, which saves padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    features = np.empty((len(texts), encoder.width), np.float16)
    for first in range(0, len(texts), TEXT_BATCH):
        rows = order[first:first + TEXT_BATCH]
        features[rows] = encoder.encode_texts([texts[i] for i in rows])
        if progress:
            progress(done_before + first + len(rows), total, "captions")
    return features
