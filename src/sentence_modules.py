"""Models of sentence-transformers: which modules follow their transformer.

Their modules.json lists the modules that a text passes: the transformer, how its tokens are pooled,
and perhaps a linear layer or a normalization.
"""
import json
from pathlib import Path

from torch import nn

from src.hub_files import find_file
from src.sentence_pooling import RULES, Dense, Normalize, Pooling, SentenceEncoder
from src.utils.errors import UsageError, first_line

# Older files have a flag for each way of pooling. Several ways are concatenated in this order.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean", "pooling_mode_lasttoken": "lasttoken"}
# A configuration names its activation as a class to import. Only these are accepted.
ACTIVATION_PLACES = ("torch.nn", "torch.nn.modules.activation", "torch.nn.modules.linear")
ACTIVATIONS = ("CELU", "ELU", "GELU", "Hardsigmoid", "Hardswish", "Hardtanh", "Identity",
               "LeakyReLU", "LogSigmoid", "Mish", "PReLU", "ReLU", "ReLU6", "SELU", "SiLU",
               "Sigmoid", "Softplus", "Softsign", "Tanh", "Tanhshrink")
MODULES = ("Transformer", "CLIPModel", "Pooling", "Dense", "Normalize", "LayerNorm", "Dropout")
# The configuration of a transformer is in sentence_bert_config.json, or in an older file.
TRANSFORMERS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
# Arguments of loading that change no feature, or of which this project decides. Code from the hub
# is never run.
WITHOUT_EFFECT = {"trust_remote_code", "torch_dtype", "dtype", "attn_implementation", "device_map",
                  "low_cpu_mem_usage", "add_pooling_layer", "use_fast", "use_cache"}
# The package pools what the decoder of these makes; of other such models, what the encoder makes.
POOLED_DECODERS = ("bart", "mbart", "plbart", "mvp", "led", "bigbird_pegasus")


def find_modules(name, modality):
    """Return the `SentenceModules` of a model of sentence-transformers, or None for another model,
    and a text for the user if that is unknown."""
    try:
        if find_file(name, "modules.json") is None:
            return None, ""
    except OSError:
        doubt = "; whether its authors mean another pooling is unknown without the hub"
        return None, doubt if modality == "text" else ""
    try:
        return SentenceModules(name, modality), ""
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"--{modality}_encoder {name}: its modules.json, or a file that it names, "
                         f"is not as sentence-transformers writes it ({first_line(error)})"
                         ) from None


