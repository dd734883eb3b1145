"""A trained model put to use: photos and captions -> embeddings, whose dot products rank them.

    model, tokenizer, transform = load_model("outputs/flickr8k_sgd")
    photos = embed_photos(model, transform, ["my_dog.jpg"])
    texts = embed_texts(model, tokenizer, ["a dog", "a red car"])
    print(texts @ photos.T)
    bank = load_bank("outputs/flickr8k_sgd")  # for a better order of many photos
    print((bank.text_queries(texts) @ bank.photo_gallery(photos).T).argsort(descending=True))

Everything is computed in float32."""
import collections
import contextlib
import dataclasses
import functools
import hashlib
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from src.bank import BETA, NEIGHBOUR_WEIGHT, NEIGHBOURS, Bank
from src.device import find_device
from src.encoder_sources import load_encoders
from src.fisher import build_network
from src.model import combine_photo_and_text
from src.runs import BEST, BEST_KEYS, check_folder, load_checkpoint, save_checkpoint
from src.settings import settings_of
from src.utils.augment import normalize
from src.utils.caption_files import photo_suffixes
from src.utils.captions import cut_text, read_folder
from src.utils.errors import DataError, RunError, UsageError
from src.utils.flickr8k_simple import map_tensors
from src.utils.photo_store import STORE_VERSION, decoding_threads, load_photo
from src.utils.ragged import Ragged
from src.utils.tokenizers import tokenizer_from_state

CACHE = "embeddings_flickr8k.pt"
SAVE_INTERVAL = 60  # seconds between two savings of the cache while photos are embedded


def load_best(run_dir):
    """The checkpoint of a run's best model. Raises UsageError, as `load_model`."""
    path = Path(run_dir) / BEST
    check_folder(path.parent)
    if not path.exists():
        raise UsageError(f"{path.parent}: has no best model yet, which an epoch leaves")
    return load_checkpoint(path, BEST_KEYS)


def load_bank(run_dir):
    """The `Bank` of a run's best model, None before the end of the run and for one of a version
    without banks. Raises UsageError, as `load_model`."""
    bank = load_best(run_dir).get("bank")
    return None if bank is None else Bank(**bank)


def load_model(run_dir):
    """A run's best model, in eval mode on the GPU if there is one -> (model, tokenizer, transform):
    tokenizer.encode(text) gives a list of ids, transform(path) a photo as the model takes it, (3,
    side, side), or what its pretrained encoder takes. Raises UsageError for no run, no best
    model yet or a file that does not fit, UsageError for a run of another version and for
    pretrained encoders that cannot be had."""
    checkpoint = load_best(run_dir)
    settings = dataclasses.replace(settings_of(checkpoint["config"], run_dir), amp=False)
    encoders = load_encoders(settings)
    trained_with = checkpoint["config"].get("encoders")
    if encoders.describe() != trained_with:
        raise UsageError(f"{run_dir}: the weights of its pretrained encoders are not those "
                              f"that it was trained with: {trained_with}")
    try:
        tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
        model = build_network(tokenizer.vocab_size, settings, encoders.widths)
        if settings.finetune:
            encoders.attach(model, settings)
        model.load_state_dict(checkpoint["model_state_dict"])
        if not settings.finetune:  # which the checkpoint leaves out
            encoders.attach(model, settings)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(f"{Path(run_dir) / BEST}: its weights and tokenizer are not those of "
                              f"the model that it describes ({reason})") from None

    def transform(photo):
        if encoders.image is not None and not settings.finetune:
            return encoders.image.load(photo)
        pixels = load_photo(photo, settings.stored_pixels("val"))
        return normalize(torch.from_numpy(pixels)[None])[0]

    return model.eval().to(find_device()), tokenizer, transform


@torch.no_grad()
def embed_in_batches(model, transform, paths, batch_size=100, faults=None):
    """Yields (paths, their embeddings) batch by batch. faults: a dict that gets {path: what is
    wrong} of photos that cannot be read, which are left out; without it they raise DataError."""
    def read(path):
        try:
            return transform(path)
        except DataError as error:
            if faults is None:
                raise
            faults[path] = str(error)
            return None

    device = next(model.parameters()).device
    with decoding_threads() as pool:
        for start in range(0, len(paths), batch_size):
            batch = paths[start:start + batch_size]
            images = list(pool.map(read, batch))
            batch = [path for path, image in zip(batch, images) if image is not None]
            if batch:
                images = torch.stack([image for image in images if image is not None])
                latents = model(images=images.to(device))["central_latent"].cpu()
                yield batch, F.normalize(latents, dim=-1)


