"""A trained model in use: photos and texts -> embeddings, whose dot products are their cosines.

    model, tokenizer, transform = load_model("outputs/flickr8k_sgd")
    photos = embed_photos(model, transform, ["my_dog.jpg"])
    texts = embed_texts(model, tokenizer, ["a dog", "a red car"])
    print(texts @ photos.T)

    # With the run's bank, many photos are ranked better.
    bank = load_bank("outputs/flickr8k_sgd")
    print((bank.text_queries(texts) @ bank.photo_gallery(photos).T).argsort(descending=True))

Everything is computed in float32."""
import contextlib
import functools
import hashlib
import itertools
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from src.bank import BETA, NEIGHBOUR_WEIGHT, NEIGHBOURS, Bank
from src.device import find_device, full_memory
from src.embedding_cache import PHOTOS, TEXTS, CachedEmbeddings, CacheFile, photo_item
from src.encoder_sources import load_encoders
from src.fisher import build_network
from src.model import combine_photo_and_text
from src.ranking import similarities
from src.runs import BEST, BEST_KEYS, check_folder, load_checkpoint
from src.settings import settings_of
from src.utils.augment import normalize
from src.utils.captions import read_folder
from src.utils.console import printable
from src.utils.errors import DataError, UsageError, first_line
from src.utils.flickr8k_simple import map_tensors
from src.utils.folder import cut_text
from src.utils.photo_store import STORE_VERSION, decoding_threads, load_photo, map_ahead
from src.utils.ragged import Ragged
from src.utils.tokenizers import number_texts, tokenizer_from_state

CACHE = "embeddings_flickr8k.sqlite3"


def load_best(run_dir):
    """The checkpoint of a run's best model. Raises UsageError as `load_model` does."""
    path = Path(run_dir) / BEST
    check_folder(path.parent)
    if not path.exists():
        raise UsageError(f"{path.parent}: has no best model yet; the first epoch saves one")
    return load_checkpoint(path, BEST_KEYS)


def load_bank(run_dir):
    """The `Bank` of a run's best model. It is None while the run is still training, and for runs of
    versions that had no bank. Raises UsageError as `load_model` does."""
    bank = load_best(run_dir).get("bank")
    return None if bank is None else Bank(**bank)


def load_model_and_encoders(run_dir):
    """Load a run's best model -> (model, tokenizer, settings, encoders).

    The model is in eval mode, on the best device of this machine, and takes photos and texts as
    they are: its pretrained encoders, if it has any, are a part of it. The same encoders are also
    returned, to embed a whole dataset from its feature store. Raises UsageError as `load_model`
    does."""
    checkpoint = load_best(run_dir)
    config = checkpoint["config"]
    settings = settings_of(config, run_dir)
    device = find_device()
    encoders = load_encoders(settings, device)
    encoders.check_unchanged(config, run_dir)
    try:
        tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
        model = build_network(tokenizer.vocab_size, settings, encoders.feature_widths)
        if settings.finetune:  # the checkpoint holds the fine-tuned weights of the encoders
            encoders.attach(model, settings)
        model.load_state_dict(checkpoint["model_state_dict"])
        if not settings.finetune:
            encoders.attach(model, settings)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        if full_memory(error):
            raise
        reason = " ".join(str(error).split())[:120]
        raise UsageError(f"{Path(run_dir) / BEST}: its weights or its tokenizer do not fit the "
                         f"model that it describes ({reason})") from None
    return model.eval().to(device), tokenizer, settings, encoders


def load_model(run_dir):
    """Load a run's best model -> (model, tokenizer, transform).

    The model is in eval mode, on the best device of this machine. tokenizer.encode(text) gives a
    list of token ids. transform(path) gives a photo as the model takes it, a float tensor
    (3, side, side), or whatever size the run's pretrained image encoder takes. Raises UsageError if
    there is no run, or no best model yet, if a file of the run is damaged or belongs to another
    version of this project, and if a pretrained encoder is unavailable or has changed."""
    model, tokenizer, settings, encoders = load_model_and_encoders(run_dir)
    if encoders.image is not None and encoders.image.frozen:
        return model, tokenizer, encoders.image.load
    trained = None if encoders.image is None else encoders.image.row_format(1)

    def transform(photo):
        if trained is not None:
            pixels = trained.load(photo)
        else:
            pixels = torch.from_numpy(load_photo(photo, settings.stored_pixels("val")))
        return normalize(pixels[None])[0]

    return model, tokenizer, transform


