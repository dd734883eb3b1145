"""Eight optimizers on the same task, each at the best of its own learning rates:  python -m src.compare_optimizers

The built-in dataset and the preset `tiny`, or with --data_dir Flickr8k and `small`; an epoch is as many pairs as there are
photos; the same batches, crops, loss, schedule (warm-up, then cosine) and gradient clipping for all. Every optimizer trains
with each of its rates and the first seed; with the rate that was best on validation it trains with the other seeds too. All
parameters have one learning rate, and everything else about an optimizer is torch.optim's default, except that SGD has
Nesterov momentum. What is compared is val avg R@1 after the last epoch. A run that is done is kept: interrupted, the same
command goes on where it was.
"""
import argparse
import datetime
import logging
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import train_flickr8k_sgd as training
from src.losses import contrastive_backward
from src.model import PRESETS
from src.settings import UsageError, amp_type, default_arguments, find_device, parse_args
from src.utils import report
from src.utils.checkpoint import CheckpointError, load_json, save_json
from src.utils.flickr8k_simple import DataError, epoch_batches, iterate_batches, place_photos
from src.utils.retrieval import evaluate

# The rates that each is tried at: as many for all, a factor of about three apart, around the one it is usually given.
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
RISE = 1.1  # a run is called unstable when an epoch's mean loss is so many times the one before
RESULTS = "optimizers.json"


def make_optimizers(name, model, lr, sgd_lr):
    """-> list of optimizers for all of the model's parameters.

    Muon (Jordan et al. 2024) is for the matrices of linear layers; SGD, at sgd_lr, trains the rest beside it.
    """
    def sgd(parameters, lr):
        return torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True)

    if name == "SGD":
        return [sgd(model.parameters(), lr)]
    if name == "Muon":
        matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        chosen = set(map(id, matrices))
        return [torch.optim.Muon(matrices, lr, adjust_lr_fn="match_rms_adamw"),  # so that Adam's rates suit it
                sgd([parameter for parameter in model.parameters() if id(parameter) not in chosen], sgd_lr)]
    return [getattr(torch.optim, name)(model.parameters(), lr)]


