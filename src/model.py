"""The multimodal memory network: encoders -> test-time memory -> fusion -> one central latent.
Shapes: B batch, L text tokens, N image tokens, D width."""
import math

import torch
import torch.nn.functional as F
from torch import nn

IMAGE, TEXT = MODALITIES = (0, 1)
PHOTO_WEIGHT = 0.4  # of a photo in what it is together with a text (0.2 to 0.5 were tried)
LENGTH_GROUP = 64  # captions that a CPU encodes together, of like length
POOLING = 5.0  # of the maximum over a photo's places: 0 would be the mean; 30, nearly the maximum
PAD_ID = 0  # the token id that every tokenizer keeps for padding
MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's bound on the inverse temperature (Radford et al. 2021)


def combine_photo_and_text(photos, texts):
    """Central latents (B, D) of photos and of texts -> the weighted means of their unit vectors."""
    texts, photos = (F.normalize(latents.float(), dim=-1) for latents in (texts, photos))
    return torch.lerp(texts, photos, PHOTO_WEIGHT)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) of x (B, N, D) over context (B, M, D) or itself.
    mask: bool, broadcastable to (B, heads, N, M), True where attention is allowed; a row that may
    attend to nothing gives zeros."""

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
        q = self.query(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.key_value(x if context is None else context).unflatten(
            -1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if q.device.type == "cpu":  # where attention in bfloat16 is several times slower
            with torch.autocast("cpu", enabled=False):
                y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: plain SGD needs the untouched residual path to train depth."""

    def __init__(self, dim, num_heads, num_layers):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        # Branches start small (cf. Goyal et al. 2017), so that plain SGD has a straight path.
        for branch_end in (self.attention.out, self.mlp[2]):
            nn.init.normal_(branch_end.weight, std=0.3 * dim**-0.5 / math.sqrt(2 * num_layers))

    def forward(self, x, mask=None, num_tokens=None):
        """num_tokens: how many, from the first, to compute; all read all."""
        normed = self.norm1(x)
        x = x[:, :num_tokens] + self.attention(normed[:, :num_tokens], normed, mask)
        return x + self.mlp(self.norm2(x))


def sinusoidal_positions(length, dim, device):
    """Fixed position code (length, D) of Vaswani et al. 2017: any length, nothing to learn."""
    position = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
    frequency = torch.exp(exponent * (-math.log(10000.0) / dim))
    return torch.cat([torch.sin(position * frequency), torch.cos(position * frequency)], dim=1)


class TextTransformer(nn.Module):
    """Token ids (B, L), mask (B, L) -> latents (B, latent_dim), zero at first: the mean of real
    tokens."""

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
            # The longest caption is three times as long as most: padding is not computed.
            lengths = (mask * torch.arange(1, mask.shape[1] + 1)).amax(1)
            groups = lengths.argsort().split(LENGTH_GROUP)
            latents = [self.encode(text[rows, :longest], mask[rows, :longest])
                       for rows in groups for longest in [int(lengths[rows].max())]]
            return torch.cat(latents)[torch.cat(groups).argsort()]
        return self.encode(text, mask)

    def encode(self, text, mask):
        x = self.token_embedding(text)
        x = x + sinusoidal_positions(x.shape[1], x.shape[2], x.device)
        for block in self.blocks:
            x = block(x, mask=mask[:, None, None, :])
        real = mask.unsqueeze(-1)
        return self.projection((self.norm(x) * real).sum(1) / real.sum(1).clamp(min=1))


class TextEncoder(nn.Module):
    """Token ids (B, L) -> text latents (B, latent_dim), whatever the padding: a bag of tokens, to
    which a transformer adds what their order says. The bag is normalised as a whole: token by
    token, a rare word would weigh as much as one that was learned."""

    def __init__(self, vocab_size, dim, latent_dim, num_heads, num_layers):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, dim, padding_idx=PAD_ID)
        with torch.no_grad():  # so that a word weighs nearly nothing before it was learned
            self.token_embedding.weight.mul_(0.02)
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, latent_dim)
        self.transformer = (TextTransformer(vocab_size, dim, latent_dim, num_heads, num_layers)
                            if num_layers else None)

    def forward(self, text, text_mask=None):
        mask = text != PAD_ID if text_mask is None else text_mask.bool()
        weight = self.token_embedding.weight
        bag = F.embedding_bag(text * mask, weight, mode="mean", padding_idx=PAD_ID)
        latents = self.projection(self.norm(bag))
        return latents if self.transformer is None else latents + self.transformer(text, mask)


