"""Training pairs that are remembered while ranking."""
import torch
import torch.nn.functional as F

from src.device import full_float32
from src.retrieval import CHUNK_SIZE

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


