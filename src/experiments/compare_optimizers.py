"""Compare eight optimizers on the built-in shapes, each at the best of four learning rates.

    python -m src.experiments.compare_optimizers

Every optimizer trains the preset `tiny` with each of its learning rates and the first seed. The
rate with the best validation after the last epoch is then used with the other seeds, too. Within a
training, all weights have the same learning rate, and an epoch has as many pairs as there are
photos. SGD has Nesterov momentum; everything else is torch.optim's default.
"""
import math
import sys

import torch
from torch import nn

from src.comparison import markdown_table
from src.device import (
    allow_fast_kernels,
    describe,
    find_device,
    keep_freed_memory,
    memory_format,
)
from src.evaluation import evaluate
from src.experiments.ladder import mean_and_deviation
from src.settings import make_settings
from src.training import RunState, training_step
from src.utils.console import Parser, prepare_output
from src.utils.flickr8k_simple import iterate_batches, place_photos
from src.utils.splits import load_splits
from train_flickr8k_sgd import SEED_STRIDE, build_model

# Four rates for each optimizer, a factor of about three apart, around its usual rate.
RATES = {
    "SGD": (0.03, 0.1, 0.3, 1.0),
    "Adam": (0.0003, 0.001, 0.003, 0.01),
    "AdamW": (0.0003, 0.001, 0.003, 0.01),
    "NAdam": (0.0003, 0.001, 0.003, 0.01),
    "RAdam": (0.001, 0.003, 0.01, 0.03),
    "RMSprop": (0.0003, 0.001, 0.003, 0.01),
    "Adagrad": (0.003, 0.01, 0.03, 0.1),
    "Muon": (0.03, 0.1, 0.3, 1.0),
}


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers of different parameters that a learning rate schedule sees as one."""

    def __init__(self, *parts):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self):
        for part in self.parts:
            part.step()


def nesterov_sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True)


def make_optimizer(name, model, lr, sgd_lr=None):
    """Return an optimizer of all the model's parameters.

    Muon (Jordan et al. 2024) is only for the weight matrices of linear layers. SGD trains the rest,
    with the learning rate `sgd_lr`.
    """
    if name == "SGD":
        return nesterov_sgd(model.parameters(), lr)
    if name == "Muon":
        matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        ids = set(map(id, matrices))
        others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
        muon = torch.optim.Muon(matrices, lr, adjust_lr_fn="match_rms_adamw")
        return CombinedOptimizer(muon, nesterov_sgd(others, sgd_lr))
    return getattr(torch.optim, name)(model.parameters(), lr)


def train(settings, splits, tokenizer, name, lr, seed, sgd_lr=None):
    """Train a model and return its validation avg R@1 in percent, or 0 if the loss diverged."""
    device, data = find_device(settings.device), splits["train"]
    torch.manual_seed(seed)
    model = build_model(settings, tokenizer, photos=data.photos)
    model.to(device, memory_format=memory_format(device)).train()
    photos = place_photos(data.photos, device)

    def batches_of_epoch(epoch):
        batches = data.epoch(settings.captions_per_image, settings.batch_size,
                             seed * SEED_STRIDE + epoch)
        return batches[:max(1, len(data.names) // len(batches[0]))]

    total_steps = len(batches_of_epoch(1)) * settings.epochs
    optimizer = make_optimizer(name, model, lr, sgd_lr)
    run = RunState(settings, model, tokenizer, device, total_steps, optimizer)
    for epoch in range(1, settings.epochs + 1):
        losses = [training_step(run, batch)
                  for batch in iterate_batches(data, photos, batches_of_epoch(epoch), device)]
        if not math.isfinite(torch.stack(losses).sum().item()):
            return 0.0
    if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
        return 0.0
    return evaluate(model, splits["val"])["avg_r1"]


def compare(settings, seeds):
    """Train everything and return {optimizer: (scores by rate, best rate, scores by seed)}.

    The scores by rate are {rate: avg R@1 with the first seed}, those by seed are a list.
    """
    splits, tokenizer = load_splits(settings)
    first_seed, *other_seeds = seeds
    results, sgd_lr = {}, None
    for name, rates in RATES.items():

        def score(lr, seed, name=name, sgd_lr=sgd_lr):
            avg_r1 = train(settings, splits, tokenizer, name, lr, seed, sgd_lr)
            print(f"{name:<8} lr {lr:<8g} seed {seed}  val avg R@1 {avg_r1:6.2f}", flush=True)
            return avg_r1

        scores = {lr: score(lr, first_seed) for lr in rates}
        best_lr = max(scores, key=scores.get)
        by_seed = [scores[best_lr]] + [score(best_lr, seed) for seed in other_seeds]
        results[name] = (scores, best_lr, by_seed)
        if name == "SGD":  # it comes first, and Muon uses its best rate
            sgd_lr = best_lr
    return results


def table(results, seeds):
    """Format what `compare` returns as a markdown table, the best optimizer first."""
    lines = []
    for name, (scores, best_lr, by_seed) in results.items():
        by_rate = ", ".join(f"{lr:g}: {score:.1f}" for lr, score in scores.items())
        each = ", ".join(f"{score:.1f}" for score in by_seed)
        lines.append((name, f"{best_lr:g}", mean_and_deviation(by_seed, 1), each, by_rate))
    lines.sort(key=lambda line: -sum(results[line[0]][2]))
    columns = ["optimizer", "learning rate", "val avg R@1", "of each seed",
               f"at each learning rate (seed {seeds[0]})"]
    return markdown_table(columns, lines)


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=20,
                        help="epochs of every training (default: 20)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2],
                        help="seeds of the trainings (default: 0 1 2)")
    args = parser.parse_args(argv)
    settings = make_settings(synthetic=True, epochs=args.epochs, ema=0.0)
    keep_freed_memory()
    device = find_device(settings.device)
    allow_fast_kernels(device)
    results = compare(settings, args.seeds)
    machine = describe(settings, device)
    print(f"\n{table(results, args.seeds)}\n\n{machine['device']}, torch "
          f"{machine['versions']['torch']}, {machine['date']}")
    return 0


if __name__ == "__main__":
    prepare_output(end_with_reader=True)
    sys.exit(main())
