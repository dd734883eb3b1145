"""One training step, and the state of a run: augmentation, forward and backward pass, optimizer,
schedule, moving average, CUDA graphs."""
import contextlib
import copy
import math
import time

import torch
import torch.distributed as dist
from torch.optim.swa_utils import get_ema_multi_avg_fn

from src.device import autocast_dtype, full_float32, memory_format
from src.losses import info_nce_loss
from src.model import IMAGE, TEXT
from src.settings import size_before_crop
from src.utils import distributed
from src.utils.augment import (
    color_jitter,
    drop_words,
    normalize,
    random_resized_crop_and_flip,
    resize,
)
from src.utils.errors import RunError, UsageError

MAX_GRAD_NORM = 1.0
MAX_GRAPHS = 8  # CUDA graphs kept, one for each shape of batch
PROGRESS = ("epoch", "step", "loss_sum", "seconds", "history")  # what a RunState saves of itself
# When pretrained encoders are trained, the learning rate of an encoder's first weights relative to
# that of its last ones, and the number of parts of an encoder that have different ones.
FIRST_LAYER_LR, LAYER_GROUPS = 0.1, 10
ADVICE = "the last good checkpoint is kept; a smaller --lr may help"


# ------------------------------------------------------------------------------------ the step


def training_step(run, batch):
    """One step of a `RunState` on a batch of `iterate_batches` -> the loss, a detached scalar on
    the device. It does not synchronise with the host, except in chunks."""
    augment(run, batch)
    loss = forward_backward(run, batch)
    update(run)
    return loss


def augment(run, batch):
    """Crop, mirror and colour the photos of a batch and drop words of its captions, in place. For
    features of a frozen encoder, and for Fisher vectors, choose those of the photo or of its mirror
    image."""
    images, settings = batch["images"], run.settings
    if images.dtype == torch.float32:  # the benchmark's DataLoader has augmented them
        return
    if images.dtype == torch.uint8:
        layout = memory_format(images.device)
        images = images.contiguous(memory_format=layout)  # as it is stored, except on a Mac's GPU
        size = settings.training_pixels(run.epoch)
        if size_before_crop(size) < images.shape[-1]:
            images = resize(images, size_before_crop(size))
        images = random_resized_crop_and_flip(images / 255.0, size, settings.min_crop,
                                              settings.flip)
        images = normalize(color_jitter(images, settings.color_jitter))
        batch["images"] = images.contiguous(memory_format=layout)
    else:
        mirrored = torch.rand(len(images), 1, device=images.device) < settings.flip
        batch["images"] = torch.where(mirrored, images[:, 1], images[:, 0]).float()
    batch["text"] = drop_words(batch["text"], settings.word_dropout, run.word_start)


def forward_backward(run, batch):
    """Compute new gradients -> the loss, a detached scalar on the device."""
    def compute(batch):
        # A recorded graph writes the gradients to where they were when it was recorded.
        run.optimizer.zero_grad(set_to_none=run.graphs is None)
        return contrastive_backward(run.encode, batch, run.settings.memory_loss,
                                    run.settings.chunk_size, run.scaler.scale)

    return compute(batch) if run.graphs is None else run.graphs(compute, batch)


def update(run):
    """Step the optimizer, the schedule and the moving average with the present gradients."""
    run.scaler.unscale_(run.optimizer)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), MAX_GRAD_NORM)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.scheduler.step()
    run.model.clamp_logit_scale_()
    if run.ema is not None:
        run.ema.update()


# ------------------------------------------------------------------------ forward and backward


class PairEncoder(torch.nn.Module):
    """Everything that a step computes with the model, in one call, as DistributedDataParallel
    requires: photos (P, ...), text (B, L) and the text features, if the model takes some -> image
    latents (P, D), text latents (B, D), logit_scale, and the memory losses (2,) of photos and of
    captions, which are zero unless with_memory_loss."""

    def __init__(self, model, amp_dtype, with_memory_loss=True):
        super().__init__()
        self.model, self.amp_dtype, self.with_memory_loss = model, amp_dtype, with_memory_loss

    def forward(self, images, text, text_features):
        model, enabled = self.model, self.amp_dtype is not None
        with torch.autocast(images.device.type, dtype=self.amp_dtype, enabled=enabled):
            images = model.encode_images(images)
            text = model.encode_text(text, None, text_features)
            image_latents = model.fuse(images, IMAGE)
            text_latents = model.fuse(text, TEXT)
            memory_losses = image_latents.new_zeros(2)
            if self.with_memory_loss:
                memory_losses = torch.stack([model.memory_loss(images), model.memory_loss(text)])
        return image_latents, text_latents, model.logit_scale, memory_losses


