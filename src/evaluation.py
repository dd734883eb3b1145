"""A model and a split -> embeddings -> metrics."""
import numpy as np
import torch

from src.bank import BANK_SIZE, Bank
from src.device import memory_format
from src.model import IMAGE, TEXT, combine_photo_and_text
from src.retrieval import (
    KS,
    correct_pairs,
    different_texts,
    hub_share,
    other_caption_ranks,
    retrieval_metrics,
)
from src.utils.augment import normalize, resize
from src.utils.distributed import gather_objects, rank_and_world
from src.utils.flickr8k_simple import map_tensors

PHOTO_BATCH, CAPTION_BATCH = 250, 1000  # how many are embedded at a time
PREPARED_PHOTOS = 5000  # the largest validation split whose photos are prepared once


@torch.no_grad()
def embed(model, dataset, photos, captions, amp_dtype=None, pixels=None, progress=None):
    """Embed photos and captions of a dataset.

    photos: (N,) and captions: (M,), rows of the dataset. amp_dtype: the data type of autocast, None
    for float32. pixels: the side to which photos are resized, None to take them as they are stored.
    progress(done, total, unit): called after each batch.

    Returns the latents of the photos (N, D) and of the captions (M, D), on the model's device. The
    batches are shared among all processes, and every process gets all latents. The model is
    left in the mode, training or evaluation, in which it was."""
    device = next(model.parameters()).device

    def photo_inputs(rows):
        images = dataset.photos[rows]
        if images.ndim == 3:  # features of a pretrained encoder, for two views
            images = images[:, 0]  # the second view is the mirror image
        elif images.dtype == torch.uint8:
            if pixels is not None:
                images = resize(images, pixels, "bicubic")
            images = normalize(images.to(device, memory_format=memory_format(device)))
        return on_device({"images": images} | fisher_latents(IMAGE, rows))

    def text_inputs(rows):
        return on_device(dataset.text_inputs(rows) | fisher_latents(TEXT, rows))

    def fisher_latents(modality, rows):
        if dataset.fisher_latents is None:
            return {}
        return {"fisher_latents": dataset.fisher_latents[modality][rows]}

    def on_device(inputs):
        return map_tensors(lambda tensor: tensor.to(device), inputs)

    was_training = model.training
    model.eval()
    with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        photo_latents = embed_in_batches(
            model, photos, photo_inputs, PHOTO_BATCH, progress, "photos")
        caption_latents = embed_in_batches(
            model, captions, text_inputs, CAPTION_BATCH, progress, "captions")
    model.train(was_training)
    return photo_latents.to(device), caption_latents.to(device)


def prepare_photos(dataset, pixels, amp_dtype, device):
    """Return a dataset with its photos as the model takes them, normalised and with that many
    pixels, so that each validation need not do this anew. They are kept on the device, in the data
    type to which autocast converts them. A dataset of more than PREPARED_PHOTOS photos stays as it
    is."""
    if len(dataset.photos) > PREPARED_PHOTOS:
        return dataset
    parts, layout = [], memory_format(device)
    for rows in torch.arange(len(dataset.photos)).split(PHOTO_BATCH):
        photos = dataset.photos[rows].to(device, memory_format=layout)
        photos = resize(normalize(photos), pixels)
        parts.append(photos.to(amp_dtype or torch.float32))
    return dataset.replace(photos=torch.cat(parts).contiguous(memory_format=layout))


def embed_in_batches(model, rows, inputs_of_rows, batch_size, progress=None, unit=""):
    """Embed rows of a dataset, batch_size at a time; each process takes every world-th batch.
    Returns the latents of all processes (N, D), in order, in float32, on the CPU."""
    rank, world = rank_and_world()
    batches = []  # (number of the first row, latents)
    for start in range(rank * batch_size, len(rows), world * batch_size):
        inputs = inputs_of_rows(rows[start:start + batch_size])
        latents = model(**inputs)["central_latent"]
        batches.append((start, latents.float().cpu()))
        if progress is not None:
            progress(min(start + batch_size, len(rows)), len(rows), unit)
    batches = sorted(gather_objects(batches), key=lambda batch: batch[0])
    return torch.cat([latents for _, latents in batches])


