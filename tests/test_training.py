"""One training step: forward and backward pass, chunks, moving average, CUDA graphs, optimizer."""
import contextlib
import copy
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_flickr8k_sgd
from src import training
from src.device import find_device
from src.losses import info_nce_loss
from src.model import MAX_LOGIT_SCALE, MultiModalMemoryNetwork
from src.settings import make_settings, size_before_crop
from src.training import (
    FIRST_LAYER_LR,
    LAYER_GROUPS,
    MAX_GRAPHS,
    CudaGraphs,
    MovingAverage,
    PairEncoder,
    RunState,
    build_optimizer,
    contrastive_backward,
    cosine_schedule,
    split_in_chunks,
    training_step,
)
from src.utils import augment
from src.utils.flickr8k_simple import epoch_batches, iterate_batches, place_photos
from src.utils.splits import load_splits
from src.utils.tokenizers import CharTokenizer
from tests.conftest import model_arguments, without_batch_norm

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# ------------------------------------------------------------------------ forward and backward


class StubEncoder(torch.nn.Module):
    """Stands in for `PairEncoder`: two small networks. A latent depends on its own row alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
        self.text = torch.nn.Sequential(
            torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.5))
        self.most_captions = 0  # in a forward pass with gradients

    def forward(self, images, text, text_features):
        if torch.is_grad_enabled():
            self.most_captions = max(self.most_captions, len(text))
        image_latents, text_latents = self.image(images), self.text(text)
        memory_losses = torch.stack([image_latents.square().mean(), text_latents.exp().mean()])
        return image_latents, text_latents, self.logit_scale, memory_losses


def stub_batch():
    """Seven photos with one to three captions each. The first and the last are the same photo."""
    generator = torch.Generator().manual_seed(5)
    return {
        "images": torch.randn(7, 6, generator=generator),
        "text": torch.randn(13, 3, generator=generator),
        "photo_ids": torch.tensor([4, 9, 2, 5, 7, 1, 4]),
        "photo_of_pair": torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 5, 6, 6]),
    }


def two_captions_per_photo(images):
    """A batch of these photos or features, each with two random captions."""
    number = len(images)
    return {"images": images, "text": torch.randint(1, 34, (2 * number, 16)),
            "photo_ids": torch.arange(number),
            "photo_of_pair": torch.arange(number).repeat_interleave(2)}


def loss_and_gradients(model, batch, chunk_size):
    """The loss of a step, and the gradients of the parameters that received one."""
    model.zero_grad()
    loss = contrastive_backward(PairEncoder(model, None), batch, 0.1, chunk_size)
    return [loss] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_pair_encoder_computes_all_that_a_step_needs():
    torch.manual_seed(0)
    model = MultiModalMemoryNetwork(**model_arguments("tiny")).eval()
    torch.nn.init.normal_(model.fusion.out.weight)  # it is initially zero
    batch = two_captions_per_photo(torch.randn(3, 3, 32, 32))
    photos, captions = batch["images"], batch["text"]
    images, text, scale, memory_losses = PairEncoder(model, None)(photos, captions, None)
    assert torch.equal(images, model(images=photos)["central_latent"])
    assert torch.equal(text, model(text=captions)["central_latent"])
    assert scale is model.logit_scale
    assert torch.equal(memory_losses[0], model.memory_loss(model.encode_images(photos)))
    assert torch.equal(memory_losses[1], model.memory_loss(model.encode_text(captions, None, None)))

    without = PairEncoder(model, None, with_memory_loss=False)(photos, captions, None)
    assert torch.equal(without[0], images) and torch.equal(without[1], text)
    assert torch.equal(without[3], torch.zeros(2)) and not without[3].requires_grad


def test_backward_without_chunks_equals_the_plain_loss():
    encoder, batch = StubEncoder(), stub_batch()
    loss = contrastive_backward(encoder, batch, 0.1)
    gradients = [p.grad.clone() for p in encoder.parameters()]

    encoder.zero_grad()
    photo = batch["photo_of_pair"]
    images, text, scale, memory_losses = encoder(batch["images"], batch["text"], None)
    plain_loss = info_nce_loss(images, text, scale, batch["photo_ids"], photo_of_pair=photo)
    (plain_loss + 0.1 * memory_losses.sum()).backward()
    assert torch.equal(loss, plain_loss) and not loss.requires_grad
    for gradient, p in zip(gradients, encoder.parameters()):
        assert torch.allclose(gradient, p.grad, rtol=1e-5, atol=1e-6)


def test_the_loss_of_a_step_knows_the_texts_that_photos_share():
    encoder, batch = StubEncoder(), stub_batch()
    photo = batch["photo_of_pair"]
    ids = batch["photo_ids"] % 3 + 1
    batch |= {"text_ids": ids[photo], "texts_of_photo": torch.stack([ids, ids + 1], 1)}
    loss = contrastive_backward(encoder, batch, 0.1)
    images, text, scale, _ = encoder(batch["images"], batch["text"], None)
    assert torch.equal(loss, info_nce_loss(
        images, text, scale, batch["photo_ids"], ids[photo], batch["texts_of_photo"], photo))
    assert loss < contrastive_backward(encoder, stub_batch(), 0.1)


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 5, 12, 13, 99])
@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_chunks_give_the_loss_and_gradients_of_the_whole_batch(chunk_size, factor):
    whole, chunked, batch = StubEncoder(), StubEncoder(), stub_batch()

    def scale(loss):
        return loss * factor

    expected = contrastive_backward(whole, batch, 0.1, scale=scale)
    loss = contrastive_backward(chunked, batch, 0.1, chunk_size, scale)
    assert torch.allclose(loss, expected, atol=1e-6)
    for (name, p), q in zip(whole.named_parameters(), chunked.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-5, atol=1e-6 * factor), name
    # The captions of a photo, of which there are at most three, stay in one chunk.
    assert chunked.most_captions <= 3 + chunk_size
    assert chunk_size > 6 or chunked.most_captions < 13


def test_only_the_encoders_may_use_tf32(monkeypatch):
    """The precision "high" allows TF32 on CUDA. The loss and its gradient are always computed in
    full float32."""
    precisions, before = {}, torch.get_float32_matmul_precision()

    def record(stage):
        precisions.setdefault(stage, set()).add(torch.get_float32_matmul_precision())

    class RecordingEncoder(StubEncoder):
        def forward(self, *inputs):
            record("encoders")
            images, *rest = super().forward(*inputs)
            if images.requires_grad:
                images.register_hook(lambda gradient: record("encoders, backward"))
            return images, *rest

    def recording_loss(images, text, *rest):
        record("loss")
        text.register_hook(lambda gradient: record("loss, backward"))
        return info_nce_loss(images, text, *rest)

    monkeypatch.setattr("src.training.info_nce_loss", recording_loss)
    try:
        torch.set_float32_matmul_precision("high")
        for chunk_size in (0, 4):
            contrastive_backward(RecordingEncoder(), stub_batch(), 0.1, chunk_size)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert precisions == {
        "encoders": {"high"},
        "encoders, backward": {"high"},
        "loss": {"highest"},
        "loss, backward": {"highest"},
    }


@pytest.mark.parametrize("chunk_size", [0, 1, 2, 5, 12, 13, 50])
def test_chunks_hold_every_photo_and_caption_once(chunk_size):
    batch = stub_batch()
    chunks = split_in_chunks(batch, chunk_size)
    photos = [i for photos, _ in chunks for i in range(7)[photos]]
    captions = [i for _, captions in chunks for i in range(13)[captions]]
    assert photos == list(range(7)) and captions == list(range(13))
    for photos, captions in chunks:
        photos_of_captions = batch["photo_of_pair"][captions].tolist()
        assert set(photos_of_captions) == set(range(7)[photos])
    assert len(chunks) == (min(7, math.ceil(13 / chunk_size)) if chunk_size else 1)


def test_number_of_chunks_is_limited_by_the_process_with_the_fewest_photos(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: tensor.fill_(3))
    assert len(split_in_chunks(stub_batch(), 1)) == 3


def test_running_statistics_are_updated_once_a_step():
    """Batch norm sees each chunk in two passes but updates its running statistics in one."""
    encoder, batch = StubEncoder(), stub_batch()
    norm = torch.nn.BatchNorm1d(6)
    encoder.image = torch.nn.Sequential(norm, encoder.image)
    contrastive_backward(encoder, batch, 0.1, chunk_size=7)

    expected, chunks = torch.nn.BatchNorm1d(6), split_in_chunks(batch, 7)
    for photos, _ in chunks:
        expected(batch["images"][photos])
    assert len(chunks) == 2 and norm.num_batches_tracked == 2 and norm.track_running_stats
    assert torch.equal(norm.running_mean, expected.running_mean)
    assert torch.equal(norm.running_var, expected.running_var)


@pytest.mark.parametrize("memory_size", [16, 0])
def test_chunks_equal_the_whole_batch_with_the_real_model(memory_size):
    torch.manual_seed(0)
    model = MultiModalMemoryNetwork(**model_arguments("tiny", memory_size=memory_size))
    model = without_batch_norm(model)
    batch = two_captions_per_photo(torch.randn(6, 3, 32, 32))
    batch["text"][::3, 9:] = 0
    expected = loss_and_gradients(model, batch, chunk_size=0)
    assert len(expected) == 1 + len(list(model.parameters()))
    for chunk_size in (4, 2):
        for a, b in zip(expected, loss_and_gradients(model, batch, chunk_size), strict=True):
            # Without batch norm, some gradients are large.
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())


class StubTextEncoder(torch.nn.Module):
    """Stands in for a pretrained text encoder."""

    def __init__(self):
        super().__init__()
        self.map = torch.nn.Linear(3, 5)

    def forward(self, inputs):
        return self.map(inputs["rows"]) * inputs["mask"]


@pytest.mark.parametrize("trained", [False, True])
def test_each_chunk_takes_its_rows_of_the_text_features(trained):
    """They are a tensor from a frozen text encoder, and a dict of its inputs if it is trained."""
    torch.manual_seed(0)
    model = MultiModalMemoryNetwork(**model_arguments("tiny"), image_features=7, text_features=5)
    model.text_backbone = StubTextEncoder()
    torch.nn.init.normal_(model.fusion.out.weight)  # it is initially zero
    batch = two_captions_per_photo(torch.randn(6, 7))
    batch["text_features"] = torch.randn(12, 5)
    if trained:
        batch["text_features"] = {"rows": torch.randn(12, 3), "mask": torch.rand(12, 1)}
    results = []
    for chunk_size in (0, 4):
        results.append(loss_and_gradients(model, batch, chunk_size))
        assert (model.text_backbone.map.weight.grad is not None) == trained
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------- optimizer and its company


def recipe_of_weights(model, optimizer):
    """Return {name of a parameter: (learning rate, weight decay)}."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: (group["lr"], group["weight_decay"])
            for group in optimizer.param_groups for p in group["params"]}


