import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import resize

from src.evaluation import embed_dataset
from src.first_stage import prepare_splits
from src.fisher import (
    COMPONENTS,
    FISHER_WEIGHT,
    GAUSSIANS,
    FisherVector,
    FisherVectors,
    NetworkWithFisherVectors,
    build_network,
    make_fisher_vectors,
)
from src.model import IMAGE, MultiModalMemoryNetwork, combine_photo_and_text
from src.settings import make_settings
from src.training import PairEncoder, contrastive_backward
from src.utils import console
from tests.test_training import start_run


def smooth_photos(number=12, size=48, seed=0):
    """Smooth random pictures, normalised floats. The principal components of noise would all be
    equally large."""
    torch.manual_seed(seed)
    return F.interpolate(torch.randn(number, 3, size // 4, size // 4), size, mode="bilinear")


def stored_photos(number=12):
    """Such pictures as uint8, as a photo store keeps them."""
    return (smooth_photos(number, 64).clamp(-2, 2) * 60 + 127).byte()


@pytest.fixture(autouse=True, scope="module")
def small_photos():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("src.fisher.FISHER_PIXELS", 48)
        yield


@pytest.fixture(scope="module")
def vectors():
    fitted = FisherVectors()
    fitted.fit(stored_photos())
    return fitted


@pytest.fixture
def maps(vectors):
    """The maps of gradients and of colours of the photos that `vectors` was fit to."""
    return vectors.cells(vectors.load(stored_photos(), torch.arange(12)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    settings = dataclasses.replace(make_settings(model="tiny"), fisher=True)
    network = build_network(34, settings, {})
    torch.nn.init.normal_(network.fusion.out.weight)  # it is initially zero
    network.fisher_network.image_backbone.fit(stored_photos())
    return network


def log_likelihoods(mean, deviation, weight, descriptors):
    """The log-likelihood of each descriptor (N,) under each Gaussian (K,) with its weight, (N, K),
    by torch.distributions."""
    gaussians = torch.distributions.Normal(mean, deviation)
    return gaussians.log_prob(descriptors[:, None]).sum(2) + weight.log()


# -------------------------------------------------------------------------------- Fisher vectors


def test_descriptors_of_the_photos_that_were_fit_are_white(vectors, maps):
    gradients, _ = maps
    descriptors = vectors.gradients.descriptors(gradients).flatten(0, 1)[:, :COMPONENTS]
    patches = torch.cat([F.unfold(cells, 4).transpose(1, 2).flatten(0, 1) for cells in gradients])
    assert patches.shape == (len(descriptors), 8 * 16)
    assert descriptors.mean(0).abs().max() < 1e-2
    covariance = descriptors.T @ descriptors / len(descriptors)
    assert torch.allclose(covariance, torch.eye(COMPONENTS), atol=0.02)
    assert abs(vectors.gradients.weight.sum() - 1) < 1e-4


def test_statistics_are_sums_weighted_by_the_responsibilities(vectors):
    mixture, descriptors = vectors.colors, torch.randn(7, COMPONENTS + 2)
    responsibilities = log_likelihoods(
        mixture.mean, mixture.variance.sqrt(), mixture.weight, descriptors).softmax(1)
    count, first, second = mixture.statistics(descriptors)
    assert torch.allclose(count, responsibilities.sum(0), atol=1e-3)
    assert torch.allclose(first, responsibilities.T @ descriptors, atol=1e-2)
    assert torch.allclose(second, responsibilities.T @ descriptors.square(), atol=1e-2)


def test_fisher_vector_is_the_gradient_of_the_log_likelihood():
    """It is compared with the gradient by autograd, up to the factors of the paper, the signed root
    and the length."""
    torch.manual_seed(0)
    mixture = FisherVector(6)
    mixture.components.normal_().mul_(0.1)
    mixture.variance.uniform_(0.5, 2)
    maps = [torch.randn(1, 6, 9, 9), torch.randn(1, 6, 5, 5)]
    descriptors = mixture.descriptors(maps)[0]

    mean = mixture.mean.clone().requires_grad_()
    deviation = mixture.variance.sqrt().requires_grad_()
    log_likelihoods(mean, deviation, mixture.weight, descriptors).logsumexp(1).sum().backward()
    scale = deviation.detach() / mixture.weight.sqrt()[:, None]
    gradients = [mean.grad * scale, deviation.grad * scale / math.sqrt(2)]
    expected = torch.cat(gradients, dim=1).flatten()

    vector = mixture(maps)[0]
    assert len(vector) == mixture.width
    assert vector.square().mean() == pytest.approx(1.0, rel=1e-4)
    assert F.cosine_similarity(vector * vector.abs(), expected, dim=0) > 0.9999


def test_fitting_raises_the_likelihood_of_the_photos(vectors, maps):
    mixture = vectors.colors
    descriptors = mixture.descriptors(maps[1]).flatten(0, 1)
    fitted = log_likelihoods(mixture.mean, mixture.variance.sqrt(), mixture.weight, descriptors)
    mean, deviation = descriptors.mean(0, keepdim=True), descriptors.std(0, keepdim=True)
    one_gaussian = log_likelihoods(mean, deviation, torch.ones(1), descriptors)
    assert fitted.logsumexp(1).mean() > one_gaussian.logsumexp(1).mean() + 1


def test_vectors_depend_on_their_photo_alone(vectors):
    photos = smooth_photos(6, seed=1)
    result = vectors(photos)
    assert result.shape == (6, vectors.width) and vectors.width == 4 * GAUSSIANS * (COMPONENTS + 2)
    assert torch.isfinite(result).all()
    assert torch.allclose(vectors(photos[2:3]), result[2:3], atol=0.05)


def test_gradients_but_not_colours_are_independent_of_the_brightness(vectors):
    photos = smooth_photos(6, seed=1)
    gradients, colors = vectors(photos).split(vectors.gradients.width, dim=1)
    brighter_gradients, brighter_colors = vectors(photos + 0.7).split(
        vectors.gradients.width, dim=1)
    assert F.cosine_similarity(gradients, brighter_gradients).min() > 0.99
    assert F.cosine_similarity(colors, brighter_colors).max() < 0.9
    assert F.cosine_similarity(gradients, gradients.roll(1, 0)).max() < 0.9  # of other photos


def test_vectors_of_the_smallest_photos_and_of_flat_ones_are_finite(vectors):
    assert torch.isfinite(vectors(smooth_photos(2, 48))).all()
    assert torch.isfinite(vectors(torch.zeros(1, 3, 48, 56))).all()
    with pytest.raises(RuntimeError):
        vectors(smooth_photos(2, 44))


@pytest.mark.parametrize("views", [1, 2])
def test_vectors_of_stored_photos_equal_a_direct_computation(
        vectors, views, monkeypatch, capsys):
    """53 photos are more than one batch. The second view is the mirror image."""
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0)
    photos = stored_photos(53)
    result = make_fisher_vectors(vectors, photos, None, views)
    assert capsys.readouterr().out.startswith("computing Fisher vectors: 50 of 53 photos\n")
    assert result.shape == (53, views, vectors.width) and result.dtype == torch.float16
    for i in range(53):
        photo = vectors.load(photos, torch.tensor([i]))
        for view, shown in zip(range(views), (photo, photo.flip(-1))):
            assert torch.allclose(result[i, view].float(), vectors(shown)[0], atol=0.02), (i, view)


# ------------------------------------------------------------------------------- the two networks


def test_build_network_adds_the_fisher_network_if_the_settings_ask_for_it(model):
    assert type(build_network(34, make_settings(model="tiny"), {})) is MultiModalMemoryNetwork
    assert type(model) is NetworkWithFisherVectors


def test_latents_are_those_of_both_networks_side_by_side(model):
    model.eval()
    photos, text = smooth_photos(5), torch.randint(1, 34, (5, 9))
    latents = model(images=photos)["central_latent"]
    assert latents.shape == (5, 2 * 64)
    # The lengths weight the two cosines of which the cosine of two latents is the mean.
    for halves in (latents, model(text=text)["central_latent"]):
        lengths = halves.view(5, 2, -1).norm(dim=2)
        assert torch.allclose(lengths, torch.tensor([1, FISHER_WEIGHT]).sqrt(), atol=1e-5)

    memory_half, fisher_half = latents.chunk(2, dim=1)
    memory_latents = model.fuse(model.encode_images(resize(photos, 32)), IMAGE)
    assert torch.allclose(memory_half, F.normalize(memory_latents, dim=1), atol=1e-5)
    vectors = model.fisher_network.image_backbone(resize(photos, 48))
    fisher_latents = model.fisher_network(images=vectors)["central_latent"]
    expected = math.sqrt(FISHER_WEIGHT) * F.normalize(fisher_latents, dim=1)
    assert torch.allclose(fisher_half, expected, atol=1e-5)


def test_known_fisher_latents_are_not_computed_again(model):
    model.eval()
    photos, text = smooth_photos(5), torch.randint(1, 34, (5, 9))
    known_photos = model.fisher_network(images=resize(photos, 48))["central_latent"]
    known_texts = model.fisher_network(text=text)["central_latent"]
    model.fisher_network = None
    for inputs, known in (({"images": photos}, known_photos), ({"text": text}, known_texts)):
        latents = model(**inputs, fisher_latents=known)["central_latent"]
        expected = math.sqrt(FISHER_WEIGHT) * F.normalize(known, dim=1)
        assert torch.allclose(latents[:, 64:], expected, atol=1e-5)


def test_prepared_splits_are_evaluated_as_they_were(shapes):
    """The latents of the Fisher network, and the photos of val, are computed once."""
    run, splits = start_run(shapes, device="cpu", fisher=True, amp=False)
    run.model.fisher_network.image_backbone.fit(splits["train"].photos)
    expected = {name: embed_dataset(run.model, data) for name, data in splits.items()}
    prepared = prepare_splits(run, splits)
    for name in splits:
        latents = embed_dataset(run.model, prepared[name])
        for known, computed in zip(latents[:2], expected[name][:2]):
            # Fisher vectors of stored photos are resized as uint8, and kept as float16.
            assert F.cosine_similarity(known.float(), computed.float()).min() > 0.98
    for name in ("train", "test"):
        assert prepared[name].photos is splits[name].photos
    again = prepare_splits(run, prepared)
    assert again["train"].fisher_latents is prepared["train"].fisher_latents


def test_a_large_training_split_is_not_prepared(shapes, monkeypatch):
    monkeypatch.setattr("src.first_stage.FISHER_PHOTOS", 39)
    run, splits = start_run(shapes, device="cpu", fisher=True)
    prepared = prepare_splits(run, splits)
    assert prepared["train"].fisher_latents is None
    assert prepared["val"].fisher_latents is not None


def test_photo_combined_with_text_is_that_of_the_latents_of_both(model):
    model.eval()
    photos, text = smooth_photos(5), torch.randint(1, 34, (5, 9))
    both = model(images=photos, text=text)["central_latent"]
    expected = combine_photo_and_text(
        model(images=photos)["central_latent"], model(text=text)["central_latent"])
    assert torch.allclose(F.normalize(both), F.normalize(expected), atol=1e-5)


def test_steps_of_the_memory_network_leave_the_fisher_network_alone(model):
    batch = {"images": smooth_photos(4), "text": torch.randint(1, 34, (8, 9)),
             "photo_ids": torch.arange(4), "photo_of_pair": torch.arange(4).repeat_interleave(2)}
    assert torch.isfinite(contrastive_backward(PairEncoder(model, None), batch, 0.1))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("fisher_network."), name
