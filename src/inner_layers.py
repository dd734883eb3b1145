"""Features of inner layers of a network, beside those of its last layer.

The last layers of a network forget what its own task does not need. One that tells classes apart,
for instance, forgets colours, numbers and surroundings, of which captions speak."""
import contextlib

import torch
from torch import nn

QUARTERS = (3, 4)  # of a network's depth, each of which gives the features of one layer
COPIES = 5  # of a photo that choose the layers; few tensors have as many channels, colours or parts


class InnerLayers(nn.Module):
    """An image network with features of two of its inner layers: photos (B, 3, H, W) -> (B, width).

    First come the network's own features (B, ...). Then, for the third and for the fourth quarter
    of its convolutions and linear layers, in the order in which they compute, the means over all
    places of what one of them takes: the one with the widest input, and of several the last. In
    most networks these are the activations in the middle of a block. The signed square root of the
    means evens out the few channels that respond strongly (Perronnin, Sanchez and Mensink 2010).

    `layers` are the names of these layers, which are found in the first call. Where there are none,
    the network keeps its own features alone."""

    def __init__(self, network):
        super().__init__()
        self.network, self.layers = network, None

    @property
    def own_rule(self):
        """A text that tells the user how the network's own features are taken from it."""
        return getattr(self.network, "rule", "") or "its own features"

    @property
    def rule(self):
        """A text that tells the user how all features are taken from the network."""
        inner = " and ".join(self.layers or ())
        return self.own_rule + (f", and the means of what {inner} take" if inner else "")

    def forward(self, images):
        if self.layers is None:
            self.layers = self._choose_layers(images)
        means = {}

        def keep(name, layer, features):
            channels = channel_dim(layer) % features.ndim
            places = [dim for dim in range(1, features.ndim) if dim != channels]
            mean = features.float().mean(places)
            # At zero the gradient of the square root would be infinite.
            mean = mean.sign() * mean.abs().clamp(min=1e-6).sqrt()
            means.setdefault(name, []).append(mean)

        with self._watch(self.layers, keep):
            features = self.network(images)
        if not (isinstance(features, torch.Tensor) and features.ndim == 2):
            return features  # what uses them says what is wrong
        # A network that splits a large batch calls its layers once for each part.
        return torch.cat([features, *(torch.cat(means[name]) for name in self.layers)], dim=1)

    @torch.no_grad()
    def _choose_layers(self, images):
        """Return the names of the layers whose input gives features."""
        images = images[:1].repeat(COPIES, 1, 1, 1)
        widths = []  # (name of a layer, width of its input), in the order in which they compute

        def note(name, layer, features):
            # A layer may also take the windows of a photo one by one, or, as a classifier does, one
            # vector for the whole photo.
            width = features.shape[channel_dim(layer)]
            if len(features) == len(images) and features[0].numel() > width:
                widths.append((name, width))

        with self._watch([name for name, layer in self.network.named_modules()
                          if isinstance(layer, (nn.Conv2d, nn.Linear))], note):
            self.network(images)
        called = [name for name, _ in widths]
        widths = [(name, width) for name, width in widths if called.count(name) == 1]
        chosen = []
        for quarter in QUARTERS:
            part = widths[(quarter - 1) * len(widths) // 4:quarter * len(widths) // 4]
            if part:
                widest = max(width for _, width in part)
                chosen.append([name for name, width in part if width == widest][-1])
        return chosen

    @contextlib.contextmanager
    def _watch(self, names, function):
        """Inside, function(name, layer, features) is called before a layer of one of these names
        takes its features."""
        def hook_of(name):
            def hook(layer, inputs, options):
                function(name, layer, inputs[0] if inputs else options["input"])
            return hook

        hooks = [self.network.get_submodule(name).register_forward_pre_hook(
                     hook_of(name), with_kwargs=True) for name in names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class MiddleLayer(nn.Module):
    """A text network with features of its middle layer: tensors by name -> (B, width).

    First come the network's own features, then the means over tokens of the states after half of
    the layers of `model`, the model of transformers in the network. If this has fewer than two
    layers or does not return their states, the network keeps its own features alone."""

    def __init__(self, network, model):
        super().__init__()
        self.network, self.layer = network, None
        self.model_name = {part: name for name, part in network.named_modules()}[model]

    @property
    def rule(self):
        """A text that tells the user how the features are taken from the network."""
        own = self.network.rule
        return own if self.layer is None else f"{own}, and the mean after layer {self.layer}"

    def forward(self, **tokens):
        states = []

        def ask_for_states(model, inputs, options):
            return inputs, options | {"output_hidden_states": True}

        def keep(model, inputs, output):
            states.extend(getattr(output, "hidden_states", None) or ())

        with contextlib.ExitStack() as hooks:
            model = self.network.get_submodule(self.model_name)
            for hook in (model.register_forward_pre_hook(ask_for_states, with_kwargs=True),
                         model.register_forward_hook(keep)):
                hooks.callback(hook.remove)
            features = self.network(**tokens)
        middle, mask = (len(states) - 1) // 2, tokens.get("attention_mask")  # the first: no layer
        if middle < 1 or mask is None or states[middle].shape[:2] != mask.shape:
            return features
        self.layer = middle
        is_token = mask[:, :, None].float()
        mean = (states[middle].float() * is_token).sum(1) / is_token.sum(1).clamp(min=1)
        return torch.cat([features, mean], dim=1)


def channel_dim(layer):
    """The dimension of the channels in the input of a convolution or of a linear layer."""
    return 1 if isinstance(layer, nn.Conv2d) else -1