def test_optimizer_groups_have_their_learning_rates_and_weight_decays():
    settings = make_settings(model="tiny", lr=0.5, text_lr=4.0, weight_decay=0.02)
    model = MultiModalMemoryNetwork(**model_arguments("tiny"))
    model.memory.requires_grad_(False)
    optimizer = build_optimizer(model, settings, fused=False)
    recipe = recipe_of_weights(model, optimizer)
    assert recipe.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert recipe["image_encoder.projection.weight"] == (0.5, 0.02)
    assert recipe["image_encoder.projection.bias"] == (0.5, 0.0)
    assert recipe["logit_scale"] == (0.5, 0.0)
    assert recipe["text_encoder.token_embedding.weight"] == (2.0, 0.005)
    assert recipe["text_encoder.transformer.token_embedding.weight"] == (0.5, 0.02)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_the_first_layers_of_an_encoder_have_the_smallest_learning_rates():
    settings = make_settings(model="tiny", lr=0.5, finetune=0.1, weight_decay=0.02,
                             image_encoder="resnet18")
    model = MultiModalMemoryNetwork(**model_arguments("tiny"), image_features=3, text_features=3)
    model.image_backbone = torch.nn.Sequential(*[torch.nn.Linear(3, 3) for _ in range(20)])
    model.image_backbone[0].requires_grad_(False)  # it does not count
    model.text_backbone = torch.nn.Linear(3, 3)
    recipe = recipe_of_weights(model, build_optimizer(model, settings, fused=False))
    rates = [recipe[f"image_backbone.{i}.weight"][0] for i in range(1, 20)]
    assert rates == sorted(rates) and len(set(rates)) == LAYER_GROUPS
    assert rates[0] == pytest.approx(0.05 * FIRST_LAYER_LR) and rates[-1] == pytest.approx(0.05)
    steps = {round(high / low, 6) for low, high in zip(rates, rates[1:])}
    assert len(steps) == 2 and min(steps) == 1.0
    assert recipe["image_backbone.19.weight"][1] == 0.02
    assert recipe["image_backbone.19.bias"][1] == 0.0
    assert recipe["text_backbone.bias"] == (pytest.approx(0.05), 0.0)
    # What has been trained before has the learning rate of the last layers.
    assert recipe["image_encoder.projection.weight"] == (pytest.approx(0.05), 0.02)

    from_scratch = make_settings(model="tiny", lr=0.5, text_lr=1.0, finetune=0.1,
                                 text_encoder="a/b")
    recipe = recipe_of_weights(model, build_optimizer(model, from_scratch, fused=False))
    assert recipe["image_encoder.projection.weight"][0] == 0.5
    assert recipe["text_backbone.bias"][0] == pytest.approx(0.05)


