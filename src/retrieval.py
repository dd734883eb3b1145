"""Embeddings -> ranks -> recall at K, median rank and rsum.

This is the standard protocol of the field (Hodosh et al. 2013). Each photo is there once, with all
its captions. Photo to text (i2t) is a hit at K if any of the photo's captions is among the K
nearest; text to photo (t2i) ranks the photos for each caption.

Where many photos share their captions, as class names are shared, a text is right for every photo
that has it. `text_ids` then say which captions are equal, and each different text is ranked once.
Without them every caption counts as a text of its own, as the field does it on Flickr8k."""
import numpy as np
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


def retrieval_ranks(image_embeddings, text_embeddings, photo_of_caption, bank=None, text_ids=None):
    """Rank photos and captions by cosine similarity, in float32. Ranks begin at 1, and a tie counts
    against the model.

    image_embeddings: (N, D), each photo once. text_embeddings: (M, D). photo_of_caption: (M,), the
    row of each caption's photo. bank: a Bank to rank with, or None. text_ids: (M,) integers, equal
    for equal captions, the first of which is ranked for all; None if all captions count as
    different. A text is right for every photo that has it. The memory that is needed grows with
    N + M, not with N x M.

    Returns {"i2t": ranks, "t2i": ranks}:
    - "i2t": (photos with captions,), the rank of the nearest of the photo's texts among the
      different texts that it does not have
    - "t2i": (M,), the rank of the nearest of the photos that have the text among those that do not

    Raises ValueError if embeddings are not finite, if shapes do not fit, or if there are no photos
    or no captions."""
    device = image_embeddings.device
    photo_of_caption = torch.as_tensor(photo_of_caption, device=device).long()
    check_inputs(image_embeddings, text_embeddings, photo_of_caption, text_ids)
    first_captions, text_of_caption = different_texts(
        text_ids, len(text_embeddings), device)
    pairs = correct_pairs(text_of_caption, photo_of_caption)
    text_of_pair, photo_of_pair = pairs
    images = F.normalize(image_embeddings.float(), dim=-1)
    texts = F.normalize(text_embeddings[first_captions].float(), dim=-1)
    if bank is None:
        t2i, pair_similarity = text_to_photo(texts, images, pairs)
        i2t = photo_to_text(images, texts, pairs, pair_similarity)
    else:
        text_queries, photo_gallery = bank.text_queries(texts), bank.photo_gallery(images)
        t2i, _ = text_to_photo(text_queries, photo_gallery, pairs)
        # With a bank, the similarity of a pair depends on which of the two is the query.
        photo_queries, text_gallery = bank.photo_queries(images), bank.text_gallery(texts)
        pair_similarity = (text_gallery[text_of_pair] * photo_queries[photo_of_pair]).sum(1)
        i2t = photo_to_text(photo_queries, text_gallery, pairs, pair_similarity)
    return {"i2t": i2t, "t2i": t2i[text_of_caption]}


def check_inputs(image_embeddings, text_embeddings, photo_of_caption, text_ids):
    num_photos, num_captions = len(image_embeddings), len(text_embeddings)
    if num_photos == 0 or num_captions == 0:
        raise ValueError("retrieval needs at least one photo and one caption")
    if (photo_of_caption.shape != (num_captions,)
            or not 0 <= photo_of_caption.min() <= photo_of_caption.max() < num_photos):
        raise ValueError(f"photo_of_caption must hold {num_captions} indices from 0 to "
                         f"{num_photos - 1}")
    if text_ids is not None and (np.shape(text_ids) != (num_captions,)
                                 or isinstance(text_ids[0], str)):
        raise ValueError(f"text_ids must hold {num_captions} integers")
    if not (torch.isfinite(image_embeddings).all() and torch.isfinite(text_embeddings).all()):
        raise ValueError("the embeddings contain NaN or infinity")


def different_texts(text_ids, num_captions, device):
    """Return the row of the first caption of each of the T different texts (T,), and the text of
    each caption, from 0 to T - 1 (M,). text_ids: see `retrieval_ranks`."""
    if text_ids is None:
        captions = torch.arange(num_captions, device=device)
        return captions, captions
    text_ids = torch.as_tensor(text_ids).cpu().numpy()
    _, first_captions, text_of_caption = np.unique(
        text_ids, return_index=True, return_inverse=True)
    return (torch.from_numpy(first_captions).to(device),
            torch.from_numpy(text_of_caption).to(device))


