import copy
import math

import pytest
import torch

from src.losses import info_nce_loss
from src.model import (
    IMAGE,
    MAX_LOGIT_SCALE,
    PHOTO_WEIGHT,
    POOLING_SHARPNESS,
    TEXT,
    Block,
    FeatureHead,
    ImageEncoder,
    MultiModalMemoryNetwork,
    PatchComponents,
    ResidualConv,
    TestTimeMemory,
    TextEncoder,
)
from tests.conftest import model_arguments

# pytest would otherwise take the class for a test case.
TestTimeMemory.__test__ = False


def make_model(preset, seed=0, **changes):
    """One whose parts that begin as nothing have learned something."""
    torch.manual_seed(seed)
    model = MultiModalMemoryNetwork(**model_arguments(preset, **changes))
    torch.nn.init.normal_(model.fusion.out.weight)
    for module in model.modules():
        if isinstance(module, ResidualConv):
            torch.nn.init.kaiming_normal_(module.conv2.weight)
    if model.text_encoder.transformer:
        torch.nn.init.normal_(model.text_encoder.transformer.projection.weight)
    return model


def tiny(seed=0, **changes):
    return make_model("tiny", seed, **changes)


def batch(model_size=32, batch_size=4, length=12):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch_size, 3, model_size, model_size, generator=generator)
    text = torch.randint(1, 34, (batch_size, length), generator=generator)
    text[1, length // 2:] = 0
    return images, text


@pytest.mark.parametrize(
    "preset, low, high",
    [("tiny", 0, 1e6), ("small", 1e6, 10e6), ("base", 40e6, 47e6), ("large", 180e6, 220e6)],
)
def test_parameter_counts(preset, low, high):
    with torch.device("meta"):  # shapes only
        model = MultiModalMemoryNetwork(vocab_size=4000, **model_arguments(preset))
    assert low <= sum(p.numel() for p in model.parameters()) <= high


@pytest.mark.parametrize("preset", ["tiny", "small", "base"])
def test_every_parameter_receives_a_gradient_in_a_training_step(preset):
    model, (images, text) = make_model(preset), batch()
    of_images, of_text = model(images=images), model(text=text)
    loss = info_nce_loss(of_images["central_latent"], of_text["central_latent"], model.logit_scale)
    loss.backward()
    dead = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert not dead


def test_any_subset_of_modalities_but_none():
    model, (images, text) = tiny().eval(), batch()
    outputs = [model(images=images), model(text=text), model(images=images, text=text)]
    latents = [output["central_latent"] for output in outputs]
    assert all(latent.shape == (4, 64) for latent in latents)
    assert not torch.allclose(latents[0], latents[2]) and not torch.allclose(latents[1], latents[2])
    with pytest.raises(ValueError, match="neither"):
        model()


def test_presence_signals_tell_the_modalities_apart():
    """Of one latent, said to be a photo's or a caption's, fusion makes different things; without
    signals, not.
    """
    fusion, latent = tiny().eval().fusion, torch.randn(2, 64)
    assert not torch.allclose(fusion(latent, IMAGE), fusion(latent, TEXT))
    with torch.no_grad():
        fusion.type_embedding.weight.zero_()
        fusion.presence.weight.zero_()
    assert torch.equal(fusion(latent, IMAGE), fusion(latent, TEXT))


@pytest.mark.parametrize("length", [1, 100])
def test_a_photo_and_a_text_together_are_the_weighted_mean_of_both(length):
    """However long the latents of either are."""
    model, (images, text) = tiny().eval(), batch()
    with torch.no_grad():
        model.image_encoder.projection.weight *= length
    photo, words = (torch.nn.functional.normalize(model(**one)["central_latent"], dim=1)
                    for one in ({"images": images}, {"text": text}))
    both = model(images=images, text=text)["central_latent"]
    assert torch.allclose(both, PHOTO_WEIGHT * photo + (1 - PHOTO_WEIGHT) * words, atol=1e-6)


def test_without_layers_of_fusion_the_central_latent_is_the_encoders():
    torch.manual_seed(0)
    model = MultiModalMemoryNetwork(**model_arguments("tiny", fusion_layers=0)).eval()
    images, text = batch()
    photo, words = model.encode_images(images), model.encode_text(text, None, None)
    assert model.memory is None and model.memory_loss(photo) == 0
    assert torch.equal(model(images=images)["central_latent"], photo)
    assert torch.equal(model(text=text)["central_latent"], words)


def test_padding_changes_nothing():
    model, (_, text) = tiny().eval(), batch()
    alone = model(text=text[1:2, :6])["central_latent"]
    for width in (7, 8, 12, 40):
        padded = torch.zeros(1, width, dtype=torch.long)
        padded[0, :6] = text[1, :6]
        assert torch.allclose(model(text=padded)["central_latent"], alone, atol=1e-5)
    in_batch = model(text=text)["central_latent"][1:2]
    assert torch.allclose(in_batch, alone, atol=1e-5)


def test_padding_receives_no_gradient():
    model, (_, text) = tiny(), batch()
    embedded = []
    model.text_encoder.transformer.token_embedding.register_forward_hook(
        lambda module, inputs, output: (output.retain_grad(), embedded.append(output))[1])
    model(text=text)["central_latent"].square().sum().backward()
    gradient = embedded[0].grad.abs().sum(-1)
    assert (gradient[1, 6:] == 0).all() and (gradient[1, :6] > 0).all()


def test_a_word_that_was_not_learned_hardly_changes_a_bag_of_tokens():
    torch.manual_seed(0)
    encoder = TextEncoder(50, 16, 16, num_heads=2, num_layers=0)
    with torch.no_grad():
        encoder.token_embedding.weight[[5, 6]] = torch.randn(2, 16)  # as if learned
        both, with_new, one = (encoder(torch.tensor([ids])) for ids in ([5, 6], [5, 6, 7], [5, 5]))
    assert (with_new - both).norm() < 0.1 * (one - both).norm()


def test_text_mask_says_what_is_real():
    model, (_, text) = tiny().eval(), batch()
    mask = torch.ones_like(text, dtype=torch.bool)
    mask[:, 6:] = False
    masked = model(text=text, text_mask=mask)["central_latent"]
    assert torch.allclose(masked, model(text=text[:, :6])["central_latent"], atol=1e-5)


def test_text_of_padding_only_is_finite():
    latent = tiny().eval()(text=torch.zeros(2, 9, dtype=torch.long))["central_latent"]
    assert torch.isfinite(latent).all()


def test_word_order_matters():
    model, (_, text) = tiny().eval(), batch()
    assert not torch.allclose(
        model(text=text[:1])["central_latent"],
        model(text=text[:1].flip(1))["central_latent"],
        atol=1e-4,
    )


def test_the_transformer_of_texts_begins_as_nothing():
    torch.manual_seed(0)
    encoder, (_, text) = TextEncoder(34, 16, 8, num_heads=2, num_layers=1), batch()
    bag = encoder.projection(encoder.norm(torch.stack(
        [encoder.token_embedding.weight[row[row > 0]].mean(0) for row in text])))
    assert torch.allclose(encoder(text), bag, atol=1e-6)


@pytest.mark.parametrize("number", [5, 6, 7, 16])
def test_captions_in_groups_of_like_length_are_encoded_as_one_by_one(monkeypatch, number):
    monkeypatch.setattr("src.model.LENGTH_GROUP", 3)
    model = tiny().eval()
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(1, 12, (number,), generator=generator)
    text = torch.randint(1, 34, (number, 12), generator=generator)
    text[torch.arange(12) >= lengths[:, None]] = 0
    text[0, 0] = 0  # a gap, which is padding as well
    alone = torch.cat([model(text=row[None])["central_latent"] for row in text])
    assert torch.allclose(model(text=text)["central_latent"], alone, atol=1e-5)


@pytest.mark.parametrize("height, width", [(40, 32), (32, 40)])
def test_image_encoder_refuses_photos_that_cannot_be_halved_so_often(height, width):
    encoder = ImageEncoder((8, 8, 8, 8), 1, 16)
    with pytest.raises(ValueError, match=f"{height} x {width} pixels"):
        encoder(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("channels, units, height, width", [
    ((4, 6, 8), 1, 32, 48), ((4, 6, 8), 2, 8, 8), ((5,), 3, 6, 4)])
def test_an_image_latent_is_a_soft_maximum_over_all_places(channels, units, height, width):
    torch.manual_seed(0)
    encoder, seen = ImageEncoder(channels, units, 16).eval(), []
    encoder.convnet.register_forward_hook(lambda module, given, result: seen.append(result))
    latents = encoder(torch.randn(2, 3, height, width))
    places = seen[0].flatten(2)
    assert places.shape == (2, 16, height * width // 4 ** len(channels))
    pooled = (POOLING_SHARPNESS * places).exp().sum(2).log() / POOLING_SHARPNESS
    assert torch.allclose(latents, encoder.projection(encoder.norm(pooled)), atol=1e-5)
    convolutions = [module for module in encoder.modules() if isinstance(module, torch.nn.Conv2d)
                    and module.kernel_size == (3, 3)]
    assert len(convolutions) == 2 * units * len(channels)


@pytest.mark.parametrize("in_channels, channels, stride", [(6, 6, 1), (4, 8, 2), (4, 8, 1)])
def test_a_residual_unit_begins_as_its_shortcut(in_channels, channels, stride):
    torch.manual_seed(0)
    unit, x = ResidualConv(in_channels, channels, stride), torch.randn(2, in_channels, 8, 8)
    halved = x.unflatten(2, (-1, stride)).unflatten(4, (-1, stride)).mean((3, 5))
    assert torch.allclose(unit(x), unit.shortcut(halved))
    torch.nn.init.normal_(unit.conv2.weight)
    assert unit(x).shape == halved.shape[:1] + (channels,) + halved.shape[2:]
    assert not torch.allclose(unit(x), unit.shortcut(halved))


def test_the_components_of_patches_are_those_in_which_photos_differ():
    """Photos made of two patterns that change from patch to patch, and a little noise."""
    torch.manual_seed(0)
    stem = PatchComponents(number=2, size=4)
    patterns = torch.linalg.qr(torch.randn(48, 2))[0].T.view(2, 3, 4, 4)
    amounts = torch.randn(50, 2, 8, 8) * torch.tensor([3.0, 1.0]).view(2, 1, 1)
    photos = torch.nn.functional.conv_transpose2d(amounts, patterns, stride=4)
    stem.fit(photos + 0.01 * torch.randn_like(photos))
    cosines = stem.filters.flatten(1) @ patterns.flatten(1).T
    assert torch.allclose(cosines.abs(), torch.eye(2), atol=0.05)
    found = stem(photos)
    assert found.shape == (50, 4, 16, 16) and torch.equal(found[:, :2], -found[:, 2:])
    # Padded by one place, a patch begins at every second, from the first but one on.
    inner = torch.nn.functional.conv2d(photos[:, :, 1:, 1:], stem.filters, stride=2)
    assert torch.allclose(found[:, :2, 1:-1, 1:-1], inner[:, :, :14, :14], atol=1e-5)
    assert not list(stem.parameters())


def test_some_tokens_of_a_block_are_those_of_all():
    torch.manual_seed(0)
    block, x = Block(8, 2, 1), torch.randn(3, 5, 8)
    assert torch.allclose(block(x, num_tokens=2), block(x)[:, :2], atol=1e-6)


def test_a_bag_of_tokens_is_the_mean_of_the_real_ones():
    torch.manual_seed(0)
    encoder = TextEncoder(34, 8, 6, 2, 0)
    text = torch.tensor([[3, 4, 0, 5, 9], [7, 0, 0, 0, 2]])
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]])
    weight = encoder.token_embedding.weight
    means = torch.stack([weight[[3, 4, 5]].mean(0), weight[7]])
    expected = encoder.projection(encoder.norm(means))
    assert torch.allclose(encoder(text, mask), expected, atol=1e-6)


