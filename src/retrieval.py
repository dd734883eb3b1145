"""Embeddings -> recall at K and median rank.

Standard protocol (Hodosh et al. 2013): each photo once, all its captions. Photo to text (i2t) is a
hit at K if any of the photo's captions is among the K nearest; text to photo (t2i) ranks the photos
for each caption. Pair protocol: each photo stands as often as it has captions, and only the caption
of the very pair is right; with five, no model can pass 20 % at K = 1."""
import torch
import torch.nn.functional as F

from src.device import full_float32

KS = (1, 5, 10)
HUBS = 10  # photos that come first most often
TIE = 1e-6  # closer similarities count against the model; those of equals differ by some 1e-7
CHUNK_SIZE = 256  # captions ranked at a time


def retrieval_ranks(image_embeddings, text_embeddings, photo_of_caption, bank=None):
    """Ranks from 1 (best), ties against the model, of everything that both protocols ask.

    image_embeddings: (N, D), each photo once. text_embeddings: (M, D). photo_of_caption: (M,) the
    row of each caption's photo. bank: a Bank to rank with. Cosine similarity in float32, for
    CHUNK_SIZE captions at a time: memory grows with N + M, not with N x M.

    Returns a dict of
    - "i2t": (photos with captions,) of the best of the photo's captions among those of other photos
    - "t2i": (M,) of the caption's photo among the photos
    - "pair_i2t": (M,) of this one caption among all captions, for its photo
    - "pair_t2i_ahead": (M,) how many of the M photo copies, its own photo's aside, are ahead of it
    - "copies": (M,) how many copies of the caption's photo there are

    Raises ValueError for embeddings that are not finite, shapes that do not fit, and no photos or
    captions."""
    photo_of_caption = torch.as_tensor(photo_of_caption, device=image_embeddings.device).long()
    num_photos, num_captions = len(image_embeddings), len(text_embeddings)
    if num_photos == 0 or num_captions == 0:
        raise ValueError("retrieval needs at least one photo and one caption")
    if (photo_of_caption.shape != (num_captions,)
            or not 0 <= photo_of_caption.min() <= photo_of_caption.max() < num_photos):
        raise ValueError(f"photo_of_caption must hold {num_captions} indices from 0 to "
                         f"{num_photos - 1}")
    if not (torch.isfinite(image_embeddings).all() and torch.isfinite(text_embeddings).all()):
        raise ValueError("the embeddings hold NaN or infinity")
    images = F.normalize(image_embeddings.float(), dim=-1)
    texts = F.normalize(text_embeddings.float(), dim=-1)
    copies_of_photo = torch.bincount(photo_of_caption, minlength=num_photos)

    # Every chunk is computed in the same memory: made anew, the blocks pile up.
    space = torch.empty(min(CHUNK_SIZE, num_captions), num_photos, device=images.device)
    flags = torch.empty_like(space, dtype=torch.bool)

    def chunks(texts, images):  # their photos, similarities with all photos, and flags
        for start in range(0, num_captions, CHUNK_SIZE):
            chunk = texts[start:start + CHUNK_SIZE]
            with full_float32():
                similarity = torch.mm(chunk, images.T, out=space[:len(chunk)])
            yield photo_of_caption[start:start + CHUNK_SIZE], similarity, flags[:len(chunk)]

    # Each caption against all photos.
    rows = (texts, images)
    if bank is not None:
        rows = bank.text_queries(texts), bank.photo_gallery(images)
    own, t2i, ahead_copies = [], [], []
    for photo, similarity, ahead in chunks(*rows):
        own.append(similarity.gather(1, photo[:, None]).squeeze(1))
        torch.ge(similarity, own[-1][:, None] - TIE, out=ahead)
        ahead.scatter_(1, photo[:, None], False)
        t2i.append(ahead.sum(1) + 1)
        ahead_copies.append((similarity.copy_(ahead) @ copies_of_photo.float()).long())
    own = torch.cat(own)
    if bank is not None:
        rows = bank.text_gallery(texts), bank.photo_queries(images)
        own = (rows[0] * rows[1][photo_of_caption]).sum(1)
    others_ahead, pair_i2t = _rank_captions(own, photo_of_caption, copies_of_photo, chunks(*rows))
    return {
        "i2t": others_ahead[copies_of_photo > 0] + 1,
        "t2i": torch.cat(t2i),
        "pair_i2t": pair_i2t,
        "pair_t2i_ahead": torch.cat(ahead_copies),
        "copies": copies_of_photo[photo_of_caption],
    }