def correct_pairs(text_of_caption, photo_of_caption):
    """Return the texts and the photos that belong together, each pair once and sorted by text: rows
    of texts (P,) and of photos (P,)."""
    num_photos = int(photo_of_caption.max()) + 1
    pairs = (text_of_caption * num_photos + photo_of_caption).unique()
    return pairs // num_photos, pairs % num_photos


def similarity_chunks(texts, images, pairs):
    """Yield, for CHUNK_SIZE texts at a time, their rows (a slice), the slice of their pairs, where
    these pairs are in the chunk (two indices), and the similarities of the texts with all photos
    (C, N)."""
    text_of_pair, photo_of_pair = pairs
    starts = torch.arange(0, len(texts) + CHUNK_SIZE, CHUNK_SIZE, device=texts.device)
    edges = torch.searchsorted(text_of_pair, starts).tolist()
    for i, start in enumerate(range(0, len(texts), CHUNK_SIZE)):
        rows, chunk_pairs = slice(start, start + CHUNK_SIZE), slice(*edges[i:i + 2])
        places = text_of_pair[chunk_pairs] - start, photo_of_pair[chunk_pairs]
        with full_float32():
            similarity = torch.mm(texts[rows], images.T)
        yield rows, chunk_pairs, places, similarity


def text_to_photo(texts, images, pairs):
    """Return the rank of the nearest correct photo of each text (T,), and the similarity of each
    correct pair (P,). pairs: see `correct_pairs`."""
    # The results are allocated before the loop. Small tensors that are kept between the large ones
    # of the chunks would fragment the memory of the CPU, and it would grow with every chunk.
    ranks = torch.empty(len(texts), dtype=torch.long, device=texts.device)
    pair_similarity = torch.empty(len(pairs[0]), device=texts.device)
    for rows, chunk_pairs, places, similarity in similarity_chunks(texts, images, pairs):
        pair_similarity[chunk_pairs] = similarity[places]
        best = torch.full((len(similarity),), float("-inf"), device=texts.device)
        best.scatter_reduce_(0, places[0], pair_similarity[chunk_pairs], "amax")
        ahead = similarity >= best[:, None] - TIE
        ahead[places] = False  # a correct photo is not ahead of another one
        ranks[rows] = ahead.sum(1) + 1
    return ranks, pair_similarity


def photo_to_text(images, texts, pairs, pair_similarity):
    """Return the rank of the nearest text of each photo that has captions.

    pairs: see `correct_pairs`. pair_similarity: (P,)."""
    # A photo without captions gets the least possible similarity; it is dropped at the end.
    best = torch.full((len(images),), float("-inf"), device=images.device)
    best.scatter_reduce_(0, pairs[1], pair_similarity, "amax")
    ahead = torch.zeros(len(images), dtype=torch.long, device=images.device)
    for _, _, places, similarity in similarity_chunks(texts, images, pairs):
        similarity[places] = float("-inf")  # a photo's own texts are not ahead
        ahead += (similarity >= best - TIE).sum(0)
    has_captions = torch.bincount(pairs[1], minlength=len(images)) > 0
    return ahead[has_captions] + 1


def retrieval_metrics(image_embeddings, text_embeddings, photo_of_caption, bank=None,
                      text_ids=None):
    """The metrics of the standard protocol, as a dict of floats: the recalls {i2t,t2i}_r{1,5,10} in
    percent, the median ranks {i2t,t2i}_medr, and what `with_summaries` adds. With text_ids, a text
    is right for every photo that has it. The arguments and the errors are those of
    `retrieval_ranks`."""
    ranks = retrieval_ranks(image_embeddings, text_embeddings, photo_of_caption, bank, text_ids)
    metrics = {}
    for direction in DIRECTIONS:
        of_direction = ranks[direction].cpu()  # the GPU of a Mac has no float64
        for k in KS:
            metrics[f"{direction}_r{k}"] = 100 * (of_direction <= k).double().mean().item()
        metrics[f"{direction}_medr"] = of_direction.double().quantile(0.5).item()
    return with_summaries(metrics)