@pytest.mark.parametrize("warmup, final", [(0.1, 0.0), (0.2, 0.3), (0.0, 1.0)])
def test_learning_rate_rises_to_its_peak_and_falls_to_its_final_share(warmup, final):
    schedule = cosine_schedule(warmup, final, 1000)
    rates = [schedule(step) for step in range(1001)]
    warmup_steps = max(1, 1000 * warmup)
    peak = rates.index(max(rates))
    assert peak <= warmup_steps
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[0] <= 1 / warmup_steps and rates[1000] == pytest.approx(final)
    assert rates[500] == pytest.approx((1 + final) / 2)


def set_weight(model, value):
    with torch.no_grad():
        model.weight.fill_(value)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_moving_average_equals_a_plain_computation(decay):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    initial_bias = model[0].bias.clone()
    average = MovingAverage(model, decay)
    expected = None
    for steps_before in range(40):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(5, 3))  # changes the statistics of batch norm
        average.update()

        current = {name: tensor.double() for name, tensor in model.state_dict().items()}
        if steps_before == 0:
            expected = current
        short_decay = min(decay, (1 + steps_before) / (10 + steps_before))
        for name, tensor in current.items():
            expected[name] = short_decay * expected[name] + (1 - short_decay) * tensor
    averaged = average.module.state_dict()
    for name in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        assert torch.allclose(averaged[name].double(), expected[name], rtol=1e-5, atol=1e-5), name
    assert averaged["1.num_batches_tracked"] == 40  # integers are copied
    assert torch.equal(averaged["0.bias"], initial_bias)  # frozen weights never change


