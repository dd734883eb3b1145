"""Files of a run, written so that a crash, a kill or a full disk leaves either the old file or the new one, whole."""
import json
import os
import pickle
from pathlib import Path

import torch


class CheckpointError(Exception):
    """A file of a run cannot be written, or is missing, damaged or of another kind; the message is one line."""


def _write_atomically(path, write):
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # the bytes must be on the disk before the name points to them
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else "torch.save failed; is the disk full?"
        raise CheckpointError(f"{path}: could not be written ({reason}); what was there before is kept") from None


def save_checkpoint(state, path):
    """torch.save, atomically. Raises CheckpointError."""
    _write_atomically(path, lambda file: torch.save(state, file))


def save_json(value, path):
    """json.dump, atomically. Raises CheckpointError."""
    _write_atomically(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def load_checkpoint(path, keys):
    """A checkpoint that must hold `keys`, its tensors on the CPU. Raises CheckpointError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
        raise CheckpointError(f"{path}: damaged, or not a checkpoint of this project") from None
    missing = set(keys) - set(state if isinstance(state, dict) else ())
    if missing:
        raise CheckpointError(f"{path}: not a checkpoint of this project, it lacks {', '.join(sorted(missing))}")
    return state


def load_json(path):
    """The value in a JSON file. Raises CheckpointError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: not JSON, or not UTF-8
        raise CheckpointError(f"{path}: damaged ({str(error).splitlines()[0]})") from None
