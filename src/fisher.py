"""The Fisher network: a second network that judges photos by Fisher vectors, next to that of
`model.py`, and the model that ranks with both.

A Fisher vector describes how the small patches of a photo (their gradients and colours) deviate
from a Gaussian mixture that was fit to training photos. Nothing in it is learned by gradient
descent, which is an advantage with a few thousand photos. The Fisher network is trained first, in
about a minute and by itself; see `train_fisher_network` in `src/first_stage.py`.

Shapes in this file: B batch, N positions, C channels, K Gaussians, D components, H height, W
width."""
import math

import torch
import torch.nn.functional as F
from torch import nn

from src.device import eigh, full_float32, memory_format
from src.evaluation import embed_dataset
from src.model import ModelConfig, MultiModalMemoryNetwork
from src.settings import FISHER_PIXELS
from src.utils import distributed
from src.utils.augment import normalize, resize
from src.utils.console import ProgressLine

GRID = 4  # a patch has 4 x 4 cells
CELL_SIDES = (3, 4, 6, 8, 12)  # in pixels
DIRECTIONS = 8
COMPONENTS = 64  # principal components of a descriptor; its position in the photo comes in addition
GAUSSIANS = 64
FIT_PHOTOS, FIT_SHARE = 100, 0.25  # training photos, and the share of their patches
EM_STEPS, EM_CHUNK = 20, 10_000  # steps, and descriptors at a time
DROPOUT = 0.7
FISHER_WEIGHT = 0.7  # of the Fisher network's cosine, relative to that of the memory network
BATCH_SIZE = 50  # photos of which Fisher vectors are computed at a time


class FisherVector(nn.Module):
    """Maps of cells, a list of (B, C, H, W) -> the Fisher vectors (B, 2 * K * (D + 2)) of their
    patches: the gradient of the log-likelihood of a Gaussian mixture with respect to its means and
    variances, power-normalised, with a mean square of 1 (Perronnin, Sanchez and Mensink 2010).

    The descriptor of a patch is the principal components of its GRID x GRID cells, followed by two
    numbers for its position in the photo."""

    def __init__(self, channels):
        super().__init__()
        size = COMPONENTS + 2
        self.register_buffer("components", torch.zeros(COMPONENTS, channels, GRID, GRID))
        self.register_buffer("offset", torch.zeros(COMPONENTS))
        self.register_buffer("weight", torch.full((GAUSSIANS,), 1 / GAUSSIANS))
        self.register_buffer("mean", torch.randn(GAUSSIANS, size))
        self.register_buffer("variance", torch.ones(GAUSSIANS, size))
        self.width = 2 * GAUSSIANS * size

    @torch.no_grad()
    @full_float32()
    def fit(self, maps):
        """Fit the principal components, then the mixture (by expectation maximisation), to the
        maps of training photos."""
        patches = torch.cat([F.unfold(cells, GRID).transpose(1, 2).flatten(0, 1)
                             for cells in maps])
        mean = patches.mean(0)
        covariance = (patches - mean).T @ (patches - mean) / len(patches)
        values, vectors = eigh(covariance)  # in order of rising eigenvalue
        whitening = (vectors / values.clamp(min=1e-8).sqrt()).T.flip(0)[:COMPONENTS]
        self.components.copy_(whitening.view_as(self.components))
        self.offset.copy_(whitening @ -mean)

        descriptors = self.descriptors(maps).flatten(0, 1)
        chosen = torch.randperm(len(descriptors))[:int(FIT_SHARE * len(descriptors))]
        descriptors = descriptors[chosen]
        self.mean.copy_(descriptors[:GAUSSIANS])
        for _ in range(EM_STEPS):
            parts = [self.statistics(part) for part in descriptors.split(EM_CHUNK)]
            count, first, second = (sum(sums) for sums in zip(*parts))
            count = count[:, None].clamp(min=1e-3)
            self.weight.copy_((count / count.sum()).squeeze(1))
            self.mean.copy_(first / count)
            self.variance.copy_((second / count - self.mean.square()).clamp(min=0.01))

    def descriptors(self, maps):
        """-> the descriptors of all patches (B, N, D + 2), each number of about unit variance."""
        components, positions = [], []
        for cells in maps:
            y = F.conv2d(cells, self.components, self.offset).permute(0, 2, 3, 1)
            axes = [torch.linspace(-1, 1, side, device=y.device, dtype=y.dtype) * math.sqrt(3)
                    for side in y.shape[1:3]]
            components.append(y.flatten(1, 2))
            positions.append(torch.cartesian_prod(*axes))
        positions = torch.cat(positions).expand(len(y), -1, -1)
        return torch.cat([torch.cat(components, dim=1), positions], dim=2)

    def statistics(self, descriptors):
        """Descriptors (..., N, D + 2) -> the sums over N of the responsibilities (..., K), of the
        descriptors weighted by them, and of the squared descriptors (..., K, D + 2)."""
        # One matrix of both, as two products of half the width take longer.
        powers = torch.cat([descriptors, descriptors.square()], dim=-1)
        precision = 1 / self.variance
        constant = self.weight.log() - (
            self.variance.log() + self.mean.square() * precision).sum(1) / 2
        factors = torch.cat([self.mean * precision, -precision / 2], dim=1)
        log_likelihoods = F.linear(powers, factors, constant)
        with torch.autocast(descriptors.device.type, enabled=False):  # it would take float32
            responsibilities = log_likelihoods.softmax(-1)
        count = responsibilities.sum(-2, dtype=torch.float32)
        sums = responsibilities.transpose(-1, -2) @ powers
        first, second = sums.float().chunk(2, dim=-1)
        return count, first, second

    def forward(self, maps):
        count, first, second = self.statistics(self.descriptors(maps))
        count = count[:, :, None]
        mean_gradient = (first - self.mean * count) / self.variance.sqrt()
        variance_gradient = (second - 2 * self.mean * first + self.mean.square() * count
                             ) / self.variance - count
        vector = torch.cat([mean_gradient, variance_gradient / math.sqrt(2)], dim=2)
        vector = (vector / self.weight.sqrt()[:, None]).flatten(1)
        vector = vector.sign() * vector.abs().sqrt()
        return F.normalize(vector, dim=1) * math.sqrt(self.width)


