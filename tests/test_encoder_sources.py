"""Encoders are loaded by their names, or not: damaged files, a network that does not answer, names
without a function."""
import shutil
import sys
import threading
import urllib.error

import pytest
import torch
import torchvision
from PIL import Image

import show_flickr8k_results
from src import hub_files
from src.encoder_sources import load_encoder
from src.utils.errors import UsageError
from tests.conftest import ENCODER_FILE, arguments, edit_json, main, word_tokenizer


@pytest.mark.parametrize("content, message", [
    ("def build():\n    pass\ndef helper(x):\n    pass\n", "the function as well: {file}:build"),
    ("def a():\n    pass\ndef b(x=1, *, y=2):\n    pass\n", "it is one of a, b"),
    ("def _a():\n    pass\ndef b(*, y):\n    pass\n", "no function that takes no arguments"),
    ("def a(:\n", "fails (SyntaxError: ")])
@pytest.mark.parametrize("function", ["", ":", ":absent"])
def test_a_file_without_a_function_is_told_its_functions(content, message, function, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(content)
    with pytest.raises(UsageError) as caught:
        load_encoder(f"{file}{function}", "image")
    error = str(caught.value)
    assert message.format(file=file) in error and f"--image_encoder {file}{function}" in error
    assert "\n" not in error


def test_a_function_of_something_that_is_no_file():
    with pytest.raises(UsageError, match="mine:build: a function is named as FILE.py:FUNCTION"):
        load_encoder("mine:build", "text")
    with pytest.raises(UsageError, match="there is no file mine.py"):
        load_encoder("mine.py", "text")


@pytest.fixture
def hub_file(tmp_path, monkeypatch):
    """Where torch.hub keeps the weights of mobilenet_v3_small, in an empty cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.get_model_weights("mobilenet_v3_small").DEFAULT
    file = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    return file


@pytest.mark.parametrize("kind", ["empty", "half", "a page", "another model"])
def test_damaged_weights_of_torchvision_are_named(kind, hub_file):
    if kind == "half":
        torch.save(torch.arange(10_000), hub_file)
        hub_file.write_bytes(hub_file.read_bytes()[:20_000])
    elif kind == "another model":
        torch.save({"weight": torch.arange(3)}, hub_file)
    else:
        hub_file.write_bytes(b"<html>blocked</html>" if kind == "a page" else b"")
    with pytest.raises(UsageError) as caught:
        load_encoder("mobilenet_v3_small", "image")
    error = str(caught.value)
    assert f"{hub_file} is damaged; delete it" in error and "\n" not in error


def test_weights_are_not_downloaded_if_the_server_does_not_answer(hub_file, monkeypatch):
    forever, asked = threading.Event(), []

    def answer(request, timeout):
        asked.append(request.full_url)
        forever.wait()

    monkeypatch.setattr("urllib.request.urlopen", answer)
    monkeypatch.setattr(hub_files, "SECONDS_TO_ANSWER", 0.01)
    with pytest.raises(UsageError, match="cannot be downloaded .TimeoutError: no answer in"):
        load_encoder("mobilenet_v3_small", "image")
    forever.set()
    assert asked[0].endswith(hub_file.name)


def test_a_server_that_answers_is_asked_for_the_weights(hub_file, monkeypatch):
    def refuse(request, timeout):
        raise urllib.error.HTTPError(request.full_url, 403, "no HEAD here", None, None)

    def download(url, file, *given, **options):
        model = torchvision.models.get_model("mobilenet_v3_small")
        torch.save(model.state_dict(), file)

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    assert load_encoder("mobilenet_v3_small", "image").width == 1024


@pytest.mark.extra
def test_the_hub_is_asked_once(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("transformers")

    asked = []

    def ask(self, name, timeout):
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ask)
    with pytest.raises(UsageError, match="the Hugging Face hub cannot be reached .Connection"):
        load_encoder("nobody/nothing-at-all", "text")
    assert asked == ["nobody/nothing-at-all"]


@pytest.mark.extra
@pytest.mark.parametrize("name, content, message", [
    ("model.safetensors", b"", "is damaged; copy it"),
    ("model.safetensors", b"\x10\0\0\0\0\0\0\0{", "is damaged; copy it"),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid 1", "git lfs pull"),
    ("config.json", b"{", "is damaged; copy it"),
    ("tokenizer.json", b"", "is damaged; copy it")])
def test_a_damaged_file_of_a_transformer_is_named(name, content, message, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]").save_pretrained(tmp_path)
    transformers.BertModel(transformers.BertConfig(
        vocab_size=2, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1)).save_pretrained(tmp_path)
    assert load_encoder(str(tmp_path), "text").width == 8
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_encoder(str(tmp_path), "text")
    error = str(caught.value)
    assert str(tmp_path / name) in error and message in error and "\n" not in error


def test_an_unavailable_encoder_is_one_line_of_error(
        encoder_file, shapes, tmp_path, monkeypatch, capsys):
    def no_network(*arguments, **options):
        raise urllib.error.URLError("no network")

    raises = 1 + ENCODER_FILE.splitlines().index('    raise ValueError("no such luck")')
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if not installed
    for modality, name, message in (
            ("image", "resnet51", "no such model (did you mean resnet50"),
            ("image", "resnet50", "cannot be downloaded"),
            ("image", "squeezenet1_0", "cannot be downloaded"),
            ("text", "resnet50", "encodes images, not texts"),
            ("image", "nobody/nothing", "needs transformers"),
            ("text", "nobody/nothing", "pip install -r requirements-extra.txt"),
            ("image", "no_file.py:build", "there is no file no_file.py"),
            ("image", f"{encoder_file}:raises", f"no such luck, line {raises}"),
            ("image", f"{encoder_file}:absent", "absent"),
            ("image", f"{encoder_file}:wrong", "TypeError"),
            ("image", f"{encoder_file}:maps", "must return features"),
            ("image", f"{encoder_file}:texts", "fails as an encoder of images"),
            ("text", f"{encoder_file}:photos", "fails as an encoder of texts"),
            ("image", f"{encoder_file}:infinite", "too large for float16")):
        status = main(*arguments(shapes, tmp_path / "run", f"--{modality}_encoder", name))
        err = capsys.readouterr().err
        assert (status, err.count("\n")) == (2, 1) and message in err, (name, err)
    given = ["--image_encoder", f"{encoder_file}:tall", "--finetune", "1"]
    assert main(*arguments(shapes, tmp_path / "run", *given)) == 2
    assert main(*arguments(shapes, tmp_path / "run", "--finetune", "1")) == 2
    err = capsys.readouterr().err
    assert "needs a square" in err and "needs an --image_encoder" in err


def test_features_of_a_torchvision_model_are_its_classifiers_input(tmp_path, monkeypatch):
    name = "mobilenet_v3_small"
    weights = torchvision.models.get_model_weights(name).DEFAULT
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    torch.save(model.state_dict(), folder / weights.url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    encoder = load_encoder(name, "image", inner_layers=True)
    photo = Image.effect_noise((300, 260), 80).convert("RGB")
    image = weights.transforms()(photo)[None]
    assert torch.equal(encoder.prepare(photo), image[0]) and encoder.pixels == (224, 224)
    features = encoder(image)
    assert features.shape == (1, encoder.width) == (1, 1024 + 240 + 576)
    assert torch.allclose(model.classifier[3](features[:, :1024]), model(image), atol=1e-5)
    assert encoder.rule.startswith("the input of its last linear layer, and the means of what ")
    own = load_encoder(name, "image")
    assert torch.equal(own(image), features[:, :1024]) and own.key != encoder.key
    assert own.rule == "the input of its last linear layer"


@pytest.mark.extra
def test_features_of_a_text_model_are_the_mean_over_its_tokens(bert, clip, tmp_path):
    encoder = load_encoder(str(bert), "text")
    tokens = encoder.prepare(["a red circle", "a square"])
    hidden = encoder.module.model(**tokens).last_hidden_state
    assert torch.allclose(encoder(tokens)[1], hidden[1, :3].mean(0), atol=1e-6)
    assert encoder.rule == "the mean over tokens"
    assert load_encoder(str(bert), "text").key == encoder.key  # no weight is random
    alone = encoder(encoder.prepare(["a square"]))
    assert torch.allclose(encoder(tokens)[1], alone[0], atol=1e-5)  # padding makes no difference
    long = encoder.prepare(["a red circle above " * 20])
    assert long["input_ids"].shape == (1, 20)
    with pytest.raises(UsageError, match="does not encode images; it takes input_ids"):
        load_encoder(str(bert), "image")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="transformers finds no such model"):
        load_encoder(str(tmp_path / "empty"), "text")
    (tmp_path / "parts").mkdir()
    shutil.copytree(bert, tmp_path / "parts" / "text")
    with pytest.raises(UsageError, match="no config.json; it has folders with one, .*parts/text"):
        load_encoder(str(tmp_path / "parts"), "text")


@pytest.mark.extra
@pytest.mark.parametrize("kind, max_tokens", [
    ("Roberta", 18), ("XLMRoberta", 18), ("MPNet", 18), ("Camembert", 18), ("Bert", 20),
    ("OPT", 20), ("Bloom", None)])
def test_the_tokens_that_a_model_has_positions_for(kind, max_tokens, tmp_path):
    """The tokenizer does not state a length."""
    transformers = pytest.importorskip("transformers")
    vocabulary = word_tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", model_max_length=int(1e30))
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                 max_position_embeddings=20, pad_token_id=1)
    if kind == "OPT":
        sizes |= dict(ffn_dim=32, word_embed_proj_dim=16)
    if kind == "Bloom":
        sizes = dict(hidden_size=16, n_layer=1, n_head=2)
    config = getattr(transformers, f"{kind}Config")
    model = getattr(transformers, f"{kind}Model")(config(vocab_size=len(vocabulary), **sizes))
    model.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path), "text")
    assert encoder.max_tokens == max_tokens
    long = " ".join(["red"] * 30)
    assert encoder.encode_texts([long, "a red circle"]).shape == (2, 16)
    assert encoder.count_cut([long, "a red circle"]) == (max_tokens is not None)


@pytest.mark.extra
def test_captions_that_are_longer_than_the_text_encoder_reads_are_counted(
        clip, copied, tmp_path, capsys):
    captions = copied / "Flickr8k.token.txt"
    lines = [" ".join(line.split(" ")[:8]) for line in captions.read_text().splitlines()]
    for i, words in ((2, 19), (3, 20), (4, 100)):  # [EOS] is the 20th token
        lines[i] = lines[i].split("\t")[0] + "\t" + " ".join(["circle"] * words)
    captions.write_text("".join(f"{line}\n" for line in lines))
    given = arguments(copied, tmp_path / "run", "--text_encoder", clip, epochs=1)
    for more in ([], ["--overwrite"]):  # the second time, the features are stored
        assert main(*given, *more) == 0
        assert (f"cut to the 20 tokens that {clip} reads: 2 captions"
                in capsys.readouterr().out)
    show = ["--output_dir", str(tmp_path / "run"), "--query", "a red circle", "red " * 30]
    assert show_flickr8k_results.main(show) == 0
    assert (capsys.readouterr().err
            == f"a query is longer than the 20 tokens that {clip} reads, and is cut\n")


@pytest.mark.extra
def test_a_model_file_that_lacks_weights_is_refused(bert, tmp_path):
    from safetensors.torch import load_file, save_file
    folder = shutil.copytree(bert, tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="file lacks weights, such as encoder.layer.0"):
        load_encoder(str(folder), "text")


@pytest.mark.extra
def test_a_text_model_without_the_files_of_its_tokenizer_is_refused(bert, clip, tmp_path):
    """transformers 5 would make a tokenizer that knows no words; version 4 raises an error."""
    for source in (bert, clip):
        folder = shutil.copytree(source, tmp_path / source.name)
        for path in folder.glob("*token*"):
            path.unlink()
        with pytest.raises(UsageError, match="tokenizer"):
            load_encoder(str(folder), "text")


@pytest.mark.extra
def test_a_tokenizer_that_lacks_a_file_is_named(bert, tmp_path):
    pytest.importorskip("sentencepiece")
    folder = shutil.copytree(bert, tmp_path / "bert")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="SiglipTokenizer")
    with pytest.raises(UsageError, match="cannot load its tokenizer; are all of its files there"):
        load_encoder(str(folder), "text")


@pytest.mark.extra
def test_an_image_model_without_its_image_processor_is_refused(clip, tmp_path):
    folder = shutil.copytree(clip, tmp_path / "clip")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match="preprocessor_config.json is missing in this folder"):
        load_encoder(str(folder), "image")


@pytest.mark.extra
def test_a_package_that_a_tokenizer_needs_is_named(bert, monkeypatch):
    transformers = pytest.importorskip("transformers")

    def from_pretrained(*args, **options):
        raise ImportError("SiglipTokenizer requires the SentencePiece library")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    message = "a package is missing: pip install -r requirements-extra.txt .*SentencePiece"
    with pytest.raises(UsageError, match=message):
        load_encoder(str(bert), "text")


@pytest.mark.extra
def test_an_adapter_is_refused(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UsageError, match="holds an adapter and not a model"):
        load_encoder(str(tmp_path), "text")


@pytest.mark.extra
def test_only_safetensors_are_read(bert, tmp_path):
    from safetensors.torch import load_file
    folder = shutil.copytree(bert, tmp_path / "bert")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="safetensors"):
        load_encoder(str(folder), "text")


@pytest.mark.extra
def test_an_image_processor_must_give_all_photos_one_shape(clip, tmp_path):
    folder = shutil.copytree(clip, tmp_path / "clip")
    edit_json(folder / "preprocessor_config.json", do_center_crop=False)
    with pytest.raises(UsageError, match="different shapes, .*set do_center_crop to true"):
        load_encoder(str(folder), "image")


@pytest.mark.extra
def test_a_quantized_model_is_refused(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "bert")
    edit_json(folder / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(UsageError, match=f"{folder}: the weights of this model are quantized"):
        load_encoder(str(folder), "text")


@pytest.mark.extra
@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_configuration_may_ask_for_tuples(modality, clip, tmp_path):
    folder = shutil.copytree(clip, tmp_path / "clip")
    edit_json(folder / "config.json", return_dict=False)
    assert load_encoder(str(folder), modality).width == 12
