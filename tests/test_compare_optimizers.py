import pytest
import torch

from src.experiments import compare_optimizers
from src.experiments.compare_optimizers import RATES, CombinedOptimizer, make_optimizer, table
from src.settings import make_settings
from src.utils.splits import load_splits
from train_flickr8k_sgd import build_model


@pytest.fixture
def settings(shapes):
    return make_settings(synthetic=True, data_dir=str(shapes), epochs=1, ema=0.0, batch_size=10,
                         device="cpu")


@pytest.mark.parametrize("name", list(RATES))
def test_every_parameter_has_one_optimizer(settings, name):
    model = build_model(settings, load_splits(settings)[1])
    optimizer = make_optimizer(name, model, 0.02, 0.3)
    parts = optimizer.parts if name == "Muon" else [optimizer]
    optimized = [p for part in parts for group in part.param_groups for p in group["params"]]
    assert sorted(map(id, optimized)) == sorted(map(id, model.parameters()))
    assert type(parts[0]) is getattr(torch.optim, name)
    assert parts[0].param_groups[0]["lr"] == 0.02
    if name == "Muon":
        assert type(parts[1]) is torch.optim.SGD and parts[1].param_groups[0]["lr"] == 0.3
        assert all(p.ndim == 2 for p in parts[0].param_groups[0]["params"])


def test_several_optimizers_step_as_one():
    one, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    both = CombinedOptimizer(torch.optim.SGD([one], 0.1), torch.optim.SGD([other], 1.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(both, lambda step: 1.0 if step == 0 else 0.5)
    # Each parameter has its own learning rate, and the schedule halves both after the first step.
    for expected in ((0.9, 0.0), (0.85, -0.5)):
        one.grad, other.grad = torch.ones(2), torch.ones(2)
        both.step()
        schedule.step()
        assert (one[0].item(), other[0].item()) == pytest.approx(expected)
    both.zero_grad()
    assert one.grad is None and other.grad is None


def test_all_optimizers_are_tried_at_as_many_learning_rates():
    assert len({len(rates) for rates in RATES.values()}) == 1 and len(RATES) == 8
    for rates in RATES.values():
        assert all(2.9 < after / before < 3.5 for before, after in zip(rates, rates[1:]))


def test_the_best_rate_is_used_with_the_other_seeds(settings, monkeypatch):
    scores = {("SGD", 0.1): 20.0, ("SGD", 0.3): 30.0, ("Muon", 0.01): 50.0, ("Muon", 0.03): 40.0}
    calls = []

    def train(settings, splits, tokenizer, name, lr, seed, sgd_lr):
        calls.append((name, lr, seed, sgd_lr))
        return scores[name, lr] + 4 * (seed == 5)

    monkeypatch.setattr(compare_optimizers, "train", train)
    monkeypatch.setattr(compare_optimizers, "RATES", {"SGD": (0.1, 0.3), "Muon": (0.01, 0.03)})
    results = compare_optimizers.compare(settings, [4, 5])
    assert calls == [
        ("SGD", 0.1, 4, None), ("SGD", 0.3, 4, None), ("SGD", 0.3, 5, None),
        # Muon's model has a part that SGD trains, at SGD's best rate.
        ("Muon", 0.01, 4, 0.3), ("Muon", 0.03, 4, 0.3), ("Muon", 0.01, 5, 0.3)]
    lines = table(results, [4, 5]).splitlines()
    assert lines[2] == "| Muon | 0.01 | 52.0 ± 2.8 | 50.0, 54.0 | 0.01: 50.0, 0.03: 40.0 |"
    assert lines[3] == "| SGD | 0.3 | 32.0 ± 2.8 | 30.0, 34.0 | 0.1: 20.0, 0.3: 30.0 |"


def test_a_training_is_scored_and_one_that_diverges_scores_nothing(settings):
    data = load_splits(settings)
    assert 0 < compare_optimizers.train(settings, *data, "SGD", 0.1, 0) <= 100
    assert compare_optimizers.train(settings, *data, "SGD", 1e30, 0) == 0
