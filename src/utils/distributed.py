"""Several processes, one a device, started by torchrun; everything here also works in a process on its own."""
import contextlib
import os

import torch
import torch.distributed as dist


def start(device):
    """Join the processes that torchrun started, if it did -> the device of this one."""
    if "RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop():
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_process_first():
    """What stands inside is done by rank 0 first, and only then by the others: they find its files made."""
    if rank_and_world()[0] > 0:
        barrier()
    yield
    if rank_and_world()[0] == 0:
        barrier()


def rank_and_world():
    """This process's number and how many there are: 0 and 1 for a process on its own."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def anyone(flag, device):
    """Whether the flag is up in any process, the same answer in all of them. A sync point where there are several."""
    if not dist.is_initialized():
        return flag
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def same_buffers(model):
    """Rank 0's buffers (statistics of batch norm) for all."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def collect(items):
    """A list of each process, tensors on the CPU -> one list of all, the same in every process."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for items in lists for item in items]
