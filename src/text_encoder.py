"""The text encoder: a bag of tokens and, in the larger presets, a transformer.

Shapes in this file: B batch, L text tokens, N and M tokens of an attention, D width."""
import math

import torch
import torch.nn.functional as F
from torch import nn

LENGTH_GROUP = 64  # captions of similar length that a CPU encodes at a time
PAD_ID = 0  # the token id that every tokenizer keeps for padding


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) of x (B, N, D) over context (B, M, D), or over x
    itself. mask: bool, broadcastable to (B, heads, N, M), True where attention is allowed; a row
    that may attend to nothing gives zeros. Raises ValueError if num_heads does not divide dim."""

    def __init__(self, dim, num_heads):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the width {dim}")
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, context=None, mask=None):
        # q, k, v: (B, heads, N or M, D / heads)
        context = x if context is None else context
        q = self.query(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key_value = self.key_value(context).unflatten(-1, (2, self.num_heads, -1))
        k, v = key_value.permute(2, 0, 3, 1, 4)
        if q.device.type == "cpu":  # here attention in bfloat16 is several times slower
            with torch.autocast("cpu", enabled=False):
                y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
        else:
            if mask is not None and q.device.type == "mps":
                # PyTorch 2.11 misreads a mask there that is the same for all heads
                # (github.com/pytorch/pytorch/pull/184180).
                mask = mask.expand(*q.shape[:3], k.shape[2]).contiguous()
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block. Plain SGD needs its untouched residual path to train a deep
    model; for the same reason both branches start small (cf. Goyal et al. 2017)."""

    def __init__(self, dim, num_heads, num_layers):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        std = 0.3 * dim**-0.5 / math.sqrt(2 * num_layers)
        for last_layer in (self.attention.out, self.mlp[2]):
            nn.init.normal_(last_layer.weight, std=std)

    def forward(self, x, mask=None, num_tokens=None):
        """x (B, N, D) -> (B, N, D), or the first num_tokens of them. All tokens are attended to."""
        normed = self.norm1(x)
        x = x[:, :num_tokens] + self.attention(normed[:, :num_tokens], normed, mask)
        return x + self.mlp(self.norm2(x))


def sinusoidal_positions(length, dim, device):
    """The fixed position encoding (length, D) of Vaswani et al. 2017, for any length."""
    position = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
    frequency = torch.exp(exponent * (-math.log(10000.0) / dim))
    return torch.cat([torch.sin(position * frequency), torch.cos(position * frequency)], dim=1)


class TextTransformer(nn.Module):
    """Token ids (B, L) and mask (B, L) -> latents (B, latent_dim): the mean over the real tokens.
    The output layer is initialised to zero."""

    def __init__(self, vocab_size, dim, latent_dim, num_heads, num_layers):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, dim, padding_idx=PAD_ID)
        self.blocks = nn.ModuleList(Block(dim, num_heads, num_layers) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, latent_dim)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, text, mask):
        if text.device.type == "cpu" and len(text) > 2 * LENGTH_GROUP:
            # The longest caption is three times as long as most. Encoding captions of similar
            # length together saves the computation of the padding.
            lengths = (mask * torch.arange(1, mask.shape[1] + 1)).amax(1)
            groups = lengths.argsort().split(LENGTH_GROUP)
            latents = []
            for rows in groups:
                longest = int(lengths[rows].max())
                latents.append(self.encode(text[rows, :longest], mask[rows, :longest]))
            original_order = torch.cat(groups).argsort()
            return torch.cat(latents)[original_order]
        return self.encode(text, mask)

    def encode(self, text, mask):
        x = self.token_embedding(text)
        x = x + sinusoidal_positions(x.shape[1], x.shape[2], x.device)
        for block in self.blocks:
            x = block(x, mask=mask[:, None, None, :])
        real = mask.unsqueeze(-1)
        return self.projection((self.norm(x) * real).sum(1) / real.sum(1).clamp(min=1))


class TextEncoder(nn.Module):
    """Token ids (B, L) -> text latents (B, latent_dim), independent of the padding: the mean of
    the token embeddings (a bag of tokens), normalised and projected. With num_layers > 0 a
    transformer is added, which knows the order of the tokens.

    The layer norm is applied to the mean, not to each token; otherwise a rare word that was hardly
    learned would weigh as much as a common one."""

    def __init__(self, vocab_size, dim, latent_dim, num_heads, num_layers):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, dim, padding_idx=PAD_ID)
        with torch.no_grad():  # a word has almost no weight until it is learned
            self.token_embedding.weight.mul_(0.02)
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, latent_dim)
        self.transformer = None
        if num_layers:
            self.transformer = TextTransformer(vocab_size, dim, latent_dim, num_heads, num_layers)

    def forward(self, text, text_mask=None):
        mask = text != PAD_ID if text_mask is None else text_mask.bool()
        weight = self.token_embedding.weight
        bag = F.embedding_bag(text * mask, weight, mode="mean", padding_idx=PAD_ID)
        latents = self.projection(self.norm(bag))
        if self.transformer is not None:
            latents = latents + self.transformer(text, mask)
        return latents