def train(name, lr, seed, sgd_lr, arguments, splits, tokenizer):
    """One run -> a dict: the last epoch's val "avg_r1", each epoch's "losses", "seconds" an epoch, and whether "stable".

    A loss that is not finite ends the run, with an avg_r1 of 0.
    """
    device, data = torch.device(arguments["device"]), splits["train"]
    torch.manual_seed(seed)
    model, _ = training.build_model(arguments, tokenizer)
    model.to(device, memory_format=torch.channels_last).train()
    amp_dtype = amp_type(arguments)
    encode = training.PairEncoder(model, amp_dtype if amp_dtype == torch.bfloat16 else None)  # no loss is scaled here
    optimizers, contrast = make_optimizers(name, model, lr, sgd_lr), training.build_loss(arguments)
    photos, word_start = place_photos(data.photos, device), torch.tensor(tokenizer.word_start, device=device)

    def batches_of(epoch):  # as many pairs as there are photos
        batches = epoch_batches(data.photo_of_caption, arguments["captions_per_image"], arguments["batch_size"],
                                seed * 1_000_003 + epoch)
        return batches[:max(1, len(data.names) // len(batches[0]))]

    schedule = training.cosine_schedule(arguments["warmup"], arguments["final_lr"], len(batches_of(1)) * arguments["epochs"])
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    losses, seconds = [], []
    for epoch in range(1, arguments["epochs"] + 1):
        begun, of_steps = time.perf_counter(), []
        for batch in iterate_batches(data, photos, batches_of(epoch), device):
            training.augment(batch, arguments, word_start)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            of_steps.append(contrastive_backward(encode, batch, training.MEMORY_LOSS_WEIGHT, contrast=contrast))
            nn.utils.clip_grad_norm_(model.parameters(), arguments["clip_grad"])
            for part in (*optimizers, *schedulers):
                part.step()
            model.clamp_logit_scale_()
        losses.append(torch.stack(of_steps).mean().item())
        seconds.append(time.perf_counter() - begun)
        if not math.isfinite(losses[-1]):
            break
    finite = math.isfinite(losses[-1]) and all(torch.isfinite(parameter).all() for parameter in model.parameters())
    return {"optimizer": name, "lr": lr, "seed": seed, "seconds": statistics.median(seconds),
            "losses": [loss if math.isfinite(loss) else None for loss in losses],
            "stable": finite and all(after < RISE * before for before, after in zip(losses, losses[1:])),
            "avg_r1": evaluate(model, splits["val"])["avg_r1"] if finite else 0.0}


def best_rate(runs, name, seed):
    """The rate of an optimizer's best run with this seed."""
    return max((run for run in runs if run["optimizer"] == name and run["seed"] == seed), key=lambda run: run["avg_r1"])["lr"]


def table(results):
    """Results as a markdown table, the best optimizer first; the runs of the search below it."""
    runs, first = results["runs"], results["settings"]["seeds"][0]
    names = [name for name in RATES if any(run["optimizer"] == name for run in runs)]
    rows, searches = [], []
    for name in names:
        lr = best_rate(runs, name, first)
        at_best = [run for run in runs if run["optimizer"] == name and run["lr"] == lr]
        scores = [run["avg_r1"] for run in at_best]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        stable = sum(run["stable"] for run in at_best)
        rows.append((statistics.mean(scores), f"| {name} | {lr:g} | {statistics.mean(scores):.1f}{spread} | "
                     f"{', '.join(f'{score:.1f}' for score in scores)} | "
                     f"{statistics.median(run['seconds'] for run in at_best):.2f} | {stable} of {len(at_best)} |"))
        searches.append(f"{name} " + ", ".join(
            f"{run['lr']:g}: {run['avg_r1']:.1f}" for run in sorted(runs, key=lambda run: run["lr"])
            if run["optimizer"] == name and run["seed"] == first))
    return "\n".join([
        "| optimizer | learning rate | val avg R@1, mean ± standard deviation | each seed | seconds an epoch | stable |",
        "| --- | --- | --- | --- | --- | --- |", *(row for _, row in sorted(rows, key=lambda row: -row[0])), "",
        f"Val avg R@1 at every rate (seed {first}): {'; '.join(searches)}.",
        f"{results['device']}, torch {results['torch']}, {results['date']}"])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data_dir", help="Flickr8k's folder (default: the built-in dataset, in data/synthetic)")
    parser.add_argument("--model", choices=list(PRESETS), help="preset (default: tiny, or small with --data_dir)")
    parser.add_argument("--epochs", type=int, default=20, help="of every run (default: 20)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first is the search's (default: 0 1 2)")
    parser.add_argument("--optimizers", nargs="+", choices=list(RATES), default=list(RATES), help="which (default: all)")
    parser.add_argument("--output_dir", default="outputs/optimizers", help="folder of the results (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        preset = options.model or ("small" if options.data_dir else "tiny")
        given = ["--data_dir", options.data_dir] if options.data_dir else ["--synthetic"]
        arguments = default_arguments(parse_args("", ["--model", preset, "--epochs", str(options.epochs), *given]))
        device = find_device(arguments["device"])
        path = Path(options.output_dir) / RESULTS
        settings = {"model": preset, "data_dir": arguments["data_dir"], "epochs": options.epochs, "seeds": options.seeds}
        results = {"settings": settings, "device": report.device_name(device), "torch": str(torch.__version__),
                   "date": datetime.date.today().isoformat(), "runs": []}
        if path.exists():
            results = load_json(path)
            if results["settings"] != settings:
                raise UsageError(f"{path} holds another comparison ({results['settings']}); name another --output_dir")
        path.parent.mkdir(parents=True, exist_ok=True)
        training.find_data(arguments, logging.getLogger("compare_optimizers"))
        tokenizer = training.build_tokenizer(arguments)
        splits = training.load_data(arguments, tokenizer, logging.getLogger("compare_optimizers"))
        done = {(run["optimizer"], run["lr"], run["seed"]) for run in results["runs"]}

        def run(name, lr, seed, sgd_lr=None):
            if (name, lr, seed) not in done:
                results["runs"].append(train(name, lr, seed, sgd_lr, arguments, splits, tokenizer))
                done.add((name, lr, seed))
                save_json(results, path)
                last = results["runs"][-1]
                print(f"{name:<8} lr {lr:<8g} seed {seed}  val avg R@1 {last['avg_r1']:6.2f}  {last['seconds']:.2f} s an epoch"
                      + ("" if last["stable"] else "  unstable"), flush=True)

        first, *others = options.seeds
        for name in (name for name in RATES if name in options.optimizers):
            if name == "Muon":  # the rest of its model is SGD's, at SGD's best rate
                for lr in RATES["SGD"]:
                    run("SGD", lr, first)
                rest = best_rate(results["runs"], "SGD", first)
            for lr in RATES[name]:
                run(name, lr, first, rest if name == "Muon" else None)
            for seed in others:
                run(name, best_rate(results["runs"], name, first), seed, rest if name == "Muon" else None)
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
