"""The training script, as a user runs it. Its single steps are tested in tests/test_training.py."""
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import show_flickr8k_results
import train_flickr8k_sgd as script
from src import evaluation, first_stage, retrieval, runs, training
from src.evaluation import compare_bank
from src.fisher import NetworkWithFisherVectors, with_fisher_latents
from src.image_encoder import PatchComponents
from src.runs import BANK, BEST, CONFIG, HISTORY, LAST, LOG, RUN_FILES, TEST
from src.search import embed_photos, embed_texts, load_bank, load_model
from src.settings import make_settings
from src.training import cosine_schedule
from src.utils import augment, console
from src.utils.splits import load_splits, open_split
from src.utils.synthetic import write_synthetic
from tests.conftest import (
    REPOSITORY,
    arguments,
    give_class_names,
    main,
    run_script,
    start_script,
    write_dataset,
)
from tests.test_training import start_run

SCRIPT = "train_flickr8k_sgd.py"
VAL_KEYS = {
    "i2t_r1",
    "i2t_r5",
    "i2t_r10",
    "i2t_medr",
    "t2i_r1",
    "t2i_r5",
    "t2i_r10",
    "t2i_medr",
    "avg_r1",
    "rsum",
}
STEPS = 20  # of an epoch with conftest's `arguments`: 40 photos with 5 captions, 10 a step


def read_json(path):
    return json.loads(path.read_text())


def read_checkpoint(path):
    return torch.load(path, weights_only=True)


def resume(output_dir, *more):
    return main("--synthetic", "--output_dir", output_dir, "--resume", *more)


def outcome(output_dir):
    """What must not depend on interruptions: (the history without its times, the test result, the
    best epoch, {name: tensor} of the weights of best and last and of the momentum)."""
    history = read_json(output_dir / HISTORY)
    for row in history:
        del row["seconds"]
    last, best = read_checkpoint(output_dir / LAST), read_checkpoint(output_dir / BEST)
    tensors = {}
    for file, checkpoint in (("last", last), ("best", best)):
        for name, value in checkpoint["model_state_dict"].items():
            tensors[f"{file}.{name}"] = value
    for i, value in last["optimizer_state_dict"]["state"].items():
        tensors[f"momentum.{i}"] = value["momentum_buffer"]
    return history, read_json(output_dir / TEST), best["epoch"], tensors


def assert_same_outcome(one, other):
    assert one[:3] == other[:3]
    assert one[3].keys() == other[3].keys()
    assert not [name for name in one[3] if not torch.equal(one[3][name], other[3][name])]


def record_saves(monkeypatch):
    """Let each checkpoint that is saved add (name of the file, its state) to the returned list."""
    save, saved = runs.save_checkpoint, []

    def recording_save(state, path):
        save(state, path)
        saved.append((path.name, state))

    monkeypatch.setattr(runs, "save_checkpoint", recording_save)
    return saved


@contextlib.contextmanager
def interrupt_after(function_name, is_due):
    """Inside, the function of `src.runs` that writes a file raises KeyboardInterrupt afterwards if
    is_due(what was written, path)."""
    write = getattr(runs, function_name)

    def interrupted_write(value, path):
        write(value, path)
        if is_due(value, path):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, function_name, interrupted_write)
        yield


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    """A finished run of three epochs that a test may change."""
    return shutil.copytree(finished[0], tmp_path / "copy of finished")


@pytest.fixture
def copy_of_shapes(shapes, tmp_path):
    """A synthetic dataset that a test may change."""
    return shutil.copytree(shapes, tmp_path / "copy of shapes")


