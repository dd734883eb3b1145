"""The training script, as a user runs it."""
import json
import os
import random
import re
import shutil
import signal
import sys
import time

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import train_flickr8k_sgd
from src.losses import contrastive_backward
from src.settings import amp_type, default_arguments, parse_args
from src.utils.flickr8k_simple import epoch_batches, iterate_batches
from src.utils.report import BEST, CONFIG, HISTORY, LAST, LOG, RUN_FILES, TEST
from src.utils.synthetic import write_synthetic
from tests.conftest import arguments, run_script, start_script

SCRIPT = "train_flickr8k_sgd.py"
VAL_KEYS = {"i2t_r1", "i2t_r5", "i2t_r10", "i2t_medr", "t2i_r1", "t2i_r5", "t2i_r10", "t2i_medr", "avg_r1", "pair_avg_r1"}


def main(*given):
    """The script inside this process: a second instead of five."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    log = train_flickr8k_sgd.logging.getLogger("flickr8k_sgd")
    try:
        return train_flickr8k_sgd.main([str(argument) for argument in given])
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
            signal.signal(number, handler)
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()


def outcome(output_dir):
    """What must not depend on interruptions: history without its times, test result, weights of best and last."""
    history = json.loads((output_dir / HISTORY).read_text())
    for row in history:
        del row["seconds"]
    last = torch.load(output_dir / LAST, weights_only=True)
    best = torch.load(output_dir / BEST, weights_only=True)
    tensors = {f"{file}.{name}": value for file, state in (("last", last), ("best", best))
               for name, value in state["model_state_dict"].items()}
    tensors |= {f"momentum.{i}": value["momentum_buffer"] for i, value in last["optimizer_state_dict"]["state"].items()}
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
        assert row.keys() == {"epoch", "train", "val", "lr", "seconds"} and VAL_KEYS <= row["val"].keys()
    assert VAL_KEYS <= json.loads((output_dir / TEST).read_text()).keys()
    config = json.loads((output_dir / CONFIG).read_text())
    assert config["versions"]["torch"] == torch.__version__ and config["arguments"]["seed"] == 0
    assert config["data"]["train"] == {
        "photos": 40, "pixels": 36, "captions": 200, "left_out": 0, "captions_per_photo": {"5": 40}}
    best = torch.load(output_dir / BEST, weights_only=True)
    assert best.keys() == {"epoch", "model_state_dict", "metrics", "config", "tokenizer"}
    assert best["config"] == config
    assert best["metrics"] == max((row["val"] for row in history), key=lambda val: val["avg_r1"])
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert config["parameters"] == sum(weight.numel() for name, weight in best["model_state_dict"].items()
                                       if not name.endswith(buffers))
    assert "\r" not in out and len(re.findall(r"^epoch +\d  loss", out, re.MULTILINE)) == 3 and "Avg R@1" in out
    log = (output_dir / LOG).read_text()
    assert all(line in log for line in out.splitlines() if line.startswith("epoch "))


def test_the_loss_falls(finished):
    history = json.loads((finished[0] / HISTORY).read_text())
    assert history[-1]["train"]["loss"] < history[0]["train"]["loss"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_resume_is_bit_for_bit(shapes, finished, tmp_path, number):
    """Stopped again and again, at moments drawn anew each time; then resumed to the end."""
    output_dir, rng, stops = tmp_path / "run", random.Random(), 0
    given = arguments(shapes, output_dir, "--num_workers", 1 if number == signal.SIGINT else 0)
    for attempt in range(3):
        resume = ["--resume"] if (output_dir / CONFIG).exists() else []
        log_before = (output_dir / LOG).read_text() if resume else ""
        process = start_script(SCRIPT, *given, *resume)
        begun = time.time()
        while process.poll() is None and time.time() - begun < 60:  # until this attempt has begun to train
            if (output_dir / LOG).exists() and (output_dir / LOG).read_text() not in ("", log_before):
                break
            time.sleep(0.05)
        time.sleep(rng.random() * (2 if stops else 0.3))  # the first while it surely trains
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        if process.returncode == 0 or (output_dir / TEST).exists():  # it was done, or on its way out
            break
        stops += 1
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), err
        assert "Traceback" not in err
        if number != signal.SIGKILL:
            assert "interrupted; go on with: python train_flickr8k_sgd.py --resume" in err
    status, out, err = run_script(SCRIPT, "--synthetic", "--output_dir", output_dir, "--resume")
    assert (status, err) == (0, "") and stops >= 1
    assert_same(outcome(finished[0]), outcome(output_dir))


def test_resume_in_the_middle_of_an_epoch(shapes, finished, tmp_path, monkeypatch):
    """A checkpoint after every look (as if that took minutes), and a failure at each of several steps."""
    monkeypatch.setattr(train_flickr8k_sgd, "SECONDS_A_CHECKPOINT", -1)
    save = train_flickr8k_sgd.save_checkpoint
    calls, middle = [], []

    def failing_save(state, path):
        save(state, path)
        calls.append(path.name)
        if len(calls) in (7, 30, 41):
            middle.append(state["step"] if path.name == LAST else None)
            raise KeyboardInterrupt

    monkeypatch.setattr(train_flickr8k_sgd, "save_checkpoint", failing_save)
    assert main(*arguments(shapes, tmp_path)) == 130
    assert main("--synthetic", "--output_dir", tmp_path, "--resume") == 130
    assert main("--synthetic", "--output_dir", tmp_path, "--resume") == 130
    assert main("--synthetic", "--output_dir", tmp_path, "--resume") == 0
    assert any(step for step in middle)
    assert_same(outcome(finished[0]), outcome(tmp_path))


def test_resume_carries_the_average_and_the_queue(shapes, tmp_path, monkeypatch):
    switches = ["--ema", 0.9, "--queue_size", 30, "--label_smoothing", 0.1, "--hard_negatives", 0.5, "--stochastic_depth", 0.1,
                "--erasing", 0.5, "--qk_norm"]
    assert main(*arguments(shapes, tmp_path / "whole", *switches)) == 0
    save = train_flickr8k_sgd.save_json

    def failing_save(value, path):
        save(value, path)
        if path.name == HISTORY and len(value) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_flickr8k_sgd, "save_json", failing_save)
    assert main(*arguments(shapes, tmp_path / "cut", *switches)) == 130
    monkeypatch.undo()
    assert main("--synthetic", "--output_dir", tmp_path / "cut", "--resume") == 0
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))
    last = torch.load(tmp_path / "whole" / LAST, weights_only=True)
    assert last["queue_state_dict"]["photo_ids"].min() >= 0 and len(last["queue_state_dict"]["photo_ids"]) == 30
    best = torch.load(tmp_path / "whole" / BEST, weights_only=True)["model_state_dict"]
    raw, averaged = last["model_state_dict"], last["ema_state_dict"]
    name = "text_encoder.token_embedding.weight"
    assert not torch.equal(raw[name], averaged[f"module.{name}"])
    assert not torch.equal(best[name], raw[name])  # the average is what is kept


def test_the_moving_average_forgets_the_random_start():
    model = torch.nn.BatchNorm1d(1)  # with an integer among its buffers
    average = train_flickr8k_sgd.moving_average(model, 0.9)
    for step in range(200):
        with torch.no_grad():
            model.weight.fill_(1000.0 if step < 5 else step)
            model.num_batches_tracked.fill_(step)
        average.update_parameters(model)
        if step == 60:
            assert 50 < average.module.weight.item() < 60
    assert average.module.weight.item() == pytest.approx(199 - 9, abs=0.1)  # the mean age is decay / (1 - decay) steps
    assert average.module.num_batches_tracked.item() == 199
    assert train_flickr8k_sgd.moving_average(model, 0.0) is None
    slow = train_flickr8k_sgd.moving_average(model, 0.999)
    for step in range(200):
        with torch.no_grad():
            model.weight.fill_(1000.0 if step < 5 else 1.0)
        slow.update_parameters(model)
    assert slow.module.weight.item() == pytest.approx(1.0, abs=0.1)  # with a constant decay it would be above 800


@pytest.mark.parametrize("layers", [0, 2])
def test_depth_of_the_encoders(layers, shapes, tmp_path):
    assert main(*arguments(shapes, tmp_path, "--image_layers", layers, "--num_layers", layers, epochs=1)) == 0
    weights = torch.load(tmp_path / BEST, weights_only=True)["model_state_dict"]
    for encoder in ("image_encoder", "text_encoder"):
        assert len({name.split(".")[2] for name in weights if name.startswith(f"{encoder}.blocks.")}) == layers


def test_without_memory(shapes, tmp_path):
    assert main(*arguments(shapes, tmp_path, "--memory_size", 0, epochs=1)) == 0


def test_the_reference_recipe_runs(shapes, tmp_path):
    assert main("--synthetic", "--data_dir", shapes, "--output_dir", tmp_path, "--recipe", "reference", "--epochs", 1) == 0


def test_a_second_run_into_the_folder_is_refused(shapes, finished, tmp_path, capsys):
    before = outcome(finished[0])
    assert main(*arguments(shapes, finished[0])) == 2
    assert "--resume goes on with it, --overwrite deletes it" in capsys.readouterr().err
    assert_same(before, outcome(finished[0]))
    assert main(*arguments(shapes, tmp_path / "a", epochs=1)) == 0
    assert main(*arguments(shapes, tmp_path / "a", "--overwrite", "--seed", 5, epochs=2)) == 0
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["arguments"]["seed"] == 5
    assert len(json.loads((tmp_path / "a" / HISTORY).read_text())) == 2


def test_overwrite_deletes_nothing_when_the_new_run_cannot_start(finished, tmp_path, capsys):
    before = outcome(finished[0])
    assert main("--data_dir", tmp_path / "nowhere", "--output_dir", finished[0], "--overwrite", "--model", "tiny") == 2
    assert_same(before, outcome(finished[0]))


def test_resuming_a_finished_run_changes_nothing(finished, capsys):
    before = outcome(finished[0])
    assert main("--synthetic", "--output_dir", finished[0], "--resume") == 0
    assert_same(before, outcome(finished[0]))


def test_without_data_both_ways_on_are_told(tmp_path):
    status, out, err = run_script(SCRIPT, "--data_dir", tmp_path / "none", "--output_dir", tmp_path / "out")
    assert status == 2 and "download_flickr8k.py" in err and "--synthetic" in err and len(err.splitlines()) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given, message", [
    (["--resume"], "nothing to resume"),
    (["--device", "cuda:99"], "not to be had"),
    (["--device", "abacus"], "not to be had"),
    (["--image_size", 33], "not a multiple"),
    (["--eval_size", 44], "--eval_size 44 is not a multiple"),
    (["--latent_dim", 63], "does not divide"),
])
def test_settings_that_cannot_be(shapes, tmp_path, capsys, given, message):
    assert main("--synthetic", "--data_dir", shapes, "--output_dir", tmp_path / "out", *given) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("warmup, final", [(0.1, 0.0), (0.2, 0.3), (0.0, 1.0)])
def test_learning_rate_rises_to_its_peak_and_falls_to_its_final_share(warmup, final):
    rates = [train_flickr8k_sgd.cosine_schedule(warmup, final, 1000)(step) for step in range(1001)]
    peak = rates.index(max(rates))
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True) and peak <= max(1, 1000 * warmup)
    assert rates[0] <= 1 / max(1, 1000 * warmup) and rates[1000] == pytest.approx(final)
    assert rates[500] == pytest.approx((1 + final) / 2)


def test_resume_keeps_the_runs_own_settings(finished, tmp_path, capsys):
    assert main("--synthetic", "--output_dir", finished[0], "--resume", "--lr", 7) == 2
    assert "the run's own --lr" in capsys.readouterr().err


def test_resume_refuses_a_run_of_a_version_without_a_setting(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "old")
    config = json.loads((tmp_path / "old" / CONFIG).read_text())
    del config["arguments"]["caption_contrast"]
    (tmp_path / "old" / CONFIG).write_text(json.dumps(config))
    assert main("--synthetic", "--output_dir", tmp_path / "old", "--resume") == 2
    assert "knew no --caption_contrast" in capsys.readouterr().err


def test_resume_refuses_another_dataset(shapes, finished, tmp_path, capsys):
    write_synthetic(tmp_path / "other", num_pictures={"train": 20, "val": 12, "test": 8})
    assert main("--synthetic", "--output_dir", finished[0], "--resume", "--data_dir", tmp_path / "other") == 2
    assert "not the dataset that the run" in capsys.readouterr().err
    assert main("--synthetic", "--output_dir", finished[0], "--resume", "--data_dir", shapes) == 0


def test_a_damaged_checkpoint_is_named(shapes, tmp_path, capsys):
    assert main(*arguments(shapes, tmp_path, epochs=1)) == 0
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:1000])
    assert main("--synthetic", "--output_dir", tmp_path, "--resume") == 1
    assert f"{LAST}: damaged" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(shapes, tmp_path, monkeypatch, capsys):
    loss, calls = train_flickr8k_sgd.contrastive_backward, []

    def failing_loss(*given):
        calls.append(1)
        return loss(*given) * (float("nan") if len(calls) == 33 else 1)

    monkeypatch.setattr(train_flickr8k_sgd, "contrastive_backward", failing_loss)
    assert main(*arguments(shapes, tmp_path)) == 1
    assert "the loss became nan in epoch 2, step 13;" in capsys.readouterr().err  # 20 steps an epoch
    kept = torch.load(tmp_path / LAST, weights_only=True)
    assert kept["epoch"] == 2 and all(torch.isfinite(w).all() for w in kept["model_state_dict"].values())
    assert len(json.loads((tmp_path / HISTORY).read_text())) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk_costs_nothing_that_was_saved(shapes, tmp_path):
    import resource

    status, _, _ = run_script(SCRIPT, *arguments(shapes, tmp_path, epochs=1))
    assert status == 0
    before = outcome(tmp_path)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    (tmp_path / TEST).unlink()
    other = tmp_path / "other"
    status, _, err = run_script(SCRIPT, *arguments(shapes, other), preexec_fn=limit)
    assert status == 1 and "could not be written" in err and len(err.splitlines()) == 1
    assert not [name for name in os.listdir(other) if name.endswith((".pt", ".partial"))]
    status, _, _ = run_script(SCRIPT, "--synthetic", "--output_dir", tmp_path, "--resume")
    assert status == 0
    assert_same(before, outcome(tmp_path))


def test_incomplete_data_is_refused_unless_allowed(tmp_path, capsys):
    write_synthetic(tmp_path / "data", num_pictures={"train": 40, "val": 12, "test": 8})
    (tmp_path / "data" / "Flicker8k_Dataset" / "scene_00003.jpg").write_bytes(b"")
    assert main(*arguments(tmp_path / "data", tmp_path / "out", epochs=1)) == 2
    assert "scene_00003.jpg: the file is empty" in capsys.readouterr().err
    assert main(*arguments(tmp_path / "data", tmp_path / "out", "--allow_incomplete", epochs=1)) == 0
    assert "1 photos left out" in capsys.readouterr().out


def test_mixed_precision(shapes, tmp_path):
    assert main(*arguments(shapes, tmp_path / "a", "--amp", epochs=1)) == 0
    assert main(*arguments(shapes, tmp_path / "b", "--no-amp", epochs=1)) == 0
    configs = [json.loads((tmp_path / name / CONFIG).read_text())["precision"] for name in "ab"]
    assert configs == ["mixed, bfloat16", "float32"]


def training_parts(shapes, *given):
    """Settings, data, encoder and optimizer of a run on `shapes`."""
    settings = default_arguments(parse_args("", ["--synthetic", "--data_dir", str(shapes), "--batch_size", "10", *given]))
    tokenizer = train_flickr8k_sgd.build_tokenizer(settings)
    splits = train_flickr8k_sgd.load_data(settings, tokenizer, train_flickr8k_sgd.logging.getLogger("test"))
    model, _ = train_flickr8k_sgd.build_model(settings, tokenizer)
    model.to(settings["device"], memory_format=torch.channels_last)
    encode = train_flickr8k_sgd.PairEncoder(model, amp_type(settings))
    return settings, splits, encode, torch.tensor(tokenizer.word_start, device=settings["device"])


def test_compiled_once_for_all_lengths(shapes):
    settings, splits, encode, word_start = training_parts(shapes, "--device", "cpu", "--compile", "--no-amp")
    graphs = CompileCounter()
    encode.compile(backend=graphs)
    lengths = []
    for length in (16, 32, 48, 64, 80, 96):
        batch = {"images": splits["train"].photos[:4], "text": torch.randint(1, 34, (4, length))}
        train_flickr8k_sgd.augment(batch, settings, word_start)
        encode(batch["images"], batch["text"])
        lengths.append(graphs.frame_count)
    assert lengths[0] > 0 and lengths[-1] == lengths[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_do_not_wait_for_the_gpu(shapes):
    settings, splits, encode, word_start = training_parts(shapes, "--device", "cuda")
    data, device = splits["train"], torch.device("cuda")
    optimizer = train_flickr8k_sgd.build_optimizer(encode.model, settings)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    batches = epoch_batches(data.photo_of_caption, 2, 10, seed=0)
    try:
        for i, batch in enumerate(iterate_batches(data, data.photos.to(device), batches, device)):
            if i == 3:  # constants have been made, kernels chosen
                torch.cuda.set_sync_debug_mode("error")
            train_flickr8k_sgd.augment(batch, settings, word_start)
            contrastive_backward(encode, batch, 0.1, None, scaler.scale)
            train_flickr8k_sgd.update(encode.model, optimizer, scaler, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bfloat16", [True, False])
def test_on_a_gpu(shapes, tmp_path, monkeypatch, bfloat16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16)
    assert main("--synthetic", "--data_dir", shapes, "--output_dir", tmp_path, "--epochs", 3, "--batch_size", 10) == 0
    assert json.loads((tmp_path / CONFIG).read_text())["precision"].endswith("bfloat16" if bfloat16 else "float16")
    history = json.loads((tmp_path / HISTORY).read_text())
    assert history[-1]["train"]["loss"] < history[0]["train"]["loss"]


def test_real_photos(real_photos, tmp_path):
    """The start of a real run: the data loads, a few steps go by, and an interrupt saves the state."""
    process = start_script(SCRIPT, "--data_dir", real_photos, "--output_dir", tmp_path, "--model", "tiny")
    begun = time.time()
    while not (tmp_path / CONFIG).exists() and process.poll() is None and time.time() - begun < 200:
        time.sleep(0.2)
    time.sleep(5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert torch.load(tmp_path / LAST, weights_only=True)["step"] > 0
