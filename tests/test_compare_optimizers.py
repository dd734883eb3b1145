import json

import pytest
import torch

from src.experiments import compare_optimizers
from src.experiments.compare_optimizers import RATES, Together, make_optimizer, table
from src.model import MultiModalMemoryNetwork
from tests.conftest import model_arguments


@pytest.mark.parametrize("name", list(RATES))
def test_every_parameter_has_one_optimizer(name):
    model = MultiModalMemoryNetwork(**model_arguments("tiny"))
    optimizer = make_optimizer(name, model, 0.02, 0.3)
    parts = optimizer.parts if name == "Muon" else [optimizer]
    held = [p for part in parts for group in part.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    assert type(parts[0]) is getattr(torch.optim, name)
    assert parts[0].param_groups[0]["lr"] == 0.02
    if name == "Muon":
        assert type(parts[1]) is torch.optim.SGD and parts[1].param_groups[0]["lr"] == 0.3
        assert all(p.ndim == 2 for p in parts[0].param_groups[0]["params"])


def test_several_optimizers_step_as_one():
    one, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    both = Together(torch.optim.SGD([one], 0.1), torch.optim.SGD([other], 1.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(both, lambda step: 1.0 if step == 0 else 0.5)
    for expected in ((0.9, 0.0), (0.85, -0.5)):  # each with its own rate, halved after a step
        one.grad, other.grad = torch.ones(2), torch.ones(2)
        both.step()
        schedule.step()
        assert (one[0].item(), other[0].item()) == pytest.approx(expected)
    both.zero_grad()
    assert one.grad is None and other.grad is None


def test_as_many_rates_for_all():
    assert len({len(rates) for rates in RATES.values()}) == 1 and len(RATES) == 8
    for rates in RATES.values():
        assert all(2.9 < after / before < 3.5 for before, after in zip(rates, rates[1:]))


def test_the_table_is_of_the_best_rate():
    runs = [
        {"optimizer": "SGD", "lr": lr, "seed": seed, "seconds": 2.0 + seed, "avg_r1": score}
        for lr, seed, score in ((0.1, 4, 20.0), (0.3, 4, 30.0), (0.3, 5, 34.0))
    ]
    runs.append(runs[0] | {"optimizer": "Adam", "lr": 0.001, "avg_r1": 50.0})
    results = {"runs": runs, "device": "a chip", "versions": {"torch": "9"}, "date": "today"}
    lines = table(results, 4).splitlines()
    assert lines[2] == "| Adam | 0.001 | 50.0 | 50.0 | 6.00 | 0.001: 50.0 |"
    assert lines[3] == "| SGD | 0.3 | 32.0 ± 2.8 | 30.0, 34.0 | 6.50 | 0.1: 20.0, 0.3: 30.0 |"
    assert lines[-1] == "a chip, torch 9, today"


def options(shapes, output_dir, more):
    return ["--data_dir", str(shapes), "--output_dir", str(output_dir), *more.split()]


def test_a_comparison_interrupted_and_gone_on_with(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_optimizers, "RATES", {"SGD": (0.1, 0.3), "Muon": (0.01, 0.03)})
    given = options(shapes, tmp_path, "--model tiny --epochs 1 --seeds 0 1 --optimizers SGD Muon")
    trained, train = [], compare_optimizers.train

    def stopped_in_the_second(name, lr, seed, *more):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append((name, lr, seed))
        return train(name, lr, seed, *more)

    monkeypatch.setattr(compare_optimizers, "train", stopped_in_the_second)
    assert compare_optimizers.main(given) == 130
    assert "goes on from here" in capsys.readouterr().err
    monkeypatch.setattr(
        compare_optimizers, "train", lambda *given: (trained.append(given[:3]), train(*given))[1])
    assert compare_optimizers.main(given) == 0
    assert len(trained) == len(set(trained)) == 6
    (path,) = tmp_path.iterdir()
    runs = json.loads(path.read_text())["runs"]
    assert [(run["optimizer"], run["lr"], run["seed"]) for run in runs] == trained
    assert all(0 <= run["avg_r1"] <= 100 for run in runs)
    printed = capsys.readouterr().out
    assert compare_optimizers.main(given) == 0
    again = capsys.readouterr().out.strip()
    assert len(trained) == 6 and again == printed[printed.index("| optimizer"):].strip()
    monkeypatch.setattr(compare_optimizers, "RATES", {"SGD": (0.1,)})
    longer = "--model tiny --epochs 2 --seeds 0 --optimizers SGD"
    assert compare_optimizers.main(options(shapes, tmp_path, longer)) == 0
    assert len(trained) == 7 and len(list(tmp_path.iterdir())) == 2  # of other epochs: not mixed


def test_a_run_that_diverges_scores_nothing(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_optimizers, "RATES", {"SGD": (1e30,)})
    given = options(shapes, tmp_path, "--model tiny --epochs 2 --seeds 0 --optimizers SGD")
    assert compare_optimizers.main(given) == 0
    (path,) = tmp_path.iterdir()
    (run,) = json.loads(path.read_text())["runs"]
    assert run["avg_r1"] == 0 and "| SGD | 1e+30 | 0.0 |" in capsys.readouterr().out


def test_no_data(tmp_path, capsys):
    assert (
        compare_optimizers.main(
            ["--data_dir", str(tmp_path / "none"), "--output_dir", str(tmp_path / "out")]
        )
        == 2
    )
    assert "there is no such folder. To fetch Flickr8k:" in capsys.readouterr().err
