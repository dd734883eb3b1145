import dataclasses
import json
import os
import signal
import time
import types

import pytest
import torch

from src.experiments import ladder
from src.runs import BEST, CONFIG, HISTORY, LAST
from src.settings import PRESETS, make_settings, parse_args
from tests.conftest import main, start_script


def settings(preset, flags):
    args = dict(vars(parse_args("", ["--model", preset, *flags])))
    for name in ("output_dir", "resume", "check", "overwrite"):
        del args[name]
    return make_settings(**args)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_steps_lead_from_the_reference_to_the_presets_own_recipe(preset):
    found = [settings(preset, flags) for _, flags in ladder.rows(preset)]
    steps, own = found[: -len(ladder.CHANGES)], make_settings(model=preset)
    assert steps[0] == make_settings(model=preset, recipe="reference") and steps[-1] == own
    # a step that a preset does not take is left out
    assert all(one != other for one, other in zip(steps, steps[1:]))
    for changed in found[-len(ladder.CHANGES) :]:  # one change each
        differences = {f.name for f in dataclasses.fields(own)
                       if getattr(own, f.name) != getattr(changed, f.name)}
        assert len(differences) <= 1


class InProcess:
    """subprocess.Popen of the training script, without the start of a process."""

    def __init__(self, command, **options):
        self.status = main(*command[2:])

    def wait(self):
        return self.status


def test_rows_are_run_kept_and_gone_on_with(shapes, tmp_path, capfd, monkeypatch):
    no_memory = 1 + [what for what, _ in ladder.rows("tiny")].index("no memory")
    given = f"--model tiny --epochs 2 --rows 1 {no_memory} --seeds 0 1".split()
    given += ["--data_dir", str(shapes), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(ladder, "subprocess", types.SimpleNamespace(Popen=InProcess))
    assert ladder.main(given) == 0
    printed = [line for line in capfd.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(printed) == 4 and "`--model tiny --recipe reference --epochs 2`" in printed[2]
    runs = {
        folder: json.loads((tmp_path / folder / CONFIG).read_text())["settings"]
        for folder in os.listdir(tmp_path)
    }
    assert sorted((run["seed"], run["memory_size"]) for run in runs.values()) == [
        (0, 0),
        (0, 16),
        (1, 0),
        (1, 16),
    ]
    for seed in (0, 1):  # the figures are those of the runs' files
        folder = next(
            folder
            for folder, run in runs.items()
            if run["seed"] == seed and run["memory_size"] == 0
        )
        best = max(
            row["val"]["avg_r1"] for row in json.loads((tmp_path / folder / HISTORY).read_text())
        )
        assert f"{best:.2f}" in printed[3]
    made = {folder: os.stat(tmp_path / folder / BEST).st_mtime_ns for folder in runs}
    assert ladder.main(given) == 0
    assert made == {folder: os.stat(tmp_path / folder / BEST).st_mtime_ns for folder in runs}


def test_wrong_arguments(tmp_path, capfd):
    with pytest.raises(SystemExit) as stopped:
        ladder.main(["--rows", "99"])
    assert stopped.value.code == 2
    assert (
        ladder.main(["--data_dir", str(tmp_path / "none"), "--output_dir", str(tmp_path / "out")])
        == 1
    )
    assert "exit status 2" in capfd.readouterr().err


def test_an_interrupted_ladder_goes_on_where_it_was(shapes, tmp_path, capfd):
    flags = f"--model tiny --rows 1 --data_dir {shapes} --output_dir {tmp_path}".split()
    process = start_script(
        "-m", "src.experiments.ladder", *flags, "--epochs", 300, start_new_session=True)
    start = time.time()
    while not list(tmp_path.glob(f"*/{HISTORY}")) and time.time() - start < 120:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "goes on from here" in err
    assert "interrupted; go on with" in err  # the training has saved its state
    (folder,) = tmp_path.iterdir()
    config = json.loads((folder / CONFIG).read_text())
    done = torch.load(folder / LAST, weights_only=True)["epoch"]
    config["settings"]["epochs"] = done  # the end is near
    (folder / CONFIG).write_text(json.dumps(config))
    assert ladder.main([*flags, "--epochs", "300"]) == 0
    assert "resumed at epoch" in capfd.readouterr().out
    assert len(json.loads((folder / HISTORY).read_text())) == done
