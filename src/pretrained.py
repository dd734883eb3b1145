"""Pretrained encoders: photos or texts -> features.

`src/encoder_sources.py` loads them by name. By default an encoder is frozen: it encodes every
photo, its mirror image and every caption once, and its features are kept in a feature store beside
the photo store. With --finetune it becomes a part of the model and is trained with the rest.
"""
import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import nn

from src.utils.augment import normalize, resize
from src.utils.errors import UsageError
from src.utils.flickr8k_simple import map_tensors
from src.utils.photo_store import (
    STORE_VERSION,
    Rows,
    decoding_threads,
    delete_other_shards,
    open_photo,
    open_shard,
    read_photo,
    store_key,
)

IMAGE, TEXT = "image", "text"
EXAMPLE_PIXELS = 256  # side of the plain grey photo that is used to try an encoder
PHOTO_BATCH, TEXT_BATCH = 64, 128
# On a CPU a larger batch takes twice as long per photo: the outputs of the layers become so large
# that the allocator returns them to the system and has to get them again each time.
CPU_PHOTO_BATCH = 4
TEXT_SHARD = 10_000  # texts in each file of a feature store
# The number of photos or captions whose features give the mean and the standard deviation by which
# the model standardises features: those that a training encoder makes, and those that are stored.
SAMPLE, SAMPLE_BATCH = 512, 32
STORED_SAMPLE = 50_000


