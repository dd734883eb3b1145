"""Load a pretrained encoder by its name, which is one of

    resnet50                          a model of torchvision, with its newest weights
    openai/clip-vit-base-patch32      a model of the Hugging Face hub; this needs transformers
    a/folder                          such a model, saved in a folder
    my_encoder.py:build               a function in a file of yours, see `load_from_file`
"""
import ast
import difflib
import importlib.util
import inspect
import json
import logging
import traceback
import urllib.error
import urllib.request
from pathlib import Path

import torch
from torch import nn

from src.device import autocast_dtype, full_memory
from src.encoders import Encoders
from src.hub_files import SECONDS_TO_ANSWER, check_files, check_hub, failure
from src.inner_layers import InnerLayers, MiddleLayer
from src.pretrained import IMAGE, TEXT, PretrainedEncoder
from src.sentence_modules import POOLED_DECODERS, find_modules
from src.transformers_encoder import (
    HALF_LOGIT_SCALE,
    REFUSED,
    BlipRetrieval,
    TransformersEncoder,
    find_logit_scale,
    find_model_class,
    loading_options,
)
from src.utils.errors import UsageError, first_line

# Fields of the configuration files of transformers that have no effect here.
VERSION_FIELDS = ("transformers_version", "torch_dtype", "dtype")
NO_LIMIT = 1e15  # tokenizers that state no length have a larger one
# Texts that different tokenizers treat differently; the last one is too long for most of them.
EXAMPLE_TEXTS = [
    "A dog runs.", "the DOG's  running , \u00e9\u00e8 Caf\u00e9 \u212b\uff21 \u72ac",
    "two hundred and 20,000 photographs: 3.5x #1 <unk> </s> [SEP] un\u00adusual\tthings\n",
    " ".join(f"word{i} of a long text" for i in range(200))]


def load_encoders(settings, device=torch.device("cpu")):
    """Return the `Encoders` that the settings name, on the device.

    Raises UsageError for an encoder that is unavailable.
    """
    encoders = Encoders()
    if settings.image_encoder:
        encoders.image = load_encoder(settings.image_encoder, IMAGE, inner_layers=True)
    if settings.text_encoder:
        encoders.text = load_encoder(settings.text_encoder, TEXT, inner_layers=True)
    for encoder in encoders:
        encoder.configure(device, autocast_dtype(settings.amp, device), not settings.finetune)
    return encoders


def load_encoder(name, modality, inner_layers=False):
    """Return the `PretrainedEncoder` of this name. Raises UsageError if it is unavailable.

    inner_layers: whether features of inner layers stand behind those that the encoder's authors
    mean, see `src/inner_layers.py`. A contrastive model has none, and a file of the user decides.
    """
    if ".py:" in name or name.endswith(".py"):
        return load_from_file(name, modality)
    if ":" in name and not Path(name).is_dir():
        raise UsageError(f"--{modality}_encoder {name}: a function is named as FILE.py:FUNCTION")
    import torchvision  # only here, because that takes a second
    torchvision_models = torchvision.models.list_models(torchvision.models)
    if name in torchvision_models:
        if modality == TEXT:
            raise UsageError(f"--text_encoder {name}: this model encodes images, not texts")
        return load_from_torchvision(name, inner_layers)
    if modality == IMAGE and "/" not in name and not Path(name).is_dir():
        near = difflib.get_close_matches(name, torchvision_models, 3)
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        raise UsageError(f"--image_encoder {name}: torchvision has no such model{hint}, and there "
                         "is no such folder")
    return load_from_transformers(name, modality, inner_layers)


