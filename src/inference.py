"""A trained model put to use: photos and captions -> embeddings, whose dot products rank them.

    model, tokenizer, transform = load_model("outputs/flickr8k_sgd")
    photos = embed_photos(model, transform, ["my_dog.jpg"])
    texts = embed_texts(model, tokenizer, ["a dog", "a red car"])
    print(texts @ photos.T)

Everything is computed in float32."""
import contextlib
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

from src.model import MultiModalMemoryNetwork
from src.settings import default_device, settings_of
from src.utils.augment import normalize
from src.utils.checkpoint import (
    BEST,
    BEST_KEYS,
    CheckpointError,
    check_folder,
    load_checkpoint,
    save_checkpoint,
)
from src.utils.flickr8k_simple import (
    DataError,
    find_caption_file,
    find_photo_folder,
    load_photo,
    pad_texts,
    read_captions,
    read_split,
)
from src.utils.tokenizers import tokenizer_from_state

CACHE = "embeddings_flickr8k.pt"
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def load_model(run_dir):
    """A run's best model, in eval mode on the GPU if there is one -> (model, tokenizer, transform):
    tokenizer.encode(text) gives a list of ids, transform(path) a photo as the model takes it, (3,
    eval_pixels, eval_pixels). Raises CheckpointError for no run, no best model yet or a file that
    does not fit, UsageError for a run of another version."""
    path = Path(run_dir) / BEST
    check_folder(path.parent)
    if not path.exists():
        raise CheckpointError(f"{path.parent}: has no best model yet, which an epoch leaves")
    checkpoint = load_checkpoint(path, BEST_KEYS)
    settings = settings_of(checkpoint["config"], run_dir)
    try:
        tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
        model = MultiModalMemoryNetwork(tokenizer.vocab_size, **settings.model_arguments())
        model.load_state_dict(checkpoint["model_state_dict"])
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: its weights and tokenizer are not those of the model that "
                              f"it describes ({reason})") from None

    def transform(photo):
        return normalize(torch.from_numpy(load_photo(photo, settings.eval_pixels))[None])[0]

    return model.eval().to(default_device()), tokenizer, transform


@torch.no_grad()
def embed_photos(model, transform, paths, batch_size=100, progress=None):
    """Photo files -> (N, latent_dim) on the CPU, of unit length. `progress(done, total)` is called
    after each batch. Raises DataError, with the file's name, for a photo that cannot be read."""
    device, parts = next(model.parameters()).device, []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), batch_size):
            images = torch.stack(list(pool.map(transform, paths[start:start + batch_size])))
            parts.append(model(images=images.to(device))["central_latent"].cpu())
            if progress:
                progress(min(start + batch_size, len(paths)), len(paths))
    return F.normalize(torch.cat(parts), dim=-1)


@torch.no_grad()
def embed_texts(model, tokenizer, texts, batch_size=256):
    """Texts -> (N, latent_dim) on the CPU, of unit length. Raises ValueError for one of no tokens.
    """
    device = next(model.parameters()).device
    ids = [torch.tensor(tokenizer.encode(text)) for text in texts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    parts = []
    for start in range(0, len(ids), batch_size):
        text = pad_texts([ids[i] for i in order[start:start + batch_size]])
        parts.append(model(text=text.to(device))["central_latent"].cpu())
    sorted_rows = F.normalize(torch.cat(parts), dim=-1)
    return torch.empty_like(sorted_rows).index_copy_(0, torch.tensor(order), sorted_rows)


class EmbeddingCache:
    """Embeddings of photo files and texts, kept beside the run, made once. A photo is known by its
    path, size and modification time, the weights by their file's content."""

    def __init__(self, run_dir):
        self.path = Path(run_dir) / CACHE
        self.model, self.tokenizer, self.transform = load_model(run_dir)
        with open(Path(run_dir) / BEST, "rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
        self.state = {"weights": weights, "photos": {}, "texts": {}, "photo_rows": None,
                      "text_rows": None}
        with contextlib.suppress(CheckpointError):  # none there, or damaged: it is only a cache
            state = load_checkpoint(self.path, self.state)
            self.state = state if state["weights"] == weights else self.state

    def photos(self, paths, progress=None):
        """(N, latent_dim), see `embed_photos`."""
        keys = []
        for path in map(Path, paths):
            try:
                stat = path.stat()
            except OSError as error:
                raise DataError(f"{path}: {error.strerror}") from None
            keys.append(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}")
        path_of = dict(zip(keys, paths))
        return self._rows("photo", keys, lambda new: embed_photos(
            self.model, self.transform, [path_of[key] for key in new], progress=progress))

    def texts(self, texts):
        """(N, latent_dim), see `embed_texts`."""
        return self._rows("text", texts, lambda new: embed_texts(self.model, self.tokenizer, new))

    def _rows(self, kind, keys, embed):
        row_of, rows = self.state[f"{kind}s"], self.state[f"{kind}_rows"]
        new = [key for key in dict.fromkeys(keys) if key not in row_of]
        if new:
            rows = embed(new) if rows is None else torch.cat([rows, embed(new)])
            row_of.update({key: len(row_of) + i for i, key in enumerate(new)})
            self.state[f"{kind}_rows"] = rows
            with contextlib.suppress(CheckpointError):  # a folder that cannot be written
                save_checkpoint(self.state, self.path)
        return rows[[row_of[key] for key in keys]]


def photos_of_split(data_dir, split):
    """-> ([path of each photo], [its captions]). Raises DataError for what is missing."""
    data_dir = Path(data_dir)
    names, folder = read_split(data_dir, split), find_photo_folder(data_dir)
    captions = read_captions(find_caption_file(data_dir))
    for name in names:
        if name not in captions:
            raise DataError(f"{data_dir}: {name} has no captions")
    return [folder / name for name in names], [captions[name] for name in names]


def photos_of_folder(folder):
    """Paths of the photos in a folder and below it, in order. Raises DataError where are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    paths = sorted(path for path in folder.rglob("*")
                   if path.suffix.lower() in PHOTO_SUFFIXES and path.is_file())
    if not paths:
        raise DataError(f"{folder}: holds no photos ({', '.join(PHOTO_SUFFIXES)})")
    return paths
