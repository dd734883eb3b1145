import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import resize

from src.fisher import (
    COMPONENTS,
    FISHER_WEIGHT,
    GAUSSIANS,
    FisherVector,
    FisherVectors,
    build_network,
    make_fisher_vectors,
    with_fisher_vectors,
)
from src.model import IMAGE, combine_photo_and_text
from src.settings import make_settings
from src.training import PairEncoder, contrastive_backward
from src.utils.flickr8k_simple import Flickr8kImageTextDataset


def photos(number=12, size=48, seed=0):
    """Smooth random pictures: noise has no components larger than others."""
    torch.manual_seed(seed)
    return F.interpolate(torch.randn(number, 3, size // 4, size // 4), size, mode="bilinear")


def stored(number=12, seed=0):
    """The same as a store keeps them."""
    return (photos(number, 64, seed).clamp(-2, 2) * 60 + 127).byte()


@pytest.fixture(autouse=True, scope="module")
def small_photos():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("src.fisher.FISHER_PIXELS", 48)
        yield


@pytest.fixture(scope="module")
def vectors():
    fitted = FisherVectors()
    fitted.fit(stored())
    return fitted


def seen():
    """What `vectors` was fit to."""
    return FisherVectors().load(stored(), torch.arange(12))


@pytest.fixture
def model():
    torch.manual_seed(0)
    settings = dataclasses.replace(make_settings(model="tiny"), fisher=True)
    made = build_network(34, settings, {})
    torch.nn.init.normal_(made.fusion.out.weight)
    made.fisher_network.image_backbone.fit(stored())
    return made


def test_the_descriptors_of_the_photos_it_was_fit_to_are_white(vectors):
    gradients, _ = vectors.cells(seen())
    descriptors = vectors.gradients.descriptors(gradients).flatten(0, 1)[:, :COMPONENTS]
    raw = torch.cat([F.unfold(cells, 4).transpose(1, 2).flatten(0, 1) for cells in gradients])
    assert raw.shape[1] == 8 * 16 and len(raw) == len(descriptors)
    assert descriptors.mean(0).abs().max() < 1e-2
    covariance = descriptors.T @ descriptors / len(descriptors)
    assert torch.allclose(covariance, torch.eye(COMPONENTS), atol=0.02)
    assert abs(vectors.gradients.weight.sum() - 1) < 1e-4


def test_statistics_are_sums_over_the_places_by_the_gaussians_responsibility(vectors):
    mixture, descriptors = vectors.colors, torch.randn(7, COMPONENTS + 2)
    gaussians = torch.distributions.Normal(mixture.mean, mixture.variance.sqrt())
    likelihood = gaussians.log_prob(descriptors[:, None]).sum(2) + mixture.weight.log()
    belongs = likelihood.softmax(1)
    count, first, second = mixture.statistics(descriptors)
    assert torch.allclose(count, belongs.sum(0), atol=1e-3)
    assert torch.allclose(first, belongs.T @ descriptors, atol=1e-2)
    assert torch.allclose(second, belongs.T @ descriptors.square(), atol=1e-2)


def test_a_fisher_vector_is_the_gradient_of_the_likelihood():
    """Up to the factors of the paper, the signed root and the length."""
    torch.manual_seed(0)
    mixture = FisherVector(6)
    mixture.components.normal_().mul_(0.1)
    mixture.variance.uniform_(0.5, 2)
    maps = [torch.randn(1, 6, 9, 9), torch.randn(1, 6, 5, 5)]
    descriptors = mixture.descriptors(maps)[0]
    mean, deviation = mixture.mean.clone(), mixture.variance.sqrt()
    for parameter in (mean, deviation):
        parameter.requires_grad_()
    gaussians = torch.distributions.Normal(mean, deviation)
    likelihood = (gaussians.log_prob(descriptors[:, None]).sum(2) + mixture.weight.log())
    likelihood.logsumexp(1).sum().backward()
    weight = mixture.weight.sqrt()[:, None]
    expected = torch.cat([mean.grad * deviation.detach() / weight,
                          deviation.grad * deviation.detach() / weight / math.sqrt(2)], 1).flatten()
    got = mixture(maps)[0]
    assert got.square().mean() == pytest.approx(1.0, rel=1e-4) and len(got) == mixture.width
    assert F.cosine_similarity(got * got.abs(), expected, dim=0) > 0.9999


def test_fitting_makes_the_photos_more_likely():
    def likelihood(mixture, descriptors):
        gaussians = torch.distributions.Normal(mixture.mean, mixture.variance.sqrt())
        log_prob = gaussians.log_prob(descriptors[:, None]).sum(2) + mixture.weight.log()
        return log_prob.logsumexp(1).mean()

    whole = FisherVectors()
    whole.fit(stored())
    descriptors = whole.colors.descriptors(whole.cells(seen())[1]).flatten(0, 1)
    one = FisherVector(6)  # every Gaussian that of all descriptors
    one.mean.copy_(descriptors.mean(0).expand_as(one.mean))
    one.variance.copy_(descriptors.var(0).expand_as(one.variance))
    assert likelihood(whole.colors, descriptors) > likelihood(one, descriptors) + 1


def test_vectors_are_the_photos_own_and_hardly_know_how_bright_it_is(vectors):
    images = photos(6, seed=1)
    made = vectors(images)
    assert made.shape == (6, vectors.width) and vectors.width == 4 * GAUSSIANS * (COMPONENTS + 2)
    assert torch.isfinite(made).all()
    assert torch.allclose(vectors(images[2:3]), made[2:3], atol=0.05)
    gradients = slice(0, vectors.gradients.width)

    def alike(a, b, part):
        return F.cosine_similarity(a[:, part], b[:, part], dim=1)

    brighter = vectors(images + 0.7)
    assert alike(made, brighter, gradients).min() > 0.99 > 0.9 > alike(
        made, brighter, slice(vectors.gradients.width, None)).max()
    assert alike(made, made.roll(1, 0), gradients).max() < 0.9


def test_the_smallest_photos_and_flat_ones(vectors):
    assert torch.isfinite(vectors(photos(2, 48))).all()
    assert torch.isfinite(vectors(torch.zeros(1, 3, 48, 56))).all()
    with pytest.raises(RuntimeError):
        vectors(photos(2, 44))


def test_two_networks_make_latents_of_two_halves_of_given_lengths(model):
    model.eval()
    text = torch.randint(1, 34, (5, 9))
    images = photos(5)
    smaller, larger = resize(images, 32), resize(images, 48)
    latents = model(images=images)["central_latent"]
    first, second = latents.chunk(2, dim=1)
    assert latents.shape == (5, 2 * 64)
    for halves in (latents, model(text=text)["central_latent"]):
        lengths = halves.view(5, 2, -1).norm(dim=2)
        assert torch.allclose(lengths, torch.tensor([1, FISHER_WEIGHT]).sqrt(), atol=1e-5)
    alone = model.fuse(model.encode_images(smaller), IMAGE)
    assert torch.allclose(first, F.normalize(alone, dim=1), atol=1e-5)
    both = F.normalize(model(images=images, text=text)["central_latent"])
    of_latents = combine_photo_and_text(latents, model(text=text)["central_latent"])
    assert torch.allclose(both, F.normalize(of_latents), atol=1e-5)
    vectors = model.fisher_network.image_backbone(larger)
    known = model(images=torch.zeros(5, 3, 32, 32), fisher_vectors=vectors)["central_latent"]
    assert torch.allclose(known[:, 64:], second, atol=1e-5)


def test_the_first_networks_steps_leave_the_second_alone(model):
    batch = {"images": photos(4), "text": torch.randint(1, 34, (8, 9)),
             "photo_ids": torch.arange(4), "photo_of_pair": torch.arange(4).repeat_interleave(2)}
    assert torch.isfinite(contrastive_backward(PairEncoder(model, None), batch, 0.1))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("fisher_network."), name


@pytest.mark.parametrize("views", [1, 2])
def test_vectors_of_stored_photos_and_of_their_mirror_images(vectors, views):
    images = stored(53)
    made = make_fisher_vectors(vectors, images, None, views)
    assert made.shape == (53, views, vectors.width) and made.dtype == torch.float16
    rows = torch.tensor([0, 49, 50, 52])
    shown = vectors.load(images, rows)
    for view, flipped in zip(range(views), (shown, shown.flip(-1))):
        assert torch.allclose(made[rows, view].float(), vectors(flipped), atol=0.05)


def test_vectors_are_made_once_and_not_of_too_many_training_photos(model, vectors, monkeypatch):
    class Split:
        photos, fisher_vectors = stored(12), None
        with_fisher_vectors = Flickr8kImageTextDataset.with_fisher_vectors

    monkeypatch.setattr("src.fisher.FISHER_PHOTOS", 11)
    splits = with_fisher_vectors(model, {"train": Split(), "val": Split()}, None)
    made = splits["val"].fisher_vectors
    assert splits["train"].fisher_vectors is None and made.shape == (12, vectors.width)
    monkeypatch.setattr("src.fisher.FISHER_PHOTOS", 12)
    splits = with_fisher_vectors(model, splits, None)
    assert torch.equal(splits["train"].fisher_vectors, made)
    assert splits["val"].fisher_vectors is made
