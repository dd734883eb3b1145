"""A gallery of photos that is searched: its embeddings, which are kept, and the scores of a query.
"""
import contextlib
import functools
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from src.bank import BETA, NEIGHBOUR_WEIGHT, NEIGHBOURS
from src.device import find_device
from src.embedding_cache import PHOTOS, TEXTS, CachedEmbeddings, CacheFile, photo_item
from src.encoder_sources import load_encoders
from src.encoders import ContrastivePair
from src.model import combine_photo_and_text
from src.ranking import similarities
from src.runs import BEST
from src.search import (
    bank_of,
    embed_photo_batches,
    embed_photos,
    embed_text_batches,
    embed_texts,
    load_best,
    load_model,
)
from src.settings import make_settings
from src.utils.captions import read_folder
from src.utils.console import counted
from src.utils.errors import DataError, UsageError
from src.utils.folder import Folder
from src.utils.photo_store import STORE_VERSION, store_key
from src.utils.tokenizers import number_texts

CACHE = "embeddings_flickr8k.sqlite3"
TYPICAL = 100  # photos and texts whose hubness is taken for that of all
# What else the rows of a cache depend on, beside the weights.
METHOD = f"{STORE_VERSION} {BETA} {NEIGHBOURS} {NEIGHBOUR_WEIGHT}"


def cache_of_run(run_dir, device=None):
    """The EmbeddingCache of a run's best model, in the folder of the run. Raises UsageError as
    `load_model` does."""
    checkpoint = load_best(run_dir)
    model, tokenizer, transform = load_model(run_dir, device, checkpoint)
    with open(Path(run_dir) / BEST, "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return EmbeddingCache(model, tokenizer, transform, bank_of(checkpoint), Path(run_dir) / CACHE,
                          weights)


def cache_of_pair(image_encoder, text_encoder, device=None):
    """The EmbeddingCache of the two encoders of a contrastive model such as CLIP, which search
    without any training. It lies in the cache folder of the user. Raises UsageError for encoders
    that are unavailable or do not embed photos and texts in the same space."""
    device = find_device(device)
    settings = make_settings(image_encoder=image_encoder, text_encoder=text_encoder, amp=False)
    encoders = load_encoders(settings, device)
    image, text = encoders.image, encoders.text
    user_says_so = ".py:" in image_encoder or ".py:" in text_encoder
    if not encoders.is_contrastive_pair and not (user_says_so and image.width == text.width):
        raise UsageError(
            f"{image_encoder} and {text_encoder} are not the two halves of one contrastive model "
            "such as CLIP, so that their features cannot be compared. To learn how they fit: "
            "python train_flickr8k_sgd.py --image_encoder ... --text_encoder ...")
    weights = store_key(image.key, text.key)
    folder = cache_folder()
    with contextlib.suppress(OSError):  # a search works without a cache
        folder.mkdir(parents=True, exist_ok=True)
    pair = ContrastivePair(image, text, encoders.are_two_halves or not encoders.is_contrastive_pair)
    return EmbeddingCache(pair.to(device), None, image.load, None, folder / f"{weights}.sqlite3",
                          weights)


