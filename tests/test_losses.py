import math

import pytest
import torch

from src.losses import COMBINED_WEIGHT, info_nce_loss
from src.model import PHOTO_WEIGHT, MultiModalMemoryNetwork
from src.training import PairEncoder, contrastive_backward, split_in_chunks
from tests.conftest import model_arguments, without_batch_norm


def latents(batch=6, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, dim, generator=generator).unbind()


def by_hand(images, texts, scale, ids):
    """Symmetric InfoNCE, one term at a time, other pairs of the same photo left out."""
    cosine = torch.nn.functional.cosine_similarity
    total = 0.0
    for a, b in ((images, texts), (texts, images)):
        for i in range(len(a)):
            terms = [
                scale * cosine(a[i], b[j], dim=0).item()
                for j in range(len(a))
                if j == i or ids[j] != ids[i]
            ]
            total += math.log(sum(map(math.exp, terms))) - scale * cosine(a[i], b[i], dim=0).item()
    return total / (2 * len(images))


def contrast_by_hand(images, texts, scale, ids):
    """Of each photo together with its caption against all captions but that, the others of the same
    photo being right.
    """
    unit = torch.nn.functional.normalize
    queries = unit(PHOTO_WEIGHT * unit(images, dim=1) + (1 - PHOTO_WEIGHT) * unit(texts, dim=1))
    logits, total = scale * queries @ unit(texts, dim=1).T, 0.0
    for i in range(len(ids)):
        others = [j for j in range(len(ids)) if j != i]
        positives = [j for j in others if ids[j] == ids[i]]
        whole = sum(math.exp(logits[i, j]) for j in others)
        total += sum(math.log(whole) - logits[i, j].item() for j in positives) / max(
            1, len(positives))
    return total / len(ids)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [0, 1, 1, 2, 0, 0], [3] * 6])
def test_equals_the_definition(ids):
    images, texts = latents()
    loss = info_nce_loss(images, texts, torch.tensor(math.log(7.0)), torch.tensor(ids))
    expected = by_hand(images, texts, 7.0, ids)
    expected += COMBINED_WEIGHT * contrast_by_hand(images, texts, 7.0, ids)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_without_ids_all_pairs_are_negatives():
    images, texts = latents()
    scale = torch.tensor(1.0)
    assert info_nce_loss(images, texts, scale) == info_nce_loss(
        images, texts, scale, torch.arange(6)
    )


def test_constant_latents_cost_the_logarithm_of_the_batch():
    same = torch.ones(8, 4)
    assert info_nce_loss(same, same, torch.tensor(2.0)).item() == pytest.approx(
        math.log(8), rel=1e-6
    )


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
    assert all(
        x.grad.abs().sum() > 0 and torch.isfinite(x.grad).all() for x in (images, texts, scale)
    )


def test_photos_of_one_caption_have_no_others_to_find(monkeypatch):
    (images, texts), scale = latents(), torch.tensor(2.0, requires_grad=True)
    loss = info_nce_loss(images, texts, scale)
    monkeypatch.setattr("src.losses.COMBINED_WEIGHT", 100.0)
    assert torch.equal(info_nce_loss(images, texts, scale), loss)
    (gradient,) = torch.autograd.grad(loss, scale)
    assert torch.isfinite(gradient)


class Encoder(torch.nn.Module):
    """Two small networks in place of the model; what comes out of a row depends on that alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)
        )
        self.text = torch.nn.Sequential(
            torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)
        )
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.5))
        self.rows_at_once = 0

    def forward(self, images, text, text_features):
        if torch.is_grad_enabled():
            self.rows_at_once = max(self.rows_at_once, len(text))
        image_latents, text_latents = self.image(images), self.text(text)
        return (
            image_latents,
            text_latents,
            self.logit_scale,
            torch.stack([image_latents.square().mean(), text_latents.exp().mean()]),
        )


def step_batch():
    """Seven photos with one to three captions each; the first and the last are the same photo."""
    generator = torch.Generator().manual_seed(5)
    photo_of_pair = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 5, 6, 6])
    return {
        "images": torch.randn(7, 6, generator=generator),
        "text": torch.randn(13, 3, generator=generator),
        "photo_ids": torch.tensor([4, 9, 2, 5, 7, 1, 4]),
        "photo_of_pair": photo_of_pair,
    }


def test_backward_without_chunks_is_the_plain_loss():
    encoder, batch = Encoder(), step_batch()
    loss = contrastive_backward(encoder, batch, 0.1)
    got = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    photo = batch["photo_of_pair"]
    images, text, scale, memory = encoder(batch["images"], batch["text"], None)
    plain = info_nce_loss(images[photo], text, scale, batch["photo_ids"][photo])
    (plain + 0.1 * memory.sum()).backward()
    assert torch.equal(loss, plain) and not loss.requires_grad
    assert all(torch.allclose(a, p.grad, rtol=1e-5, atol=1e-6)
               for a, p in zip(got, encoder.parameters()))


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 5, 12, 13, 99])
@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_chunks_give_the_loss_and_gradients_of_the_whole_batch(chunk_size, factor):
    whole, chunked, batch = Encoder(), Encoder(), step_batch()
    scale = {"scale": lambda loss: loss * factor}
    expected = contrastive_backward(whole, batch, 0.1, **scale)
    loss = contrastive_backward(chunked, batch, 0.1, chunk_size, **scale)
    assert torch.allclose(loss, expected, atol=1e-6)
    for (name, a), b in zip(whole.named_parameters(), chunked.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-6 * factor), name
    assert chunked.rows_at_once <= max(3 + chunk_size, 3)  # a photo's captions stay together
    assert chunk_size > 6 or chunked.rows_at_once < 13


def test_losses_are_in_full_float32_and_encoders_in_what_the_device_has(monkeypatch):
    """On CUDA "high" is TF32: for the encoders' forward and backward passes only."""
    seen, before = {}, torch.get_float32_matmul_precision()

    def note(name, *_):
        seen.setdefault(name, set()).add(torch.get_float32_matmul_precision())

    class Noting(Encoder):
        def forward(self, *inputs):
            note("encoders")
            images, text, *more = super().forward(*inputs)
            if images.requires_grad:
                images.register_hook(lambda gradient: note("encoders, backward"))
            return images, text, *more

    def noting_loss(images, text, *more):
        note("loss")
        text.register_hook(lambda gradient: note("loss, backward"))
        return info_nce_loss(images, text, *more)

    monkeypatch.setattr("src.training.info_nce_loss", noting_loss)
    try:
        torch.set_float32_matmul_precision("high")
        for chunk_size in (0, 4):
            contrastive_backward(Noting(), step_batch(), 0.1, chunk_size)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {
        "encoders": {"high"},
        "encoders, backward": {"high"},
        "loss": {"highest"},
        "loss, backward": {"highest"},
    }


