"""The first stage of fine-tuning, and how the second one continues from it."""
import pytest
import torch

import train_flickr8k_sgd as script
from src import first_stage
from src.encoder_sources import load_encoder
from src.runs import BEST, CONFIG, HISTORY, LAST, load_checkpoint, load_json
from src.settings import FINETUNED, PRETRAINED
from tests.conftest import arguments, encoder_flags, main, run_script
from tests.test_train_flickr8k_sgd import (
    assert_same_outcome,
    interrupt_after,
    outcome,
    resume,
)

SECONDS = 1000


def weights(folder, file=BEST):
    return load_checkpoint(folder / file, ["epoch"])["model_state_dict"]


@pytest.fixture(scope="module")
def encoders(encoder_file):
    return encoder_flags(encoder_file)


@pytest.fixture(scope="module")
def finetuned(shapes, encoders, tmp_path_factory):
    """The folder of a run that fine-tuned both encoders for two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "finetuned"
    given = [*encoders, "--finetune", 0.5, "--lr", 0.1, "--no-amp"]
    assert main(*arguments(shapes, folder, *given, epochs=2)) == 0
    return folder


def test_epoch_0_is_the_model_of_a_frozen_run(shapes, encoders, finetuned, tmp_path):
    frozen = tmp_path / "frozen"
    flags = arguments(shapes, frozen, *encoders, "--lr", 0.1, "--no-amp",
                      epochs=PRETRAINED["epochs"])
    at = flags.index("--batch_size")
    del flags[at:at + 2]  # fine-tuning has a batch size of its own
    assert main(*flags) == 0
    ours, theirs = load_json(finetuned / HISTORY)[0], load_json(frozen / HISTORY)[-1]
    assert ours["epoch"] == 0
    assert ours["train"]["loss"] == pytest.approx(theirs["train"]["loss"], abs=1e-6)
    # The photos of the second stage are rounded to 8 bits, the stored features to float16.
    for name in ("avg_r1", "i2t_r10", "t2i_r10"):
        assert ours["val"][name] == pytest.approx(theirs["val"][name], abs=4)


def test_the_first_stage_ends_with_the_weights_of_a_frozen_run(
        shapes, encoders, tmp_path, monkeypatch):
    ends, train = [], first_stage.train_on_features

    def recording(settings, model, *given):
        loss = train(settings, model, *given)
        ends.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return loss

    monkeypatch.setattr(first_stage, "train_on_features", recording)
    epochs = PRETRAINED["epochs"]
    for folder, more in (("frozen", ["--epochs", epochs, "--batch_size", 1000]),
                         ("tuned", ["--epochs", 1, "--finetune"])):
        assert main("--synthetic", "--data_dir", shapes, "--output_dir", tmp_path / folder,
                    "--device", "cpu", *encoders, *more) == 0
    average = load_checkpoint(tmp_path / "frozen" / LAST, ["ema_state_dict"])["ema_state_dict"]
    (end,) = ends
    assert all(torch.equal(end[name], tensor) for name, tensor in average["module"].items())
    assert end.keys() == average["module"].keys()


def test_the_second_stage_trains_everything(finetuned, encoder_file):
    history = load_json(finetuned / HISTORY)
    assert [row["epoch"] for row in history] == [0, 1, 2]
    last = weights(finetuned, LAST)
    image = load_encoder(f"{encoder_file}:photos", "image").module
    text = load_encoder(f"{encoder_file}:texts", "text").module
    assert not torch.equal(last["image_backbone.1.module.weight"], image.weight)
    assert torch.equal(last["image_backbone.1.module.unused"], image.unused)
    assert not torch.equal(last["text_backbone.module.table"], text.table)
    best = max(history, key=lambda row: row["val"]["avg_r1"])
    assert load_checkpoint(finetuned / BEST, ["metrics"])["metrics"] == best["val"]
    settings = load_json(finetuned / CONFIG)["settings"]
    for name in ("chunk_size", "min_crop", "color_jitter"):
        assert settings[name] == FINETUNED[name]


def test_fine_tuning_that_makes_it_worse_keeps_the_frozen_encoders(
        shapes, encoders, encoder_file, tmp_path, monkeypatch):
    def worse(run, *given):
        return validate(run, *given) | {"avg_r1": 100.0 if run.epoch == 0 else 0.0}

    validate = script.validate
    monkeypatch.setattr(script, "validate", worse)
    folder = tmp_path / "run"
    assert main(*arguments(shapes, folder, *encoders, "--finetune", epochs=1)) == 0
    assert load_checkpoint(folder / BEST, ["epoch"])["epoch"] == 0
    image = load_encoder(f"{encoder_file}:photos", "image").module
    assert torch.equal(weights(folder)["image_backbone.1.module.weight"], image.weight)


def test_resume_continues_the_second_stage_exactly(
        shapes, encoders, finetuned, tmp_path, monkeypatch):
    def slow(*given):
        loss, seconds = train_first_stage(*given)
        return loss, SECONDS + seconds

    train_first_stage = first_stage.train_first_stage
    monkeypatch.setattr(script, "CHECKPOINT_INTERVAL", -1)
    given = [*encoders, "--finetune", 0.5, "--lr", 0.1, "--no-amp"]
    with monkeypatch.context() as patch, interrupt_after(
            "save_checkpoint", lambda state, path: state.get("step")):
        patch.setattr(first_stage, "train_first_stage", slow)
        assert main(*arguments(shapes, tmp_path, *given, epochs=2)) == 130
    assert load_checkpoint(tmp_path / LAST, ["step"])["step"] > 0
    monkeypatch.delattr(first_stage, "train_first_stage")  # it is not needed again
    assert resume(tmp_path) == 0
    assert_same_outcome(outcome(finetuned), outcome(tmp_path))
    seconds = [row["seconds"] for row in load_json(tmp_path / HISTORY)]
    assert seconds[0] > SECONDS > sum(seconds[1:])


def test_a_text_encoder_alone_is_trained_from_the_beginning(shapes, encoder_file, tmp_path):
    given = ["--text_encoder", f"{encoder_file}:texts", "--finetune"]
    assert main(*arguments(shapes, tmp_path, *given, epochs=1)) == 0
    assert [row["epoch"] for row in load_json(tmp_path / HISTORY)] == [1]
    text = load_encoder(f"{encoder_file}:texts", "text").module
    assert not torch.equal(weights(tmp_path)["text_backbone.module.table"], text.table)


def test_where_photos_and_features_are_kept_is_said_once(copied, encoders, tmp_path, capsys):
    given = [*encoders, "--finetune", "--lr", 0.1, "--no-amp"]
    assert main(*arguments(copied, tmp_path / "run", *given, epochs=1)) == 0
    assert capsys.readouterr().out.count("are kept in this folder") == 1


def test_a_loss_that_is_not_finite_stops_the_first_stage(shapes, encoders, tmp_path, capsys):
    given = [*encoders, "--finetune", "--lr", 1e30]
    assert main(*arguments(shapes, tmp_path / "run", *given)) == 1
    err = capsys.readouterr().err
    assert "the loss became" in err and "--lr" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.extra
@pytest.mark.parametrize("is_better", [True, False])
def test_a_pair_is_fine_tuned_from_what_ranks_better(
        is_better, clip, shapes, tmp_path, monkeypatch):
    def train(settings, model, *given):
        loss = train_on_features(settings, model, *given)
        with torch.no_grad():
            model.image_encoder.projection.weight.mul_(1.01)
        return loss

    def score(*given):
        scores.append(None)
        return {"avg_r1": 1.0 if len(scores) == 1 else 2.0 * is_better}

    scores, train_on_features = [], first_stage.train_on_features
    monkeypatch.setattr(first_stage, "train_on_features", train)
    names = ["--image_encoder", clip, "--text_encoder", clip]
    pair, folder = tmp_path / "pair", tmp_path / "run"
    assert main(*arguments(shapes, pair, *names, "--no-amp", epochs=1)) == 0
    monkeypatch.setattr(first_stage, "evaluate", score)
    assert main(*arguments(shapes, folder, *names, "--no-amp", "--finetune", epochs=1)) == 0
    zero_shot, row = (load_json(run / HISTORY)[0] for run in (pair, folder))
    assert row["epoch"] == 0 and len(scores) == 2
    assert (row["train"]["loss"] is not None) == is_better
    if not is_better:
        # The stored features are rounded to float16, the photos of the second stage to 8 bits.
        assert row["val"]["t2i_r1"] == pytest.approx(zero_shot["val"]["t2i_r1"], abs=4)
    assert len(load_json(folder / HISTORY)) == 2


def test_several_processes_fine_tune_one_model(shapes, encoders, tmp_path):
    status, out, err = run_script(
        "-m", "torch.distributed.run", "--nproc_per_node=2", "train_flickr8k_sgd.py",
        *arguments(shapes, tmp_path, *encoders, "--finetune", 0.1, epochs=1))
    assert status == 0, err
    assert out.count("training all but the encoders first") == 1
    assert [row["epoch"] for row in load_json(tmp_path / HISTORY)] == [0, 1]
