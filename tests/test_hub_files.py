import pytest

from src.hub_files import cached_files, failure, find_file, hub_failure
from src.sentence_modules import find_modules

COMMIT = "0123456789" * 4


def test_what_a_server_answers():
    def refuse():
        raise ConnectionError("no network")

    assert isinstance(failure(refuse), ConnectionError)
    assert failure(lambda: None) is None


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub with the model a/b, of which it is known that it has one.json and that it
    has no two.json, and a hub that has three.json as well."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    model = tmp_path / "models--a--b"
    for folder in ("refs", f"snapshots/{COMMIT}/sub", f".no_exist/{COMMIT}"):
        (model / folder).mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    (model / "snapshots" / COMMIT / "sub" / "one.json").write_text("1")
    (model / ".no_exist" / COMMIT / "two.json").write_text("")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    class Missing(huggingface_hub.errors.EntryNotFoundError):
        def __init__(self):
            pass

    def download(name, file):
        asked.append(file)
        if file != "three.json":
            raise Missing
        return str(tmp_path / file)

    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *given, **options: None)
    hub_failure.cache_clear()
    yield asked
    hub_failure.cache_clear()


@pytest.mark.extra
def test_the_hub_is_asked_about_what_is_not_in_its_cache(hub, tmp_path):
    assert find_file("a/b", "sub/one.json").read_text() == "1"
    assert [file.name for file in cached_files("a/b")] == ["sub", "one.json"]
    assert find_file("a/b", "two.json") is None
    assert hub == []
    assert find_file("a/b", "three.json") == tmp_path / "three.json"
    assert find_file("a/b", "modules.json") is None
    assert hub == ["three.json", "modules.json"]
    assert find_modules("a/b", "text") == (None, "")


@pytest.mark.extra
def test_a_file_is_unknown_if_the_hub_does_not_answer(hub, monkeypatch):
    import huggingface_hub

    def ask(self, name, timeout):
        hub.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ask)
    for _ in range(2):
        with pytest.raises(OSError):
            find_file("a/b", "three.json")
    assert hub == ["a/b"]
    assert find_file("a/b", "two.json") is None
    modules, doubt = find_modules("a/b", "text")
    assert modules is None and "unknown without the hub" in doubt
    with pytest.raises(OSError):
        find_file("not/a/name", "three.json")


def test_a_file_of_a_folder(tmp_path):
    (tmp_path / "modules.json").write_text("[]")
    assert find_file(str(tmp_path), "modules.json") == tmp_path / "modules.json"
    assert find_file(str(tmp_path), "other.json") is None