def first_line(error):
    """Describe an exception of other people's code by its type and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class PretrainedEncoder(nn.Module):
    """A pretrained encoder together with its preprocessing.

    `forward` takes what `prepare` makes: photos (B, 3, H, W), or a dict of tensors (B, ...) for
    texts. It returns features (B, width).

    name: the name that the user gave. modality: IMAGE or TEXT. module: the network; for texts it
    takes the tensors as keyword arguments. prepare: a function from a PIL photo to (3, H, W), or
    from a list of texts to the dict of tensors. preprocessing: a text that differs when `prepare`
    does, or when the network computes something else from the same weights, but not when another
    version of a library is installed. logit_scale: the logarithm of the scale of a contrastive
    model like CLIP, which embeds photos and texts in the same space; None for others.

    Raises UsageError if the encoder does not do this.
    """

    def __init__(self, name, modality, module, prepare, preprocessing="", logit_scale=None):
        super().__init__()
        self.name, self.modality, self.module, self.prepare = name, modality, module, prepare
        self.logit_scale = logit_scale
        self.train()
        self.weights_hash, self.preprocessing_hash = hash_weights(module), store_key(preprocessing)
        self.key = store_key(STORE_VERSION, self.weights_hash, self.preprocessing_hash)
        self.configure(torch.device("cpu"), amp_dtype=None, frozen=True)
        try:
            with torch.no_grad():
                features = self(self.example_input())
        except Exception as error:  # other people's code may raise anything
            raise UsageError(f"{name} fails as an encoder of {modality}s ({first_line(error)})"
                             ) from None
        if not (isinstance(features, torch.Tensor) and features.ndim == 2):
            shape = getattr(features, "shape", type(features).__name__)
            raise UsageError(f"{name} must return features (B, width) of {modality}s, but it "
                             f"returned {shape}")
        self.width = features.shape[1]

    def configure(self, device, amp_dtype, frozen):
        """Move the encoder to a device and choose the precision of `encode`.

        amp_dtype: the dtype of mixed precision, or None for float32. frozen: whether the encoder
        keeps its weights, so that its features can be stored.
        """
        self.device, self.amp_dtype, self.frozen = device, amp_dtype, frozen
        self.to(device, memory_format=torch.channels_last)

    def example_input(self, level=0):
        """Return the smallest input: one photo of a single grey level (0 to 255), or one text.

        For photos this also finds out `pixels`, the height and width of what `prepare` returns.
        """
        if self.modality == TEXT:
            return self.prepare(["a dog runs"])
        size = (EXAMPLE_PIXELS, EXAMPLE_PIXELS)
        photo = self.prepare(Image.new("RGB", size, (level, level, level)))
        self.pixels = tuple(photo.shape[1:])
        return photo[None]

    def train(self, mode=True):
        """Stay in eval mode even when the rest of the model trains.

        Batch norm keeps its pretrained statistics and there is no dropout, so a chunk of a batch
        gets the same features as it gets within the whole batch.
        """
        return super().train(False)

    def forward(self, inputs):
        return self.module(**inputs) if self.modality == TEXT else self.module(inputs)

    def decode(self, path):
        """Read a photo file as a PIL image that is large enough for `prepare`. Raises DataError."""
        return open_photo(path, 2 * max(self.pixels))

    def load(self, path):
        """Read a photo file as a tensor (3, H, W). Raises DataError."""
        return self.prepare(self.decode(path))

    @torch.no_grad()
    def encode(self, inputs):
        """Return the features of a batch as a float16 array (B, width).

        Raises UsageError for features that float16 cannot hold.
        """
        inputs = map_tensors(lambda tensor: tensor.to(self.device), inputs)
        if self.modality == IMAGE:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        use_amp = self.amp_dtype is not None
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=use_amp):
            features = self(inputs).half()
        if not torch.isfinite(features).all():
            raise UsageError(f"{self.name}: its features are NaN or too large for float16")
        return features.cpu().numpy()

    @property
    def store_name(self):
        """The part of a feature store's file names that says how its features were computed."""
        precision = str(self.amp_dtype or torch.float32).removeprefix("torch.")
        return f"{self.modality}_{self.key}_{precision}"

    def photo_features(self, views):
        """Return the row format of a store of this encoder's features. views: 1 or 2."""
        return PhotoFeatures(self, views)

    def text_features(self, store, texts, progress=None):
        """Return the features of texts as `Rows` (N, width), float16.

        store: the path that the names of the store's files begin with, or None to store nothing.
        `progress(done, total, "captions")` is called while texts are encoded.
        """
        shards, paths = [], []
        for start in range(0, len(texts), TEXT_SHARD):
            stop = min(start + TEXT_SHARD, len(texts))
            shard = [texts[i] for i in range(start, stop)]

            def write(file, shard=shard, start=start):
                file.write(self._encode_texts(shard, start, len(texts), progress).tobytes())
                return {}

            path = None
            if store is not None:
                number = start // TEXT_SHARD
                path = store.with_name(f"{store.name}_{self.store_name}_{number:05d}_"
                                       f"{store_key(shard)}.float16")
            content, _ = open_shard(path, len(shard) * self.width * 2, write)
            shards.append(content.view(np.float16).reshape(-1, self.width))
            paths.append(path)
        if store is not None:
            delete_other_shards(store.with_name(f"{store.name}_{self.store_name}"), paths)
        return Rows(shards)

    def _encode_texts(self, texts, done_before, total, progress):
        """Encode the texts of one shard. Texts of similar length share a batch, which saves
        padding."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        features = np.empty((len(texts), self.width), np.float16)
        for first in range(0, len(texts), TEXT_BATCH):
            rows = order[first:first + TEXT_BATCH]
            features[rows] = self.encode(self.prepare([texts[i] for i in rows]))
            if progress:
                progress(done_before + first + len(rows), total, "captions")
        return features

    def describe_change(self, changed):
        """Say what of the encoder's files is not as it was when a run was trained, and what to do.

        changed: a list of "weights" and "preprocessing".
        """
        if ".py:" in self.name:
            preprocessing, cure = "the text of the file", "Restore the file"
            if "preprocessing" not in changed:
                cure = "Restore them (if the function draws them at random, it needs a fixed seed)"
        else:
            part = "image processor" if self.modality == IMAGE else "tokenizer"
            preprocessing, cure = f"the configuration or the {part}", "Restore its files"
        names = {"weights": "the weights", "preprocessing": preprocessing}
        what = " and ".join(names[part] for part in changed)
        return (f"the {self.modality} encoder {self.name} is not the one that the run was trained "
                f"with, as {what} changed.\n{cure}, or train a new run with another --output_dir.")

    def freeze_unused(self):
        """Train all weights but those that the features do not depend on."""
        self.requires_grad_(True)
        self(self.example_input()).sum().backward()
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None


def hash_weights(module):
    """Return 16 hexadecimal digits that identify a module's weights and buffers.

    Their names do not count, because versions of a library differ in the names that they give to
    the same weights.
    """
    hashes = set()
    for value in module.state_dict().values():
        content = hashlib.sha256(f"{tuple(value.shape)} {value.dtype}".encode())
        content.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        hashes.add(content.hexdigest())
    return store_key(sorted(hashes))


class PhotoFeatures:
    """The row format of a feature store, see `open_photo_store`.

    A row is float16 (views, width): the features of the photo as it is and, with two views, those
    of its mirror image.
    """

    dtype = np.float16

    def __init__(self, encoder, views):
        self.encoder, self.shape = encoder, (views, encoder.width)
        self.name, self.key = encoder.store_name, views

    def rows(self, paths):
        """Yield for each path what `read_photo` returns, with the row in the photo's place."""
        encoder, size, prepare = self.encoder, PHOTO_BATCH, self.encoder.prepare
        on_cpu = encoder.device.type == "cpu"
        if on_cpu:
            # Here the threads only decode. If they prepared photos, too, torch's work in them would
            # take the cores from the encoder.
            size, prepare = CPU_PHOTO_BATCH, lambda photo: photo
        batches = [paths[i:i + size] for i in range(0, len(paths), size)]
        with decoding_threads() as pool:
            def start_reading(batch):
                return [pool.submit(read_photo, path, encoder.decode, prepare) for path in batch]

            reading = start_reading(batches[0])
            for next_batch in [*batches[1:], []]:
                batch = [future.result() for future in reading]
                reading = start_reading(next_batch)  # they are read while the encoder computes
                photos = [photo for photo, _, fault in batch if not fault]
                if on_cpu:
                    photos = [encoder.prepare(photo) for photo in photos]
                rows = iter(self.encode(torch.stack(photos)) if photos else ())
                for _, known, fault in batch:
                    yield None if fault else next(rows), known, fault

    def encode(self, photos):
        """Photos (B, 3, H, W) -> rows (B, views, width)."""
        views = [photos, photos.flip(-1)][:self.shape[0]]
        return np.stack([self.encoder.encode(view) for view in views], 1)

    @staticmethod
    def view(rows):
        return rows


