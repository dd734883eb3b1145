"""Train the multimodal memory network on Flickr8k with SGD and a cosine schedule.

    python train_flickr8k_sgd.py --synthetic            the built-in dataset, about a minute on any machine
    python train_flickr8k_sgd.py                        Flickr8k in data/flickr8k (see download_flickr8k.py)
    python train_flickr8k_sgd.py --model small          the preset for a laptop
    torchrun --nproc_per_node=4 train_flickr8k_sgd.py   one process a GPU, the batch shared out among them

Read it from the top: settings, data, model, the loop, the files it leaves. After any interruption, --resume goes on
from the last checkpoint as if nothing had happened: the order of the pairs, the crops and the learning rate follow
from the seed and the step alone, so there is no other random state to restore.
"""
import datetime
import functools
import logging
import math
import platform
import signal
import sys
import time
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel

from src.losses import LatentQueue, contrastive_backward, info_nce_loss
from src.model import PRESETS, MultiModalMemoryNetwork
from src.settings import LOSS_FLAGS, MODEL_FLAGS, UsageError, amp_type, default_arguments, eval_size, find_device, parse_args
from src.utils import distributed, report
from src.utils.augment import color_jitter, drop_words, normalize, random_erasing, random_resized_crop_and_flip
from src.utils.checkpoint import CheckpointError, load_checkpoint, load_json, save_checkpoint, save_json
from src.utils.flickr8k_simple import (DataError, Flickr8kImageTextDataset, epoch_batches, find_caption_file,
                                       iterate_batches, place_photos, read_captions, read_split)
from src.utils.retrieval import compare_test_time_training, evaluate
from src.utils.synthetic import write_synthetic
from src.utils.tokenizers import BPETokenizer, CharTokenizer, tokenizer_from_state

MEMORY_LOSS_WEIGHT = 0.1
STEPS_A_LOOK = 10  # the loss is brought from the device, checked and shown every so many steps: a sync point
SECONDS_A_CHECKPOINT = 300  # inside a long epoch, so that a power cut costs minutes
LAST_KEYS = ("epoch", "step", "loss_sum", "seconds", "model_state_dict", "ema_state_dict", "queue_state_dict",
             "optimizer_state_dict", "scaler_state_dict", "scheduler_state_dict", "history", "config", "tokenizer")


class TrainingError(Exception):
    """The run failed while running; exit status 1."""