def contrastive_backward(encode, batch, memory_loss_weight, chunk_size=0, scale=lambda loss: loss):
    """The forward and backward pass of one step -> the contrastive loss, a detached scalar.

    The loss is computed from the latents of the whole batch, and its gradient with respect to each
    latent is passed on to the encoders. With a chunk_size, the encoders see about that many pairs
    at a time, which saves memory (GradCache, Gao et al. 2021): first without autograd, for the
    loss, then once more for the gradients. Loss and gradients are the same as in one pass if the
    encoders are deterministic, except that batch norm normalises by the chunk.

    encode: a PairEncoder, possibly wrapped in DistributedDataParallel. batch: see
    `iterate_batches`. scale: the method of a GradScaler."""
    images, text, text_features = batch["images"], batch["text"], batch.get("text_features")

    def encode_chunk(photos, captions):
        features = text_features
        if isinstance(features, dict):  # what a pretrained text encoder takes
            features = {name: tensor[captions] for name, tensor in features.items()}
        elif features is not None:
            features = features[captions]
        return encode(images[photos], text[captions], features)

    chunks = split_in_chunks(batch, chunk_size)
    in_one_pass = len(chunks) == 1
    if in_one_pass:
        outputs = [encode_chunk(*chunks[0])]
    else:
        with torch.no_grad(), frozen_statistics(encode):
            outputs = [encode_chunk(*chunk) for chunk in chunks]

    image_latents = torch.cat([output[0].detach() for output in outputs]).requires_grad_()
    text_latents = torch.cat([output[1].detach() for output in outputs]).requires_grad_()
    logit_scale = outputs[0][2].detach().requires_grad_()
    with full_float32():
        loss = info_nce_loss(image_latents, text_latents, logit_scale, batch["photo_ids"],
                             batch.get("text_ids"), batch.get("texts_of_photo"),
                             batch["photo_of_pair"])
        scale(loss).backward()

    for i, (photos, captions) in enumerate(chunks):
        is_last = i == len(chunks) - 1
        # The backward pass of the last chunk exchanges the sum of all gradients.
        exchange_later = hasattr(encode, "no_sync") and not is_last
        with encode.no_sync() if exchange_later else contextlib.nullcontext():
            output = outputs[0] if in_one_pass else encode_chunk(photos, captions)
            chunk_images, chunk_text, chunk_scale, memory_losses = output
            memory_loss = (memory_losses[0] * (len(chunk_images) / len(images))
                           + memory_losses[1] * (len(chunk_text) / len(text)))
            tensors = [chunk_images, chunk_text]
            gradients = [image_latents.grad[photos], text_latents.grad[captions]]
            if memory_loss.requires_grad:
                tensors.append(scale(memory_loss_weight * memory_loss))
                gradients.append(None)
            if is_last:
                tensors.append(chunk_scale)
                gradients.append(logit_scale.grad)
            torch.autograd.backward(tensors, gradients)
    return loss.detach()