class PatchComponents(nn.Module):
    """Photos (B, 3, H, W) -> (B, 2 * number, H / 2, W / 2): how much of their largest principal
    components the patches hold, and the same negated, for the ReLU to come. `fit` to training
    photos, then fixed, as the whitening of Jordan 2024 ("94% on CIFAR-10 in 3.29 seconds"); but
    patches are wide and components few, which makes them smooth."""

    def __init__(self, number=16, size=8):
        super().__init__()
        self.size = size
        self.register_buffer("filters", torch.randn(number, 3, size, size) / size)

    @torch.no_grad()
    def fit(self, photos):
        """photos: (N, 3, H, W), normalised floats, as the model takes them."""
        patches = F.unfold(photos, self.size, stride=self.size).transpose(1, 2).flatten(0, 1)
        _, vectors = torch.linalg.eigh(patches.T @ patches)  # by rising eigenvalue
        self.filters.copy_(vectors.T.flip(0)[:len(self.filters)].view_as(self.filters))

    def forward(self, photos):
        y = F.conv2d(photos, self.filters, stride=2, padding=self.size // 2 - 1)
        return torch.cat([y, -y], dim=1)


class ResidualConv(nn.Module):
    """Pre-activation residual unit (He et al. 2016): (B, in_channels, H, W) -> (B, channels,
    H / stride, W / stride), halved by a mean before the convolutions, which would alias.
    In training, batch norm makes a photo's latent depend a little on the others of its batch."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight)
        nn.init.zeros_(self.conv2.weight)  # so that a unit begins as its shortcut
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.shortcut = nn.Identity()
        if in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, bias=False)

    def forward(self, x):
        y = self.conv1(self.pool(F.relu(self.norm1(x))))
        y = self.conv2(F.relu(self.norm2(y)))
        return self.shortcut(self.pool(x)) + y


class ImageEncoder(nn.Module):
    """Photos (B, 3, H, W), normalised floats -> image latents (B, latent_dim): a residual convnet
    over the components of their patches, and a soft maximum over its places.

    channels: of each stage, of `units` residual units. The resolution is halved at the start and
    after every stage but the last: H and W must be multiples of `stride`, 2 ** number of stages,
    else a ValueError is raised."""

    def __init__(self, channels, units, latent_dim):
        super().__init__()
        self.stride, self.stem, layers = 2 ** len(channels), PatchComponents(), []
        width = 2 * len(self.stem.filters)
        for stage, next_width in enumerate(channels):
            for unit in range(units):
                layers.append(ResidualConv(width, next_width, 1 if unit or not stage else 2))
                width = next_width
        layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, latent_dim, 1)]
        self.convnet = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(latent_dim)
        self.projection = nn.Linear(latent_dim, latent_dim)

    def forward(self, images):
        height, width = images.shape[2:]
        if height % self.stride or width % self.stride:
            raise ValueError(f"photos of {height} x {width} pixels are no multiples of "
                             f"{self.stride}")
        x = self.convnet(self.stem(images)).flatten(2)  # (B, latent_dim, N)
        pooled = (POOLING * x.float()).logsumexp(2) / POOLING
        return self.projection(self.norm(pooled))


class FeatureHead(nn.Module):
    """Features (B, width) of a pretrained encoder -> latents (B, latent_dim): standardised, dropped
    out, and mapped by one linear layer, in float32 under autocast too."""

    def __init__(self, width, latent_dim, dropout):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(width, latent_dim)

    @torch.no_grad()
    def standardize(self, features, identity=False):
        """Take mean and deviation of features (N, width). identity: begin by giving back what comes
        in; latent_dim must be width."""
        features = features.to(self.mean.device).float()
        self.mean.copy_(features.mean(0))
        std = features.std(0)
        self.std.copy_(std.clamp(min=0.01 * std.square().mean().sqrt()))  # some are always zero
        if identity:
            self.projection.weight.copy_(self.std.diag())
            self.projection.bias.copy_(self.mean)

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):
            standardized = (features.float() - self.mean) / self.std
            return self.projection(self.dropout(standardized))


class TestTimeMemory(nn.Module):
    """Learned slots (memory_size, dim) that every latent reads by attention: latents (B, D) ->
    norm(latents + attention over the slots).

    Test-time training (Sun et al. 2020): half of a latent's features are hidden, and what the
    memory makes of the rest is compared with the whole. This self-supervised loss is part of
    training but never reaches the encoders. With `enable_test_time_updates`, each call in eval mode
    first takes a few gradient steps on it for its own unlabelled batch. Only the copy
    `adapted_slots` moves, from call to call; `reset` drops it."""

    def __init__(self, dim, memory_size, num_heads):
        super().__init__()
        self.slots = nn.Parameter(torch.randn(memory_size, dim))
        self.norm_in = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.norm_out = nn.LayerNorm(dim)
        self.adapted_slots = None
        self.test_time_steps = 0

    def enable_test_time_updates(self, steps=3, lr=1.0):
        """From now on each forward in eval mode takes `steps` gradient steps of size `lr` first."""
        if steps < 1 or lr <= 0:
            raise ValueError(f"test-time updates need steps >= 1, lr > 0; not {steps=}, {lr=}")
        self.test_time_steps, self.test_time_lr = steps, lr

    def disable_test_time_updates(self):
        """No further updates; what was adapted stays in use until `reset`."""
        self.test_time_steps = 0

    def reset(self):
        self.adapted_slots = None

    def read(self, latents, slots):
        queries = self.norm_in(latents).flatten(0, -2)  # so that keys and values are made once
        return self.attention(queries[None], slots[None]).view_as(latents)

    def self_supervised_loss(self, latents, slots=None):
        """Associative recall, a scalar in [0, 2]: one less the cosine between latents (B, D) and
        what is recalled from each half of their features. `slots`: those in use by default."""
        slots = self.current_slots() if slots is None else slots
        latents = latents.detach()  # the encoders must not learn to be easy to recall
        target = self.norm_in(latents).detach()
        even = torch.arange(latents.shape[-1], device=latents.device) % 2 == 0
        recalled = torch.stack([self.read(latents * half, slots) for half in (even, ~even)])
        return (1 - F.cosine_similarity(recalled.float(), target.float(), dim=-1)).mean()

    def current_slots(self):
        """In training always the trained ones."""
        return self.slots if self.training or self.adapted_slots is None else self.adapted_slots

    def adapt(self, latents):
        """Take the gradient steps on `adapted_slots`; one that does not lower the loss is halved,
        at most ten times. Raises ValueError for latents that are empty or not finite."""
        if latents.numel() == 0:
            raise ValueError("test-time update: the batch is empty")
        # Also under the caller's no_grad or inference_mode, and in float32 whatever its autocast.
        full_precision = torch.autocast(latents.device.type, enabled=False)
        with torch.inference_mode(False), torch.enable_grad(), full_precision:
            latents = latents.detach().clone().float()
            if not torch.isfinite(latents).all():
                raise ValueError("test-time update: the batch holds NaN or infinity")
            slots = self.current_slots().detach().float()
            for _ in range(self.test_time_steps):
                slots = slots.requires_grad_()
                loss = self.self_supervised_loss(latents, slots)
                (gradient,) = torch.autograd.grad(loss, slots)
                step = self.test_time_lr * gradient
                slots = slots.detach()
                for _ in range(10):
                    with torch.no_grad():
                        if self.self_supervised_loss(latents, slots - step) < loss:
                            slots = slots - step
                            break
                    step = step / 2
            self.adapted_slots = slots

    def forward(self, latents):
        if self.test_time_steps and not self.training:
            self.adapt(latents)
        return self.norm_out(latents + self.read(latents, self.current_slots()))


class Fusion(nn.Module):
    """A modality's latents (B, D) -> what is added to them, at first zero. Presence signals: the
    latent carries the modality's type embedding, the central token, which begins as that latent and
    reads it, a code of the presence bits."""

    def __init__(self, dim, num_heads, num_layers):
        super().__init__()
        self.type_embedding = nn.Embedding(len(MODALITIES), dim)
        self.presence = nn.Linear(len(MODALITIES), dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, num_layers) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        nn.init.normal_(self.type_embedding.weight, std=0.02)
        self.register_buffer("one_hot", torch.eye(len(MODALITIES)), persistent=False)

    def forward(self, latents, modality):
        central = latents + self.presence(self.one_hot[modality])
        x = torch.stack([central, latents + self.type_embedding.weight[modality]], dim=1)
        for i, block in enumerate(self.blocks, start=1):  # the last makes the central token alone
            x = block(x, num_tokens=1 if i == len(self.blocks) else None)
        return self.out(self.norm(x[:, 0]))


class MultiModalMemoryNetwork(nn.Module):
    """Photos, captions or both -> one central latent in a shared space: the encoder's latent, to
    which fusion adds what it makes of that and of what the memory holds, at first nothing; of both,
    what `combine_photo_and_text` makes of these. The defaults are the preset `base`; with
    memory_size=0 there is no memory, with fusion_layers=0 neither that nor fusion.

    `model` takes images (B, 3, H, W), normalised floats, or text (B, L), token ids with 0 for
    padding, or both; text_mask: (B, L) bool, True for real tokens, by default text != 0. It returns
    {"central_latent": (B, D)}, not of unit length. Raises ValueError when neither is given. Of the
    inverse temperature, `logit_scale` is the logarithm.

    image_features, text_features: widths of pretrained encoders' features, 0 for none. With such,
    `images` are features (B, image_features), and beside `text` come `text_features` (B,
    text_features), whose latents are added to those of the model's own encoder. With a pretrained
    encoder itself in `image_backbone` or `text_backbone`, which `src/pretrained.py` makes, `images`
    may be what that takes, `text_features` the dict of tensors that its `prepare` gives."""

    def __init__(self, vocab_size=34, text_embed_dim=512, latent_dim=512, memory_size=128,
                 num_heads=8, num_layers=4, fusion_layers=4, conv_channels=(64, 128, 256, 512),
                 conv_units=2, dropout=0.0, image_features=0, text_features=0):
        super().__init__()
        self.text_encoder = TextEncoder(vocab_size, text_embed_dim, latent_dim, num_heads,
                                        num_layers)
        self.image_encoder = (FeatureHead(image_features, latent_dim, dropout) if image_features
                              else ImageEncoder(conv_channels, conv_units, latent_dim))
        self.text_head = FeatureHead(text_features, latent_dim, dropout) if text_features else None
        self.image_backbone = self.text_backbone = None
        self.fusion = Fusion(latent_dim, num_heads, fusion_layers) if fusion_layers else None
        self.memory = (TestTimeMemory(latent_dim, memory_size, num_heads)
                       if fusion_layers and memory_size else None)  # fusion reads it
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's start

    def encode_images(self, images):
        if self.image_backbone is not None and images.ndim == 4:
            images = self.image_backbone(images)
        return self.image_encoder(images)

    def encode_text(self, text, text_mask, text_features):
        latents = self.text_encoder(text, text_mask)
        if self.text_head is None:
            return latents
        if text_features is None:
            raise ValueError("the model needs text_features beside the text")
        if isinstance(text_features, dict):
            text_features = self.text_backbone(text_features)
        return latents + self.text_head(text_features)

    def forward(self, text=None, images=None, text_mask=None, text_features=None):
        if text is None and images is None:
            raise ValueError("the model needs images, text or both; neither was given")
        if images is not None:
            images = central = self.fuse(self.encode_images(images), IMAGE)
        if text is not None:
            text = self.encode_text(text, text_mask, text_features)
            text = central = self.fuse(text, TEXT)
        if images is not None and text is not None:
            central = combine_photo_and_text(images, text)
        return {"central_latent": central}

    def fuse(self, latents, modality):
        """An encoder's latents (B, D) of one of MODALITIES -> central latents (B, D)."""
        if self.fusion is None:
            return latents
        remembered = latents if self.memory is None else self.memory(latents)
        return latents + self.fusion(remembered, modality)

    def memory_loss(self, latents):
        """`TestTimeMemory.self_supervised_loss` of encoders' latents; zero without a memory."""
        return self.memory.self_supervised_loss(latents) if self.memory else latents.new_zeros(())

    @torch.no_grad()
    def clamp_logit_scale_(self):
        """Keep the temperature within CLIP's bounds; call it after each optimizer step."""
        self.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)
