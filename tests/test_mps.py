"""The GPU of a Mac, on any machine: a stand-in for it computes on the CPU, but refuses what PyTorch
cannot do there."""
import functools
import re
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from src import first_stage, fisher, search
from src.utils import flickr8k_simple
from src.utils.photo_files import photos_of_folder
from tests.conftest import arguments, encoder_flags, main

KERNELS = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
MPS = torch.device("mps:0")  # without a number, PyTorch would ask the device for it
# Kernels that only CPUs have, and what PyTorch chooses in their place on a Mac.
ON_A_MAC = {
    "_scaled_dot_product_flash_attention_for_cpu": "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_flash_attention_for_cpu_backward": None,
}
# Operators that have been wrong on MPS if the channels are last.
SENSITIVE = re.compile(".*(convolution|batch_norm|avg_pool|upsample|grid_sampl|im2col).*")
COPIES = {"_to_copy", "copy_"}
BLOCKS = re.compile(r"^- func: ([\w.]+)\((.*?)(?=^- func: |\Z)", re.MULTILINE | re.DOTALL)


@functools.cache
def operators_of_mps():
    """The operators with a kernel for MPS, and those that are made of others, by PyTorch's own
    table."""
    blocks = {name: text for name, text in BLOCKS.findall(KERNELS.read_text(encoding="utf-8"))}
    found = set()
    for name, text in blocks.items():
        delegate = re.search(r"structured_delegate: ([\w.]+)", text)
        text = text if delegate is None else blocks[delegate[1]]
        dispatch = re.search(r"^  dispatch:\n((?: {4}.*\n)+)", text, re.MULTILINE)
        if dispatch is None or re.search(r"\bMPS\b|\bComposite", dispatch[1]):
            found.add(name)
            generated = re.search(r"^  autogen: (.*)$", text, re.MULTILINE)
            found.update(generated[1].split(", ") if generated else ())
    return found


class OnMps(torch.Tensor):
    """A tensor that PyTorch takes for one of the CPU, and this project for one of a Mac's GPU."""

    @staticmethod
    def __new__(cls, tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, tensor.shape, strides=tensor.stride(), dtype=tensor.dtype, device="cpu",
            storage_offset=tensor.storage_offset())

    def __init__(self, tensor):
        self.tensor = tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})

    @property
    def device(self):
        return MPS

    @property
    def is_cpu(self):
        return False

    def cpu(self):
        return self.tensor.detach().clone()

    def to(self, *args, **kwargs):
        targets = [value for value in (*args, *kwargs.values())
                   if isinstance(value, str | torch.device)]
        if targets and torch.device(targets[0]).type == "cpu":
            assert len(args) == 1 and not kwargs, "only a plain copy to the CPU is simulated"
            return self.cpu()
        return super().to(*args, **kwargs)

    def numpy(self):
        raise TypeError("can't convert mps:0 device type tensor to numpy")

    def __array__(self, dtype=None):
        return self.numpy()

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):  # a file that is saved holds the numbers alone
        return self.cpu().__reduce_ex__(protocol)

    def __repr__(self):
        return f"OnMps({self.tensor})"


def is_on_mps(value):
    return isinstance(value, OnMps)


def is_channels_last(value):
    return (is_on_mps(value) and value.ndim == 4 and not value.tensor.is_contiguous()
            and value.tensor.is_contiguous(memory_format=torch.channels_last))