@pytest.mark.parametrize("chunk_size", [0, 1, 2, 5, 12, 13, 50])
def test_chunks_hold_every_photo_and_caption_once(chunk_size):
    batch = step_batch()
    chunks = split_in_chunks(batch, chunk_size)
    photos = [i for photos, _ in chunks for i in range(7)[photos]]
    captions = [i for _, captions in chunks for i in range(13)[captions]]
    assert photos == list(range(7)) and captions == list(range(13))
    for photos, captions in chunks:
        owners = batch["photo_of_pair"][captions].tolist()
        assert set(owners) == set(range(7)[photos])
    assert len(chunks) == (min(7, math.ceil(13 / chunk_size)) if chunk_size else 1)


def test_all_processes_have_as_many_chunks_as_the_one_with_the_fewest_photos(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: tensor.fill_(3))
    assert len(split_in_chunks(step_batch(), 1)) == 3


def test_running_statistics_are_updated_once_a_step():
    """A batch of one chunk size: batch norm sees each chunk in two passes, and counts it in one."""
    class Normalised(Encoder):
        def __init__(self):
            super().__init__()
            self.image = torch.nn.Sequential(torch.nn.BatchNorm1d(6), self.image)

    encoder, batch = Normalised(), step_batch()
    contrastive_backward(encoder, batch, 0.1, 7)
    norm, expected = encoder.image[0], torch.nn.BatchNorm1d(6)
    chunks = split_in_chunks(batch, 7)
    for photos, _ in chunks:
        expected(batch["images"][photos])
    assert len(chunks) == 2 and norm.num_batches_tracked == 2 and norm.track_running_stats
    assert torch.equal(norm.running_mean, expected.running_mean)
    assert torch.equal(norm.running_var, expected.running_var)


@pytest.mark.parametrize("memory_size", [16, 0])
def test_chunks_of_the_real_model(memory_size):
    torch.manual_seed(0)
    model = MultiModalMemoryNetwork(**model_arguments("tiny", memory_size=memory_size))
    model = without_batch_norm(model)
    batch = {"images": torch.randn(6, 3, 32, 32), "text": torch.randint(1, 34, (12, 16)),
             "photo_ids": torch.arange(6), "photo_of_pair": torch.arange(6).repeat_interleave(2)}
    batch["text"][::3, 9:] = 0
    results = []
    for chunk_size in (0, 4, 2):
        model.zero_grad()
        loss = contrastive_backward(PairEncoder(model, None), batch, 0.1, chunk_size)
        results.append([loss] + [p.grad.clone() for p in model.parameters()])
    for other in results[1:]:  # without batch norm, some gradients are large
        for a, b in zip(results[0], other):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())


class Mean(torch.nn.Module):
    """In place of a pretrained text encoder."""

    def __init__(self):
        super().__init__()
        self.map = torch.nn.Linear(3, 5)

    def forward(self, inputs):
        return self.map(inputs["rows"]) * inputs["mask"]


@pytest.mark.parametrize("trained", [False, True])
def test_chunks_take_their_part_of_the_text_features(trained):
    torch.manual_seed(0)
    model = MultiModalMemoryNetwork(
        **model_arguments("tiny"), image_features=7, text_features=5)
    model.text_backbone = Mean()
    torch.nn.init.normal_(model.fusion.out.weight)  # which begins as nothing
    text_features = torch.randn(12, 5)
    if trained:
        text_features = {"rows": torch.randn(12, 3), "mask": torch.rand(12, 1)}
    batch = {"images": torch.randn(6, 7), "text": torch.randint(1, 34, (12, 16)),
             "text_features": text_features, "photo_ids": torch.arange(6),
             "photo_of_pair": torch.arange(6).repeat_interleave(2)}
    results = []
    for chunk_size in (0, 4):
        model.zero_grad()
        loss = contrastive_backward(PairEncoder(model, None), batch, 0.1, chunk_size)
        gradients = [p.grad for p in model.parameters()]
        assert (model.text_backbone.map.weight.grad is not None) == trained
        results.append([loss] + [g.clone() for g in gradients if g is not None])
    assert len(results[0]) == len(results[1])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*results))