def test_an_earlier_run_is_not_continued_in_place_of_one_that_has_not_begun(
        copy_of_finished, shapes, monkeypatch, capsys):
    def interrupt(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("train_flickr8k_sgd.load_splits", interrupt)
    given = arguments(shapes, copy_of_finished)
    assert main(*given, "--overwrite") == 130 and (copy_of_finished / HISTORY).exists()
    assert capsys.readouterr().err == "interrupted before the run began\n"
    assert main("--resume", "--output_dir", copy_of_finished) == 130
    assert "interrupted; to continue: " in capsys.readouterr().err


# ------------------------------------------------------------------------- what a run leaves behind


def test_files_of_a_run(finished):
    output_dir, out = finished
    assert sorted(os.listdir(output_dir)) == sorted(RUN_FILES)
    assert "\r" not in out and "with the bank" in out.splitlines()[-5]
    assert out.endswith(f"python show_flickr8k_results.py --output_dir {output_dir}\n")
    assert len(re.findall(r"^epoch +\d  loss", out, re.MULTILINE)) == 3
    log = (output_dir / LOG).read_text()
    assert all(line in log for line in out.splitlines() if line.startswith("epoch "))


def test_history_has_a_row_for_each_epoch(finished):
    history = read_json(finished[0] / HISTORY)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    for row in history:
        assert row.keys() == {"epoch", "train", "val", "lr", "seconds"}
        assert VAL_KEYS <= row["val"].keys()
    assert VAL_KEYS <= read_json(finished[0] / TEST).keys()
    assert history[-1]["train"]["loss"] < history[0]["train"]["loss"]


def test_config_and_best_model_describe_the_run(finished):
    output_dir, _ = finished
    config, best = read_json(output_dir / CONFIG), read_checkpoint(output_dir / BEST)
    assert config["versions"]["torch"] == torch.__version__ and config["settings"]["seed"] == 0
    assert config["command"].startswith("python train_flickr8k_sgd.py --synthetic --data_dir ")
    assert config["data"]["train"] == {
        "photos": 40, "pixels": 36, "captions": 200, "skipped": 0, "captions_per_photo": {"5": 40}}
    assert best.keys() == {"epoch", "model_state_dict", "metrics", "config", "tokenizer", "bank"}
    assert best["config"] == config
    validations = [row["val"] for row in read_json(output_dir / HISTORY)]
    assert best["metrics"] == max(validations, key=lambda val: val["avg_r1"])
    buffers = ("running_mean", "running_var", "num_batches_tracked", "filters")
    sizes = [weight.numel() for name, weight in best["model_state_dict"].items()
             if not name.endswith(buffers)]
    assert config["parameters"] == sum(sizes)


def test_the_first_filters_are_fit_to_the_training_photos(shapes, finished):
    _, splits = start_run(shapes, device="cpu")
    stem = PatchComponents()
    stem.fit(augment.normalize(F.interpolate(
        splits["train"].photos[:] / 255.0, 32, mode="bilinear", antialias=True)))
    filters = read_checkpoint(finished[0] / BEST)["model_state_dict"]["image_encoder.stem.filters"]
    cosines = (filters * stem.filters).sum((1, 2, 3))
    assert torch.allclose(cosines.abs(), torch.ones(16), atol=1e-4)


def test_the_bank_of_a_run(finished, shapes):
    output_dir, out = finished
    best, results = read_checkpoint(output_dir / BEST), read_json(output_dir / BANK)
    bank = dict(best["bank"])
    assert bank.pop("correct_hubs") is True  # captions of the shapes are hardly ever shared
    assert {name: tensor.shape for name, tensor in bank.items()} == {
        "photos": (40, 64), "texts": (200, 64), "photo_of_text": (200,)}
    assert results.keys() == {"val", "test", "beta"}
    for split in ("val", "test"):
        assert results[split].keys() == {
            "without_bank", "with_bank", "hub_share", "photo_and_text"}
        assert VAL_KEYS <= results[split]["without_bank"].keys()
        assert results[split]["without_bank"].keys() == results[split]["with_bank"].keys()
    assert results["val"]["without_bank"] == best["metrics"]
    assert results["test"]["without_bank"] == read_json(output_dir / TEST)
    assert re.search(r"bank: 40 training photos with 200 captions, ", out)

    model, tokenizer, _ = load_model(output_dir)
    data = open_split(shapes, "val", 32, tokenizer)
    again = compare_bank(model, data, load_bank(output_dir))["with_bank"]  # in full precision
    assert again["avg_r1"] == pytest.approx(results["val"]["with_bank"]["avg_r1"], abs=10)


@pytest.mark.parametrize("more", [["--memory_size", 0], ["--recipe", "reference"]])
def test_other_recipes_and_models_train(shapes, tmp_path, more):
    assert main("--synthetic", "--data_dir", shapes, "--output_dir", tmp_path, "--epochs", 1,
                *more) == 0


def test_without_a_terminal_long_work_tells_how_far_it_is(shapes, tmp_path, capsys, monkeypatch):
    """On the output, and not in the log file, which has a line for each epoch."""
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0)
    monkeypatch.setattr(console, "PROGRESS_INTERVAL", -1)
    assert main(*arguments(shapes, tmp_path, epochs=1)) == 0
    lines = capsys.readouterr().out.splitlines()
    log = (tmp_path / LOG).read_text()
    for text in ("epoch 1/1  step 20/20  loss ", "epoch 1/1  validating: 12 of 12 photos",
                 "epoch 1/1  validating: 60 of 60 captions", "making the bank: 40 of 40 photos",
                 "evaluating on val: 12 of 12 photos", "evaluating on test: 8 of 8 photos"):
        assert any(line.startswith(text) for line in lines), text
        assert text not in log


