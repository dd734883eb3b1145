import shlex

import pytest
import torch

from src.settings import (RECIPES, UsageError, amp_type, command_of, default_arguments, eval_size, find_device,
                          parse_args)


@pytest.mark.parametrize("given", [["--epochs", "0"], ["--batch_size", "1"], ["--lr", "-1"], ["--lr", "nan"],
                                   ["--momentum", "1"], ["--model", "huge"], ["--resume", "--overwrite"],
                                   ["--num_workers", "-1"], ["--epoch", "3"]])
def test_wrong_arguments(given, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args("", given)
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


def test_help_gives_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_args("", ["--help"])
    out = capsys.readouterr().out
    flags = [line for line in out.split("\n  --")[1:]]
    assert all("default" in flag for flag in flags if not flag.startswith(("resume", "overwrite")))


def test_defaults_come_from_preset_and_recipe_and_flags_win():
    arguments = default_arguments(parse_args("", ["--model", "small", "--lr", "3", "--device", "cpu"]))
    assert arguments["lr"] == 3 and arguments["image_size"] == 64 and arguments["data_dir"] == "data/flickr8k"
    assert {name: arguments[name] for name in RECIPES["small"]} == RECIPES["small"] | {"lr": 3}
    assert default_arguments(parse_args("", ["--synthetic"]))["model"] == "tiny"
    assert not {"resume", "overwrite", "output_dir"} & arguments.keys() and not arguments["compile"]


def test_photos_are_never_judged_smaller_than_trained():
    sizes = [eval_size(default_arguments(parse_args("", ["--model", "tiny", *given]))) for given in (
        [], ["--eval_size", "40"], ["--eval_size", "40", "--image_size", "48"])]
    assert sizes == [32, 40, 48]


@pytest.mark.parametrize("capability", ["amx_bf16", "avx512_bf16"])
def test_precision(monkeypatch, capability):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    amx = default_arguments(parse_args("", ["--device", "cpu"]))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    plain = default_arguments(parse_args("", ["--device", "cpu"]))
    assert amp_type(amx) == torch.bfloat16 and amp_type(plain) is None
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    cuda = default_arguments(parse_args("", ["--device", "cuda", "--epochs", "30"]))
    assert amp_type(cuda) == torch.float16 and cuda["compile"]
    assert not default_arguments(parse_args("", ["--device", "cuda", "--epochs", "1"]))["compile"]


def test_a_device_that_is_not_there():
    assert find_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "abacus"):
        with pytest.raises(UsageError, match="not to be had"):
            find_device(name)


def test_the_reference_recipe_is_the_write_ups():
    arguments = default_arguments(parse_args("", ["--recipe", "reference", "--model", "small"]))
    known = dict(epochs=30, batch_size=64, captions_per_image=1, lr=0.01, momentum=0.9, tokenizer="char", warmup=0, text_lr=1)
    assert {name: arguments[name] for name in known} == known and arguments["image_size"] == 64
    assert default_arguments(parse_args("", ["--recipe", "reference", "--lr", "0.5"]))["lr"] == 0.5


@pytest.mark.parametrize("given, command", [
    ([], "python train_flickr8k_sgd.py"),
    (["--synthetic"], "python train_flickr8k_sgd.py --synthetic"),
    (["--synthetic", "--model", "tiny", "--seed", "3"], "python train_flickr8k_sgd.py --synthetic --seed 3"),
    (["--model", "small", "--lr", "0.1", "--ema", "0.5", "--qk_norm"], "python train_flickr8k_sgd.py --model small --ema 0.5 --qk_norm"),
    (["--recipe", "reference", "--epochs", "2", "--data_dir", "my photos"],
     "python train_flickr8k_sgd.py --recipe reference --data_dir 'my photos' --epochs 2"),
])
def test_the_command_of_a_run(given, command):
    arguments = default_arguments(parse_args("", given))
    found = command_of(arguments)
    assert sorted(shlex.split(found)) == sorted(shlex.split(command)), found
    again = default_arguments(parse_args("", shlex.split(found)[2:]))
    assert again == arguments


def test_the_command_of_a_run_on_another_device():
    arguments = default_arguments(parse_args("", ["--device", "cpu"])) | {"device": "cuda:7", "amp": True, "compile": True}
    assert command_of(arguments) == "python train_flickr8k_sgd.py"
