"""The training script, as a user runs it."""
import contextlib
import copy
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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import show_flickr8k_results
import train_flickr8k_sgd as script
from src import evaluation, retrieval, runs, training
from src.device import find_device
from src.evaluation import compare_bank, embed_dataset, make_bank
from src.fisher import NetworkWithFisherVectors, with_fisher_vectors
from src.losses import info_nce_loss
from src.model import PatchComponents
from src.runs import BANK, BEST, CONFIG, HISTORY, LAST, LOG, RUN_FILES, TEST
from src.search import embed_photos, embed_texts, load_bank, load_model
from src.settings import make_settings, size_before_crop
from src.training import CudaGraphs, MovingAverage, RunState, cosine_schedule
from src.utils import augment
from src.utils.flickr8k_simple import epoch_batches, iterate_batches, place_photos
from src.utils.splits import load_splits, open_split
from src.utils.synthetic import write_synthetic
from src.utils.tokenizers import CharTokenizer
from tests.conftest import REPOSITORY, arguments, main, run_script, start_script

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


def outcome(output_dir):
    """What must not depend on interruptions: history without its times, test result, weights of
    best and last.
    """
    history = json.loads((output_dir / HISTORY).read_text())
    for row in history:
        del row["seconds"]
    last = torch.load(output_dir / LAST, weights_only=True)
    best = torch.load(output_dir / BEST, weights_only=True)
    tensors = {f"{file}.{name}": value for file, state in (("last", last), ("best", best))
               for name, value in state["model_state_dict"].items()}
    tensors |= {
        f"momentum.{i}": value["momentum_buffer"]
        for i, value in last["optimizer_state_dict"]["state"].items()
    }
    return history, json.loads((output_dir / TEST).read_text()), best["epoch"], tensors


def assert_same(one, other):
    assert one[:3] == other[:3]
    assert one[3].keys() == other[3].keys()
    assert not [name for name in one[3] if not torch.equal(one[3][name], other[3][name])]


def test_files_of_a_run(finished):
    output_dir, out = finished
    assert sorted(os.listdir(output_dir)) == sorted(RUN_FILES)
    history = json.loads((output_dir / HISTORY).read_text())
    assert [row["epoch"] for row in history] == [1, 2, 3]
    for row in history:
        assert (
            row.keys() == {"epoch", "train", "val", "lr", "seconds"}
            and VAL_KEYS <= row["val"].keys()
        )
    assert VAL_KEYS <= json.loads((output_dir / TEST).read_text()).keys()
    config = json.loads((output_dir / CONFIG).read_text())
    assert config["versions"]["torch"] == torch.__version__ and config["settings"]["seed"] == 0
    assert config["command"].startswith("python train_flickr8k_sgd.py --synthetic --data_dir ")
    assert config["data"]["train"] == {
        "photos": 40, "pixels": 36, "captions": 200, "skipped": 0, "captions_per_photo": {"5": 40}}
    best = torch.load(output_dir / BEST, weights_only=True)
    assert best.keys() == {"epoch", "model_state_dict", "metrics", "config", "tokenizer", "bank"}
    assert best["config"] == config
    assert best["metrics"] == max((row["val"] for row in history), key=lambda val: val["avg_r1"])
    buffers = ("running_mean", "running_var", "num_batches_tracked", "filters")
    assert config["parameters"] == sum(
        weight.numel()
        for name, weight in best["model_state_dict"].items()
        if not name.endswith(buffers)
    )
    assert (
        "\r" not in out
        and len(re.findall(r"^epoch +\d  loss", out, re.MULTILINE)) == 3
        and "Avg R@1" in out
    )
    log = (output_dir / LOG).read_text()
    assert all(line in log for line in out.splitlines() if line.startswith("epoch "))


def test_the_bank_of_a_run(finished, shapes):
    output_dir, out = finished
    best = torch.load(output_dir / BEST, weights_only=True)
    assert {name: tensor.shape for name, tensor in best["bank"].items()} == {
        "photos": (40, 64), "texts": (200, 64), "photo_of_text": (200,)}
    results = json.loads((output_dir / BANK).read_text())
    assert results.keys() == {"val", "test", "beta"}
    for split in ("val", "test"):
        assert results[split].keys() == {
            "without_bank", "with_bank", "hub_share", "photo_and_text"}
        without, with_bank = results[split]["without_bank"], results[split]["with_bank"]
        assert VAL_KEYS <= without.keys() == with_bank.keys()
    assert results["val"]["without_bank"] == best["metrics"]
    assert results["test"]["without_bank"] == json.loads((output_dir / TEST).read_text())
    model, tokenizer, _ = load_model(output_dir)
    data = open_split(shapes, "val", 32, tokenizer)
    again = compare_bank(model, data, load_bank(output_dir))  # in full precision
    assert again["with_bank"]["avg_r1"] == pytest.approx(
        results["val"]["with_bank"]["avg_r1"], abs=10)
    assert re.search(r"bank: 40 training photos with 200 captions, ", out)