@torch.no_grad()
def test_tied_weights_are_averaged_once():
    model = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(2))
    model.append(model[0])
    average = MovingAverage(model, 0.9)
    for level in (0.0, 1.0):
        for parameter in model.parameters():
            parameter.fill_(level)
        average.update()
    assert torch.equal(average.module[0].weight, average.module[1].weight)
    assert average.module[2] is average.module[0]


def test_moving_average_forgets_the_random_start():
    model = torch.nn.BatchNorm1d(1)
    average = MovingAverage(model, 0.9)
    for step in range(200):
        set_weight(model, 1000.0 if step < 5 else step)
        average.update()
        if step == 60:
            assert 50 < average.module.weight.item() < 60
    # The mean age of what is averaged is decay / (1 - decay) steps.
    assert average.module.weight.item() == pytest.approx(199 - 9, abs=0.1)

    slow = MovingAverage(model, 0.999)
    for step in range(200):
        set_weight(model, 1000.0 if step < 5 else 1.0)
        slow.update()
    # With a constant decay it would be above 800.
    assert slow.module.weight.item() == pytest.approx(1.0, abs=0.1)


def test_moving_average_can_be_saved_and_loaded():
    model = torch.nn.BatchNorm1d(1)
    saved, loaded = MovingAverage(model, 0.9), MovingAverage(model, 0.9)
    for value in (1.0, 2.0, 3.0):
        set_weight(model, value)
        model.num_batches_tracked.fill_(int(value))
        saved.update()
    loaded.load_state_dict(saved.state_dict())
    assert loaded.steps == 3 and loaded.module.num_batches_tracked == 3
    assert torch.equal(loaded.module.weight, saved.module.weight)
    set_weight(model, 4.0)
    for average in (saved, loaded):
        average.update()
    assert torch.equal(loaded.module.weight, saved.module.weight)


# --------------------------------------------------------------------------- the state of a run


