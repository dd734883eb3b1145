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
from torchvision.transforms.v2.functional import resize

from src.data import check_folders, load_data
from src.encoder_names import load_encoders
from src.fisher import build_network, keep_vectors, vectors_of
from src.losses import contrastive_backward, frozen_statistics
from src.pretrained import NO_ENCODERS
from src.settings import (
    FISHER_EPOCHS,
    FISHER_PHOTOS,
    UsageError,
    allow_fast_kernels,
    amp_type,
    default_model,
    describe,
    find_device,
    parse_args,
    uncropped,
)
from src.state import ADVICE, RunState, TrainingError
from src.utils import checkpoint as files
from src.utils import distributed, report
from src.utils.augment import color_jitter, drop_words, normalize, random_resized_crop_and_flip
from src.utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, save_json
from src.utils.flickr8k_simple import iterate_batches, place_photos
from src.utils.layouts import DataError
from src.utils.retrieval import BETA, compare_bank, evaluate, make_bank
from src.utils.tokenizers import tokenizer_from_state

log = logging.getLogger("flickr8k_sgd")
MEMORY_LOSS_WEIGHT = 0.1
CLIP_GRAD = 1.0  # largest norm of the gradient
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
            sample = resize(photos[rows], [settings.training_pixels(1)] * 2)
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


def augment(run, batch):
    """Crop, mirror and colour the photos of a batch, drop words of its captions; in its place. Of
    photos that are features, take those of the mirror image instead."""
    images, settings = batch["images"], run.settings
    if images.dtype == torch.float32:  # a DataLoader's processes have done it
        return
    if images.dtype == torch.uint8:
        size = settings.training_pixels(run.epoch)
        if uncropped(size) < images.shape[-1]:
            images = resize(images, [uncropped(size)] * 2)
        images = random_resized_crop_and_flip(images / 255.0, size, settings.min_crop,
                                              settings.flip)
        images = normalize(color_jitter(images, settings.color_jitter))
        batch["images"] = images.contiguous(memory_format=torch.channels_last)
    else:
        mirrored = torch.rand(len(images), 1, device=images.device) < settings.flip
        batch["images"] = torch.where(mirrored, images[:, 1], images[:, 0]).float()
    batch["text"] = drop_words(batch["text"], settings.word_dropout, run.word_start)


def forward_backward(run, batch):
    """New gradients -> the loss, a detached scalar on the device."""
    def compute(batch):
        run.optimizer.zero_grad(set_to_none=run.graphs is None)  # graphs write where they were
        return contrastive_backward(
            run.encode, batch, MEMORY_LOSS_WEIGHT, run.settings.chunk_size, run.scaler.scale)

    return compute(batch) if run.graphs is None else run.graphs(compute, batch)


def update(run):
    """The step of optimizer, schedule and moving average with the gradients that are there."""
    run.scaler.unscale_(run.optimizer)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), CLIP_GRAD)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.scheduler.step()
    run.model.clamp_logit_scale_()
    if run.ema is not None:
        run.ema.update()


def training_step(run, batch):
    """One step on a batch of `iterate_batches` -> the loss, a detached scalar on the device."""
    augment(run, batch)
    loss = forward_backward(run, batch)
    update(run)
    return loss


