"""The multimodal memory network: encoders -> memory -> fusion -> one central latent.

The encoders of the presets are in `src/image_encoder.py` and `src/text_encoder.py`.

Shapes in this file: B batch, L text tokens, D width."""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from src.image_encoder import ImageEncoder
from src.text_encoder import Attention, Block, TextEncoder

IMAGE, TEXT = MODALITIES = (0, 1)
PHOTO_WEIGHT = 0.4  # of the photo when a photo and a text are combined; 0.2 to 0.5 were tried
MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's bound on the inverse temperature (Radford et al. 2021)


def combine_photo_and_text(photos, texts):
    """Central latents (B, D) of photos and of texts -> the weighted mean (B, D) of their unit
    vectors, which stands for the photo together with the text."""
    texts = F.normalize(texts.float(), dim=-1)
    photos = F.normalize(photos.float(), dim=-1)
    return torch.lerp(texts, photos, PHOTO_WEIGHT)


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