def start_run(shapes, **given):
    """(run, splits) of a training on the folder `shapes` that writes no files."""
    settings = make_settings(synthetic=True, data_dir=str(shapes), batch_size=10, **given)
    splits, tokenizer = load_splits(settings)
    model = train_flickr8k_sgd.build_model(settings, tokenizer)
    device = find_device(settings.device)
    model.to(device, memory_format=torch.channels_last)
    return RunState(settings, model, tokenizer, device, total_steps=100), splits


def first_epoch(data):
    """The pairs of one epoch, (steps, 10), two captions per photo."""
    return epoch_batches(data.photo_of_caption, 2, 10, seed=0)


def test_photos_are_small_in_the_first_epochs(shapes, monkeypatch):
    run, splits = start_run(shapes, device="cpu", amp=False, epochs=5, start_size=16)
    data, crop = splits["train"], training.random_resized_crop_and_flip
    sides = []  # of the photos as stored, before they are cropped, and when they are encoded

    def recording_crop(images, *given):
        sides[-1].append(images.shape[-1])
        return crop(images, *given)

    monkeypatch.setattr(training, "random_resized_crop_and_flip", recording_crop)
    run.model.image_encoder.register_forward_pre_hook(
        lambda module, inputs: sides[-1].append(inputs[0].shape[-1]))
    for run.epoch in (1, 3, 4, 5):
        (batch,) = iterate_batches(data, data.photos, first_epoch(data)[:1], run.device)
        sides.append([batch["images"].shape[-1]])
        assert torch.isfinite(training_step(run, batch))
    assert sides == [[36, 18, 16], [36, 18, 16], [36, 36, 32], [36, 36, 32]]


@pytest.mark.parametrize("flip, view", [(0.0, 0), (1.0, 1)])
def test_features_are_those_of_the_photo_or_of_its_mirror_image(flip, view):
    features, text = torch.randn(4, 2, 5).half(), torch.ones(4, 3, dtype=torch.long)
    batch = {"images": features, "text": text}
    run = SimpleNamespace(settings=make_settings(flip=flip, word_dropout=0.0), epoch=1,
                          word_start=torch.zeros(34, dtype=torch.bool))
    training.augment(run, batch)
    assert torch.equal(batch["images"], features[:, view].float())


def test_gradients_of_a_step_include_the_weighted_memory_loss(shapes):
    run, _ = start_run(shapes, device="cpu", amp=False, memory_loss=0.3)
    batch = two_captions_per_photo(torch.randn(4, 3, 32, 32))
    slots = run.model.memory.slots
    training.forward_backward(run, batch)
    gradient = slots.grad.clone()
    run.optimizer.zero_grad()
    contrastive_backward(run.encode, batch, 0.3)
    assert torch.equal(gradient, slots.grad) and gradient.abs().sum() > 0


def test_update_equals_plain_sgd_with_nesterov_momentum(shapes):
    """With clipped gradients, the schedule and weight decay. The temperature stays in its bounds.
    """
    run, _ = start_run(shapes, device="cpu", amp=False, lr=0.5, momentum=0.8, warmup=0.05)
    with torch.no_grad():
        run.model.logit_scale.fill_(MAX_LOGIT_SCALE - 0.01)
    parameters = dict(run.model.named_parameters())
    group_of = {p: group for group in run.optimizer.param_groups for p in group["params"]}
    expected = {name: p.detach().double() for name, p in parameters.items()}
    momentum = dict.fromkeys(parameters, 0.0)
    schedule = cosine_schedule(0.05, run.settings.final_lr, 100)
    for step in range(3):
        for p in parameters.values():
            p.grad = torch.randn_like(p)
        run.model.logit_scale.grad.fill_(-100.0)  # towards its upper bound
        norm = math.sqrt(sum(p.grad.double().square().sum() for p in parameters.values()))
        for name, p in parameters.items():
            decay, lr = group_of[p]["weight_decay"], group_of[p]["initial_lr"] * schedule(step)
            gradient = p.grad.double() / norm + decay * expected[name]
            momentum[name] = 0.8 * momentum[name] + gradient
            expected[name] = expected[name] - lr * (gradient + 0.8 * momentum[name])
        expected["logit_scale"].clamp_(max=MAX_LOGIT_SCALE)
        training.update(run)
    for name, p in parameters.items():
        assert torch.allclose(p.double(), expected[name], rtol=1e-5, atol=1e-6), name
    assert run.model.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)


