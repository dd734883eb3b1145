"""Encoders that cannot be loaded: damaged files, a network that does not answer, names without a
function. What is loaded is tested in test_pretrained.py."""
import threading
import urllib.error

import pytest
import torch
import torchvision

from src import encoder_sources
from src.encoder_sources import failure, load_encoder
from src.utils.errors import UsageError


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
    monkeypatch.setattr(encoder_sources, "SECONDS_TO_ANSWER", 0.01)
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


def test_what_a_server_answers():
    def refuse():
        raise ConnectionError("no network")

    assert isinstance(failure(refuse), ConnectionError)
    assert failure(lambda: None) is None


@pytest.mark.extra
def test_the_hub_is_asked_once(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("transformers")

    def ask(self, name, timeout):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ask)
    with pytest.raises(UsageError, match="the Hugging Face hub cannot be reached .Connection"):
        load_encoder("nobody/nothing-at-all", "text")


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