def test_the_bank_is_drawn_by_the_seed(shapes, monkeypatch):
    monkeypatch.setattr(evaluation, "BANK_SIZE", 9)
    run, splits = start_run(shapes)
    data = splits["val"]  # whose photos have the size that the model is used with
    banks = [make_bank(run.model, data, 32, seed) for seed in (0, 0, 1)]
    assert banks[0].photos.equal(banks[1].photos) and not banks[0].photos.equal(banks[2].photos)
    assert banks[0].texts.equal(banks[1].texts) and not banks[0].texts.equal(banks[2].texts)
    # Nine photos, none twice, each with all its captions.
    photos, texts, owners = embed_dataset(run.model, data)
    of_photo = (banks[0].photos.float() @ F.normalize(photos, dim=-1).T).argmax(1)
    captions = (banks[0].texts.float() @ F.normalize(texts, dim=-1).T).argmax(1)
    assert len(banks[0].photos) == len(of_photo.unique()) == 9
    assert len(banks[0].texts) == torch.isin(owners, of_photo).sum() > 9
    assert owners[captions].equal(of_photo[banks[0].photo_of_text])


def test_the_loss_falls(finished):
    history = json.loads((finished[0] / HISTORY).read_text())
    assert history[-1]["train"]["loss"] < history[0]["train"]["loss"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_resume_is_bit_for_bit(shapes, finished, tmp_path, number):
    """Stopped again and again, at moments drawn anew each time; then resumed to the end."""
    output_dir, rng, stops = tmp_path / "run", random.Random(), 0
    given = arguments(shapes, output_dir)
    for attempt in range(3):
        resume = ["--resume"] if (output_dir / CONFIG).exists() else []
        log_before = (output_dir / LOG).read_text() if resume else ""
        process = start_script(SCRIPT, *given, *resume)
        begun = time.time()
        # until this attempt has begun to train
        while process.poll() is None and time.time() - begun < 60:
            if (output_dir / LOG).exists() and (output_dir / LOG).read_text() not in (
                "",
                log_before,
            ):
                break
            time.sleep(0.05)
        time.sleep(rng.random() * (2 if stops else 0.3))  # the first while it surely trains
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        # it was done, or on its way out
        if process.returncode == 0 or (output_dir / TEST).exists():
            break
        stops += 1
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), err
        assert "Traceback" not in err
        if number != signal.SIGKILL:
            assert "interrupted; to continue: python train_flickr8k_sgd.py --resume" in err
    assert main("--synthetic", "--output_dir", output_dir, "--resume") == 0 and stops >= 1
    assert_same(outcome(finished[0]), outcome(output_dir))


def test_resume_in_the_middle_of_an_epoch(shapes, finished, tmp_path, monkeypatch):
    """A checkpoint after every look (as if that took minutes), and a failure at each of several
    steps.
    """
    monkeypatch.setattr(script, "CHECKPOINT_INTERVAL", -1)
    save = runs.save_checkpoint
    calls, middle = [], []

    def failing_save(state, path):
        save(state, path)
        calls.append(path.name)
        if len(calls) in (7, 30, 41):
            middle.append(state["step"] if path.name == LAST else None)
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "save_checkpoint", failing_save)
    assert main(*arguments(shapes, tmp_path)) == 130
    assert main("--synthetic", "--output_dir", tmp_path, "--resume") == 130
    assert main("--synthetic", "--output_dir", tmp_path, "--resume") == 130
    assert main("--synthetic", "--output_dir", tmp_path, "--resume") == 0
    assert any(step for step in middle)
    assert_same(outcome(finished[0]), outcome(tmp_path))