def cache_folder():
    """The folder for what is kept of searches without a run. Raises UsageError if the user has no
    home."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The standard of this variable says that relative paths are to be ignored.
    if not os.path.isabs(home):
        try:
            home = Path.home() / ".cache"
        except RuntimeError:
            raise UsageError("this user has no home folder; set XDG_CACHE_HOME to a folder where "
                             "embeddings can be kept") from None
    return Path(home) / "flickr8k_sgd"


class EmbeddingCache:
    """The embeddings of photos and texts by a model. Each is computed once and kept in a file,
    together with the rows of the galleries of a `Bank`.

    A photo file that changes is embedded again, and other weights start with an empty cache. Only
    one thread may use it at a time.

    model, tokenizer, transform: see `load_model`; the tokenizer is None for a model that only takes
    texts as its pretrained encoder does. bank: a Bank, or None. path: the file, which need not
    exist. weights: a string that identifies the model's weights."""

    def __init__(self, model, tokenizer, transform, bank, path, weights):
        self.model, self.tokenizer, self.transform = model, tokenizer, transform
        self.bank = bank
        self.items = {}  # {path: its item in the cache} of the photos that were asked for
        self.is_tidy = False  # whether the photos that are gone were deleted from the file
        self.file = CacheFile(path, f"{weights} {METHOD}")
        photo_gallery = text_gallery = None
        if bank is not None:
            photo_gallery, text_gallery = bank.photo_gallery, bank.text_gallery
        self.photo_rows = CachedEmbeddings(self.file, PHOTOS, photo_gallery)
        self.text_rows = CachedEmbeddings(self.file, TEXTS, text_gallery)

    def knows(self, text):
        """Whether the model can read anything of a text."""
        return bool(text.strip()) if self.tokenizer is None else self.tokenizer.knows(text)

    def photos(self, paths, progress=None, unreadable=None):
        """The embeddings (N, D) of photos, without those that are added to `unreadable`, see
        `embed_photo_batches`. Every batch is kept as soon as it is embedded, so that nothing is
        lost if the program is interrupted. progress(done, total) is called after each batch. Raises
        DataError if not one photo can be read."""
        paths = [Path(path) if isinstance(path, str) else path for path in paths]
        real_folder = functools.cache(os.path.realpath)
        for path in paths:
            self._look_at(path, real_folder, unreadable)
        readable = [path for path in paths if path in self.items]
        missing = set(self.photo_rows.missing([self.items[path] for path in readable]))
        new = [path for path in dict.fromkeys(readable) if self.items[path] in missing]
        done = 0
        for batch, embeddings in embed_photo_batches(
                self.model, self.transform, new, unreadable=unreadable):
            self.photo_rows.add([self.items[path] for path in batch], embeddings)
            done += len(batch)
            if progress:
                progress(done, len(new))
        if not self.is_tidy:  # not for every few photos that are added, as it looks at all
            self.file.delete_missing_photos({self.items[path][0] for path in readable})
            self.is_tidy = True
        embedded = [path for path in readable if path not in (unreadable or {})]
        if not embedded:
            raise DataError(f"not one of {len(paths):,} photos can be read: "
                            f"{next(iter(unreadable.values()))}")
        return self.photo_rows.embeddings([self.items[path] for path in embedded])

    def _look_at(self, path, real_folder, unreadable):
        """Find the key and the version of a photo file, which identify it in the cache."""
        try:
            self.items[path] = photo_item(path, real_folder)
        except OSError as error:
            message = f"{path}: {error.strerror}"
            if unreadable is None:
                raise DataError(message) from None
            unreadable[path] = message
            self.items.pop(path, None)

    def photo_gallery(self, paths):
        """The bank's gallery rows (N, D + 1) of photos whose embeddings `photos` has returned."""
        return self.photo_rows.gallery([self.items[path] for path in paths])

    def is_current(self, path):
        """Whether the file of a photo that `photos` has embedded is still there and unchanged."""
        try:
            return self.items[path] == photo_item(path)
        except OSError:
            return False

    def photo_version(self, path):
        """A short string that changes with the file of a photo that `photos` has embedded."""
        return hashlib.sha256(repr(self.items[path]).encode()).hexdigest()[:8]

    def texts(self, texts, progress=None):
        """The embeddings (N, D) of texts, see `embed_texts`. Every batch is kept as soon as it is
        embedded, and progress(done, total) is called after it."""
        items = [(text, "") for text in texts]
        missing = self.text_rows.missing(items)
        new, done = [text for text, _ in missing], 0
        for rows, embeddings in embed_text_batches(self.model, self.tokenizer, new):
            self.text_rows.add([missing[row] for row in rows], embeddings)
            done += len(rows)
            if progress:
                progress(done, len(new))
        return self.text_rows.embeddings(items)

    def text_gallery(self, texts):
        """The bank's gallery rows (N, D + 1) of texts whose embeddings `texts` has returned."""
        return self.text_rows.gallery([(text, "") for text in texts])