def test_mixed_precision_can_be_chosen(shapes, tmp_path):
    for flag, precision in (("--amp", "mixed, bfloat16"), ("--no-amp", "float32")):
        output_dir = tmp_path / flag
        assert main(*arguments(shapes, output_dir, flag, epochs=1)) == 0
        assert read_json(output_dir / CONFIG)["precision"] == precision


def test_short_epochs_do_not_write_a_checkpoint_each(shapes, tmp_path, monkeypatch):
    saved = record_saves(monkeypatch)
    assert main(*arguments(shapes, tmp_path, epochs=4)) == 0
    # After the first epoch and after the last; a checkpoint names the epoch that comes next.
    assert [state["epoch"] for name, state in saved if name == LAST] == [2, 5]
    best_row = max(read_json(tmp_path / HISTORY), key=lambda row: row["val"]["avg_r1"])
    best = read_checkpoint(tmp_path / BEST)
    assert best["epoch"] == best_row["epoch"] and best["metrics"] == best_row["val"]


# -------------------------------------------------------------------- interruptions and --resume


def wait_until_it_trains(process, log, log_before):
    """Wait until the process has written to the log, for a minute at most."""
    began = time.time()
    while process.poll() is None and time.time() - began < 60:
        if log.exists() and log.read_text() not in ("", log_before):
            break
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(shapes, finished, tmp_path, number):
    """The run is stopped up to three times, at random moments, and then resumed to its end."""
    output_dir, rng, stops = tmp_path / "run", random.Random(), 0
    for _ in range(3):
        more = ["--resume"] if (output_dir / CONFIG).exists() else []
        log_before = (output_dir / LOG).read_text() if more else ""
        process = start_script(SCRIPT, *arguments(shapes, output_dir, *more))
        wait_until_it_trains(process, output_dir / LOG, log_before)
        time.sleep(rng.random() * (2 if stops else 0.3))  # the first stop is certainly in training
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        was_finished = process.returncode == 0 or (output_dir / TEST).exists()
        if was_finished:
            break
        stops += 1
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), err
        assert "Traceback" not in err
        if number != signal.SIGKILL:
            assert "interrupted; to continue: python train_flickr8k_sgd.py --resume" in err
    assert resume(output_dir) == 0 and stops >= 1
    assert_same_outcome(outcome(finished[0]), outcome(output_dir))


def test_resume_in_the_middle_of_an_epoch(shapes, finished, tmp_path, monkeypatch):
    """A checkpoint is saved each time the loop looks at the loss, and three saves are followed by
    an interrupt."""
    monkeypatch.setattr(script, "CHECKPOINT_INTERVAL", -1)
    saves, interrupted_at = [], []

    def is_due(state, path):
        saves.append(path.name)
        if len(saves) not in (7, 30, 41):
            return False
        interrupted_at.append(state["step"] if path.name == LAST else None)
        return True

    with interrupt_after("save_checkpoint", is_due):
        assert main(*arguments(shapes, tmp_path)) == 130
        assert resume(tmp_path) == 130
        assert resume(tmp_path) == 130
        assert resume(tmp_path) == 0
    assert any(step for step in interrupted_at)
    assert_same_outcome(outcome(finished[0]), outcome(tmp_path))