def with_summaries(metrics):
    """The metrics, to which these are added: avg_r1, the mean of both R@1, by which the best epoch
    is chosen, and rsum, the sum of the six recalls, as the field reports it."""
    avg_r1 = (metrics["i2t_r1"] + metrics["t2i_r1"]) / 2
    rsum = sum(metrics[f"{direction}_r{k}"] for direction in DIRECTIONS for k in KS)
    return metrics | {"avg_r1": avg_r1, "rsum": rsum}


def chance_metrics(texts_of_photo, photos_of_caption=(1,), num_texts=None):
    """The expected metrics of random embeddings: those of `retrieval_metrics`, except for the
    median ranks. texts_of_photo: (N,), the number of different texts of each photo.
    photos_of_caption: (M,), the number of photos that have the text of each caption; by default
    one. num_texts: the number of different texts, by default the sum of texts_of_photo."""
    texts_of_photo = torch.as_tensor(texts_of_photo, dtype=torch.double)
    photos_of_caption = torch.as_tensor(photos_of_caption, dtype=torch.double)
    num_photos = len(texts_of_photo)
    num_texts = int(texts_of_photo.sum()) if num_texts is None else num_texts
    texts_of_photo = texts_of_photo[texts_of_photo > 0]

    def hit_rate(correct, total, k):
        """The probability that k items, drawn without replacement, are not all wrong."""
        miss = torch.ones_like(correct)
        for drawn in range(min(k, total)):
            miss *= ((total - correct - drawn) / (total - drawn)).clamp(min=0)
        return 1 - miss

    metrics = {}
    for k in KS:
        metrics[f"i2t_r{k}"] = 100 * hit_rate(texts_of_photo, num_texts, k).mean().item()
        metrics[f"t2i_r{k}"] = 100 * hit_rate(photos_of_caption, num_photos, k).mean().item()
    return with_summaries(metrics)


def other_caption_ranks(queries, texts, photo_of_caption, photo_of_query, caption_of_query,
                        text_ids=None):
    """For queries that belong to a photo and may contain one of its captions: the rank of the
    nearest of the photo's other texts, among the different texts that the photo does not have.
    Ranks begin at 1, and a tie counts against the model.

    queries: (Q, D). texts: (M, D). photo_of_caption: (M,). photo_of_query: (Q,), the row of each
    query's photo. caption_of_query: (Q,), the row of the caption whose text is not ranked.
    text_ids: see `retrieval_ranks`.

    Returns the ranks (Q,)."""
    first_captions, text_of_caption = different_texts(
        text_ids, len(texts), texts.device)
    texts = F.normalize(texts[first_captions], dim=-1)
    queries, text_of_query = F.normalize(queries, dim=-1), text_of_caption[caption_of_query]
    ranks = torch.empty_like(photo_of_query)
    for start in range(0, len(queries), CHUNK_SIZE):
        rows = slice(start, start + CHUNK_SIZE)
        with full_float32():
            similarity = queries[rows] @ texts.T
        similarity.scatter_(1, text_of_query[rows, None], float("-inf"))
        same_photo = photo_of_query[rows, None] == photo_of_caption
        times = torch.zeros_like(similarity).index_add_(1, text_of_caption, same_photo.float())
        is_correct = times > 0
        best = similarity.masked_fill(~is_correct, float("-inf")).amax(1, keepdim=True)
        ahead = (similarity >= best - TIE) & ~is_correct
        ranks[rows] = ahead.sum(1) + 1
    return ranks


def hub_share(images, texts, bank=None, text_ids=None):
    """How far a few photos, the hubs of the space (Radovanovic et al. 2010), come first for many
    texts: the percentage of different texts whose nearest photo is one of the HUBS photos that are
    nearest most often. images: (N, D). texts: (M, D). bank, text_ids: see `retrieval_ranks`."""
    first_captions, _ = different_texts(text_ids, len(texts), texts.device)
    images, texts = F.normalize(images, dim=-1), F.normalize(texts[first_captions], dim=-1)
    if bank is not None:
        images, texts = bank.photo_gallery(images), bank.text_queries(texts)
    nearest = torch.empty(len(texts), dtype=torch.long, device=texts.device)
    for start in range(0, len(texts), CHUNK_SIZE):
        rows = slice(start, start + CHUNK_SIZE)
        with full_float32():
            nearest[rows] = (texts[rows] @ images.T).argmax(1)
    times_nearest = nearest.bincount().sort(descending=True).values
    return 100 * times_nearest[:HUBS].sum().item() / len(nearest)
