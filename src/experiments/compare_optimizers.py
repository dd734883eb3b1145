"""Eight optimizers on the same task, each at the best of its own learning rates:

    python -m src.experiments.compare_optimizers

The built-in dataset and the preset `tiny`, or with --data_dir Flickr8k and `small`; an epoch is as
many pairs as there are photos. Every optimizer trains with each of its rates and the first seed,
then with the best one, on validation after the last epoch, and the other seeds. The rest is
torch.optim's default, but SGD has Nesterov momentum. Interrupted, the same command goes on."""
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import train_flickr8k_sgd as training
from src.device import allow_fast_kernels, describe, find_device
from src.evaluation import evaluate
from src.report import markdown_table
from src.runs import load_json, save_json
from src.settings import PRESETS, make_settings
from src.training import RunState
from src.utils.console import Parser, prepare_output, text
from src.utils.errors import UsageError
from src.utils.flickr8k_simple import iterate_batches, load_splits, place_photos

# As many for all, a factor of about three apart, around the usual one.
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


class Together(torch.optim.Optimizer):
    """Several optimizers, each of its own parameters, as one; they share its param_groups."""

    def __init__(self, *parts):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self):
        for part in self.parts:
            part.step()


def make_optimizer(name, model, lr, sgd_lr):
    """-> the optimizer of all of the model's parameters. Muon (Jordan et al. 2024) is for the
    matrices of linear layers; SGD, at sgd_lr, trains the rest beside it."""
    def sgd(parameters, lr):
        return torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True)

    if name == "SGD":
        return sgd(model.parameters(), lr)
    if name == "Muon":
        matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        chosen = set(map(id, matrices))
        others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
        muon = torch.optim.Muon(matrices, lr, adjust_lr_fn="match_rms_adamw")
        return Together(muon, sgd(others, sgd_lr))
    return getattr(torch.optim, name)(model.parameters(), lr)


def train(name, lr, seed, sgd_lr, chosen, splits, tokenizer):
    """One run -> a dict: the last epoch's val "avg_r1", 0 where the loss is no longer finite, and
    "seconds" an epoch."""
    device, data = find_device(chosen.device), splits["train"]
    torch.manual_seed(seed)
    model = training.build_model(chosen, tokenizer, photos=data.photos)
    model.to(device, memory_format=torch.channels_last).train()
    photos = place_photos(data.photos, device)

    def batches_of(epoch):  # as many pairs as there are photos
        batches = data.epoch(chosen.captions_per_image, chosen.batch_size,
                             seed * 1_000_003 + epoch)
        return batches[:max(1, len(data.names) // len(batches[0]))]

    total_steps = len(batches_of(1)) * chosen.epochs
    optimizer = make_optimizer(name, model, lr, sgd_lr)
    run = RunState(chosen, model, tokenizer, device, total_steps, optimizer)
    finite, seconds = True, []
    for epoch in range(1, chosen.epochs + 1):
        start, losses = time.perf_counter(), []
        for batch in iterate_batches(data, photos, batches_of(epoch), device):
            losses.append(training.training_step(run, batch))
        finite = finite and math.isfinite(torch.stack(losses).sum().item())
        seconds.append(time.perf_counter() - start)
    finite = finite and all(torch.isfinite(p).all() for p in model.parameters())
    return {"optimizer": name, "lr": lr, "seed": seed, "seconds": statistics.median(seconds),
            "avg_r1": evaluate(model, splits["val"])["avg_r1"] if finite else 0.0}


def best_rate(runs, name, seed):
    of_seed = [run for run in runs if run["optimizer"] == name and run["seed"] == seed]
    return max(of_seed, key=lambda run: run["avg_r1"])["lr"]


def table(results, first):
    """As markdown, the best optimizer first. first: the seed that the rates were tried with."""
    runs, rows = results["runs"], []
    for name in RATES:
        own = [run for run in runs if run["optimizer"] == name]
        if own:
            lr = best_rate(runs, name, first)
            at_best = [run for run in own if run["lr"] == lr]
            scores = [run["avg_r1"] for run in at_best]
            mean, each = statistics.mean(scores), ", ".join(f"{score:.1f}" for score in scores)
            spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            seconds = statistics.median(run["seconds"] for run in at_best)
            search = sorted((run["lr"], run["avg_r1"]) for run in own if run["seed"] == first)
            rates = ", ".join(f"{rate:g}: {score:.1f}" for rate, score in search)
            rows.append((mean, (name, f"{lr:g}", f"{mean:.1f}{spread}", each, f"{seconds:.2f}",
                                rates)))
    rows.sort(key=lambda row: -row[0])
    columns = ["optimizer", "learning rate", "val avg R@1, mean ± standard deviation", "each seed",
               "seconds an epoch", f"at every rate (seed {first})"]
    machine = f"{results['device']}, torch {results['versions']['torch']}, {results['date']}"
    return f"{markdown_table(columns, [row for _, row in rows])}\n\n{machine}"


def parse_args(argv):
    parser = Parser(description=__doc__.split("\n")[0])
    add, names = parser.add_argument, list(RATES)
    add("--data_dir", type=text, help="Flickr8k's folder (default: the built-in dataset)")
    add("--model", choices=list(PRESETS), help="(default: tiny, small with --data_dir)")
    add("--epochs", type=int, default=20, help="of every run (default: 20)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    add("--optimizers", nargs="+", choices=names, default=names, help="(default: all)")
    add("--output_dir", type=text, default="outputs/optimizers",
        help="(default: %(default)s)")
    return parser.parse_args(argv)


def compare(args):
    """Make the runs that are not done yet -> the results, which are saved after each."""
    chosen = make_settings(
        synthetic=not args.data_dir, data_dir=args.data_dir, epochs=args.epochs, ema=0.0,
        model=args.model or ("small" if args.data_dir else "tiny"))
    device = find_device(chosen.device)
    allow_fast_kernels(device)
    what = [Path(chosen.data_dir).name, chosen.model, args.epochs, "epochs", "seeds", *args.seeds]
    path = Path(args.output_dir) / ("_".join(map(str, what)) + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    results = describe(chosen, device) | {"runs": []}
    if path.exists():
        results = load_json(path)
    splits, tokenizer = load_splits(chosen)
    runs, (first, *others) = results["runs"], args.seeds

    def run(name, lr, seed, sgd_lr=None):
        if any((run["optimizer"], run["lr"], run["seed"]) == (name, lr, seed) for run in runs):
            return
        runs.append(train(name, lr, seed, sgd_lr, chosen, splits, tokenizer))
        save_json(results, path)
        print(f"{name:<8} lr {lr:<8g} seed {seed}  {runs[-1]['avg_r1']:6.2f}", flush=True)

    for name in filter(args.optimizers.__contains__, RATES):
        sgd_lr = None
        if name == "Muon":  # the rest of its model is SGD's, at SGD's best rate
            for lr in RATES["SGD"]:
                run("SGD", lr, first)
            sgd_lr = best_rate(runs, "SGD", first)
        for lr in RATES[name]:
            run(name, lr, first, sgd_lr)
        for seed in others:
            run(name, best_rate(runs, name, first), seed, sgd_lr)
    return results


def main(argv=None):
    args = parse_args(argv)
    try:
        results = compare(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print("\n" + table(results, args.seeds[0]))
    return 0


if __name__ == "__main__":
    prepare_output(end_with_reader=True)
    sys.exit(main())
