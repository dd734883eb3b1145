"""The pretrained encoders of a run, and what they are to the model.

A frozen encoder makes the features that the model takes. With --finetune an encoder becomes a part
of the model and is trained with the rest."""
import contextlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from src.pretrained import IMAGE, PretrainedEncoder
from src.utils.augment import normalize
from src.utils.errors import UsageError

# The number of photos or captions whose features give the mean and the standard deviation by which
# the model standardises features: stored ones, and those that have to be computed for it.
STORED_SAMPLE, SAMPLE = 50_000, 512


class Renormalize(nn.Module):
    """Photos as `augment.normalize` leaves them -> photos as the encoder's transform leaves them.

    Both are linear in the pixels of a channel, so a black and a white photo tell the difference.
    """

    def __init__(self, encoder):
        super().__init__()
        black, white = encoder.black_and_white()
        our_black, our_white = (normalize(torch.full((1, 3, 1, 1), level)) for level in (0.0, 1.0))
        scale = (white - black) / (our_white - our_black)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", black - scale * our_black, persistent=False)

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

    @contextlib.contextmanager
    def frozen(self):
        """Inside, the encoders are frozen, also if they will be trained later. Raises UsageError
        for an encoder whose features cannot be stored."""
        frozen = [encoder.frozen for encoder in self]
        for encoder in self:
            encoder.configure(encoder.device, encoder.amp_dtype, frozen=True)
        try:
            yield
        finally:
            for encoder, was_frozen in zip(self, frozen):
                encoder.configure(encoder.device, encoder.amp_dtype, was_frozen)

    def attach(self, model, settings):
        """Make the encoders a part of the model, which then takes photos and texts instead of
        their features. Encoders that will be trained take photos normalised as for our own
        encoder, see `augment.normalize`."""
        if self.image is not None:
            model.image_backbone = self.image
            if settings.finetune:
                renormalize = Renormalize(self.image).to(self.image.device)
                model.image_backbone = nn.Sequential(renormalize, self.image)
        if self.text is not None:
            model.text_backbone = self.text

    def initialize(self, model, train):
        """Standardise the features by those of the training split, which are stored. Only those of
        a text encoder may be missing.

        A contrastive pair makes the model start as that pair: it ranks as the pair does alone.
        """
        identity = self.is_contrastive_pair
        if self.image is not None:
            features = sample_rows(train.photos)[:, 0]
            check_different(self.image, features)
            model.image_encoder.standardize(features, identity)
        if self.text is not None:
            if train.text_features is None:
                rows = np.linspace(0, len(train) - 1, min(SAMPLE, len(train))).round()
                texts = [train.captions[int(row)] for row in rows]
                features = torch.from_numpy(self.text.encode_texts(texts))
            else:
                features = sample_rows(train.text_features)
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


class ContrastivePair(nn.Module):
    """The two encoders of a contrastive model such as CLIP as a model that ranks without any
    training, see `MultiModalMemoryNetwork`.

    `forward` takes images, or text_features as the text encoder's `prepare` gives them, and returns
    {"central_latent": (B, width)}, not of unit length. is_presumed: whether their files do not tell
    that they are of the same model."""

    def __init__(self, image, text, is_presumed):
        super().__init__()
        self.image_backbone, self.text_backbone = image, text
        self.is_presumed = is_presumed

    def forward(self, text=None, images=None, text_features=None):
        if images is not None:
            return {"central_latent": self.image_backbone(images)}
        return {"central_latent": self.text_backbone(text_features)}


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


NO_ENCODERS = Encoders()
