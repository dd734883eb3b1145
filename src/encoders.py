"""The pretrained encoders of a run, and what they are to the model.

A frozen encoder makes the features that the model takes. With --finetune an encoder becomes a part
of the model and is trained with the rest."""
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import nn

from src.pretrained import EXAMPLE_SIZES, EXCERPT, IMAGE, PretrainedEncoder
from src.utils.augment import normalize, resize
from src.utils.console import printable
from src.utils.errors import DataError, UsageError
from src.utils.flickr8k_simple import map_tensors

# The number of photos or captions whose features give the mean and the standard deviation by which
# the model standardises features: those that a training encoder makes, and those that are stored.
SAMPLE, SAMPLE_BATCH = 512, 32
STORED_SAMPLE = 50_000


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
        """Whether the encoders are the two halves of one contrastive model.

        Its weights tell, as the same folder may have several names. A half that was saved in a
        folder of its own has a part of the model's weights.
        """
        image, text = self.image, self.text
        if image is None or text is None or image.width != text.width:
            return False
        if image.logit_scale is None or text.logit_scale is None:
            return False
        return (image.tensor_hashes <= text.tensor_hashes
                or text.tensor_hashes <= image.tensor_hashes or self.are_two_halves)

    @property
    def are_two_halves(self):
        """Whether each encoder is only one half of a contrastive model, of the same type and the
        same width. That it is the same model cannot be told from their files."""
        image, text = self.image, self.text
        return (image is not None and text is not None and image.half_of != ""
                and image.half_of == text.half_of and image.width == text.width)

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
                whole = self.text if self.image.half_of else self.image
                model.logit_scale.fill_(whole.logit_scale)
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