def embed_dataset(model, dataset, amp_dtype=None, progress=None):
    """Embed all photos and captions of a dataset. Returns the latents of the photos (N, D) and of
    the captions (M, D), and the row of each caption's photo (M,). progress: see `embed`."""
    by_length = np.argsort(dataset.texts.lengths, kind="stable")  # little padding in a batch
    photos, sorted_texts = embed(
        model, dataset, torch.arange(len(dataset.photos)), by_length, amp_dtype,
        progress=progress)
    texts = sorted_texts[torch.from_numpy(by_length).argsort()]
    return photos, texts, dataset.photo_of_caption


def evaluate(model, dataset, amp_dtype=None, progress=None):
    """The `retrieval_metrics` of a model on a Flickr8kImageTextDataset."""
    embedded = embed_dataset(model, dataset, amp_dtype, progress)
    return retrieval_metrics(*embedded, text_ids=dataset.text_ids)


def make_bank(model, dataset, pixels, seed=0, amp_dtype=None, progress=None):
    """Make the Bank of a training split. It holds at most BANK_SIZE photos, drawn at random from
    those with captions, and all of their captions. pixels: the side of the photos in validation."""
    photo_of_caption = dataset.photo_of_caption
    photos = photo_of_caption.unique()
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(seed))
    photos = photos[order[:BANK_SIZE].sort().values]
    captions = torch.isin(photo_of_caption, photos).nonzero().flatten().numpy()
    by_length = np.argsort(dataset.texts.lengths[captions], kind="stable")
    captions = captions[by_length]
    photo_latents, caption_latents = embed(
        model, dataset, photos, captions, amp_dtype, pixels, progress)
    photo_of_text = torch.searchsorted(photos, photo_of_caption[captions])
    return Bank(photo_latents.cpu(), caption_latents.cpu(), photo_of_text,
                correct_hubs=dataset.text_ids is None)


def compare_bank(model, dataset, bank, amp_dtype=None, progress=None):
    """Evaluate a model without and with a bank.

    Returns a dict of
    - "without_bank", "with_bank": `retrieval_metrics`
    - "hub_share": {"without_bank": percent, "with_bank": percent}, see `hub_share`
    - "photo_and_text": see `compare_photo_and_text`; without a bank"""
    photos, texts, photo_of_caption = embed_dataset(model, dataset, amp_dtype, progress)
    text_ids = dataset.text_ids
    return {
        "without_bank": retrieval_metrics(photos, texts, photo_of_caption, text_ids=text_ids),
        "with_bank": retrieval_metrics(photos, texts, photo_of_caption, bank, text_ids),
        "hub_share": {"without_bank": hub_share(photos, texts, text_ids=text_ids),
                      "with_bank": hub_share(photos, texts, bank, text_ids)},
        "photo_and_text": compare_photo_and_text(photos, texts, photo_of_caption, text_ids)}


def compare_photo_and_text(photos, texts, photo_of_caption, text_ids=None):
    """How well three queries find the other captions of a photo: the photo's first caption, the
    photo itself, and both combined. The first caption is not ranked.

    photos: (N, D), texts: (M, D), photo_of_caption: (M,), as `embed_dataset` returns them.
    text_ids: see `retrieval_ranks`. Photos with fewer than two different captions are not used as
    queries.

    Returns {"caption": recalls, "photo": recalls, "both": recalls}, the recalls in percent as
    {"r1", "r5", "r10"}, or None if no photo has two different captions."""
    photo_of_caption = photo_of_caption.to(texts.device)
    _, text_of_caption = different_texts(text_ids, len(texts), texts.device)
    _, photo_of_pair = correct_pairs(text_of_caption, photo_of_caption)
    query_photos = (torch.bincount(photo_of_pair) > 1).nonzero().flatten()
    if not len(query_photos):
        return None
    # photo_of_caption is sorted, so this is the row of the first caption of each photo.
    first_captions = torch.searchsorted(photo_of_caption, query_photos)
    queries = {
        "caption": texts[first_captions],
        "photo": photos[query_photos],
        "both": combine_photo_and_text(photos[query_photos], texts[first_captions])}
    results = {}
    for name, latents in queries.items():
        ranks = other_caption_ranks(
            latents, texts, photo_of_caption, query_photos, first_captions, text_ids).cpu()
        results[name] = {f"r{k}": 100 * (ranks <= k).double().mean().item() for k in KS}
    return results
