import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from src.image_encoder import ResidualConv
from src.losses import info_nce_loss
from src.model import (
    IMAGE,
    MAX_LOGIT_SCALE,
    PHOTO_WEIGHT,
    TEXT,
    FeatureHead,
    ModelConfig,
    MultiModalMemoryNetwork,
    TestTimeMemory,
)
from tests.conftest import model_arguments

# pytest would otherwise take the class for a test case.
TestTimeMemory.__test__ = False


def make_model(preset="tiny", **changes):
    """A model in which the layers that are initialised to zero have random weights."""
    torch.manual_seed(0)
    model = MultiModalMemoryNetwork(**model_arguments(preset, **changes))
    torch.nn.init.normal_(model.fusion.out.weight)
    for module in model.modules():
        if isinstance(module, ResidualConv):
            torch.nn.init.kaiming_normal_(module.conv2.weight)
    if model.text_encoder.transformer is not None:
        torch.nn.init.normal_(model.text_encoder.transformer.projection.weight)
    return model


def make_batch(number=4, length=12):
    """Photos and captions. The second caption has half of the length."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(number, 3, 32, 32, generator=generator)
    text = torch.randint(1, 34, (number, length), generator=generator)
    text[1, length // 2:] = 0
    return images, text


# ------------------------------------------------------------------------------ the whole model


@pytest.mark.parametrize(
    "preset, low, high",
    [("tiny", 0, 1e6), ("small", 1e6, 10e6), ("base", 40e6, 47e6), ("large", 180e6, 220e6)],
)
def test_number_of_parameters(preset, low, high):
    with torch.device("meta"):  # the weights get no memory
        model = MultiModalMemoryNetwork(vocab_size=4000, **model_arguments(preset))
    assert low <= sum(p.numel() for p in model.parameters()) <= high


def test_model_can_be_made_from_a_config_or_from_keywords():
    sizes = model_arguments("tiny", memory_size=8, vocab_size=50)
    torch.manual_seed(0)
    from_config = MultiModalMemoryNetwork(ModelConfig(**sizes))
    torch.manual_seed(0)
    from_keywords = MultiModalMemoryNetwork(**sizes)
    weights, other_weights = from_config.state_dict(), from_keywords.state_dict()
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert weights["memory.slots"].shape == (8, 64)
    assert weights["text_encoder.token_embedding.weight"].shape == (50, 64)


def test_model_config_refuses_unknown_sizes_and_changes():
    with pytest.raises(TypeError, match="latent_size"):
        MultiModalMemoryNetwork(latent_size=64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().latent_dim = 64


@pytest.mark.parametrize("preset", ["tiny", "small", "base"])
def test_every_parameter_receives_a_gradient_in_a_training_step(preset):
    model, (images, text) = make_model(preset), make_batch()
    image_latents = model(images=images)["central_latent"]
    text_latents = model(text=text)["central_latent"]
    info_nce_loss(image_latents, text_latents, model.logit_scale).backward()
    without_gradient = [name for name, p in model.named_parameters()
                        if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without_gradient


def test_model_takes_photos_or_text_or_both():
    model, (images, text) = make_model().eval(), make_batch()
    photo = model(images=images)["central_latent"]
    caption = model(text=text)["central_latent"]
    both = model(images=images, text=text)["central_latent"]
    assert photo.shape == caption.shape == both.shape == (4, 64)
    assert not torch.allclose(photo, both) and not torch.allclose(caption, both)
    with pytest.raises(ValueError, match="neither"):
        model()


@pytest.mark.parametrize("factor", [1, 100])
def test_photo_combined_with_text_is_a_weighted_mean_of_unit_vectors(factor):
    """The length of either latent does not matter."""
    model, (images, text) = make_model().eval(), make_batch()
    with torch.no_grad():
        model.image_encoder.projection.weight *= factor
    photo = F.normalize(model(images=images)["central_latent"], dim=1)
    caption = F.normalize(model(text=text)["central_latent"], dim=1)
    both = model(images=images, text=text)["central_latent"]
    expected = PHOTO_WEIGHT * photo + (1 - PHOTO_WEIGHT) * caption
    assert torch.allclose(both, expected, atol=1e-6)


def test_fusion_depends_on_the_modality():
    """The same latent gets another correction as a photo than as a caption. What tells fusion the
    modality are its type embedding and the presence bits."""
    fusion, latents = make_model().eval().fusion, torch.randn(2, 64)
    assert not torch.allclose(fusion(latents, IMAGE), fusion(latents, TEXT))
    with torch.no_grad():
        fusion.type_embedding.weight.zero_()
        fusion.presence.weight.zero_()
    assert torch.equal(fusion(latents, IMAGE), fusion(latents, TEXT))


def test_without_fusion_the_central_latent_is_the_encoders():
    model = MultiModalMemoryNetwork(**model_arguments("tiny", fusion_layers=0)).eval()
    images, text = make_batch()
    photo, caption = model.encode_images(images), model.encode_text(text, None, None)
    assert model.memory is None and model.memory_loss(photo) == 0
    assert torch.equal(model(images=images)["central_latent"], photo)
    assert torch.equal(model(text=text)["central_latent"], caption)


def test_model_without_memory():
    model, (images, text) = make_model(memory_size=0), make_batch()
    assert model.memory is None
    assert not [name for name in model.state_dict() if name.startswith("memory")]
    latents = model(images=images, text=text)["central_latent"]
    assert model.memory_loss(latents) == 0 and latents.shape == (4, 64)


def test_model_refuses_a_width_that_the_heads_do_not_divide():
    with pytest.raises(ValueError, match="does not divide"):
        make_model(latent_dim=63)


def test_logit_scale_is_clamped():
    model = make_model()
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    for value, clamped in ((9.0, MAX_LOGIT_SCALE), (-9.0, 0.0)):
        with torch.no_grad():
            model.logit_scale.fill_(value)
        model.clamp_logit_scale_()
        assert model.logit_scale.item() == pytest.approx(clamped)


# ------------------------------------------------------------- features of pretrained encoders


def test_dropout_leaves_out_the_same_features_of_all_rows():
    torch.manual_seed(0)
    head = FeatureHead(100, 100, dropout=0.5)
    with torch.no_grad():
        head.projection.weight.copy_(torch.eye(100))
        head.projection.bias.zero_()
    latents = head(torch.full((3, 100), 7.0))
    assert torch.equal(latents[0], latents[1])
    assert set(latents[0].tolist()) == {0.0, 14.0}
    assert not torch.equal(latents[0], head(torch.full((3, 100), 7.0))[0])  # another draw


def test_features_are_standardised_and_the_head_can_start_as_the_identity():
    torch.manual_seed(0)
    features = torch.randn(50, 6) * torch.tensor([1e-3, 1, 5, 100, 2, 0]) + 7
    head = FeatureHead(6, 6, dropout=0.5).eval()
    head.standardize(features)
    standardized = (features - head.mean) / head.std
    assert torch.allclose(standardized[:, 1:5].std(0), torch.ones(4), atol=1e-4)
    assert torch.isfinite(standardized).all()  # the last feature is constant
    head.standardize(features.half(), identity=True)
    with torch.autocast("cpu", torch.bfloat16):  # bfloat16 would lose three digits
        assert torch.allclose(head(features), features, rtol=1e-5)
    assert not torch.equal(head.train()(features), features)


def test_model_of_features_starts_without_a_correction_by_fusion():
    sizes = model_arguments("tiny", image_features=10, text_features=12)
    model = MultiModalMemoryNetwork(**sizes).eval()
    image_features, text_features = torch.randn(3, 10), torch.randn(3, 12)
    text = make_batch(number=3)[1]
    photo = model(images=image_features)["central_latent"]
    caption = model(text=text, text_features=text_features)["central_latent"]
    assert torch.allclose(photo, model.image_encoder(image_features), atol=1e-6)
    expected = model.text_encoder(text) + model.text_head(text_features)
    assert torch.allclose(caption, expected, atol=1e-6)
    with pytest.raises(ValueError, match="needs text_features"):
        model(text=text)


# --------------------------------------------------------------------------------------- memory


def memory_and_latents():
    torch.manual_seed(0)
    return TestTimeMemory(dim=32, memory_size=16, num_heads=4).eval(), torch.randn(10, 1, 32)


def test_memory_reads_its_slots():
    memory, latents = memory_and_latents()
    before = memory(latents)
    with torch.no_grad():
        memory.slots.add_(torch.randn_like(memory.slots))
    assert not torch.allclose(memory(latents), before)


def test_memory_loss_trains_the_memory_but_not_the_encoders():
    memory, latents = memory_and_latents()
    latents.requires_grad_()
    memory.self_supervised_loss(latents).backward()
    assert latents.grad is None
    assert memory.slots.grad.abs().sum() > 0 and memory.attention.query.weight.grad.abs().sum() > 0


def test_test_time_updates_are_off_by_default():
    memory, latents = memory_and_latents()
    assert torch.equal(memory(latents), memory(latents)) and memory.adapted_slots is None


@pytest.mark.parametrize("lr", [0.1, 1.0, 1000.0])
def test_test_time_update_lowers_the_loss_and_changes_only_the_adapted_slots(lr):
    memory, latents = memory_and_latents()
    before, state = memory(latents), copy.deepcopy(memory.state_dict())
    loss_before = memory.self_supervised_loss(latents).item()
    memory.enable_test_time_updates(steps=3, lr=lr)
    assert not torch.equal(memory(latents), before)
    assert memory.self_supervised_loss(latents).item() < loss_before
    assert memory.slots.grad is None
    assert state.keys() == memory.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in memory.state_dict().items())


def test_adapted_slots_stay_until_reset():
    memory, latents = memory_and_latents()
    before = memory(latents)
    memory.enable_test_time_updates()
    adapted = memory(latents)
    memory.disable_test_time_updates()
    assert torch.equal(memory(latents), adapted)
    memory.reset()
    assert torch.equal(memory(latents), before)


def test_test_time_updates_add_up_over_batches():
    memory, latents = memory_and_latents()
    memory.enable_test_time_updates(steps=1)
    memory(latents)
    after_one_batch = memory.adapted_slots.clone()
    memory(torch.randn(10, 1, 32))
    assert not torch.equal(memory.adapted_slots, after_one_batch)


def test_training_uses_the_trained_slots_and_leaves_the_adapted_ones():
    """In the memory's output and in its loss, although `reset` was not called."""
    memory, latents = memory_and_latents()
    never_adapted, _ = memory_and_latents()
    memory.enable_test_time_updates()
    memory(latents)
    adapted_slots = memory.adapted_slots.clone()
    assert not torch.equal(adapted_slots, memory.slots)

    memory.train()
    never_adapted.train()
    assert torch.equal(memory(latents), never_adapted(latents))
    loss = memory.self_supervised_loss(latents)
    assert torch.equal(loss, never_adapted.self_supervised_loss(latents))
    loss.backward()
    assert memory.slots.grad.abs().sum() > 0
    assert torch.equal(memory.adapted_slots, adapted_slots)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode,
                                     lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_test_time_update_works_under(context):
    model, (images, text) = make_model().eval(), make_batch()
    with torch.no_grad():
        before = model(images=images, text=text)["central_latent"]
    model.memory.enable_test_time_updates()
    with context():
        adapted = model(images=images, text=text)["central_latent"]
    assert model.memory.adapted_slots.dtype == torch.float32
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
def test_test_time_update_refuses_latents(latents, message):
    memory, _ = memory_and_latents()
    memory.enable_test_time_updates()
    with pytest.raises(ValueError, match=message):
        memory(latents)
    assert memory.adapted_slots is None


@pytest.mark.parametrize("settings", [dict(steps=0), dict(lr=0.0)])
def test_test_time_updates_refuse_settings(settings):
    memory, _ = memory_and_latents()
    with pytest.raises(ValueError, match="test-time updates need"):
        memory.enable_test_time_updates(**settings)
