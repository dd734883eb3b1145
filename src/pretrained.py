"""Pretrained encoders: photos or texts -> features.

`src/encoder_sources.py` loads them by name. By default an encoder is frozen: it encodes every
photo, its mirror image and every caption once, and its features are kept in a feature store beside
the photo store. With --finetune it becomes a part of the model and is trained with the rest.
"""
import copy
import hashlib
import itertools
import math

import numpy as np
import torch
from PIL import Image
from torch import nn

from src.device import full_memory, memory_format
from src.feature_store import PhotoFeatures, PreparedPixels, open_text_store
from src.utils.console import printable
from src.utils.errors import DataError, UsageError, first_line
from src.utils.flickr8k_simple import map_tensors
from src.utils.photo_store import STORE_VERSION, open_photo, store_key

IMAGE, TEXT = "image", "text"
EXAMPLE_SIZES = (500, 375), (360, 480)  # width and height of the photos that try an encoder
PROBE_TEXTS = ["a dog runs", "two red circles above a small blue square and one dog on the left"]
SIMILAR = 1e-3  # the largest distance of features that count as equal, relative to their norm
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

    From attributes of the module, or else "", come `rule`, a short text that tells the user how the
    features are taken from the network, and `half_of`, the type of the contrastive model of which
    the network is only one half.

    Raises UsageError if the encoder does not do this.
    """

    def __init__(self, name, modality, module, prepare, preprocessing="", logit_scale=None,
                 max_tokens=None, count_tokens=None):
        super().__init__()
        self.name, self.modality, self.module, self.prepare = name, modality, module, prepare
        self.logit_scale, self.max_tokens, self.count_tokens = logit_scale, max_tokens, count_tokens
        self.example_peak = 0.0
        try:
            self.train()
            self.tensor_hashes = hash_tensors(module)
            self.weights_hash = store_key(sorted(self.tensor_hashes))
            self.configure(torch.device("cpu"), amp_dtype=None, frozen=True)
            inputs = self.example_input()
            first = self.prepare(PROBE_TEXTS[:1]) if modality == TEXT else inputs[:1]
            with torch.no_grad():
                features, again, alone = self(inputs), self(inputs), self(first)
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
        if not similar(features, again):
            raise UsageError(f"{name} draws random numbers: each time it makes other features of "
                             f"the same {modality}")
        if alone.shape != features[:1].shape or not similar(features[:1], alone):
            cause = "a longer one, for instance because its tokenizer pads at the left"
            if modality == IMAGE:
                cause = "another one, for instance because of a squeeze() or of batch statistics"
            item = "photo" if modality == IMAGE else "text"
            raise UsageError(f"{name} makes other features of a {item} alone than beside {cause}")
        self.rule, self.half_of = getattr(module, "rule", ""), getattr(module, "half_of", "")
        # The rule may also name inner layers, whose names depend on the version of a library.
        own_rule = getattr(module, "own_rule", self.rule)
        self.preprocessing_hash = store_key(f"{preprocessing} {own_rule} {self.width}")
        self.key = store_key(STORE_VERSION, self.weights_hash, self.preprocessing_hash)

    def configure(self, device, amp_dtype, frozen):
        """Move the encoder to a device and choose the precision of `encode`.

        amp_dtype: the dtype of mixed precision, or None for float32. frozen: whether the encoder
        keeps its weights, so that its features can be stored. Raises UsageError if float16 cannot
        hold them.
        """
        if frozen and self.example_peak > torch.finfo(torch.float16).max:
            raise UsageError(f"{self.name}: its features are too large for float16")
        self.device, self.amp_dtype, self.frozen = device, amp_dtype, frozen
        self.to(device)
        for parameter in self.parameters():
            if parameter.ndim == 4:  # other numbers of dimensions have no such format
                parameter.data = parameter.data.contiguous(memory_format=memory_format(device))

    def example_input(self):
        """Return a small input: two photos, or two texts.

        For photos this also finds out `pixels`, the height and width of what `prepare` returns.
        Raises UsageError if these are not the same for photos of different shapes.
        """
        if self.modality == TEXT:
            return self.prepare(PROBE_TEXTS)
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
            inputs = inputs.contiguous(memory_format=memory_format(self.device))
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

    def row_format(self, views):
        """Return the row format of a store of photos: that of this encoder's features, for a photo
        and perhaps its mirror image (views: 1 or 2), or, if the encoder is trained, that of photos
        as it takes them."""
        return PhotoFeatures(self, views) if self.frozen else PreparedPixels(self)

    def black_and_white(self):
        """Return what becomes of the levels of a black and of a white photo, (2, 1, 3, 1, 1)."""
        photos = [self.prepare(Image.new("RGB", EXAMPLE_SIZES[0], colour))
                  for colour in ("black", "white")]
        return torch.stack(photos).mean((2, 3))[:, None, :, None, None]

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
            preprocessing = f"the configuration, the {part} or the version of this project"
            cure = "Restore its files"
        names = {"weights": "the weights", "preprocessing": preprocessing}
        what = " and ".join(names[part] for part in changed)
        return (f"the {self.modality} encoder {self.name} is not the one that the run was trained "
                f"with, as {what} changed.\n{cure}, or train a new run with another --output_dir.")

    def freeze_unused(self):
        """Train all weights but those that the features do not depend on. Raises UsageError if
        they depend on none, or if the network cannot be trained or copied."""
        self.requires_grad_(True)
        inputs = map_tensors(lambda tensor: tensor.to(self.device), self.example_input())
        try:
            features = self(inputs)
            if features.requires_grad:
                features.sum().backward()
            trained = [parameter.grad is not None for parameter in self.parameters()]
            self.zero_grad()
            with torch.no_grad():
                self(inputs)  # it may keep tensors, and those with gradients could not be copied
                copy.deepcopy(self)(inputs)  # the moving average of the weights is such a copy
            if not all(isinstance(value, torch.Tensor) for value in self.state_dict().values()):
                raise TypeError("its state_dict has values that are no tensors")
        except Exception as error:  # other people's code may raise anything
            if full_memory(error):
                raise
            raise UsageError(f"--finetune: {self.name} cannot be trained ({first_line(error)})"
                             ) from None
        if not any(trained):
            raise UsageError(f"--finetune: the features of {self.name} depend on no weights that "
                             "could be trained")
        for parameter, is_trained in zip(self.parameters(), trained):
            parameter.requires_grad_(is_trained)


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


def similar(features, others):
    """Whether the rows of two tensors (B, width) are equal but for rounding errors."""
    features, others = features.float(), others.float()
    distance = (features - others).norm(dim=1)
    return bool((distance <= SIMILAR * features.norm(dim=1) + 1e-6).all())


def hash_tensors(module):
    """Return the set of the hashes of a module's weights and buffers.

    Their names do not count, because versions of a library differ in the names that they give to
    the same weights.
    """
    hashes, values = set(), list(module.state_dict().values())
    while values:
        value = values.pop()
        if isinstance(value, torch.Tensor):
            value = value.dequantize() if value.is_quantized else value
            content = hashlib.sha256(f"{tuple(value.shape)} {value.dtype}".encode())
            content.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            hashes.add(content.hexdigest())
        elif isinstance(value, (tuple, list, dict)):  # as quantized layers have them
            values += value.values() if isinstance(value, dict) else value
    return hashes
