"""The networks that follow a transformer in a model of sentence-transformers.

`src/sentence_modules.py` reads which of them a model has. The features are those that the package
gives, which itself is not needed.
"""
import torch
from torch import nn

# Ways of pooling, and what the user is told about them.
RULES = {
    "cls": "CLS", "max": "the maximum over tokens", "mean": "the mean over tokens",
    "mean_sqrt_len_tokens": "the sum over tokens by the root of their number",
    "weightedmean": "the mean over tokens weighted by position", "lasttoken": "the last token"}


class Pooling(nn.Module):
    """States of tokens -> one vector for each text, or several ones concatenated.

    skipped: the number of tokens at the beginning, those of the prompt, that do not count.
    """

    def __init__(self, modes, skipped=0):
        super().__init__()
        self.modes, self.skipped = modes, skipped

    def forward(self, hidden, mask):
        """hidden (B, T, width), mask (B, T): 1 for tokens and 0 for padding, on whichever side
        -> (B, width x modes)."""
        hidden = hidden.float()
        padding_before = mask.int().argmax(1, keepdim=True)
        position = torch.arange(mask.shape[1], device=mask.device) - padding_before
        mask = mask * (position >= self.skipped)
        is_token = mask[:, :, None].to(hidden.dtype)
        texts = torch.arange(len(mask), device=mask.device)
        total, count = (hidden * is_token).sum(1), is_token.sum(1).clamp(min=1e-9)
        pooled = []
        for mode in self.modes:
            if mode == "cls":
                pooled.append(hidden[texts, mask.int().argmax(1)])
            elif mode == "lasttoken":
                last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
                pooled.append((hidden * is_token)[texts, last])
            elif mode == "max":
                pooled.append(hidden.masked_fill(is_token == 0, -torch.inf).amax(1))
            elif mode == "mean":
                pooled.append(total / count)
            elif mode == "mean_sqrt_len_tokens":
                pooled.append(total / count.sqrt())
            else:
                weights = is_token * (position[:, :, None] + 1)
                pooled.append((hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9))
        return torch.cat(pooled, 1)


class Dense(nn.Module):
    """A linear layer with an activation, and perhaps a residual connection."""

    def __init__(self, in_features, out_features, bias, activation_function, use_residual):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias)
        self.activation_function, self.residual = activation_function, None
        if use_residual:
            same = in_features == out_features
            self.residual = nn.Identity() if same else nn.Linear(in_features, out_features, False)

    def forward(self, x):
        features = self.activation_function(self.linear(x))
        return features if self.residual is None else features + self.residual(x)


class Normalize(nn.Module):
    def forward(self, x):
        return nn.functional.normalize(x, dim=-1)


class SentenceEncoder(nn.Module):
    """A transformer, the pooling of its tokens, and the modules after it -> features (B, width).

    pooling: None if the transformer makes features itself, as CLIP does. width: how many of the
    features are kept, None for all. rule: a text that tells the user all this.
    """

    def __init__(self, transformer, pooling, layers, width, rule):
        super().__init__()
        self.transformer, self.pooling = transformer, pooling
        self.layers, self.width, self.rule = layers, width, rule

    def forward(self, *images, **tokens):
        features = self.transformer(*images, **tokens)
        if self.pooling is not None:
            hidden = features.last_hidden_state
            if hidden.ndim == 4:  # a convnet's output, (B, width, H, W)
                hidden = hidden.flatten(2).transpose(1, 2)
            mask = tokens.get("attention_mask")
            if mask is None:
                mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            features = self.pooling(hidden, mask)
        return self.layers(features)[:, :self.width]