def test_features_are_standardised_and_can_be_given_back():
    torch.manual_seed(0)
    features = torch.randn(50, 6) * torch.tensor([1e-3, 1, 5, 100, 2, 0]) + 7
    head = FeatureHead(6, 6, dropout=0.5).eval()
    head.standardize(features)
    standardized = (features - head.mean) / head.std
    assert torch.allclose(standardized[:, 1:5].std(0), torch.ones(4), atol=1e-4)
    assert torch.isfinite(standardized).all()  # the last never changes
    head.standardize(features.half(), identity=True)
    with torch.autocast("cpu", torch.bfloat16):  # in which it would lose three digits
        assert torch.allclose(head(features), features, rtol=1e-5)
    assert not torch.equal(head.train()(features), features)


def test_beside_the_encoders_the_rest_begins_as_nothing():
    arguments = model_arguments("tiny", image_features=10, text_features=12)
    model = MultiModalMemoryNetwork(**arguments).eval()
    images, text, features = torch.randn(3, 10), batch(batch_size=3)[1], torch.randn(3, 12)
    expected = model.image_encoder(images), model.text_encoder(text) + model.text_head(features)
    found = model(images=images), model(text=text, text_features=features)
    for latents, output in zip(expected, found):
        assert torch.allclose(output["central_latent"], latents, atol=1e-6)
    with pytest.raises(ValueError, match="needs text_features"):
        model(text=text)


