"""The files of a run: their names, and how they are read and written. A crash, a kill or a full
disk leaves either the old file or the new one, whole; a file that cannot be
written is a RunError, one that cannot be read a UsageError."""
import dataclasses
import json
import logging
import os
import pickle
import shlex
from pathlib import Path

import torch

from src.settings import Settings, make_settings, settings_of
from src.utils.errors import RunError, UsageError

try:
    import fcntl
except ImportError:  # Windows: there no lock keeps a second run out of a folder
    fcntl = None


HISTORY, BEST, LAST, TEST, BANK, LOG, CONFIG = RUN_FILES = (
    "history_flickr8k.json", "best_model_flickr8k.pt", "last_checkpoint_flickr8k.pt",
    "test_results_flickr8k.json", "bank_results_flickr8k.json", "flickr8k_sgd_training.log",
    "config.json")
BEST_KEYS = ("epoch", "model_state_dict", "metrics", "config", "tokenizer")  # "bank", too
LAST_KEYS = ("epoch", "step", "loss_sum", "seconds", "history", "config", "tokenizer",
             "model_state_dict", "optimizer_state_dict", "scaler_state_dict",
             "scheduler_state_dict")
MACHINES_OWN = ("data_dir", "extra_data", "device", "amp")
TRAIN_FIRST = "train first: python train_flickr8k_sgd.py"


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
        reason = error.strerror if isinstance(error, OSError) else "is the disk full?"
        raise RunError(f"{path}: could not be written ({reason}); the old one is kept"
                              ) from None


def save_checkpoint(state, path):
    _write_atomically(path, lambda file: torch.save(state, file))


def save_json(value, path):
    text = json.dumps(value, indent=1) + "\n"
    _write_atomically(path, lambda file: file.write(text.encode()))


def load_checkpoint(path, keys):
    """A checkpoint that must hold `keys`, its tensors on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
        raise UsageError(f"{path}: damaged, or not a checkpoint of this project") from None
    missing = set(keys) - set(state if isinstance(state, dict) else ())
    if missing:
        raise UsageError(f"{path}: not a checkpoint of this version, it lacks "
                              f"{', '.join(sorted(missing))}")
    return state


def load_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: damaged ({str(error).splitlines()[0]})") from None


def resolve(args):
    """Parsed flags -> (settings, output_dir, checkpoint to go on from or None). Raises UsageError
    for a folder that holds a run, for nothing to resume, and for a flag that contradicts the run.
    """
    given = dict(vars(args))
    resume, overwrite, output_dir, check = map(
        given.pop, ("resume", "overwrite", "output_dir", "check"))
    name = "synthetic_sgd" if "synthetic" in given else "flickr8k_sgd"
    output_dir = Path(output_dir or f"outputs/{name}")
    if resume:
        return resume_run(output_dir, given)
    if output_dir.exists() and not output_dir.is_dir():
        raise UsageError(f"--output_dir {output_dir} is a file, not a folder")
    if not (overwrite or check):
        refuse_a_run(output_dir)
    return make_settings(**given), output_dir, None


def refuse_a_run(output_dir):
    """Raises UsageError where there is a run."""
    found = [name for name in RUN_FILES if name != LOG and (output_dir / name).exists()]
    if found:
        raise UsageError(f"{output_dir} holds a run already ({found[0]}); --resume goes on with "
                         "it, --overwrite deletes it, or name another --output_dir")


def resume_command(output_dir, *flags):
    flags = ["--resume", "--output_dir", str(output_dir), *flags]
    return shlex.join(["python", "train_flickr8k_sgd.py", *flags])


def resume_run(output_dir, given):
    """What `resolve` gives, of the run in output_dir."""
    if not (output_dir / CONFIG).exists():
        raise UsageError(f"nothing to resume in {output_dir}: it holds no {CONFIG}")
    settings = settings_of(load_json(output_dir / CONFIG), output_dir)
    checkpoint, done = None, 0  # stopped before its first checkpoint, it goes on from its start
    if (output_dir / LAST).exists():
        checkpoint = load_checkpoint(output_dir / LAST, LAST_KEYS)
        done = checkpoint["epoch"] - (checkpoint["step"] == 0)
    for name, value in given.items():
        if name == "epochs" and value < done:
            raise UsageError(f"the run has {done} epochs already; --epochs {value} is fewer")
        if name in (*MACHINES_OWN, "epochs"):
            settings = dataclasses.replace(settings, **{name: value})
        elif getattr(settings, name) != value:  # the rest is the run's
            raise UsageError(f"--resume goes on with the run's own --{name} "
                             f"{getattr(settings, name)}, not {value}; leave the flag out")
    if not settings.synthetic:
        check_data_dir(settings.data_dir)
    return settings, output_dir, checkpoint


def on_this_machine(settings, args):
    """The main process's settings, with the paths and the like that were given here."""
    given = {name: getattr(args, name) for name in MACHINES_OWN if hasattr(args, name)}
    return dataclasses.replace(settings, **given)


