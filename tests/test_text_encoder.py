import pytest
import torch

from src.text_encoder import Block, TextEncoder
from tests.test_model import make_batch, make_model


def test_block_gives_some_tokens_as_it_gives_all():
    torch.manual_seed(0)
    block, x = Block(8, 2, 1), torch.randn(3, 5, 8)
    assert torch.allclose(block(x, num_tokens=2), block(x)[:, :2], atol=1e-6)


def test_padding_does_not_change_the_latent_of_a_caption():
    model, (_, text) = make_model().eval(), make_batch()
    alone = model(text=text[1:2, :6])["central_latent"]
    for width in (7, 8, 12, 40):
        padded = torch.zeros(1, width, dtype=torch.long)
        padded[0, :6] = text[1, :6]
        assert torch.allclose(model(text=padded)["central_latent"], alone, atol=1e-5)
    in_batch = model(text=text)["central_latent"][1:2]
    assert torch.allclose(in_batch, alone, atol=1e-5)


def test_padding_receives_no_gradient():
    model, (_, text) = make_model(), make_batch()
    embedded = []

    def keep_gradient(module, inputs, output):
        output.retain_grad()
        embedded.append(output)

    model.text_encoder.transformer.token_embedding.register_forward_hook(keep_gradient)
    model(text=text)["central_latent"].square().sum().backward()
    gradient = embedded[0].grad.abs().sum(-1)
    assert (gradient[1, 6:] == 0).all() and (gradient[1, :6] > 0).all()


def test_text_mask_says_which_tokens_are_real():
    model, (_, text) = make_model().eval(), make_batch()
    mask = torch.ones_like(text, dtype=torch.bool)
    mask[:, 6:] = False
    masked = model(text=text, text_mask=mask)["central_latent"]
    assert torch.allclose(masked, model(text=text[:, :6])["central_latent"], atol=1e-5)


def test_latent_of_nothing_but_padding_is_finite():
    latents = make_model().eval()(text=torch.zeros(2, 9, dtype=torch.long))["central_latent"]
    assert torch.isfinite(latents).all()


def test_order_of_the_tokens_matters():
    model, (_, text) = make_model().eval(), make_batch()
    forwards = model(text=text[:1])["central_latent"]
    backwards = model(text=text[:1].flip(1))["central_latent"]
    assert not torch.allclose(forwards, backwards, atol=1e-4)


def test_bag_of_tokens_is_the_mean_over_the_real_ones():
    torch.manual_seed(0)
    encoder = TextEncoder(34, 8, 6, num_heads=2, num_layers=0)
    text = torch.tensor([[3, 4, 0, 5, 9], [7, 0, 0, 0, 2]])
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]])
    weight = encoder.token_embedding.weight
    means = torch.stack([weight[[3, 4, 5]].mean(0), weight[7]])
    expected = encoder.projection(encoder.norm(means))
    assert torch.allclose(encoder(text, mask), expected, atol=1e-6)


def test_a_word_that_was_not_learned_hardly_changes_a_bag_of_tokens():
    torch.manual_seed(0)
    encoder = TextEncoder(50, 16, 16, num_heads=2, num_layers=0)
    with torch.no_grad():
        encoder.token_embedding.weight[[5, 6]] = torch.randn(2, 16)  # as if these were learned
        learned, with_new_word, other = (
            encoder(torch.tensor([ids])) for ids in ([5, 6], [5, 6, 7], [5, 5]))
    assert (with_new_word - learned).norm() < 0.1 * (other - learned).norm()


def test_text_transformer_is_initially_zero():
    torch.manual_seed(0)
    encoder, (_, text) = TextEncoder(34, 16, 8, num_heads=2, num_layers=1), make_batch()
    weight = encoder.token_embedding.weight
    means = torch.stack([weight[row[row > 0]].mean(0) for row in text])
    bag = encoder.projection(encoder.norm(means))
    assert torch.allclose(encoder(text), bag, atol=1e-6)


@pytest.mark.parametrize("number", [5, 6, 7, 16])
def test_captions_in_groups_of_similar_length_get_the_latents_of_each_alone(monkeypatch, number):
    monkeypatch.setattr("src.text_encoder.LENGTH_GROUP", 3)
    model = make_model().eval()
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(1, 12, (number,), generator=generator)
    text = torch.randint(1, 34, (number, 12), generator=generator)
    text[torch.arange(12) >= lengths[:, None]] = 0
    text[0, 0] = 0  # padding may be anywhere
    alone = torch.cat([model(text=row[None])["central_latent"] for row in text])
    assert torch.allclose(model(text=text)["central_latent"], alone, atol=1e-5)