class Renormalize(nn.Module):
    """Photos as `augment.normalize` leaves them -> photos as the encoder's transform leaves them.

    Both are linear in the pixels of a channel, so a black and a white photo tell the difference.
    """

    def __init__(self, encoder):
        super().__init__()
        black, white = (encoder.example_input(level).mean((2, 3)) for level in (0, 255))
        our_black, our_white = (normalize(torch.full((1, 3, 1, 1), level)).flatten(1)
                                for level in (0.0, 1.0))
        scale = (white - black) / (our_white - our_black)
        shift = black - scale * our_black
        self.register_buffer("scale", scale[:, :, None, None], persistent=False)
        self.register_buffer("shift", shift[:, :, None, None], persistent=False)

    def forward(self, images):
        return images * self.scale + self.shift


@dataclass
class Encoders:
    """The pretrained encoders of a run. Either may be None."""

    image: PretrainedEncoder | None = None
    text: PretrainedEncoder | None = None

    def __iter__(self):
        return iter(encoder for encoder in (self.image, self.text) if encoder is not None)

    @property
    def is_contrastive_pair(self):
        """Whether the encoders are the two halves of one contrastive model."""
        return (self.image is not None and self.text is not None
                and self.image.name == self.text.name and self.image.logit_scale is not None)

    @property
    def feature_widths(self):
        """Arguments of the model's constructor: {"image_features", "text_features": width}."""
        return {f"{encoder.modality}_features": encoder.width for encoder in self}

    def describe(self):
        """Return what a run's config says about its encoders."""
        return {encoder.modality: {"name": encoder.name, "weights": encoder.weights_hash,
                                   "preprocessing": encoder.preprocessing_hash,
                                   "width": encoder.width} for encoder in self}

    def check_unchanged(self, config, run_dir):
        """Raise UsageError unless these are the encoders that a run was trained with.

        config: the run's config. The weights of a fine-tuned encoder are those in the run's
        checkpoint, so that its files may hold others.
        """
        recorded, current = config.get("encoders") or {}, self.describe()
        for encoder in self:
            before, now = recorded.get(encoder.modality, {}), current[encoder.modality]
            if not before.keys() >= now.keys():
                raise UsageError(f"{run_dir}: the run is of another version of this project, which "
                                 f"did not record what {encoder.name} consisted of; please retrain")
            changed = [part for part in ("weights", "preprocessing") if before[part] != now[part]]
            if not encoder.frozen and "weights" in changed:
                changed.remove("weights")
            if changed:
                raise UsageError(f"{run_dir}: {encoder.describe_change(changed)}")

    def fit_settings(self, settings):
        """Return the settings with the sizes that these encoders require.

        Raises UsageError if an encoder of photos that are not square is to be fine-tuned.
        """
        if self.is_contrastive_pair:
            settings = replace(settings, latent_dim=self.image.width)
        if settings.finetune and self.image is not None:
            height, width = self.image.pixels
            if height != width:
                raise UsageError(f"{self.image.name} takes photos of {height} x {width} pixels; "
                                 "--finetune needs a square")
            settings = replace(settings, image_size=height)
        return settings

    def attach(self, model, settings):
        """Make the encoders a part of the model, which then takes photos and texts instead of
        their features."""
        if self.image is not None:
            model.image_backbone = self.image
            if settings.finetune:
                # Training photos come from the photo store, normalised as for our own encoder.
                model.image_backbone = nn.Sequential(Renormalize(self.image), self.image)
        if self.text is not None:
            model.text_backbone = self.text

    def initialize(self, model, train, amp_dtype):
        """Standardise the features by those of the training split.

        A contrastive pair makes the model start as that pair: it ranks as the pair does alone.
        """
        identity = self.is_contrastive_pair
        if self.image is not None:
            if self.image.frozen:
                features = sample_rows(train.photos)[:, 0]
            else:
                def images(rows):
                    side = self.image.pixels[0]
                    return normalize(resize(train.photos[rows], side, "bicubic"))

                features = encode_sample(model.image_backbone, images, len(train.photos), amp_dtype)
            model.image_encoder.standardize(features, identity)
        if self.text is not None:
            if self.text.frozen:
                features = sample_rows(train.text_features)
            else:
                def texts(rows):
                    return train.text_inputs(rows.tolist())["text_features"]

                features = encode_sample(model.text_backbone, texts, len(train), amp_dtype)
            model.text_head.standardize(features, identity)
        if self.is_contrastive_pair:
            with torch.no_grad():
                # The latent of a text is the sum of the pair's and of our own text encoder's.
                model.text_encoder.projection.weight.zero_()
                model.text_encoder.projection.bias.zero_()
                model.logit_scale.fill_(self.image.logit_scale)
                model.clamp_logit_scale_()


def sample_rows(features):
    """Return at most STORED_SAMPLE of the stored features, evenly spread."""
    rows = np.linspace(0, len(features) - 1, min(STORED_SAMPLE, len(features)))
    return features[rows.round()]


@torch.no_grad()
def encode_sample(backbone, load_inputs, total, amp_dtype):
    """Return the features of at most SAMPLE of `total` photos or captions, evenly spread.

    `load_inputs(rows)` returns the backbone's inputs for a tensor of row numbers.
    """
    device = next(backbone.parameters()).device
    rows = torch.linspace(0, total - 1, min(SAMPLE, total)).long()
    features = []
    with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        for batch in rows.split(SAMPLE_BATCH):
            inputs = map_tensors(lambda tensor: tensor.to(device), load_inputs(batch))
            features.append(backbone(inputs))
    return torch.cat(features)


NO_ENCODERS = Encoders()