def split_in_chunks(batch, chunk_size):
    """The chunks of a batch, of about chunk_size pairs each, as [(slice of photos, slice of
    captions)]; with chunk_size 0 there is one. All processes have equally many, as they wait for
    each other in synchronised batch norm."""
    num_photos, num_pairs = len(batch["images"]), len(batch["text"])
    if not chunk_size or chunk_size >= num_pairs:
        return [(slice(0, num_photos), slice(0, num_pairs))]
    device = batch["text"].device
    fewest = torch.tensor(num_photos, device=device)
    if dist.is_initialized():
        dist.all_reduce(fewest, dist.ReduceOp.MIN)
    num_chunks = min(math.ceil(num_pairs / chunk_size), int(fewest))  # synchronises
    photos = [num_photos * i // num_chunks for i in range(num_chunks + 1)]
    edges = torch.tensor(photos, device=device)
    captions = torch.searchsorted(batch["photo_of_pair"], edges).tolist()  # synchronises
    return [(slice(*photos[i:i + 2]), slice(*captions[i:i + 2])) for i in range(num_chunks)]


@contextlib.contextmanager
def frozen_statistics(module):
    """Inside, batch norm normalises by its batch but does not update its running statistics."""
    norms = [part for part in module.modules() if getattr(part, "track_running_stats", False)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class CudaGraphs:
    """Calls a function through CUDA graphs: its kernels are recorded once and then launched as one,
    because the host takes longer to launch the kernels of a small model than the GPU to run them.

    The function takes a batch, a dict of tensors on a GPU, returns a scalar there, and must not
    synchronise with the host. The tensors that it writes, such as gradients, must keep their places
    in memory. The first batch of a shape runs kernel by kernel, which also lets cuDNN choose its
    kernels; the second is recorded. Beyond MAX_GRAPHS shapes, batches run kernel by kernel."""

    def __init__(self):
        self.seen_shapes, self.graphs, self.pool = set(), {}, None
        self.calls = self.replays = 0

    def __call__(self, function, batch):
        self.calls += 1
        shapes = tuple((name, *tensor.shape) for name, tensor in batch.items())
        if shapes not in self.graphs:
            if shapes not in self.seen_shapes or len(self.graphs) == MAX_GRAPHS:
                self.seen_shapes.add(shapes)
                return function(batch)
            self.graphs[shapes] = self.record(function, batch)
        self.replays += 1
        graph, inputs, result = self.graphs[shapes]
        for name, tensor in batch.items():
            inputs[name].copy_(tensor)
        graph.replay()
        return result.clone()

    def record(self, function, batch):
        """-> the graph, the tensors that it reads, and the one that it writes."""
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        graph = torch.cuda.CUDAGraph()
        # "thread_local", as the thread that prepares the next batch goes on meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = function(inputs)
        self.pool = graph.pool()  # shared by all graphs, as no two run at once
        return graph, inputs, result

    def warning(self):
        """What to tell the user if most steps ran kernel by kernel, else None."""
        if 2 * self.replays >= self.calls:
            return None
        return (f"{self.calls - self.replays:,} of {self.calls:,} steps ran kernel by kernel, "
                f"which is slower: the batches had {len(self.seen_shapes)} shapes, and CUDA graphs "
                f"are kept for {MAX_GRAPHS}. Photos with equally many captions make fewer shapes.")


# ------------------------------------------------- optimizer, schedule, moving average, state


def build_optimizer(model, settings, fused):
    """SGD with Nesterov momentum. Weight decay applies to weight matrices, not to norms and biases.

    The weights of pretrained encoders have a smaller learning rate, see `layer_lrs`, and decay more
    slowly in proportion. Beside a pretrained image encoder, the rest of the model has been trained
    before, and has the same learning rate as the encoder's last layers."""
    groups, lr_of_layer = {}, layer_lrs(model)
    is_second_stage = settings.finetune and settings.image_encoder
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        lr_factor, weight_decay = 1.0, settings.weight_decay
        if part == "text_encoder" and "transformer" not in name:
            lr_factor = settings.text_lr
            weight_decay /= lr_factor  # SGD multiplies the decay by the learning rate
        if name in lr_of_layer:
            lr_factor = settings.finetune * lr_of_layer[name]
        elif is_second_stage:
            lr_factor *= settings.finetune
        if parameter.ndim < 2:
            weight_decay = 0.0
        if parameter.requires_grad:
            groups.setdefault((lr_factor, weight_decay), []).append(parameter)
    groups = [{"params": parameters, "lr": settings.lr * lr_factor, "weight_decay": weight_decay}
              for (lr_factor, weight_decay), parameters in groups.items()]
    return torch.optim.SGD(groups, momentum=settings.momentum, nesterov=True, fused=fused)


def layer_lrs(model):
    """The learning rates of the weights of pretrained encoders relative to that of an encoder's
    last weights, {name: rate}.

    They rise by equal factors from FIRST_LAYER_LR at the input to 1 at the output, because the
    first layers are the most general ones. An encoder's weights are taken to lie in the order in
    which it defines them."""
    rates = {}
    for part in ("image_backbone", "text_backbone"):
        names = [name for name, parameter in model.named_parameters()
                 if name.startswith(f"{part}.") and parameter.requires_grad]
        for i, name in enumerate(names, start=1):
            depth = math.ceil(LAYER_GROUPS * i / len(names))  # from 1 to LAYER_GROUPS
            rates[name] = FIRST_LAYER_LR ** ((LAYER_GROUPS - depth) / (LAYER_GROUPS - 1))
    return rates


def cosine_schedule(warmup, final, total_steps):
    """-> a function from the step to the learning rate relative to its peak: a linear rise over the
    share `warmup` of the steps, times a cosine from 1 to `final` (Loshchilov and Hutter 2017)."""
    warmup_steps = max(1, round(warmup * total_steps))

    def schedule(step):
        cosine = 0.5 * (1 + math.cos(math.pi * step / total_steps))
        return min(1.0, (step + 1) / warmup_steps) * (final + (1 - final) * cosine)

    return schedule


class MovingAverage:
    """Exponential moving average of a model's weights and batch norm statistics, in `module`.

    At first it averages over about the last tenth of the steps so far, as a constant decay would
    carry the random initial weights along. torch.optim.swa_utils.AveragedModel is not used because
    it copies its counter from the host to the GPU at each step."""

    def __init__(self, model, decay):
        self.module, self.decay, self.steps = copy.deepcopy(model), decay, 0
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        averaged, current = self.module.state_dict(), model.state_dict()
        # Weights that are tied have several names, but are averaged once.
        names = list({(tensor.data_ptr(), tensor.shape): name for name, tensor in current.items()
                      if name not in frozen}.values())
        weights = [name for name in names if current[name].is_floating_point()]
        # The tensors keep their places in memory, so these lists are made once.
        self.averaged_weights = [averaged[name] for name in weights]
        self.current_weights = [current[name] for name in weights]
        self.counters = [(averaged[name], current[name]) for name in names if name not in weights]

    def update(self):
        """Take in the model's present weights. Nothing is copied between host and device."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 0.0
        get_ema_multi_avg_fn(decay)(self.averaged_weights, self.current_weights, None)
        for averaged, current in self.counters:
            averaged.copy_(current)
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps, "module": self.module.state_dict()}

    def load_state_dict(self, state):
        self.steps = state["steps"]
        self.module.load_state_dict(state["module"])


class RunState:
    """A model, what trains it, and how far the run has come: all that --resume needs.

    total_steps: the length of the schedule. optimizer: by default that of `build_optimizer`."""

    def __init__(self, settings, model, tokenizer, device, total_steps, optimizer=None):
        self.settings, self.model, self.tokenizer, self.device = settings, model, tokenizer, device
        self.word_start = torch.tensor(tokenizer.word_start, device=device)
        self.amp_dtype = autocast_dtype(settings.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        # The fused optimizer would leave its momentum uninitialised if the scaler skipped the
        # first step because of an overflow.
        fused = device.type in ("cpu", "cuda") and not self.scaler.is_enabled()
        self.optimizer = optimizer or build_optimizer(model, settings, fused)
        schedule = cosine_schedule(settings.warmup, settings.final_lr, total_steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)
        self.ema = MovingAverage(model, settings.ema) if settings.ema else None
        encoder = PairEncoder(model, self.amp_dtype, with_memory_loss=settings.memory_loss > 0)
        self.encode = distributed.wrap_in_ddp(encoder, device)
        self.graphs = CudaGraphs() if self.can_use_graphs() else None
        self.epoch, self.step, self.loss_sum, self.seconds, self.history = 1, 0, 0.0, 0.0, []
        self.unsaved_best = None  # the checkpoint of a new best model that is not on the disk yet
        self.saved_at = time.time()

    def can_use_graphs(self):
        """Whether the step of one GPU never synchronises. float16 has not been tried."""
        synchronises = (self.settings.chunk_size or self.settings.finetune
                        or self.scaler.is_enabled() or distributed.rank_and_world()[1] > 1)
        return self.device.type == "cuda" and not synchronises

    @property
    def evaluated_model(self):
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
        """Restore what `state_dict` gave. Raises UsageError for the state of another model."""
        fused = self.optimizer.param_groups[0]["fused"]
        try:
            for name, part in self.parts().items():
                saved = state[f"{name}_state_dict"]
                if name != "scaler" or saved:  # it is empty where the former device needed none
                    part.load_state_dict(saved)
        except (KeyError, RuntimeError, ValueError):
            raise UsageError("the checkpoint does not fit the model that the config.json beside it "
                             "describes") from None
        for group in self.optimizer.param_groups:
            group["fused"] = fused  # this depends on the device, not on the run
        for name in PROGRESS:
            setattr(self, name, state[name])
