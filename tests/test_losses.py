import math

import pytest
import torch

from src.losses import info_nce_loss


def latents(batch=6, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, dim, generator=generator).unbind()


def by_hand(images, texts, scale, ids):
    """Symmetric InfoNCE, one term at a time, other pairs of the same photo left out."""
    cosine = torch.nn.functional.cosine_similarity
    total = 0.0
    for a, b in ((images, texts), (texts, images)):
        for i in range(len(a)):
            terms = [scale * cosine(a[i], b[j], dim=0).item() for j in range(len(a)) if j == i or ids[j] != ids[i]]
            total += math.log(sum(map(math.exp, terms))) - scale * cosine(a[i], b[i], dim=0).item()
    return total / (2 * len(images))


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [0, 1, 1, 2, 0, 0], [3] * 6])
def test_equals_the_definition(ids):
    images, texts = latents()
    loss = info_nce_loss(images, texts, torch.tensor(math.log(7.0)), torch.tensor(ids))
    assert loss.item() == pytest.approx(by_hand(images, texts, 7.0, ids), rel=1e-5, abs=1e-6)


def test_without_ids_all_pairs_are_negatives():
    images, texts = latents()
    scale = torch.tensor(1.0)
    assert info_nce_loss(images, texts, scale) == info_nce_loss(images, texts, scale, torch.arange(6))


def test_constant_latents_cost_the_logarithm_of_the_batch():
    same = torch.ones(8, 4)
    assert info_nce_loss(same, same, torch.tensor(2.0)).item() == pytest.approx(math.log(8), rel=1e-6)


def test_captions_of_one_photo_do_not_push_each_other():
    images, texts = latents(batch=2)
    both = info_nce_loss(images[[0, 0]], texts, torch.tensor(3.0), torch.tensor([7, 7]))
    assert both.item() == 0  # no negatives are left
    assert info_nce_loss(images[[0, 0]], texts, torch.tensor(3.0)).item() > 0.5


def test_float32_under_autocast_and_half_precision_input():
    images, texts = latents(dim=64)
    scale = torch.tensor(math.log(100.0))
    exact = info_nce_loss(images, texts, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce_loss(images, texts, scale)
    assert inside.dtype == torch.float32 and torch.equal(inside, exact)
    assert info_nce_loss(images.half(), texts.half(), scale).dtype == torch.float32


def test_gradient_reaches_everything():
    images, texts = (x.requires_grad_() for x in latents())
    scale = torch.tensor(1.0, requires_grad=True)
    info_nce_loss(images, texts, scale, torch.tensor([0, 1, 1, 2, 3, 4])).backward()
    assert all(x.grad.abs().sum() > 0 and torch.isfinite(x.grad).all() for x in (images, texts, scale))
