"""The image encoder: fixed patch components, a residual convnet and a soft maximum.

Shapes in this file: B batch, N image positions, H height, W width."""
import torch
import torch.nn.functional as F
from torch import nn

POOLING_SHARPNESS = 5.0  # of the soft maximum over a photo's positions; 0 would be the mean


class PatchComponents(nn.Module):
    """Photos (B, 3, H, W) -> (B, 2 * number, H / stride, W / stride), stride being 2 or 4: the
    projections of their patches on the largest principal components, and their negatives, as a ReLU
    follows, which would lose them. With a stride of 4 the ReLU is applied here, and its output is
    averaged over 2 x 2 places.

    The components are fit to training photos and then fixed, like the whitening layer of Jordan
    2024 ("94% on CIFAR-10 in 3.29 Seconds"). Unlike there, the patches are wide and the components
    few, which makes the filters smooth."""

    def __init__(self, number=16, size=8, stride=2):
        super().__init__()
        self.size, self.stride = size, stride
        self.register_buffer("filters", torch.randn(number, 3, size, size) / size)

    @torch.no_grad()
    def fit(self, photos):
        """Set the filters to the principal components of the patches of photos (N, 3, H, W), which
        are normalised floats as the model takes them."""
        patches = F.unfold(photos, self.size, stride=self.size).transpose(1, 2).flatten(0, 1)
        _, vectors = torch.linalg.eigh(patches.T @ patches)  # in order of rising eigenvalue
        largest = vectors.T.flip(0)[:len(self.filters)]
        self.filters.copy_(largest.view_as(self.filters))

    def forward(self, photos):
        y = F.conv2d(photos, self.filters, stride=2, padding=self.size // 2 - 1)
        y = torch.cat([y, -y], dim=1)
        return y if self.stride == 2 else F.avg_pool2d(F.relu(y), 2)


class ResidualConv(nn.Module):
    """Pre-activation residual unit (He et al. 2016): (B, in_channels, H, W) -> (B, channels,
    H / stride, W / stride). The resolution is reduced by average pooling before the convolutions,
    as strided convolutions would alias. In training, batch norm makes a photo's latent depend a
    little on the other photos of its batch."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight)
        nn.init.zeros_(self.conv2.weight)  # so that each unit starts as its shortcut
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.shortcut = nn.Identity()
        if in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, bias=False)

    def forward(self, x):
        y = self.conv1(self.pool(F.relu(self.norm1(x))))
        y = self.conv2(F.relu(self.norm2(y)))
        return self.shortcut(self.pool(x)) + y


class ImageEncoder(nn.Module):
    """Photos (B, 3, H, W), normalised floats -> image latents (B, latent_dim): fixed patch
    components, a residual convnet, and a soft maximum (log-sum-exp) over the positions.

    channels: the channels of each stage, which has `units` residual units. The resolution is
    divided by stem_stride at the start, and by 2 after every stage but the last. H and W must be
    multiples of the product, `stride`; otherwise ValueError is raised."""

    def __init__(self, channels, units, latent_dim, stem_stride=2):
        super().__init__()
        self.stride = stem_stride * 2 ** (len(channels) - 1)
        self.stem, layers = PatchComponents(stride=stem_stride), []
        width = 2 * len(self.stem.filters)
        for stage, next_width in enumerate(channels):
            for unit in range(units):
                stride = 2 if stage > 0 and unit == 0 else 1
                layers.append(ResidualConv(width, next_width, stride))
                width = next_width
        if stem_stride == 4:
            # Without weights, nothing before the first convolution has a gradient to compute.
            layers[0].norm1 = nn.BatchNorm2d(2 * len(self.stem.filters), affine=False)
        layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, latent_dim, 1)]
        self.convnet = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(latent_dim)
        self.projection = nn.Linear(latent_dim, latent_dim)

    def forward(self, images):
        height, width = images.shape[2:]
        if height % self.stride or width % self.stride:
            raise ValueError(f"photos of {height} x {width} pixels are not multiples of "
                             f"{self.stride}")
        x = self.convnet(self.stem(images)).flatten(2)  # (B, latent_dim, N)
        pooled = (POOLING_SHARPNESS * x.float()).logsumexp(2) / POOLING_SHARPNESS
        return self.projection(self.norm(pooled))
