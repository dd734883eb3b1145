"""The files of a run: their names, and how they are written, read, resumed and locked.

Files are replaced atomically, so that a crash, a kill or a full disk leaves either the old file or
the new one. A file that cannot be written raises RunError, one that cannot be read UsageError."""
import contextlib
import dataclasses
import json
import logging
import os
from pathlib import Path

import torch

from src.device import full_memory
from src.init_from import InitialModel
from src.settings import Settings, make_settings, settings_from_run, settings_of
from src.utils import files
from src.utils.console import shell_command
from src.utils.errors import RunError, UsageError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None
    import msvcrt


HISTORY, BEST, LAST, TEST, BANK, LOG, CONFIG = RUN_FILES = (
    "history_flickr8k.json", "best_model_flickr8k.pt", "last_checkpoint_flickr8k.pt",
    "test_results_flickr8k.json", "bank_results_flickr8k.json", "flickr8k_sgd_training.log",
    "config.json")
BEST_KEYS = ("epoch", "model_state_dict", "metrics", "config", "tokenizer")  # and "bank" at the end
LAST_KEYS = ("epoch", "step", "loss_sum", "seconds", "history", "config", "tokenizer",
             "model_state_dict", "optimizer_state_dict", "scaler_state_dict",
             "scheduler_state_dict")
# Settings that belong to the machine rather than to the run. --resume may change them, and under
# torchrun they may differ between machines.
MACHINE_SETTINGS = ("data_dir", "extra_data", "device", "amp")
# Others cannot read what is locked on Windows, so it is a byte far behind the end of the log.
LOCKED_BYTE = 2 ** 30
TRAIN_FIRST = "train first: python train_flickr8k_sgd.py"


# ------------------------------------------------------------------------ writing and reading


