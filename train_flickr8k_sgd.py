"""Train the multimodal memory network on Flickr8k with SGD and a cosine schedule.

    python train_flickr8k_sgd.py --synthetic            the built-in shapes, half a minute
    python train_flickr8k_sgd.py                        Flickr8k (see download_flickr8k.py)
    torchrun --nproc_per_node=4 train_flickr8k_sgd.py   one process per GPU; they share the batch
    python train_flickr8k_sgd.py --init_from outputs/flickr8k_sgd --data_dir my_photos

Read it from the top: the model, what happens before the first step, the training loop `fit`, and
what is written at the end of an epoch and of the run. One step is in `src/training.py`.

A run that is stopped and continued with --resume ends on a CPU with exactly the weights of an
uninterrupted one: the order of the pairs, the augmentation and the learning rate follow from the
seed and the number of the step, and the rest is in the checkpoint."""
import logging
import math
import sys
import time

from src.settings import for_contrastive_pair, parse_args

if __name__ == "__main__":
    # --help and wrong arguments are answered before torch is imported, which takes seconds.
    parse_args(__doc__.split("\n")[0])

import torch

from src import report, runs
from src.bank import BETA
from src.busy_machine import BusyMachine
from src.device import (
    allow_fast_kernels,
    describe,
    find_device,
    full_memory,
    keep_freed_memory,
    memory_advice,
    memory_format,
)
from src.encoder_sources import load_encoders
from src.encoders import NO_ENCODERS
from src.evaluation import compare_bank, evaluate, make_bank
from src.first_stage import (
    SEED_STRIDE,
    batches_of_epoch,
    estimate_epoch_seconds,
    first_weights,
    prepare_splits,
    set_temperature,
)
from src.fisher import build_network
from src.training import ADVICE, RunState, training_step
from src.utils import distributed
from src.utils.augment import normalize, resize
from src.utils.console import (
    ProgressLine,
    counted,
    duration,
    log_to_console,
    say_once,
    shell_command,
)
from src.utils.errors import RunError, UsageError, first_line
from src.utils.flickr8k_simple import iterate_batches, place_photos
from src.utils.splits import check_folders, load_splits
from src.utils.tokenizers import tokenizer_from_state

log = logging.getLogger("flickr8k_sgd")
LOG_INTERVAL = 10  # steps between two looks at the loss, each of which waits for the device
STEM_PHOTOS = 1000  # training photos to which the first filters are fit
CHECKPOINT_INTERVAL = 60  # seconds; a power cut costs no more training than this


def build_model(settings, tokenizer, encoders=NO_ENCODERS, photos=None):
    """The model, on the CPU. Its first filters are fit to `photos`, those of a training split, if
    these are given. Raises UsageError for sizes that do not fit each other."""
    try:
        model = build_network(tokenizer.vocab_size, settings, encoders.feature_widths)
    except ValueError as error:
        raise UsageError(f"invalid model size: {error}") from None
    if encoders.image is None:
        multiple = model.image_encoder.stride
        for side in (settings.start_size, settings.image_size, settings.eval_pixels):
            if side % multiple:
                raise UsageError(f"photos of {side} pixels: the side must be a multiple of "
                                 f"{multiple}; change --image_size")
        if photos is not None:
            rows = torch.linspace(0, len(photos) - 1, min(STEM_PHOTOS, len(photos))).long()
            sample = resize(photos[rows], settings.training_pixels(1))
            model.image_encoder.stem.fit(normalize(sample))
    set_temperature(model, settings.temperature)
    return model


# ------------------------------------------------------------------------ before the first step


