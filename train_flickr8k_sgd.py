"""Train the multimodal memory network on Flickr8k with SGD and a cosine schedule.

    python train_flickr8k_sgd.py --synthetic            the built-in shapes, about a minute
    python train_flickr8k_sgd.py                        Flickr8k (see download_flickr8k.py)
    torchrun --nproc_per_node=4 train_flickr8k_sgd.py   one process a GPU, which share the batch

Read it from the top: data and model, the step, what comes before the first one, and the loop,
`fit`. --resume goes on as if nothing had happened: the order of the pairs, the crops and the
learning rate follow from the seed and the step alone, the rest is the state in `src/state.py`."""
import dataclasses
import logging
import math
import shlex
import sys
import time

import torch

from src import report, runs
from src.bank import BETA
from src.device import allow_fast_kernels, autocast_dtype, describe, find_device
from src.encoder_sources import load_encoders
from src.evaluation import compare_bank, evaluate, make_bank
from src.fisher import build_network, make_fisher_vectors, with_fisher_vectors
from src.pretrained import NO_ENCODERS
from src.runs import load_checkpoint, save_checkpoint, save_json
from src.settings import FISHER_EPOCHS, FISHER_PHOTOS, for_contrastive_pair, parse_args
from src.training import (
    ADVICE,
    MEMORY_LOSS_WEIGHT,
    RunState,
    augment,
    contrastive_backward,
    frozen_statistics,
    training_step,
)
from src.utils import distributed
from src.utils.augment import normalize, resize
from src.utils.console import ProgressLine, duration, log_to_console
from src.utils.errors import RunError, UsageError
from src.utils.flickr8k_simple import check_folders, iterate_batches, load_splits, place_photos
from src.utils.tokenizers import tokenizer_from_state

log = logging.getLogger("flickr8k_sgd")
LOG_INTERVAL = 10  # steps between two looks at the loss: sync points
STEM_PHOTOS = 1000  # that the first filters are made of
CHECKPOINT_INTERVAL = 60  # seconds, which a power cut may cost; a GPU's epochs are shorter


def share_of_epoch(data, settings, epoch):
    """This process's pairs of each of an epoch's batches."""
    rank, world = distributed.rank_and_world()
    batches = data.epoch(settings.captions_per_image, settings.batch_size,
                         settings.seed * 1_000_003 + epoch)
    share = batches.shape[1] // world
    return batches[:, rank * share:(rank + 1) * share]


def build_model(settings, tokenizer, encoders=NO_ENCODERS, photos=None):
    """The model, on the CPU; its first filters are fit to `photos`, a training split's, where they
    are given. Raises UsageError for sizes that do not fit."""
    try:
        model = build_network(tokenizer.vocab_size, settings, encoders.widths)
    except ValueError as error:
        raise UsageError(f"these sizes make no model: {error}") from None
    if encoders.image is None:
        for side in (settings.start_size, settings.image_size, settings.eval_pixels):
            if side % model.image_encoder.stride:
                raise UsageError(f"photos of {side} pixels: the model takes multiples of "
                                 f"{model.image_encoder.stride}")
        if photos is not None:
            rows = torch.linspace(0, len(photos) - 1, min(STEM_PHOTOS, len(photos))).long()
            sample = resize(photos[rows], settings.training_pixels(1))
            model.image_encoder.stem.fit(normalize(sample))
    set_temperature(model, settings.temperature)
    if settings.finetune:
        for encoder in encoders:
            encoder.freeze_unused()
        encoders.attach(model, settings)
    return model


@torch.no_grad()
def set_temperature(model, temperature):
    model.logit_scale.fill_(-math.log(temperature))
    model.clamp_logit_scale_()


