import pytest
import torch
import torch.nn.functional as F

from src.image_encoder import POOLING_SHARPNESS, ImageEncoder, PatchComponents, ResidualConv


@pytest.mark.parametrize("height, width", [(40, 32), (32, 40)])
def test_image_encoder_refuses_photos_that_it_cannot_halve_often_enough(height, width):
    encoder = ImageEncoder((8, 8, 8, 8), 1, 16)
    with pytest.raises(ValueError, match=f"{height} x {width} pixels"):
        encoder(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("channels, units, height, width", [
    ((4, 6, 8), 1, 32, 48), ((4, 6, 8), 2, 8, 8), ((5,), 3, 6, 4)])
def test_image_latent_is_a_soft_maximum_over_all_positions(channels, units, height, width):
    torch.manual_seed(0)
    encoder, outputs = ImageEncoder(channels, units, 16).eval(), []
    encoder.convnet.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    latents = encoder(torch.randn(2, 3, height, width))
    positions = outputs[0].flatten(2)
    assert positions.shape == (2, 16, height * width // 4 ** len(channels))
    pooled = (POOLING_SHARPNESS * positions).exp().sum(2).log() / POOLING_SHARPNESS
    assert torch.allclose(latents, encoder.projection(encoder.norm(pooled)), atol=1e-5)
    convolutions = [module for module in encoder.modules() if isinstance(module, torch.nn.Conv2d)
                    and module.kernel_size == (3, 3)]
    assert len(convolutions) == 2 * units * len(channels)


@pytest.mark.parametrize("in_channels, channels, stride", [(6, 6, 1), (4, 8, 2), (4, 8, 1)])
def test_residual_unit_starts_as_its_shortcut(in_channels, channels, stride):
    torch.manual_seed(0)
    unit, x = ResidualConv(in_channels, channels, stride), torch.randn(2, in_channels, 8, 8)
    pooled = x.unflatten(2, (-1, stride)).unflatten(4, (-1, stride)).mean((3, 5))
    assert torch.allclose(unit(x), unit.shortcut(pooled))
    torch.nn.init.normal_(unit.conv2.weight)
    assert unit(x).shape == (2, channels, 8 // stride, 8 // stride)
    assert not torch.allclose(unit(x), unit.shortcut(pooled))


@pytest.fixture
def fitted_stem():
    """(stem, photos that it was fit to, the two patterns that the patches of the photos are made
    of). The first pattern varies more from patch to patch than the second."""
    torch.manual_seed(0)
    stem = PatchComponents(number=2, size=4)
    patterns = torch.linalg.qr(torch.randn(48, 2))[0].T.view(2, 3, 4, 4)
    amounts = torch.randn(50, 2, 8, 8) * torch.tensor([3.0, 1.0]).view(2, 1, 1)
    photos = F.conv_transpose2d(amounts, patterns, stride=4)
    stem.fit(photos + 0.01 * torch.randn_like(photos))
    return stem, photos, patterns


def test_filters_are_the_principal_components_of_patches(fitted_stem):
    stem, _, patterns = fitted_stem
    cosines = stem.filters.flatten(1) @ patterns.flatten(1).T
    assert torch.allclose(cosines.abs(), torch.eye(2), atol=0.05)
    assert not list(stem.parameters())  # they are fixed


def test_patch_components_are_projections_of_every_second_patch(fitted_stem):
    stem, photos, _ = fitted_stem
    components = stem(photos)
    assert components.shape == (50, 4, 16, 16)
    assert torch.equal(components[:, :2], -components[:, 2:])
    # The photos are padded by one pixel, so the inner patches start at the odd pixels.
    inner = F.conv2d(photos[:, :, 1:, 1:], stem.filters, stride=2)
    assert torch.allclose(components[:, :2, 1:-1, 1:-1], inner[:, :, :14, :14], atol=1e-5)


def test_stem_of_stride_4_is_the_mean_of_what_is_positive(fitted_stem):
    stem, photos, _ = fitted_stem
    components = stem(photos)
    stem.stride = 4
    positive = components.clamp(min=0).unflatten(2, (-1, 2)).unflatten(4, (-1, 2))
    assert torch.allclose(stem(photos), positive.mean((3, 5)), atol=1e-6)


def test_encoder_with_a_stem_of_stride_4():
    encoder = ImageEncoder((4, 8), 1, 16, stem_stride=4)
    assert encoder.stride == 8
    with pytest.raises(ValueError, match="are not multiples of 8"):
        encoder(torch.zeros(1, 3, 36, 32))
    encoder(torch.randn(2, 3, 32, 48)).sum().backward()
    # Every weight has a gradient, and the photos need none.
    assert all(weight.grad is not None for weight in encoder.parameters())
    assert encoder.convnet[0].norm1.weight is None