class FisherVectors(nn.Module):
    """Photos (B, 3, H, W), normalised floats, H and W at least 48 -> (B, width): the Fisher vectors
    of the gradient histograms of their patches (dense SIFT: Lowe 2004; Sanchez et al. 2013), and
    those of the means and standard deviations of their colours. The patches have several sizes."""

    def __init__(self):
        super().__init__()
        angle = torch.arange(DIRECTIONS) * (2 * math.pi / DIRECTIONS)
        # Central differences, averaged over the three colour channels.
        horizontal = torch.tensor([[0.0, 0, 0], [-1, 0, 1], [0, 0, 0]]) / 6
        filters = (angle.cos()[:, None, None] * horizontal
                   + angle.sin()[:, None, None] * horizontal.T)
        self.register_buffer("gradient_filters", filters[:, None].repeat(1, 3, 1, 1),
                             persistent=False)
        self.gradients, self.colors = FisherVector(DIRECTIONS), FisherVector(6)
        self.width = self.gradients.width + self.colors.width

    def cells(self, photos):
        """-> for each cell size, maps of gradient histograms (B, DIRECTIONS, H / side, W / side)
        and of colour statistics (B, 6, H / side, W / side)."""
        framed = F.pad(photos, (1, 1, 1, 1), mode="replicate")  # so that the border is no edge
        slopes = F.relu(F.conv2d(framed, self.gradient_filters)).float()
        everything = torch.cat([slopes, photos, photos.square()], 1)
        gradients, colors = [], []
        means = {1: everything}
        for side in CELL_SIDES:
            # The mean over a cell of 12 pixels is that of the means over four cells of 6.
            below = max(part for part in means if side % part == 0)
            means[side] = F.avg_pool2d(means[below], side // below)
            slopes, mean, square = means[side].split([DIRECTIONS, 3, 3], 1)
            neighbourhood = F.avg_pool2d(slopes.sum(1, keepdim=True), 5, 1, 2,
                                         count_include_pad=False)
            gradients.append((slopes / (neighbourhood + 0.05)).sqrt())
            deviation = (square - mean.square()).clamp(min=1e-6).sqrt()
            colors.append(torch.cat([mean, deviation], 1))
        return gradients, colors

    @torch.no_grad()
    def fit(self, photos):
        """Fit both mixtures to some of the stored photos, uint8 (N, 3, H, W), of a training
        split."""
        rows = torch.linspace(0, len(photos) - 1, min(FIT_PHOTOS, len(photos))).long()
        gradients, colors = self.cells(self.load(photos, rows))
        self.gradients.fit(gradients)
        self.colors.fit(colors)

    def load(self, photos, rows):
        """Rows of stored photos, uint8 -> normalised floats of the size that is described."""
        device = self.gradient_filters.device
        photos = photos[rows].to(device)
        if memory_format(device) == torch.contiguous_format:  # stored photos have channels last
            photos = photos.contiguous()
        return normalize(resize(photos, FISHER_PIXELS))

    @torch.no_grad()
    def forward(self, photos):
        gradients, colors = self.cells(photos)
        return torch.cat([self.gradients(gradients), self.colors(colors)], dim=1)


class NetworkWithFisherVectors(MultiModalMemoryNetwork):
    """The multimodal memory network together with `fisher_network`, a network of encoders alone
    whose photos are Fisher vectors.

    Its latents are (B, 2 * latent_dim), those of both side by side, of such lengths that the cosine
    of two latents is the weighted mean of both networks' cosines, where the Fisher network has
    FISHER_WEIGHT. In training, the encoders' methods of the base class give the latents of the
    memory network alone.

    eval_pixels: side of the photos that the memory network takes. The photos given may have any
    size."""

    def __init__(self, config, eval_pixels):
        super().__init__(config)
        self.eval_pixels = eval_pixels
        vectors = FisherVectors()
        self.fisher_network = MultiModalMemoryNetwork(ModelConfig(
            vocab_size=config.vocab_size, text_embed_dim=config.text_embed_dim,
            latent_dim=config.latent_dim, num_heads=config.num_heads, num_layers=0,
            fusion_layers=0, dropout=DROPOUT, image_features=vectors.width))
        self.fisher_network.image_backbone = vectors
        self.fisher_network.requires_grad_(False)

    def forward(self, text=None, images=None, text_mask=None, text_features=None,
                fisher_latents=None):
        """fisher_latents: those of the Fisher network (B, latent_dim), where they are known."""
        small = large = None
        if images is not None:
            small = resize(images, self.eval_pixels)
        first = super().forward(text, small, text_mask, text_features)["central_latent"].float()
        if fisher_latents is None:
            if images is not None:
                large = resize(images, FISHER_PIXELS)
            fisher_latents = self.fisher_network(text, large, text_mask)["central_latent"]
        second = fisher_latents.float()
        if images is None or text is None:  # of both, they are means of unit vectors
            first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
        return {"central_latent": torch.cat([first, math.sqrt(FISHER_WEIGHT) * second], dim=1)}


def build_network(vocab_size, settings, feature_widths):
    """The model of these settings. feature_widths: {"image_features", "text_features": width} of
    pretrained encoders. Raises ValueError for sizes that do not fit each other."""
    config = ModelConfig(vocab_size, **settings.model_arguments(), **feature_widths)
    if settings.fisher:
        return NetworkWithFisherVectors(config, settings.eval_pixels)
    return MultiModalMemoryNetwork(config)


def make_fisher_vectors(vectors, photos, amp_dtype, views):
    """The Fisher vectors of stored photos, float16 (N, views, width) on the host, 34 kB each. views
    is 1, or 2 with those of the mirror images.

    They lie in a memory-mapped temporary file, which may be larger than memory. The processes of a
    machine share the file and the work. Raises OSError for a full disk."""
    device = vectors.gradient_filters.device
    array = distributed.shared_array((len(photos), views, vectors.width), "float16")
    result = torch.from_numpy(array)
    batches = torch.arange(len(photos)).split(BATCH_SIZE)
    line = ProgressLine()
    show_progress = line.counter("computing Fisher vectors")
    local_rank, local_world = distributed.local_rank_and_world()
    for rows in batches[local_rank::local_world]:
        images = vectors.load(photos, rows).contiguous(memory_format=memory_format(device))
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            for view, shown in zip(range(views), (images, images.flip(-1))):
                result[rows, view] = vectors(shown).half().cpu()
        show_progress(int(rows[-1]) + 1, len(photos))
    line.clear()
    distributed.barrier()
    return result


def with_fisher_latents(network, data, amp_dtype, vectors=None):
    """Return a dataset with its latents by the trained Fisher network, which all validations, or
    the bank, use. vectors: the Fisher vectors of its photos, if they are known."""
    if vectors is None:
        vectors = make_fisher_vectors(network.image_backbone, data.photos, amp_dtype, views=1)
    line = ProgressLine()
    photos, texts, _ = embed_dataset(network, data.replace(photos=vectors), amp_dtype,
                                     line.counter("embedding with the Fisher network"))
    line.clear()
    return data.replace(fisher_latents=(photos, texts))
