"""A second network beside that of `model.py`, which judges photos by Fisher vectors: statistics of
their small places, which learn nothing and so have much to say after a few thousand photos.
Shapes: B batch, N places, C channels, K Gaussians, D components, H height, W width."""
import math

import torch
import torch.nn.functional as F
from torch import nn

from src.model import MultiModalMemoryNetwork, TextEncoder

CELLS = 4  # a descriptor has 4 x 4
SCALES = (3, 4, 6, 8)  # sides of these, in pixels
MIN_PIXELS = CELLS * max(SCALES)
DIRECTIONS = 8
COMPONENTS = 64  # of a descriptor, besides its place
GAUSSIANS = 64
FIT_STEPS = 20  # of expectation and maximisation
DROPOUT = 0.5


class FisherVector(nn.Module):
    """Maps of cells, a list of (B, C, H, W) -> (B, 2 * K * (D + 2)), the gradient of a Gaussian
    mixture's likelihood, of unit mean square (Perronnin, Sanchez and Mensink 2010). A descriptor is
    the components of 4 x 4 cells and, as two more numbers, where these lie in the photo."""

    def __init__(self, channels):
        super().__init__()
        size = COMPONENTS + 2
        self.register_buffer("components", torch.zeros(COMPONENTS, channels, CELLS, CELLS))
        self.register_buffer("offset", torch.zeros(COMPONENTS))
        self.register_buffer("weight", torch.full((GAUSSIANS,), 1 / GAUSSIANS))
        self.register_buffer("mean", torch.randn(GAUSSIANS, size))
        self.register_buffer("variance", torch.ones(GAUSSIANS, size))
        self.width = 2 * GAUSSIANS * size

    @torch.no_grad()
    def fit(self, maps):
        """Principal components and mixture of what cells of training photos hold."""
        raw = torch.cat([F.unfold(cells, CELLS).transpose(1, 2).flatten(0, 1) for cells in maps])
        mean = raw.mean(0)
        values, vectors = torch.linalg.eigh((raw - mean).T @ (raw - mean) / len(raw))
        vectors = (vectors / values.clamp(min=1e-8).sqrt()).T.flip(0)[:COMPONENTS]
        self.components.copy_(vectors.view_as(self.components))
        self.offset.copy_(vectors @ -mean)
        descriptors = self.descriptors(maps).flatten(0, 1)
        self.mean.copy_(descriptors[torch.randperm(len(descriptors))[:GAUSSIANS]])
        for _ in range(FIT_STEPS):
            count, first, second = (sum(sums) for sums in zip(
                *(self.statistics(part) for part in descriptors.split(50_000))))
            count = count[:, None].clamp(min=1e-3)
            self.weight.copy_((count / count.sum()).squeeze(1))
            self.mean.copy_(first / count)
            self.variance.copy_((second / count - self.mean.square()).clamp(min=0.01))

    def descriptors(self, maps):
        """-> (B, N, D + 2), each number of about unit variance."""
        parts, places = [], []
        for cells in maps:
            y = F.conv2d(cells, self.components, self.offset).permute(0, 2, 3, 1)
            axes = [torch.linspace(-1, 1, side, device=y.device, dtype=y.dtype) * math.sqrt(3)
                    for side in y.shape[1:3]]
            parts.append(y.flatten(1, 2))
            places.append(torch.cartesian_prod(*axes))
        places = torch.cat(places).expand(len(y), -1, -1)
        return torch.cat([torch.cat(parts, dim=1), places], dim=2)

    def statistics(self, descriptors):
        """(..., N, D + 2) -> how many belong to each Gaussian (..., K), and the sums of these and
        of their squares (..., K, D + 2)."""
        squares, precision = descriptors.square(), 1 / self.variance
        constant = self.weight.log() - (
            self.variance.log() + self.mean.square() * precision).sum(1) / 2
        belongs = (F.linear(descriptors, self.mean * precision, constant)
                   - F.linear(squares, precision / 2)).softmax(-1).to(descriptors.dtype)
        sums = [belongs.transpose(-1, -2) @ numbers for numbers in (descriptors, squares)]
        return belongs.sum(-2, dtype=torch.float32), sums[0].float(), sums[1].float()

    def forward(self, maps):
        descriptors = self.descriptors(maps)
        count, first, second = self.statistics(descriptors)
        count = count[:, :, None]
        of_mean = (first - self.mean * count) / self.variance.sqrt()
        of_variance = (second - 2 * self.mean * first + self.mean.square() * count
                       ) / self.variance - count
        vector = torch.cat([of_mean, of_variance / math.sqrt(2)], dim=2)
        vector = (vector / self.weight.sqrt()[:, None]).flatten(1)
        vector = vector.sign() * vector.abs().sqrt()
        return F.normalize(vector, dim=1) * math.sqrt(self.width)


