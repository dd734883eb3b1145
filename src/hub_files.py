"""Files of models: in a folder, in the cache of the Hugging Face hub, or on the hub."""
import functools
import json
import threading
from pathlib import Path

from src.device import full_memory
from src.utils.errors import UsageError, first_line

SECONDS_TO_ANSWER = 4  # that a server has
LFS_POINTER = b"version https://git-lfs"


def failure(ask):
    """Return the exception that `ask`, which asks a server, raises, or None. After
    SECONDS_TO_ANSWER that is a TimeoutError: looking up a name, for instance, has no limit."""
    outcome = []

    def run():
        try:
            ask()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_ANSWER)
    return outcome[0] if outcome else TimeoutError(f"no answer in {SECONDS_TO_ANSWER} seconds")


@functools.cache
def hub_failure(name):
    """Return the exception because of which the Hugging Face hub cannot be asked for a model, or
    None. It is asked once."""
    import huggingface_hub
    error = failure(
        lambda: huggingface_hub.HfApi().model_info(name, timeout=SECONDS_TO_ANSWER))
    answered = isinstance(error, (huggingface_hub.errors.HfHubHTTPError,
                                  huggingface_hub.errors.HFValidationError))
    return None if answered else error


def check_hub(name, modality):
    """Raise UsageError if the Hugging Face hub cannot be reached. transformers would try it many
    times."""
    error = hub_failure(name)
    if error is not None:
        fault = "it has not been downloaded before"
        if cached_files(name):
            fault = "not all of its files have been downloaded before"
        raise UsageError(f"--{modality}_encoder {name}: there is no such folder, {fault}, and the "
                         f"Hugging Face hub cannot be reached ({first_line(error)})")


def find_file(name, file):
    """Return the path of a file of a model, or None if the model has no such file.

    The hub is only asked about what is not in its cache. Raises OSError if it cannot be reached.
    """
    if Path(name).is_dir():
        path = Path(name, file)
        return path if path.is_file() else None
    import huggingface_hub
    errors = huggingface_hub.errors
    try:
        cached = huggingface_hub.try_to_load_from_cache(name, file)
        if cached is not None:  # a path, or a mark that there is no such file
            return Path(cached) if isinstance(cached, str) else None
        if hub_failure(name) is not None:
            raise OSError(f"{name}: the hub cannot be reached")
        return Path(huggingface_hub.hf_hub_download(name, file))
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):  # the hub could not be reached
            raise OSError(first_line(error)) from None
        return None
    except errors.HFValidationError as error:
        raise OSError(first_line(error)) from None


def cached_files(name):
    """Return the files of a model of the hub that have been downloaded, which are links."""
    from huggingface_hub.constants import HF_HUB_CACHE
    folder = Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots")
    return sorted([*folder.glob("*/*"), *folder.glob("*/*/*")])


def check_files(name):
    """Raise UsageError if a file of a model, in a folder or in the cache of the hub, is damaged."""
    import safetensors
    files, cure = sorted([*Path(name).glob("*"), *Path(name).glob("*/*")]), "copy it there again"
    if not Path(name).is_dir():
        files, cure = cached_files(name), "delete it, and it will be downloaded again"
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safetensors.safe_open(file, "pt"):
                    pass
            elif file.suffix == ".json":
                json.loads(file.read_bytes())
        except Exception as error:  # safetensors has exceptions of its own
            if full_memory(error):
                raise
            file = file.resolve() if not Path(name).is_dir() else file
            if file.is_file() and file.read_bytes()[:len(LFS_POINTER)] == LFS_POINTER:
                raise UsageError(f"{file} is only a pointer of Git LFS; `git lfs pull` in its "
                                 "folder downloads the file") from None
            raise UsageError(f"{file} is damaged; {cure} ({first_line(error)})") from None
