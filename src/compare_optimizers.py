"""Eight optimizers on the same task, each at the best of its own learning rates:

    python -m src.compare_optimizers

The built-in dataset and the preset `tiny`, or with --data_dir Flickr8k and `small`; an epoch is as
many pairs as there are photos; the same batches, crops, loss, schedule (warm-up, then cosine) and
gradient clipping for all. Every optimizer trains with each of its rates and the first seed; with
the rate that was best on validation it trains with the other seeds too. All parameters have one
learning rate, and everything else about an optimizer is torch.optim's default, except that SGD has
Nesterov momentum. What is compared is val avg R@1 after the last epoch. A run that is done is kept:
interrupted, the same command goes on where it was.
"""
import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import train_flickr8k_sgd as training
from src.settings import PRESETS, UsageError, describe, find_device, make_settings
from src.utils.checkpoint import CheckpointError, load_json, save_json
from src.utils.flickr8k_simple import DataError, epoch_batches, iterate_batches, place_photos
from src.utils.report import markdown_table
from src.utils.retrieval import evaluate

# The rates that each is tried at: as many for all, a factor of about three apart, around the one it
# is usually given.
RATES = {
    "SGD": (0.01, 0.03, 0.1, 0.3),
    "Adam": (0.001, 0.003, 0.01, 0.03),
    "AdamW": (0.001, 0.003, 0.01, 0.03),
    "NAdam": (0.001, 0.003, 0.01, 0.03),
    "RAdam": (0.001, 0.003, 0.01, 0.03),
    "RMSprop": (0.0003, 0.001, 0.003, 0.01),
    "Adagrad": (0.003, 0.01, 0.03, 0.1),
    "Muon": (0.003, 0.01, 0.03, 0.1),
}
RISE = 1.1  # a run is unstable when an epoch's mean loss is so many times the one before
RESULTS = "optimizers.json"


class Together(torch.optim.Optimizer):
    """Several optimizers, each of its own parameters, as one; they share its param_groups."""

    def __init__(self, *parts):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self):
        for part in self.parts:
            part.step()


def make_optimizer(name, model, lr, sgd_lr):
    """-> the optimizer of all of the model's parameters.

    Muon (Jordan et al. 2024) is for the matrices of linear layers; SGD, at sgd_lr, trains the rest
    beside it.
    """
    def sgd(parameters, lr):
        return torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True)

    if name == "SGD":
        return sgd(model.parameters(), lr)
    if name == "Muon":
        matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        chosen = set(map(id, matrices))
        others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
        muon = torch.optim.Muon(matrices, lr, adjust_lr_fn="match_rms_adamw")  # for Adam's rates
        return Together(muon, sgd(others, sgd_lr))
    return getattr(torch.optim, name)(model.parameters(), lr)