def set_up(settings, output_dir, checkpoint, replace, device, command):
    """-> (run, splits), ready for the loop, and the run's folder with its config."""
    rank, world = distributed.rank_and_world()
    encoders = load_encoders(settings, device)
    for encoder in encoders:
        does = "once, into a store" if encoder.frozen else "in every step, and is trained"
        what = "photo" if encoder.kind == "image" else "caption"
        log.info(f"{encoder.name} encodes every {what} {does}: {encoder.width} features")
    tokenizer = checkpoint and tokenizer_from_state(checkpoint["tokenizer"])
    with distributed.one_a_machine_first():  # which makes the stores
        splits, tokenizer = load_data(settings, encoders, tokenizer)
    torch.manual_seed(settings.seed)
    model = build_model(settings, tokenizer, encoders, splits["train"].photos)
    model.to(device, memory_format=torch.channels_last)
    encoders.initialize(model, splits["train"], amp_type(settings))
    batches = share_of_epoch(splits["train"], settings, 1)
    if not batches.numel():
        raise UsageError(f"a batch has fewer pairs than there are processes, {world}")
    seconds = 0.0
    if settings.fisher and checkpoint is None:
        seconds = train_second(settings, model.second, tokenizer, splits["train"], device)
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
           for other in distributed.collect([run.config["fingerprints"]])):
        raise UsageError(f"{settings.data_dir}: photos, captions or their order are not the same "
                         "on all machines")
    if checkpoint is not None:
        began = checkpoint["config"]
        run.config |= {"date": began["date"], "command": began["command"]}
        files.check_same_data(began, run.config, settings.data_dir)
        run.load_state_dict(checkpoint)
    if settings.fisher:
        keep_vectors(model, splits, run.amp_dtype)
    if run.is_main:
        files.open_output_dir(output_dir, run.config, run.history, checkpoint is None, replace, log)
    log.info("{model}: {parameters:,} parameters, {precision}, on {device}".format(
        model=settings.model, **run.config))
    data = splits["train"]
    log.info(f"{len(data):,} pairs of {len(data.names):,} photos in {settings.data_dir}: "
             f"{settings.epochs} epochs of {len(batches)} steps of {len(batches[0]) * world} pairs")
    if checkpoint is not None:
        resume_schedule(run, began["settings"]["epochs"])
    return run, splits


def train_second(settings, network, tokenizer, data, device):
    """Train the model's second network, by the recipe of the first, but that photos and mirror
    images are made into Fisher vectors once, the first FISHER_PHOTOS -> the seconds it took."""
    began, part = time.time(), data.first(FISHER_PHOTOS)
    log.info(f"a second network learns first, by Fisher vectors of {len(part.photos):,} photos")
    settings = dataclasses.replace(settings, epochs=FISHER_EPOCHS, chunk_size=0)
    network.image_backbone.fit(part.photos)
    vectors = vectors_of(network.image_backbone, part.photos, amp_type(settings), views=2)
    if len(part.photos) == len(data.photos):
        data.vectors = vectors[:, 0]  # for the bank
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
    return seconds


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
        log.info("the run is done; to train on: " + files.resume_command(run.dir, "--epochs", "N"))
        return
    log.info(f"resumed at epoch {run.epoch}, step {run.step}")
    if epochs != epochs_before:
        before = groups[0]["lr"]
        for group, multiple in zip(groups, schedule.lr_lambdas):
            group["lr"] = group["initial_lr"] * multiple(schedule.last_epoch)
        log.info(f"the schedule is now that of {epochs} epochs, not {epochs_before}: the learning "
                 f"rate goes from {before:.3g} to {groups[0]['lr']:.3g}")


def fit(run, splits, stop):
    """The loop, from where the run stands to its last epoch. Raises TrainingError where a loss or a
    weight is not finite, KeyboardInterrupt where a stop was requested, after saving."""
    settings, data, device = run.settings, splits["train"], run.device
    photos = place_photos(data.photos, device)
    rank, world = distributed.rank_and_world()
    line, steps_done = report.ProgressLine(run.is_main), 0
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
                        raise TrainingError(f"the loss became {loss} in epoch {run.epoch}, step "
                                            f"{run.step + i}; {ADVICE}")
                    run.loss_sum += loss
                losses, run.seconds = [], time.time() - began
                speed = line.speed(steps_done, settings.epochs * steps - step - 1, pairs)
                line.update(f"epoch {run.epoch}/{settings.epochs}  step {run.step}/{steps}  "
                            f"loss {loss:.3f}  {speed}")
                stopping = distributed.anyone(stop.requested, device)
                due = distributed.anyone(due, device)
                if (stopping or due) and not over:
                    save(run)
                    if stopping:
                        raise KeyboardInterrupt

        line.update(f"epoch {run.epoch}/{settings.epochs}  validating")
        row = {"epoch": run.epoch, "train": {"loss": run.loss_sum / steps},
               "val": validate(run, splits["val"]), "lr": lr, "seconds": time.time() - began}
        line.clear()
        stopping = distributed.anyone(stop.requested, device)
        end_epoch(run, row, stopping)
        if stopping:
            raise KeyboardInterrupt