def test_a_short_epoch_is_not_spent_on_files(shapes, tmp_path, monkeypatch):
    save, saved = runs.save_checkpoint, []

    def noted_save(state, path):
        save(state, path)
        saved.append((path.name, state["epoch"]))

    monkeypatch.setattr(runs, "save_checkpoint", noted_save)
    assert main(*arguments(shapes, tmp_path, epochs=4)) == 0
    assert [epoch for name, epoch in saved if name == LAST] == [2, 5]  # the next one's
    history = json.loads((tmp_path / HISTORY).read_text())
    best = max(history, key=lambda row: row["val"]["avg_r1"])
    kept = torch.load(tmp_path / BEST, weights_only=True)
    assert kept["epoch"] == best["epoch"] and kept["metrics"] == best["val"]


def test_resume_carries_the_average(shapes, tmp_path, monkeypatch):
    switches = ["--ema", 0.9]
    assert main(*arguments(shapes, tmp_path / "whole", *switches)) == 0
    save = runs.save_json

    def failing_save(value, path):
        save(value, path)
        if path.name == HISTORY and len(value) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "save_json", failing_save)
    assert main(*arguments(shapes, tmp_path / "cut", *switches)) == 130
    monkeypatch.undo()
    assert main("--synthetic", "--output_dir", tmp_path / "cut", "--resume") == 0
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))
    last = torch.load(tmp_path / "whole" / LAST, weights_only=True)
    best = torch.load(tmp_path / "whole" / BEST, weights_only=True)["model_state_dict"]
    raw, averaged = last["model_state_dict"], last["ema_state_dict"]
    name = "text_encoder.token_embedding.weight"
    assert not torch.equal(raw[name], averaged["module"][name])
    assert not torch.equal(best[name], raw[name])  # the average is what is kept


def test_two_networks_go_on_after_an_interruption(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "FISHER_EPOCHS", 6)
    monkeypatch.setattr("src.settings.FISHER_PIXELS", 48)
    monkeypatch.setattr("src.fisher.FISHER_PIXELS", 48)
    train_fisher_network = script.train_fisher_network

    def slow(*given):
        data, seconds = train_fisher_network(*given)
        return data, 1000 + seconds

    monkeypatch.setattr(script, "train_fisher_network", slow)
    assert main(*arguments(shapes, tmp_path / "whole", "--fisher")) == 0
    save, steps = runs.save_checkpoint, []
    monkeypatch.setattr(script, "CHECKPOINT_INTERVAL", -1)

    def failing_save(state, path):
        save(state, path)
        steps.append(state.get("step"))
        if steps[-1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "save_checkpoint", failing_save)
    assert main(*arguments(shapes, tmp_path / "cut", "--fisher")) == 130
    monkeypatch.setattr(runs, "save_checkpoint", save)
    assert main("--synthetic", "--output_dir", tmp_path / "cut", "--resume") == 0
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))
    banks = [torch.load(tmp_path / name / BEST, weights_only=True)["bank"]
             for name in ("whole", "cut")]
    assert all(torch.equal(banks[0][part], banks[1][part]) for part in ("photos", "texts"))
    for name in ("whole", "cut"):  # its seconds are in the run's
        assert 1000 < json.loads((tmp_path / name / HISTORY).read_text())[0]["seconds"] < 2000
    model, tokenizer, transform = load_model(tmp_path / "whole")
    assert isinstance(model, NetworkWithFisherVectors)
    last = torch.load(tmp_path / "cut" / LAST, weights_only=True)
    for name, weight in model.fisher_network.state_dict().items():
        assert torch.equal(weight, last["model_state_dict"][f"fisher_network.{name}"]), name
    settings = make_settings(synthetic=True, data_dir=str(shapes), fisher=True)
    splits, _ = load_splits(settings, tokenizer=tokenizer)
    learned = evaluation.evaluate(model.fisher_network, splits["train"])
    assert learned["avg_r1"] > 3 * retrieval.chance_metrics([5] * 40)["avg_r1"]
    texts = embed_texts(model, tokenizer, ["a red circle", "two blue squares"])
    folder = splits["val"].folders[0]
    photos = embed_photos(model, transform, [folder.path(name) for name in splits["val"].names])
    assert texts.shape == (2, 128) and photos.shape == (len(splits["val"].names), 128)
    val = with_fisher_vectors(model, {"val": splits["val"]}, None)["val"]
    judged, _ = evaluation.embed(model, val, torch.arange(len(photos)), np.arange(5))
    assert torch.allclose(F.normalize(judged, dim=1), photos, atol=1e-3)
    assert torch.allclose(texts.norm(dim=1), torch.ones(2), atol=1e-5)