def test_resume_continues_the_moving_average(shapes, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(*arguments(shapes, whole, "--ema", 0.9)) == 0
    with interrupt_after("save_json", lambda value, path: path.name == HISTORY):
        assert main(*arguments(shapes, cut, "--ema", 0.9)) == 130
    assert len(read_json(cut / HISTORY)) == 1
    assert resume(cut) == 0
    assert_same_outcome(outcome(whole), outcome(cut))

    name = "text_encoder.token_embedding.weight"
    last, best = read_checkpoint(whole / LAST), read_checkpoint(whole / BEST)
    current_weight = last["model_state_dict"][name]
    assert not torch.equal(current_weight, last["ema_state_dict"]["module"][name])
    assert not torch.equal(current_weight, best["model_state_dict"][name])  # it is an average


def test_the_hint_after_an_interruption_can_be_pasted(shapes, tmp_path, capsys, monkeypatch):
    evaluate = script.evaluate

    def interrupted_evaluate(*given):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*given)

    monkeypatch.setattr(script, "evaluate", interrupted_evaluate)
    assert main(*arguments(shapes, tmp_path / "my run")) == 130
    assert capsys.readouterr().err.strip() == (
        f"interrupted; to continue: python train_flickr8k_sgd.py --resume --output_dir "
        f"'{tmp_path / 'my run'}'")


def test_resuming_a_finished_run_changes_nothing(finished, capsys):
    before = outcome(finished[0])
    assert resume(finished[0]) == 0
    command = f"python train_flickr8k_sgd.py --resume --output_dir {finished[0]} --epochs N"
    assert f"the run is finished; to train it further: {command}" in capsys.readouterr().out
    assert_same_outcome(before, outcome(finished[0]))


def test_a_finished_run_can_be_trained_further(copy_of_finished, capsys):
    before = read_json(copy_of_finished / HISTORY)
    assert resume(copy_of_finished, "--epochs", 2) == 2
    assert "the run has 3 epochs already, so --epochs 2 is too few" in capsys.readouterr().err

    assert resume(copy_of_finished, "--epochs", 5) == 0
    printed = capsys.readouterr().out
    assert "resumed at epoch 4, step 0" in printed
    history = read_json(copy_of_finished / HISTORY)
    assert history[:3] == before and [row["epoch"] for row in history] == [1, 2, 3, 4, 5]
    assert read_json(copy_of_finished / CONFIG)["settings"]["epochs"] == 5
    assert "5 epochs in " in printed and read_json(copy_of_finished / TEST)

    # The learning rates are those of a run that was begun with five epochs.
    settings = make_settings(model="tiny")
    schedule = cosine_schedule(settings.warmup, settings.final_lr, 5 * STEPS)
    for row in history[3:]:
        last_step = STEPS * row["epoch"] - 1
        assert row["lr"] == pytest.approx(settings.lr * schedule(last_step))
    jump = f"the learning rate changes from 0 to {settings.lr * schedule(3 * STEPS):.3g}"
    assert f"the schedule is now that of 5 epochs instead of 3: {jump}" in printed


