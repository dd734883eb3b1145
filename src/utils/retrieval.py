"""Embeddings -> recall at K and median rank, by the standard protocol and by the pair protocol.

Standard (Hodosh et al. 2013, and every paper since): each photo once, all its captions. Photo to text (i2t) is a hit
at K if any of the photo's captions is among the K nearest; text to photo (t2i) ranks the photos for each caption.

Pair: every caption makes a pair with its photo, each photo stands as often as it has captions, and only the caption
of the very pair counts as right. With five captions a photo, no model can pass 20 % at K = 1. It is reported beside
the standard one because some published runs used it.
"""
import time

import torch
import torch.nn.functional as F

from src.utils.augment import normalize
from src.utils.distributed import collect, rank_and_world
from src.utils.flickr8k_simple import pad_texts

KS = (1, 5, 10)
# Two similarities closer than this are a tie, and a tie counts against the model. Cosines of equal embeddings differ
# by about 1e-7 in float32, depending on where in the matrix they stand.
TIE = 1e-6


def retrieval_ranks(image_embeddings, text_embeddings, photo_of_caption, chunk_size=256):
    """Ranks from 1 (best), ties against the model, of everything that both protocols ask.

    image_embeddings: (N, D), each photo once. text_embeddings: (M, D). photo_of_caption: (M,) the row of each
    caption's photo; a photo may have any number of captions. Cosine similarity, computed for chunk_size captions at a
    time, so that memory grows with N + M and not with N x M.

    Returns a dict of
    - "i2t": (photos with captions,) rank of the best of the photo's captions among the captions of other photos
    - "t2i": (M,) rank of the caption's photo among the photos
    - "pair_i2t": (M,) rank of this one caption among all captions, for its photo
    - "pair_t2i_ahead": (M,) how many of the M photo copies, those of its own photo aside, are ahead of it
    - "copies": (M,) how many copies of the caption's photo there are
    Raises ValueError for embeddings that are not finite (NaN compares as "not ahead", which would be a perfect score),
    for shapes that do not fit, and for no photos or no captions.
    """
    photo_of_caption = torch.as_tensor(photo_of_caption, device=image_embeddings.device, dtype=torch.long)
    num_photos, num_captions = len(image_embeddings), len(text_embeddings)
    if num_photos == 0 or num_captions == 0:
        raise ValueError("retrieval needs at least one photo and one caption")
    if (photo_of_caption.shape != (num_captions,)
            or not 0 <= photo_of_caption.min() <= photo_of_caption.max() < num_photos):
        raise ValueError(f"photo_of_caption must hold {num_captions} indices from 0 to {num_photos - 1}")
    if not (torch.isfinite(image_embeddings).all() and torch.isfinite(text_embeddings).all()):
        raise ValueError("the embeddings hold NaN or infinity")
    images = F.normalize(image_embeddings.float(), dim=-1)
    texts = F.normalize(text_embeddings.float(), dim=-1)
    starts = range(0, num_captions, chunk_size)

    # Every chunk is computed in the same two blocks of memory: made anew, they were seen to pile up to gigabytes.
    space = torch.empty(min(chunk_size, num_captions), num_photos, device=images.device)
    flags = torch.empty_like(space, dtype=torch.bool)

    def similarities(start):
        chunk = texts[start:start + chunk_size]
        return torch.mm(chunk, images.T, out=space[:len(chunk)]), flags[:len(chunk)]

    # First pass: each caption against all photos gives t2i, and the similarity of each caption with its own photo.
    copies_of_photo = torch.bincount(photo_of_caption, minlength=num_photos)
    own, t2i, ahead_copies = [], [], []
    for start in starts:
        photo = photo_of_caption[start:start + chunk_size]
        similarity, ahead = similarities(start)
        own.append(similarity.gather(1, photo[:, None]).squeeze(1))
        torch.ge(similarity, own[-1][:, None] - TIE, out=ahead)
        ahead.scatter_(1, photo[:, None], False)
        t2i.append(ahead.sum(1) + 1)
        ahead_copies.append((similarity.copy_(ahead) @ copies_of_photo.float()).long())
    own = torch.cat(own)

    # Second pass: for every photo, how many captions reach the similarity of each of its own captions. Column j of
    # `own_table` holds the j-th caption's of every photo, infinity where a photo has fewer.
    order = torch.argsort(photo_of_caption, stable=True)
    first = torch.cumsum(copies_of_photo, 0) - copies_of_photo
    column = torch.empty_like(order)
    column[order] = torch.arange(num_captions, device=order.device) - first[photo_of_caption[order]]
    own_table = torch.full((num_photos, int(copies_of_photo.max())), float("inf"), device=own.device)
    own_table[photo_of_caption, column] = own
    best = own_table.masked_fill(own_table.isinf(), float("-inf")).amax(1)
    others_ahead = torch.zeros(num_photos, dtype=torch.long, device=own.device)
    reached = torch.zeros(own_table.shape, dtype=torch.long, device=own.device)
    for start in starts:
        photo = photo_of_caption[start:start + chunk_size]
        similarity, ahead = similarities(start)
        for j in range(own_table.shape[1]):
            reached[:, j] += torch.ge(similarity, own_table[:, j] - TIE, out=ahead).sum(0)
        similarity.scatter_(1, photo[:, None], float("-inf"))  # a photo's own captions are never ahead of its best
        others_ahead += torch.ge(similarity, best - TIE, out=ahead).sum(0)

    return {
        "i2t": others_ahead[copies_of_photo > 0] + 1,
        "t2i": torch.cat(t2i),
        "pair_i2t": reached[photo_of_caption, column],  # the caption itself is among them: a rank from 1
        "pair_t2i_ahead": torch.cat(ahead_copies),
        "copies": copies_of_photo[photo_of_caption],
    }