def set_up(settings, output_dir, checkpoint, args, device, command):
    """-> (run, splits), ready for the loop, and the run's folder with its config."""
    rank, world = distributed.rank_and_world()
    encoders = load_encoders(settings, device)
    if encoders.pair and not args.resume:
        settings = for_contrastive_pair(settings, vars(args))
    settings = encoders.fit_settings(settings)
    for encoder in encoders:
        does = "once, into a store" if encoder.frozen else "in every step, and is trained"
        what = "photo" if encoder.kind == "image" else "caption"
        log.info(f"{encoder.name} encodes every {what} {does}: {encoder.width} features")
    tokenizer = checkpoint and tokenizer_from_state(checkpoint["tokenizer"])
    with distributed.local_main_process_first():  # which makes the stores
        splits, tokenizer = load_splits(settings, tokenizer, encoders.image, encoders.text)
    torch.manual_seed(settings.seed)
    model = build_model(settings, tokenizer, encoders, splits["train"].photos)
    model.to(device, memory_format=torch.channels_last)
    encoders.initialize(model, splits["train"], autocast_dtype(settings.amp, device))
    batches = share_of_epoch(splits["train"], settings, 1)
    if not batches.numel():
        raise UsageError(f"a batch has fewer pairs than there are processes, {world}")
    seconds = 0.0
    if settings.fisher and checkpoint is None:
        splits["train"], seconds = train_fisher_network(
            settings, model.fisher_network, tokenizer, splits["train"], device)
    run = RunState(settings, model, tokenizer, device, len(batches) * settings.epochs)
    run.seconds = seconds
    run.dir, run.is_main = output_dir, rank == 0
    run.epoch = 0 if encoders.pair else 1
    run.config = describe(settings, device, world) | {
        "command": command, "encoders": encoders.describe(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": {name: split.counts() for name, split in splits.items()},
        "layout": splits["train"].folders[0].layout, "extra_data": splits["train"].joined,
        "fingerprints": {name: split.fingerprint() for name, split in splits.items()}}
    if any(other != run.config["fingerprints"]
           for other in distributed.gather_objects([run.config["fingerprints"]])):
        raise UsageError(f"{settings.data_dir}: photos, captions or their order are not the same "
                         "on all machines")
    if checkpoint is not None:
        began = checkpoint["config"]
        run.config |= {"date": began["date"], "command": began["command"]}
        runs.check_same_data(began, run.config, settings.data_dir)
        run.load_state_dict(checkpoint)
    if settings.fisher:
        splits = with_fisher_vectors(model, splits, run.amp_dtype)
    if run.is_main:
        runs.open_output_dir(output_dir, run.config, run.history, checkpoint is None,
                             args.overwrite or args.resume, log)
    log.info("{model}: {parameters:,} parameters, {precision}, on {device}".format(
        model=settings.model, **run.config))
    data = splits["train"]
    log.info(f"{len(data):,} pairs of {len(data.names):,} photos in {settings.data_dir}: "
             f"{settings.epochs} epochs of {len(batches)} steps of {len(batches[0]) * world} pairs")
    if checkpoint is not None:
        resume_schedule(run, began["settings"]["epochs"])
    return run, splits


def train_fisher_network(settings, network, tokenizer, data, device):
    """Train the model's second network, by the recipe of the first, but that photos and mirror
    images are made into Fisher vectors once, the first FISHER_PHOTOS -> the seconds it took."""
    began, part = time.time(), data.first(FISHER_PHOTOS)
    log.info(f"a second network learns first, by Fisher vectors of {len(part.photos):,} photos")
    settings = dataclasses.replace(settings, epochs=FISHER_EPOCHS, chunk_size=0)
    network.image_backbone.fit(part.photos)
    amp_dtype = autocast_dtype(settings.amp, device)
    vectors = make_fisher_vectors(network.image_backbone, part.photos, amp_dtype, views=2)
    if len(part.photos) == len(data.photos):
        data = data.with_fisher_vectors(vectors[:, 0])  # for the bank
    set_temperature(network, settings.temperature)
    batches = [share_of_epoch(part, settings, i) for i in range(FISHER_EPOCHS)]
    network.train().requires_grad_(True)
    run = RunState(settings, network, tokenizer, device, sum(map(len, batches)))
    vectors = place_photos(vectors, device)
    for step, batch in enumerate(iterate_batches(part, vectors, torch.cat(batches), device)):
        torch.manual_seed(settings.seed * 1_000_003 + step)
        training_step(run, batch)
    network.load_state_dict(run.kept.state_dict())
    network.requires_grad_(False)
    network.zero_grad()  # else the last step's gradient would count in the clipping of the first's
    seconds = time.time() - began
    log.info(f"it has learned in {seconds:.0f} s, which count as the first epoch's")
    return data, seconds


def epoch_seconds(run, splits):
    """About how long an epoch of fine-tuning will take, by a few photos; nothing is learned."""
    data, settings = splits["train"], run.settings
    pairs = max(20 * settings.captions_per_image, 2 * settings.chunk_size)
    pairs = share_of_epoch(data, settings, 1)[0][:pairs]
    for _ in range(2):  # the first warms up
        began = time.time()
        batch = next(iterate_batches(data, data.photos, [pairs], run.device))
        augment(run, batch)
        with frozen_statistics(run.encode):
            contrastive_backward(run.encode, batch, MEMORY_LOSS_WEIGHT, settings.chunk_size)
        seconds = time.time() - began
    return seconds * len(data) / len(pairs)


def resume_schedule(run, epochs_before):
    """Say where the run goes on. Where --epochs has changed, it goes on as if it had been begun
    with that many: the learning rate jumps to where that schedule stands by now."""
    epochs, groups, schedule = run.settings.epochs, run.optimizer.param_groups, run.scheduler
    if run.epoch > epochs:
        log.info("the run is done; to train on: " + runs.resume_command(run.dir, "--epochs", "N"))
        return
    log.info(f"resumed at epoch {run.epoch}, step {run.step}")
    if epochs != epochs_before:
        before = groups[0]["lr"]
        for group, multiple in zip(groups, schedule.lr_lambdas):
            group["lr"] = group["initial_lr"] * multiple(schedule.last_epoch)
        log.info(f"the schedule is now that of {epochs} epochs, not {epochs_before}: the learning "
                 f"rate goes from {before:.3g} to {groups[0]['lr']:.3g}")


def fit(run, splits, stop):
    """The loop, from where the run stands to its last epoch. Raises RunError where a loss or a
    weight is not finite, KeyboardInterrupt where a stop was requested, after saving."""
    settings, data, device = run.settings, splits["train"], run.device
    photos = place_photos(data.photos, device)
    rank, world = distributed.rank_and_world()
    line, steps_done = ProgressLine(run.is_main), 0
    if run.epoch == 0:  # what a contrastive model scores by itself, as which the run begins
        began, val = time.time(), validate(run, splits["val"])
        end_epoch(run, {"epoch": 0, "train": {"loss": None}, "val": val, "lr": 0.0,
                        "seconds": time.time() - began})
    run.model.train()
    while run.epoch <= settings.epochs:
        batches = share_of_epoch(data, settings, run.epoch)
        steps, pairs = len(batches), len(batches[0]) * world
        began, losses = time.time() - run.seconds, []
        for batch in iterate_batches(data, photos, batches[run.step:], device):
            step = (run.epoch - 1) * steps + run.step
            # Whatever was drawn before this step, so that it is the same after --resume.
            torch.manual_seed((settings.seed * 1_000_003 + step) * world + rank)
            lr = run.optimizer.param_groups[0]["lr"]
            losses.append(training_step(run, batch))
            run.step += 1
            steps_done += 1

            over, due = run.step == steps, time.time() - run.saved > CHECKPOINT_INTERVAL
            # Several processes must agree to save or stop, which they do when they log.
            at_once = world == 1 and (stop.requested or due)
            if len(losses) == LOG_INTERVAL or over or at_once:
                for i, loss in enumerate(torch.stack(losses).tolist(), 1 - len(losses)):  # a sync
                    if not math.isfinite(loss):
                        raise RunError(f"the loss became {loss} in epoch {run.epoch}, step "
                                            f"{run.step + i}; {ADVICE}")
                    run.loss_sum += loss
                losses, run.seconds = [], time.time() - began
                speed = line.speed(steps_done, settings.epochs * steps - step - 1, pairs)
                line.update(f"epoch {run.epoch}/{settings.epochs}  step {run.step}/{steps}  "
                            f"loss {loss:.3f}  {speed}")
                stopping = distributed.any_process(stop.requested, device)
                due = distributed.any_process(due, device)
                if (stopping or due) and not over:
                    save(run)
                    if stopping:
                        raise KeyboardInterrupt

        line.update(f"epoch {run.epoch}/{settings.epochs}  validating")
        row = {"epoch": run.epoch, "train": {"loss": run.loss_sum / steps},
               "val": validate(run, splits["val"]), "lr": lr, "seconds": time.time() - began}
        line.clear()
        stopping = distributed.any_process(stop.requested, device)
        end_epoch(run, row, stopping)
        if stopping:
            raise KeyboardInterrupt


def validate(run, val):
    """Metrics of the model that is kept. Raises RunError for latents that are not finite."""
    distributed.broadcast_buffers(run.kept)
    try:
        return evaluate(run.kept, val, run.amp_dtype)
    except ValueError as error:
        raise RunError(f"validation of epoch {run.epoch}: {error}; {ADVICE}") from None


def end_epoch(run, row, stopping=False):
    """Add the epoch to the history, keep the best model, save what is due, and log it."""
    best = max((old["val"]["avg_r1"] for old in run.history), default=-1.0)
    if row["val"]["avg_r1"] > best and run.is_main:
        weights = {name: tensor.clone() for name, tensor in run.kept.state_dict().items()}
        run.best = {"epoch": run.epoch, "model_state_dict": weights, "metrics": row["val"],
                    "config": run.config, "tokenizer": run.tokenizer.state_dict(), "bank": None}
    run.history.append(row)
    run.epoch, run.step, run.loss_sum, run.seconds = run.epoch + 1, 0, 0.0, 0.0
    due = (stopping or len(run.history) == 1 or run.epoch > run.settings.epochs
           or time.time() - run.saved > CHECKPOINT_INTERVAL)
    if distributed.any_process(due, run.device):
        save(run)
    if run.is_main:
        save_json(run.history, run.dir / runs.HISTORY)
    log.info(report.epoch_line(row))


def save(run):
    """Write the best model, where it is a new one, and the state, where --resume starts, in an
    order in which a kill between the two costs nothing."""
    state = run.state_dict() | {"config": run.config}
    if run.best is not None:
        save_checkpoint(run.best, run.dir / runs.BEST)
    if run.is_main:
        save_checkpoint(state, run.dir / runs.LAST)
    run.best, run.saved = None, time.time()


def evaluate_best(run, splits):
    """Give the best model its bank and score it, without and with that, on val and test."""
    best = distributed.call_on_main(lambda: load_checkpoint(run.dir / runs.BEST, runs.BEST_KEYS))
    run.model.load_state_dict(best["model_state_dict"])
    started = time.time()
    pixels = run.settings.stored_pixels("val")
    bank = make_bank(run.model, splits["train"], pixels, run.settings.seed, run.amp_dtype)
    log.info(f"bank: {len(bank.photos):,} photos and {len(bank.texts):,} captions of train, "
             f"{bank.nbytes / 1e6:.1f} MB, made in {time.time() - started:.1f} s")
    results = {split: compare_bank(run.model, splits[split], bank, run.amp_dtype)
               for split in ("val", "test")}
    if run.is_main:
        save_checkpoint(best | {"bank": bank.state_dict()}, run.dir / runs.BEST)
        save_json(results | {"beta": BETA}, run.dir / runs.BANK)
        save_json(results["test"]["off"], run.dir / runs.TEST)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(__doc__.split("\n")[0], argv)
    stop = distributed.StopRequest()
    log_to_console(log)
    output_dir = None
    try:
        distributed.start()
        settings, output_dir, checkpoint = distributed.call_on_main(lambda: runs.resolve(args))
        settings = runs.on_this_machine(settings, args)
        if args.check:
            check_folders(settings)
            return 0
        device = find_device(settings.device)
        allow_fast_kernels(device)
        command = shlex.join(["python", "train_flickr8k_sgd.py", *argv])
        run, splits = set_up(settings, output_dir, checkpoint, args, device, command)
        if settings.finetune and device.type == "cpu":
            log.info(f"an epoch will take about {duration(epoch_seconds(run, splits))} here")
        with stop.watch():
            fit(run, splits, stop)
        evaluate_best(run, splits)
        if run.is_main:
            log.info(report.summary(runs.load_run(output_dir)))
        return 0
    except UsageError as error:
        status, message = 2, f"error: {error}"
    except (RunError, OSError) as error:
        status, message = 1, f"error: {error}"
    except torch.OutOfMemoryError:
        status = 1
        message = "error: out of memory; a smaller --chunk_size, --batch_size or --model needs less"
    except RuntimeError as error:
        rank, world = distributed.rank_and_world()
        if world == 1:
            raise
        reason = str(error).splitlines()[0]
        status, message = 1, (f"error: process {rank} of {world} lost the others ({reason}); go on "
                              "from the last checkpoint with --resume")
    except KeyboardInterrupt:
        status, message = 130, "interrupted before the run began"
        if output_dir is not None and (output_dir / runs.CONFIG).exists():
            message = f"interrupted; go on with: {runs.resume_command(output_dir)}"
    finally:
        distributed.stop()
    ProgressLine().clear()
    log.error(message)
    return status


if __name__ == "__main__":
    distributed.exit_process(main())
