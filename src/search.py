"""A trained model in use: photos and texts -> embeddings, whose dot products are their cosines.

    model, tokenizer, transform = load_model("outputs/flickr8k_sgd")
    photos = embed_photos(model, transform, ["my_dog.jpg"])
    texts = embed_texts(model, tokenizer, ["a dog", "a red car"])
    print(texts @ photos.T)

    # With the run's bank, many photos are ranked better.
    bank = load_bank("outputs/flickr8k_sgd")
    print((bank.text_queries(texts) @ bank.photo_gallery(photos).T).argsort(descending=True))

Everything is computed in float32."""
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F

from src.bank import Bank
from src.device import find_device, full_memory, memory_format
from src.encoder_sources import load_encoders
from src.fisher import build_network
from src.runs import BEST, load_best
from src.settings import settings_of
from src.utils.augment import normalize
from src.utils.console import printable
from src.utils.errors import DataError, UsageError, first_line
from src.utils.flickr8k_simple import map_tensors
from src.utils.folder import cut_text
from src.utils.photo_store import decoding_threads, load_photo, map_ahead
from src.utils.ragged import Ragged
from src.utils.tokenizers import tokenizer_from_state


def load_bank(run_dir):
    """The `Bank` of a run's best model. It is None while the run is still training, and for runs of
    versions that had no bank. Raises UsageError as `load_model` does."""
    return bank_of(load_best(run_dir))


def bank_of(checkpoint):
    """The `Bank` in a checkpoint of `load_best`, or None."""
    bank = checkpoint.get("bank")
    return None if bank is None else Bank(**bank)


def load_model_and_encoders(run_dir, device=None, checkpoint=None):
    """Load a run's best model -> (model, tokenizer, settings, encoders).

    The model is in eval mode, on the device of that name, by default the best one of this machine,
    and takes photos and texts as they are: its pretrained encoders, if it has any, are a part of
    it. The same encoders are also returned, to embed a whole dataset from its feature store.
    checkpoint: that of `load_best`, if it is loaded already. Raises UsageError as `load_model`
    does."""
    checkpoint = checkpoint or load_best(run_dir)
    config = checkpoint["config"]
    settings = settings_of(config, run_dir)
    device = find_device(device)
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


def load_model(run_dir, device=None, checkpoint=None):
    """Load a run's best model -> (model, tokenizer, transform).

    The model is in eval mode, on the device of that name, by default the best one of this machine.
    tokenizer.encode(text) gives a list of token ids. transform(path) gives a photo as the model
    takes it, a float tensor (3, side, side), or whatever size the run's pretrained image encoder
    takes. checkpoint: that of `load_best`, if it is loaded already. Raises UsageError if there is
    no run, or no best model yet, if a file of the run is damaged or belongs to another version of
    this project, and if a pretrained encoder is unavailable or has changed."""
    model, tokenizer, settings, encoders = load_model_and_encoders(run_dir, device, checkpoint)
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
                images = images.to(device, memory_format=memory_format(device))
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
def embed_text_batches(model, tokenizer, texts, batch_size=256):
    """Yield (rows, embeddings) batch by batch, texts of about the same length together: the rows of
    the batch among the texts, and its embeddings (B, D) of unit length on the CPU. Raises as
    `embed_texts` does."""
    device = next(model.parameters()).device
    lengths = list(map(len, texts))
    if tokenizer is not None:
        ids = Ragged.from_sequences((tokenizer.encode(cut_text(text)) for text in texts), "H")
        lengths = ids.lengths
    by_length = sorted(range(len(texts)), key=lambda i: lengths[i])  # for little padding
    for start in range(0, len(texts), batch_size):
        batch = by_length[start:start + batch_size]
        text = features = None
        if tokenizer is not None:
            text = torch.from_numpy(ids.padded(batch)).to(device)
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
        yield batch, F.normalize(latents, dim=-1)


def embed_texts(model, tokenizer, texts, batch_size=256):
    """Embed texts -> (N, D) of unit length on the CPU. Of each text, the first MAX_LENGTH
    characters are read. tokenizer: None for a model that takes no tokens but those of its
    pretrained encoder. Raises ValueError for a text without tokens, and DataError for one whose
    embedding is not finite."""
    rows, parts = zip(*embed_text_batches(model, tokenizer, texts, batch_size))
    embeddings = torch.cat(parts)
    order = torch.tensor([row for batch in rows for row in batch])
    return torch.empty_like(embeddings).index_copy_(0, order, embeddings)
