import platform
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src import device
from src.device import (
    allow_fast_kernels,
    autocast_dtype,
    describe,
    find_device,
    full_float32,
    keep_freed_memory,
    memory_format,
)
from src.settings import make_settings
from src.utils.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def set_cpu_capabilities(monkeypatch, *names):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True for name in names})


@pytest.fixture
def restored_precision():
    """Restores the precision of matrix products after the test, and returns it."""
    before = torch.get_float32_matmul_precision()
    yield before
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("capability", ["amx_bf16", "avx512_bf16"])
def test_mixed_precision_is_the_default_on_cpus_that_multiply_bfloat16(monkeypatch, capability):
    set_cpu_capabilities(monkeypatch, capability)
    assert autocast_dtype(None, CPU) == torch.bfloat16
    assert autocast_dtype(False, CPU) is None


def test_float32_is_the_default_on_other_cpus(monkeypatch):
    set_cpu_capabilities(monkeypatch, "avx2")
    assert autocast_dtype(None, CPU) is None
    assert autocast_dtype(True, CPU) == torch.bfloat16


@pytest.mark.parametrize("supported, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_mixed_precision_is_bfloat16_on_gpus_that_have_it(monkeypatch, supported, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    assert autocast_dtype(None, CUDA) == dtype
    assert autocast_dtype(False, CUDA) is None


def test_description_names_the_precision_and_the_number_of_processes():
    one = describe(make_settings(amp=False), CPU)
    two = describe(make_settings(amp=True), CPU, processes=2)
    assert (one["precision"], two["precision"]) == ("float32", "mixed, bfloat16")
    assert one["device"].startswith("cpu (") and two["device"] == f"2 x {one['device']}"


def test_an_unavailable_device_is_refused():
    assert find_device("cpu") == CPU
    for name in ("cuda:99", "abacus", "meta", "hpu"):
        with pytest.raises(UsageError, match=f"--device {name} is not available on this machine"):
            find_device(name)


@pytest.mark.parametrize(
    "name, local_rank, index",
    [("cuda", None, 0), ("cuda:1", None, 1), ("cuda", "0", 0), ("cuda", "3", 3)],
)
def test_each_process_touches_one_gpu_only(monkeypatch, name, local_rank, index):
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set", device)))
    def zeros(size, device):
        calls.append(("used", device))
        return torch.empty(size)

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    expected = torch.device("cuda", index)  # set_device needs the number
    assert find_device(name) == expected
    assert calls == [("set", expected), ("used", expected)]


def test_fast_kernels_are_allowed_on_cuda_only(monkeypatch, restored_precision):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    allow_fast_kernels(CPU)
    assert torch.get_float32_matmul_precision() == restored_precision
    assert not torch.backends.cudnn.benchmark
    allow_fast_kernels(CUDA)
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.benchmark


def test_full_float32_ends_with_its_block_even_after_an_error(restored_precision):
    torch.set_float32_matmul_precision("high")
    with pytest.raises(ZeroDivisionError), full_float32():
        assert torch.get_float32_matmul_precision() == "highest"
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "high"


CPU_ALLOCATOR = ("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                 "allocate memory: you tried to allocate 6 bytes. Error code 12 (Cannot allocate "
                 "memory)")


@pytest.mark.parametrize("error, memory", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), device.GPU_MEMORY),
    (RuntimeError("CUDA error: out of memory"), device.GPU_MEMORY),
    (RuntimeError(CPU_ALLOCATOR), device.HOST_MEMORY), (MemoryError(), device.HOST_MEMORY),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), device.HOST_MEMORY),
    (OSError(12, "Cannot allocate memory"), device.HOST_MEMORY),
    (OSError(28, "No space left on device"), None), (RuntimeError("out of range"), None),
    (ValueError("not enough memory"), None)])
def test_which_memory_is_full(error, memory):
    assert device.full_memory(error) == memory


def test_numpy_and_torch_say_that_the_memory_is_full():
    for allocate in (lambda: np.ones(2 ** 62, np.uint8), lambda: torch.ones(2 ** 60)):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            allocate()
        assert device.full_memory(caught.value) == device.HOST_MEMORY


def test_advice_for_a_full_memory():
    settings = make_settings(batch_size=500)
    advice = device.memory_advice(device.HOST_MEMORY, settings, resume=False)
    assert advice.startswith("--chunk_size 100 needs less") and "--image_size" in advice
    resumed = device.memory_advice(device.GPU_MEMORY, settings, resume=True)
    assert "--device cpu" in resumed and resumed.index("in a new run") < resumed.index("--chunk")
    settings = make_settings(batch_size=500, chunk_size=60, image_encoder="resnet50")
    advice = device.memory_advice(device.HOST_MEMORY, settings, resume=False)
    assert "--chunk_size 30" in advice and "--image_size" not in advice
    settings = make_settings(batch_size=500, chunk_size=1)
    assert "--chunk" not in device.memory_advice(device.HOST_MEMORY, settings, resume=False)


PAGES_FROM_THE_SYSTEM = """
import resource, torch
from src.device import keep_freed_memory

def pages(times=10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(20_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(20_000_000)
before = pages()
assert keep_freed_memory()
pages()  # until the heap has grown
print(before, pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept():
    """In a process of its own, as it cannot be undone."""
    output = subprocess.run([sys.executable, "-c", PAGES_FROM_THE_SYSTEM], capture_output=True,
                            text=True, check=True).stdout
    before, after = map(int, output.split())
    if before < 100:
        pytest.skip("this system does not take freed memory back")
    assert after < before / 5


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_a_c_library_that_is_not_glibc_stays_as_it_is(monkeypatch, error):
    def no_mallopt(name):
        raise error

    monkeypatch.setattr(device.ctypes, "CDLL", no_mallopt)
    assert not keep_freed_memory()


@pytest.mark.parametrize("largest", [2 ** 25, 2 ** 31 - 1])
def test_a_glibc_that_refuses_a_large_threshold_gets_a_smaller_one(monkeypatch, largest):
    accepted = {}

    def mallopt(parameter, value):
        if parameter == device.M_MMAP_THRESHOLD and value > largest:
            return 0
        accepted[parameter] = value
        return 1

    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert keep_freed_memory()
    assert accepted[device.M_MMAP_THRESHOLD] == min(largest, 2 ** 30)
    assert accepted[device.M_TRIM_THRESHOLD] == 2 ** 31 - 1


def test_channels_last_except_on_the_gpu_of_a_mac():
    assert memory_format(torch.device("mps")) == torch.contiguous_format
    for name in ("cpu", "cuda"):
        assert memory_format(torch.device(name)) == torch.channels_last
