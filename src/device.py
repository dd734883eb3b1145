"""The device that a run computes on, its precision, and float32 on demand."""
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import os
import platform
import re
from pathlib import Path

import torch

from src.utils.errors import UsageError

GPU_MEMORY, HOST_MEMORY = "the GPU's memory", "this machine's memory"
# How exceptions of PyTorch say, in small letters, that a memory is full.
GPU_IS_FULL = ("cuda error: out of memory", "cublas_status_alloc_failed", "mps backend out of mem")
HOST_IS_FULL = ("defaultcpuallocator", "not enough memory", "cannot allocate memory", "bad_alloc",
                "bad allocation")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from glibc's malloc.h


def find_device(name=None):
    """The torch.device of that name, or the best one of this machine, as CUDA's current device.
    Under torchrun each process takes the GPU of its own number and touches no other. Raises
    UsageError for a device that is not there."""
    if name is None:
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    try:
        device = torch.device(name)
        if device.type == "cuda":  # set_device needs a number
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()  # of "meta", for one, there are no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        if full_memory(error):
            raise
        raise UsageError(f"--device {name} is not available on this machine") from None
    return device


def full_memory(error):
    """Return GPU_MEMORY or HOST_MEMORY if an exception says that this memory is full, else None."""
    text = str(error).lower()
    is_runtime_error = isinstance(error, RuntimeError)
    if isinstance(error, torch.OutOfMemoryError):
        return GPU_MEMORY
    if is_runtime_error and any(sign in text for sign in GPU_IS_FULL):
        return GPU_MEMORY
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return HOST_MEMORY
    if is_runtime_error and any(sign in text for sign in HOST_IS_FULL):
        return HOST_MEMORY
    return None


def memory_advice(memory, settings, resume):
    """Return what helps a run whose memory is full. settings: None if they are not known yet.
    resume: whether they can no longer be changed, as the run was begun with them."""
    if settings is None:
        return "close other programs"
    flags = ["--batch_size", "--model"]
    if not settings.image_encoder:
        flags.insert(1, "--image_size")
    smaller = f"a smaller {', '.join(flags[:-1])} or {flags[-1]}"
    chunk_size = min(100, (settings.chunk_size or settings.batch_size) // 2)
    needs_less = f"--chunk_size {chunk_size} needs less, and so does {smaller}"
    if not chunk_size:
        needs_less = f"{smaller} needs less"
    if not resume:
        return needs_less
    where = "with other programs closed or on a larger machine"
    if memory == GPU_MEMORY:
        where += ", or with --device cpu"
    return f"--resume continues the same run, {where}; in a new run, {needs_less}"


def amp_is_faster(device):
    """Whether mixed precision is faster: on CUDA, and on CPUs that multiply bfloat16 matrices."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))
    return device.type == "cuda"


def autocast_dtype(amp, device):
    """The data type of mixed precision on this device, None for float32. amp: True, False, or None
    for whichever is faster. bfloat16 is preferred: it has the range of float32 and needs no loss
    scaling."""
    if not (amp_is_faster(device) if amp is None else amp):
        return None
    if device.type == "cuda":
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bfloat16 = device.type == "cpu"
    return torch.bfloat16 if bfloat16 else torch.float16


def memory_format(device):
    """The layout of photos, and of the weights of convolutions, on a device: channels last, which
    is the fastest, except on the GPU of a Mac, where the gradients of batch norm would be wrong
    (https://github.com/pytorch/pytorch/issues/175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def eigh(matrix):
    """torch.linalg.eigh, on the CPU if the matrix is on the GPU of a Mac, for which PyTorch has it
    only since version 2.14."""
    if matrix.device.type != "mps":
        return torch.linalg.eigh(matrix)
    values, vectors = torch.linalg.eigh(matrix.cpu())
    return values.to(matrix.device), vectors.to(matrix.device)


def keep_freed_memory():
    """Let the C library keep memory that is freed instead of giving it back to the system. Return
    whether it does.

    A training step takes and frees the same large blocks again and again, and each page that comes
    from the system anew has to be cleared first. To be called before large tensors are made. It is
    of use with glibc only; others, such as musl or those of macOS and Windows, stay as they are."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Blocks of up to 1 GiB come from the heap. Some versions of glibc allow 32 MiB at most.
    heap_is_used = mallopt(M_MMAP_THRESHOLD, 2 ** 30) or mallopt(M_MMAP_THRESHOLD, 2 ** 25)
    return bool(heap_is_used and mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1))


def allow_fast_kernels(device):
    """On CUDA, allow TF32 in products of float32 matrices (see `full_float32` for where it is not
    allowed) and let cuDNN choose the fastest convolutions."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def device_name(device):
    """The name of the GPU or of the processor, as results are reported with it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():  # on Linux platform.processor() is empty or vague
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        match = re.search(r"\nmodel name\s*: (.*)\n", cpuinfo)
        processor = match[1] if match else processor
    return f"{device.type} ({processor}, {torch.get_num_threads()} threads)"


def describe(settings, device, processes=1):
    """What a result depends on: settings, precision, hardware, versions and date."""
    dtype = autocast_dtype(settings.amp, device)
    precision = f"mixed, {str(dtype).removeprefix('torch.')}" if dtype else "float32"
    name = device_name(device)
    return {"settings": dataclasses.asdict(settings), "precision": precision,
            "device": f"{processes} x {name}" if processes > 1 else name,
            "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
            "date": datetime.date.today().isoformat()}


@contextlib.contextmanager
def full_float32():
    """Inside, float32 matrices are multiplied in float32, even where TF32 is allowed outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