@pytest.mark.parametrize("weight, computed", [(0.1, True), (0.0, False)])
def test_memory_loss_is_computed_only_if_it_has_a_weight(shapes, weight, computed):
    run, _ = start_run(shapes, device="cpu", memory_loss=weight)
    assert run.encode.with_memory_loss == computed


def test_optimizer_is_not_fused_beside_a_gradient_scaler(shapes, monkeypatch):
    run, _ = start_run(shapes, device="cpu")
    assert run.optimizer.param_groups[0]["fused"]
    monkeypatch.setattr(training, "autocast_dtype", lambda amp, device: torch.float16)
    run, _ = start_run(shapes, device="cpu")
    assert run.scaler.is_enabled() and not run.optimizer.param_groups[0]["fused"]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # a skipped first step
def test_a_first_step_that_the_scaler_skips_leaves_no_momentum(shapes, monkeypatch):
    """The fused optimizer would leave its momentum uninitialised instead."""
    monkeypatch.setattr(training, "autocast_dtype", lambda amp, device: torch.float16)
    run, _ = start_run(shapes, device="cpu")
    before = [p.detach().clone() for p in run.model.parameters()]
    for p in run.model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    run.scaler.scale(torch.zeros(()))
    training.update(run)
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters()))
    assert not any(state.get("momentum_buffer") is not None
                   for state in run.optimizer.state.values())


@pytest.mark.parametrize("before, after", [(None, torch.float16), (torch.float16, None)])
def test_a_run_can_resume_in_another_precision(shapes, monkeypatch, before, after):
    """float16 needs a loss scaler and forbids the fused optimizer; float32 is the opposite."""
    runs = []
    for amp_dtype in (before, after):
        monkeypatch.setattr(training, "autocast_dtype", lambda *_, dtype=amp_dtype: dtype)
        runs.append(start_run(shapes, device="cpu")[0])
    runs[1].load_state_dict(runs[0].state_dict())
    for run, amp_dtype in zip(runs, (before, after)):
        scaled = amp_dtype == torch.float16
        assert run.scaler.is_enabled() == scaled
        assert all(group["fused"] != scaled for group in run.optimizer.param_groups)


# ------------------------------------------------------------------------------- steps on a GPU