def test_the_moving_average_forgets_the_random_start():
    model = torch.nn.BatchNorm1d(1)  # with an integer among its buffers
    average = MovingAverage(model, 0.9)
    for step in range(200):
        with torch.no_grad():
            model.weight.fill_(1000.0 if step < 5 else step)
            model.num_batches_tracked.fill_(step)
        average.update()
        if step == 60:
            assert 50 < average.module.weight.item() < 60
    # the mean age is decay / (1 - decay) steps
    assert average.module.weight.item() == pytest.approx(199 - 9, abs=0.1)
    assert average.module.num_batches_tracked.item() == 199
    again = MovingAverage(torch.nn.BatchNorm1d(1), 0.9)
    again.load_state_dict(average.state_dict())
    assert torch.equal(again.module.weight, average.module.weight) and again.steps == 200
    slow = MovingAverage(model, 0.999)
    for step in range(200):
        with torch.no_grad():
            model.weight.fill_(1000.0 if step < 5 else 1.0)
        slow.update()
    # with a constant decay it would be above 800
    assert slow.module.weight.item() == pytest.approx(1.0, abs=0.1)


def test_without_memory(shapes, tmp_path):
    assert main(*arguments(shapes, tmp_path, "--memory_size", 0, epochs=1)) == 0


def test_the_reference_recipe_runs(shapes, tmp_path):
    assert (
        main(
            "--synthetic",
            "--data_dir",
            shapes,
            "--output_dir",
            tmp_path,
            "--recipe",
            "reference",
            "--epochs",
            1,
        )
        == 0
    )


def test_a_second_run_into_the_folder_is_refused(shapes, finished, tmp_path, capsys):
    before = outcome(finished[0])
    assert main(*arguments(shapes, finished[0])) == 2
    assert "--resume goes on with it, --overwrite deletes it" in capsys.readouterr().err
    assert_same(before, outcome(finished[0]))
    assert main(*arguments(shapes, tmp_path / "a", epochs=1)) == 0
    assert main(*arguments(shapes, tmp_path / "a", "--overwrite", "--seed", 5, epochs=2)) == 0
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["settings"]["seed"] == 5
    assert len(json.loads((tmp_path / "a" / HISTORY).read_text())) == 2


def test_overwrite_deletes_nothing_when_the_new_run_cannot_start(finished, tmp_path, capsys):
    before = outcome(finished[0])
    assert (
        main(
            "--data_dir",
            tmp_path / "nowhere",
            "--output_dir",
            finished[0],
            "--overwrite",
            "--model",
            "tiny",
        )
        == 2
    )
    assert_same(before, outcome(finished[0]))


def test_resuming_a_finished_run_changes_nothing(finished, capsys):
    before = outcome(finished[0])
    assert main("--synthetic", "--output_dir", finished[0], "--resume") == 0
    assert_same(before, outcome(finished[0]))


def test_without_data_both_ways_on_are_told(tmp_path):
    status, out, err = run_script(
        SCRIPT, "--data_dir", tmp_path / "none", "--output_dir", tmp_path / "out"
    )
    assert (
        status == 2
        and "download_flickr8k.py" in err
        and "--synthetic" in err
        and len(err.splitlines()) == 2
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given, message", [
    (["--resume"], "nothing to resume"),
    (["--device", "cuda:99"], "is not available on this machine"),
    (["--device", "abacus"], "is not available on this machine"),
    (["--image_size", 33], "photos of 33 pixels"),
    (["--image_size", 44], "photos of 44 pixels: the side must be a multiple of 8"),
    (["--fisher", "--image_encoder", "resnet18"], "--fisher needs the preset's own"),
])
def test_settings_that_cannot_be(shapes, tmp_path, capsys, given, message):
    assert main("--synthetic", "--data_dir", shapes, "--output_dir", tmp_path / "out", *given) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("warmup, final", [(0.1, 0.0), (0.2, 0.3), (0.0, 1.0)])
def test_learning_rate_rises_to_its_peak_and_falls_to_its_final_share(warmup, final):
    rates = [cosine_schedule(warmup, final, 1000)(step) for step in range(1001)]
    peak = rates.index(max(rates))
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True) and peak <= max(
        1, 1000 * warmup
    )
    assert rates[0] <= 1 / max(1, 1000 * warmup) and rates[1000] == pytest.approx(final)
    assert rates[500] == pytest.approx((1 + final) / 2)