def compute(operator, args, kwargs):
    """Compute an operator on the CPU. Fail for what MPS lacks: the operator, float64, tensors of
    two devices at once, copies that do not wait, and channels last, where they matter."""
    inputs = tree_leaves((args, kwargs))
    from_mps = any(map(is_on_mps, inputs))
    device = torch.device(kwargs.get("device") or (MPS if from_mps else "cpu"))
    name = operator._schema.name.removeprefix("aten::")
    args, kwargs = tree_map(lambda value: value.tensor if is_on_mps(value) else value,
                            (args, kwargs))
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    if device.type == "cpu" and not from_mps:
        return operator(*args, **kwargs)
    others = [value for value in inputs if isinstance(value, torch.Tensor)
              and not is_on_mps(value) and value.ndim and not value.dtype == torch.long]
    # The backward pass makes zeros on the device that it takes a tensor to be on.
    in_backward = torch._C._current_graph_task_id() != -1
    assert name in COPIES or in_backward or not others, f"{name} of tensors on two devices"
    assert not kwargs.get("non_blocking"), "MPS copies from memory that may be free already"
    assert not any(map(is_channels_last, inputs)) or not SENSITIVE.fullmatch(name), (
        f"{name} of photos with channels last")
    if name.startswith("_scaled_dot_product") and kwargs.get("attn_mask") is not None:
        mask, query = kwargs["attn_mask"], args[0]
        assert mask.is_contiguous() and mask.shape[:3] == query.shape[:3], "MPS misreads this mask"
    full_name = operator.name().removeprefix("aten::")
    assert (name in ON_A_MAC or full_name in operators_of_mps()), f"MPS has no {full_name}"
    outputs = operator(*args, **kwargs)
    for tensor in tree_leaves(outputs):
        if isinstance(tensor, torch.Tensor):
            assert tensor.dtype != torch.float64, f"{name}: MPS has no float64"
    if device.type == "cpu":
        return outputs

    def wrap(value):
        known = [one for one in inputs if is_on_mps(one) and one.tensor is value]
        return known[0] if known else OnMps(value) if isinstance(value, torch.Tensor) else value

    return tree_map(wrap, outputs)


class SimulatedMps(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})


class InThisThread:
    """A pool that works in the calling thread, as the simulation is that of one thread."""

    def __init__(self, threads):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@pytest.fixture
def mps(monkeypatch):
    if not KERNELS.exists():
        pytest.skip("this build of PyTorch has no table of its kernels")
    monkeypatch.setattr(flickr8k_simple, "ThreadPoolExecutor", InThisThread)
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # model.to(MPS)
    torch._C._set_only_lift_cpu_tensors(True)  # for torch.tensor(..., device=MPS)
    try:
        with SimulatedMps():
            yield MPS
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


def test_the_stand_in_refuses_what_a_mac_cannot_do(mps):
    numbers = torch.ones(3, device=mps)
    assert numbers.device.type == "mps" and (numbers + 1).tolist() == [2, 2, 2]
    assert not is_on_mps(numbers.cpu()) and is_on_mps(torch.ones(2).to(mps))
    with pytest.raises(AssertionError, match="float64"):
        numbers.double()
    with pytest.raises(AssertionError, match="MPS has no linalg_eig"):
        torch.linalg.eig(torch.ones(2, 2, device=mps))
    with pytest.raises(AssertionError, match="two devices"):
        numbers + torch.ones(3)
    with pytest.raises(AssertionError, match="may be free"):
        torch.ones(2).to(mps, non_blocking=True)
    photos = torch.ones(2, 3, 8, 8, device=mps).contiguous(memory_format=torch.channels_last)
    with pytest.raises(AssertionError, match="channels last"):
        torch.nn.functional.avg_pool2d(photos, 2)
    with pytest.raises(TypeError):
        numbers.numpy()


KINDS = {
    "tiny": ["--batch_size", 100],
    "small": ["--model", "small", "--image_size", 32, "--batch_size", 100],
    "features": ["--model", "tiny", "--batch_size", 20],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_and_a_search_on_a_mac(kind, copied, encoder_file, tmp_path, mps, monkeypatch):
    monkeypatch.setattr(fisher, "EM_STEPS", 1)
    monkeypatch.setattr(first_stage, "FISHER_EPOCHS", 1)
    flags = KINDS[kind] + (encoder_flags(encoder_file) if kind == "features" else [])
    run_dir = tmp_path / "run"
    assert main(*arguments(copied, run_dir, *flags, "--device", mps, epochs=1)) == 0

    model, tokenizer, transform = search.load_model(run_dir, mps)
    assert is_on_mps(next(model.parameters()))
    photos = search.embed_photos(model, transform, photos_of_folder(copied)[:3])
    texts = search.embed_texts(model, tokenizer, ["a red circle", "two blue squares"])
    bank = search.load_bank(run_dir)
    assert (bank.text_queries(texts) @ bank.photo_gallery(photos).T).shape == (2, 3)
