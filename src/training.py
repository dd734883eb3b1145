"""What trains a model, and how far it has come: all that --resume needs."""
import contextlib
import copy
import math
import time

import torch
import torch.distributed as dist

from src.device import autocast_dtype, full_float32
from src.losses import info_nce_loss
from src.model import IMAGE, TEXT
from src.settings import uncropped
from src.utils import distributed
from src.utils.augment import (
    color_jitter,
    drop_words,
    normalize,
    random_resized_crop_and_flip,
    resize,
)
from src.utils.errors import RunError, UsageError

PROGRESS = ("epoch", "step", "loss_sum", "seconds", "history")  # of a run
ADVICE = "the last good checkpoint is kept; a smaller --lr may help"


def build_optimizer(model, settings, fused):
    """SGD with Nesterov momentum. Weight decay shrinks matrices, not norms, biases and the like; a
    pretrained encoder's, less than the others as it learns more slowly."""
    groups = {}
    for name, parameter in model.named_parameters():
        part, factor, weight_decay = name.split(".")[0], 1.0, settings.weight_decay
        if part == "text_encoder" and "transformer" not in name:
            factor = settings.text_lr
            weight_decay /= factor  # which multiplies it
        elif part in ("image_backbone", "text_backbone"):
            factor = settings.finetune
        key = (factor, weight_decay if parameter.ndim > 1 else 0.0)
        if parameter.requires_grad:
            groups.setdefault(key, []).append(parameter)
    groups = [{"params": parameters, "lr": settings.lr * factor, "weight_decay": weight_decay}
              for (factor, weight_decay), parameters in groups.items()]
    groups.sort(key=lambda group: group["lr"] != settings.lr)  # what is logged is --lr's
    return torch.optim.SGD(groups, momentum=settings.momentum, nesterov=True, fused=fused)


def cosine_schedule(warmup, final, total_steps):
    """-> step -> multiple of the peak learning rate: up in a line over the share `warmup` of the
    steps, times a cosine from 1 to `final`."""
    warmup_steps = max(1, round(warmup * total_steps))

    def schedule(step):
        cosine = 0.5 * (1 + math.cos(math.pi * step / total_steps))
        return min(1.0, (step + 1) / warmup_steps) * (final + (1 - final) * cosine)

    return schedule


class MovingAverage:
    """Exponential moving average of a model's weights and of batch norm's statistics, in `module`.
    It begins short, over a tenth of the steps so far: a constant decay would carry the random
    weights of the start along."""

    def __init__(self, model, decay):
        self.module, self.decay, self.steps = copy.deepcopy(model), decay, 0
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        averaged, now = self.module.state_dict(), model.state_dict()  # which keep their places
        pairs = [(averaged[name], now[name]) for name in now if name not in frozen]
        self.floats = tuple(zip(*(pair for pair in pairs if pair[1].is_floating_point())))
        self.counts = [pair for pair in pairs if not pair[1].is_floating_point()]  # batch norm's

    def update(self):
        """Take in the model's weights of now; nothing is copied between host and device."""
        steps = torch.tensor(self.steps)  # on the host
        share = 1 - ((1 + steps) / (10 + steps)).clamp(max=self.decay).item()
        torch._foreach_lerp_(*self.floats, share if self.steps else 1.0)
        for averaged, now in self.counts:
            averaged.copy_(now)
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps, "module": self.module.state_dict()}

    def load_state_dict(self, state):
        self.steps = state["steps"]
        self.module.load_state_dict(state["module"])