def load_from_file(name, modality):
    """Load the encoder that FILE.py:FUNCTION returns.

    The function takes no arguments. For images it returns (module, transform): the transform turns
    a PIL photo, RGB and upright, into a float tensor (3, H, W), and the module turns
    (B, 3, H, W) into features (B, width). Wrapped in `InnerLayers`, a module gives the features of
    its inner layers as well. For texts the function returns (module, tokenize): `tokenize` turns a
    list of texts into a dict of tensors (B, ...), and `module(**tensors)` returns (B, width).
    `src/experiments/efficientnet_lite2.py` is an example.
    """
    path, _, function = name.rpartition(":") if ".py:" in name else (name, "", "")
    if not Path(path).is_file():
        raise UsageError(f"--{modality}_encoder {name}: there is no file {path}")
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        user_code = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(user_code)
        build = getattr(user_code, function, None) if function else None
        if build is None:
            raise UsageError(f"--{modality}_encoder {name}: {which_function(path)}")
        module, prepare = build()
        if not (isinstance(module, nn.Module) and callable(prepare)):
            raise TypeError("it must return a torch.nn.Module and a function")
    except UsageError:
        raise
    except Exception as error:  # the user's code may raise anything
        if full_memory(error):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if Path(frame.filename).name == Path(path).name]
        line = f", line {lines[-1]}" if lines else ""
        raise UsageError(f"--{modality}_encoder {name} fails ({first_line(error)}{line})"
                         ) from None
    preprocessing = function + Path(path).read_text(encoding="utf-8", errors="replace")
    return PretrainedEncoder(name, modality, module.float(), prepare, preprocessing)


def which_function(path):
    """Say which function of a user's file may be meant, as none or an unknown one was named."""
    names = []
    for node in ast.parse(Path(path).read_bytes()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            given = node.args
            required = len(given.posonlyargs + given.args) - len(given.defaults)
            if not required and None not in given.kw_defaults:
                names.append(node.name)
    if not names:
        return ("an encoder is named as FILE.py:FUNCTION, but the file has no function that takes "
                "no arguments")
    if len(names) == 1:
        return f"name the function as well: {path}:{names[0]}"
    return f"name the function as FILE.py:FUNCTION, where it is one of {', '.join(names)}"


def load_from_torchvision(name, inner_layers):
    """Load a model whose features are the input of its last linear layer, the classifier."""
    import torchvision
    weights = torchvision.models.get_model_weights(name).DEFAULT
    file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    error = None
    if not file.is_file():  # PyTorch would wait for a server without a limit
        request = urllib.request.Request(weights.url, method="HEAD")
        error = failure(lambda: urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER).close())
        if isinstance(error, urllib.error.HTTPError):  # the server has answered
            error = None
    if error is None:
        try:
            model = torchvision.models.get_model(name, weights=weights)
        except Exception as caught:  # a damaged file raises any exception
            if full_memory(caught):
                raise
            error = caught
    if error is not None and file.is_file():
        raise UsageError(f"--image_encoder {name}: {file} is damaged; delete it, and it will be "
                         f"downloaded again ({first_line(error)})")
    if error is not None:
        raise UsageError(f"--image_encoder {name}: the weights are not in {file.parent} and cannot "
                         f"be downloaded ({first_line(error)})")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UsageError(f"--image_encoder {name}: this model has no linear layer whose input "
                         "could serve as features")
    model.set_submodule(linear[-1], nn.Identity())
    model.rule = "the input of its last linear layer"
    network = InnerLayers(model) if inner_layers else model
    return PretrainedEncoder(name, IMAGE, network, weights.transforms(), str(weights))


def load_from_transformers(name, modality, inner_layers):
    """Load a model of the Hugging Face hub, or one saved in a folder.

    Only safetensors files are read, and no code from the hub is run. A model that has been
    downloaded before is used without asking the hub.
    """
    try:
        import transformers
    except ImportError:
        raise UsageError(f"--{modality}_encoder {name} needs transformers: pip install -r "
                         "requirements-extra.txt") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    is_folder = Path(name).is_dir()
    try:
        try:
            return build_from_transformers(transformers, name, modality, inner_layers,
                                           local_files_only=True)
        except OSError as error:
            if is_folder or full_memory(error):
                raise
            check_files(name)
            check_hub(name, modality)
            return build_from_transformers(transformers, name, modality, inner_layers,
                                           local_files_only=False)
    except UsageError:
        raise
    except Exception as error:  # OSError, ValueError, ImportError, or an error of a backend
        if full_memory(error):
            raise
        check_files(name)
        fault = ("transformers finds no such model, neither on this machine nor on the hub "
                 f"({first_line(error)})")
        if isinstance(error, ImportError):
            fault = ("a package is missing: pip install -r requirements-extra.txt "
                     f"({first_line(error)})")
        elif is_folder:
            modules, _ = find_modules(name, modality)
            folder = Path(name, modules.subfolder if modules is not None else "")
            fault = describe_fault(folder, modality, error)
        raise UsageError(f"--{modality}_encoder {name}: {fault}") from None


