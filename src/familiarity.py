"""Whether a search has found anything, judged by what captions of the training split find.

A ranking always has a first photo. Whether it fits is told by two comparisons with the captions in
the run's bank: how near the words are to anything that the model has learned, and how high the
best photo scores."""
import torch

from src.ranking import similarities

SAMPLE = 250  # captions of the bank that are compared
UNUSUAL = 0.02  # share of these that are less familiar, or find less, than what passes for a find
CHUNK = 100  # texts that are compared with a gallery at a time


class Familiarity:
    """The captions of a bank as a scale for other texts.

    bank: the Bank of a run. lowest_cosine: the cosine with the nearest caption of another photo
    that all but an UNUSUAL share of the captions reach."""

    def __init__(self, bank):
        self.texts = bank.texts
        self.rows = torch.linspace(0, len(bank.texts) - 1, min(SAMPLE, len(bank.texts))).long()
        cosines = bank.texts[self.rows] @ bank.texts.T
        own = bank.photo_of_text[self.rows, None] == bank.photo_of_text
        equal = cosines > 1 - 1e-3  # such as class names that photos share
        nearest = cosines.masked_fill(own | equal, -1.0).amax(1)
        self.lowest_cosine = nearest.quantile(UNUSUAL).item()

    def knows(self, text):
        """Whether a text, given by its embedding (1, D), is as near to a caption of the bank as
        these are to each other."""
        return similarities(text, self.texts).max().item() > self.lowest_cosine

    def lowest_score(self, score_photos):
        """The score that the best photo of a gallery reaches for all but an UNUSUAL share of the
        captions. score_photos: a function from the embeddings (Q, D) of texts to the scores (Q, N)
        of the gallery's photos."""
        best = [score_photos(texts).amax(1) for texts in self.texts[self.rows].split(CHUNK)]
        return torch.cat(best).quantile(UNUSUAL).item()
