"""Other people's encoders: photos or texts -> features. What their names mean is told in
`src/encoder_names.py`.

Frozen, the default, an encoder sees every photo, its mirror image and every caption once, and what
it makes of them is kept in a feature store beside the photo store. With --finetune it is a part of
the model, trained with the rest."""
import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import nn

from src.utils.augment import normalize, resize
from src.utils.captions import cut_text
from src.utils.errors import UsageError
from src.utils.flickr8k_simple import map_tensors
from src.utils.photo_store import (
    STORE_VERSION,
    Rows,
    decoding_threads,
    delete_others,
    open_photo,
    open_shard,
    read_photo,
    store_key,
)

IMAGE, TEXT = "image", "text"
PROBE_SIZE = 256  # pixels of the blank photos that tell what a transform does
PHOTO_BATCH, TEXT_BATCH = 64, 128
TEXT_SHARD = 10_000  # texts in a file of a store
CPU_PHOTO_BATCH = 4  # with more, each layer's output is fetched from the system anew: half as fast
SAMPLE, SAMPLE_BATCH = 512, 32  # whose features standardise those of encoders in training
STORED_SAMPLE = 50_000  # the same, where features are stored


def reason(error):
    """A foreign error's first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class PretrainedEncoder(nn.Module):
    """An encoder with what it needs before it. `forward` takes photos (B, 3, H, W), or a dict of
    tensors as `prepare` makes it of texts, to features (B, width).

    name: as given. kind: IMAGE or TEXT. module: what computes, of texts' tensors by name. prepare:
    a PIL photo -> (3, H, W), or a list of texts -> dict of tensors (B, ...). source: what features
    follow from beside the weights. logit_scale: of a contrastive model, which has one space for
    photos and texts, else None. Raises UsageError for an encoder that does not do this."""

    def __init__(self, name, kind, module, prepare, source="", logit_scale=None):
        super().__init__()
        self.name, self.kind, self.module, self.prepare = name, kind, module, prepare
        self.logit_scale = logit_scale
        self.train()
        weights = hashlib.sha256()
        for key, value in sorted(module.state_dict().items()):
            weights.update(key.encode())
            weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        self.weights = weights.hexdigest()[:16]
        self.settle(torch.device("cpu"), None, frozen=True)
        self.key = store_key(STORE_VERSION, self.weights, source)
        try:
            with torch.no_grad():
                features = self(self.probe())
        except Exception as error:  # it is other people's code
            raise UsageError(f"{name} fails as an encoder of {kind}s ({reason(error)})") from None
        if not (isinstance(features, torch.Tensor) and features.ndim == 2):
            raise UsageError(f"{name} does not give features (B, width) of {kind}s, but "
                             f"{getattr(features, 'shape', type(features).__name__)}")
        self.width = features.shape[1]

    def settle(self, device, amp_dtype, frozen):
        """Where and in which precision `encode` computes; frozen: whether it is to be used."""
        self.device, self.amp_dtype, self.frozen = device, amp_dtype, frozen
        self.to(device, memory_format=torch.channels_last)

    def probe(self, level=0):
        """The least that the encoder takes: a photo of one grey level, or a short text."""
        if self.kind == TEXT:
            return self.prepare(["a dog runs"])
        photo = self.prepare(Image.new("RGB", (PROBE_SIZE, PROBE_SIZE), (level, level, level)))
        self.pixels = tuple(photo.shape[1:])
        return photo[None]

    def train(self, mode=True):
        """In training, too, batch norm keeps the statistics that it came with, and nothing is left
        to chance: a chunk of a batch is encoded as in the whole."""
        return super().train(False)

    def forward(self, inputs):
        return self.module(**inputs) if self.kind == TEXT else self.module(inputs)

    def open(self, path):
        """A photo file -> what `prepare` takes. Raises DataError as `open_photo` does."""
        return open_photo(path, 2 * max(self.pixels))

    def load(self, path):
        """A photo file -> (3, H, W)."""
        return self.prepare(self.open(path))

    @torch.no_grad()
    def encode(self, inputs):
        """-> features float16, an array (B, width)."""
        inputs = map_tensors(lambda tensor: tensor.to(self.device), inputs)
        if self.kind == IMAGE:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        amp = self.amp_dtype is not None
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=amp):
            features = self(inputs).half()
        if not torch.isfinite(features).all():
            raise UsageError(f"{self.name}: its features are NaN or too large for float16")
        return features.cpu().numpy()

    @property
    def store_name(self):
        """Of what `encode` gives."""
        return f"{self.kind}_{self.key}_{str(self.amp_dtype or torch.float32).split('.')[1]}"

    def photo_features(self, views):
        return PhotoFeatures(self, views)

    def text_features(self, store, texts, progress=None):
        """Texts -> features of their first MAX_LENGTH characters, float16 `Rows` (N, width).

        store: path that the shards' names begin with, see `open_shard`, or None.
        `progress(done, total, "captions")` is called as texts are encoded."""
        parts, paths = [], []
        for start in range(0, len(texts), TEXT_SHARD):
            rows = range(start, min(start + TEXT_SHARD, len(texts)))
            shard = [cut_text(texts[i]) for i in rows]

            def write(file, shard=shard, start=start):
                order = sorted(range(len(shard)), key=lambda i: len(shard[i]))  # little padding
                features = np.empty((len(shard), self.width), np.float16)
                for first in range(0, len(shard), TEXT_BATCH):
                    rows = order[first:first + TEXT_BATCH]
                    features[rows] = self.encode(self.prepare([shard[i] for i in rows]))
                    if progress:
                        progress(start + first + len(rows), len(texts), "captions")
                file.write(features.tobytes())
                return {}

            path = None
            if store is not None:
                number = start // TEXT_SHARD
                path = store.with_name(f"{store.name}_{self.store_name}_{number:05d}_"
                                       f"{store_key(shard)}.float16")
            content, _ = open_shard(path, len(shard) * self.width * 2, write)
            parts.append(content.view(np.float16).reshape(-1, self.width))
            paths.append(path)
        if store is not None:
            delete_others(store.with_name(f"{store.name}_{self.store_name}"), paths)
        return Rows(parts)

    def freeze_unused(self):
        """No gradients for weights that the features do not depend on."""
        self.requires_grad_(True)
        self(self.probe()).sum().backward()
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None


class PhotoFeatures:
    """What a feature store keeps of a photo: float16 (views, width), of the photo as it is and,
    with two views, of its mirror image; see `open_photo_store`."""

    dtype = np.float16

    def __init__(self, encoder, views):
        self.encoder, self.shape = encoder, (views, encoder.width)
        self.name, self.key = encoder.store_name, views

    def rows(self, paths):
        """Yields what `read_photo` gives, for each path."""
        encoder, size, prepare = self.encoder, PHOTO_BATCH, self.encoder.prepare
        on_cpu = encoder.device.type == "cpu"
        if on_cpu:  # where torch in other threads would take the encoder's cores
            size, prepare = CPU_PHOTO_BATCH, lambda photo: photo
        batches = [paths[i:i + size] for i in range(0, len(paths), size)]
        with decoding_threads() as pool:
            def read(batch):
                return [pool.submit(read_photo, path, encoder.open, prepare) for path in batch]

            reading = read(batches[0])
            for ahead in [*batches[1:], []]:
                batch = [future.result() for future in reading]
                reading = read(ahead)  # while the encoder computes
                photos = [photo for photo, _, fault in batch if not fault]
                if on_cpu:
                    photos = [encoder.prepare(photo) for photo in photos]
                rows = iter(self.encode(torch.stack(photos)) if photos else ())
                for _, known, fault in batch:
                    yield None if fault else next(rows), known, fault

    def encode(self, photos):
        views = [photos, photos.flip(-1)][:self.shape[0]]
        return np.stack([self.encoder.encode(view) for view in views], 1)

    @staticmethod
    def view(rows):
        return rows


class Renormalize(nn.Module):
    """Photos as `augment.normalize` leaves them -> as the encoder's own transform does."""

    def __init__(self, encoder):
        super().__init__()
        black, white = (encoder.probe(level).mean((2, 3)) for level in (0, 255))
        ours = [normalize(torch.full((1, 3, 1, 1), level)).flatten(1) for level in (0.0, 1.0)]
        scale = (white - black) / (ours[1] - ours[0])
        shift = black - scale * ours[0]
        self.register_buffer("scale", scale[:, :, None, None], persistent=False)
        self.register_buffer("shift", shift[:, :, None, None], persistent=False)

    def forward(self, images):
        return images * self.scale + self.shift