def set_up(settings, output_dir, checkpoint, initial, args, device, command):
    """Load or make everything that the loop needs, and the run's folder -> (run, splits). initial:
    the InitialModel to begin with, or None."""
    rank, world = distributed.rank_and_world()
    is_new = checkpoint is None and initial is None
    settings_are_new = is_new and not args.resume  # a run may be resumed from its beginning
    settings, encoders = set_up_encoders(settings, args, device, settings_are_new)
    tokenizer = None
    if checkpoint is not None:
        encoders.check_unchanged(checkpoint["config"], output_dir)
        tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
    elif initial is not None:
        initial.check_encoders(encoders)
        tokenizer = tokenizer_from_state(initial.best["tokenizer"])
    has_two_stages, features = settings.finetune > 0 and encoders.image is not None, None
    # One process of a machine fills the cache, the others read it.
    with distributed.local_main_process_first(), say_once(log):
        splits, tokenizer = load_splits(settings, tokenizer, encoders.image, encoders.text)
        if has_two_stages and is_new:
            with encoders.frozen():
                features, _ = load_splits(settings, tokenizer, encoders.image, encoders.text,
                                          announce=False)
    train = splits["train"]
    torch.manual_seed(settings.seed)
    model = build_model(settings, tokenizer, encoders, train.photos)
    model.to(device, memory_format=memory_format(device))
    batches = batches_of_epoch(train, settings, 1)
    if not batches.numel():
        raise UsageError(f"a batch has fewer pairs than there are processes ({world})")

    seconds, first_loss = 0.0, None
    if checkpoint is None:
        splits["train"], seconds, first_loss = first_weights(
            settings, model, encoders, tokenizer, train, features, initial, device)
    elif settings.finetune:
        encoders.attach(model, settings)
    run = RunState(settings, model, tokenizer, device, len(batches) * settings.epochs)
    run.seconds, run.first_loss = seconds, first_loss
    run.dir, run.is_main = output_dir, rank == 0
    # Epoch 0 comes before the first step of this loop.
    run.epoch = 0 if encoders.is_contrastive_pair or has_two_stages or initial is not None else 1
    run.config = describe_run(settings, encoders, model, splits, device, command)
    if initial is not None:
        seen_before = initial.seen_before(run.config, splits["val"].names)
        run.config["init_from"] = initial.describe() | {"seen_before": seen_before}
    if checkpoint is not None:
        config_before = checkpoint["config"]
        run.config |= {name: config_before[name] for name in ("date", "command", "init_from")
                       if name in config_before}
        runs.check_same_data(config_before, run.config, settings.data_dir)
        run.load_state_dict(checkpoint)
    splits = prepare_splits(run, splits)
    if run.is_main:
        runs.open_output_dir(output_dir, run.config, run.history, checkpoint is None,
                             args.overwrite or args.resume, log)

    log.info(f"{settings.model}: {run.config['parameters']:,} parameters, "
             f"{run.config['precision']}, on {run.config['device']}")
    log.info(f"{len(train):,} pairs of {len(train.names):,} photos in {settings.data_dir}: "
             f"{counted(settings.epochs, 'epoch')} of {counted(len(batches), 'step')} of "
             f"{len(batches[0]) * world} pairs")
    for note in report.notes_on_the_splits(run.config):
        log.info(note)
    if settings.finetune and device.type == "cpu":
        seconds = estimate_epoch_seconds(run, splits)
        log.info(f"an epoch will take about {duration(seconds)} on this machine")
    if checkpoint is not None:
        resume_schedule(run, config_before["settings"]["epochs"])
    return run, splits


def set_up_encoders(settings, args, device, settings_are_new):
    """-> the settings that fit the pretrained encoders, and the encoders. settings_are_new: whether
    the settings are not those of an earlier run."""
    encoders = load_encoders(settings, device)
    if encoders.is_contrastive_pair and settings_are_new:
        settings = for_contrastive_pair(settings, vars(args))
    for encoder in encoders:
        if not encoder.frozen:
            encoder.freeze_unused()  # an encoder that cannot be trained is refused here
        item = "photo" if encoder is encoders.image else "caption"
        how = "once; the features are stored" if encoder.frozen else "in each step and is trained"
        rule = f" ({encoder.rule})" if encoder.rule else ""
        log.info(f"{encoder.name} encodes every {item} {how}: {encoder.width} features{rule}")
    if encoders.are_two_halves:
        log.info(f"{encoders.image.name} and {encoders.text.name} are taken for the two halves of "
                 f"one {encoders.image.half_of} model; if they are not, epoch 0 is no better than "
                 "chance")
    return encoders.fit_settings(settings), encoders