def test_refuses_a_width_that_the_heads_do_not_divide():
    with pytest.raises(ValueError, match="does not divide"):
        tiny(latent_dim=63)


def test_logit_scale_is_clamped():
    model = tiny()
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    model.clamp_logit_scale_()
    assert model.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)
    with torch.no_grad():
        model.logit_scale.fill_(-9.0)
    model.clamp_logit_scale_()
    assert model.logit_scale.item() == 0


def test_without_memory():
    model, (images, text) = tiny(memory_size=0), batch()
    assert model.memory is None and not [
        name for name in model.state_dict() if name.startswith("memory")
    ]
    latents = model(images=images, text=text)["central_latent"]
    assert model.memory_loss(latents) == 0 and latents.shape == (4, 64)


def memory_and_latents():
    torch.manual_seed(0)
    return TestTimeMemory(dim=32, memory_size=16, num_heads=4).eval(), torch.randn(10, 1, 32)


def test_memory_reads_its_slots():
    memory, latents = memory_and_latents()
    before = memory(latents)
    with torch.no_grad():
        memory.slots.add_(torch.randn_like(memory.slots))
    assert not torch.allclose(memory(latents), before)


def test_memory_loss_trains_memory_and_spares_encoders():
    memory, latents = memory_and_latents()
    latents.requires_grad_()
    memory.self_supervised_loss(latents).backward()
    assert latents.grad is None
    assert memory.slots.grad.abs().sum() > 0 and memory.attention.query.weight.grad.abs().sum() > 0


