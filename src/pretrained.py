"""Pretrained encoders: photos or texts -> features.

`src/encoder_sources.py` loads them by name. By default an encoder is frozen: it encodes every
photo, its mirror image and every caption once, and its features are kept in a feature store beside
the photo store. With --finetune it becomes a part of the model and is trained with the rest.
"""
import hashlib
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import nn

from src.device import full_memory
from src.feature_store import PhotoFeatures, open_text_store
from src.utils.augment import normalize, resize
from src.utils.console import printable
from src.utils.errors import DataError, UsageError, first_line
from src.utils.flickr8k_simple import map_tensors
from src.utils.photo_store import STORE_VERSION, open_photo, store_key

IMAGE, TEXT = "image", "text"
EXAMPLE_SIZES = (500, 375), (360, 480)  # width and height of the photos that try an encoder
# The number of photos or captions whose features give the mean and the standard deviation by which
# the model standardises features: those that a training encoder makes, and those that are stored.
SAMPLE, SAMPLE_BATCH = 512, 32
STORED_SAMPLE = 50_000
SPECIAL_TOKENS, TEXTS_TO_COUNT = 8, 1000
EXCERPT = 80  # characters of a text that a message shows


class PretrainedEncoder(nn.Module):
    """A pretrained encoder together with its preprocessing.

    `forward` takes what `prepare` makes: photos (B, 3, H, W), or a dict of tensors (B, ...) for
    texts. It returns features (B, width).

    name: the name that the user gave. modality: IMAGE or TEXT. module: the network; for texts it
    takes the tensors as keyword arguments. prepare: a function from a PIL photo to (3, H, W), or
    from a list of texts to the dict of tensors. preprocessing: a text that differs when `prepare`
    does, or when the network computes something else from the same weights, but not when another
    version of a library is installed. logit_scale: the logarithm of the scale of a contrastive
    model like CLIP, which embeds photos and texts in the same space; None for others. max_tokens:
    how many tokens of a text `prepare` keeps, and count_tokens: a function from texts to their
    numbers of tokens; both are None where no text is cut, or where that is unknown.

    Raises UsageError if the encoder does not do this.
    """

    def __init__(self, name, modality, module, prepare, preprocessing="", logit_scale=None,
                 max_tokens=None, count_tokens=None):
        super().__init__()
        self.name, self.modality, self.module, self.prepare = name, modality, module, prepare
        self.logit_scale, self.max_tokens, self.count_tokens = logit_scale, max_tokens, count_tokens
        self.train()
        self.weights_hash, self.preprocessing_hash = hash_weights(module), store_key(preprocessing)
        self.key = store_key(STORE_VERSION, self.weights_hash, self.preprocessing_hash)
        self.example_peak = 0.0
        self.configure(torch.device("cpu"), amp_dtype=None, frozen=True)
        try:
            with torch.no_grad():
                features = self(self.example_input())
        except UsageError:
            raise
        except Exception as error:  # other people's code may raise anything
            if full_memory(error):
                raise
            raise UsageError(f"{name} fails as an encoder of {modality}s ({first_line(error)})"
                             ) from None
        if not (isinstance(features, torch.Tensor) and features.ndim == 2):
            shape = getattr(features, "shape", type(features).__name__)
            raise UsageError(f"{name} must return features (B, width) of {modality}s, but it "
                             f"returned {shape}")
        self.width, self.example_peak = features.shape[1], features.abs().max().item()
        if not math.isfinite(self.example_peak):
            raise UsageError(f"{name}: its features of an ordinary {modality} are NaN or infinite")

    def configure(self, device, amp_dtype, frozen):
        """Move the encoder to a device and choose the precision of `encode`.

        amp_dtype: the dtype of mixed precision, or None for float32. frozen: whether the encoder
        keeps its weights, so that its features can be stored. Raises UsageError if float16 cannot
        hold them.
        """
        if frozen and self.example_peak > torch.finfo(torch.float16).max:
            raise UsageError(f"{self.name}: its features are too large for float16")
        self.device, self.amp_dtype, self.frozen = device, amp_dtype, frozen
        self.to(device, memory_format=torch.channels_last)

    def example_input(self):
        """Return a small input: two photos, or one text.

        For photos this also finds out `pixels`, the height and width of what `prepare` returns.
        Raises UsageError if these are not the same for photos of different shapes.
        """
        if self.modality == TEXT:
            return self.prepare(["a dog runs"])
        photos = [self.prepare(example_photo(size)) for size in EXAMPLE_SIZES]
        shapes = [tuple(photo.shape) for photo in photos]
        if shapes[0] != shapes[1]:
            cure = ("set do_center_crop to true and a crop_size, or a size with a height and a "
                    "width, in the preprocessor_config.json of its folder")
            if ".py:" in self.name:
                cure = "let its transform end with a fixed size, such as Resize((224, 224))"
            raise UsageError(f"{self.name} prepares photos of different shapes as tensors of "
                             f"different shapes, {shapes[0]} and {shapes[1]}, which do not fit "
                             f"into one batch; {cure}")
        self.pixels = shapes[0][1:]
        return torch.stack(photos)

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

    def prepare_photo(self, path, photo):
        """Turn a PIL photo into a tensor (3, H, W).

        Raises DataError, with the path of its file, if the encoder's own code cannot do that.
        """
        try:
            tensor = self.prepare(photo)
            if tuple(tensor.shape[1:]) != self.pixels:
                raise ValueError(f"it becomes a tensor of the shape {tuple(tensor.shape)}, unlike "
                                 "other photos")
        except Exception as error:  # other people's code may raise anything
            if full_memory(error):
                raise
            raise DataError(f"{path}: {self.name} cannot take it ({first_line(error)})"
                            ) from None
        return tensor

    def prepare_texts(self, texts):
        """Turn texts into a dict of tensors. Raises DataError, with the text, if the encoder's own
        code cannot do that."""
        return name_the_text(self.prepare, texts, self.name)

    def load(self, path):
        """Read a photo file as a tensor (3, H, W). Raises DataError."""
        return self.prepare_photo(path, self.decode(path))

    @torch.no_grad()
    def encode(self, inputs):
        """Return the features of a batch as a float16 array (B, width). They are NaN or infinite if
        the network makes them so, or if they are too large for float16."""
        inputs = map_tensors(lambda tensor: tensor.to(self.device), inputs)
        if self.modality == IMAGE:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        use_amp = self.amp_dtype is not None
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=use_amp):
            features = self(inputs).half()
        return features.cpu().numpy()

    def encode_texts(self, texts):
        """Return the features of texts as a float16 array (B, width). Raises DataError, with the
        text, if the encoder fails for one of them."""
        def encode(texts):
            features = self.encode(self.prepare(texts))
            if not np.isfinite(features).all():
                raise ValueError("its features are NaN or too large for float16")
            return features

        return name_the_text(encode, texts, self.name)

    @property
    def store_name(self):
        """The part of a feature store's file names that says how its features were computed."""
        precision = str(self.amp_dtype or torch.float32).removeprefix("torch.")
        return f"{self.modality}_{self.key}_{precision}"

    def photo_features(self, views):
        """Return the row format of a store of this encoder's features. views: 1 or 2."""
        return PhotoFeatures(self, views)

    def text_features(self, store, texts, progress=None):
        """Return the features of texts as `Rows` (N, width), see `open_text_store`."""
        return open_text_store(self, store, texts, progress)

    def count_cut(self, texts):
        """Return how many texts have more tokens than the encoder reads."""
        if self.max_tokens is None:
            return 0
        # A token stands for at least one byte of a text, apart from a few special tokens, so most
        # texts need not be counted.
        texts = (text for text in texts
                 if len(text.encode("utf-8", "surrogatepass")) > self.max_tokens - SPECIAL_TOKENS)
        cut = 0
        while batch := list(itertools.islice(texts, TEXTS_TO_COUNT)):
            cut += sum(length > self.max_tokens for length in self.count_tokens(batch))
        return cut

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
        """Train all weights but those that the features do not depend on. Raises UsageError if
        they depend on none."""
        self.requires_grad_(True)
        features = self(self.example_input())
        if not features.requires_grad:
            raise UsageError(f"--finetune: the features of {self.name} depend on no weights that "
                             "could be trained")
        features.sum().backward()
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None


