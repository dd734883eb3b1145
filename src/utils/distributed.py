"""Several processes, one a device, started by torchrun; all of it also works in a process alone."""
import contextlib
import logging
import os
import signal
import sys

import torch
import torch.distributed as dist


def start(device):
    """Join the processes that torchrun started, if it did."""
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(status):
    """End the process. One of several does so without the interpreter's own clean-up, in which a
    thread of gloo's that still frees its tensors would abort it."""
    if "RANK" in os.environ:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def barrier():
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_process_first():
    """What stands inside is done by rank 0, then by the others, who find its files made."""
    if rank_and_world()[0] > 0:
        barrier()
    yield
    if rank_and_world()[0] == 0:
        barrier()


def rank_and_world():
    """This process's number and how many there are: 0 and 1 for one alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def anyone(flag, device):
    """Whether the flag is up in any process, the same answer in all. A sync if there are many."""
    if not dist.is_initialized():
        return flag
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def parallel(encode, device):
    """The module as it is in a process alone; one whose gradients are exchanged among several."""
    if not dist.is_initialized():
        return encode
    if device.type == "cuda":  # on a CPU there is none: each process normalises its own photos
        encode = torch.nn.SyncBatchNorm.convert_sync_batchnorm(encode)
    return torch.nn.parallel.DistributedDataParallel(encode)


def same_buffers(model):
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def collect(items):
    """A list of each process, tensors on the CPU -> one list of all."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for items in lists for item in items]


class StopRequest:
    """Ctrl-C and SIGTERM: inside `watch` they only set `requested`, so that the state can be saved.
    A second one, or one outside, raises KeyboardInterrupt; not so under torchrun, which sends
    SIGTERM after Ctrl-C."""

    def __init__(self):
        self.watching = self.requested = self.patient = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if not self.watching or (self.requested and not self.patient):
            raise KeyboardInterrupt
        self.requested = True

    @contextlib.contextmanager
    def watch(self):
        self.watching, self.patient = True, dist.is_initialized()
        yield
        self.watching = False
