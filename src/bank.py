"""The bank: training photos and captions that help to rank other photos and captions."""
import functools

import torch
import torch.nn.functional as F

from src.device import full_float32
from src.ranking import similarities
from src.retrieval import CHUNK_SIZE

BANK_SIZE = 5000  # the largest number of photos in a bank
BETA = 20.0  # inverse temperature of the softmaxes over neighbours and over hubs
NEIGHBOURS = 10  # nearest items of the bank by which a latent is expanded
FAMILIAR = 5000  # captions with which a text is compared; to take all is no better
SAMPLE = 500  # captions that tell how near captions are to each other
UNUSUAL = 0.005  # the share of them that do not count as familiar
NEIGHBOUR_WEIGHT = 0.2  # weight of their partners, relative to the latent itself


class Bank:
    """Latents of training photos and of their captions, which improve a ranking in two ways.

    1. A latent is expanded by the partners of its nearest neighbours in the bank: a photo by the
       captions of similar photos, a text by the photos of similar captions. This is query expansion
       and database-side augmentation (Arandjelovic and Zisserman 2012), across the modalities.
    2. Hubs are corrected for. These are photos that are near to almost any text, or texts that are
       near to almost any photo. How near an item is to the bank in general is subtracted from its
       similarities: the inverted softmax (Smith et al. 2017) with training queries (Bogolin et al.
       2022). Where photos share captions this is left out, as a text is then rightly near to many
       photos.

    The dot product of a query and of an item of the gallery, as the methods return them, is the
    cosine of the expanded latents minus the hubness of the item. All methods take latents (N, D) of
    unit length, return (N, D + 1), and raise ValueError if D is not that of the bank."""

    def __init__(self, photos, texts, photo_of_text, correct_hubs=True):
        """photos: (P, D). texts: (T, D). photo_of_text: (T,), the row of each text's photo.
        correct_hubs: whether to correct for hubs.

        The latents get unit length. They are rounded to float16, in which `state_dict` returns
        them, so that a bank ranks the same before and after it is saved."""
        self.photos = F.normalize(photos.float(), dim=-1).half().float()
        self.texts = F.normalize(texts.float(), dim=-1).half().float()
        self.photo_of_text, self.correct_hubs = photo_of_text, correct_hubs
        sums = torch.zeros_like(self.photos).index_add_(0, photo_of_text, self.texts)
        self.mean_texts = F.normalize(sums, dim=-1)  # of the texts of each photo

    @property
    def nbytes(self):
        state = self.state_dict().values()
        return sum(value.nbytes for value in state if isinstance(value, torch.Tensor))

    def state_dict(self):
        return {"photos": self.photos.half(), "texts": self.texts.half(),
                "photo_of_text": self.photo_of_text, "correct_hubs": self.correct_hubs}

    def is_familiar(self, text):
        """Whether a text, given by its latent (1, D) of unit length, is about as near to a caption
        of the bank as captions of different photos are to each other. Other words mean nothing to
        the model, although every ranking has a first photo."""
        texts, lowest_cosine = self._familiar_texts
        return similarities(text, texts).max().item() > lowest_cosine

    @functools.cached_property
    def _familiar_texts(self):
        """At most FAMILIAR of the captions, and the cosine with the nearest different one of
        another photo that all but an UNUSUAL share of SAMPLE captions reach."""
        rows, sample = (torch.linspace(0, len(self.texts) - 1, min(number, len(self.texts))).long()
                        for number in (FAMILIAR, SAMPLE))
        texts = self.texts[rows]
        cosines = self.texts[sample] @ texts.T
        same_photo = self.photo_of_text[sample, None] == self.photo_of_text[rows]
        same_text = cosines > 1 - 1e-3  # the latents are rounded
        nearest = cosines.masked_fill(same_photo | same_text, -1.0).amax(1)
        return texts, nearest.quantile(UNUSUAL).item()

    def text_queries(self, texts):
        """Texts as queries, for a gallery of photos."""
        return self._queries(self._expand_texts(texts))

    def photo_queries(self, photos):
        """Photos as queries, for a gallery of texts."""
        return self._queries(self._expand_photos(photos))

    def photo_gallery(self, photos):
        """Photos as a gallery, for queries that are texts."""
        return self._gallery(self._expand_photos(photos), self.texts)

    def text_gallery(self, texts):
        """Texts as a gallery, for queries that are photos."""
        return self._gallery(self._expand_texts(texts), self.photos)

    @staticmethod
    def _queries(expanded):
        return F.pad(expanded, (0, 1), value=1.0)

    def _gallery(self, expanded, queries):
        """queries: (Q, D), the bank's latents of the other modality."""
        if self.correct_hubs:
            hubness = self._hubness(expanded, queries)
        else:
            hubness = torch.zeros_like(expanded[:, 0])
        return torch.cat([expanded, -hubness[:, None]], 1)

    def _expand_photos(self, photos):
        partner_of_photo = torch.arange(len(self.photos))
        return self._expand(photos, self.photos, self.mean_texts, partner_of_photo)

    def _expand_texts(self, texts):
        return self._expand(texts, self.texts, self.photos, self.photo_of_text)

    @staticmethod
    def _expand(latents, neighbours, partners, partner_of_neighbour):
        """Expand latents by the partners of their nearest neighbours, as attention does with
        queries, keys and values. Returns the expanded latents (N, D), of unit length.

        latents: (N, D). neighbours: (K, D), the bank's latents of the same modality. partners:
        (P, D), latents of the other modality. partner_of_neighbour: (K,), rows of `partners`."""
        if latents.shape[1] != neighbours.shape[1]:
            raise ValueError(f"the latents have a width of {latents.shape[1]}, but those of the "
                             f"bank have a width of {neighbours.shape[1]}")
        device = latents.device
        neighbours, partners = neighbours.to(device), partners.to(device)
        partner_of_neighbour = partner_of_neighbour.to(device)
        expanded = torch.empty_like(latents)
        with full_float32():
            for start in range(0, len(latents), CHUNK_SIZE):
                rows = slice(start, start + CHUNK_SIZE)
                if len(latents) == 1 and device.type == "cpu":  # a search, which should be fast
                    cosines = similarities(latents, neighbours)
                else:
                    cosines = latents[rows] @ neighbours.T
                nearest, nearest_rows = cosines.topk(min(NEIGHBOURS, len(neighbours)), 1)
                weights = NEIGHBOUR_WEIGHT * (BETA * nearest).softmax(1)
                values = partners[partner_of_neighbour[nearest_rows]]
                sums = latents[rows] + (weights[:, :, None] * values).sum(1)
                expanded[rows] = F.normalize(sums, dim=-1)
        return expanded

    @staticmethod
    def _hubness(expanded, queries):
        """The hubness (N,) of expanded latents: a smooth maximum (log-sum-exp) of their cosines
        with the bank's queries (Q, D)."""
        queries = queries.to(expanded.device)
        hubness = torch.empty(len(expanded), device=expanded.device)
        with full_float32():
            for start in range(0, len(expanded), CHUNK_SIZE):
                rows = slice(start, start + CHUNK_SIZE)
                hubness[rows] = (BETA * (expanded[rows] @ queries.T)).logsumexp(1) / BETA
        return hubness
