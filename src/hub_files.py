"""Files of models: in a folder, in the cache of the Hugging Face hub, or on the hub."""
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


def check_hub(name, modality):
    """Raise UsageError if the Hugging Face hub cannot be reached. transformers would try it many
    times."""
    import huggingface_hub
    error = failure(
        lambda: huggingface_hub.HfApi().model_info(name, timeout=SECONDS_TO_ANSWER))
    answered = isinstance(error, (huggingface_hub.errors.HfHubHTTPError,
                                  huggingface_hub.errors.HFValidationError))
    if error is not None and not answered:
        raise UsageError(f"--{modality}_encoder {name}: there is no such folder, it has not been "
                         "downloaded before, and the Hugging Face hub cannot be reached "
                         f"({first_line(error)})")


def find_file(name, file, local_files_only):
    """Return the path of a file of a model, or None if the model has no such file.

    A file of the hub is downloaded unless it is in the cache. Raises OSError if that fails;
    local_files_only: it also fails if the hub does not answer soon.
    """
    if Path(name).is_dir():
        path = Path(name, file)
        return path if path.is_file() else None
    import huggingface_hub
    if local_files_only and not cached_files(name):
        raise OSError(f"{name} has not been downloaded before")
    try:
        cached = huggingface_hub.try_to_load_from_cache(name, file)
        if cached is None and local_files_only:
            error = failure(lambda: huggingface_hub.hf_hub_download(name, file))
            if error is not None:
                raise error
            cached = huggingface_hub.try_to_load_from_cache(name, file)
        if cached is None:
            cached = huggingface_hub.hf_hub_download(name, file)
    except huggingface_hub.errors.LocalEntryNotFoundError as error:
        raise OSError(first_line(error)) from None
    except huggingface_hub.errors.EntryNotFoundError:
        return None
    except huggingface_hub.errors.HFValidationError as error:
        raise OSError(first_line(error)) from None
    return Path(cached) if isinstance(cached, str) else None  # else a mark that there is none


def cached_files(name):
    """Return the files of a model of the hub that have been downloaded."""
    from huggingface_hub.constants import HF_HUB_CACHE
    folder = Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots")
    return sorted([*folder.glob("*/*"), *folder.glob("*/*/*")])


def check_files(name):
    """Raise UsageError if a file of a model, in a folder or in the cache of the hub, is damaged."""
    import safetensors
    files, cure = sorted([*Path(name).glob("*"), *Path(name).glob("*/*")]), "copy it there again"
    if not Path(name).is_dir():  # what lies in the cache are links
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