def test_resume_keeps_the_runs_own_settings(finished, tmp_path, capsys):
    assert main("--synthetic", "--output_dir", finished[0], "--resume", "--lr", 7) == 2
    assert "the run's own --lr" in capsys.readouterr().err


def test_resume_refuses_a_run_of_a_version_without_a_setting(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "old")
    config = json.loads((tmp_path / "old" / CONFIG).read_text())
    del config["settings"]["ema"]
    (tmp_path / "old" / CONFIG).write_text(json.dumps(config))
    assert main("--synthetic", "--output_dir", tmp_path / "old", "--resume") == 2
    assert "the run is of another version" in capsys.readouterr().err


def test_resume_refuses_another_dataset(shapes, finished, tmp_path, capsys):
    write_synthetic(tmp_path / "other", num_pictures={"train": 20, "val": 12, "test": 8})
    assert (
        main(
            "--synthetic", "--output_dir", finished[0], "--resume", "--data_dir", tmp_path / "other"
        )
        == 2
    )
    assert "not the dataset that the run" in capsys.readouterr().err
    assert main("--synthetic", "--output_dir", finished[0], "--resume", "--data_dir", shapes) == 0


@pytest.mark.parametrize("change", ["nothing", "captions", "photo", "order", "names"])
def test_resume_refuses_data_that_was_changed(shapes, tmp_path, capsys, change):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(shapes, data)
    assert main(*arguments(data, out, epochs=1)) == 0
    tokens, split = data / "Flickr8k.token.txt", data / "Flickr_8k.devImages.txt"
    names, photos = split.read_text().splitlines(), data / "Flicker8k_Dataset"
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
    data.rename(tmp_path / "moved")
    capsys.readouterr()
    given = ["--resume", "--output_dir", out, "--data_dir", tmp_path / "moved", "--epochs", 2]
    status = main(*given)
    printed, err = capsys.readouterr()
    if change == "nothing":
        assert status == 0 and "resumed at epoch 2" in printed
        last = torch.load(out / LAST, weights_only=True)
        del last["config"]["fingerprints"]  # a run of before
        torch.save(last, out / LAST)
        assert main(*given) == 2 and "of another version" in capsys.readouterr().err
    else:
        assert status == 2 and len(err.splitlines()) == 1
        assert "is not the dataset that the run began with" in err and "val" in err
        assert len(json.loads((out / HISTORY).read_text())) == 1


def test_a_finished_run_trains_on(shapes, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(*arguments(shapes, out, epochs=2)) == 0
    two = json.loads((out / HISTORY).read_text())
    capsys.readouterr()
    assert main("--synthetic", "--output_dir", out, "--resume") == 0
    command = f"python train_flickr8k_sgd.py --resume --output_dir {out} --epochs N"
    assert f"the run is finished; to train it further: {command}" in capsys.readouterr().out
    assert main("--synthetic", "--output_dir", out, "--resume", "--epochs", 1) == 2
    assert "the run has 2 epochs already; --epochs 1 is fewer" in capsys.readouterr().err

    assert main("--synthetic", "--output_dir", out, "--resume", "--epochs", 5) == 0
    printed = capsys.readouterr().out
    assert "resumed at epoch 3, step 0" in printed
    history = json.loads((out / HISTORY).read_text())
    assert history[:2] == two and [row["epoch"] for row in history] == [1, 2, 3, 4, 5]
    # The rates are those of a run that was begun with five epochs.
    settings = make_settings(model="tiny")
    schedule = cosine_schedule(settings.warmup, settings.final_lr, 5 * 20)
    for row in history[2:]:
        assert row["lr"] == pytest.approx(settings.lr * schedule(20 * row["epoch"] - 1))
    jump = f"the learning rate changes from 0 to {settings.lr * schedule(40):.3g}"
    assert f"the schedule is now that of 5 epochs instead of 2: {jump}" in printed
    assert json.loads((out / CONFIG).read_text())["settings"]["epochs"] == 5
    assert "5 of 5 epochs" in printed and json.loads((out / TEST).read_text())


def test_the_hint_after_an_interruption_can_be_pasted(shapes, tmp_path, capsys, monkeypatch):
    real = script.evaluate

    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*given)

    monkeypatch.setattr(script, "evaluate", interrupted)
    assert main(*arguments(shapes, tmp_path / "my run")) == 130
    assert capsys.readouterr().err.strip() == (
        f"interrupted; to continue: python train_flickr8k_sgd.py --resume --output_dir "
        f"'{tmp_path / 'my run'}'")


