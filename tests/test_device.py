import pytest
import torch

from src.device import allow_fast_kernels, autocast_dtype, find_device
from src.utils.errors import UsageError


@pytest.mark.parametrize("capability", ["amx_bf16", "avx512_bf16"])
def test_precision(monkeypatch, capability):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert autocast_dtype(None, cpu) == torch.bfloat16 and autocast_dtype(False, cpu) is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert autocast_dtype(None, cpu) is None and autocast_dtype(True, cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert autocast_dtype(None, cuda) == torch.float16


def test_a_device_that_is_not_there():
    assert find_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "abacus"):
        with pytest.raises(UsageError, match=f"--device {name} is not available on this machine"):
            find_device(name)


@pytest.mark.parametrize(
    "name, rank, index",
    [("cuda", None, 0), ("cuda:1", None, 1), ("cuda", "0", 0), ("cuda", "3", 3)],
)
def test_each_process_touches_its_own_gpu_only(monkeypatch, name, rank, index):
    touched = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: touched.append(("set", device)))
    monkeypatch.setattr(torch, "zeros", lambda size, device: touched.append(("used", device)))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    own = torch.device("cuda", index)  # with a number, without which set_device fails
    assert find_device(name) == own and touched == [("set", own), ("used", own)]


def test_fast_kernels_are_for_cuda(monkeypatch):
    before = torch.get_float32_matmul_precision()
    try:
        allow_fast_kernels(torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == before
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        allow_fast_kernels(torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.benchmark
    finally:
        torch.set_float32_matmul_precision(before)
