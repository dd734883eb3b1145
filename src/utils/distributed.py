"""Several processes, one a device, on one machine or several, started by torchrun; all of it also
works in a process alone. Machines need not share a disk."""
import contextlib
import datetime
import logging
import os
import signal
import sys

import torch
import torch.distributed as dist

patient = None  # the group of `barrier` and `from_main`


def start():
    """Join the processes that torchrun started, if it did."""
    global patient
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        # In which one may wait for stores to be made, for longer than for a lost process.
        patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))


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
        dist.barrier(patient)


@contextlib.contextmanager
def one_a_machine_first():
    """What stands inside is done by each machine's first process, then by its others, who find its
    files made."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    yield
    if first:
        barrier()


def from_main(make):
    """What `make()` gives in the main process, which may be the one that has the files; what it
    raises there is raised in all."""
    if not dist.is_initialized():
        return make()
    box = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, 0, patient)
    if box[1] is not None:
        raise box[1]
    return box[0]


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