class RunState:
    """A model, what trains it, and how far the run has come; it saves and restores itself.
    total_steps: of the schedule. optimizer: `build_optimizer`'s by default."""

    def __init__(self, settings, model, tokenizer, device, total_steps, optimizer=None):
        self.settings, self.model, self.tokenizer, self.device = settings, model, tokenizer, device
        self.word_start = torch.tensor(tokenizer.word_start, device=device)
        self.amp_dtype = autocast_dtype(settings.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        # A first step that the scaler skips for overflow would leave fused momentum uninitialised.
        fused = device.type in ("cpu", "cuda") and not self.scaler.is_enabled()
        self.optimizer = optimizer or build_optimizer(model, settings, fused)
        schedule = cosine_schedule(settings.warmup, settings.final_lr, total_steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)
        self.ema = MovingAverage(model, settings.ema) if settings.ema else None
        self.encode = distributed.wrap_in_ddp(PairEncoder(model, self.amp_dtype), device)
        self.graphs = None  # but where a step is a GPU's alone; float16 was not tried
        if device.type == "cuda" and distributed.rank_and_world()[1] == 1 and not (
                settings.chunk_size or settings.finetune or self.scaler.is_enabled()):
            self.graphs = CudaGraphs()
        self.epoch, self.step, self.loss_sum, self.seconds, self.history = 1, 0, 0.0, 0.0, []
        self.best, self.saved = None, time.time()  # a best model to be saved; when that was done

    @property
    def kept(self):
        """The model that is validated and kept: the moving average, where there is one."""
        return self.model if self.ema is None else self.ema.module

    def parts(self):
        names = ("model", "ema", "optimizer", "scaler", "scheduler")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def state_dict(self):
        """What --resume needs. Raises RunError for weights that are not finite."""
        if not all(torch.isfinite(p).all() for p in self.model.parameters()):
            raise RunError(f"the weights are no longer finite in epoch {self.epoch}, step "
                                f"{self.step}; {ADVICE}")
        state = {f"{name}_state_dict": part.state_dict() for name, part in self.parts().items()}
        state |= {name: getattr(self, name) for name in PROGRESS}
        return state | {"tokenizer": self.tokenizer.state_dict()}

    def load_state_dict(self, state):
        """Raises UsageError for the state of another model."""
        fused = self.optimizer.param_groups[0]["fused"]
        try:
            for name, part in self.parts().items():
                saved = state[f"{name}_state_dict"]
                if name != "scaler" or saved:  # empty where the device before needed none
                    part.load_state_dict(saved)
        except (KeyError, RuntimeError, ValueError):
            raise UsageError("the checkpoint is of another model than the config beside it"
                             ) from None
        for group in self.optimizer.param_groups:  # as it suits this device
            group["fused"] = fused
        for name in PROGRESS:
            setattr(self, name, state[name])




class PairEncoder(torch.nn.Module):
    """What a step computes of the model in one call: photos (P, ...), text (B, L), and the features
    of that, where the model takes such -> image latents (P, D), text latents (B, D), logit_scale,
    and memory losses (2,) of photos and of captions."""

    def __init__(self, model, amp_dtype):
        super().__init__()
        self.model, self.amp_dtype = model, amp_dtype

    def forward(self, images, text, text_features):
        model, enabled = self.model, self.amp_dtype is not None
        with torch.autocast(images.device.type, dtype=self.amp_dtype, enabled=enabled):
            images = model.encode_images(images)
            text = model.encode_text(text, None, text_features)
            latents = model.fuse(images, IMAGE), model.fuse(text, TEXT)
            memory_losses = torch.stack([model.memory_loss(images), model.memory_loss(text)])
        return *latents, model.logit_scale, memory_losses


def split_in_chunks(batch, chunk_size):
    """-> [(slice of photos, slice of captions)] of a batch, about chunk_size pairs each, 0 for all.
    All processes have as many, as they wait for each other in synchronised batch norm."""
    num_photos, num_pairs = len(batch["images"]), len(batch["text"])
    if not chunk_size or chunk_size >= num_pairs:
        return [(slice(0, num_photos), slice(0, num_pairs))]
    device = batch["text"].device
    fewest = torch.tensor(num_photos, device=device)
    if dist.is_initialized():
        dist.all_reduce(fewest, dist.ReduceOp.MIN)
    num_chunks = min(math.ceil(num_pairs / chunk_size), int(fewest))  # a sync
    photos = [num_photos * i // num_chunks for i in range(num_chunks + 1)]
    edges = torch.tensor(photos, device=device)
    captions = torch.searchsorted(batch["photo_of_pair"], edges).tolist()  # a sync
    return [(slice(*photos[i:i + 2]), slice(*captions[i:i + 2])) for i in range(num_chunks)]


@contextlib.contextmanager
def frozen_statistics(module):
    """Batch norm goes on normalising by its batch, but takes no running statistics from it."""
    norms = [part for part in module.modules() if getattr(part, "track_running_stats", False)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def contrastive_backward(encode, batch, memory_loss_weight, chunk_size=0, scale=lambda loss: loss):
    """One training step's forward and backward pass -> the contrastive loss, a detached scalar.

    encode: a PairEncoder, perhaps in DistributedDataParallel. batch: see `iterate_batches`. scale:
    GradScaler.scale.

    The loss is taken from the latents of the whole batch, and its gradient of each is passed on to
    the encoders. With a chunk_size these see that many pairs at a time, to save memory (GradCache,
    Gao et al. 2021): first without a graph, for the loss, then once more. Loss and gradients are
    the same, if nothing in the encoders is left to chance, except that batch norm sees a chunk."""
    images, text, photo_of_pair = batch["images"], batch["text"], batch["photo_of_pair"]
    text_features = batch.get("text_features")

    def encode_chunk(photos, captions):
        features = text_features
        if isinstance(features, dict):  # what a pretrained text encoder takes
            features = {name: tensor[captions] for name, tensor in features.items()}
        elif features is not None:
            features = features[captions]
        return encode(images[photos], text[captions], features)

    chunks = split_in_chunks(batch, chunk_size)
    whole = len(chunks) == 1
    if whole:
        outputs = [encode_chunk(*chunks[0])]
    else:
        with torch.no_grad(), frozen_statistics(encode):
            outputs = [encode_chunk(*chunk) for chunk in chunks]

    image_latents, text_latents = (
        torch.cat([output[i].detach() for output in outputs]).requires_grad_() for i in range(2))
    logit_scale = outputs[0][2].detach().requires_grad_()
    with full_float32():
        loss = info_nce_loss(image_latents[photo_of_pair], text_latents, logit_scale,
                             batch["photo_ids"][photo_of_pair])
        scale(loss).backward()

    for i, (photos, captions) in enumerate(chunks):
        last = i == len(chunks) - 1  # whose backward pass exchanges the sum of all gradients
        alone = hasattr(encode, "no_sync") and not last
        with encode.no_sync() if alone else contextlib.nullcontext():
            output = outputs[0] if whole else encode_chunk(photos, captions)
            *latents, chunk_scale, memory_losses = output
            memory_loss = (memory_losses[0] * (len(latents[0]) / len(images))
                           + memory_losses[1] * (len(latents[1]) / len(text)))
            tensors = list(latents)
            gradients = [image_latents.grad[photos], text_latents.grad[captions]]
            if memory_loss.requires_grad:
                tensors.append(scale(memory_loss_weight * memory_loss))
                gradients.append(None)
            if last:
                tensors.append(chunk_scale)
                gradients.append(logit_scale.grad)
            torch.autograd.backward(tensors, gradients)
    return loss.detach()


MEMORY_LOSS_WEIGHT = 0.1
CLIP_GRAD = 1.0  # largest norm of the gradient


def augment(run, batch):
    """Crop, mirror and colour the photos of a batch, drop words of its captions; in its place. Of
    photos that are features, take those of the mirror image instead."""
    images, settings = batch["images"], run.settings
    if images.dtype == torch.float32:  # a DataLoader's processes have done it
        return
    if images.dtype == torch.uint8:
        size = settings.training_pixels(run.epoch)
        if uncropped(size) < images.shape[-1]:
            images = resize(images, uncropped(size))
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


MOST_GRAPHS = 8  # of as many shapes of batches; others run kernel by kernel


class CudaGraphs:
    """Calls functions of a batch, a dict of tensors on a GPU, that give a scalar there, and of
    which the host learns nothing meanwhile.

    The first batch of a shape runs kernel by kernel, whose fastest are chosen then; the second is
    recorded. What the function leaves behind, such as gradients, must keep its place in memory."""

    def __init__(self):
        self.seen, self.graphs, self.pool = set(), {}, None

    def __call__(self, function, batch):
        shapes = tuple((name, *tensor.shape) for name, tensor in batch.items())
        if shapes not in self.graphs:
            if shapes not in self.seen or len(self.graphs) == MOST_GRAPHS:
                self.seen.add(shapes)
                return function(batch)
            self.graphs[shapes] = self.record(function, batch)
        graph, inputs, result = self.graphs[shapes]
        for name, tensor in batch.items():
            inputs[name].copy_(tensor)
        graph.replay()
        return result.clone()

    def record(self, function, batch):
        """-> graph, the tensors that it reads, and the one that it writes."""
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        graph = torch.cuda.CUDAGraph()
        # The thread that prepares the next batch goes on meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = function(inputs)
        self.pool = graph.pool()  # of all, as no two run at once
        return graph, inputs, result