def validate(run, val):
    """Metrics of the model that is kept. Raises TrainingError for latents that are not finite."""
    distributed.same_buffers(run.kept)
    try:
        return evaluate(run.kept, val, run.amp_dtype)
    except ValueError as error:
        raise TrainingError(f"validation of epoch {run.epoch}: {error}; {ADVICE}") from None


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
    if distributed.anyone(due, run.device):
        save(run)
    if run.is_main:
        save_json(run.history, run.dir / files.HISTORY)
    log.info(report.epoch_line(row))


def save(run):
    """Write the best model, where it is a new one, and the state, where --resume starts, in an
    order in which a kill between the two costs nothing."""
    state = run.state_dict() | {"config": run.config}
    if run.best is not None:
        save_checkpoint(run.best, run.dir / files.BEST)
    if run.is_main:
        save_checkpoint(state, run.dir / files.LAST)
    run.best, run.saved = None, time.time()


def evaluate_best(run, splits):
    """Give the best model its bank and score it, without and with that, on val and test."""
    best = distributed.from_main(lambda: load_checkpoint(run.dir / files.BEST, files.BEST_KEYS))
    run.model.load_state_dict(best["model_state_dict"])
    started = time.time()
    pixels = run.settings.stored_pixels("val")
    bank = make_bank(run.model, splits["train"], pixels, run.settings.seed, run.amp_dtype)
    log.info(f"bank: {len(bank.photos):,} photos and {len(bank.texts):,} captions of train, "
             f"{bank.nbytes / 1e6:.1f} MB, made in {time.time() - started:.1f} s")
    results = {split: compare_bank(run.model, splits[split], bank, run.amp_dtype)
               for split in ("val", "test")}
    if run.is_main:
        save_checkpoint(best | {"bank": bank.state_dict()}, run.dir / files.BEST)
        save_json(results | {"beta": BETA}, run.dir / files.BANK)
        save_json(results["test"]["off"], run.dir / files.TEST)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(__doc__.split("\n")[0], argv)
    stop = distributed.StopRequest()
    report.log_to_console(log)
    output_dir = None
    try:
        distributed.start()
        settings, output_dir, checkpoint = distributed.from_main(lambda: files.resolve(args))
        settings = files.on_this_machine(settings, args)
        if args.check:
            check_folders(settings)
            return 0
        device = find_device(settings.device)
        allow_fast_kernels(device)
        if "model" not in args and not args.resume:
            log.info("preset {}: {}".format(*default_model(
                settings.synthetic, settings.device, settings.image_encoder)))
        command = shlex.join(["python", "train_flickr8k_sgd.py", *argv])
        replace = args.overwrite or args.resume
        run, splits = set_up(settings, output_dir, checkpoint, replace, device, command)
        if settings.finetune and device.type == "cpu":
            log.info(f"an epoch will take about {report.duration(epoch_seconds(run, splits))} here")
        with stop.watch():
            fit(run, splits, stop)
        evaluate_best(run, splits)
        if run.is_main:
            log.info(report.summary(files.load_run(output_dir)))
        return 0
    except (UsageError, DataError) as error:
        status, message = 2, f"error: {error}"
    except (TrainingError, CheckpointError, OSError) as error:
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
        if output_dir is not None and (output_dir / files.CONFIG).exists():
            message = f"interrupted; go on with: {files.resume_command(output_dir)}"
    finally:
        distributed.stop()
    report.ProgressLine().clear()
    log.error(message)
    return status


if __name__ == "__main__":
    distributed.leave(main())