def test_val_and_train_may_not_share_a_photo(shapes, tmp_path, capsys):
    shutil.copytree(shapes, tmp_path / "data")
    names = (tmp_path / "data" / "Flickr_8k.trainImages.txt").read_text().splitlines(True)
    with open(tmp_path / "data" / "Flickr_8k.devImages.txt", "a") as file:
        file.writelines(names[:3])
    given = arguments(tmp_path / "data", tmp_path / "out", epochs=1)
    assert main(*given) == 2
    name = names[0].strip()
    assert f"3 photos of train are in another split as well ({name} is {name} of val" in (
        capsys.readouterr().err)
    assert main(*given, "--allow_incomplete") == 0
    assert "train: 3 photos left out" in capsys.readouterr().out
    data = json.loads((tmp_path / "out" / CONFIG).read_text())["data"]
    assert (data["train"]["photos"], data["val"]["photos"]) == (37, 15)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
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


@pytest.mark.skipif(os.name == "nt", reason="of a POSIX shell")
def test_a_reader_that_has_gone_ends_nothing(shapes, tmp_path):
    command = shlex.join([sys.executable, SCRIPT, *map(str, arguments(shapes, tmp_path / "a"))])
    script = f"{command} | head -1; echo ${{PIPESTATUS[0]}}; {command} --overwrite >&-; echo $?"
    done = subprocess.run(["bash", "-c", script], cwd=REPOSITORY, text=True, capture_output=True)
    assert done.stderr == "" and done.stdout.splitlines()[1:] == ["0", "0"]
    log = (tmp_path / "a" / LOG).read_text()
    assert len(re.findall(r"  epoch +\d", log)) == 3 and "Test, best model" in log


def test_a_damaged_checkpoint_is_named(shapes, tmp_path, capsys):
    assert main(*arguments(shapes, tmp_path, epochs=1)) == 0
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:1000])
    assert main("--synthetic", "--output_dir", tmp_path, "--resume") == 2
    assert f"{LAST}: damaged" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(shapes, tmp_path, monkeypatch, capsys):
    loss, calls = training.contrastive_backward, []

    def failing_loss(*given, **options):
        calls.append(1)
        return loss(*given, **options) * (float("nan") if len(calls) == 33 else 1)

    monkeypatch.setattr(training, "contrastive_backward", failing_loss)
    assert main(*arguments(shapes, tmp_path)) == 1
    # 20 steps an epoch
    assert "the loss became nan in epoch 2, step 13;" in capsys.readouterr().err
    kept = torch.load(tmp_path / LAST, weights_only=True)
    assert kept["epoch"] == 2 and all(
        torch.isfinite(w).all() for w in kept["model_state_dict"].values()
    )
    assert len(json.loads((tmp_path / HISTORY).read_text())) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk_costs_nothing_that_was_saved(shapes, tmp_path):
    import resource

    assert main(*arguments(shapes, tmp_path, epochs=1)) == 0
    before = outcome(tmp_path)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    (tmp_path / TEST).unlink()
    other = tmp_path / "other"
    status, _, err = run_script(SCRIPT, *arguments(shapes, other), preexec_fn=limit)
    assert status == 1 and "could not be written" in err and len(err.splitlines()) == 1
    assert not [name for name in os.listdir(other) if name.endswith((".pt", ".partial"))]
    assert main("--synthetic", "--output_dir", tmp_path, "--resume") == 0
    assert_same(before, outcome(tmp_path))


def test_incomplete_data_is_refused_unless_allowed(tmp_path, capsys):
    write_synthetic(tmp_path / "data", num_pictures={"train": 40, "val": 12, "test": 8})
    (tmp_path / "data" / "Flicker8k_Dataset" / "scene_00003.jpg").write_bytes(b"")
    assert main(*arguments(tmp_path / "data", tmp_path / "out", epochs=1)) == 2
    assert "scene_00003.jpg: the file is empty" in capsys.readouterr().err
    assert (
        main(*arguments(tmp_path / "data", tmp_path / "out", "--allow_incomplete", epochs=1)) == 0
    )
    assert "1 photos left out" in capsys.readouterr().out


def test_mixed_precision(shapes, tmp_path):
    assert main(*arguments(shapes, tmp_path / "a", "--amp", epochs=1)) == 0
    assert main(*arguments(shapes, tmp_path / "b", "--no-amp", epochs=1)) == 0
    configs = [json.loads((tmp_path / name / CONFIG).read_text())["precision"] for name in "ab"]
    assert configs == ["mixed, bfloat16", "float32"]


