"""When a training says that its machine is busy, from made-up times."""
import types

import pytest
import torch

from src import busy_machine
from src.busy_machine import BusyMachine, advice

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def active_waiting(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


@pytest.mark.parametrize("seconds, threads, load, fewer", [
    # Two threads on two cores: wall time, computing of the process and of its main thread.
    ((100, 60, 30), 2, 2.0, 1),  # less than a third of the time, whatever the load says
    ((60, 63, 34), 2, 4.8, 1),  # other programs, and a core for half of the time
    ((60, 63, 34), 2, 3.0, None),  # the load is that of the training itself
    ((60, 110, 57), 2, 9.0, None),  # other programs that have ended
    ((60, 60, 58), 2, 3.1, None),  # one thread has nothing to do
    ((100, 25, 25), 1, 9.0, None),  # one thread waits for none
    ((30, 100, 8), 16, 40.0, 3),  # sixteen threads, which had about three cores
    ((30, 40, 28), 16, 3.0, None),  # a small model does not occupy them
])
def test_signs_of_a_busy_machine(seconds, threads, load, fewer):
    expected = fewer and ("this machine is busy: OMP_WAIT_POLICY=PASSIVE or fewer threads "
                          f"(OMP_NUM_THREADS={fewer}) may be faster")
    assert advice(*seconds, threads, 1, threads, load) == expected


def test_processes_of_one_training_are_no_other_programs():
    seconds = 60, 63, 34
    assert advice(*seconds, 2, 4, 8, 12.0) is None and advice(*seconds, 2, 1, 8, 12.0)


def test_threads_that_do_not_wait_actively_get_no_advice(monkeypatch):
    assert advice(100, 60, 30, 2, 1, 2, 2.0)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert advice(100, 60, 30, 2, 1, 2, 2.0) is None


@pytest.mark.parametrize("calls, said", [
    ([(20, False), (40, False), (50, True)], [False, True, False]),  # a long epoch
    ([(5, False), (9, True), (40, False)], [False, True, False])])
def test_the_advice_is_given_once_when_enough_is_measured(monkeypatch, calls, said):
    times = iter([(0, 0, 0), *((wall, wall / 2, wall / 4) for wall, _ in calls)])
    monkeypatch.setattr(busy_machine, "clocks", lambda: next(times))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    machine = BusyMachine(CPU)
    assert [machine.advice(is_over) is not None for _, is_over in calls] == said


def test_on_a_gpu_there_is_no_advice():
    machine = BusyMachine(types.SimpleNamespace(type="cuda"))
    machine.began = (-100, 0, 0)
    assert machine.advice(True) is None
