"""Models of transformers as encoders: which class loads a model, and what of its output its authors
mean by the features."""
import math

import torch
from torch import nn

from src.pretrained import IMAGE, TEXT

EMBEDDINGS, POOLED = "its own projected embeddings", "its pooled output"
# BLIP's files lack the temperature of its training, which began at 0.07.
BLIP_LOGIT_SCALE = math.log(1 / 0.07)
# The halves of a contrastive model lack its scale. It is 100 for CLIP and similar for SigLIP.
HALF_LOGIT_SCALE = math.log(100)
MANY_VECTORS = "describes a photo by many vectors, and not by one that a text could have as well"
FRAMES = "encodes videos and not single photos"
FIXED_SIZE = ("takes patches of a photo in its own shape; take a SigLIP 2 of a fixed resolution, "
              "such as google/siglip2-base-patch16-224")
# Types of models whose features of a modality are not one vector of a photo or of a text.
REFUSED = {
    ("blip-2", IMAGE): MANY_VECTORS, ("blip-2", TEXT): MANY_VECTORS,
    ("instructblip", IMAGE): MANY_VECTORS, ("instructblip", TEXT): MANY_VECTORS,
    ("instructblipvideo", IMAGE): FRAMES, ("instructblipvideo", TEXT): FRAMES,
    ("xclip", IMAGE): FRAMES, ("xclip", TEXT): FRAMES, ("videomae", IMAGE): FRAMES,
    ("timesformer", IMAGE): FRAMES, ("vivit", IMAGE): FRAMES, ("vjepa2", IMAGE): FRAMES,
    ("siglip2", IMAGE): FIXED_SIZE, ("siglip2_vision_model", IMAGE): FIXED_SIZE}


def loading_options(config):
    """Return the arguments of from_pretrained that a model of this type needs."""
    # A model saved in bfloat16 would otherwise compute its constants in it. This is the name of the
    # option in transformers 4, which 5 still takes.
    options = dict(use_safetensors=True, output_loading_info=True, torch_dtype=torch.float32,
                   return_dict=True)  # a configuration may say that the output is a tuple
    if config.model_type.startswith("aimv2"):
        # Its attention to texts is causal. The fused one is so only where a batch has padding.
        options["attn_implementation"] = "eager"
    return options


def find_model_class(transformers, config):
    """Return the class that loads all weights which the features depend on.

    For some models AutoModel is another one, which drops the projection, and it knows no halves of
    some contrastive models and no encoders without their decoder, such as T5EncoderModel.
    """
    architecture = (config.architectures or [""])[0]
    if (architecture.endswith(("WithProjection", "TextModel", "VisionModel", "EncoderModel"))
            or architecture == "BlipForImageTextRetrieval"):
        return getattr(transformers, architecture, transformers.AutoModel)
    return transformers.AutoModel


class BlipRetrieval(nn.Module):
    """BLIP for retrieval with the functions that other contrastive models have.

    Its features are those of its contrastive loss. Its head for matching takes a photo and a text
    together, which is no encoder.
    """

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixel_values):
        hidden = self.model.vision_model(pixel_values=pixel_values).last_hidden_state
        return self.model.vision_proj(hidden[:, 0])

    def get_text_features(self, input_ids, attention_mask):
        hidden = self.model.text_encoder(
            input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.model.text_proj(hidden[:, 0])


def find_logit_scale(model):
    """Return the logarithm of a contrastive model's scale, or None for other models."""
    if isinstance(model, BlipRetrieval):
        return BLIP_LOGIT_SCALE
    if hasattr(model, "logit_scale"):
        return model.logit_scale.item()
    if hasattr(model, "temperature"):  # ALIGN divides by it
        return -math.log(model.temperature.item())
    return None


class TransformersEncoder(nn.Module):
    """A model of transformers -> its features (B, width).

    The features of a contrastive model, or of one of its halves, are its projected embeddings.
    Those of another image model are the pooled output, or else the class token, by which such
    models classify photos. Otherwise they are the mean over all tokens or places. Which of these
    they are is told in `rule` once it has encoded something.
    """

    def __init__(self, model, modality, contrastive):
        super().__init__()
        self.model, self.modality, self.contrastive = model, modality, contrastive
        self.rule = ""
        # BERT's pooler was trained to tell which sentence follows. The pooled output of a text
        # model without such a module is the token that stands for the text, as in CLIP.
        self.use_pooled = contrastive or modality == IMAGE or not any(
            "pooler" in name for name, _ in model.named_modules())
        self.has_class_token = modality == IMAGE and any(
            name.endswith("cls_token") for name, _ in model.named_parameters())
        # Whether the features are embeddings in a space of photos and texts.
        self.makes_embeddings = (contrastive or type(model).__name__.endswith("WithProjection")
                                 or model.config.model_type.startswith("siglip"))

    @property
    def half_of(self):
        """The type of the contrastive model of which this is one half, or ""."""
        suffix = "_vision_model" if self.modality == IMAGE else "_text_model"
        model_type = self.model.config.model_type
        is_half = self.makes_embeddings and model_type.endswith(suffix)
        return model_type.removesuffix(suffix) if is_half else ""

    def forward(self, images=None, **tokens):
        function = self.model
        if self.contrastive:
            function = getattr(self.model, f"get_{self.modality}_features")
        output = function(**tokens) if images is None else function(pixel_values=images)
        features, self.rule = self.pool(output, tokens.get("attention_mask"))
        return features

    def pool(self, output, attention_mask):
        """Return the features and the rule by which they were taken from the model's output."""
        if isinstance(output, torch.Tensor):  # get_..._features before transformers 5
            return output[:, 0] if output.ndim == 3 else output, EMBEDDINGS
        for name in ("image_embeds", "text_embeds"):  # half of a contrastive model, projected
            if getattr(output, name, None) is not None:
                return getattr(output, name), EMBEDDINGS
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and self.use_pooled:
            if pooled.ndim == 3:  # FLAVA projects all tokens; the first stands for all of them
                pooled = pooled[:, 0]
            # SigLIP's embeddings are its pooled output. Some models return (B, width, 1, 1).
            return pooled.flatten(1), EMBEDDINGS if self.makes_embeddings else POOLED
        if getattr(output, "cls_token_value", None) is not None:  # CvT keeps it apart
            return output.cls_token_value[:, 0], "its class token"
        hidden = output.last_hidden_state
        if self.has_class_token and hidden.ndim == 3:
            if getattr(self.model.config, "use_mean_pooling", False):  # BEiT, Data2Vec
                return hidden[:, 1:].mean(1), "the mean over patches"
            return hidden[:, 0], "its class token"
        if hidden.ndim == 4:  # a convnet's output, (B, width, H, W)
            return hidden.mean((2, 3)), "the mean over places"
        if attention_mask is None:
            return hidden.mean(1), "the mean over tokens"
        is_token = attention_mask[:, :, None].to(hidden.dtype)
        return (hidden * is_token).sum(1) / is_token.sum(1), "the mean over tokens"
