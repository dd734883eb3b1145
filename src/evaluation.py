"""A model and a split -> embeddings -> metrics."""
import numpy as np
import torch

from src.bank import BANK_SIZE, Bank
from src.model import combine_photo_and_text
from src.retrieval import KS, hub_share, ranks_of_others, retrieval_metrics
from src.utils.augment import normalize, resize
from src.utils.distributed import gather_objects, rank_and_world
from src.utils.flickr8k_simple import map_tensors

BATCH_SIZE = 256  # embedded at a time


@torch.no_grad()
def embed(model, dataset, photos, captions, amp_dtype=None, pixels=None):
    """Rows of a dataset's photos and captions -> latents (N, D) and (M, D), on the model's device,
    the same in all processes, among which the batches are shared out. amp_dtype: the autocast type,
    None for full precision. pixels: side to which photos are resized, None for as they are stored.
    The model is left in the mode it was in."""
    device, was_training = next(model.parameters()).device, model.training
    rank, world = rank_and_world()

    def in_batches(total, inputs):
        parts = []
        for start in range(rank * BATCH_SIZE, total, world * BATCH_SIZE):
            latents = model(**inputs(slice(start, start + BATCH_SIZE)))["central_latent"]
            parts.append((start, latents.float().cpu()))
        parts = sorted(gather_objects(parts), key=lambda part: part[0])
        return torch.cat([latents for _, latents in parts]).to(device)

    def photo_inputs(part):
        images = dataset.photos[photos[part]]
        if images.dtype != torch.uint8:
            return {"images": images[:, 0].to(device)}  # not the mirror image's features
        if pixels is not None:
            images = resize(images, pixels, "bicubic")
        inputs = {"images": normalize(images.to(device))}
        if dataset.fisher_vectors is not None:
            inputs["fisher_vectors"] = dataset.fisher_vectors[photos[part]].to(device)
        return inputs

    def text_inputs(part):
        return map_tensors(lambda tensor: tensor.to(device), dataset.text_inputs(captions[part]))

    model.eval()
    with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        latents = in_batches(len(photos), photo_inputs), in_batches(len(captions), text_inputs)
    model.train(was_training)
    return latents


def embed_dataset(model, dataset, amp_dtype=None):
    """-> photo latents, caption latents, and the row of each caption's photo, see `embed`."""
    by_length = np.argsort(dataset.texts.lengths, kind="stable")  # little padding
    photos, texts = embed(model, dataset, torch.arange(len(dataset.photos)), by_length, amp_dtype)
    return photos, texts[torch.from_numpy(by_length).argsort()], dataset.photo_of_caption


def evaluate(model, dataset, amp_dtype=None):
    """`retrieval_metrics` of a model on a Flickr8kImageTextDataset."""
    return retrieval_metrics(*embed_dataset(model, dataset, amp_dtype))


def make_bank(model, dataset, pixels, seed=0, amp_dtype=None):
    """The Bank of a training split: BANK_SIZE photos at most, drawn by the seed, and all captions
    of these. pixels: side of the photos that the model is used with."""
    photos, owners = dataset.photo_of_caption.unique(), dataset.photo_of_caption
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(seed))
    photos = photos[order[:BANK_SIZE].sort().values]
    captions = torch.isin(owners, photos).nonzero().flatten().numpy()
    lengths = dataset.texts.lengths[captions]
    captions = captions[np.argsort(lengths, kind="stable")]  # little padding
    latents = embed(model, dataset, photos, captions, amp_dtype, pixels)
    return Bank(*(rows.cpu() for rows in latents), torch.searchsorted(photos, owners[captions]))


def compare_bank(model, dataset, bank, amp_dtype=None):
    """`evaluate` without and with a bank -> {"off": metrics, "on": metrics, "hub_share": alike,
    "photo_and_text": `compare_photo_and_text`}."""
    photos, texts, photo_of_caption = embed_dataset(model, dataset, amp_dtype)
    results = {"hub_share": {}}
    for mode, used in (("off", None), ("on", bank)):
        results[mode] = retrieval_metrics(photos, texts, photo_of_caption, used)
        results["hub_share"][mode] = hub_share(photos, texts, used)
    results["photo_and_text"] = compare_photo_and_text(photos, texts, photo_of_caption)
    return results


def compare_photo_and_text(photos, texts, photo_of_caption):
    """How well a photo's other captions are found by its first one, by the photo, and by both
    together -> {"caption": {"r1", "r5", "r10"}, "photo": alike, "both": alike}, in percent. The
    first caption is no candidate. Photos with one caption are left out; None where all are. The
    latents are those of `embed_dataset`."""
    owners = photo_of_caption.to(texts.device)
    asked = (torch.bincount(owners) > 1).nonzero().flatten()
    if not len(asked):
        return None
    own = torch.searchsorted(owners, asked)
    queries_of = {"caption": texts[own], "photo": photos[asked],
                  "both": combine_photo_and_text(photos[asked], texts[own])}
    results = {}
    for name, queries in queries_of.items():
        ranks = ranks_of_others(queries, texts, owners, asked, own)
        results[name] = {f"r{k}": 100 * (ranks <= k).double().mean().item() for k in KS}
    return results
