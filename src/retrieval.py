"""Embeddings -> ranks -> recall at K, median rank and rsum.

This is the standard protocol of the field (Hodosh et al. 2013). Each photo is there once, with all
its captions. Photo to text (i2t) is a hit at K if any of the photo's captions is among the K
nearest; text to photo (t2i) ranks the photos for each caption."""
import torch
import torch.nn.functional as F

from src.device import full_float32

KS = (1, 5, 10)
DIRECTIONS = ("i2t", "t2i")
HUBS = 10  # the number of photos that count as hubs, see `hub_share`
# Similarities within this distance are a tie, which counts against the model. The rounding errors
# of equal similarities are about 1e-7.
TIE = 1e-6
CHUNK_SIZE = 256  # captions that are compared with all photos at a time


def retrieval_ranks(image_embeddings, text_embeddings, photo_of_caption, bank=None):
    """Rank photos and captions by cosine similarity, in float32. Ranks begin at 1, and a tie counts
    against the model.

    image_embeddings: (N, D), each photo once. text_embeddings: (M, D). photo_of_caption: (M,), the
    row of each caption's photo. bank: a Bank to rank with, or None. The memory that is needed grows
    with N + M, not with N x M.

    Returns {"i2t": ranks, "t2i": ranks}:
    - "i2t": (photos with captions,), the rank of the nearest of the photo's captions among the
      captions of other photos
    - "t2i": (M,), the rank of the caption's photo among all photos

    Raises ValueError if embeddings are not finite, if shapes do not fit, or if there are no photos
    or no captions."""
    photo_of_caption = torch.as_tensor(photo_of_caption, device=image_embeddings.device).long()
    check_inputs(image_embeddings, text_embeddings, photo_of_caption)
    images = F.normalize(image_embeddings.float(), dim=-1)
    texts = F.normalize(text_embeddings.float(), dim=-1)
    if bank is None:
        t2i, pair_similarity = text_to_photo(texts, images, photo_of_caption)
        i2t = photo_to_text(images, texts, photo_of_caption, pair_similarity)
    else:
        text_queries, photo_gallery = bank.text_queries(texts), bank.photo_gallery(images)
        t2i, _ = text_to_photo(text_queries, photo_gallery, photo_of_caption)
        # With a bank, the similarity of a pair depends on which of the two is the query.
        photo_queries, text_gallery = bank.photo_queries(images), bank.text_gallery(texts)
        pair_similarity = (text_gallery * photo_queries[photo_of_caption]).sum(1)
        i2t = photo_to_text(photo_queries, text_gallery, photo_of_caption, pair_similarity)
    return {"i2t": i2t, "t2i": t2i}


def check_inputs(image_embeddings, text_embeddings, photo_of_caption):
    num_photos, num_captions = len(image_embeddings), len(text_embeddings)
    if num_photos == 0 or num_captions == 0:
        raise ValueError("retrieval needs at least one photo and one caption")
    if (photo_of_caption.shape != (num_captions,)
            or not 0 <= photo_of_caption.min() <= photo_of_caption.max() < num_photos):
        raise ValueError(f"photo_of_caption must hold {num_captions} indices from 0 to "
                         f"{num_photos - 1}")
    if not (torch.isfinite(image_embeddings).all() and torch.isfinite(text_embeddings).all()):
        raise ValueError("the embeddings contain NaN or infinity")


def similarity_chunks(texts, images, photo_of_caption):
    """Yield, for CHUNK_SIZE captions at a time, their rows (a slice), the rows of their photos
    (C, 1), and their similarities with all photos (C, N)."""
    for start in range(0, len(texts), CHUNK_SIZE):
        rows = slice(start, start + CHUNK_SIZE)
        with full_float32():
            similarity = torch.mm(texts[rows], images.T)
        yield rows, photo_of_caption[rows, None], similarity


def text_to_photo(texts, images, photo_of_caption):
    """Return the rank of each caption's photo (M,), and the similarity of the two (M,)."""
    # The results are allocated before the loop. Small tensors that are kept between the large ones
    # of the chunks would fragment the memory of the CPU, and it would grow with every chunk.
    ranks = torch.empty_like(photo_of_caption)
    pair_similarity = torch.empty(len(texts), device=texts.device)
    for rows, photos, similarity in similarity_chunks(texts, images, photo_of_caption):
        correct = similarity.gather(1, photos)
        ahead = similarity >= correct - TIE
        ahead.scatter_(1, photos, False)  # the correct photo is not ahead of itself
        ranks[rows] = ahead.sum(1) + 1
        pair_similarity[rows] = correct.squeeze(1)
    return ranks, pair_similarity


