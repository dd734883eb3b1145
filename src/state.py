"""What trains a model, and how far it has come: all that --resume needs."""
import copy
import math
import time

import torch

from src.cuda_graphs import CudaGraphs
from src.losses import PairEncoder
from src.settings import UsageError, amp_type
from src.utils import distributed

PROGRESS = ("epoch", "step", "loss_sum", "seconds", "history")  # of a run
ADVICE = "the last good checkpoint is kept; a smaller --lr may help"


class TrainingError(Exception):
    """The run failed while running; exit status 1."""


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
        self.amp_dtype = amp_type(settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        # A first step that the scaler skips for overflow would leave fused momentum uninitialised.
        fused = device.type in ("cpu", "cuda") and not self.scaler.is_enabled()
        self.optimizer = optimizer or build_optimizer(model, settings, fused)
        schedule = cosine_schedule(settings.warmup, settings.final_lr, total_steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)
        self.ema = MovingAverage(model, settings.ema) if settings.ema else None
        self.encode = distributed.parallel(PairEncoder(model, self.amp_dtype), device)
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
        """What --resume needs. Raises TrainingError for weights that are not finite."""
        if not all(torch.isfinite(p).all() for p in self.model.parameters()):
            raise TrainingError(f"the weights are no longer finite in epoch {self.epoch}, step "
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