def train(name, lr, seed, sgd_lr, settings, splits, tokenizer):
    """One run -> a dict: the last epoch's val "avg_r1", each epoch's "losses", "seconds" an epoch,
    and whether "stable". A loss that is not finite ends the run, with an avg_r1 of 0."""
    device, data = torch.device(settings.device), splits["train"]
    torch.manual_seed(seed)
    model = training.build_model(settings, tokenizer)
    model.to(device, memory_format=torch.channels_last).train()
    photos = place_photos(data.photos, device)

    def batches_of(epoch):  # as many pairs as there are photos
        batches = epoch_batches(data.photo_of_caption, settings.captions_per_image,
                                settings.batch_size, seed * 1_000_003 + epoch)
        return batches[:max(1, len(data.names) // len(batches[0]))]

    total_steps = len(batches_of(1)) * settings.epochs
    run = training.RunState(settings, model, tokenizer, device, total_steps,
                            make_optimizer(name, model, lr, sgd_lr))
    losses, seconds = [], []
    for epoch in range(1, settings.epochs + 1):
        start, of_steps = time.perf_counter(), []
        for batch in iterate_batches(data, photos, batches_of(epoch), device):
            of_steps.append(training.training_step(run, batch))
        losses.append(torch.stack(of_steps).mean().item())
        seconds.append(time.perf_counter() - start)
        if not math.isfinite(losses[-1]):
            break
    finite = math.isfinite(losses[-1])
    finite = finite and all(torch.isfinite(parameter).all() for parameter in model.parameters())
    calm = all(after < RISE * before for before, after in zip(losses, losses[1:]))
    return {"optimizer": name, "lr": lr, "seed": seed, "seconds": statistics.median(seconds),
            "losses": [loss if math.isfinite(loss) else None for loss in losses],
            "stable": finite and calm,
            "avg_r1": evaluate(model, splits["val"])["avg_r1"] if finite else 0.0}


def best_rate(runs, name, seed):
    """The rate of an optimizer's best run with this seed."""
    of_seed = [run for run in runs if run["optimizer"] == name and run["seed"] == seed]
    return max(of_seed, key=lambda run: run["avg_r1"])["lr"]


def table(results):
    """Results as a markdown table, the best optimizer first; the runs of the search below it."""
    runs, first = results["runs"], results["settings"]["seeds"][0]
    rows, searches = [], []
    for name in RATES:
        own = [run for run in runs if run["optimizer"] == name]
        if not own:
            continue
        lr = best_rate(runs, name, first)
        at_best = [run for run in own if run["lr"] == lr]
        scores = [run["avg_r1"] for run in at_best]
        mean = statistics.mean(scores)
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        stable = sum(run["stable"] for run in at_best)
        seconds = statistics.median(run["seconds"] for run in at_best)
        rows.append((mean, (name, f"{lr:g}", f"{mean:.1f}{spread}",
                            ", ".join(f"{score:.1f}" for score in scores), f"{seconds:.2f}",
                            f"{stable} of {len(at_best)}")))
        search = sorted((run["lr"], run["avg_r1"]) for run in own if run["seed"] == first)
        searches.append(f"{name} " + ", ".join(f"{lr:g}: {score:.1f}" for lr, score in search))
    rows.sort(key=lambda row: -row[0])
    columns = ["optimizer", "learning rate", "val avg R@1, mean ± standard deviation", "each seed",
               "seconds an epoch", "stable"]
    return "\n".join([
        markdown_table(columns, [row for _, row in rows]), "",
        f"Val avg R@1 at every rate (seed {first}): {'; '.join(searches)}.",
        f"{results['device']}, torch {results['versions']['torch']}, {results['date']}"])


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data_dir", help="Flickr8k's folder (default: the built-in dataset, in data/synthetic)")
    add("--model", choices=list(PRESETS), help="preset (default: tiny, or small with --data_dir)")
    add("--epochs", type=int, default=20, help="of every run (default: 20)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2],
        help="the first is the search's (default: 0 1 2)")
    add("--optimizers", nargs="+", choices=list(RATES), default=list(RATES),
        help="which (default: all)")
    add("--output_dir", default="outputs/optimizers",
        help="folder of the results (default: %(default)s)")
    return parser.parse_args(argv)


def compare(options):
    """Make the runs that are not done yet -> the results, which are saved after each."""
    settings = make_settings(
        synthetic=not options.data_dir, data_dir=options.data_dir, epochs=options.epochs, ema=0.0,
        model=options.model or ("small" if options.data_dir else "tiny"))
    device = find_device(settings.device)
    path = Path(options.output_dir) / RESULTS
    what = {"model": settings.model, "data_dir": settings.data_dir, "epochs": options.epochs,
            "seeds": options.seeds}
    results = describe(settings, device) | {"settings": what, "runs": []}
    if path.exists():
        results = load_json(path)
        if results["settings"] != what:
            raise UsageError(f"{path} holds another comparison ({results['settings']}); name "
                             "another --output_dir")
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = training.find_tokenizer(settings)
    splits = training.load_data(settings, tokenizer)
    runs = results["runs"]
    done = {(run["optimizer"], run["lr"], run["seed"]) for run in runs}

    def run(name, lr, seed, sgd_lr=None):
        if (name, lr, seed) in done:
            return
        runs.append(train(name, lr, seed, sgd_lr, settings, splits, tokenizer))
        done.add((name, lr, seed))
        save_json(results, path)
        unstable = "" if runs[-1]["stable"] else "  unstable"
        print(f"{name:<8} lr {lr:<8g} seed {seed}  val avg R@1 {runs[-1]['avg_r1']:6.2f}  "
              f"{runs[-1]['seconds']:.2f} s an epoch{unstable}", flush=True)

    first, *others = options.seeds
    for name in (name for name in RATES if name in options.optimizers):
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
    options = parse_args(argv)
    try:
        results = compare(options)
    except (DataError, UsageError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print("\n" + table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
