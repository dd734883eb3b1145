import dataclasses
from types import SimpleNamespace

import pytest

from src.encoders import NO_ENCODERS, Encoders
from src.model import ModelConfig
from src.settings import (
    CONTRASTIVE_PAIR,
    FINETUNED,
    GROUPS,
    PRESETS,
    PRETRAINED,
    REFERENCE,
    Settings,
    flags,
    for_contrastive_pair,
    for_first_stage,
    make_settings,
    parse_args,
    settings_of,
)
from src.utils.errors import UsageError

NAMES = {field.name for field in dataclasses.fields(Settings)}


def settings_from_flags(*argv):
    """The settings that the training script makes of these flags."""
    args = vars(parse_args("", list(argv)))
    return make_settings(**{name: value for name, value in args.items() if name in NAMES})


# ---------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("argv", [
    ["--epochs", "0"],
    ["--batch_size", "1"],
    ["--lr", "-1"],
    ["--lr", "nan"],
    ["--lr", "inf"],
    ["--lr", "much"],
    ["--warmup", "1"],
    ["--temperature", "0"],
    ["--final_lr", "1.5"],
    ["--image_size", "3.5"],
    ["--seed", "4294967296"],
    ["--model", "huge"],
    ["--resume", "--overwrite"],
    ["--chunk_size", "-1"],
    ["--data_dir", ""],
    ["--output_dir", " "],
    ["--device", ""],
    ["--nothing"],
    ["--epoch", "3"],  # a flag may not be abbreviated
])
def test_wrong_arguments_are_one_line_of_error(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args("", argv)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and len(err.splitlines()) == 1
    assert err.startswith("error: ") and argv[0] in err


def test_help_gives_defaults_in_groups(capsys):
    with pytest.raises(SystemExit):
        parse_args("", ["--help"])
    out = capsys.readouterr().out
    shown = out[out.index("\ndata:"):].split("\n  --")[1:]
    without_default = ("resume", "check", "overwrite")
    assert all("default" in flag for flag in shown if not flag.startswith(without_default))
    assert len(shown) <= 37
    assert all(f"\n{name}:\n" in out for name in (*GROUPS.values(), "run"))
    assert GROUPS.keys() <= NAMES


def test_flags_of_values_are_read_as_these_values():
    given = {"lr": 0.25, "epochs": 3, "fisher": False, "amp": True, "synthetic": True,
             "extra_data": ["here", "there"], "tokenizer": "char"}
    args = vars(parse_args("", flags(given)))
    assert {name: value for name, value in args.items() if name in NAMES} == given


# -------------------------------------------------------------------------- presets and recipes


def test_presets_and_recipes_change_only_settings_that_exist():
    for changes in (*PRESETS.values(), PRETRAINED, CONTRASTIVE_PAIR, REFERENCE):
        assert changes.keys() <= NAMES


def test_defaults_of_the_model_are_the_preset_base():
    config = ModelConfig(**make_settings(model="base").model_arguments())
    assert dataclasses.replace(config, conv_channels=tuple(config.conv_channels)) == ModelConfig()


def test_default_model_is_small_or_tiny_for_the_shapes():
    assert make_settings().model == make_settings(device="cuda:1").model == "small"
    assert make_settings(synthetic=True).model == "tiny"
    assert make_settings(synthetic=True, model="large").model == "large"


def test_flags_win_over_the_preset():
    settings = settings_from_flags("--model", "small", "--lr", "3", "--device", "cpu")
    assert settings.image_size == 96 and settings.data_dir == "data/flickr8k"
    expected = PRESETS["small"] | {"lr": 3}
    assert {name: getattr(settings, name) for name in expected} == expected


def test_a_value_of_none_is_not_given():
    assert make_settings(lr=None, device="cpu") == make_settings(device="cpu")


def test_reference_recipe_is_that_of_the_write_up():
    settings = settings_from_flags("--recipe", "reference", "--model", "small")
    expected = dict(epochs=30, batch_size=64, captions_per_image=1, lr=0.01, momentum=0.9,
                    tokenizer="char", warmup=0, text_lr=1, image_size=96)
    assert {name: getattr(settings, name) for name in expected} == expected
    assert settings_from_flags("--recipe", "reference", "--lr", "0.5").lr == 0.5


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_settings().lr = 1.0


@pytest.mark.parametrize("given, message", [
    (dict(extra_all=True), "--extra_all needs --extra_data"),
    (dict(fisher=True, image_encoder="resnet50"), "--fisher needs the preset's own image encoder"),
    (dict(finetune=0.1), "--finetune needs an --image_encoder or a --text_encoder"),
])
def test_settings_that_contradict_each_other_are_refused(given, message):
    with pytest.raises(UsageError, match=message):
        make_settings(**given)


@pytest.mark.parametrize("model", ["base", "large"])
def test_a_step_has_at_least_64_photos(model):
    settings = make_settings(model=model)
    assert settings.batch_size // settings.captions_per_image >= 64


# ------------------------------------------------------------------------- pretrained encoders


def test_a_pretrained_image_encoder_brings_its_recipe():
    settings = settings_from_flags("--image_encoder", "resnet50", "--device", "cpu")
    assert settings.model == "small" and settings.min_crop == 0.25
    assert {name: getattr(settings, name) for name in PRETRAINED} == PRETRAINED
    assert settings_from_flags("--image_encoder", "resnet50", "--lr", "3").lr == 3
    assert settings_from_flags("--text_encoder", "a/b", "--model", "small").lr == Settings.lr


def test_a_contrastive_pair_changes_only_what_was_not_given():
    settings = make_settings(image_encoder="a/b", text_encoder="a/b", epochs=3)
    changed = for_contrastive_pair(settings, {"epochs": 3})
    assert changed == dataclasses.replace(settings, **CONTRASTIVE_PAIR) != settings
    for name in CONTRASTIVE_PAIR:
        changed = for_contrastive_pair(settings, {name: getattr(settings, name)})
        others = {other: value for other, value in CONTRASTIVE_PAIR.items() if other != name}
        assert changed == dataclasses.replace(settings, **others)


def test_a_contrastive_pair_leaves_the_reference_recipe_as_it_is():
    settings = make_settings(image_encoder="a/b", text_encoder="a/b", recipe="reference")
    changed = for_contrastive_pair(settings, {})
    assert changed.lr == REFERENCE["lr"]
    assert changed.dropout == CONTRASTIVE_PAIR["dropout"]  # the original run had no such setting


def test_fine_tuning_has_a_recipe_and_begins_with_that_of_frozen_encoders():
    encoders = ["--image_encoder", "a/b", "--text_encoder", "a/b"]
    settings = settings_from_flags(*encoders, "--finetune", "--lr", "0.2", "--chunk_size", "7")
    assert settings.finetune == 0.1 and settings.chunk_size == 7 and settings.lr == 0.2
    assert settings.epochs == FINETUNED["epochs"] and settings.dropout == PRETRAINED["dropout"]
    assert for_first_stage(settings) == settings_from_flags(*encoders, "--lr", "0.2")
    assert settings_from_flags(*encoders, "--finetune", "0.5").finetune == 0.5
    # Without a pretrained image encoder there is one stage, with the recipe of the preset.
    alone = settings_from_flags(*encoders[2:], "--finetune")
    assert alone == dataclasses.replace(settings_from_flags(*encoders[2:]), finetune=0.1)


@pytest.mark.parametrize("preset, recipe", [("tiny", "own"), ("small", "reference")])
def test_the_first_stage_follows_the_preset_and_the_recipe(preset, recipe):
    given = dict(image_encoder="a/b", model=preset, recipe=recipe)
    assert for_first_stage(make_settings(finetune=0.1, **given)) == make_settings(**given)


def stub_encoder(weights_hash="1f", logit_scale=None, pixels=(224, 224)):
    return SimpleNamespace(
        name="a/b", weights_hash=weights_hash, tensor_hashes={weights_hash}, half_of="", width=640,
        logit_scale=logit_scale, pixels=pixels)


@pytest.mark.parametrize("encoders, finetune, changes", [
    (NO_ENCODERS, 0.0, {}),
    (Encoders(image=stub_encoder()), 0.0, {}),
    (Encoders(image=stub_encoder()), 0.1, {"image_size": 224}),
    (Encoders(text=stub_encoder()), 0.1, {}),
    (Encoders(stub_encoder("1f"), stub_encoder("2e")), 0.0, {}),
    (Encoders(stub_encoder("1f", 4.6), stub_encoder("2e", 4.6)), 0.0, {}),
    (Encoders(stub_encoder(logit_scale=4.6), stub_encoder()), 0.0, {}),
    (Encoders(stub_encoder(logit_scale=4.6), stub_encoder(logit_scale=4.6)), 0.0,
     {"latent_dim": 640}),
    (Encoders(stub_encoder(logit_scale=4.6), stub_encoder(logit_scale=4.6)), 0.1,
     {"latent_dim": 640, "image_size": 224}),
])
def test_encoders_fit_the_sizes_in_the_settings(encoders, finetune, changes):
    """A contrastive pair fixes the width of the latents, and finetuning the size of the photos."""
    settings = make_settings(image_encoder="a/b", text_encoder="a/b", finetune=finetune)
    assert encoders.fit_settings(settings) == dataclasses.replace(settings, **changes)


def test_an_encoder_of_photos_that_are_not_square_cannot_be_finetuned():
    encoders = Encoders(image=stub_encoder(pixels=(32, 16)))
    frozen = make_settings(image_encoder="a/b")
    assert encoders.fit_settings(frozen) == frozen
    with pytest.raises(UsageError, match="32 x 16 pixels; --finetune needs a square"):
        encoders.fit_settings(dataclasses.replace(frozen, finetune=0.1))


# ------------------------------------------------------------------------------- size of photos


def test_photos_in_validation_are_never_smaller_than_in_training():
    assert make_settings(model="tiny").eval_pixels == 32
    sizes = {size: make_settings(model="small", image_size=size).eval_pixels
             for size in (48, 64, 96, 128)}
    assert sizes == {48: 64, 64: 80, 96: 112, 128: 160}


def test_photos_are_small_in_the_first_epochs():
    settings = make_settings(model="small", epochs=10)
    assert [settings.training_pixels(epoch) for epoch in (1, 6, 7, 10)] == [64, 64, 96, 96]
    assert make_settings(model="small", epochs=1).training_pixels(1) == 96


@pytest.mark.parametrize("given", [{"image_size": 64}, {"image_size": 48}, {"recipe": "reference"}])
def test_photos_have_one_size_if_the_first_epochs_would_not_be_faster(given):
    settings = make_settings(model="small", **{"epochs": 10} | given)
    assert settings.training_pixels(1) == settings.training_pixels(10) == settings.image_size


@pytest.mark.parametrize("given, train, val", [
    (dict(model="small"), 160, 160),
    (dict(model="small", image_size=224), 256, 272),
    (dict(model="tiny"), 36, 32),
    (dict(model="small", recipe="reference"), 109, 96),
])
def test_stored_photos_are_large_enough_for_both_networks(given, train, val):
    settings = make_settings(**given)
    assert settings.stored_pixels("train") == train
    assert settings.stored_pixels("val") == settings.stored_pixels("test") == val


# ---------------------------------------------------------------------------------- config.json


def test_settings_are_read_from_a_config():
    settings = make_settings(model="small", ema=0.5)
    assert settings_of({"settings": dataclasses.asdict(settings)}, "run") == settings


def test_settings_of_another_version_are_refused():
    saved = dataclasses.asdict(make_settings())
    without_ema = {name: value for name, value in saved.items() if name != "ema"}
    for config in ({"settings": without_ema}, {"settings": saved | {"qk_norm": False}}, {}, [],
                   None):
        with pytest.raises(UsageError, match="outputs/old: the run is of another version"):
            settings_of(config, "outputs/old")


def test_a_memory_comes_with_a_fusion_that_reads_it():
    pretrained = make_settings(image_encoder="resnet18")
    assert pretrained.memory_size == pretrained.fusion_layers == 0
    with_memory = make_settings(image_encoder="resnet18", memory_size=16)
    assert (with_memory.memory_size, with_memory.fusion_layers) == (16, 1)
    assert make_settings(model="base", memory_size=16).fusion_layers == 4
    assert make_settings(model="tiny", memory_size=0).fusion_layers == 1


def test_paths_are_expanded_where_the_shell_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("more_a", "more_b"):
        (tmp_path / name).mkdir()
    args = parse_args("", ["--data_dir=~/photos", "--output_dir=~/run", "--extra_data", "more_*",
                           "--image_encoder=~/encoders.py:photos", "--device", "cpu"])
    home = str(tmp_path)
    assert args.data_dir == f"{home}/photos" and args.output_dir == f"{home}/run"
    assert args.extra_data == ["more_a", "more_b"] and args.device == "cpu"
    assert args.image_encoder == f"{home}/encoders.py:photos"