class Search:
    """A gallery of N photos and their M captions, which is searched by texts, by photos, or by a
    photo and a text together.

    cache: an `EmbeddingCache`. photos: their paths. captions: the list of each photo's captions,
    which may be empty. use_bank: whether to rank with the run's bank. photo_embeddings: (N, D),
    available after a call of `embed_photos`."""

    def __init__(self, cache, photos, captions, use_bank):
        self.cache = cache
        self.bank = cache.bank if use_bank else None
        self.photo_embeddings = None
        self.photo_gallery = None
        self._set_gallery(photos, captions)

    def _set_gallery(self, photos, captions):
        self.photos, self.captions = photos, captions
        self.texts = [text for texts in captions for text in texts]
        self.photo_of_text = [i for i, texts in enumerate(captions) for _ in texts]

    def different_texts(self, photo=-1):
        """The rows of the different texts, where photos share captions: of equal texts that of
        `photo`, given by its row, and else the first."""
        order = np.argsort(np.array(self.photo_of_text) != photo, kind="stable")
        numbers = number_texts(self.texts)[order]
        return np.sort(order[np.unique(numbers, return_index=True)[1]]).tolist()

    def embed_photos(self, progress=None, unreadable=None):
        """Embed the photos. Those that are added to `unreadable`, see `EmbeddingCache.photos`,
        leave the gallery."""
        self.photo_embeddings = self.cache.photos(self.photos, progress, unreadable)
        if unreadable:
            kept = [i for i, photo in enumerate(self.photos) if photo not in unreadable]
            self._set_gallery([self.photos[i] for i in kept], [self.captions[i] for i in kept])
        if self.bank is not None:
            self.photo_gallery = self.cache.photo_gallery(self.photos)

    def add_photos(self, photos, unreadable):
        """Embed more photos, without captions, and append them to the gallery, so that those which
        are there keep their numbers. unreadable: see `EmbeddingCache.photos`."""
        if not photos:
            return
        with contextlib.suppress(DataError):  # not one of them can be read
            embeddings = self.cache.photos(photos, unreadable=unreadable)
            photos = [photo for photo in photos if photo not in unreadable]
            self.photo_embeddings = torch.cat([self.photo_embeddings, embeddings])
            if self.bank is not None:
                gallery = self.cache.photo_gallery(photos)
                self.photo_gallery = torch.cat([self.photo_gallery, gallery])
            self.captions = self.captions + [[] for _ in photos]
            self.photos = self.photos + photos

    def embed_captions(self, progress=None):
        """Embed the captions, if there are any, now and not as soon as they are needed. progress:
        see `EmbeddingCache.texts`."""
        if self.texts:
            self.cache.texts(self.texts, progress)

    @functools.cached_property
    def text_embeddings(self):
        return self.cache.texts(self.texts)

    @functools.cached_property
    def text_gallery(self):
        self.cache.texts(self.texts)
        return self.cache.text_gallery(self.texts)

    @functools.cached_property
    def typical_hubness(self):
        """The mean hubness of some photos and of some texts of the bank. These constants are added
        to its scores, which would otherwise be far from cosines, and mostly negative."""
        photos, texts = (self.bank.photos[:TYPICAL], self.bank.texts[:TYPICAL])
        galleries = self.bank.photo_gallery(photos), self.bank.text_gallery(texts)
        return [-gallery[:, -1].mean().item() for gallery in galleries]

    def embed_texts(self, texts, photo=None):
        """Embed texts that are not kept in the cache -> (Q, D). photo: the embedding (1, D) of a
        photo, with which each text is combined."""
        embeddings = embed_texts(self.cache.model, self.cache.tokenizer, texts)
        if photo is None:
            return embeddings
        return F.normalize(combine_photo_and_text(photo, embeddings), dim=-1)

    def embed_photo(self, path):
        """Embed a photo that is not kept in the cache -> (1, D)."""
        return embed_photos(self.cache.model, self.cache.transform, [path])

    def score_photos(self, queries):
        """The scores of the photos for embeddings (Q, D) of texts -> (Q, N), see `score_meaning`.
        """
        if self.bank is None:
            return similarities(queries, self.photo_embeddings)
        return (similarities(self.bank.text_queries(queries), self.photo_gallery)
                + self.typical_hubness[0])

    def score_meaning(self):
        """What the scores of `score_photos` are, as a short text to be shown."""
        if self.bank is None:
            return "cosine of the words and the photo"
        return "cosine of the words and the photo, lower for a photo that is near to any words"

    def fits(self, text):
        """Whether the model has learned anything like a text, given by its embedding (1, D). If
        not, no photo fits it. None without the bank of a run, which tells."""
        return None if self.cache.bank is None else self.cache.bank.is_familiar(text)

    def similar_photos(self, photo):
        """The cosines (N,) of the photos with the embedding (1, D) of a photo, by which they are
        ranked for it. The bank ranks photos for texts, not for another photo."""
        return similarities(photo, self.photo_embeddings)[0]

    def knows(self, text):
        """Whether the model can read anything of a text."""
        return self.cache.knows(text)

    def score_captions(self, queries):
        """What to rank the captions by for embeddings (Q, D) of photos -> (Q, M), as in
        `score_photos`."""
        if self.bank is None:
            return similarities(queries, self.text_embeddings)
        return (similarities(self.bank.photo_queries(queries), self.text_gallery)
                + self.typical_hubness[1])


def photos_of_split(folder, split):
    """The photos of a dataset's split -> (paths, captions), the captions as one list per photo.
    folder: its path, or the Folder that was read. split: "train", "val", "test" or "all". Raises
    DataError for a dataset that is missing or incomplete, or has no such split."""
    if not isinstance(folder, Folder):
        folder = read_folder(folder)
    names = folder.names(split)
    if not names:
        others = [name for name in folder.splits if folder.splits[name]]
        raise DataError(f"{folder.root}: holds no photos of {split}, but of {' and '.join(others)}"
                        "; choose one of them with --split, or all")
    captions = [folder.texts_of(name) for name in names]
    missing = [name for name in names if name in folder.missing]
    silent = [name for name, texts in zip(names, captions) if not texts]
    for faulty, fault in (missing, "are missing"), (silent, "have no captions"):
        if faulty:
            raise DataError(f"{folder.root}: of {counted(len(names), 'photo')} of {split}, "
                            f"{len(faulty):,} {fault}, such as {faulty[0]}; add them, or take the "
                            f"photos out of {folder.source}")
    return [folder.path(name) for name in names], captions
