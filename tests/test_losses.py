import math

import pytest
import torch
import torch.nn.functional as F

from src.losses import COMBINED_WEIGHT, info_nce_loss
from src.model import PHOTO_WEIGHT


def random_latents(pairs=6, width=5):
    """Latents (pairs, width) of photos and of captions."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, pairs, width, generator=generator).unbind()


def slow_info_nce(images, texts, scale, photo_ids):
    """Symmetric InfoNCE, one term at a time. Other pairs with the same photo are no negatives."""
    total = 0.0
    for queries, targets in ((images, texts), (texts, images)):
        for i in range(len(queries)):
            logits = [scale * F.cosine_similarity(queries[i], target, dim=0).item()
                      for target in targets]
            denominator = sum(math.exp(logit) for j, logit in enumerate(logits)
                              if j == i or photo_ids[j] != photo_ids[i])
            total += math.log(denominator) - logits[i]
    return total / (2 * len(images))


def slow_combined_loss(images, texts, scale, photo_ids):
    """The second term: a photo combined with one of its captions must find the photo's other
    captions among all captions except the one in the query."""
    images, texts = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    queries = F.normalize(PHOTO_WEIGHT * images + (1 - PHOTO_WEIGHT) * texts, dim=1)
    logits = (scale * queries @ texts.T).tolist()
    total = 0.0
    for i in range(len(photo_ids)):
        candidates = [j for j in range(len(photo_ids)) if j != i]
        positives = [j for j in candidates if photo_ids[j] == photo_ids[i]]
        log_denominator = math.log(sum(math.exp(logits[i][j]) for j in candidates))
        losses = [log_denominator - logits[i][j] for j in positives]
        total += sum(losses) / max(1, len(losses))
    return total / len(photo_ids)


@pytest.mark.parametrize("photo_ids", [[0, 1, 2, 3, 4, 5], [0, 1, 1, 2, 0, 0], [3] * 6])
def test_loss_equals_its_definition(photo_ids):
    images, texts = random_latents()
    loss = info_nce_loss(images, texts, torch.tensor(math.log(7.0)), torch.tensor(photo_ids))
    expected = slow_info_nce(images, texts, 7.0, photo_ids)
    expected += COMBINED_WEIGHT * slow_combined_loss(images, texts, 7.0, photo_ids)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_without_photo_ids_all_photos_differ():
    images, texts = random_latents()
    scale = torch.tensor(1.0)
    loss = info_nce_loss(images, texts, scale)
    assert loss == info_nce_loss(images, texts, scale, torch.arange(6))


def test_equal_latents_cost_the_logarithm_of_the_batch_size():
    latents = torch.ones(8, 4)
    loss = info_nce_loss(latents, latents, torch.tensor(2.0))
    assert loss.item() == pytest.approx(math.log(8), rel=1e-6)


def test_captions_of_the_same_photo_are_no_negatives():
    images, texts = random_latents(pairs=2)
    scale = torch.tensor(3.0)
    same_photo_twice = images[[0, 0]]
    loss = info_nce_loss(same_photo_twice, texts, scale, torch.tensor([7, 7]))
    assert loss.item() == 0  # no negatives are left
    assert info_nce_loss(same_photo_twice, texts, scale).item() > 0.5


def test_second_term_is_zero_where_each_photo_has_one_caption(monkeypatch):
    images, texts = random_latents()
    scale = torch.tensor(2.0, requires_grad=True)
    loss = info_nce_loss(images, texts, scale)
    monkeypatch.setattr("src.losses.COMBINED_WEIGHT", 100.0)
    assert torch.equal(info_nce_loss(images, texts, scale), loss)
    (gradient,) = torch.autograd.grad(loss, scale)
    assert torch.isfinite(gradient)


def test_loss_is_computed_in_float32():
    """Under autocast, and from latents in half precision, too."""
    images, texts = random_latents(width=64)
    scale = torch.tensor(math.log(100.0))
    expected = info_nce_loss(images, texts, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = info_nce_loss(images, texts, scale)
    assert under_autocast.dtype == torch.float32 and torch.equal(under_autocast, expected)
    assert info_nce_loss(images.half(), texts.half(), scale).dtype == torch.float32


def test_gradient_reaches_latents_and_temperature():
    images, texts = (latents.requires_grad_() for latents in random_latents())
    scale = torch.tensor(1.0, requires_grad=True)
    info_nce_loss(images, texts, scale, torch.tensor([0, 1, 1, 2, 3, 4])).backward()
    for tensor in (images, texts, scale):
        assert tensor.grad.abs().sum() > 0 and torch.isfinite(tensor.grad).all()


def padded(texts_of_photo, ids):
    """{photo: the texts that it has} as rows (B, C) for the photos of a batch."""
    most = max(map(len, texts_of_photo.values()))
    return torch.tensor([texts_of_photo[i] + [0] * (most - len(texts_of_photo[i])) for i in ids])


@pytest.mark.parametrize("photo_ids, text_ids, texts_of_photo", [
    # Class names: the first, third and last photos have the same one.
    ([0, 1, 2, 3, 4, 5], [7, 8, 7, 9, 8, 7], {0: [7], 1: [8], 2: [7], 3: [9], 4: [8], 5: [7]}),
    # Two captions of each photo in the batch, one twice; photo 2 has texts that are not its pairs'.
    ([0, 0, 1, 1, 2, 2], [1, 1, 1, 2, 3, 4], {0: [1], 1: [1, 2], 2: [2, 3, 4, 5]}),
    ([0, 1, 2, 3, 4, 5], [1] * 6, {i: [1] for i in range(6)}),
])
def test_a_caption_is_no_negative_of_any_photo_that_has_it(photo_ids, text_ids, texts_of_photo):
    images, texts = random_latents()
    images, texts = images[photo_ids], texts[torch.tensor(text_ids) % 6]
    cosines = F.cosine_similarity(images[:, None], texts[None], dim=2) * 7.0
    has = [[text in texts_of_photo[photo] for text in text_ids] for photo in photo_ids]
    total = 0.0
    for i in range(6):
        of_photo = [cosines[i, j].exp() for j in range(6) if j == i or not has[i][j]]
        of_text = [cosines[j, i].exp() for j in range(6) if j == i or not has[j][i]]
        total += (sum(of_photo).log() + sum(of_text).log() - 2 * cosines[i, i]).item() / 12
    # The second term: texts equal to the query's own are neither found nor in the way.
    images, texts = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    queries = F.normalize(PHOTO_WEIGHT * images + (1 - PHOTO_WEIGHT) * texts, dim=1)
    logits = 7.0 * queries @ texts.T
    for i in range(6):
        others = [j for j in range(6) if text_ids[j] != text_ids[i]]
        positives = [logits[i, j] for j in others if has[i][j]]
        if positives:
            log_denominator = sum(logits[i, j].exp() for j in others).log()
            mean = sum(positives) / len(positives)
            total += COMBINED_WEIGHT * (log_denominator - mean).item() / 6

    scale = torch.tensor(math.log(7.0), requires_grad=True)
    latents = [images.requires_grad_(), texts.requires_grad_()]
    loss = info_nce_loss(*latents, scale, torch.tensor(photo_ids), torch.tensor(text_ids),
                         padded(texts_of_photo, photo_ids))
    assert loss.item() == pytest.approx(total, rel=1e-5, abs=1e-6)
    for gradient in torch.autograd.grad(loss, [*latents, scale]):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("photo_of_pair", [[0, 0, 1, 2, 2, 2], [3, 1, 3, 0, 2, 2]])
@pytest.mark.parametrize("texts_are_shared", [False, True])
def test_each_photo_once_gives_the_loss_of_repeated_photos(photo_of_pair, texts_are_shared):
    images, texts = random_latents()
    images, photo_of_pair = images[:1 + max(photo_of_pair)], torch.tensor(photo_of_pair)
    photo_ids = torch.tensor([5, 7, 5, 8])[:len(images)]  # two rows hold the same photo
    text_ids = texts_of_photo = repeated_texts = None
    if texts_are_shared:
        text_ids = photo_ids[photo_of_pair] % 3 + 1
        texts_of_photo = torch.stack([photo_ids % 3 + 1, torch.zeros_like(photo_ids)], 1)
        repeated_texts = texts_of_photo[photo_of_pair]
    latents = [images.requires_grad_(), texts.requires_grad_()]
    scale = torch.tensor(1.5, requires_grad=True)
    once = info_nce_loss(*latents, scale, photo_ids, text_ids, texts_of_photo, photo_of_pair)
    repeated = info_nce_loss(images[photo_of_pair], texts, scale, photo_ids[photo_of_pair],
                             text_ids, repeated_texts)
    assert once.item() == pytest.approx(repeated.item(), rel=1e-6)
    for a, b in zip(*(torch.autograd.grad(loss, [*latents, scale]) for loss in (once, repeated))):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_are_finite_where_no_negatives_are_left():
    latents = [latents.requires_grad_() for latents in random_latents()]
    loss = info_nce_loss(*latents, torch.tensor(2.0), torch.zeros(6, dtype=torch.long))
    for gradient in torch.autograd.grad(loss, latents):
        assert torch.isfinite(gradient).all()


def test_where_all_captions_differ_the_loss_is_the_same_to_the_bit():
    images, texts = random_latents()
    photo_ids, scale = torch.tensor([0, 1, 1, 2, 0, 0]), torch.tensor(2.0)
    text_ids = torch.arange(1, 7)
    texts_of_photo = padded({0: [1, 5, 6], 1: [2, 3], 2: [4]}, photo_ids.tolist())
    gradients = []
    for shared in ((), (text_ids, texts_of_photo)):
        latents = [images.clone().requires_grad_(), texts.clone().requires_grad_()]
        loss = info_nce_loss(*latents, scale, photo_ids, *shared)
        gradients.append([loss.detach(), *torch.autograd.grad(loss, latents)])
    assert all(map(torch.equal, *gradients))