def test_resume_uses_the_precision_and_device_of_the_present_machine(shapes, tmp_path, monkeypatch):
    """config.json holds null for both, unless they were given as flags."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert main("--synthetic", "--data_dir", shapes, "--output_dir", tmp_path, "--epochs", 1) == 0
    config = read_json(tmp_path / CONFIG)
    assert config["precision"] == "mixed, bfloat16"
    assert config["settings"]["amp"] is None and config["settings"]["device"] is None

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    assert resume(tmp_path, "--epochs", 2) == 0
    config = read_json(tmp_path / CONFIG)
    assert config["precision"] == "float32"
    assert config["settings"]["amp"] is None and config["settings"]["device"] is None
    assert len(read_json(tmp_path / HISTORY)) == 2

    assert resume(tmp_path, "--amp", "--device", "cpu") == 0
    config = read_json(tmp_path / CONFIG)
    assert config["precision"] == "mixed, bfloat16"
    assert config["settings"]["amp"] is True and config["settings"]["device"] == "cpu"


def test_resume_refuses_another_value_of_a_setting(finished, capsys):
    assert resume(finished[0], "--lr", 7) == 2
    assert "the run's own --lr" in capsys.readouterr().err


def test_resume_refuses_a_run_of_another_version(copy_of_finished, capsys):
    config = read_json(copy_of_finished / CONFIG)
    del config["settings"]["ema"]
    (copy_of_finished / CONFIG).write_text(json.dumps(config))
    assert resume(copy_of_finished) == 2
    assert "the run is of another version" in capsys.readouterr().err


def test_resume_refuses_a_checkpoint_that_does_not_describe_its_data(copy_of_finished, capsys):
    last = read_checkpoint(copy_of_finished / LAST)
    del last["config"]["fingerprints"]  # an older version did not store them
    torch.save(last, copy_of_finished / LAST)
    assert resume(copy_of_finished) == 2
    assert "of another version" in capsys.readouterr().err


def test_resume_refuses_a_run_that_took_shared_captions_for_different_ones(
        copy_of_finished, capsys, monkeypatch):
    monkeypatch.setattr("src.utils.folder.SHARED_CAPTIONS", 0)  # the built-in shapes share some
    assert resume(copy_of_finished) == 2
    error = capsys.readouterr().err
    assert "share captions, which counted as different when the run began" in error


def test_resume_refuses_a_damaged_checkpoint(copy_of_finished, capsys):
    last = copy_of_finished / LAST
    last.write_bytes(last.read_bytes()[:1000])
    assert resume(copy_of_finished) == 2
    assert f"{LAST}: damaged" in capsys.readouterr().err


def test_resume_accepts_the_same_data_in_another_place(copy_of_shapes, copy_of_finished, capsys):
    assert resume(copy_of_finished, "--data_dir", copy_of_shapes, "--epochs", 4) == 0
    assert "resumed at epoch 4" in capsys.readouterr().out


def test_resume_refuses_another_dataset(finished, tmp_path, capsys):
    write_synthetic(tmp_path / "other", num_pictures={"train": 20, "val": 12, "test": 8})
    assert resume(finished[0], "--data_dir", tmp_path / "other") == 2
    assert "not the dataset that the run" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["captions", "photo", "order", "names"])
def test_resume_refuses_changed_data(copy_of_shapes, copy_of_finished, capsys, change):
    tokens = copy_of_shapes / "Flickr8k.token.txt"
    split = copy_of_shapes / "Flickr_8k.devImages.txt"
    names, photos = split.read_text().splitlines(), copy_of_shapes / "Flicker8k_Dataset"
    if change == "captions":
        tokens.write_text(tokens.read_text().replace("red", "blue"))
    elif change == "photo":
        (photos / names[0]).write_bytes((photos / names[0]).read_bytes() + b"\n")
    elif change == "order":
        split.write_text("".join(f"{name}\n" for name in reversed(names)))
    elif change == "names":
        for path in (tokens, split):
            path.write_text(path.read_text().replace(names[0], "other.jpg"))
        (photos / names[0]).rename(photos / "other.jpg")
    assert resume(copy_of_finished, "--data_dir", copy_of_shapes, "--epochs", 4) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "val" in err
    assert "is not the dataset that the run began with" in err
    assert len(read_json(copy_of_finished / HISTORY)) == 3


# ------------------------------------------------------------------- the network of Fisher vectors

FISHER_SECONDS = 1000


def make_fisher_network_small(patch):
    """Make the Fisher network quick to train, and add FISHER_SECONDS to the time that it took."""
    train_fisher_network = first_stage.train_fisher_network

    def slow_train_fisher_network(*given):
        data, seconds = train_fisher_network(*given)
        return data, FISHER_SECONDS + seconds

    patch.setattr(first_stage, "train_fisher_network", slow_train_fisher_network)
    patch.setattr("src.first_stage.FISHER_EPOCHS", 6)
    patch.setattr("src.settings.FISHER_PIXELS", 48)
    patch.setattr("src.fisher.FISHER_PIXELS", 48)


@pytest.fixture
def small_fisher_network(monkeypatch):
    make_fisher_network_small(monkeypatch)


@pytest.fixture(scope="module")
def fisher_run(shapes, tmp_path_factory):
    """The folder of a finished run with two networks. A test that loads its model needs
    `small_fisher_network` as well."""
    output_dir = tmp_path_factory.mktemp("runs") / "fisher"
    with pytest.MonkeyPatch.context() as patch:
        make_fisher_network_small(patch)
        assert main(*arguments(shapes, output_dir, "--fisher")) == 0
    return output_dir


def test_a_run_with_two_networks_resumes_exactly(
        shapes, fisher_run, small_fisher_network, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, interrupt_after(
            "save_checkpoint", lambda state, path: state.get("step")):
        patch.setattr(script, "CHECKPOINT_INTERVAL", -1)
        assert main(*arguments(shapes, tmp_path, "--fisher")) == 130
    assert resume(tmp_path) == 0
    assert_same_outcome(outcome(fisher_run), outcome(tmp_path))
    banks = [read_checkpoint(output_dir / BEST)["bank"] for output_dir in (fisher_run, tmp_path)]
    assert all(torch.equal(banks[0][part], banks[1][part]) for part in ("photos", "texts"))
    # The first epoch includes the time of the Fisher network, once.
    for output_dir in (fisher_run, tmp_path):
        first_row = read_json(output_dir / HISTORY)[0]
        assert FISHER_SECONDS < first_row["seconds"] < 2 * FISHER_SECONDS


def test_the_fisher_network_learns_and_is_kept(shapes, fisher_run, small_fisher_network):
    model, tokenizer, _ = load_model(fisher_run)
    assert isinstance(model, NetworkWithFisherVectors)
    last = read_checkpoint(fisher_run / LAST)["model_state_dict"]
    for name, weight in model.fisher_network.state_dict().items():
        assert torch.equal(weight, last[f"fisher_network.{name}"]), name
    settings = make_settings(synthetic=True, data_dir=str(shapes), fisher=True)
    splits, _ = load_splits(settings, tokenizer=tokenizer)
    metrics = evaluation.evaluate(model.fisher_network, splits["train"])
    assert metrics["avg_r1"] > 3 * retrieval.chance_metrics([5] * 40)["avg_r1"]


def test_search_embeds_photos_as_validation_does(shapes, fisher_run, small_fisher_network):
    model, tokenizer, transform = load_model(fisher_run)
    settings = make_settings(synthetic=True, data_dir=str(shapes), fisher=True)
    val = load_splits(settings, tokenizer=tokenizer)[0]["val"]
    texts = embed_texts(model, tokenizer, ["a red circle", "two blue squares"])
    photos = embed_photos(model, transform, [val.folders[0].path(name) for name in val.names])
    assert texts.shape == (2, 128) and photos.shape == (len(val.names), 128)
    assert torch.allclose(texts.norm(dim=1), torch.ones(2), atol=1e-5)
    val = with_fisher_latents(model.fisher_network, val, None)
    validated, _ = evaluation.embed(model, val, torch.arange(len(photos)), np.arange(5))
    assert torch.allclose(F.normalize(validated, dim=1), photos, atol=1e-3)


# ------------------------------------------------------------------------- errors and their advice


def test_a_folder_that_holds_a_run_is_refused_unless_overwritten(
        shapes, copy_of_finished, capsys):
    before = outcome(copy_of_finished)
    assert main(*arguments(shapes, copy_of_finished)) == 2
    assert "--resume continues it, --overwrite deletes it" in capsys.readouterr().err
    assert_same_outcome(before, outcome(copy_of_finished))
    given = arguments(shapes, copy_of_finished, "--overwrite", "--seed", 5, epochs=2)
    assert main(*given) == 0
    assert read_json(copy_of_finished / CONFIG)["settings"]["seed"] == 5
    assert len(read_json(copy_of_finished / HISTORY)) == 2


def test_overwrite_deletes_nothing_when_the_new_run_cannot_start(finished, tmp_path):
    before = outcome(finished[0])
    assert main("--data_dir", tmp_path / "nowhere", "--output_dir", finished[0], "--overwrite",
                "--model", "tiny") == 2
    assert_same_outcome(before, outcome(finished[0]))


def test_without_data_two_ways_to_get_some_are_named(tmp_path, capsys):
    assert main("--data_dir", tmp_path / "none", "--output_dir", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "download_flickr8k.py" in err and "--synthetic" in err and len(err.splitlines()) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given, message", [
    (["--resume"], "nothing to resume"),
    (["--device", "cuda:99"], "is not available on this machine"),
    (["--device", "abacus"], "is not available on this machine"),
    (["--image_size", 33], "photos of 33 pixels"),
    (["--image_size", 44], "photos of 44 pixels: the side must be a multiple of 8"),
    (["--fisher", "--image_encoder", "resnet18"], "--fisher needs the preset's own"),
])
def test_invalid_settings_are_one_line_of_error(shapes, tmp_path, capsys, given, message):
    assert main("--synthetic", "--data_dir", shapes, "--output_dir", tmp_path / "out", *given) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_two_splits_may_not_share_a_photo(copy_of_shapes, tmp_path, capsys):
    names = (copy_of_shapes / "Flickr_8k.trainImages.txt").read_text().splitlines(True)
    with open(copy_of_shapes / "Flickr_8k.devImages.txt", "a") as file:
        file.writelines(names[:3])
    given = arguments(copy_of_shapes, tmp_path / "out", epochs=1)
    assert main(*given) == 2
    name = names[0].strip()
    message = f"3 photos of train are in another split as well ({name} is {name} of val"
    assert message in capsys.readouterr().err
    assert main(*given, "--allow_incomplete") == 0
    assert "train: 3 photos left out" in capsys.readouterr().out
    data = read_json(tmp_path / "out" / CONFIG)["data"]
    assert (data["train"]["photos"], data["val"]["photos"]) == (37, 15)


def test_incomplete_data_is_refused_unless_allowed(copy_of_shapes, tmp_path, capsys):
    (copy_of_shapes / "Flicker8k_Dataset" / "scene_00003.jpg").write_bytes(b"")
    given = arguments(copy_of_shapes, tmp_path / "out", epochs=1)
    assert main(*given) == 2
    assert "scene_00003.jpg: the file is empty" in capsys.readouterr().err
    assert main(*given, "--allow_incomplete") == 0
    assert "1 photo left out" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run(shapes, tmp_path, monkeypatch, capsys):
    backward, steps = training.contrastive_backward, []

    def failing_backward(*given, **options):
        steps.append(1)
        factor = float("nan") if len(steps) == STEPS + 13 else 1
        return backward(*given, **options) * factor

    monkeypatch.setattr(training, "contrastive_backward", failing_backward)
    assert main(*arguments(shapes, tmp_path)) == 1
    assert "the loss became nan in epoch 2, step 13;" in capsys.readouterr().err
    last = read_checkpoint(tmp_path / LAST)
    assert last["epoch"] == 2
    assert all(torch.isfinite(weight).all() for weight in last["model_state_dict"].values())
    assert len(read_json(tmp_path / HISTORY)) == 1


def test_a_full_memory_is_one_line_of_error(shapes, tmp_path, monkeypatch, capsys):
    def fail(*given):
        raise MemoryError

    assert main(*arguments(shapes, tmp_path, epochs=1)) == 0
    monkeypatch.setattr("train_flickr8k_sgd.training_step", fail)
    capsys.readouterr()
    for given, hint in ((arguments(shapes, tmp_path, "--overwrite"), "full; --chunk_size 5 needs"),
                        (["--resume", "--output_dir", tmp_path, "--epochs", 2],
                         "full; --resume continues")):
        assert main(*given) == 1
        err = capsys.readouterr().err
        assert f"error: this machine's memory is {hint}" in err and err.count("\n") == 1
    monkeypatch.setattr("show_flickr8k_results.show", fail)
    assert show_flickr8k_results.main(["--query", "a"]) == 1
    assert "error: this machine's memory is full; close" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk_is_one_line_of_error(shapes, tmp_path):
    import resource

    def limit_size_of_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    given = arguments(shapes, tmp_path / "out")
    status, _, err = run_script(SCRIPT, *given, preexec_fn=limit_size_of_files)
    assert status == 1 and "could not be written" in err and len(err.splitlines()) == 1
    assert not [name for name in os.listdir(tmp_path / "out")
                if name.endswith((".pt", ".partial"))]


def test_resume_repeats_a_test_result_that_is_missing(copy_of_finished):
    """As after a crash between the last epoch and the test."""
    before = outcome(copy_of_finished)
    (copy_of_finished / TEST).unlink()
    assert resume(copy_of_finished) == 0
    assert_same_outcome(before, outcome(copy_of_finished))


# ---------------------------------------------------------------------------- names and consoles


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has file names that are no text")
def test_folders_whose_names_are_not_utf8(shapes, tmp_path, capsys):
    data, out = tmp_path / os.fsdecode(b"donn\xe9es"), tmp_path / os.fsdecode(b"sortie \xe9")
    shutil.copytree(shapes, data)
    assert main(*arguments(data, out, epochs=1)) == 0
    assert main("--resume", "--output_dir", out, "--epochs", 2) == 0
    assert show_flickr8k_results.main(["--output_dir", str(out)]) == 0
    given = ["--query", "red", "--photos", str(data / "Flicker8k_Dataset"),
             "--page", str(out / "found.html")]
    assert show_flickr8k_results.main(["--output_dir", str(out), *given]) == 0
    assert "sortie ?" in (out / LOG).read_text(encoding="utf-8")


@pytest.mark.parametrize("variables", [
    {"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_console_that_lacks_the_letters(shapes, tmp_path, variables):
    data = tmp_path / "gr\u00f6\u00dfe \u6570"
    shutil.copytree(shapes, data)
    given = arguments(data, tmp_path / "out", epochs=1)
    status, _, err = run_script(SCRIPT, *given, env=os.environ | variables, errors="replace")
    assert (status, err) == (0, "")


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_a_run_does_not_end_when_its_output_is_closed(shapes, tmp_path):
    """First by a reader that stops reading, then from the start."""
    given = arguments(shapes, tmp_path / "out", epochs=2)
    command = shlex.join([sys.executable, SCRIPT, *map(str, given)])
    lines = f"{command} | head -1; echo ${{PIPESTATUS[0]}}; {command} --overwrite >&-; echo $?"
    done = subprocess.run(["bash", "-c", lines], cwd=REPOSITORY, text=True, capture_output=True)
    assert done.stderr == "" and done.stdout.splitlines()[1:] == ["0", "0"]
    log = (tmp_path / "out" / LOG).read_text()
    assert len(re.findall(r"  epoch +\d", log)) == 2 and "all its tables:" in log


# ---------------------------------------------------------------------------- GPU and real photos


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bfloat16", [True, False])
def test_both_networks_train_on_a_gpu(
        shapes, small_fisher_network, tmp_path, monkeypatch, bfloat16):
    """In either half precision."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16)
    assert main("--synthetic", "--data_dir", shapes, "--output_dir", tmp_path, "--fisher",
                "--epochs", 3, "--batch_size", 10) == 0
    precision = read_json(tmp_path / CONFIG)["precision"]
    assert precision.endswith("bfloat16" if bfloat16 else "float16")
    history = read_json(tmp_path / HISTORY)
    assert history[-1]["train"]["loss"] < history[0]["train"]["loss"]