def describe_fault(folder, modality, error):
    """Say why transformers could not load the model in a folder."""
    if list(folder.glob("*.bin")) and not list(folder.glob("*.safetensors")):
        return ("the weights in this folder are in a .bin file, which could run code when it is "
                "read; save them as safetensors")
    if (folder / "adapter_config.json").is_file():
        return ("this folder holds an adapter and not a model; merge it into its model with "
                "merge_and_unload and save that")
    if not (folder / "config.json").is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"; it has folders with one, such as {folder / inner[0]}" if inner else ""
        return f"transformers finds no such model in this folder, as it has no config.json{hint}"
    if modality == IMAGE and not list(folder.glob("*processor_config.json")):
        return ("preprocessor_config.json is missing in this folder; save the image processor "
                "there with its save_pretrained")
    return f"transformers cannot load the model in this folder ({first_line(error)})"


def build_from_transformers(transformers, name, modality, inner_layers, local_files_only):
    """Load model and preprocessing, and check that the model is of this modality and complete."""
    options = dict(trust_remote_code=False, local_files_only=local_files_only)
    modules, doubt = find_modules(name, modality)
    if modules is not None:
        options["subfolder"] = modules.subfolder
    config = transformers.AutoConfig.from_pretrained(name, **options)
    if (config.model_type, modality) in REFUSED:
        raise UsageError(f"--{modality}_encoder {name}: this model "
                         f"{REFUSED[config.model_type, modality]}")
    if getattr(config, "quantization_config", None):
        raise UsageError(f"--{modality}_encoder {name}: the weights of this model are quantized; "
                         "take the model that it was made from")
    model, loading = find_model_class(transformers, config).from_pretrained(
        name, **loading_options(config), **options)
    main_input = model.main_input_name
    if "BlipForImageTextRetrieval" in type(model).__name__:
        model = BlipRetrieval(model)
    contrastive = all(hasattr(model, f"get_{part}_features") for part in (IMAGE, TEXT))
    takes_images = main_input == "pixel_values"
    if not contrastive and takes_images != (modality == IMAGE):
        raise UsageError(f"--{modality}_encoder {name}: this model does not encode {modality}s; it "
                         f"takes {main_input}")
    if modality == IMAGE and not contrastive and model.config.is_encoder_decoder:  # such as DETR
        raise UsageError(f"--image_encoder {name}: this model finds objects in photos, or writes "
                         "about them; it has no features of a whole photo")
    # A pooler whose output is not used may be missing.
    missing = [key for key in loading["missing_keys"]
               if contrastive or not key.startswith("pooler.")]
    if missing:
        raise UsageError(f"--{modality}_encoder {name}: the model's file lacks weights, such as "
                         f"{missing[0]}")
    if loading["missing_keys"]:
        model.pooler = None  # the file has no weights for it, so it was initialised at random
    logit_scale = find_logit_scale(model) if contrastive else None
    pools_decoder = modules is not None and model.config.model_type in POOLED_DECODERS
    if (modality == TEXT and not contrastive and model.config.is_encoder_decoder
            and not pools_decoder):
        model = model.get_encoder()  # of BART or T5; the decoder generates texts
    encoder = TransformersEncoder(model.float(), modality, contrastive)
    max_tokens = count_tokens = None
    prompt, prompt_tokens = "", 0
    if modality == IMAGE:
        processor = transformers.AutoImageProcessor.from_pretrained(name, **options)

        def prepare(photo):
            return processor(images=photo, return_tensors="pt")["pixel_values"][0]

        preprocessing = as_saved(processor.get_image_processor_dict(name, **options)[0])
    else:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
        except (ValueError, TypeError, AttributeError) as error:
            check_files(name)
            raise UsageError(f"--text_encoder {name}: transformers cannot load its tokenizer; are "
                             "all of its files there, such as tokenizer.json or spiece.model? "
                             f"({first_line(error)})") from None
        # Without the files of a tokenizer, transformers 5 makes one that knows no words.
        words = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
        if not any(character.isalnum() for word in words for character in str(word)):
            raise UsageError(f"--text_encoder {name}: the files of its tokenizer, such as "
                             "tokenizer.json, are missing; save it in the same folder with "
                             "tokenizer.save_pretrained")
        if modules is not None:
            modules.configure_tokenizer(tokenizer)
        max_tokens = find_max_tokens(tokenizer, model)
        if modules is not None:
            prompt = modules.prompt
            prompt_tokens = modules.count_prompt_tokens(tokenizer, max_tokens)
        prepare = make_tokenize(tokenizer, model, contrastive, max_tokens, prompt)

        def count_tokens(texts):
            texts = [prompt + text for text in texts]
            ids = tokenizer(texts, truncation=False)["input_ids"]
            return [len(tokens) - prompt_tokens for tokens in ids]

        preprocessing = describe_tokenizer(tokenizer, prepare)
        if max_tokens is not None:
            max_tokens -= prompt_tokens
    preprocessing += as_saved(model.config.get_config_dict(name, **options)[0])
    network = encoder
    if modules is not None:
        network = modules.build_encoder(encoder, prompt_tokens)
        preprocessing += modules.description
    if inner_layers and not encoder.makes_embeddings:
        network = InnerLayers(network) if modality == IMAGE else MiddleLayer(network, model)
    pretrained = PretrainedEncoder(name, modality, network, prepare, preprocessing, logit_scale,
                                   max_tokens, count_tokens)
    pretrained.rule += doubt
    if pretrained.half_of:
        pretrained.logit_scale = HALF_LOGIT_SCALE
    return pretrained