def _rank_captions(own, photo_of_caption, copies_of_photo, chunks):
    """Each photo against all captions -> how many of other photos are ahead of its best (N,), and
    each caption's rank for its photo (M,). own: (M,) similarity of caption and photo."""
    # Column j of own_table holds the j-th caption's of every photo, infinity where there is none.
    order = torch.argsort(photo_of_caption, stable=True)
    first = torch.cumsum(copies_of_photo, 0) - copies_of_photo
    column = torch.empty_like(order)
    places = torch.arange(len(own), device=order.device)
    column[order] = places - first[photo_of_caption[order]]
    shape = len(copies_of_photo), int(copies_of_photo.max())
    own_table = torch.full(shape, float("inf"), device=own.device)
    own_table[photo_of_caption, column] = own
    best = own_table.masked_fill(own_table.isinf(), float("-inf")).amax(1)
    others_ahead = torch.zeros(len(copies_of_photo), dtype=torch.long, device=own.device)
    reached = torch.zeros(shape, dtype=torch.long, device=own.device)
    for photo, similarity, ahead in chunks:
        for j in range(shape[1]):
            reached[:, j] += torch.ge(similarity, own_table[:, j] - TIE, out=ahead).sum(0)
        similarity.scatter_(1, photo[:, None], float("-inf"))  # a photo's own are not ahead
        others_ahead += torch.ge(similarity, best - TIE, out=ahead).sum(0)
    return others_ahead, reached[photo_of_caption, column]


def _with_averages(metrics):
    for protocol in ("", "pair_"):
        both = metrics[f"{protocol}i2t_r1"] + metrics[f"{protocol}t2i_r1"]
        metrics[f"{protocol}avg_r1"] = both / 2
    return metrics


def retrieval_metrics(image_embeddings, text_embeddings, photo_of_caption, bank=None):
    """R@K in percent and median rank, floats; arguments and errors as for `retrieval_ranks`:
    {i2t,t2i}_{r1,r5,r10,medr}, avg_r1 = (i2t_r1 + t2i_r1) / 2 and, by the pair protocol,
    pair_{i2t,t2i}_{r1,r5,r10} and pair_avg_r1; the copies of one photo being equal, their order is
    taken as random."""
    ranks = retrieval_ranks(image_embeddings, text_embeddings, photo_of_caption, bank)
    metrics = {}
    for direction in ("i2t", "t2i"):
        for k in KS:
            metrics[f"{direction}_r{k}"] = 100 * (ranks[direction] <= k).double().mean().item()
        metrics[f"{direction}_medr"] = ranks[direction].double().quantile(0.5).item()
    for k in KS:
        metrics[f"pair_i2t_r{k}"] = 100 * (ranks["pair_i2t"] <= k).double().mean().item()
        hit = ((k - ranks["pair_t2i_ahead"].double()) / ranks["copies"]).clamp(0, 1)
        metrics[f"pair_t2i_r{k}"] = 100 * hit.mean().item()
    return _with_averages(metrics)


def ranks_of_others(queries, texts, photo_of_caption, photo_of_query, own):
    """Ranks from 1, ties against the model, of each query's best caption, a photo's `own` aside.

    queries: (Q, D), texts: (M, D). photo_of_caption: (M,), photo_of_query: (Q,). own: (Q,) row of
    the caption that is no candidate."""
    texts, ranks = F.normalize(texts, dim=-1), []
    for rows in torch.arange(len(queries), device=queries.device).split(CHUNK_SIZE):
        with full_float32():
            similarity = F.normalize(queries[rows], dim=-1) @ texts.T
        similarity.scatter_(1, own[rows, None], float("-inf"))
        right = photo_of_query[rows, None] == photo_of_caption
        best = similarity.masked_fill(~right, float("-inf")).amax(1, keepdim=True)
        ranks.append(((similarity >= best - TIE) & ~right).sum(1) + 1)
    return torch.cat(ranks)


def hub_share(photos, texts, bank=None):
    """Percentage of texts (M, D) whose first photo, of (N, D), is one of the HUBS commonest."""
    photos, texts = F.normalize(photos, dim=-1), F.normalize(texts, dim=-1)
    if bank is not None:
        photos, texts = bank.photo_gallery(photos), bank.text_queries(texts)
    with full_float32():
        first = torch.cat([(chunk @ photos.T).argmax(1) for chunk in texts.split(CHUNK_SIZE)])
    times = first.bincount(minlength=HUBS).sort(descending=True).values
    return 100 * times[:HUBS].sum().item() / len(first)


def chance_metrics(captions_of_photo):
    """What random embeddings are expected to score, keys as of `retrieval_metrics` less the median
    ranks. captions_of_photo: (N,) the number of captions of each photo."""
    counts = torch.as_tensor(captions_of_photo, dtype=torch.double)
    num_photos, num_captions = len(counts), int(counts.sum())
    counts = counts[counts > 0]
    metrics = {}
    for k in KS:
        # i2t: one less the probability that k captions, drawn at random, are all others'.
        miss = torch.ones_like(counts)
        for drawn in range(min(k, num_captions)):
            miss *= ((num_captions - counts - drawn) / (num_captions - drawn)).clamp(min=0)
        metrics[f"i2t_r{k}"] = 100 * (1 - miss).mean().item()
        metrics[f"t2i_r{k}"] = 100 * min(1.0, k / num_photos)
        metrics[f"pair_i2t_r{k}"] = metrics[f"pair_t2i_r{k}"] = 100 * min(1.0, k / num_captions)
    return _with_averages(metrics)