def describe_run(settings, encoders, model, splits, device, command):
    """What config.json says about a run. Raises UsageError if the processes have different data or
    different encoders."""
    world = distributed.rank_and_world()[1]
    fingerprints = {name: split.fingerprint() for name, split in splits.items()}
    if any(other != fingerprints for other in distributed.gather_objects([fingerprints])):
        raise UsageError(f"{settings.data_dir}: photos, captions or their order differ between the "
                         "machines")
    if any(other != encoders.describe()
           for other in distributed.gather_objects([encoders.describe()])):
        raise UsageError("the pretrained encoders differ between the processes; their files must "
                         "be the same on all machines, and a function must not draw weights at "
                         "random without a fixed seed")
    train = splits["train"]
    return describe(settings, device, world) | {
        "command": command, "encoders": encoders.describe(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": {name: split.counts() for name, split in splits.items()},
        "layout": train.folders[0].layout, "extra_data": train.extra_data,
        "fingerprints": fingerprints}


def resume_schedule(run, epochs_before):
    """Log where the run continues, and set the learning rates if --epochs has changed. The run then
    continues on the schedule of one that was started with that many epochs, so the learning rate
    jumps to where that schedule is now."""
    epochs, groups, schedule = run.settings.epochs, run.optimizer.param_groups, run.scheduler
    if run.epoch > epochs:
        more = runs.resume_command(run.dir, "--epochs", "N")
        log.info(f"the run is finished; to train it further: {more}")
        return
    log.info(f"resumed at epoch {run.epoch}, step {run.step}")
    if epochs != epochs_before:
        before = groups[0]["lr"]
        for group, multiple in zip(groups, schedule.lr_lambdas):
            group["lr"] = group["initial_lr"] * multiple(schedule.last_epoch)
        log.info(f"the schedule is now that of {epochs} epochs instead of {epochs_before}: the "
                 f"learning rate changes from {before:.3g} to {groups[0]['lr']:.3g}")


# -------------------------------------------------------------------------------------- the loop


def fit(run, splits, stop):
    """Train from where the run stands to its last epoch. Raises RunError if a loss or a weight is
    not finite, and KeyboardInterrupt, after saving, if a stop was requested."""
    settings, data, device = run.settings, splits["train"], run.device
    photos = place_photos(data.photos, device)
    rank, world = distributed.rank_and_world()
    line, steps_done = ProgressLine(), 0
    if run.epoch == 0:  # of CLIP as it is, of the first stage of fine-tuning, or of another run
        began, val = time.time() - run.seconds, validate(run, splits["val"], line)
        line.clear()
        end_epoch(run, {"epoch": 0, "train": {"loss": run.first_loss}, "val": val, "lr": 0.0,
                        "seconds": time.time() - began})
    run.model.train()
    machine = BusyMachine(device)
    while run.epoch <= settings.epochs:
        batches = batches_of_epoch(data, settings, run.epoch)
        steps, pairs = len(batches), len(batches[0]) * world
        began, losses = time.time() - run.seconds, []
        for batch in iterate_batches(data, photos, batches[run.step:], device):
            step = (run.epoch - 1) * steps + run.step
            # The random numbers of a step depend on its number alone, so that --resume is exact.
            torch.manual_seed((settings.seed * SEED_STRIDE + step) * world + rank)
            lr = run.optimizer.param_groups[0]["lr"]
            losses.append(training_step(run, batch))
            run.step += 1
            steps_done += 1

            epoch_is_over = run.step == steps
            save_is_due = time.time() - run.saved_at > CHECKPOINT_INTERVAL
            # Several processes must agree to save or to stop. They do so when they log.
            act_now = world == 1 and (stop.requested or save_is_due)
            if len(losses) == LOG_INTERVAL or epoch_is_over or act_now:
                first_step = run.step - len(losses) + 1
                for i, loss in enumerate(torch.stack(losses).tolist()):  # waits for the device
                    if not math.isfinite(loss):
                        raise RunError(f"the loss became {loss} in epoch {run.epoch}, step "
                                       f"{first_step + i}; {ADVICE}")
                    run.loss_sum += loss
                losses, run.seconds = [], time.time() - began
                speed = line.speed(steps_done, settings.epochs * steps - step - 1, pairs)
                line.update(f"epoch {run.epoch}/{settings.epochs}  step {run.step}/{steps}  "
                            f"loss {loss:.3f}  {speed}")
                slowed_down = machine.advice(epoch_is_over)
                if slowed_down:
                    line.clear()
                    log.info(slowed_down)
                stopping = distributed.any_process(stop.requested, device)
                save_is_due = distributed.any_process(save_is_due, device)
                if (stopping or save_is_due) and not epoch_is_over:
                    save(run)
                    if stopping:
                        raise KeyboardInterrupt

        row = {"epoch": run.epoch, "train": {"loss": run.loss_sum / steps},
               "val": validate(run, splits["val"], line), "lr": lr, "seconds": time.time() - began}
        line.clear()
        if run.epoch == 1 and run.graphs is not None and run.graphs.warning():
            log.info(run.graphs.warning())
        stopping = distributed.any_process(stop.requested, device)
        end_epoch(run, row, stopping)
        if stopping:
            raise KeyboardInterrupt


def validate(run, val, line):
    """The metrics of the model that is kept. line: the ProgressLine that shows how far it is.
    Raises RunError for latents that are not finite."""
    progress = line.counter(f"epoch {run.epoch}/{run.settings.epochs}  validating")
    distributed.broadcast_buffers(run.evaluated_model)
    try:
        return evaluate(run.evaluated_model, val, run.amp_dtype, progress)
    except ValueError as error:
        raise RunError(f"validation of epoch {run.epoch}: {error}; {ADVICE}") from None


def end_epoch(run, row, stopping=False):
    """Add the epoch to the history, remember the best model, save what is due, and log the epoch.
    """
    best = max((old["val"]["avg_r1"] for old in run.history), default=-1.0)
    if row["val"]["avg_r1"] > best and run.is_main:
        state = run.evaluated_model.state_dict()
        weights = {name: tensor.clone() for name, tensor in state.items()}
        run.unsaved_best = {
            "epoch": run.epoch, "model_state_dict": weights, "metrics": row["val"],
            "config": run.config, "tokenizer": run.tokenizer.state_dict(), "bank": None}
    run.history.append(row)
    run.epoch, run.step, run.loss_sum, run.seconds = run.epoch + 1, 0, 0.0, 0.0
    save_is_due = (stopping or len(run.history) == 1 or run.epoch > run.settings.epochs
                   or time.time() - run.saved_at > CHECKPOINT_INTERVAL)
    if distributed.any_process(save_is_due, run.device):
        save(run)
    if run.is_main:
        runs.save_json(run.history, run.dir / runs.HISTORY)
    log.info(report.epoch_line(row, run.config))


def save(run):
    """Write the best model, if there is a new one, and then the checkpoint for --resume. In this
    order, a kill between the two loses nothing."""
    state = run.state_dict() | {"config": run.config}
    if run.unsaved_best is not None:
        runs.save_checkpoint(run.unsaved_best, run.dir / runs.BEST)
    if run.is_main:
        runs.save_checkpoint(state, run.dir / runs.LAST)
    run.unsaved_best, run.saved_at = None, time.time()


def evaluate_best(run, splits):
    """Give the best model its bank, and score it without and with the bank on val and test."""
    best = distributed.call_on_main(
        lambda: runs.load_checkpoint(run.dir / runs.BEST, runs.BEST_KEYS))
    run.model.load_state_dict(best["model_state_dict"])
    began, line = time.time(), ProgressLine()
    pixels = run.settings.stored_pixels("val")
    bank = make_bank(run.model, splits["train"], pixels, run.settings.seed, run.amp_dtype,
                     line.counter("making the bank"))
    line.clear()
    log.info(f"bank: {len(bank.photos):,} training photos with {len(bank.texts):,} captions, "
             f"{bank.nbytes / 1e6:.1f} MB, made in {time.time() - began:.1f} s")
    results = {split: compare_bank(run.model, splits[split], bank, run.amp_dtype,
                                   line.counter(f"evaluating on {split}"))
               for split in ("val", "test")}
    line.clear()
    if run.is_main:
        runs.save_checkpoint(best | {"bank": bank.state_dict()}, run.dir / runs.BEST)
        runs.save_json(results | {"beta": BETA}, run.dir / runs.BANK)
        runs.save_json(results["test"]["without_bank"], run.dir / runs.TEST)


# -------------------------------------------------------------------------------------- the main


def main(argv=None):
    """Train, or continue, or check the data -> the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(__doc__.split("\n")[0], argv)
    stop = distributed.StopRequest()
    log_to_console(log)
    keep_freed_memory()
    settings = output_dir = run = None
    try:
        distributed.start()
        settings, output_dir, checkpoint, initial = distributed.call_on_main(
            lambda: runs.resolve(args))
        settings = runs.on_this_machine(settings, args)
        if args.check:
            check_folders(settings)
            return 0
        device = find_device(settings.device)
        allow_fast_kernels(device)
        command = shell_command(["python", "train_flickr8k_sgd.py", *argv])
        run, splits = set_up(settings, output_dir, checkpoint, initial, args, device, command)
        with stop.watch():
            fit(run, splits, stop)
        evaluate_best(run, splits)
        if run.is_main:
            log.info(report.ending(runs.load_run(output_dir)))
        return 0
    except UsageError as error:
        status, message = 2, f"error: {error}"
    except (RunError, OSError, MemoryError, RuntimeError) as error:
        status, message = 1, f"error: {error}"
        rank, world = distributed.rank_and_world()
        memory = full_memory(error)
        if memory:
            message = f"error: {memory} is full; {memory_advice(memory, settings, args.resume)}"
        elif isinstance(error, RuntimeError) and world > 1:
            message = (f"error: process {rank} of {world} lost the others ({first_line(error)}); "
                       "continue from the last checkpoint with --resume")
        elif not isinstance(error, (RunError, OSError)):
            raise
    except KeyboardInterrupt:
        status, message = 130, "interrupted before the run began"
        has_begun = run is not None or not args.overwrite  # else the folder holds an earlier run
        if has_begun and output_dir is not None and (output_dir / runs.CONFIG).exists():
            message = f"interrupted; to continue: {runs.resume_command(output_dir)}"
    finally:
        distributed.stop()
    ProgressLine().clear()
    log.error(message)
    return status


if __name__ == "__main__":
    distributed.exit_process(main())