def check_same_data(began, config, data_dir):
    """Raises UsageError where photos, captions or their order are not those that a run, whose
    config was `began`, has been trained on."""
    before = began.get("fingerprints")
    if before is None:
        raise UsageError("the run is of another version of this project, which did not keep what "
                         "its data was; train anew")
    changed = [name for name, now in config["fingerprints"].items() if before[name] != now]
    if changed:
        raise UsageError(f"{data_dir} is not the dataset that the run began with: photos, captions "
                         f"or order of {', '.join(changed)} are others")


def check_data_dir(data_dir):
    """Raises UsageError where the data that a run was trained on is not there any more."""
    if not Path(data_dir).is_dir():
        raise UsageError(f"there is no folder {data_dir} any more, which the run was trained on "
                         f"(seen from {Path.cwd()}); name it with --data_dir")


def hold(stream, output_dir):
    """Lock a run's log, which a kill undoes. Raises UsageError where another process has it."""
    try:
        if fcntl is not None:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another run is writing into {output_dir}; name another --output_dir"
                         ) from None
    except OSError:  # a file system without locks
        pass


def open_output_dir(output_dir, config, history, fresh, replace, log):
    """Make a run's folder, with config and log, and keep other runs out until the log is closed; a
    fresh run's without the files of an earlier one. Raises UsageError where there is one and not
    `replace`, or where another run is writing."""
    output_dir.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(output_dir / LOG, encoding="utf-8", errors="replace")
    to_file.setFormatter(logging.Formatter("%(asctime)s  %(message)s"))
    try:
        hold(to_file.stream, output_dir)
        if fresh and not replace:
            refuse_a_run(output_dir)
    except UsageError:
        to_file.close()
        raise
    log.addHandler(to_file)
    if fresh:  # what --overwrite deletes, now that nothing else can be wrong
        to_file.stream.truncate(0)
        for name in RUN_FILES:
            if name != LOG:
                (output_dir / name).unlink(missing_ok=True)
    elif not history or history[-1]["epoch"] < config["settings"]["epochs"]:
        # Trained on, the test is still to come.
        (output_dir / TEST).unlink(missing_ok=True)
        (output_dir / BANK).unlink(missing_ok=True)
    save_json(config, output_dir / CONFIG)
    if history:  # a kill may have come between this file and the checkpoint
        save_json(history, output_dir / HISTORY)


@dataclasses.dataclass
class Run:
    """A run as its files tell it. test: metrics, bank: those without and with it (`compare_bank`)
    of "val" and "test"; None before the run's end."""

    dir: Path
    history: list
    config: dict
    settings: Settings
    test: dict | None
    bank: dict | None

    @property
    def best(self):
        return max(self.history, key=lambda row: row["val"]["avg_r1"])

    @property
    def finished(self):
        return self.history[-1]["epoch"] >= self.settings.epochs

    @property
    def minutes(self):
        return sum(row["seconds"] for row in self.history) / 60


def check_folder(output_dir):
    if not output_dir.is_dir():
        raise UsageError(f"{output_dir}: there is no such folder; {TRAIN_FIRST}")


def load_run(output_dir):
    """-> Run, no weights read. Raises UsageError for no run, no finished epoch yet or a
    damaged file, UsageError for a run of another version."""
    output_dir = Path(output_dir)
    check_folder(output_dir)
    if not (output_dir / HISTORY).exists():
        if (output_dir / CONFIG).exists():
            raise UsageError(f"{output_dir}: the run has not finished its first epoch yet")
        raise UsageError(f"{output_dir}: holds no run; {TRAIN_FIRST}")
    history, config = load_json(output_dir / HISTORY), load_json(output_dir / CONFIG)
    if not (isinstance(history, list) and history):
        raise UsageError(f"{output_dir / HISTORY}: holds no epochs")
    test, bank = (load_json(output_dir / name) if (output_dir / name).exists() else None
                  for name in (TEST, BANK))
    return Run(output_dir, history, config, settings_of(config, output_dir), test, bank)