def start_run(shapes, **given):
    """(run, splits) of a training on `shapes`, without its files."""
    settings = make_settings(synthetic=True, data_dir=str(shapes), batch_size=10, **given)
    splits, tokenizer = load_splits(settings)
    model = script.build_model(settings, tokenizer)
    device = find_device(settings.device)
    model.to(device, memory_format=torch.channels_last)
    return RunState(settings, model, tokenizer, device, 100), splits


def test_the_first_filters_are_made_of_the_training_photos(shapes, finished):
    _, splits = start_run(shapes, device="cpu")
    stem = PatchComponents()
    stem.fit(augment.normalize(torch.nn.functional.interpolate(
        splits["train"].photos[:] / 255.0, 32, mode="bilinear", antialias=True)))
    trained = torch.load(finished[0] / BEST, weights_only=True)["model_state_dict"]
    cosines = (trained["image_encoder.stem.filters"] * stem.filters).sum((1, 2, 3))
    assert torch.allclose(cosines.abs(), torch.ones(16), atol=1e-4)


def test_photos_are_small_in_the_first_epochs(shapes):
    run, splits = start_run(shapes, device="cpu", amp=False, epochs=5, start_size=16)
    data, sides, seen = splits["train"], [], []
    run.model.image_encoder.register_forward_pre_hook(
        lambda module, images: seen.append(images[0].shape[-1]))
    pairs = epoch_batches(data.photo_of_caption, 2, 10, seed=0)[:1]
    for run.epoch in (1, 3, 4, 5):
        (batch,) = iterate_batches(data, data.photos, pairs, run.device)
        sides.append(batch["images"].shape[-1])
        assert torch.isfinite(script.training_step(run, batch))
    assert sides == [36] * 4 and seen == [16, 16, 32, 32]