def embed_photos(model, transform, paths, batch_size=100):
    """Photo files -> (N, D) on the CPU, of unit length. Raises DataError, with the file's
    name, for a photo that cannot be read."""
    batches = embed_in_batches(model, transform, paths, batch_size)
    return torch.cat([rows for _, rows in batches])


@torch.no_grad()
def embed_texts(model, tokenizer, texts, batch_size=256):
    """Texts, of which MAX_LENGTH characters are read -> (N, D) on the CPU, of unit length.
    Raises ValueError for a text of no tokens."""
    device = next(model.parameters()).device
    ids = Ragged.of((tokenizer.encode(cut_text(text)) for text in texts), "H")
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    parts = []
    for start in range(0, len(ids), batch_size):
        rows, features = order[start:start + batch_size], None
        text = torch.from_numpy(ids.padded(rows)).to(device)
        if model.text_backbone is not None:
            features = model.text_backbone.prepare([cut_text(texts[i]) for i in rows])
            features = map_tensors(lambda tensor: tensor.to(device), features)
        parts.append(model(text=text, text_features=features)["central_latent"].cpu())
    sorted_rows = F.normalize(torch.cat(parts), dim=-1)
    return torch.empty_like(sorted_rows).index_copy_(0, torch.tensor(order), sorted_rows)