class SentenceModules:
    """What the files of a model of sentence-transformers say.

    subfolder: where its transformer is. max_tokens: how many tokens of a text it takes, or None.
    prompt: what is put before each text. rule: a text for the user that tells how the features are
    taken. description: a text that differs if the features do, apart from the weights.

    Raises UsageError for modules and options that are unknown here, and OSError if the hub fails.
    """

    def __init__(self, name, modality):
        self.name, self.modality = name, modality
        modules = [(self.find_kind(module["type"]), module["path"])
                   for module in self.read_json("modules.json", required=True)]
        for _, folder in modules:
            if folder.startswith("/") or ".." in folder:
                self.refuse(f"names the folder {folder}, which is not one of its own")
        if not modules or modules[0][0] not in ("Transformer", "CLIPModel"):
            self.refuse("does not begin with a Transformer")
        (kind, self.subfolder), *rest = modules
        self.read_transformer(kind)
        self.modes, self.include_prompt = [], True
        if self.has_tokens:
            if not rest or rest[0][0] != "Pooling":
                self.refuse("has no module Pooling after its Transformer")
            self.read_pooling(rest[0][1])
        rest = [module for module in rest[self.has_tokens:] if module[0] != "Dropout"]
        self.layers = nn.Sequential(*(self.read_layer(*module) for module in rest))
        steps = [RULES[mode] for mode in self.modes] or ["its own projected embeddings"]
        steps += [kind for kind, _ in rest]
        self.rule = ", ".join(steps) + ", from its modules.json" + self.read_prompt()
        self.description = json.dumps([
            modules, self.modes, self.include_prompt, self.prompt, self.width, self.lower_case,
            self.max_tokens, self.padding_side, str(self.layers)])

    def refuse(self, fault):
        raise UsageError(f"--{self.modality}_encoder {self.name}: this model of "
                         f"sentence-transformers {fault}")

    def read_json(self, *path, required=False):
        """Read a configuration; if it is unknown whether there is one, it is only an error for a
        required one."""
        try:
            file = find_file(self.name, "/".join(filter(None, path)))
        except OSError:
            if required:
                raise
            file = None
        if required and file is None:
            self.refuse(f"lacks {'/'.join(path)}")
        return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))

    def find_kind(self, class_name):
        """Return the name of a module's class without its package."""
        package, _, kind = class_name.rpartition(".")
        if kind not in MODULES or not package.startswith("sentence_transformers."):
            self.refuse(f"has the module {class_name}, which this project does not know")
        return kind

    def read_transformer(self, kind):
        """Read how texts become tokens, and which output of the transformer is used."""
        configs = (self.read_json(self.subfolder, f"sentence_{name}_config.json")
                   for name in TRANSFORMERS)
        config = next(filter(None, configs), {})
        task = config.get("transformer_task", "feature-extraction")
        outputs = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
        if kind == "CLIPModel":
            outputs = {part: {"method": f"get_{part}_features"} for part in ("image", "text")}
        outputs = config.get("modality_config", outputs)
        if self.modality not in outputs:
            self.refuse(f"does not encode {self.modality}s")
        if self.modality == "text" and "message" in outputs:
            self.refuse("puts texts into a chat template, which this project does not do")
        output = outputs[self.modality]
        self.has_tokens = output.get("method_output_name") == "last_hidden_state"
        method = "forward" if self.has_tokens else f"get_{self.modality}_features"
        if task != "feature-extraction" or output["method"] != method:
            self.refuse(f"takes {output['method']} of its Transformer for {task}, which this "
                        "project does not know")
        options = {"model_max_length": config.get("max_seq_length")}
        for part in ("model", "config", "processor", "tokenizer"):
            options |= config.get(f"{part}_args") or {}
            options |= config.get(f"{part}_kwargs") or {}
        if config.get("processing_kwargs"):
            options["processing_kwargs"] = config["processing_kwargs"]
        self.max_tokens = options.pop("model_max_length")
        self.padding_side = options.pop("padding_side", None)
        self.lower_case = config.get("do_lower_case", False)
        for option in options.keys() - WITHOUT_EFFECT:
            self.refuse(f"has the option {option}, which this project does not know")

    def read_pooling(self, folder):
        config = self.read_json(folder, "config.json", required=True)
        modes = config.get("pooling_mode")  # counts even if there are flags
        if modes is None:
            modes = [mode for flag, mode in POOLING_FLAGS.items() if config.get(flag)] or "mean"
        self.modes = [modes] if isinstance(modes, str) else modes
        self.include_prompt = config.get("include_prompt", True)
        for mode in self.modes:
            if mode not in RULES:
                self.refuse(f"pools tokens by {mode}, which this project does not know")

    def read_layer(self, kind, folder):
        """Return a module that comes after pooling, with its weights."""
        from safetensors.torch import load_file
        if kind == "Normalize":
            return Normalize()
        config = self.read_json(folder, "config.json", required=True)
        for key in ("module_input_name", "module_output_name"):
            if (config.get(key) or "sentence_embedding") != "sentence_embedding":
                self.refuse(f"has a {kind} for {config[key]}, which this project does not know")
        if kind == "LayerNorm":
            layer = nn.LayerNorm(config["dimension"])
        elif kind == "Dense":
            name = config.get("activation_function", "torch.nn.Tanh")
            place, _, activation = name.rpartition(".")
            if place not in ACTIVATION_PLACES or activation not in ACTIVATIONS:
                self.refuse(f"has a Dense with the activation {name}, which this project does not "
                            "know")
            layer = Dense(config["in_features"], config["out_features"], config.get("bias", True),
                          getattr(nn, activation)(), config.get("use_residual", False))
        else:
            self.refuse(f"has the module {kind} in a place that this project does not know")
        file = find_file(self.name, f"{folder}/model.safetensors")
        if file is None:
            self.refuse(f"lacks {folder}/model.safetensors; a .bin file could run code when it is "
                        "read")
        weights = {name.removeprefix("norm."): weight for name, weight in load_file(file).items()}
        try:
            layer.load_state_dict(weights)
        except RuntimeError:
            self.refuse(f"has weights in {folder} that do not fit its config.json")
        return layer

    def read_prompt(self):
        """Find the prompt that goes before each text, and the width of the features. Return the
        end of the rule, which tells the user about the prompt."""
        config = self.read_json("config_sentence_transformers.json")
        self.width = config.get("truncate_dim")
        prompts = {"query": "", "document": ""} | (config.get("prompts") or {})
        name = config.get("default_prompt_name")
        if name is not None and name not in prompts:
            self.refuse(f"lacks its default prompt {name}")
        self.prompt = (prompts[name] or "") if name is not None else ""
        if self.prompt:
            return f' with the prompt "{self.prompt}"'
        others = [prompt for prompt in prompts.values() if prompt]
        return f' without a prompt such as "{others[0]}"' if others else ""

    def configure_tokenizer(self, tokenizer):
        """Let a tokenizer of transformers do what the files say."""
        from tokenizers import normalizers
        if self.max_tokens is not None:
            tokenizer.model_max_length = self.max_tokens
        if self.padding_side is not None:
            tokenizer.padding_side = self.padding_side
        if self.lower_case and tokenizer.is_fast:
            backend = tokenizer.backend_tokenizer
            others = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *others])
        elif self.lower_case:
            tokenizer.do_lower_case = True

    def count_prompt_tokens(self, tokenizer, max_tokens):
        """Return how many tokens of a text are those of the prompt."""
        if not self.prompt:
            return 0
        ids = tokenizer(self.prompt, truncation=max_tokens is not None,
                        max_length=max_tokens)["input_ids"]
        ends = bool(ids) and ids[-1] in tokenizer.all_special_ids  # with [SEP], for instance
        return len(ids) - ends

    def build_encoder(self, encoder, prompt_tokens):
        """Return the `SentenceEncoder` around a TransformersEncoder."""
        transformer, pooling = encoder, None
        if self.has_tokens:
            transformer = encoder.model
            pooling = Pooling(self.modes, 0 if self.include_prompt else prompt_tokens)
        return SentenceEncoder(transformer, pooling, self.layers, self.width, self.rule)
