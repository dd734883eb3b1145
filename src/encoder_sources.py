"""What a pretrained encoder's name means. It is one of

    resnet50                          a model of torchvision, with its newest weights
    openai/clip-vit-base-patch32      a model of the Hugging Face hub; needs transformers
    a/folder                          the same, saved there
    my_encoder.py:build               a function of your own, see `load_own`
"""
import difflib
import importlib.util
import inspect
import logging
import sys
import traceback
from pathlib import Path

import torch
import torchvision
from torch import nn

from src.device import autocast_dtype
from src.pretrained import IMAGE, TEXT, Encoders, PretrainedEncoder, reason
from src.utils.errors import UsageError


def load_encoders(settings, device=torch.device("cpu")):
    """The `Encoders` that the settings name, on the device. Raises UsageError for one that is
    unavailable."""
    encoders = Encoders(*(load_encoder(name, kind) if name else None for kind, name in
                          ((IMAGE, settings.image_encoder), (TEXT, settings.text_encoder))))
    for encoder in encoders:
        encoder.settle(device, autocast_dtype(settings.amp, device), frozen=not settings.finetune)
    return encoders


def load_encoder(name, kind):
    if ".py:" in name:
        return load_own(name, kind)
    models = torchvision.models.list_models(torchvision.models)
    if name in models:
        if kind == TEXT:
            raise UsageError(f"{name} encodes images, not texts")
        return load_torchvision(name)
    if kind == IMAGE and "/" not in name and not Path(name).is_dir():
        near = difflib.get_close_matches(name, models, 3)
        hint = f" (near: {', '.join(near)})" if near else ""
        raise UsageError(f"--image_encoder {name}: torchvision has no such model{hint}, and there "
                         "is no such folder")
    return load_transformers(name, kind)


def load_own(name, kind):
    """FILE.py:FUNCTION, called without arguments, gives (module, transform): a PIL photo, RGB and
    upright -> (3, H, W) floats, and (B, 3, H, W) -> (B, width); for texts (module, tokenize): a
    list of texts -> a dict of tensors (B, ...), and module(**tensors) -> (B, width)."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UsageError(f"--{kind}_encoder {name}: there is no file {path}")
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        own = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(own)
        module, prepare = getattr(own, function)()
        if not (isinstance(module, nn.Module) and callable(prepare)):
            raise TypeError("it must return a torch.nn.Module and a function")
    except Exception as error:  # it is the user's code
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        raise UsageError(f"--{kind}_encoder {name} fails ({reason(error)}, line {line})") from None
    source = function + Path(path).read_text(encoding="utf-8")
    return PretrainedEncoder(name, kind, module.float(), prepare, source)


def load_torchvision(name):
    """The features before the last linear layer, the classifier."""
    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        model = torchvision.models.get_model(name, weights=weights)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        folder = torch.hub.get_dir()
        raise UsageError(f"the weights of {name} are not in {folder}/checkpoints and cannot be "
                         f"fetched ({reason(error)})") from None
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UsageError(f"{name} has no linear classifier to take the features before")
    model.set_submodule(linear[-1], nn.Identity())
    transform = weights.transforms()
    return PretrainedEncoder(name, IMAGE, model, transform, f"{weights} {transform}")


class TransformersEncoder(nn.Module):
    """A model of transformers -> its features: of a contrastive model the projected embeddings, of
    others the pooled features of photos, where the model pools them, or the mean of the token
    features."""

    def __init__(self, model, kind, contrastive):
        super().__init__()
        self.model, self.kind, self.contrastive = model, kind, contrastive

    def forward(self, images=None, **tokens):
        function = self.model
        if self.contrastive:
            function = getattr(self.model, f"get_{self.kind}_features")
        output = function(**tokens) if images is None else function(pixel_values=images)
        if isinstance(output, torch.Tensor):  # get_..._features before transformers 5
            return output
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and (self.contrastive or self.kind == IMAGE):
            return pooled.flatten(1)  # some are (B, width, 1, 1)
        hidden = output.last_hidden_state
        if hidden.ndim == 4:  # a convnet's, (B, width, H, W)
            return hidden.mean((2, 3))
        if self.kind == IMAGE:
            return hidden.mean(1)
        real = tokens["attention_mask"][:, :, None].to(hidden.dtype)
        return (hidden * real).sum(1) / real.sum(1)


def load_transformers(name, kind):
    """A name of the Hugging Face hub, or a folder; safetensors only, no remote code."""
    try:
        import transformers
    except ImportError:
        raise UsageError(f"--{kind}_encoder {name} needs transformers: pip install -r "
                         "requirements-extra.txt") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        try:  # what is there is used without asking the hub
            return find_transformers(transformers, name, kind, local_files_only=True)
        except OSError:
            if Path(name).is_dir():
                raise
            return find_transformers(transformers, name, kind, local_files_only=False)
    except UsageError:
        raise
    except Exception as error:  # OSError, ValueError, ImportError, and what its backends raise
        raise UsageError(f"--{kind}_encoder {name}: transformers finds no such model, neither here "
                         f"nor on its hub ({reason(error)})") from None


def find_transformers(transformers, name, kind, local_files_only):
    options = dict(trust_remote_code=False, local_files_only=local_files_only)
    model, loading = transformers.AutoModel.from_pretrained(
        name, use_safetensors=True, output_loading_info=True, **options)
    contrastive = all(hasattr(model, f"get_{part}_features") for part in (IMAGE, TEXT))
    if not contrastive and (model.main_input_name == "pixel_values") != (kind == IMAGE):
        raise UsageError(f"{name} is no encoder of {kind}s: it takes {model.main_input_name}")
    missing = [key for key in loading["missing_keys"] if "pooler" not in key]
    if missing:
        raise UsageError(f"{name}: its file lacks weights, such as {missing[0]}")
    if loading["missing_keys"]:  # what pools was never trained, but made up just now
        model.pooler = None
    scale = model.logit_scale.item() if contrastive and hasattr(model, "logit_scale") else None
    encoder = TransformersEncoder(model.float(), kind, contrastive)

    if kind == IMAGE:
        processor = transformers.AutoImageProcessor.from_pretrained(name, **options)

        def transform(photo):
            return processor(images=photo, return_tensors="pt")["pixel_values"][0]

        return PretrainedEncoder(name, kind, encoder, transform, processor.to_json_string(), scale)

    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = getattr(model.config, "text_config", model.config)
    longest = min(tokenizer.model_max_length,
                  getattr(config, "max_position_embeddings", sys.maxsize))
    # SigLIP was trained with all texts padded to one length.
    padding = "max_length" if "siglip" in config.model_type else True
    function = model.get_text_features if contrastive else model.forward
    accepted = inspect.signature(function).parameters

    def tokenize(texts):
        tokens = tokenizer(texts, truncation=True, max_length=longest, padding=padding,
                           return_tensors="pt")
        return {name: tensor for name, tensor in tokens.items() if name in accepted}

    vocabulary = str(sorted(tokenizer.get_vocab().items()))
    return PretrainedEncoder(name, kind, encoder, tokenize, vocabulary, scale)
