"""Training by several processes, started by torchrun on one machine or on several.

Each process trains on a device of its own. Every function here also works in a process that was
started alone, where it does nothing or the obvious thing. Machines need not share a disk.
"""
import contextlib
import datetime
import logging
import math
import os
import signal
import sys
import tempfile

import numpy as np
import torch
import torch.distributed as dist

# The process group of `barrier` and `call_on_main`. Its timeout is long because processes wait in
# it while another one decodes all photos.
long_timeout_group = None


def start():
    """Join the process group if torchrun started this process."""
    global long_timeout_group
    if "RANK" in os.environ:
        has_nccl = torch.cuda.is_available() and dist.is_nccl_available()  # not on Windows
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo")
        long_timeout_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))


def stop():
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_process(status):
    """End this process with an exit status.

    Under torchrun it skips the interpreter's clean-up, during which a gloo thread that is still
    freeing its tensors would abort the process.
    """
    if "RANK" in os.environ:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def rank_and_world():
    """Return this process's rank and the number of processes; (0, 1) for a process alone."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def local_rank_and_world():
    """Return this process's number among those of its machine, and how many these are."""
    if not dist.is_initialized():
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def barrier():
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier(long_timeout_group)


@contextlib.contextmanager
def local_main_process_first():
    """Let each machine's first process run the body before the machine's other processes do.

    The others then find the files that the first one wrote.
    """
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not is_first:
        barrier()
    yield
    if is_first:
        barrier()


def call_on_main(function):
    """Call `function()` in the main process only, and return its result in every process.

    An exception that it raises there is raised in every process. The result must be picklable.
    """
    if not dist.is_initialized():
        return function()
    outcome = [None, None]  # the result and the exception
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, 0, long_timeout_group)
    result, error = outcome
    if error is not None:
        raise error
    return result


def gather_objects(objects):
    """Concatenate the lists that all processes pass, in the order of their ranks.

    Every process gets the whole list. The objects must be picklable, and tensors on the CPU.
    """
    if not dist.is_initialized():
        return objects
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, objects)
    return [item for items in lists for item in items]


def any_process(flag, device):
    """Return whether the flag is true in any process; the answer is the same in all of them.

    With several processes this synchronises the device with the host.
    """
    if not dist.is_initialized():
        return flag
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def wrap_in_ddp(module, device):
    """Return a module whose gradients are averaged over all processes.

    A process alone gets the module itself. On GPUs, batch norms are made to use the statistics of
    all processes' photos. That layer has no implementation for CPUs, where each process
    normalises its own photos.
    """
    if not dist.is_initialized():
        return module
    if device.type == "cuda":
        module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return torch.nn.parallel.DistributedDataParallel(module)


def broadcast_buffers(model):
    """Give every process the main process's buffers, such as batch norms' running statistics."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def raise_in_all_processes(error):
    """Raise the first exception that any process passes, in all processes; None means success.

    It also waits for all processes, as a barrier does.
    """
    for raised in gather_objects([error]):
        if raised is not None:
            raise raised


def temporary_file(size):
    """Create a temporary file of so many bytes and return its path. Raises OSError."""
    descriptor, path = tempfile.mkstemp()
    try:
        # Reserve the space now. Otherwise a full disk would kill the process while it writes.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)
    return path


def map_file(path, shape, dtype):
    """Map a file into memory as a NumPy array that can be written to."""
    def opener(path, flags):
        # Windows does not remove a file that is open. With this flag, which other systems lack, it
        # removes the file when the last process has closed it.
        return os.open(path, flags | getattr(os, "O_TEMPORARY", 0))

    with open(path, "r+b", opener=opener) as file:
        return np.memmap(file, dtype, "r+", shape=shape)


def shared_array(shape, dtype):
    """Return a NumPy array of zeros that all processes of this machine share.

    The array is a memory-mapped temporary file, so it may be larger than memory. The file has no
    name once all processes have opened it, and disappears with the last array. All processes must
    call this function together. If one machine's disk is too full, every process of every machine
    raises OSError, so that none waits for another that failed.
    """
    machine = os.environ.get("GROUP_RANK", "0")
    path, error = None, None
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            path = temporary_file(math.prod(shape) * np.dtype(dtype).itemsize)
        except OSError as raised:
            error = raised
    try:
        raise_in_all_processes(error)
        paths = dict(gather_objects([] if path is None else [(machine, path)]))
        try:
            array = map_file(paths[machine], shape, dtype)
        except OSError as raised:
            error = raised
        raise_in_all_processes(error)  # this also waits until all have opened the file
    finally:
        if path is not None:
            with contextlib.suppress(PermissionError):  # on Windows, see `map_file`
                os.unlink(path)
    return array


class StopRequest:
    """Turns Ctrl-C (SIGINT) and SIGTERM into a request that the training loop can look at.

    Inside `watch`, a signal only sets `requested`, so that the loop can save its state first. A
    second signal raises KeyboardInterrupt, and so does any signal outside `watch`. Under torchrun
    a second signal inside `watch` is ignored, because torchrun sends SIGTERM after Ctrl-C.
    """

    def __init__(self):
        self.requested = False
        self.watching = False
        self.ignore_second_signal = False
        for name in ("SIGINT", "SIGTERM", "SIGBREAK"):  # the last one is Windows' Ctrl-Break
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self.handle)

    def handle(self, number, frame):
        """Python's handler of both signals."""
        is_second = self.requested and not self.ignore_second_signal
        if not self.watching or is_second:
            raise KeyboardInterrupt
        self.requested = True

    @contextlib.contextmanager
    def watch(self):
        """Collect signals in `requested` while the body runs."""
        self.watching = True
        self.ignore_second_signal = dist.is_initialized()
        try:
            yield
        finally:
            self.watching = False
