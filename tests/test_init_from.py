"""Runs that begin with the weights of another run, as a user starts them."""
import shutil

import pytest
import torch

import train_flickr8k_sgd as script
from src.init_from import InitialModel
from src.report import encoders, summary
from src.runs import BEST, CONFIG, HISTORY, LAST, load_checkpoint, load_json, load_run, save_json
from src.settings import FINETUNED, make_settings, settings_from_run
from src.utils.errors import UsageError
from src.utils.synthetic import write_synthetic
from tests.conftest import arguments, main
from tests.test_train_flickr8k_sgd import assert_same_outcome, interrupt_after, outcome


@pytest.fixture(scope="module")
def other_shapes(tmp_path_factory):
    """Other pictures than those of `shapes`."""
    root = tmp_path_factory.mktemp("data") / "other"
    write_synthetic(root, seed=1, num_pictures={"train": 20, "val": 12, "test": 8})
    return root


def begin(run, data, output_dir, *more):
    return main("--init_from", run, "--data_dir", data, "--output_dir", output_dir,
                "--device", "cpu", *more)


def best(folder):
    return load_checkpoint(folder / BEST, ["model_state_dict", "tokenizer", "epoch"])


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def test_it_begins_with_the_weights_and_the_tokenizer(
        finished, other_shapes, tmp_path, capsys, monkeypatch):
    """Nothing but the data is given. Epoch 0 is the other run's model."""
    run = finished[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "training_step", lambda run, batch: torch.tensor(1.0))
    assert main("--init_from", run, "--data_dir", other_shapes, "--device", "cpu") == 0
    said = capsys.readouterr().out
    output_dir = tmp_path / "outputs" / "other_from_finished"
    assert f"beginning with the weights and the tokenizer of {run}: epoch " in said
    assert_same_weights(best(output_dir)["model_state_dict"], best(run)["model_state_dict"])
    assert best(output_dir)["tokenizer"] == best(run)["tokenizer"]
    before, now = (load_json(folder / CONFIG) for folder in (run, output_dir))
    assert [row["epoch"] for row in load_json(output_dir / HISTORY)] == [0, 1, 2, 3]
    assert now["data"]["train"]["photos"] == 20 and not now["settings"]["synthetic"]
    assert now["init_from"]["run"] == str(run)
    recipe = ("epochs", "batch_size", "lr", "image_size", "memory_size", "model", "start_size")
    assert {name: now["settings"][name] for name in recipe} == {
        name: before["settings"][name] for name in recipe}


def test_the_second_network_is_the_run_s(other_shapes, shapes, tmp_path, monkeypatch):
    """Its mixtures are not fit anew, as its weights belong to them."""
    run, output_dir = tmp_path / "run", tmp_path / "next"
    assert main(*arguments(shapes, run, "--fisher", epochs=1)) == 0
    assert begin(run, other_shapes, output_dir, "--epochs", 1) == 0
    before, now = (load_checkpoint(folder / LAST, ["model_state_dict"])["model_state_dict"]
                   for folder in (run, output_dir))
    mixtures = [name for name in now if name.startswith("fisher_network.image_backbone.")]
    for name in [*mixtures, "fisher_network.image_encoder.mean", "image_encoder.stem.filters"]:
        assert torch.equal(before[name], now[name])
    assert mixtures and before.keys() == now.keys()


@pytest.mark.parametrize("stopped_before_a_checkpoint", [False, True])
def test_resume_is_exact(finished, other_shapes, tmp_path, stopped_before_a_checkpoint):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert begin(finished[0], other_shapes, whole) == 0
    file = CONFIG if stopped_before_a_checkpoint else HISTORY
    with interrupt_after("save_json", lambda value, path: path.name == file):
        assert begin(finished[0], other_shapes, cut) == 130
    assert (cut / LAST).exists() != stopped_before_a_checkpoint
    assert main("--resume", "--output_dir", cut) == 0
    assert_same_outcome(outcome(whole), outcome(cut))
    assert load_json(cut / CONFIG)["init_from"] == load_json(whole / CONFIG)["init_from"]