class FisherVectors(nn.Module):
    """Photos (B, 3, H, W), normalised floats -> (B, width): the Fisher vectors of the gradients in
    cells of several sizes, by their direction (SIFT, Lowe 2004; dense, as in Sanchez et al. 2013),
    and of the mean and the deviation of their colours. H and W of at least 32 pixels."""

    def __init__(self):
        super().__init__()
        angle = torch.arange(DIRECTIONS) * (2 * math.pi / DIRECTIONS)
        slope = torch.tensor([[0.0, 0, 0], [-1, 0, 1], [0, 0, 0]]) / 6  # of three channels' mean
        slopes = angle.cos()[:, None, None] * slope + angle.sin()[:, None, None] * slope.T
        self.register_buffer("slopes", slopes[:, None].repeat(1, 3, 1, 1), persistent=False)
        self.gradients, self.colors = FisherVector(DIRECTIONS), FisherVector(6)
        self.width = self.gradients.width + self.colors.width

    def cells(self, photos):
        """-> maps of gradients (B, DIRECTIONS, H / side, W / side) and of colours (B, 6, ...), of
        each scale."""
        framed = F.pad(photos, (1, 1, 1, 1), mode="replicate")  # the frame is no edge
        slopes = F.relu(F.conv2d(framed, self.slopes)).float()
        everything, gradients, colors = torch.cat([slopes, photos, photos.square()], 1), [], []
        for side in SCALES:
            slopes, mean, square = F.avg_pool2d(everything, side).split([DIRECTIONS, 3, 3], 1)
            around = F.avg_pool2d(slopes.sum(1, keepdim=True), 5, 1, 2, count_include_pad=False)
            gradients.append((slopes / (around + 0.05)).sqrt())
            deviation = (square - mean.square()).clamp(min=1e-6).sqrt()
            colors.append(torch.cat([mean, deviation], 1))
        return gradients, colors

    @torch.no_grad()
    def fit(self, photos):
        """photos: (N, 3, H, W), normalised floats, as the model takes them."""
        gradients, colors = self.cells(photos)
        self.gradients.fit(gradients)
        self.colors.fit(colors)

    @torch.compiler.disable  # which makes it slower
    @torch.no_grad()
    def forward(self, photos):
        gradients, colors = self.cells(photos)
        return torch.cat([self.gradients(gradients), self.colors(colors)], dim=1)


class FisherNetwork(nn.Module):
    """Photos (B, 3, H, W) or token ids (B, L) -> latents (B, latent_dim): a linear layer of the
    Fisher vectors, and a bag of tokens."""

    def __init__(self, vocab_size, dim, latent_dim):
        super().__init__()
        self.vectors = FisherVectors()
        self.projection = nn.Linear(self.vectors.width, latent_dim)
        self.text_encoder = TextEncoder(vocab_size, dim, latent_dim, num_heads=1, num_layers=0)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_images(self, images):
        vectors = self.vectors(images)
        # The same are dropped of all photos of a batch: on a CPU, chance is slow to draw.
        kept = F.dropout(torch.ones_like(vectors[:1]), DROPOUT, self.training)
        return self.projection(kept * vectors)


class TwoNetworks(MultiModalMemoryNetwork):
    """The multimodal memory network and, in `second`, a FisherNetwork. They learn apart, and rank
    together: latents are (B, 2 * latent_dim), theirs side by side, and the central latent's two
    halves have unit length, so that its cosine is the mean of the two."""

    def __init__(self, vocab_size, text_embed_dim, latent_dim, **sizes):
        super().__init__(vocab_size, text_embed_dim, latent_dim, **sizes)
        self.latent_dim = latent_dim
        self.second = FisherNetwork(vocab_size, text_embed_dim, latent_dim)

    def networks(self, alone=False):
        return [self] if alone else [self, self.second]

    def encode_images(self, images, alone=False):
        latents = super().encode_images(images)
        return latents if alone else torch.cat([latents, self.second.encode_images(images)], 1)

    def encode_text(self, text, text_mask, text_features, alone=False):
        latents = super().encode_text(text, text_mask, text_features)
        return latents if alone else torch.cat(
            [latents, self.second.text_encoder(text, text_mask)], 1)

    def fuse(self, images=None, text=None):
        both = [latents for latents in (images, text) if latents is not None]
        own = super().fuse(*(latents if latents is None else latents[:, :self.latent_dim]
                             for latents in (images, text)))
        second = torch.stack(both).mean(0)[:, self.latent_dim:]  # none where the first is alone
        parts = [own, second] if second.shape[1] else [own]
        return torch.cat([F.normalize(part.float(), dim=1) for part in parts], dim=1)

    def memory_loss(self, latents):
        return super().memory_loss(latents[:, :self.latent_dim])


def build_network(vocab_size, settings, widths):
    """The model of those settings. widths: of pretrained encoders' features. Raises ValueError for
    sizes that do not fit."""
    kind = TwoNetworks if settings.fisher else MultiModalMemoryNetwork
    return kind(vocab_size, **settings.model_arguments(), **widths)