@torch.no_grad()
def embed_photo_batches(model, transform, paths, batch_size=25, unreadable=None):
    """Yield (paths, embeddings) batch by batch, the embeddings (B, D) of unit length on the CPU.
    While the model embeds a batch, the photos of the next two are decoded.

    unreadable: a dict. Photos that cannot be read, or whose embeddings are not finite, are skipped,
    and {path: error message} is added to it. Without the dict, such a photo raises DataError."""
    def leave_out(path, error):
        if unreadable is None:
            raise error
        unreadable[path] = str(error)

    def read(path):
        try:
            return transform(path)
        except DataError as error:
            return leave_out(path, error)

    device = next(model.parameters()).device
    name = getattr(model.image_backbone, "name", "the model")
    with decoding_threads() as pool:
        photos = map_ahead(pool, read, paths, 2 * batch_size)
        for start in range(0, len(paths), batch_size):
            batch = paths[start:start + batch_size]
            images = list(itertools.islice(photos, batch_size))
            batch = [path for path, image in zip(batch, images) if image is not None]
            if batch:
                images = torch.stack([image for image in images if image is not None])
                images = images.to(device, memory_format=torch.channels_last)
                try:
                    latents = model(images=images)["central_latent"].cpu()
                except Exception as error:  # a user's own encoder may raise anything
                    if full_memory(error) or model.image_backbone is None:
                        raise
                    if len(batch) > 1:  # find the photo that it fails for
                        yield from embed_photo_batches(model, transform, batch, 1, unreadable)
                    else:
                        leave_out(batch[0], DataError(f"{batch[0]}: {name} fails for it "
                                                      f"({first_line(error)})"))
                    continue
                finite = torch.isfinite(latents).all(1)
                for path, is_finite in zip(batch, finite):
                    if not is_finite:
                        leave_out(path, DataError(f"{path}: {name} makes NaN or infinite numbers "
                                                  "of it"))
                batch = [path for path, is_finite in zip(batch, finite) if is_finite]
                if batch:
                    yield batch, F.normalize(latents[finite], dim=-1)


def embed_photos(model, transform, paths, batch_size=25):
    """Embed photo files -> (N, D) of unit length on the CPU. Raises DataError, with the name of the
    file, for a photo that cannot be read."""
    batches = embed_photo_batches(model, transform, paths, batch_size)
    return torch.cat([embeddings for _, embeddings in batches])


@torch.no_grad()
def embed_texts(model, tokenizer, texts, batch_size=256):
    """Embed texts -> (N, D) of unit length on the CPU. Of each text, the first MAX_LENGTH
    characters are read. Raises ValueError for a text without tokens, and DataError for one whose
    embedding is not finite."""
    device = next(model.parameters()).device
    ids = Ragged.from_sequences((tokenizer.encode(cut_text(text)) for text in texts), "H")
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # for little padding
    parts = []
    for start in range(0, len(ids), batch_size):
        batch = by_length[start:start + batch_size]
        text = torch.from_numpy(ids.padded(batch)).to(device)
        features = None
        if model.text_backbone is not None:
            features = model.text_backbone.prepare_texts([cut_text(texts[i]) for i in batch])
            features = map_tensors(lambda tensor: tensor.to(device), features)
        name = getattr(model.text_backbone, "name", "the model")
        try:
            latents = model(text=text, text_features=features)["central_latent"].cpu()
        except Exception as error:  # a user's own encoder may raise anything
            if full_memory(error) or model.text_backbone is None:
                raise
            raise DataError(f"{name} fails for one of {len(batch)} texts ({first_line(error)})"
                            ) from None
        for i, is_finite in zip(batch, torch.isfinite(latents).all(1)):
            if not is_finite:
                raise DataError(f'{name} makes NaN or infinite numbers of the text '
                                f'"{printable(texts[i][:80])}"')
        parts.append(latents)
    embeddings = F.normalize(torch.cat(parts), dim=-1)
    return torch.empty_like(embeddings).index_copy_(0, torch.tensor(by_length), embeddings)