def test_a_run_that_has_changed_since_is_an_error(finished, other_shapes, tmp_path, capsys):
    run, output_dir = shutil.copytree(finished[0], tmp_path / "run"), tmp_path / "next"
    with interrupt_after("save_json", lambda value, path: path.name == CONFIG):
        assert begin(run, other_shapes, output_dir) == 130
    run.rename(tmp_path / "moved")
    assert main("--resume", "--output_dir", output_dir) == 2
    assert f"the run {run}, with whose weights the run in {output_dir}" in capsys.readouterr().err
    (tmp_path / "moved").rename(run)
    state = torch.load(run / BEST, weights_only=True)
    state["model_state_dict"]["logit_scale"] += 1
    torch.save(state, run / BEST)
    assert main("--resume", "--output_dir", output_dir) == 2
    assert f"{run}: the run has changed since" in capsys.readouterr().err


def test_frozen_encoders_and_fine_tuned_ones(
        trained, shapes, other_shapes, encoder_file, tmp_path, capsys):
    """A run on frozen encoders can be trained further like that, and its encoders can be trained
    then; a run that was fine-tuned begins where it stood."""
    frozen, tuned, further = (tmp_path / name for name in ("frozen", "tuned", "further"))
    assert begin(trained, other_shapes, frozen, "--epochs", 1) == 0
    assert load_json(frozen / HISTORY)[0]["train"]["loss"] is None
    assert begin(trained, other_shapes, tuned, "--finetune", "--lr", 1e-6, "--epochs", 1) == 0
    assert load_json(tuned / CONFIG)["settings"]["min_crop"] == FINETUNED["min_crop"]
    weights = best(tuned)["model_state_dict"]
    for name, tensor in best(trained)["model_state_dict"].items():
        assert torch.allclose(tensor, weights[name], atol=1e-3), name
    weights["image_backbone.1.module.weight"] += 1  # as if it had been trained much
    torch.save(torch.load(tuned / BEST, weights_only=True) | {"model_state_dict": weights},
               tuned / BEST)
    assert begin(tuned, other_shapes, further, "--epochs", 1, "--lr", 1e-9) == 0
    assert torch.allclose(best(further)["model_state_dict"]["image_backbone.1.module.weight"],
                          weights["image_backbone.1.module.weight"], atol=1e-3)
    capsys.readouterr()
    assert begin(tuned, other_shapes, tmp_path / "no", "--finetune", 0) == 2
    assert "do not fit this model in image_backbone" in capsys.readouterr().err
    assert begin(trained, other_shapes, tmp_path / "no", "--image_encoder",
                 f"{encoder_file}:infinite") == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flags, message", [
    (["--memory_size", 5], "in memory: memory.slots is 16 x 64 there and 5 x 64 here.\nLeave out"),
    (["--model", "small", "--no-fisher"], "in text_encoder, image_encoder, fusion, memory: text"),
    (["--tokenizer", "char"], "do not fit --tokenizer char, as that run has --tokenizer bpe"),
    (["--fisher"], "do not fit --fisher, as that run has --no-fisher"),
    (["--text_encoder", "bert"], "do not fit --text_encoder bert, as that run has no --text_enc"),
    (["--init_from", "missing"], "missing: there is no such folder"),
    (["--init_from", f"run/{BEST}"], f"run/{BEST}: is a file; name the folder"),
    (["--init_from", "."], ": holds no run; train first"),
    (["--init_from", "unfinished"], "unfinished: has no best model yet"),
    (["--output_dir", "run"], "run is the --output_dir, too"),
])
def test_what_does_not_fit_is_named(
        finished, other_shapes, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished[0], "run")
    (tmp_path / "unfinished").mkdir()
    save_json({}, tmp_path / "unfinished" / CONFIG)
    assert begin("run", other_shapes, "next", *flags) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") <= 2