def retrieval_metrics(image_embeddings, text_embeddings, photo_of_caption, chunk_size=256):
    """R@K in percent and median rank; arguments and errors as for `retrieval_ranks`.

    Returns a dict of floats: {i2t,t2i}_{r1,r5,r10,medr} and avg_r1 = (i2t_r1 + t2i_r1) / 2 by the standard protocol;
    pair_{i2t,t2i}_{r1,r5,r10} and pair_avg_r1 by the pair protocol. The copies of one photo in the pair protocol are
    equal whatever the model does, so their order is taken as random and its expectation is reported.
    """
    ranks = retrieval_ranks(image_embeddings, text_embeddings, photo_of_caption, chunk_size)
    metrics = {}
    for way in ("i2t", "t2i"):
        for k in KS:
            metrics[f"{way}_r{k}"] = 100 * (ranks[way] <= k).double().mean().item()
        metrics[f"{way}_medr"] = ranks[way].double().quantile(0.5).item()
    metrics["avg_r1"] = (metrics["i2t_r1"] + metrics["t2i_r1"]) / 2
    for k in KS:
        metrics[f"pair_i2t_r{k}"] = 100 * (ranks["pair_i2t"] <= k).double().mean().item()
        hit = ((k - ranks["pair_t2i_ahead"].double()) / ranks["copies"]).clamp(0, 1)
        metrics[f"pair_t2i_r{k}"] = 100 * hit.mean().item()
    metrics["pair_avg_r1"] = (metrics["pair_i2t_r1"] + metrics["pair_t2i_r1"]) / 2
    return metrics


@torch.no_grad()
def evaluate(model, dataset, amp_dtype=None, batch_size=256):
    """`retrieval_metrics` of a model on a Flickr8kImageTextDataset: each photo embedded once, each caption once, the
    batches shared out among the processes, if there are several; the result is the same in all of them.

    amp_dtype: the autocast type, None for full precision. The model is left in the mode it was in.
    """
    device, was_training = next(model.parameters()).device, model.training
    rank, world = rank_and_world()
    by_length = sorted(range(len(dataset)), key=lambda i: len(dataset.texts[i]))  # little padding in every batch

    def embed(total, encode):
        own = range(rank * batch_size, total, world * batch_size)
        parts = [(start, encode(start, start + batch_size)["central_latent"].float().cpu()) for start in own]
        return torch.cat([rows for _, rows in sorted(collect(parts), key=lambda part: part[0])]).to(device)

    model.eval()
    with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        images = embed(len(dataset.photos), lambda start, end: model(
            images=normalize(dataset.photos[start:end].to(device))))
        texts = embed(len(dataset), lambda start, end: model(
            text=pad_texts([dataset.texts[i] for i in by_length[start:end]]).to(device)))
    model.train(was_training)
    return retrieval_metrics(images, texts, dataset.photo_of_caption[by_length])


def compare_test_time_training(model, dataset, amp_dtype=None):
    """`evaluate` without and with the memory's test-time updates -> {"off": metrics, "on": metrics, "seconds": {the same}}.

    With them, the memory goes from the trained slots through the photos, then the captions, updating itself at every
    batch, and is then put back. With several processes, each updates on its share.
    """
    results = {"seconds": {}}
    for way in ("off", "on"):
        model.memory.reset()
        if way == "on":
            model.memory.enable_test_time_updates()
        begun = time.perf_counter()
        results[way] = evaluate(model, dataset, amp_dtype)  # ends on the host, so that a GPU has been waited for
        results["seconds"][way] = time.perf_counter() - begun
        model.memory.disable_test_time_updates()
        model.memory.reset()
    return results


def chance_metrics(captions_of_photo):
    """What embeddings at random are expected to score, same keys as `retrieval_metrics` less the median ranks.

    captions_of_photo: (N,) the number of captions of each photo.
    """
    counts = torch.as_tensor(captions_of_photo, dtype=torch.double)
    num_photos, num_captions = len(counts), int(counts.sum())
    counts = counts[counts > 0]
    metrics = {}
    for k in KS:
        # i2t: one minus the probability that k captions, drawn without replacement, are all of other photos.
        miss = torch.ones_like(counts)
        for drawn in range(min(k, num_captions)):
            miss *= ((num_captions - counts - drawn) / (num_captions - drawn)).clamp(min=0)
        metrics[f"i2t_r{k}"] = 100 * (1 - miss).mean().item()
        metrics[f"t2i_r{k}"] = 100 * min(1.0, k / num_photos)
        metrics[f"pair_i2t_r{k}"] = metrics[f"pair_t2i_r{k}"] = 100 * min(1.0, k / num_captions)
    for protocol in ("", "pair_"):
        metrics[f"{protocol}avg_r1"] = (metrics[f"{protocol}i2t_r1"] + metrics[f"{protocol}t2i_r1"]) / 2
    return metrics