def photo_to_text(images, texts, photo_of_caption, pair_similarity):
    """Return the rank of the nearest caption of each photo that has captions.

    pair_similarity: (M,), the similarity of each caption with its photo."""
    # A photo without captions gets the least possible similarity; it is dropped at the end.
    best = torch.full((len(images),), float("-inf"), device=images.device)
    best.scatter_reduce_(0, photo_of_caption, pair_similarity, "amax")
    ahead = torch.zeros(len(images), dtype=torch.long, device=images.device)
    for _, photos, similarity in similarity_chunks(texts, images, photo_of_caption):
        similarity.scatter_(1, photos, float("-inf"))  # a photo's own captions are not ahead
        ahead += (similarity >= best - TIE).sum(0)
    has_captions = torch.bincount(photo_of_caption, minlength=len(images)) > 0
    return ahead[has_captions] + 1


def retrieval_metrics(image_embeddings, text_embeddings, photo_of_caption, bank=None):
    """The metrics of the standard protocol, as a dict of floats: the recalls {i2t,t2i}_r{1,5,10} in
    percent, the median ranks {i2t,t2i}_medr, and what `with_summaries` adds. The arguments and the
    errors are those of `retrieval_ranks`."""
    ranks = retrieval_ranks(image_embeddings, text_embeddings, photo_of_caption, bank)
    metrics = {}
    for direction in DIRECTIONS:
        for k in KS:
            metrics[f"{direction}_r{k}"] = 100 * (ranks[direction] <= k).double().mean().item()
        metrics[f"{direction}_medr"] = ranks[direction].double().quantile(0.5).item()
    return with_summaries(metrics)


def with_summaries(metrics):
    """The metrics, to which these are added: avg_r1, the mean of both R@1, by which the best epoch
    is chosen, and rsum, the sum of the six recalls, as the field reports it."""
    avg_r1 = (metrics["i2t_r1"] + metrics["t2i_r1"]) / 2
    rsum = sum(metrics[f"{direction}_r{k}"] for direction in DIRECTIONS for k in KS)
    return metrics | {"avg_r1": avg_r1, "rsum": rsum}


def chance_metrics(captions_of_photo):
    """The expected metrics of random embeddings: those of `retrieval_metrics`, except for the
    median ranks. captions_of_photo: (N,), the number of captions of each photo."""
    counts = torch.as_tensor(captions_of_photo, dtype=torch.double)
    num_photos, num_captions = len(counts), int(counts.sum())
    counts = counts[counts > 0]
    metrics = {}
    for k in KS:
        # Photo to text misses if k captions, drawn without replacement, are all of other photos.
        miss = torch.ones_like(counts)
        for drawn in range(min(k, num_captions)):
            miss *= ((num_captions - counts - drawn) / (num_captions - drawn)).clamp(min=0)
        metrics[f"i2t_r{k}"] = 100 * (1 - miss).mean().item()
        metrics[f"t2i_r{k}"] = 100 * min(1.0, k / num_photos)
    return with_summaries(metrics)


def other_caption_ranks(queries, texts, photo_of_caption, photo_of_query, caption_of_query):
    """For queries that belong to a photo and may contain one of its captions: the rank of the
    nearest of the photo's other captions, among the captions of other photos. Ranks begin at 1, and
    a tie counts against the model.

    queries: (Q, D). texts: (M, D). photo_of_caption: (M,). photo_of_query: (Q,), the row of each
    query's photo. caption_of_query: (Q,), the row of the caption that is not ranked.

    Returns the ranks (Q,)."""
    queries, texts = F.normalize(queries, dim=-1), F.normalize(texts, dim=-1)
    ranks = torch.empty_like(photo_of_query)
    for start in range(0, len(queries), CHUNK_SIZE):
        rows = slice(start, start + CHUNK_SIZE)
        with full_float32():
            similarity = queries[rows] @ texts.T
        similarity.scatter_(1, caption_of_query[rows, None], float("-inf"))
        same_photo = photo_of_query[rows, None] == photo_of_caption
        best = similarity.masked_fill(~same_photo, float("-inf")).amax(1, keepdim=True)
        ahead = (similarity >= best - TIE) & ~same_photo
        ranks[rows] = ahead.sum(1) + 1
    return ranks


def hub_share(images, texts, bank=None):
    """How far a few photos, the hubs of the space (Radovanovic et al. 2010), come first for many
    texts: the percentage of texts whose nearest photo is one of the HUBS photos that are nearest
    most often. images: (N, D). texts: (M, D). bank: a Bank to rank with, or None."""
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    if bank is not None:
        images, texts = bank.photo_gallery(images), bank.text_queries(texts)
    nearest = torch.empty(len(texts), dtype=torch.long, device=texts.device)
    for start in range(0, len(texts), CHUNK_SIZE):
        rows = slice(start, start + CHUNK_SIZE)
        with full_float32():
            nearest[rows] = (texts[rows] @ images.T).argmax(1)
    times_nearest = nearest.bincount().sort(descending=True).values
    return 100 * times_nearest[:HUBS].sum().item() / len(nearest)
