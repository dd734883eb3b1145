import dataclasses

import pytest

from src.model import ModelConfig
from src.settings import (
    CONTRASTIVE_PAIR,
    GROUPS,
    PRESETS,
    PRETRAINED,
    REFERENCE,
    Settings,
    for_contrastive_pair,
    make_settings,
    parse_args,
    settings_of,
)
from src.utils.errors import UsageError


def settings(*given):
    """What the training script makes of the flags."""
    args = dict(vars(parse_args("", list(given))))
    for name in ("output_dir", "resume", "check", "overwrite"):
        del args[name]
    return make_settings(**args)


@pytest.mark.parametrize(
    "given",
    [
        ["--epochs", "0"],
        ["--batch_size", "1"],
        ["--lr", "-1"],
        ["--lr", "nan"],
        ["--lr", "inf"],
        ["--warmup", "1"],
        ["--temperature", "0"],
        ["--final_lr", "1.5"],
        ["--image_size", "3.5"],
        ["--seed", "4294967296"],
        ["--model", "huge"],
        ["--resume", "--overwrite"],
        ["--chunk_size", "-1"],
        ["--epoch", "3"],
    ],
)
def test_wrong_arguments(given, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args("", given)
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


def test_help_gives_defaults_in_groups(capsys):
    with pytest.raises(SystemExit):
        parse_args("", ["--help"])
    out = capsys.readouterr().out
    flags = out[out.index("\ndata:"):].split("\n  --")[1:]
    shown = [flag for flag in flags if not flag.startswith(("resume", "check", "overwrite"))]
    assert all("default" in flag for flag in shown) and len(flags) <= 36
    assert all(f"\n{name}:\n" in out for name in (*GROUPS.values(), "run"))
    assert set(GROUPS) <= {f.name for f in dataclasses.fields(Settings)}


def test_pretrained_encoders_bring_a_recipe_that_flags_change():
    found = settings("--image_encoder", "resnet50", "--device", "cpu")
    assert found.model == "small" and found.lr == PRETRAINED["lr"] and found.min_crop == 0.25
    pair = for_contrastive_pair(found, {"epochs": 3})
    assert (pair.lr, pair.dropout) == (CONTRASTIVE_PAIR["lr"], CONTRASTIVE_PAIR["dropout"])
    assert for_contrastive_pair(found, {"lr": 0.7}).lr == found.lr  # what was given stays
    reference = settings("--image_encoder", "a/b", "--recipe", "reference")
    assert for_contrastive_pair(reference, {}).lr == REFERENCE["lr"]
    assert settings("--text_encoder", "a/b", "--model", "small").lr == Settings.lr
    with pytest.raises(UsageError, match="needs an --image_encoder or a --text_encoder"):
        settings("--finetune", "0.1")


def test_presets_and_the_reference_change_settings_that_there_are():
    names = {f.name for f in dataclasses.fields(Settings)}
    assert all(changes.keys() <= names
               for changes in (*PRESETS.values(), PRETRAINED, CONTRASTIVE_PAIR, REFERENCE))


def test_the_models_defaults_are_the_preset_base():
    config = ModelConfig(**make_settings(model="base").model_arguments())
    assert dataclasses.replace(config, conv_channels=tuple(config.conv_channels)) == ModelConfig()


def test_defaults_come_from_preset_and_recipe_and_flags_win():
    found = settings("--model", "small", "--lr", "3", "--device", "cpu")
    assert found.lr == 3 and found.image_size == 96 and found.data_dir == "data/flickr8k"
    own = PRESETS["small"] | {"lr": 3}
    assert {name: getattr(found, name) for name in own} == own
    assert make_settings(lr=None, device="cpu").lr == make_settings(device="cpu").lr


def test_the_default_model_is_small_or_tiny_for_the_shapes():
    assert make_settings().model == make_settings(device="cuda:1").model == "small"
    assert make_settings(synthetic=True).model == "tiny"
    assert make_settings(synthetic=True, model="large").model == "large"


def test_settings_do_not_change_after_they_were_made():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_settings().lr = 1.0


@pytest.mark.parametrize("model", ["base", "large"])
def test_at_least_64_photos_a_step(model):
    found = make_settings(model=model)
    assert found.batch_size // found.captions_per_image >= 64


def test_photos_in_validation_are_never_smaller_than_in_training():
    assert settings("--model", "tiny").eval_pixels == 32
    sizes = {size: settings("--model", "small", "--image_size", str(size)).eval_pixels
             for size in (48, 64, 96, 128)}
    assert sizes == {48: 64, 64: 80, 96: 112, 128: 160}


def test_photos_are_small_at_first():
    found = settings("--model", "small", "--epochs", "10")
    assert [found.training_pixels(epoch) for epoch in (1, 6, 7, 10)] == [64, 64, 96, 96]
    assert settings("--model", "small", "--epochs", "1").training_pixels(1) == 96
    for given in (["--image_size", "64"], ["--image_size", "48"], ["--recipe", "reference"]):
        found = settings("--model", "small", "--epochs", "10", *given)
        assert found.training_pixels(1) == found.training_pixels(10) == found.image_size


@pytest.mark.parametrize("given, train, val", [
    (["--model", "small"], 160, 160), (["--model", "small", "--image_size", "224"], 256, 272),
    (["--model", "tiny"], 36, 32), (["--model", "small", "--recipe", "reference"], 109, 96)])
def test_stores_keep_photos_large_enough_for_what_looks_at_them(given, train, val):
    found = settings(*given)
    assert [found.stored_pixels(split) for split in ("train", "val", "test")] == [train, val, val]


def test_the_reference_recipe_is_the_write_ups():
    found = settings("--recipe", "reference", "--model", "small")
    known = dict(epochs=30, batch_size=64, captions_per_image=1, lr=0.01, momentum=0.9,
                 tokenizer="char", warmup=0, text_lr=1)
    assert {name: getattr(found, name) for name in known} == known and found.image_size == 96
    assert settings("--recipe", "reference", "--lr", "0.5").lr == 0.5


def test_settings_of_another_version():
    own = dataclasses.asdict(make_settings(model="small", ema=0.5))
    assert settings_of({"settings": own}, "run") == Settings(**own)
    lacking = {name: value for name, value in own.items() if name != "ema"}
    for config in ({"settings": lacking}, {"settings": own | {"qk_norm": False}}, {}, [], None):
        with pytest.raises(UsageError, match="outputs/old: the run is of another version"):
            settings_of(config, "outputs/old")


@pytest.mark.parametrize("given", [
    ["--data_dir", ""], ["--output_dir", " "], ["--device", ""], ["--lr", "much"], ["--nothing"]])
def test_a_wrong_argument_is_told_in_one_line(capsys, given):
    with pytest.raises(SystemExit) as stopped:
        parse_args("", given)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and len(err.splitlines()) == 1
    assert err.startswith("error: ") and given[0] in err