def as_saved(config):
    """Return the content of a configuration file as a text, without what only tells which version
    of transformers has written it."""
    def essential(value):
        if not isinstance(value, dict):
            return value
        return {name: essential(part) for name, part in value.items()
                if not (name.startswith("_") or name in VERSION_FIELDS)}

    return json.dumps(essential(config), sort_keys=True, default=str)


def describe_tokenizer(tokenizer, tokenize):
    """Return a text that differs for tokenizers that turn texts into different tensors.

    It is made from what the tokenizer does, because its files differ between versions of
    transformers.
    """
    tokens = {name: tensor.tolist() for name, tensor in tokenize(EXAMPLE_TEXTS).items()}
    return f"{sorted(tokenizer.get_vocab().items())} {sorted(tokens.items())}"


def find_max_tokens(tokenizer, model):
    """Return how many tokens of a text the model takes, or None if there is no limit."""
    text_model = getattr(model, "text_model", model)
    config = getattr(model.config, "text_config", model.config)
    limits = [tokenizer.model_max_length]  # 1e30 if the tokenizer does not state any
    for name in ("max_position_embeddings", "max_encoder_position_embeddings"):
        limits.append(getattr(config, name, None) or 0)
    for name, module in text_model.named_modules():
        # Where padding has a position of its own, as in RoBERTa, the positions of tokens begin
        # after it.
        if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]:
            if module.padding_idx is not None:
                limits.append(module.num_embeddings - module.padding_idx - 1)
    limits = [limit for limit in limits if 0 < limit < NO_LIMIT]
    return min(limits) if limits else None


def make_tokenize(tokenizer, model, contrastive, max_tokens, prompt):
    """Return a function from a list of texts to the tensors that the model accepts, by name.

    prompt: a text that goes before each of them.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = getattr(model.config, "text_config", model.config)
    # SigLIP was trained on texts in lower case, padded to the same length and without a mask.
    is_siglip = "siglip" in config.model_type
    padding = "max_length" if is_siglip else True
    function = model.get_text_features if contrastive else model.forward
    accepted = set(inspect.signature(function).parameters)
    if is_siglip:
        accepted.discard("attention_mask")

    def tokenize(texts):
        texts = [prompt + text for text in texts]
        texts = [text.lower() for text in texts] if is_siglip else texts
        tokens = tokenizer(texts, truncation=max_tokens is not None, max_length=max_tokens,
                           padding=padding, return_tensors="pt")
        return {name: tensor for name, tensor in tokens.items() if name in accepted}

    return tokenize