def name_the_text(function, texts, name):
    """Return function(texts). If an encoder of this name fails there, raise DataError with the text
    that it fails for."""
    try:
        return function(texts)
    except Exception as error:  # other people's code may raise anything
        if full_memory(error) or isinstance(error, DataError):
            raise
        for text in texts if len(texts) > 1 else ():
            name_the_text(function, [text], name)
        excerpt = printable(texts[0][:EXCERPT]) + "..." * (len(texts[0]) > EXCERPT)
        raise DataError(f'{name} cannot take the text "{excerpt}" ({first_line(error)})') from None


def example_photo(size):
    """Return a photo of this width and height, with a gradient in each channel."""
    across, down = Image.linear_gradient("L").rotate(90), Image.linear_gradient("L")
    return Image.merge("RGB", [across, down, Image.radial_gradient("L")]).resize(size)


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


class Renormalize(nn.Module):
    """Photos as `augment.normalize` leaves them -> photos as the encoder's transform leaves them.

    Both are linear in the pixels of a channel, so a black and a white photo tell the difference.
    """

    def __init__(self, encoder):
        super().__init__()
        black, white = (
            encoder.prepare(Image.new("RGB", EXAMPLE_SIZES[0], colour))[None].mean((2, 3))
            for colour in ("black", "white"))
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

                features = encode_sample(
                    self.image, model.image_backbone, images, train.names, amp_dtype)
            check_different(self.image, features)
            model.image_encoder.standardize(features, identity)
        if self.text is not None:
            if self.text.frozen:
                features = sample_rows(train.text_features)
            else:
                def texts(rows):
                    return train.text_inputs(rows.tolist())["text_features"]

                features = encode_sample(
                    self.text, model.text_backbone, texts, train.captions, amp_dtype)
            check_different(self.text, features)
            model.text_head.standardize(features, identity)
        if self.is_contrastive_pair:
            with torch.no_grad():
                # The latent of a text is the sum of the pair's and of our own text encoder's.
                model.text_encoder.projection.weight.zero_()
                model.text_encoder.projection.bias.zero_()
                model.logit_scale.fill_(self.image.logit_scale)
                model.clamp_logit_scale_()