def resolve(args):
    """Parsed flags -> (arguments, output_dir, state): every setting of the run, and the checkpoint to go on from.

    Raises UsageError for a folder that holds a run already, for nothing to resume, and for a flag that contradicts
    the run being resumed.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    resume, overwrite = given.pop("resume"), given.pop("overwrite")
    default_dir = "outputs/synthetic_sgd" if args.synthetic else "outputs/flickr8k_sgd"
    output_dir = Path(given.pop("output_dir", default_dir))
    if resume:
        if not (output_dir / report.CONFIG).exists():
            raise UsageError(f"nothing to resume in {output_dir}: it holds no {report.CONFIG}")
        arguments, state = load_json(output_dir / report.CONFIG)["arguments"], None
        if (output_dir / report.LAST).exists():  # else the run was stopped before its first checkpoint: from the start
            state = load_checkpoint(output_dir / report.LAST, LAST_KEYS)
        missing = default_arguments(args).keys() - arguments.keys()
        if missing:
            raise UsageError(f"the run in {output_dir} was begun by another version, which knew no --{min(missing)}; "
                             "start a new run in another --output_dir")
        for name, value in given.items():
            if name in ("data_dir", "device", "num_workers"):  # where it runs, not what is computed
                arguments[name] = value
            elif arguments[name] != value:
                raise UsageError(f"--resume goes on with the run's own --{name} {arguments[name]}, not {value}; "
                                 "leave the flag out, or start a new run in another --output_dir")
        return arguments, output_dir, state
    if output_dir.exists() and not output_dir.is_dir():
        raise UsageError(f"--output_dir {output_dir} is a file, not a folder")
    found = [name for name in report.RUN_FILES if name != report.LOG and (output_dir / name).exists()]
    if found and not overwrite:
        raise UsageError(f"{output_dir} holds a run already ({found[0]}); "
                         "--resume goes on with it, --overwrite deletes it, or name another --output_dir")
    return default_arguments(args), output_dir, None


def find_data(arguments, log):
    """Make the built-in dataset where it is wanted and absent. Raises DataError where there is no data."""
    root = Path(arguments["data_dir"])
    if arguments["synthetic"]:
        if write_synthetic(root):
            log.info(f"made the built-in dataset in {root}")
    elif not root.is_dir():
        raise DataError(f"no Flickr8k in {root}. Either fetch it: python download_flickr8k.py --data_dir {root}\n"
                        "or train on the built-in dataset, no download: python train_flickr8k_sgd.py --synthetic")


def build_tokenizer(arguments):
    """Characters, or byte pairs learned from the captions of the training split."""
    if arguments["tokenizer"] == CharTokenizer.name:
        return CharTokenizer()
    root = Path(arguments["data_dir"])
    captions = read_captions(find_caption_file(root))
    return BPETokenizer.learn((text for name in read_split(root, "train") for text in captions.get(name, [])),
                              arguments["vocab_size"])


def load_data(arguments, tokenizer, log):
    """The three splits. Training photos are kept an eighth larger than the model takes, for the crops to choose from."""
    root, line, splits = Path(arguments["data_dir"]), report.ProgressLine(), {}
    for split in ("train", "val", "test"):
        size = arguments["image_size"] * 8 // 7 if split == "train" else eval_size(arguments)
        splits[split] = data = Flickr8kImageTextDataset(
            root, split, size, tokenizer, arguments["allow_incomplete"], num_workers=arguments["num_workers"] or None,
            progress=lambda done, total: done % 50 == 0 and line.update(f"reading {split}: {done} of {total} photos"))
        line.clear()
        if data.left_out:
            log.info(f"{split}: {len(data.left_out)} photos left out, among them {data.left_out[0]}")
    if len(splits["train"]) < 2:
        raise DataError(f"{root}: training needs at least two pairs")
    return splits


def build_model(arguments, tokenizer):
    """-> the model, on the CPU, and what it was made with. Raises UsageError for sizes that do not fit."""
    model_arguments = dict(PRESETS[arguments["model"]], vocab_size=tokenizer.vocab_size, **{
        name: arguments[name] for name in MODEL_FLAGS})
    try:
        model = MultiModalMemoryNetwork(**model_arguments)
    except ValueError as error:
        raise UsageError(f"these sizes make no model: {error}") from None
    if eval_size(arguments) % model.image_encoder.patch_size:
        raise UsageError(f"--eval_size {eval_size(arguments)} is not a multiple of patch_size={model.image_encoder.patch_size}")
    with torch.no_grad():
        model.logit_scale.fill_(-math.log(arguments["temperature"]))
        model.clamp_logit_scale_()
    return model, model_arguments


def build_optimizer(model, arguments):
    """SGD with Nesterov momentum. Weight decay shrinks matrices; norms, biases and other vectors are left alone."""
    groups = []
    for text in (False, True):
        factor = arguments["text_lr"] if text else 1.0
        for decays in (False, True):
            groups.append({
                "params": [parameter for name, parameter in model.named_parameters()
                           if name.startswith("text_encoder.") == text and (parameter.ndim > 1) == decays],
                "lr": arguments["lr"] * factor,
                "weight_decay": arguments["weight_decay"] / factor if decays else 0.0})  # a step shrinks by lr * decay
    fused = torch.device(arguments["device"]).type in ("cpu", "cuda")
    return torch.optim.SGD(groups, momentum=arguments["momentum"], nesterov=True, fused=fused)


def build_loss(arguments, queue=None):
    """`info_nce_loss` with what the recipe adds to it."""
    return functools.partial(info_nce_loss, queue=queue, **{name: arguments[name] for name in LOSS_FLAGS})


def moving_average(model, decay):
    """-> an AveragedModel, None without a decay. The average begins short, over about a tenth of the steps so far: an
    exponential one would carry the random weights of the start along for several times 1 / (1 - decay) steps."""
    def average(averaged, now, steps):
        share = 1 - ((1 + steps) / (10 + steps)).clamp(max=decay)
        return averaged.lerp(now, share) if averaged.is_floating_point() else now

    return AveragedModel(model, avg_fn=average, use_buffers=True) if decay else None  # the buffers are batch norm's


def cosine_schedule(warmup, final, total_steps):
    """-> step -> multiple of the peak learning rate: up in a line over the share `warmup` of the steps, times a cosine
    from 1 to `final`."""
    warmup_steps = max(1, round(warmup * total_steps))
    return lambda step: min(1.0, (step + 1) / warmup_steps) * (
        final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / total_steps)))


class StopRequest:
    """Ctrl-C and SIGTERM while the loop runs: finish the step, save, stop. A second one, or one outside the loop,
    stops at once; but not under torchrun, which sends SIGTERM after Ctrl-C of its own accord."""

    def __init__(self):
        self.in_loop = self.requested = self.patient = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if not self.in_loop or (self.requested and not self.patient):
            raise KeyboardInterrupt
        self.requested = True


class PairEncoder(torch.nn.Module):
    """What a step computes of the model, in one call, as DistributedDataParallel wants it."""

    def __init__(self, model, amp_dtype):
        super().__init__()
        self.model, self.amp_dtype = model, amp_dtype

    def forward(self, images, text):
        with torch.autocast(images.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            of_images, of_text = self.model(images=images), self.model(text=text)
        return (of_images["central_latent"], of_text["central_latent"], self.model.logit_scale,
                torch.stack([of_images["memory_loss"], of_text["memory_loss"]]))


def augment(batch, arguments, word_start):
    """Crop, mirror, colour and blank the photos of a batch, drop words of its captions; in place of what was there."""
    images = random_resized_crop_and_flip(batch["images"] / 255.0, arguments["image_size"], arguments["min_crop"],
                                          arguments["flip"])
    images = normalize(color_jitter(images, arguments["color_jitter"]))
    images = random_erasing(images, arguments["erasing"])
    batch["images"] = images.contiguous(memory_format=torch.channels_last)
    batch["text"] = drop_words(batch["text"], arguments["word_dropout"], word_start)
    if arguments["compile"]:
        torch._dynamo.mark_dynamic(batch["text"], 1)  # one kernel for all lengths


def update(model, optimizer, scaler, clip_grad, ema=None):
    """The optimizer's step with the gradients that are there, and the moving average's."""
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scaler.step(optimizer)
    scaler.update()
    model.clamp_logit_scale_()
    if ema is not None:
        ema.update_parameters(model)


def train(arguments, output_dir, state, device, stop, log):
    """One run, from its settings to its files. `state` is the checkpoint to go on from, None for a run from the start."""
    rank, world = distributed.rank_and_world()
    with distributed.main_process_first():
        find_data(arguments, log)
    tokenizer = build_tokenizer(arguments) if state is None else tokenizer_from_state(state["tokenizer"])

    torch.manual_seed(arguments["seed"])
    model, model_arguments = build_model(arguments, tokenizer)
    model.to(device, memory_format=torch.channels_last)

    with distributed.main_process_first():  # which makes the photo store
        splits = load_data(arguments, tokenizer, log)
    data, photos = splits["train"], place_photos(splits["train"].photos, device)

    def batches_of(epoch):
        batches = epoch_batches(data.photo_of_caption, arguments["captions_per_image"], arguments["batch_size"],
                                arguments["seed"] * 1_000_003 + epoch)
        share = len(batches[0]) // world  # this process's pairs of every batch
        return [batch[rank * share:(rank + 1) * share] for batch in batches]

    steps_an_epoch, pairs_a_step = len(batches_of(1)), len(batches_of(1)[0]) * world
    if not pairs_a_step:
        raise UsageError(f"a batch has fewer pairs than there are processes ({world})")

    if rank == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        if state is None:  # what --overwrite deletes, now that nothing else can be wrong
            for name in report.RUN_FILES:
                (output_dir / name).unlink(missing_ok=True)
        to_file = logging.FileHandler(output_dir / report.LOG, encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s  %(message)s"))
        log.addHandler(to_file)

    optimizer = build_optimizer(model, arguments)
    word_start = torch.tensor(tokenizer.word_start, device=device)
    total_steps = steps_an_epoch * arguments["epochs"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_schedule(
        arguments["warmup"], arguments["final_lr"], total_steps))

    ema = moving_average(model, arguments["ema"])
    judged = model if ema is None else ema.module  # what is validated and kept
    queue = LatentQueue(arguments["queue_size"], arguments["latent_dim"]).to(device) if arguments["queue_size"] else None
    contrast = build_loss(arguments, queue)

    amp_dtype = amp_type(arguments)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)

    config = {
        "arguments": arguments,
        "model": model_arguments,
        "optimizer": {"name": "SGD", "momentum": arguments["momentum"], "nesterov": True, "peak lr": arguments["lr"],
                      "text encoder's lr": arguments["lr"] * arguments["text_lr"],
                      "schedule": f"linear warm-up over {arguments['warmup']:.0%} of the steps, then cosine to "
                                  f"{arguments['final_lr']:.0%} of the peak",
                      "weight decay": arguments["weight_decay"], "gradient clipping": arguments["clip_grad"],
                      "moving average": arguments["ema"]},
        "precision": report.precision_name(amp_dtype),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": (f"{world} x " if world > 1 else "") + report.device_name(device),
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
        "date": datetime.date.today().isoformat() if state is None else state["config"]["date"],
        "data": {name: report.data_counts(split) for name, split in splits.items()},
    }
    epoch, step_in_epoch, loss_sum, seconds_before, history = 1, 0, 0.0, 0.0, []
    if state is not None:
        try:
            model.load_state_dict(state["model_state_dict"])
            for part, name in ((ema, "ema_state_dict"), (queue, "queue_state_dict")):
                if part is not None:
                    part.load_state_dict(state[name])
            optimizer.load_state_dict(state["optimizer_state_dict"])
        except (RuntimeError, ValueError):
            raise UsageError(f"{output_dir / report.LAST} is of another model than {report.CONFIG} beside it") from None
        scheduler.load_state_dict(state["scheduler_state_dict"])
        scaler.load_state_dict(state["scaler_state_dict"])
        if state["config"]["data"] != config["data"]:
            raise UsageError(f"{arguments['data_dir']} is not the dataset that the run in {output_dir} began with")
        epoch, step_in_epoch, loss_sum = state["epoch"], state["step"], state["loss_sum"]
        seconds_before, history = state["seconds"], state["history"]
        log.info(f"resumed at epoch {epoch}, step {step_in_epoch}")
    encode = PairEncoder(model, amp_dtype)
    if arguments["compile"]:
        encode.compile()
    if world > 1:
        if device.type == "cuda":  # on a CPU there is none: each process normalises its own photos
            encode = torch.nn.SyncBatchNorm.convert_sync_batchnorm(encode)
        # No broadcast of buffers at every call: with chunks, processes may make different numbers of calls.
        encode = torch.nn.parallel.DistributedDataParallel(encode, broadcast_buffers=False)

    def save(write, value, name):
        if rank == 0:
            write(value, output_dir / name)

    def save_last():
        if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
            raise TrainingError(f"the weights are no longer finite in epoch {epoch}, step {step_in_epoch}; {advice}")
        save(save_checkpoint, {
            "epoch": epoch, "step": step_in_epoch, "loss_sum": loss_sum, "seconds": seconds_before + time.time() - began,
            "model_state_dict": model.state_dict(), "ema_state_dict": ema and ema.state_dict(),
            "queue_state_dict": queue and queue.state_dict(), "optimizer_state_dict": optimizer.state_dict(),
            "scaler_state_dict": scaler.state_dict(), "scheduler_state_dict": scheduler.state_dict(),
            "history": history, "config": config, "tokenizer": tokenizer.state_dict()}, report.LAST)

    if history:
        save(save_json, history, report.HISTORY)  # a kill may have come between this file and the checkpoint
    save(save_json, config, report.CONFIG)
    log.info(f"{arguments['model']}: {config['parameters']:,} parameters, {config['precision']}, on {config['device']}")
    log.info(f"{len(data):,} pairs of {len(data.names):,} photos in {arguments['data_dir']}: {arguments['epochs']} "
             f"epochs of {steps_an_epoch} steps of {pairs_a_step} pairs")
    advice = f"the last good checkpoint is kept in {output_dir}. A smaller --lr may help."
    line, run_began, first_step = report.ProgressLine(rank == 0), time.time(), (epoch - 1) * steps_an_epoch + step_in_epoch
    model.train()
    stop.patient, stop.in_loop = world > 1, True
    while epoch <= arguments["epochs"]:
        began = saved = time.time()
        losses = []  # on the device, since the last look
        for batch in iterate_batches(data, photos, batches_of(epoch)[step_in_epoch:], device):
            step = (epoch - 1) * steps_an_epoch + step_in_epoch
            torch.manual_seed((arguments["seed"] * 1_000_003 + step) * world + rank)  # whatever came before this step
            augment(batch, arguments, word_start)
            optimizer.zero_grad(set_to_none=True)
            losses.append(contrastive_backward(encode, batch, MEMORY_LOSS_WEIGHT, arguments["chunk_size"], scaler.scale,
                                               contrast))
            update(model, optimizer, scaler, arguments["clip_grad"], ema)
            lr = optimizer.param_groups[0]["lr"]
            scheduler.step()
            step_in_epoch += 1

            due = time.time() - saved > SECONDS_A_CHECKPOINT
            at_once = world == 1 and (stop.requested or due)  # several processes must agree, which they do at a look
            if len(losses) == STEPS_A_LOOK or step_in_epoch == steps_an_epoch or at_once:
                for i, loss in enumerate(torch.stack(losses).tolist(), start=step_in_epoch - len(losses) + 1):  # a sync
                    if not math.isfinite(loss):
                        raise TrainingError(f"the loss became {loss} in epoch {epoch}, step {i}; {advice}")
                    loss_sum += loss
                losses = []
                done = step + 1 - first_step
                left = (total_steps - step - 1) * (time.time() - run_began) / done
                line.update(f"epoch {epoch}/{arguments['epochs']}  step {step_in_epoch}/{steps_an_epoch}  loss {loss:.3f}  "
                            f"{done * pairs_a_step / (time.time() - run_began):.0f} pairs/s  {report.duration(left)} left")
                stopping, due = distributed.anyone(stop.requested, device), distributed.anyone(due, device)
                if (stopping or due) and step_in_epoch < steps_an_epoch:
                    save_last()
                    saved = time.time()
                    if stopping:
                        raise KeyboardInterrupt

        line.update(f"epoch {epoch}/{arguments['epochs']}  validating")
        distributed.same_buffers(judged)
        try:
            metrics = evaluate(judged, splits["val"], amp_dtype)
        except ValueError as error:  # embeddings that are not finite
            raise TrainingError(f"validation after epoch {epoch}: {error}; {advice}") from None
        row = {"epoch": epoch, "train": {"loss": loss_sum / steps_an_epoch}, "val": metrics,
               "lr": lr, "seconds": seconds_before + time.time() - began}
        # In this order a kill between any two files costs nothing: the checkpoint decides where --resume starts.
        if metrics["avg_r1"] > max((other["val"]["avg_r1"] for other in history), default=-1.0):
            save(save_checkpoint, {"epoch": epoch, "model_state_dict": judged.state_dict(), "metrics": metrics,
                                   "config": config, "tokenizer": tokenizer.state_dict()}, report.BEST)
        history.append(row)
        epoch, step_in_epoch, loss_sum, seconds_before, began = epoch + 1, 0, 0.0, 0.0, time.time()
        save_last()
        save(save_json, history, report.HISTORY)
        line.clear()
        log.info(report.epoch_line(row))
        if distributed.anyone(stop.requested, device):
            raise KeyboardInterrupt
    stop.in_loop = False

    distributed.barrier()  # until rank 0 has written the best model
    model.load_state_dict(load_checkpoint(output_dir / report.BEST, report.BEST_KEYS)["model_state_dict"])
    if model.memory is not None:
        save(save_json, {split: compare_test_time_training(model, splits[split], amp_dtype) for split in ("val", "test")},
             report.TEST_TIME)
    save(save_json, evaluate(model, splits["test"], amp_dtype), report.TEST)


def main(argv=None):
    args = parse_args(__doc__.split("\n")[0], argv)
    stop = StopRequest()
    log = logging.getLogger("flickr8k_sgd")
    log.setLevel(logging.INFO)
    to_stdout, to_stderr = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    to_stdout.addFilter(lambda record: record.levelno < logging.ERROR and distributed.rank_and_world()[0] == 0)
    to_stderr.setLevel(logging.ERROR)
    log.addHandler(to_stdout)
    log.addHandler(to_stderr)
    output_dir = None
    try:
        arguments, output_dir, state = resolve(args)
        device = distributed.start(find_device(arguments["device"]))
        train(arguments, output_dir, state, device, stop, log)
        if distributed.rank_and_world()[0] == 0:
            log.info(report.summary(report.load_run(output_dir)))
        return 0
    except (UsageError, DataError) as error:
        status, message = 2, f"error: {error}"
    except torch.OutOfMemoryError:
        status, message = 1, ("error: the device is out of memory; a smaller --chunk_size, --batch_size or --model "
                              "needs less")
    except (TrainingError, CheckpointError, OSError) as error:
        status, message = 1, f"error: {error}"
    except RuntimeError as error:
        rank, world = distributed.rank_and_world()
        if world == 1:
            raise
        status, message = 1, (f"error: process {rank} of {world} lost the others ({str(error).splitlines()[0]}); "
                              "go on from the last checkpoint with --resume")
    except KeyboardInterrupt:
        begun = output_dir is not None and (output_dir / report.CONFIG).exists()
        status, message = 130, "interrupted; " + (
            f"go on with: python train_flickr8k_sgd.py --resume --output_dir {output_dir}" if begun else "nothing was begun")
    finally:
        distributed.stop()
    report.ProgressLine().clear()
    log.error(message)
    return status


if __name__ == "__main__":
    sys.exit(main())
