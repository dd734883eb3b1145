"""The multimodal memory network: encoders -> memory -> fusion -> one central latent.

Shapes in this file: B batch, L text tokens, N image positions, D width."""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

IMAGE, TEXT = MODALITIES = (0, 1)
PHOTO_WEIGHT = 0.4  # of the photo when a photo and a text are combined; 0.2 to 0.5 were tried
LENGTH_GROUP = 64  # captions of similar length that a CPU encodes at a time
POOLING_SHARPNESS = 5.0  # of the soft maximum over a photo's positions; 0 would be the mean
PAD_ID = 0  # the token id that every tokenizer keeps for padding
MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's bound on the inverse temperature (Radford et al. 2021)


def combine_photo_and_text(photos, texts):
    """Central latents (B, D) of photos and of texts -> the weighted mean (B, D) of their unit
    vectors, which stands for the photo together with the text."""
    texts = F.normalize(texts.float(), dim=-1)
    photos = F.normalize(photos.float(), dim=-1)
    return torch.lerp(texts, photos, PHOTO_WEIGHT)


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


class PatchComponents(nn.Module):
    """Photos (B, 3, H, W) -> (B, 2 * number, H / stride, W / stride), stride being 2 or 4: the
    projections of their patches on the largest principal components, and their negatives, as a ReLU
    follows, which would lose them. With a stride of 4 the ReLU is applied here, and its output is
    averaged over 2 x 2 places.

    The components are fit to training photos and then fixed, like the whitening layer of Jordan
    2024 ("94% on CIFAR-10 in 3.29 Seconds"). Unlike there, the patches are wide and the components
    few, which makes the filters smooth."""

    def __init__(self, number=16, size=8, stride=2):
        super().__init__()
        self.size, self.stride = size, stride
        self.register_buffer("filters", torch.randn(number, 3, size, size) / size)

    @torch.no_grad()
    def fit(self, photos):
        """Set the filters to the principal components of the patches of photos (N, 3, H, W), which
        are normalised floats as the model takes them."""
        patches = F.unfold(photos, self.size, stride=self.size).transpose(1, 2).flatten(0, 1)
        _, vectors = torch.linalg.eigh(patches.T @ patches)  # in order of rising eigenvalue
        largest = vectors.T.flip(0)[:len(self.filters)]
        self.filters.copy_(largest.view_as(self.filters))

    def forward(self, photos):
        y = F.conv2d(photos, self.filters, stride=2, padding=self.size // 2 - 1)
        y = torch.cat([y, -y], dim=1)
        return y if self.stride == 2 else F.avg_pool2d(F.relu(y), 2)


class ResidualConv(nn.Module):
    """Pre-activation residual unit (He et al. 2016): (B, in_channels, H, W) -> (B, channels,
    H / stride, W / stride). The resolution is reduced by average pooling before the convolutions,
    as strided convolutions would alias. In training, batch norm makes a photo's latent depend a
    little on the other photos of its batch."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight)
        nn.init.zeros_(self.conv2.weight)  # so that each unit starts as its shortcut
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.shortcut = nn.Identity()
        if in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, bias=False)

    def forward(self, x):
        y = self.conv1(self.pool(F.relu(self.norm1(x))))
        y = self.conv2(F.relu(self.norm2(y)))
        return self.shortcut(self.pool(x)) + y


class ImageEncoder(nn.Module):
    """Photos (B, 3, H, W), normalised floats -> image latents (B, latent_dim): fixed patch
    components, a residual convnet, and a soft maximum (log-sum-exp) over the positions.

    channels: the channels of each stage, which has `units` residual units. The resolution is
    divided by stem_stride at the start, and by 2 after every stage but the last. H and W must be
    multiples of the product, `stride`; otherwise ValueError is raised."""

    def __init__(self, channels, units, latent_dim, stem_stride=2):
        super().__init__()
        self.stride = stem_stride * 2 ** (len(channels) - 1)
        self.stem, layers = PatchComponents(stride=stem_stride), []
        width = 2 * len(self.stem.filters)
        for stage, next_width in enumerate(channels):
            for unit in range(units):
                stride = 2 if stage > 0 and unit == 0 else 1
                layers.append(ResidualConv(width, next_width, stride))
                width = next_width
        if stem_stride == 4:
            # Without weights, nothing before the first convolution has a gradient to compute.
            layers[0].norm1 = nn.BatchNorm2d(2 * len(self.stem.filters), affine=False)
        layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, latent_dim, 1)]
        self.convnet = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(latent_dim)
        self.projection = nn.Linear(latent_dim, latent_dim)

    def forward(self, images):
        height, width = images.shape[2:]
        if height % self.stride or width % self.stride:
            raise ValueError(f"photos of {height} x {width} pixels are not multiples of "
                             f"{self.stride}")
        x = self.convnet(self.stem(images)).flatten(2)  # (B, latent_dim, N)
        pooled = (POOLING_SHARPNESS * x.float()).logsumexp(2) / POOLING_SHARPNESS
        return self.projection(self.norm(pooled))


class FeatureHead(nn.Module):
    """Features (B, width) of a pretrained encoder -> latents (B, latent_dim): standardised, with
    dropout, through one linear layer. It computes in float32 under autocast as well.

    Dropout leaves out the same features of all rows of a batch. To draw them for each row takes a
    CPU a fifth of a step on Fisher vectors, and is no better."""

    def __init__(self, width, latent_dim, dropout):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(width, latent_dim)

    @torch.no_grad()
    def standardize(self, features, identity=False):
        """Standardise by the mean and standard deviation of these features (N, width). identity:
        start as the identity, which requires latent_dim to equal width."""
        features = features.to(self.mean.device).float()
        self.mean.copy_(features.mean(0))
        std = features.std(0)
        typical = std.square().mean().sqrt()
        self.std.copy_(std.clamp(min=0.01 * typical))  # some features are always zero
        if identity:
            self.projection.weight.copy_(self.std.diag())
            self.projection.bias.copy_(self.mean)

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):
            standardized = (features.float() - self.mean) * self.dropout(1 / self.std)
            return self.projection(standardized)


class TestTimeMemory(nn.Module):
    """A memory of learned slots (memory_size, dim) that every latent reads by attention:
    latents (B, D) -> norm(latents + attention over the slots).

    It can go on learning without labels (test-time training, Sun et al. 2020). The self-supervised
    loss hides half of a latent's features and compares what the memory recalls from the other half
    with the whole latent. In training it is added with the weight `memory_loss` of the settings,
    and its gradient never reaches the encoders. After `enable_test_time_updates`, each call in eval
    mode first takes a few gradient steps on the loss of its own batch. They change only the copy
    `adapted_slots`, which stays from call to call until `reset` drops it."""

    def __init__(self, dim, memory_size, num_heads):
        super().__init__()
        self.slots = nn.Parameter(torch.randn(memory_size, dim))
        self.norm_in = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.norm_out = nn.LayerNorm(dim)
        self.adapted_slots = None
        self.test_time_steps = 0

    def enable_test_time_updates(self, steps=3, lr=1.0):
        """From now on each forward in eval mode first takes `steps` gradient steps of size `lr`.
        Raises ValueError unless both are positive."""
        if steps < 1 or lr <= 0:
            raise ValueError(f"test-time updates need steps >= 1 and lr > 0, not {steps=}, {lr=}")
        self.test_time_steps, self.test_time_lr = steps, lr

    def disable_test_time_updates(self):
        """Stop updating. The adapted slots stay in use until `reset`."""
        self.test_time_steps = 0

    def reset(self):
        self.adapted_slots = None

    def read(self, latents, slots):
        queries = self.norm_in(latents).flatten(0, -2)  # one batch, so one set of keys and values
        return self.attention(queries[None], slots[None]).view_as(latents)

    def self_supervised_loss(self, latents, slots=None):
        """Associative recall, a scalar in [0, 2]: one minus the cosine between latents (B, D) and
        what is recalled from either half of their features. slots: by default those in use."""
        slots = self.current_slots() if slots is None else slots
        latents = latents.detach()  # the encoders must not learn latents that are easy to recall
        target = self.norm_in(latents).detach()
        even = torch.arange(latents.shape[-1], device=latents.device) % 2 == 0
        recalled = torch.stack([self.read(latents * half, slots) for half in (even, ~even)])
        return (1 - F.cosine_similarity(recalled.float(), target.float(), dim=-1)).mean()

    def current_slots(self):
        """The adapted slots where there are some, but in training always the trained ones."""
        if self.training or self.adapted_slots is None:
            return self.slots
        return self.adapted_slots

    def adapt(self, latents):
        """Take the gradient steps on `adapted_slots`. A step that does not lower the loss is
        halved, at most ten times. Raises ValueError for latents that are empty or not finite."""
        if latents.numel() == 0:
            raise ValueError("test-time update: the batch is empty")
        # The caller may be under no_grad, inference_mode or autocast.
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
    """Latents (B, D) of one modality -> a correction (B, D) that is added to them, initially zero.

    A transformer reads two tokens: the latent with the embedding of its modality's type, and the
    central token, which starts as the latent plus an encoding of the presence bits, that is, of
    which modalities are there."""

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
        for i, block in enumerate(self.blocks, start=1):
            is_last = i == len(self.blocks)
            x = block(x, num_tokens=1 if is_last else None)  # only the central token is needed
        return self.out(self.norm(x[:, 0]))


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a `MultiModalMemoryNetwork`. The defaults are those of the preset `base`.

    num_layers: of the text transformer; with 0 there is none. memory_size: slots of the memory.
    fusion_layers: with 0 there is no fusion, and so no memory either. image_features,
    text_features: widths of the features of pretrained encoders, 0 for none; dropout: of these
    features."""

    vocab_size: int = 34
    text_embed_dim: int = 512
    latent_dim: int = 512
    memory_size: int = 128
    num_heads: int = 8
    num_layers: int = 4
    fusion_layers: int = 4
    conv_channels: tuple = (64, 128, 256, 512)
    conv_units: int = 2
    stem_stride: int = 2
    dropout: float = 0.0
    image_features: int = 0
    text_features: int = 0


class MultiModalMemoryNetwork(nn.Module):
    """Photos, captions or both -> one central latent in a shared space.

    An encoder makes a latent of a photo or of a caption. Fusion adds a correction to it, made from
    that latent and from what the memory recalls for it. For a photo together with a caption, the
    central latent is that of `combine_photo_and_text`.

    The constructor takes a ModelConfig, or its fields by name. Raises ValueError for sizes that do
    not fit each other.

    `model(text=None, images=None, text_mask=None)` takes images (B, 3, H, W), normalised floats, or
    text (B, L), token ids padded with 0, or both; text_mask (B, L) is True for real tokens, by
    default text != 0. It returns {"central_latent": (B, D)}, not of unit length. Raises ValueError
    if neither is given. `logit_scale` is the logarithm of the inverse temperature.

    With features of pretrained encoders, `images` are features (B, image_features), and
    `text_features` (B, text_features) come with the text; their latent is added to that of the
    text encoder. With a pretrained encoder itself in `image_backbone` or `text_backbone`, see
    `src/pretrained.py`, `images` may be the photos that it takes, and `text_features` the dict of
    tensors that its `prepare` gives."""

    def __init__(self, config=None, **sizes):
        super().__init__()
        config = ModelConfig(**sizes) if config is None else config
        self.text_encoder = TextEncoder(config.vocab_size, config.text_embed_dim, config.latent_dim,
                                        config.num_heads, config.num_layers)
        if config.image_features:
            self.image_encoder = FeatureHead(config.image_features, config.latent_dim,
                                             config.dropout)
        else:
            self.image_encoder = ImageEncoder(config.conv_channels, config.conv_units,
                                              config.latent_dim, config.stem_stride)
        self.text_head = None
        if config.text_features:
            self.text_head = FeatureHead(config.text_features, config.latent_dim, config.dropout)
        self.image_backbone = self.text_backbone = None
        self.fusion = self.memory = None
        if config.fusion_layers:
            self.fusion = Fusion(config.latent_dim, config.num_heads, config.fusion_layers)
            if config.memory_size:
                self.memory = TestTimeMemory(config.latent_dim, config.memory_size,
                                             config.num_heads)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's initial value

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
            raise ValueError("the model needs images, text or both, but neither was given")
        if images is not None:
            photo_latents = self.fuse(self.encode_images(images), IMAGE)
        if text is not None:
            text_latents = self.fuse(self.encode_text(text, text_mask, text_features), TEXT)
        if text is None:
            central = photo_latents
        elif images is None:
            central = text_latents
        else:
            central = combine_photo_and_text(photo_latents, text_latents)
        return {"central_latent": central}

    def fuse(self, latents, modality):
        """Latents (B, D) of the encoder of one of MODALITIES -> central latents (B, D)."""
        if self.fusion is None:
            return latents
        remembered = latents if self.memory is None else self.memory(latents)
        return latents + self.fusion(remembered, modality)

    def memory_loss(self, latents):
        """`TestTimeMemory.self_supervised_loss` of the encoders' latents; zero without a memory."""
        if self.memory is None:
            return latents.new_zeros(())
        return self.memory.self_supervised_loss(latents)

    @torch.no_grad()
    def clamp_logit_scale_(self):
        """Keep the temperature within CLIP's bounds. To be called after each optimizer step."""
        self.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)
