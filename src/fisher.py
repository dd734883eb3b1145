"""A second network beside that of `model.py`, which judges photos by Fisher vectors: statistics of
their small places, which learn nothing and so have much to say after a few thousand photos.
It learns first, in a minute or two, and by itself; see `train_fisher_network` in the training
script.
Shapes: B batch, N places, C channels, K Gaussians, D components, H height, W width."""
import math
import os
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from src.device import full_float32
from src.model import MultiModalMemoryNetwork
from src.settings import FISHER_PHOTOS, FISHER_PIXELS
from src.utils.augment import normalize, resize

CELLS = 4  # a descriptor has 4 x 4
SCALES = (3, 4, 6, 8, 12)  # sides of these, in pixels
DIRECTIONS = 8
COMPONENTS = 64  # of a descriptor, besides its place
GAUSSIANS = 64
FIT_PHOTOS, FIT_STEPS = 100, 20  # of expectation and maximisation
DROPOUT, FISHER_WEIGHT = 0.7, 0.7
BATCH_SIZE = 50  # of photos whose vectors are made


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
    @full_float32()
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


def photos_at(photos, rows, device):
    """Rows of stored photos, uint8 -> normalised floats, as Fisher vectors take them."""
    return normalize(resize(photos[rows].to(device), FISHER_PIXELS))


class FisherVectors(nn.Module):
    """Photos (B, 3, H, W), normalised floats -> (B, width): the Fisher vectors of the gradients in
    cells of several sizes, by their direction (SIFT, Lowe 2004; dense, as in Sanchez et al. 2013),
    and of the mean and the deviation of their colours. H and W of at least 48 pixels."""

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
        """To some of a training split's stored photos, uint8 (N, 3, H, W)."""
        rows = torch.linspace(0, len(photos) - 1, min(FIT_PHOTOS, len(photos))).long()
        gradients, colors = self.cells(photos_at(photos, rows, self.slopes.device))
        self.gradients.fit(gradients)
        self.colors.fit(colors)

    @torch.no_grad()
    def forward(self, photos):
        gradients, colors = self.cells(photos)
        return torch.cat([self.gradients(gradients), self.colors(colors)], dim=1)


class NetworkWithFisherVectors(MultiModalMemoryNetwork):
    """The multimodal memory network and, in `second`, one of encoders alone whose photos are Fisher
    vectors. They rank together: latents are (B, 2 * latent_dim), theirs side by side, of lengths
    such that the cosine of two is the mean of theirs, the second's weighing FISHER_WEIGHT of the
    first's. Training sees the first alone.

    eval_pixels: side of the photos that the first takes; in use they may be of any size."""

    def __init__(self, vocab_size, eval_pixels, **sizes):
        super().__init__(vocab_size, **sizes)
        self.eval_pixels, vectors = eval_pixels, FisherVectors()
        same = {name: sizes[name] for name in ("text_embed_dim", "latent_dim", "num_heads")}
        self.fisher_network = MultiModalMemoryNetwork(
            vocab_size, num_layers=0, fusion_layers=0, dropout=DROPOUT,
            image_features=vectors.width, **same)
        self.fisher_network.image_backbone = vectors
        self.fisher_network.requires_grad_(False)

    def forward(self, text=None, images=None, text_mask=None, text_features=None,
                fisher_vectors=None):
        """fisher_vectors: those of the photos (B, width), where they are known already."""
        photos = None
        if images is not None:
            photos = resize(images, self.eval_pixels)
            if fisher_vectors is None:  # the backbone of the Fisher network makes them
                fisher_vectors = resize(images, FISHER_PIXELS)
        parts = (super().forward(text, photos, text_mask, text_features),
                 self.fisher_network(text, fisher_vectors, text_mask))
        first, second = (part["central_latent"].float() for part in parts)
        if images is None or text is None:  # of both, they are means of such
            first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
        return {"central_latent": torch.cat([first, math.sqrt(FISHER_WEIGHT) * second], dim=1)}


def build_network(vocab_size, settings, widths):
    """The model of those settings. widths: of pretrained encoders' features. Raises ValueError for
    sizes that do not fit."""
    sizes = settings.model_arguments() | widths
    if settings.fisher:
        return NetworkWithFisherVectors(vocab_size, settings.eval_pixels, **sizes)
    return MultiModalMemoryNetwork(vocab_size, **sizes)


def make_fisher_vectors(vectors, photos, amp_dtype, views):
    """Fisher vectors of stored photos, float16 (N, views, width) on the host, 34 kB each; views:
    1, or 2 with those of the mirror images. They lie in a file without a name, which may be larger
    than memory. Raises OSError for a full disk."""
    device, shape = vectors.slopes.device, (len(photos), views, vectors.width)
    with tempfile.TemporaryFile() as file:  # it is there until the array is gone
        if hasattr(os, "posix_fallocate"):  # else a full disk would be noticed in the middle
            os.posix_fallocate(file.fileno(), 0, 2 * math.prod(shape))
        made = torch.from_numpy(np.memmap(file, np.float16, "w+", shape=shape))
    for rows in torch.arange(len(photos)).split(BATCH_SIZE):
        images = photos_at(photos, rows, device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            for view, shown in zip(range(views), (images, images.flip(-1))):
                made[rows, view] = vectors(shown).half().cpu()
    return made


def with_fisher_vectors(model, splits, amp_dtype):
    """{split: dataset} -> the same with the Fisher vectors of their photos, which all validations
    and the bank use. Those that a dataset has already are kept, and a training split of more than
    FISHER_PHOTOS photos gets none: the model computes them when it needs them."""
    fisher_vectors = model.fisher_network.image_backbone
    found = {}
    for name, data in splits.items():
        if data.fisher_vectors is None and (name != "train" or len(data.photos) <= FISHER_PHOTOS):
            vectors = make_fisher_vectors(fisher_vectors, data.photos, amp_dtype, views=1)
            data = data.with_fisher_vectors(vectors[:, 0])
        found[name] = data
    return found