class EmbeddingCache:
    """The embeddings of photos and texts by a run's best model. Each is computed once and kept in a
    file of the run's folder, together with the rows of the galleries of the run's `Bank`.

    A photo file that changes is embedded again, and another best model starts with an empty cache.
    Only one thread may use it at a time."""

    def __init__(self, run_dir):
        self.model, self.tokenizer, self.transform = load_model(run_dir)
        self.bank = load_bank(run_dir)
        self.items = {}  # {path: its item in the cache} of the photos that were asked for
        self.is_tidy = False  # whether the photos that are gone were deleted from the file
        with open(Path(run_dir) / BEST, "rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
        # The rows also depend on how photos are read and on how the bank is used.
        weights += f" {STORE_VERSION} {BETA} {NEIGHBOURS} {NEIGHBOUR_WEIGHT}"
        self.file = CacheFile(Path(run_dir) / CACHE, weights)
        photo_gallery = text_gallery = None
        if self.bank is not None:
            photo_gallery, text_gallery = self.bank.photo_gallery, self.bank.text_gallery
        self.photo_rows = CachedEmbeddings(self.file, PHOTOS, photo_gallery)
        self.text_rows = CachedEmbeddings(self.file, TEXTS, text_gallery)

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

    def texts(self, texts):
        """The embeddings (N, D) of texts, see `embed_texts`."""
        items = [(text, "") for text in texts]
        missing = self.text_rows.missing(items)
        if missing:
            new = [text for text, _ in missing]
            self.text_rows.add(missing, embed_texts(self.model, self.tokenizer, new))
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

    @functools.cached_property
    def text_embeddings(self):
        return self.cache.texts(self.texts)

    @functools.cached_property
    def text_gallery(self):
        self.cache.texts(self.texts)
        return self.cache.text_gallery(self.texts)

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
        """What to rank the photos by for embeddings (Q, D) of texts -> (Q, N): the scores of the
        bank, or else the cosines."""
        if self.bank is None:
            return similarities(queries, self.photo_embeddings)
        return similarities(self.bank.text_queries(queries), self.photo_gallery)

    def similar_photos(self, photo):
        """The cosines (N,) of the photos with the embedding (1, D) of a photo, by which they are
        ranked for it. The bank ranks photos for texts, not for another photo."""
        return similarities(photo, self.photo_embeddings)[0]

    def knows(self, text):
        """Whether the model can read anything of a text."""
        return self.cache.tokenizer.knows(text)

    def score_meaning(self):
        """What the scores of `score_photos` are, as a short text to be shown."""
        if self.bank is None:
            return "cosine of the words and the photo"
        return "cosine of the words and the photo, corrected by the bank"

    def fits(self, scores):
        """Whether the best of the scores (N,) of a text means that something fits it. None if that
        is not known."""
        return None

    def score_captions(self, queries):
        """What to rank the captions by for embeddings (Q, D) of photos -> (Q, M), as in
        `score_photos`."""
        if self.bank is None:
            return similarities(queries, self.text_embeddings)
        return similarities(self.bank.photo_queries(queries), self.text_gallery)


def photos_of_split(data_dir, split):
    """The photos of a dataset's split -> (paths, captions), the captions as one list per photo.
    Raises DataError for a dataset that is missing or incomplete."""
    folder = read_folder(data_dir)
    paths, captions = [], []
    for name in folder.splits[split]:
        texts = folder.texts_of(name)
        if not texts:
            raise DataError(f"{data_dir}: {name} has no captions")
        paths.append(folder.path(name))
        captions.append(texts)
    return paths, captions
