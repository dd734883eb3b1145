"""The features of inner layers beside a network's own."""
import copy
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn

from src.inner_layers import InnerLayers, MiddleLayer


def signed_root(x):
    return x.sign() * x.abs().sqrt()


class Block(nn.Module):
    """Takes maps (B, width, H, W), or with `last` tokens (B, N, width), to four times the width and
    back."""

    def __init__(self, width, last):
        super().__init__()
        make = nn.Linear if last else (lambda *sizes: nn.Conv2d(*sizes, 1))
        self.expand, self.reduce = make(width, 4 * width), make(4 * width, width)

    def forward(self, x):
        return x + self.reduce(self.expand(x).relu())


class Network(nn.Module):
    def __init__(self, blocks, tokens):
        super().__init__()
        self.tokens = tokens
        self.blocks = nn.ModuleList(Block(3, tokens) for _ in range(blocks))
        self.head = nn.Linear(3, 5)

    def forward(self, images):
        x = images.flatten(2).transpose(1, 2) if self.tokens else images
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1) if self.tokens else x.mean((2, 3)))


@pytest.mark.parametrize("tokens", [False, True])
@torch.no_grad()
def test_the_widest_layers_of_the_third_and_of_the_fourth_quarter_are_added(tokens):
    network, images = Network(8, tokens), torch.randn(2, 3, 6, 4)
    features = InnerLayers(network)(images)
    expected = [network(images)]
    x = images.flatten(2).transpose(1, 2) if tokens else images
    for i, block in enumerate(network.blocks):
        if i in (5, 7):
            inner = block.expand(x).relu()
            expected.append(signed_root(inner.mean(1) if tokens else inner.mean((2, 3))))
        x = block(x)
    assert features.shape == (2, 5 + 12 + 12)
    assert torch.allclose(features, torch.cat(expected, 1), atol=1e-3)


def test_the_rule_names_the_layers():
    wrapped = InnerLayers(Network(8, False))
    wrapped.network.rule = "its own output"
    wrapped(torch.randn(2, 3, 4, 4))
    assert wrapped.rule == ("its own output, and the means of what blocks.5.reduce and "
                            "blocks.7.reduce take")


def test_layers_that_see_one_vector_or_windows_and_shared_layers_are_left_out():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.window, self.shared, self.vector = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, images):
            tokens = images.flatten(2).transpose(1, 2)
            windows = self.window(tokens.reshape(-1, 2, 3)).view_as(tokens)
            return self.vector(self.shared(self.shared(windows)).mean(1))

    wrapped, images = InnerLayers(Windows()), torch.randn(2, 3, 4, 4)
    assert torch.equal(wrapped(images), wrapped.network(images))
    assert wrapped.layers == [] and wrapped.rule == "its own features"


def test_features_of_a_photo_do_not_depend_on_its_batch():
    network, images = Network(8, False), torch.randn(3, 3, 4, 4)
    together = InnerLayers(network)(images)
    alone = InnerLayers(network)
    assert torch.allclose(torch.cat([alone(image[None]) for image in images]), together, atol=1e-6)


def test_a_copy_keeps_its_own_features_and_gradients_are_finite():
    wrapped = InnerLayers(Network(8, False))
    wrapped(torch.randn(2, 3, 4, 4))
    other = copy.deepcopy(wrapped)
    with torch.no_grad():
        other.network.blocks[7].expand.weight.zero_()
        other.network.blocks[7].expand.bias.zero_()
    images = torch.randn(2, 3, 4, 4)
    features = other(images)
    assert (features[:, -12:] == 0).all() and (wrapped(images)[:, -12:] > 0).any()
    features.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in other.parameters())


@pytest.mark.parametrize("name, width", [
    ("resnet18", 512 + 256 + 512), ("mobilenet_v3_small", 1024 + 240 + 576),
    ("efficientnet_b0", 1280 + 672 + 1152), ("shufflenet_v2_x0_5", 1024 + 96 + 192)])