def test_test_time_updates_are_off_by_default():
    memory, latents = memory_and_latents()
    assert torch.equal(memory(latents), memory(latents)) and memory.adapted_slots is None


@pytest.mark.parametrize("lr", [0.1, 1.0, 1000.0])
def test_test_time_update_lowers_its_loss_and_reset_is_exact(lr):
    memory, latents = memory_and_latents()
    stored, before, state = (
        memory.slots.clone(),
        memory(latents),
        copy.deepcopy(memory.state_dict()),
    )
    loss_before = memory.self_supervised_loss(latents).item()
    memory.enable_test_time_updates(steps=3, lr=lr)
    adapted = memory(latents)
    assert memory.self_supervised_loss(latents).item() < loss_before
    assert not torch.equal(adapted, before)
    assert torch.equal(memory.slots, stored) and memory.slots.grad is None
    assert state.keys() == memory.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in memory.state_dict().items())
    memory.disable_test_time_updates()
    assert torch.equal(memory(latents), adapted)  # what was learned stays until reset
    memory.reset()
    assert torch.equal(memory(latents), before)


def test_test_time_updates_add_up_over_batches_and_stop_in_training():
    memory, latents = memory_and_latents()
    memory.enable_test_time_updates(steps=1)
    memory(latents)
    first = memory.adapted_slots.clone()
    memory(torch.randn(10, 1, 32))
    assert not torch.equal(memory.adapted_slots, first)
    first = memory.adapted_slots.clone()
    plain, _ = memory_and_latents()
    # training uses the stored slots
    assert torch.equal(memory.train()(latents), plain.train()(latents))
    assert torch.equal(memory.adapted_slots, first)


def test_training_after_adapting_sees_the_trained_slots_only():
    """In the memory's loss as in its output, whether or not somebody called reset."""
    memory, latents = memory_and_latents()
    plain, _ = memory_and_latents()
    memory.enable_test_time_updates()
    memory(latents)
    memory.train()
    plain.train()
    assert not torch.equal(memory.adapted_slots, memory.slots)
    assert torch.equal(memory(latents), plain(latents))
    loss = memory.self_supervised_loss(latents)
    assert torch.equal(loss, plain.self_supervised_loss(latents))
    loss.backward()
    assert memory.slots.grad.abs().sum() > 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode,
                                     lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_test_time_update_works_inside(context):
    model, (images, text) = tiny().eval(), batch()
    with torch.no_grad():
        before = model(images=images, text=text)["central_latent"]
    model.memory.enable_test_time_updates()
    with context():
        adapted = model(images=images, text=text)["central_latent"]
    assert (
        model.memory.adapted_slots is not None and model.memory.adapted_slots.dtype == torch.float32
    )
    assert not torch.equal(adapted.float(), before)
    assert all(p.grad is None for p in model.parameters())
    model.memory.reset()
    model.memory.disable_test_time_updates()
    with torch.no_grad():
        assert torch.equal(model(images=images, text=text)["central_latent"], before)


@pytest.mark.parametrize("latents, message", [
    (torch.empty(0, 1, 32), "empty"),
    (torch.full((2, 1, 32), float("nan")), "NaN"),
    (torch.full((2, 1, 32), float("inf")), "infinity"),
])
def test_test_time_update_refuses(latents, message):
    memory, _ = memory_and_latents()
    memory.enable_test_time_updates()
    with pytest.raises(ValueError, match=message):
        memory(latents)
    assert memory.adapted_slots is None


def test_test_time_update_refuses_senseless_settings():
    memory, _ = memory_and_latents()
    for arguments in (dict(steps=0), dict(lr=0.0)):
        with pytest.raises(ValueError, match="test-time updates need"):
            memory.enable_test_time_updates(**arguments)