def write_atomically(path, write):
    """Call `write(file)` with a partial file, and rename that to path when it is complete. Raises
    RunError if that fails; the old file is then still there."""
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # the bytes must be on the disk before the name points to them
        files.replace(partial, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            files.delete(partial)
        if full_memory(error):
            raise
        reason = error.strerror if isinstance(error, OSError) else "is the disk full?"
        raise RunError(f"{path}: could not be written ({reason}); the old file is kept") from None


def save_checkpoint(state, path):
    write_atomically(path, lambda file: torch.save(state, file))


def save_json(value, path):
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def load_checkpoint(path, keys):
    """Load a checkpoint, with its tensors on the CPU. Raises UsageError if the file is missing or
    damaged, or if one of the keys is missing in it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file") from None
    except Exception as error:  # of pickle, which may raise any for what is not a pickle
        if full_memory(error):
            raise
        raise UsageError(f"{path}: damaged, or not a checkpoint of this project") from None
    missing = set(keys) - set(state if isinstance(state, dict) else ())
    if missing:
        raise UsageError(f"{path}: not a checkpoint of this version, as it lacks "
                         f"{', '.join(sorted(missing))}")
    return state


def load_best(run_dir):
    """The checkpoint of a run's best model. Raises UsageError if there is none, or if it is
    damaged."""
    path = Path(run_dir) / BEST
    check_folder(path.parent)
    if not path.exists():
        if not (path.parent / CONFIG).exists():
            raise UsageError(f"{path.parent}: holds no run; {TRAIN_FIRST}")
        raise UsageError(f"{path.parent}: has no best model yet; the first epoch saves one")
    return load_checkpoint(path, BEST_KEYS)


def load_json(path):
    """Load a JSON file. Raises UsageError if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: damaged ({str(error).splitlines()[0]})") from None


# ---------------------------------------------------------------------- a new or resumed run


def resolve(args):
    """The flags of the training script -> (settings, output_dir, the checkpoint to continue from or
    None, the InitialModel to begin with or None). Raises UsageError for a folder that holds a run
    already, for nothing to resume or to begin with, and for a flag that contradicts that run."""
    given = dict(vars(args))
    resume, overwrite = given.pop("resume"), given.pop("overwrite")
    output_dir, check = given.pop("output_dir"), given.pop("check")
    init_from, initial = given.pop("init_from"), None
    default_name = "synthetic_sgd" if "synthetic" in given else "flickr8k_sgd"
    if resume:
        return resume_run(Path(output_dir or f"outputs/{default_name}"), given)
    if init_from is None:
        settings = make_settings(**given)
    else:
        initial = InitialModel(init_from, load_best(init_from))
        settings = settings_from_run(initial.settings, given, init_from)
        default_name = f"{folder_name(settings.data_dir)}_from_{folder_name(init_from)}"
    output_dir = Path(output_dir or f"outputs/{default_name}")
    check_writable(output_dir)
    if initial is not None and output_dir.resolve() == Path(init_from).resolve():
        raise UsageError(f"--init_from {init_from} is the --output_dir, too; name another one")
    if not (overwrite or check):
        refuse_existing_run(output_dir)
    return settings, output_dir, None, initial


def folder_name(path):
    return Path(path).resolve().name


def check_writable(output_dir):
    """Raise UsageError if the folder of a run can certainly not be made or written. Otherwise that
    would be noticed after minutes of work."""
    place = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    if not place.is_dir():
        raise UsageError(f"--output_dir {output_dir}: {place} is a file, not a folder")
    if not os.access(place, os.W_OK):
        raise UsageError(f"--output_dir {output_dir}: {place} cannot be written")


def refuse_existing_run(output_dir):
    """Raise UsageError if the folder holds a run."""
    existing = [name for name in RUN_FILES if name != LOG and (output_dir / name).exists()]
    if existing:
        raise UsageError(f"{output_dir} holds a run already ({existing[0]}); --resume continues "
                         "it, --overwrite deletes it, or name another --output_dir")


def resume_run(output_dir, given):
    """Return what `resolve` does, for the run in output_dir and the flags that were given."""
    if not (output_dir / CONFIG).exists():
        raise UsageError(f"nothing to resume in {output_dir}: it holds no {CONFIG}")
    config = load_json(output_dir / CONFIG)
    settings, recorded = settings_of(config, output_dir), config.get("init_from")
    # A run without a checkpoint starts from the beginning.
    checkpoint, epochs_done, initial = None, 0, None
    if (output_dir / LAST).exists():
        checkpoint = load_checkpoint(output_dir / LAST, LAST_KEYS)
        epochs_done = checkpoint["epoch"] - (checkpoint["step"] == 0)
    elif recorded is not None:
        if not Path(recorded["run"]).is_dir():
            raise UsageError(f"the run {recorded['run']}, with whose weights the run in "
                             f"{output_dir} begins, does not exist (seen from {Path.cwd()})")
        initial = InitialModel(recorded["run"], load_best(recorded["run"]))
        initial.check_unchanged(recorded)
    for name, value in given.items():
        if name == "epochs" and value < epochs_done:
            raise UsageError(f"the run has {epochs_done} epochs already, so --epochs {value} is "
                             "too few")
        if name in (*MACHINE_SETTINGS, "epochs"):
            settings = dataclasses.replace(settings, **{name: value})
        elif getattr(settings, name) != value:
            raise UsageError(f"--resume continues with the run's own --{name} "
                             f"{getattr(settings, name)}, not {value}; leave the flag out")
    if not settings.synthetic:
        check_data_dir(settings.data_dir)
    return settings, output_dir, checkpoint, initial


def resume_command(output_dir, *flags):
    """The command that continues a run, as the user may paste it."""
    flags = ["--resume", "--output_dir", str(output_dir), *flags]
    return shell_command(["python", "train_flickr8k_sgd.py", *flags])


def on_this_machine(settings, args):
    """The settings of the main process with the machine settings that were given here."""
    given = {name: getattr(args, name) for name in MACHINE_SETTINGS if hasattr(args, name)}
    return dataclasses.replace(settings, **given)


def check_same_data(config_before, config, data_dir):
    """Raise UsageError if the photos, the captions or their order differ between two configs of a
    run: that of its beginning and that of now."""
    before = config_before.get("fingerprints")
    if before is None:
        raise UsageError("the run is of another version of this project, which did not record its "
                         "data; please retrain")
    changed = [name for name, now in config["fingerprints"].items() if before[name] != now]
    if changed:
        shared_before, shared_now = ("different_captions" in config_of["data"]["train"]
                                     for config_of in (config_before, config))
        if shared_now and not shared_before:
            raise UsageError(f"photos in {data_dir} share captions, which counted as different "
                             "when the run began: it is of another version of this project, or "
                             "the captions have changed; please retrain")
        raise UsageError(f"{data_dir} is not the dataset that the run began with: the photos, the "
                         f"captions or their order have changed in {', '.join(changed)}")


def check_data_dir(data_dir):
    """Raise UsageError if the folder that a run was trained on no longer exists."""
    if not Path(data_dir).is_dir():
        raise UsageError(f"the folder {data_dir}, which the run was trained on, does not exist "
                         f"(seen from {Path.cwd()}); name it with --data_dir")


def lock(log_stream, output_dir):
    """Lock a run by its log file; the lock ends with the process. Raises UsageError if another
    process holds it."""
    try:
        if fcntl is not None:
            fcntl.flock(log_stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            position = os.lseek(log_stream.fileno(), 0, os.SEEK_CUR)
            os.lseek(log_stream.fileno(), LOCKED_BYTE, os.SEEK_SET)
            try:
                msvcrt.locking(log_stream.fileno(), msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(log_stream.fileno(), position, os.SEEK_SET)
    except (BlockingIOError, PermissionError):  # of flock and of Windows
        raise UsageError(f"another run is writing into {output_dir}; name another --output_dir"
                         ) from None
    except OSError:  # the file system has no locks
        pass


def open_output_dir(output_dir, config, history, is_new, replace, log):
    """Make the folder of a run with its config, send the log to its file, and keep other runs out
    until that file is closed. A new run deletes the files of an earlier one. Raises UsageError if
    there is one and not `replace`, or if another run is writing."""
    output_dir.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(output_dir / LOG, encoding="utf-8", errors="replace")
    to_file.setFormatter(logging.Formatter("%(asctime)s  %(message)s"))
    try:
        lock(to_file.stream, output_dir)
        if is_new and not replace:
            refuse_existing_run(output_dir)
    except UsageError:
        to_file.close()
        raise
    log.addHandler(to_file)
    if is_new:  # --overwrite deletes only now, when nothing else can be wrong with the arguments
        to_file.stream.truncate(0)
        for name in RUN_FILES:
            if name != LOG:
                files.delete(output_dir / name)
    elif not history or history[-1]["epoch"] < config["settings"]["epochs"]:
        # The run will be trained further, so its final results are out of date.
        files.delete(output_dir / TEST)
        files.delete(output_dir / BANK)
    save_json(config, output_dir / CONFIG)
    if history:  # a kill may have separated the history from the checkpoint
        save_json(history, output_dir / HISTORY)


# ------------------------------------------------------------------------------ a run, to show


@dataclasses.dataclass
class Run:
    """A run as its files describe it. test: metrics of the best model on test. bank: those of
    `compare_bank` on "val" and "test". Both are None until the run has finished."""

    dir: Path
    history: list
    config: dict
    settings: Settings
    test: dict | None
    bank: dict | None

    @property
    def best(self):
        """The epoch with the highest avg R@1 on validation."""
        return max(self.history, key=lambda row: row["val"]["avg_r1"])

    @property
    def finished(self):
        return self.history[-1]["epoch"] >= self.settings.epochs

    @property
    def minutes(self):
        return sum(row["seconds"] for row in self.history) / 60


def check_folder(output_dir):
    if output_dir.is_file():
        raise UsageError(f"{output_dir}: is a file; name the folder of a run")
    if not output_dir.is_dir():
        raise UsageError(f"{output_dir}: there is no such folder; {TRAIN_FIRST}")


def load_run(output_dir):
    """The Run in a folder; no weights are read. Raises UsageError if there is no run, no finished
    epoch yet, a damaged file, or a run of another version."""
    output_dir = Path(output_dir)
    check_folder(output_dir)
    if not (output_dir / HISTORY).exists():
        if (output_dir / CONFIG).exists():
            raise UsageError(f"{output_dir}: the run has not finished its first epoch yet")
        raise UsageError(f"{output_dir}: holds no run; {TRAIN_FIRST}")
    history, config = load_json(output_dir / HISTORY), load_json(output_dir / CONFIG)
    if not (isinstance(history, list) and history):
        raise UsageError(f"{output_dir / HISTORY}: holds no epochs")
    settings = settings_of(config, output_dir)
    results = {name: load_json(output_dir / name) if (output_dir / name).exists() else None
               for name in (TEST, BANK)}
    return Run(output_dir, history, config, settings, results[TEST], results[BANK])