class EmbeddingCache:
    """Embeddings of photo files and texts, and what the run's `Bank` makes of them, kept beside the
    run, made once. A photo is known by its path, size and modification time, the weights by their
    file's content."""

    def __init__(self, run_dir):
        self.path = Path(run_dir) / CACHE
        self.model, self.tokenizer, self.transform = load_model(run_dir)
        self.bank, self.keys = load_bank(run_dir), {}
        with open(Path(run_dir) / BEST, "rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
        # And what else the cached follows from: how photos are read, how the bank is used.
        weights += f" {STORE_VERSION} {BETA} {NEIGHBOURS} {NEIGHBOUR_WEIGHT}"
        self.state = {"weights": weights, "photos": {}, "texts": {}, "photo_rows": None,
                      "text_rows": None, "photo_gallery": None, "text_gallery": None}
        with contextlib.suppress(UsageError):  # none there, or damaged: it is only a cache
            state = load_checkpoint(self.path, self.state)
            self.state = state if state["weights"] == weights else self.state

    def photos(self, paths, progress=None, faults=None):
        """(N, D) of the photos, less those in `faults`, see `embed_in_batches`. What was
        embedded is kept, whatever ends it. `progress(done, total)` is called after each batch.
        Raises DataError where there is nothing to give."""
        keys = self.keys
        paths = [Path(path) if isinstance(path, str) else path for path in paths]
        for path in paths:
            try:
                stat = path.stat()
                keys[path] = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
            except OSError as error:
                if faults is None:
                    raise DataError(f"{path}: {error.strerror}") from None
                keys.pop(path, None)
                faults[path] = f"{path}: {error.strerror}"
        row_of, saved, done = self.state["photos"], time.time(), 0
        new = [path for path in dict.fromkeys(paths) if path in keys and keys[path] not in row_of]
        try:
            for batch, rows in embed_in_batches(self.model, self.transform, new, faults=faults):
                self._add("photo", [keys[path] for path in batch], rows)
                done += len(batch)
                if progress:
                    progress(done, len(new))
                if time.time() - saved > SAVE_INTERVAL:
                    self._save()
                    saved = time.time()
        finally:
            if done:
                self._save()
        found = [row_of[keys[path]] for path in paths if keys.get(path) in row_of]
        if not found:
            raise DataError(f"not one of {len(paths):,} photos can be read: "
                            f"{next(iter(faults.values()))}")
        return self.state["photo_rows"][found]

    def photo_gallery(self, paths):
        """The bank's, of photos that `photos` has given."""
        rows = [self.state["photos"][self.keys[path]] for path in paths]
        return self.state["photo_gallery"][rows]

    def texts(self, texts):
        """(N, D), see `embed_texts`."""
        row_of = self.state["texts"]
        new = [text for text in dict.fromkeys(texts) if text not in row_of]
        if new:
            self._add("text", new, embed_texts(self.model, self.tokenizer, new))
            self._save()
        return self.state["text_rows"][[row_of[text] for text in texts]]

    def text_gallery(self, texts):
        """The bank's, of texts that `texts` has given."""
        return self.state["text_gallery"][[self.state["texts"][text] for text in texts]]

    def _add(self, kind, keys, rows):
        made = {f"{kind}_rows": rows}
        if self.bank is not None:
            made[f"{kind}_gallery"] = getattr(self.bank, f"{kind}_gallery")(rows)
        first = 0 if self.state[f"{kind}_rows"] is None else len(self.state[f"{kind}_rows"])
        self.state[f"{kind}s"].update({key: first + i for i, key in enumerate(keys)})
        for name, new in made.items():
            self.state[name] = torch.cat([self.state[name], new]) if first else new

    def _save(self):
        with contextlib.suppress(RunError):  # a folder that cannot be written
            save_checkpoint(self.state, self.path)


class Search:
    """A gallery of photos with their captions, N and M of them, which texts, photos or both find.

    cache: an `EmbeddingCache`. photos: paths, captions: a list of each one's, perhaps empty. bank:
    whether to order by the run's. `rows`: the photos' embeddings, once `embed_photos` was called.
    """

    def __init__(self, cache, photos, captions, bank):
        self.cache, self.bank = cache, cache.bank if bank else None
        self.rows = self.gallery = None
        self._hold(photos, captions)

    def _hold(self, photos, captions):
        self.photos, self.captions = photos, captions
        self.texts = [text for own in captions for text in own]
        self.photo_of_text = [i for i, own in enumerate(captions) for _ in own]

    def embed_photos(self, progress=None, faults=None):
        """Those in `faults` leave the gallery, see `EmbeddingCache.photos`."""
        self.rows = self.cache.photos(self.photos, progress, faults)
        kept = [i for i, photo in enumerate(self.photos) if photo not in (faults or {})]
        self._hold([self.photos[i] for i in kept], [self.captions[i] for i in kept])
        if self.bank is not None:
            self.gallery = self.cache.photo_gallery(self.photos)

    @functools.cached_property
    def text_rows(self):
        return self.cache.texts(self.texts)

    @functools.cached_property
    def text_gallery(self):
        return self.cache.text_gallery(self.texts)

    def embed_texts(self, texts, photo=None):
        """(Q, D) of the texts, each together with the photo whose embedding (1, D) is given."""
        rows = embed_texts(self.cache.model, self.cache.tokenizer, texts)
        return rows if photo is None else F.normalize(combine_photo_and_text(photo, rows), dim=-1)

    def embed_photo(self, path):
        """-> (1, D)"""
        return embed_photos(self.cache.model, self.cache.transform, [path])

    def photos_for(self, queries):
        """What `embed_texts` gives -> cosines (Q, N), and scores to order by, alike."""
        cosines = queries @ self.rows.T
        if self.bank is None:
            return cosines, cosines
        return cosines, self.bank.text_queries(queries) @ self.gallery.T

    def captions_for(self, queries):
        """Embeddings of photos (Q, D) -> cosines (Q, M), and scores, alike."""
        cosines = queries @ self.text_rows.T
        if self.bank is None:
            return cosines, cosines
        return cosines, self.bank.photo_queries(queries) @ self.text_gallery.T


def photos_of_split(data_dir, split):
    """-> ([path of each photo], [its captions]). Raises DataError for what is missing."""
    folder = read_folder(data_dir)
    names, captions = folder.splits[split], []
    for name in names:
        captions.append(folder.texts_of(name))
        if not captions[-1]:
            raise DataError(f"{data_dir}: {name} has no captions")
    return [folder.path(name) for name in names], captions


def photos_of_folder(folder, skipped=None):
    """Paths of the photos in a folder and below it, in order. Links are followed, each folder is
    entered once, and what is hidden, its name beginning with a dot, is not looked at. skipped: a
    Counter that gets {kind: number} of what is no photo. Raises DataError where there are none."""
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: there is no such folder")
    skipped = collections.Counter() if skipped is None else skipped
    paths, entered, suffixes = [], set(), photo_suffixes()

    def count_folder(error):
        skipped["folders that cannot be opened"] += 1

    for place, folders, names in os.walk(folder, onerror=count_folder, followlinks=True):
        if os.path.realpath(place) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            suffix = path.suffix.lower()
            if not path.is_file():
                skipped["broken links and the like"] += 1
            elif suffix in suffixes:
                paths.append(path)
            else:
                skipped[suffix or "without a suffix"] += 1
    if not paths:
        found = f" (left out: {kinds(skipped)})" if skipped else ""
        raise DataError(f"{folder}: holds no photos that can be read{found}")
    return sorted(paths)


def kinds(skipped):
    """{kind: number} -> "3 .heic, 1 .txt"."""
    return ", ".join(f"{number:,} {kind}" for kind, number in sorted(skipped.items()))