def test_settings_that_are_not_given_are_the_run_s():
    before = make_settings(synthetic=True, epochs=77, lr=0.3, device="cuda", amp=True, seed=4,
                           extra_data=["x"], memory_size=3)

    def changes(**given):
        after = settings_from_run(before, given, "run")
        return {name for name in vars(before) if getattr(before, name) != getattr(after, name)}

    of_the_machine_and_the_data = {"device", "amp", "extra_data"}
    assert changes() == of_the_machine_and_the_data
    assert changes(data_dir="mine", lr=0.1) == {
        "data_dir", "synthetic", "lr", *of_the_machine_and_the_data}
    changed = changes(recipe="reference")
    assert {"recipe", "epochs", "lr", "batch_size", "flip", "seed"} <= changed
    assert not changed & {"tokenizer", "memory_size", "model", "image_size", "memory_loss"}
    with pytest.raises(UsageError, match="--extra_all needs --extra_data"):
        changes(extra_all=True)
    before = make_settings(image_encoder="resnet50", lr=0.05)
    assert changes(finetune=0.1) == {"finetune", *FINETUNED}


def test_a_comparison_says_that_it_is_not_from_scratch(finished, other_shapes, tmp_path):
    assert begin(finished[0], other_shapes, tmp_path / "next", "--epochs", 1) == 0
    assert encoders(load_run(finished[0])) == "none, from scratch"
    assert encoders(load_run(tmp_path / "next")) == "none, begun with finished"


def config_of(data_dir, layout="a table of captions", val="1", extra=()):
    return {"settings": {"data_dir": data_dir, "synthetic": False}, "layout": layout,
            "fingerprints": {"val": val, "test": "1"}, "extra_data": list(extra)}


@pytest.mark.parametrize("before, now, reason", [
    (config_of("mine"), config_of("./mine"), None),
    (config_of("mine") | {"init_from": {"seen_before": "run may have been trained on photos: x"}},
     config_of("mine"), ": x"),
    (config_of("mine"), config_of("other", val="2"), None),
    (config_of("mine"), config_of("./mine", val="2"), "is not what it was"),
    (config_of("a", extra=[{"folder": "mine", "layout": "COCO 2014", "split": "all"}]),
     config_of("mine", val="2"), "--extra_all"),
    (config_of("a", extra=[{"folder": "mine", "layout": "COCO 2014", "split": "train"}]),
     config_of("mine", val="2"), None),
    (config_of("a", "Flickr30k"), config_of("b", "Flickr8k", val="2"), "share photos"),
    (config_of("a", "COCO 2014"), config_of("b", "Flickr8k", val="2"), None),
])
def test_a_model_that_may_have_seen_val_or_test_is_told(before, now, reason):
    """Another run's training photos may be in this run's val or test."""
    said = InitialModel("run", {"config": before}).seen_before(now, ["1000268201_693b08cb0e.jpg"])
    if reason is not None:
        assert reason in said and "run may have been trained on photos" in said
    else:
        assert said is None


def test_own_photos_in_the_layout_of_flickr8k_are_not_taken_for_it():
    initial = InitialModel("run", {"config": config_of("a", "Flickr30k")})
    now = config_of("b", "Flickr8k", val="2")
    assert initial.seen_before(now, ["IMG_1.jpg"]) is None
    assert initial.seen_before(now, ["1000268201_693b08cb0e.jpg"])


def test_a_folder_that_has_changed_is_told_at_the_start(copied, tmp_path, capsys):
    run, output_dir = tmp_path / "run", tmp_path / "next"
    assert main(*arguments(copied, run, epochs=1)) == 0
    assert begin(run, copied, output_dir, "--epochs", 1) == 0
    assert "may have been trained" not in capsys.readouterr().out
    lists = [copied / f"Flickr_8k.{split}Images.txt" for split in ("train", "dev")]
    train, val = (path.read_text().splitlines() for path in lists)
    for path, names in zip(lists, ([val[0], *train[1:]], [train[0], *val[1:]])):
        path.write_text("\n".join(names))
    assert begin(run, copied, output_dir, "--epochs", 1, "--overwrite") == 0
    said = f"{run} may have been trained on photos that are now in val"
    assert said in capsys.readouterr().out and said in summary(load_run(output_dir))