class ForbidCopies(TorchDispatchMode):
    """Fails for an operation that involves tensors of the host and of the GPU at once."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        assert len({tensor.device.type for tensor in tensors}) < 2, f"{func} copies"
        return result


@pytest.mark.parametrize("preset", ["tiny", "small", "base"])
def test_a_step_never_synchronises_with_the_host(preset, monkeypatch):
    """Augmentation, encoders, fusion, loss and moving average run on fake CUDA tensors, which have
    no values: reading one on the host, or mixing devices, is an error. This needs no GPU."""
    tokenizer = CharTokenizer()
    settings = make_settings(model=preset, device="cuda", amp=False, color_jitter=0.2,
                             word_dropout=0.2, ema=0.0)
    augment._per_channel.cache_clear()
    with FakeTensorMode(), torch.device("cuda"):
        model = train_flickr8k_sgd.build_model(settings, tokenizer).train()
        model_copy = train_flickr8k_sgd.build_model(settings, tokenizer).train()
        run = RunState(settings, model, tokenizer, torch.device("cuda"), total_steps=10)
        # A deep copy of a fake tensor would not be fake.
        monkeypatch.setattr(copy, "deepcopy", lambda model: model_copy)
        average = MovingAverage(model, 0.9)
        side = size_before_crop(settings.image_size)
        # The first pass makes constants that later steps find ready, and may copy them to the GPU.
        for mode in (contextlib.nullcontext(), ForbidCopies()):
            batch = two_captions_per_photo(torch.zeros(4, 3, side, side, dtype=torch.uint8))
            with torch.device("cpu"), mode:  # the default device, so that code must name the GPU
                training.augment(run, batch)
                photo = batch["photo_of_pair"]
                images, text, scale, memory_losses = run.encode(
                    batch["images"], batch["text"], None)
                photo_ids = batch["photo_ids"]
                loss = info_nce_loss(images, text, scale, photo_ids, photo_of_pair=photo)
                loss += info_nce_loss(images, text, scale, photo_ids, photo_ids[photo] + 1,
                                      photo_ids[:, None] + 1, photo) + memory_losses.sum()
                average.update()
            assert loss.device.type == images.device.type == "cuda" and loss.shape == ()
    augment._per_channel.cache_clear()


class FakeGraph:
    """Replays as a CUDA graph does: it reads and writes the tensors that it was recorded with."""

    def __init__(self, function, inputs, result):
        self.function, self.inputs, self.result = function, inputs, result

    def replay(self):
        self.result.copy_(self.function(self.inputs))


def test_graphs_are_recorded_at_the_second_batch_of_a_shape(monkeypatch):
    """This needs no GPU, as the graph is fake."""
    recorded = []

    def record(self, function, batch):
        recorded.append(len(batch["x"]))
        inputs, result = {"x": batch["x"].clone()}, torch.zeros(())
        return FakeGraph(function, inputs, result), inputs, result

    monkeypatch.setattr(CudaGraphs, "record", record)
    graphs = CudaGraphs()

    def call(length, value):
        return graphs(lambda batch: batch["x"].sum(), {"x": torch.full((length,), value)})

    results = [call(3, 1.0), call(4, 1.0), call(3, 1.0), call(3, 2.0), call(4, 2.0)]
    assert results == [3, 4, 3, 6, 8]  # a replay overwrites no earlier result
    assert recorded == [3, 4] and (graphs.calls, graphs.replays) == (5, 3)

    for length in [*range(10, 20)] * 2:  # more shapes than there may be graphs
        assert call(length, 1.0) == length
    assert len(recorded) == len(graphs.graphs) == MAX_GRAPHS


@pytest.mark.parametrize("calls, replays, message", [
    (0, 0, None),
    (10, 5, None),
    (2000, 999, "1,001 of 2,000 steps ran kernel by kernel.* had 3 shapes"),
])
def test_graphs_warn_if_most_steps_ran_kernel_by_kernel(calls, replays, message):
    graphs = CudaGraphs()
    graphs.calls, graphs.replays, graphs.seen_shapes = calls, replays, {"a", "b", "c"}
    warning = graphs.warning()
    if message is None:
        assert warning is None
    else:
        assert re.search(message, warning)


@needs_gpu
def test_steps_do_not_wait_for_the_gpu(shapes):
    run, splits = start_run(shapes, device="cuda", amp=False, ema=0.9)
    data, device = splits["train"], torch.device("cuda")
    batches = first_epoch(data)
    run.model.train()
    try:
        photos = place_photos(data.photos, device)
        for i, batch in enumerate(iterate_batches(data, photos, torch.cat([batches] * 3), device)):
            if i == 2 * len(batches):  # by now cuDNN has chosen kernels and graphs are recorded
                torch.cuda.set_sync_debug_mode("error")
            training_step(run, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_replayed_graph_reads_its_batch_and_draws_new_random_numbers():
    graphs, results = CudaGraphs(), {"replayed": [], "plain": []}

    def sum_with_dropout(batch):
        return F.dropout(batch["x"], 0.5).sum()

    for seed in (0, 1, 2, 3, 0):
        batch = {"x": torch.full((100, 100), seed + 1.0, device="cuda")}
        torch.manual_seed(seed)
        results["replayed"].append(graphs(sum_with_dropout, batch).item())
        torch.manual_seed(seed)
        results["plain"].append(sum_with_dropout(batch).item())
    assert len(graphs.graphs) == 1
    assert results["replayed"] == results["plain"] and len(set(results["plain"])) == 4


@needs_gpu
def test_losses_are_the_same_with_and_without_graphs(shapes):
    losses = {}
    for use_graphs in (True, False):
        torch.manual_seed(0)
        run, splits = start_run(shapes, device="cuda", amp=False, ema=0.9)
        data, device = splits["train"], torch.device("cuda")
        if not use_graphs:
            run.graphs = None
        run.model.train()
        losses[use_graphs] = []
        for i, batch in enumerate(iterate_batches(data, data.photos, first_epoch(data), device)):
            torch.manual_seed(i)
            losses[use_graphs].append(training_step(run, batch).item())
        if use_graphs:
            assert len(run.graphs.graphs) > 1  # the captions have several lengths
    # Atomic sums add in any order, so that the losses drift apart in later steps.
    first_losses = [torch.tensor(values[:10]) for values in losses.values()]
    assert torch.allclose(*first_losses, rtol=5e-3)