@dataclass
class Encoders:
    """The pretrained encoders of a run, each perhaps None."""

    image: PretrainedEncoder | None = None
    text: PretrainedEncoder | None = None

    def __iter__(self):
        return iter(encoder for encoder in (self.image, self.text) if encoder is not None)

    @property
    def pair(self):
        """Whether both are one contrastive model's."""
        return (self.image is not None and self.text is not None
                and self.image.name == self.text.name and self.image.logit_scale is not None)

    def fit_settings(self, settings):
        """The settings with the sizes that these encoders dictate. Raises UsageError for
        fine-tuning on photos that are not square."""
        if self.pair:
            settings = replace(settings, latent_dim=self.image.width)
        if settings.finetune and self.image is not None:
            height, width = self.image.pixels
            if height != width:
                raise UsageError(f"{self.image.name} takes photos of {height} x {width} pixels; "
                                 "--finetune needs a square")
            settings = replace(settings, image_size=height)
        return settings

    @property
    def widths(self):
        """Arguments of the model."""
        return {f"{encoder.kind}_features": encoder.width for encoder in self}

    def describe(self):
        return {encoder.kind: {"name": encoder.name, "weights": encoder.weights,
                               "width": encoder.width} for encoder in self}

    def attach(self, model, settings):
        """Make them a part of the model, which then takes photos and texts, not their features."""
        if self.image is not None:
            model.image_backbone = self.image
            if settings.finetune:  # photos come from the store, as in training from scratch
                model.image_backbone = nn.Sequential(Renormalize(self.image), self.image)
        if self.text is not None:
            model.text_backbone = self.text

    def initialize(self, model, train, amp_dtype):
        """Standardise the features by those of a training split; where both are of one contrastive
        model, the model begins as that."""
        def stored(rows):
            chosen = np.linspace(0, len(rows) - 1, min(STORED_SAMPLE, len(rows)))
            return rows[chosen.round()]

        if self.image is not None:
            features = stored(train.photos)[:, 0] if self.image.frozen else self._sample(
                model.image_backbone, len(train.photos), amp_dtype,
                lambda rows: normalize(resize(train.photos[rows], self.image.pixels[0], "bicubic")))
            model.image_encoder.standardize(features, identity=self.pair)
        if self.text is not None:
            features = stored(train.text_features) if self.text.frozen else self._sample(
                model.text_backbone, len(train), amp_dtype,
                lambda rows: train.text_inputs(rows.tolist())["text_features"])
            model.text_head.standardize(features, identity=self.pair)
        if self.pair:
            with torch.no_grad():
                model.text_encoder.projection.weight.zero_()
                model.text_encoder.projection.bias.zero_()
                model.logit_scale.fill_(self.image.logit_scale)
                model.clamp_logit_scale_()

    @torch.no_grad()
    def _sample(self, backbone, total, amp_dtype, inputs):
        """Features of SAMPLE photos or captions, evenly spread, which `inputs(rows)` gives."""
        device = next(backbone.parameters()).device
        rows, parts = torch.linspace(0, total - 1, min(SAMPLE, total)).long(), []
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            for part in rows.split(SAMPLE_BATCH):
                parts.append(backbone(map_tensors(lambda tensor: tensor.to(device), inputs(part))))
        return torch.cat(parts)


NO_ENCODERS = Encoders()