class NoCopies(TorchDispatchMode):
    """Fails for whatever needs tensors of the host and of the device at once."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, torch.Tensor)]
        assert len({tensor.device.type for tensor in tensors}) < 2, f"{func} copies"
        return found


@pytest.mark.parametrize("preset", ["tiny", "small", "base"])
def test_a_step_stays_on_its_device(preset, monkeypatch):
    """Augmentation, encoders, fusion, loss and moving average, on CUDA tensors without content:
    a value that the host asks for, or an operation across devices, is an error."""
    tokenizer = CharTokenizer()
    settings = make_settings(
        model=preset, device="cuda", amp=False, color_jitter=0.2, word_dropout=0.2, ema=0.0)
    augment._per_channel.cache_clear()
    with FakeTensorMode(), torch.device("cuda"):
        model, other = (script.build_model(settings, tokenizer).train() for _ in range(2))
        run = RunState(settings, model, tokenizer, torch.device("cuda"), 10)
        monkeypatch.setattr(copy, "deepcopy", lambda model: other)  # of the same fake mode
        average = MovingAverage(model, 0.9)
        size = size_before_crop(settings.image_size)
        for mode in (contextlib.nullcontext(), NoCopies()):  # constants are made the first time
            batch = {
                "images": torch.zeros(4, 3, size, size, dtype=torch.uint8),
                "text": torch.ones(8, 16, dtype=torch.long),
                "photo_ids": torch.arange(4),
                "photo_of_pair": torch.arange(4).repeat_interleave(2),
            }
            with torch.device("cpu"), mode:  # the default: what is made must name its device
                training.augment(run, batch)
                owners = batch["photo_of_pair"]
                images, text, scale, memory_losses = run.encode(
                    batch["images"], batch["text"], None)
                ids = batch["photo_ids"][owners]
                loss = info_nce_loss(images[owners], text, scale, ids) + memory_losses.sum()
                average.update()
            assert loss.device.type == images.device.type == "cuda" and loss.shape == ()
    augment._per_channel.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_do_not_wait_for_the_gpu(shapes):
    run, splits = start_run(shapes, device="cuda", amp=False, ema=0.9)
    data, device = splits["train"], torch.device("cuda")
    batches = epoch_batches(data.photo_of_caption, 2, 10, seed=0)
    run.model.train()
    try:
        photos = place_photos(data.photos, device)
        for i, batch in enumerate(iterate_batches(data, photos, torch.cat([batches] * 3), device)):
            if i == 2 * len(batches):  # kernels have been chosen, graphs recorded
                torch.cuda.set_sync_debug_mode("error")
            script.training_step(run, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_on_a_gpu_reads_and_draws_anew():
    graphs, drawn = CudaGraphs(), {"replayed": [], "plain": []}

    def half_of(batch):
        return F.dropout(batch["x"], 0.5).sum()

    for seed in (0, 1, 2, 3, 0):
        batch = {"x": torch.full((100, 100), seed + 1.0, device="cuda")}
        for name, call in (("replayed", lambda: graphs(half_of, batch)),
                           ("plain", lambda: half_of(batch))):
            torch.manual_seed(seed)
            drawn[name].append(call().item())
    assert len(graphs.graphs) == 1
    assert drawn["replayed"] == drawn["plain"] and len(set(drawn["plain"])) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_on_a_gpu_change_nothing(shapes):
    losses = []
    for graphs in (True, False):
        torch.manual_seed(0)
        run, splits = start_run(shapes, device="cuda", amp=False, ema=0.9)
        data, device = splits["train"], torch.device("cuda")
        if not graphs:
            run.graphs = None
        run.model.train()
        batches = epoch_batches(data.photo_of_caption, 2, 10, seed=0)
        for i, batch in enumerate(iterate_batches(data, data.photos, batches, device)):
            torch.manual_seed(i)
            losses.append(script.training_step(run, batch).item())
        assert not graphs or len(run.graphs.graphs) > 1  # of captions of several lengths
    replayed, plain = torch.tensor(losses).view(2, -1)
    # The order of atomic sums is chance: later steps differ by more.
    assert torch.allclose(replayed[:10], plain[:10], rtol=5e-3)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # a skipped first step
def test_no_fused_optimizer_beside_a_gradient_scaler(shapes, monkeypatch):
    """A first step that the scaler skips leaves momentum untouched, not uninitialised."""
    monkeypatch.setattr(training, "autocast_dtype", lambda amp, device: torch.float16)
    run, _ = start_run(shapes, device="cpu", amp=True)
    assert run.scaler.is_enabled() and not run.optimizer.param_groups[0]["fused"]
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    run.scaler.scale(torch.zeros(()))
    training.update(run)
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters()))
    assert not any(state.get("momentum_buffer") is not None
                   for state in run.optimizer.state.values())
    monkeypatch.undo()
    assert start_run(shapes, device="cpu")[0].optimizer.param_groups[0]["fused"]


@pytest.mark.parametrize("first, second", [(None, torch.float16), (torch.float16, None)])
def test_a_run_goes_on_in_another_precision(shapes, monkeypatch, first, second):
    """Begun where no loss was scaled, gone on with where it is, and the other way round."""
    runs = []
    for amp_dtype in (first, second):
        monkeypatch.setattr(training, "autocast_dtype", lambda *_, chosen=amp_dtype: chosen)
        runs.append(start_run(shapes, device="cpu")[0])
    runs[1].load_state_dict(runs[0].state_dict())
    for run, amp_dtype in zip(runs, (first, second)):
        scaled = amp_dtype == torch.float16
        assert run.scaler.is_enabled() == scaled
        assert all(group["fused"] != scaled for group in run.optimizer.param_groups)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bfloat16", [True, False])
def test_training_on_a_gpu(shapes, tmp_path, monkeypatch, bfloat16):
    """Of both networks, in either half precision."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16)
    monkeypatch.setattr("src.settings.FISHER_PIXELS", 48)
    monkeypatch.setattr("src.fisher.FISHER_PIXELS", 48)
    assert main("--synthetic", "--data_dir", shapes, "--output_dir", tmp_path, "--fisher",
                "--epochs", 3, "--batch_size", 10) == 0
    precision = json.loads((tmp_path / CONFIG).read_text())["precision"]
    assert precision.endswith("bfloat16" if bfloat16 else "float16")
    history = json.loads((tmp_path / HISTORY).read_text())
    assert history[-1]["train"]["loss"] < history[0]["train"]["loss"]


def test_real_photos(real_photos, tmp_path):
    """The start of a real run: the data loads, a few steps go by, and an interrupt saves the
    state.
    """
    process = start_script(
        SCRIPT, "--data_dir", real_photos, "--output_dir", tmp_path, "--model", "tiny"
    )
    begun = time.time()
    while not (tmp_path / CONFIG).exists() and process.poll() is None and time.time() - begun < 200:
        time.sleep(0.2)
    time.sleep(5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert torch.load(tmp_path / LAST, weights_only=True)["step"] > 0
