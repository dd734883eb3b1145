"""Whether other programs slow a training on the CPU down, and what may help then.

The threads that share an operation wait for one another actively, which is the fastest way as long
as each has a core to itself. Where other programs take the cores away, the threads that have one
spend their time waiting for those that have none."""
import os
import time

import torch

from src.utils import distributed

# How many times as long as its threads have computed an epoch may take before the machine counts as
# busy: where the load average says so, too, and where it does not.
SLOWDOWN_WITH_LOAD, SLOWDOWN = 1.5, 3.0
ENOUGH_SECONDS = 30


class BusyMachine:
    """Measures the first epoch, or ENOUGH_SECONDS of it. The main thread makes it when the epoch
    begins."""

    def __init__(self, device):
        self.is_open = device.type == "cpu"  # whether something may still be said
        self.began = clocks()

    def advice(self, epoch_is_over):
        """What to tell the user, or None. It is said once, when enough has been measured."""
        if not self.is_open:
            return None
        seconds = [now - before for now, before in zip(clocks(), self.began)]
        if seconds[0] < ENOUGH_SECONDS and not epoch_is_over:
            return None
        self.is_open = False
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        processes = distributed.local_rank_and_world()[1]
        return advice(*seconds, torch.get_num_threads(), processes, os.cpu_count() or 1, load)


def clocks():
    """The seconds of the clock, and those that this process and this thread have computed."""
    return time.time(), time.process_time(), time.thread_time()


def advice(wall, process, thread, threads, processes, cores, load):
    """What to tell the user after `wall` seconds of training, or None.

    process, thread: seconds that the process and its main thread have computed meanwhile, active
    waiting included. On a quiet machine the main thread computes nearly all the time. load: the
    load average of the machine, to which each of the `processes` contributes its threads, and one
    that prepares the batches.

    The machine is busy if that thread, and all threads on average, had a core for less than a third
    of the time. If the load says that other programs use more cores than this training leaves free,
    less than two thirds of the time are enough. The load alone is not, as it still counts programs
    that have ended."""
    if threads == 1 or os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        return None  # no thread waits actively
    load_of_others = load - processes * (threads + 1)
    is_crowded = load_of_others > max(0, cores - processes * threads)
    computed = max(thread, process / threads)
    if wall <= (SLOWDOWN_WITH_LOAD if is_crowded else SLOWDOWN) * computed:
        return None
    fewer = min(threads - 1, max(1, round(process / wall)))
    return ("this machine is busy: OMP_WAIT_POLICY=PASSIVE or fewer threads "
            f"(OMP_NUM_THREADS={fewer}) may be faster")
