"""Embeddings -> recall at K and median rank.

Standard protocol (Hodosh et al. 2013): each photo once, all its captions. Photo to text (i2t) is a
hit at K if any of the photo's captions is among the K nearest; text to photo (t2i) ranks the photos
for each caption. Pair protocol: each photo stands as often as it has captions, and only the caption
of the very pair is right; with five, no model can pass 20 % at K = 1."""
import time

import numpy as np
import torch
import torch.nn.functional as F

from src.losses import full_float32
from src.model import together
from src.utils.augment import normalize
from src.utils.distributed import collect, rank_and_world
from src.utils.flickr8k_simple import map_tensors

KS = (1, 5, 10)
HUBS = 10  # photos that come first most often
TIE = 1e-6  # closer similarities count against the model; those of equals differ by some 1e-7
CHUNK_SIZE = 256  # captions ranked at a time
BATCH_SIZE = 256  # embedded at a time
BANK_SIZE = 5000  # photos in a bank
BETA = 20.0  # of the bank: how much more the nearest count
NEIGHBOURS = 10  # in the bank, which complete a latent
NEIGHBOUR_WEIGHT = 0.2  # of their partners, beside the latent itself


class Bank:
    """Training photos with their captions, remembered while ranking, in two ways.

    A latent is completed by the partners of its nearest in the bank: a photo by the captions of
    photos like it, a text by the photos of captions like it (query expansion and database-side
    augmentation, Arandjelovic and Zisserman 2012, across the modalities). And the hubs of the
    space, the photos that stand near to any text and the texts that stand near to any photo, are
    taken back: the inverted softmax (Smith et al. 2017) with a bank of training queries (Bogolin et
    al. 2022).

    photos: (P, D), texts: (T, D). photo_of_text: (T,) the row of each text's photo, by default its
    own. Of unit length, as precise as float16, in which `state_dict` has them. All methods take
    latents (N, D) of unit length, and raise ValueError for another D. The dot product of a query
    and an item of the gallery is what to rank by: the cosine of the completed, less hubness."""

    def __init__(self, photos, texts, photo_of_text=None):
        self.photos, self.texts = (F.normalize(rows.float(), dim=-1).half().float()
                                   for rows in (photos, texts))
        self.photo_of_text = photo_of_text
        if photo_of_text is None:
            self.photo_of_text = torch.arange(len(texts))
        sums = torch.zeros_like(self.photos).index_add_(0, self.photo_of_text, self.texts)
        self.captions = F.normalize(sums, dim=-1)  # the mean of each photo's

    @property
    def nbytes(self):
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def state_dict(self):
        return {"photos": self.photos.half(), "texts": self.texts.half(),
                "photo_of_text": self.photo_of_text}

    def text_queries(self, texts):
        """-> (N, D + 1), for a gallery of photos."""
        return self._queries(*self._complete_texts(texts))

    def photo_queries(self, photos):
        """-> (N, D + 1), for a gallery of texts."""
        return self._queries(*self._complete_photos(photos))

    def photo_gallery(self, photos):
        """-> (N, D + 1), for texts that look for photos."""
        return self._gallery(*self._complete_photos(photos))

    def text_gallery(self, texts):
        """-> (N, D + 1), for photos that look for texts."""
        return self._gallery(*self._complete_texts(texts))

    @staticmethod
    def _queries(completed, hubness):
        return torch.cat([completed, torch.ones_like(hubness)[:, None]], 1)

    @staticmethod
    def _gallery(completed, hubness):
        return torch.cat([completed, -hubness[:, None]], 1)

    def _complete_photos(self, photos):
        partner_of = torch.arange(len(self.photos))
        return self._complete(photos, self.photos, self.captions, partner_of, self.texts)

    def _complete_texts(self, texts):
        return self._complete(texts, self.texts, self.photos, self.photo_of_text, self.photos)

    @staticmethod
    def _complete(latents, alike, partners, partner_of, others):
        """-> the completed (N, D), of unit length, and their hubness (N,): how near each stands to
        the others in general. partner_of: the row among the partners of each of `alike`."""
        if latents.shape[1] != alike.shape[1]:
            raise ValueError(f"the bank's latents have a width of {alike.shape[1]}, these of "
                             f"{latents.shape[1]}")
        alike, partners, partner_of, others = (
            bank.to(latents.device) for bank in (alike, partners, partner_of, others))
        completed, hubness = [], []
        with full_float32():
            for chunk in latents.split(CHUNK_SIZE):
                nearest, rows = (chunk @ alike.T).topk(min(NEIGHBOURS, len(alike)), 1)
                weights = NEIGHBOUR_WEIGHT * (BETA * nearest).softmax(1)
                chunk = chunk + (weights[:, :, None] * partners[partner_of[rows]]).sum(1)
                completed.append(F.normalize(chunk, dim=-1))
                hubness.append((BETA * (completed[-1] @ others.T)).logsumexp(1) / BETA)
        return torch.cat(completed), torch.cat(hubness)


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
        parts = sorted(collect(parts), key=lambda part: part[0])
        return torch.cat([latents for _, latents in parts]).to(device)

    def photo_inputs(part):
        images = dataset.photos[photos[part]]
        if images.dtype != torch.uint8:
            return {"images": images[:, 0].to(device)}  # not the mirror image's features
        if pixels not in (None, images.shape[-1]):
            images = F.interpolate(images, (pixels, pixels), mode="bicubic", antialias=True)
        inputs = {"images": normalize(images.to(device))}
        if dataset.vectors is not None:
            inputs["vectors"] = dataset.vectors[photos[part]].to(device)
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
    "together": `compare_together`}."""
    photos, texts, photo_of_caption = embed_dataset(model, dataset, amp_dtype)
    results = {"hub_share": {}}
    for mode, used in (("off", None), ("on", bank)):
        results[mode] = retrieval_metrics(photos, texts, photo_of_caption, used)
        results["hub_share"][mode] = hub_share(photos, texts, used)
    results["together"] = compare_together(photos, texts, photo_of_caption)
    return results


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


def compare_together(photos, texts, photo_of_caption):
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
                  "both": together(photos[asked], texts[own])}
    results = {}
    for name, queries in queries_of.items():
        ranks = ranks_of_others(queries, texts, owners, asked, own)
        results[name] = {f"r{k}": 100 * (ranks <= k).double().mean().item() for k in KS}
    return results


def hub_share(photos, texts, bank=None):
    """Percentage of texts (M, D) whose first photo, of (N, D), is one of the HUBS commonest."""
    photos, texts = F.normalize(photos, dim=-1), F.normalize(texts, dim=-1)
    if bank is not None:
        photos, texts = bank.photo_gallery(photos), bank.text_queries(texts)
    with full_float32():
        first = torch.cat([(chunk @ photos.T).argmax(1) for chunk in texts.split(CHUNK_SIZE)])
    times = first.bincount(minlength=HUBS).sort(descending=True).values
    return 100 * times[:HUBS].sum().item() / len(first)


def compare_test_time_training(model, dataset):
    """`evaluate` without and with the memory's test-time updates, which go from the trained slots
    through the photos, then the captions -> {"off": metrics, "on": metrics, "seconds": alike}."""
    results = {"seconds": {}}
    for mode in ("off", "on"):
        model.memory.reset()
        if mode == "on":
            model.memory.enable_test_time_updates()
        start = time.perf_counter()
        results[mode] = evaluate(model, dataset)  # ends on the host: a GPU has been waited for
        results["seconds"][mode] = time.perf_counter() - start
        model.memory.disable_test_time_updates()
        model.memory.reset()
    return results


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