@torch.no_grad()
def test_layers_of_torchvisions_models(name, width):
    model = torchvision.models.get_model(name, weights=None).eval()
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    model.set_submodule(linear[-1], nn.Identity())
    wrapped = InnerLayers(model)
    assert wrapped(torch.randn(2, 3, 64, 64)).shape == (2, width)
    assert len(wrapped.layers) == 2


class States(nn.Module):
    """As a model of transformers: returns the states before and after each of its four layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

    def forward(self, states, attention_mask, output_hidden_states=False):
        all_states = [states]
        for layer in self.layers:
            all_states.append(layer(all_states[-1]).relu())
        return SimpleNamespace(last_hidden_state=all_states[-1],
                               hidden_states=all_states if output_hidden_states else None)


class LastToken(nn.Module):
    rule = "the last token"

    def __init__(self):
        super().__init__()
        self.model = States()

    def forward(self, **tokens):
        return self.model(**tokens).last_hidden_state[:, -1]


@torch.no_grad()
def test_the_mean_over_tokens_after_the_middle_layer_is_added():
    network = LastToken()
    wrapped = MiddleLayer(network, network.model)
    states, mask = torch.randn(2, 5, 3), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    features = wrapped(states=states, attention_mask=mask)
    for layer in network.model.layers[:2]:
        states = layer(states).relu()
    means = torch.stack([states[0].mean(0), states[1, 2:].mean(0)])
    assert torch.allclose(features[:, 3:], means, atol=1e-6)
    assert wrapped.rule == "the last token, and the mean after layer 2"
    assert network.model(states, mask).hidden_states is None  # nothing stays behind in the model


def test_a_copy_of_a_text_network_has_its_own_middle_layer():
    network = LastToken()
    copied = copy.deepcopy(MiddleLayer(network, network.model))
    copied.network.model.layers[0].weight.data.zero_()
    copied.network.model.layers[0].bias.data.fill_(-1)
    tokens = dict(states=torch.randn(1, 5, 3), attention_mask=torch.ones(1, 5))
    after = copied.network.model.layers[1].bias.relu()
    assert torch.allclose(copied(**tokens)[0, 3:], after)


class Keywords(Network):
    """Calls its layers with a keyword."""

    def forward(self, images):
        for block in self.blocks:
            images = images + block.reduce(input=block.expand(input=images).relu())
        return images.mean((2, 3))


class Parts(Network):
    """Splits its batch."""

    def forward(self, images):
        return torch.cat([super(Parts, self).forward(part) for part in images.split(6)])


class TokensFirst(Network):
    """Takes two tokens of each photo, as (tokens, photos, width)."""

    def forward(self, images):
        x = images.mean((2, 3)).expand(2, -1, -1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(0))


@torch.no_grad()
def test_layers_may_be_called_with_a_keyword_or_for_parts_of_a_batch():
    images = torch.randn(13, 3, 4, 4)
    for kind in (Keywords, Parts):
        wrapped = InnerLayers(kind(8, False))
        features = wrapped(images)
        assert wrapped.layers == ["blocks.5.reduce", "blocks.7.reduce"]
        assert features.shape[0] == 13 and features.shape[1] > 2 * 12
        alone = torch.cat([wrapped(image[None]) for image in images])
        assert torch.allclose(features, alone, atol=1e-5)


@torch.no_grad()
def test_tokens_before_photos_give_no_features():
    wrapped = InnerLayers(TokensFirst(8, True))
    assert wrapped(torch.randn(2, 3, 4, 4)).shape == (2, 5) and wrapped.layers == []


@pytest.mark.parametrize("result", [lambda x: (x,), lambda x: {"x": x}, lambda x: x[:, :, None]])
def test_a_network_that_returns_something_else_is_left_alone(result):
    class Other(Network):
        def forward(self, images):
            return result(super().forward(images))

    network, images = Other(8, False), torch.randn(2, 3, 4, 4)
    assert type(InnerLayers(network)(images)) is type(network(images))