def check_different(encoder, features):
    """Raise UsageError if all of these features are the same. Nothing can be learned from them."""
    if (features == features[0]).all():
        items = "photos" if encoder.modality == IMAGE else "captions"
        raise UsageError(f"{encoder.name} makes the same features of all {items}, so that they "
                         "cannot be told apart")


def sample_rows(features):
    """Return at most STORED_SAMPLE of the stored features, evenly spread."""
    rows = np.linspace(0, len(features) - 1, min(STORED_SAMPLE, len(features)))
    return features[rows.round()]


@torch.no_grad()
def encode_sample(encoder, backbone, load_inputs, items, amp_dtype):
    """Return the features of at most SAMPLE photos or captions, evenly spread.

    backbone: the encoder as a part of the model. `load_inputs(rows)` returns its inputs for a
    tensor of row numbers. items: the names of the photos, or the captions. Raises DataError, with
    the item, for features that are not finite.
    """
    rows = torch.linspace(0, len(items) - 1, min(SAMPLE, len(items))).long()
    features = []
    with torch.autocast(encoder.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        for batch in rows.split(SAMPLE_BATCH):
            inputs = map_tensors(lambda tensor: tensor.to(encoder.device), load_inputs(batch))
            features.append(backbone(inputs))
    features = torch.cat(features)
    faulty = rows[~torch.isfinite(features).all(1).cpu()].tolist()
    if faulty:
        raise DataError(f"{encoder.name}: its features of {printable(items[faulty[0]][:EXCERPT])} "
                        f"are NaN or infinite, and of {len(faulty)} of {len(rows)} examples in all")
    return features


NO_ENCODERS = Encoders()
