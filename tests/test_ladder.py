import dataclasses
import json
import os
import signal
import statistics
import time
import types

import pytest
import torch

from src.experiments import ladder
from src.runs import BEST, CONFIG, HISTORY, LAST
from src.settings import PRESETS, make_settings, parse_args
from tests.conftest import main, start_script


def settings_from(preset, flags):
    given = dict(vars(parse_args("", ["--model", preset, *flags])))
    for name in ("output_dir", "resume", "check", "overwrite"):
        del given[name]
    return make_settings(**given)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_steps_lead_from_the_reference_to_the_presets_own_recipe(preset):
    all_rows = [settings_from(preset, flags) for _, flags in ladder.rows(preset)]
    steps, changes = all_rows[:-len(ladder.CHANGES)], all_rows[-len(ladder.CHANGES):]
    preset_settings = make_settings(model=preset)
    assert steps[0] == make_settings(model=preset, recipe="reference")
    assert steps[-1] == preset_settings
    # A step that this preset does not take is left out.
    assert all(one != other for one, other in zip(steps, steps[1:]))
    for changed in changes:
        differences = [field.name for field in dataclasses.fields(changed)
                       if getattr(preset_settings, field.name) != getattr(changed, field.name)]
        assert len(differences) <= 1


def test_mean_and_deviation():
    assert ladder.mean_and_deviation([12.345], 2) == "12.35"
    assert ladder.mean_and_deviation([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"


class InProcess:
    """Takes the place of subprocess.Popen; runs the training script inside this process."""

    def __init__(self, command, **options):
        self.status = main(*command[2:])

    def wait(self):
        return self.status


def test_rows_are_trained_once_and_shown(shapes, tmp_path, capfd, monkeypatch):
    descriptions = [description for description, _ in ladder.rows("tiny")]
    no_memory = 1 + descriptions.index("the preset's own recipe without the memory")
    given = f"--model tiny --epochs 2 --rows 1 {no_memory} --seeds 0 1".split()
    given += ["--data_dir", str(shapes), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(ladder, "subprocess", types.SimpleNamespace(Popen=InProcess))
    assert ladder.main(given) == 0
    printed = [line for line in capfd.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(printed) == 4 and "`--model tiny --recipe reference --epochs 2`" in printed[2]

    runs = {folder: json.loads((folder / CONFIG).read_text())["settings"]
            for folder in tmp_path.iterdir()}
    assert sorted((run["seed"], run["memory_size"]) for run in runs.values()) == [
        (0, 0), (0, 16), (1, 0), (1, 16)]
    best = {}  # the best validation of the runs without the memory, by seed
    for folder, run in runs.items():
        if run["memory_size"] == 0:
            history = json.loads((folder / HISTORY).read_text())
            best[run["seed"]] = max((row["val"] for row in history), key=lambda val: val["avg_r1"])
    avg_r1 = [best[seed]["avg_r1"] for seed in (0, 1)]
    rsum = [best[seed]["rsum"] for seed in (0, 1)]
    cells = printed[3].split(" | ")
    assert cells[1] == f"{statistics.mean(avg_r1):.2f} ± {statistics.stdev(avg_r1):.2f}"
    assert cells[2] == f"{avg_r1[0]:.2f}, {avg_r1[1]:.2f}"
    assert cells[4] == f"{statistics.mean(rsum):.1f} ± {statistics.stdev(rsum):.1f}"

    written = {folder: (folder / BEST).stat().st_mtime_ns for folder in runs}
    assert ladder.main(given) == 0
    assert written == {folder: (folder / BEST).stat().st_mtime_ns for folder in runs}


def test_wrong_arguments(tmp_path, capfd):
    with pytest.raises(SystemExit) as stopped:
        ladder.main(["--rows", "99"])
    assert stopped.value.code == 2
    given = ["--data_dir", str(tmp_path / "none"), "--output_dir", str(tmp_path / "out")]
    assert ladder.main(given) == 1
    assert "exit status 2" in capfd.readouterr().err


def test_an_interrupted_ladder_continues_where_it_was(shapes, tmp_path, capfd):
    flags = f"--model tiny --rows 1 --data_dir {shapes} --output_dir {tmp_path}".split()
    process = start_script(
        "-m", "src.experiments.ladder", *flags, "--epochs", 300, start_new_session=True)
    start = time.time()
    while not list(tmp_path.glob(f"*/{HISTORY}")) and time.time() - start < 120:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command continues from here" in err
    assert "interrupted; to continue: " in err  # the training has saved its state
    (folder,) = tmp_path.iterdir()
    config = json.loads((folder / CONFIG).read_text())
    epochs_done = torch.load(folder / LAST, weights_only=True)["epoch"]
    config["settings"]["epochs"] = epochs_done  # so that the end is near
    (folder / CONFIG).write_text(json.dumps(config))
    assert ladder.main([*flags, "--epochs", "300"]) == 0
    assert "resumed at epoch" in capfd.readouterr().out
    assert len(json.loads((folder / HISTORY).read_text())) == epochs_done