def test_real_photos(real_photos, tmp_path):
    """The start of a real run: the data loads, a few steps are taken, and an interrupt saves the
    state."""
    process = start_script(
        SCRIPT, "--data_dir", real_photos, "--output_dir", tmp_path, "--model", "tiny")
    began = time.time()
    while not (tmp_path / CONFIG).exists() and process.poll() is None and time.time() - began < 200:
        time.sleep(0.2)
    time.sleep(5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert read_checkpoint(tmp_path / LAST)["step"] > 0


def test_photos_that_share_captions(tmp_path, capsys):
    """Class names: a caption is right for every photo that has it, in training, in the tables and
    on the page."""
    data = give_class_names(write_dataset(tmp_path / "data", {"train": 12, "val": 6, "test": 6}))
    output_dir = tmp_path / "out"
    flags = ["--model", "tiny", "--data_dir", data, "--output_dir", output_dir, "--epochs", 2,
             "--batch_size", 12, "--device", "cpu"]
    assert main(*flags) == 0
    out = capsys.readouterr().out
    assert "photos share captions, 2 different ones for 24 photos: a caption is right" in out
    assert "val has 6 photos: one photo moves I->T R@1 by 16.7 points; chance is 52.8 %" in out
    for row in json.loads((output_dir / HISTORY).read_text()):
        # There are two texts, and at most four photos lack the text of a caption.
        assert row["val"]["i2t_r5"] == row["val"]["t2i_r5"] == 100 and row["val"]["i2t_medr"] <= 2

    page = tmp_path / "run.html"
    status, out, err = run_script("show_flickr8k_results.py", "--output_dir", output_dir, "--page",
                                  page)
    assert (status, err) == (0, f"wrote {page}\n") and "2 different" in page.read_text()
