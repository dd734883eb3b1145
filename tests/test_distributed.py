"""Training by two processes of this machine, over gloo, compared with one process."""
import errno
import json
import os
import re
import signal
import socket
import tempfile
import time

import numpy as np
import pytest
import torch

from src import evaluation
from src.evaluation import evaluate
from src.model import MultiModalMemoryNetwork
from src.runs import BEST, CONFIG, HISTORY, LAST, RUN_FILES, TEST
from src.training import PairEncoder, contrastive_backward, split_in_chunks
from src.utils import distributed
from src.utils.photo_store import STORE_FOLDER
from src.utils.splits import open_split
from src.utils.synthetic import write_synthetic
from src.utils.tokenizers import CharTokenizer
from tests.conftest import model_arguments, start_script, without_batch_norm, write_dataset

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed"
)


def model_and_batch():
    torch.manual_seed(0)
    model = without_batch_norm(MultiModalMemoryNetwork(**model_arguments("tiny")))
    batch = {
        "images": torch.randn(8, 3, 32, 32),
        "text": torch.randint(1, 34, (16, 12)),
        "photo_ids": torch.tensor([3, 5, 6, 8, 1, 3, 2, 9]),
        "photo_of_pair": torch.arange(8).repeat_interleave(2),
    }
    batch["text"][::3, 7:] = 0
    return model, batch


def compute(rank, world, folder):
    """Compute what the test compares, as one of `world` processes, and save it in the folder."""
    if world > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        distributed.start()
    model, batch = model_and_batch()
    half = len(batch["images"]) // world
    share = {
        "images": batch["images"][rank * half : (rank + 1) * half],
        "text": batch["text"][rank * 2 * half :][: 2 * half],
        "photo_ids": batch["photo_ids"][rank * half : (rank + 1) * half],
        "photo_of_pair": batch["photo_of_pair"][: 2 * half],
    }
    encode = PairEncoder(model, None)
    if world > 1:
        encode = torch.nn.parallel.DistributedDataParallel(encode, broadcast_buffers=False)
    results = {}
    # Photos may share captions: here the class names 1 to 3, and one photo has a text in addition.
    class_of_photo = batch["photo_ids"] % 3 + 1
    texts_of_photo = torch.stack([class_of_photo, torch.tensor([0, 0, 1, 0, 0, 0, 0, 0])], 1)
    shared = share | {
        "texts_of_photo": texts_of_photo[rank * half : (rank + 1) * half],
        "text_ids": class_of_photo.repeat_interleave(2)[rank * 2 * half :][: 2 * half],
    }
    for case, given, chunk_size in (("", share, 0), ("", share, 4), ("shared", shared, 0)):
        model.zero_grad()
        loss = contrastive_backward(encode, given, 0.1, chunk_size)
        results[f"loss {chunk_size} {case}"] = loss
        results |= {f"{name} {chunk_size} {case}": p.grad.clone()
                    for name, p in model.named_parameters()}
    # The shares of two processes have the same number of pairs but may have different numbers of
    # photos. All processes must split theirs into as many chunks as the one with the fewest photos,
    # which is here the share of rank 1. The process alone takes that one.
    photo_of_pair = [[0, 0, 1, 1, 2, 2, 3, 4], [0, 0, 0, 1, 1, 1, 2, 2]][rank if world > 1 else 1]
    uneven = {
        "images": torch.zeros(photo_of_pair[-1] + 1),
        "text": torch.zeros(8),
        "photo_of_pair": torch.tensor(photo_of_pair),
    }
    results["chunks"] = torch.tensor(len(split_in_chunks(uneven, 2)))
    data = open_split(folder / "synthetic", "val", 32, CharTokenizer())
    evaluation.PHOTO_BATCH = evaluation.CAPTION_BATCH = 5  # there are several batches to share
    metrics = evaluate(model, data)
    results |= {name: torch.tensor(value) for name, value in metrics.items()}
    flags = [distributed.any_process(flag, torch.device("cpu"))
             for flag in (rank == world - 1, False)]
    results["any process"] = torch.tensor(flags)
    torch.save(results, folder / f"{rank} of {world}")
    distributed.stop()
    if world > 1:
        distributed.exit_process(0)  # as the training script does


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_processes_equal_one(tmp_path, monkeypatch):
    write_synthetic(tmp_path / "synthetic", num_pictures={"train": 10, "val": 13, "test": 5})
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", free_port())
    monkeypatch.setattr(evaluation, "PHOTO_BATCH", 5)
    monkeypatch.setattr(evaluation, "CAPTION_BATCH", 7)
    compute(0, 1, tmp_path)
    torch.multiprocessing.spawn(compute, (2, tmp_path), nprocs=2)
    one, *two = (torch.load(tmp_path / name) for name in ("0 of 1", "0 of 2", "1 of 2"))
    for other in two:
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.allclose(value, other[name], rtol=1e-5, atol=1e-6), name
    assert any(name.startswith("logit_scale") and value != 0 for name, value in one.items())


def share_an_array(rank, folder):
    """One of two processes: it writes every second row of an array, then saves what it sees."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    distributed.start()
    tempfile.tempdir = str(folder)
    reserve, os.posix_fallocate = os.posix_fallocate, full_disk
    with pytest.raises(OSError, match="No space left"):  # the first process's error, in both
        distributed.shared_array((6, 3), np.float16)
    os.posix_fallocate = reserve
    array = distributed.shared_array((6, 3), np.float16)
    distributed.barrier()
    assert not array.any() and not os.listdir(folder)  # the file has no name any more
    distributed.barrier()
    array[rank::2] = rank + 1
    distributed.barrier()
    torch.save(torch.from_numpy(array).clone(), f"{folder}.{rank}")
    distributed.stop()
    distributed.exit_process(0)


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="a full disk is not noticed early")
def test_two_processes_share_an_array(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", free_port())
    (tmp_path / "files").mkdir()
    torch.multiprocessing.spawn(share_an_array, (tmp_path / "files",), nprocs=2)
    for rank in range(2):
        rows = torch.load(tmp_path / f"files.{rank}")
        assert rows.tolist() == [[1, 1, 1], [2, 2, 2]] * 3 and rows.dtype == torch.float16


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="a full disk is not noticed early")
def test_an_array_of_a_process_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    array = distributed.shared_array((2, 3), np.float32)
    assert array.tolist() == [[0, 0, 0], [0, 0, 0]] and not os.listdir(tmp_path)
    array[1] = 5
    assert array.sum() == 15
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    with pytest.raises(OSError, match="No space left"):
        distributed.shared_array((2, 3), np.float32)
    assert not os.listdir(tmp_path)


def test_a_stop_request_forgets_its_loop_after_an_error(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    stop = distributed.StopRequest()
    with pytest.raises(ZeroDivisionError), stop.watch():
        handlers[signal.SIGINT](signal.SIGINT, None)
        assert stop.requested
        raise ZeroDivisionError
    stop.requested = False
    with pytest.raises(KeyboardInterrupt):  # the loop has ended, so nothing would look at it
        handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert not stop.requested


def torchrun(*arguments, nproc=2, machine=()):
    return start_script(
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={nproc}",
        *(machine or [f"--master_port={free_port()}"]),
        "train_flickr8k_sgd.py",
        "--model",
        "tiny",
        "--device",
        "cpu",
        *arguments,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(condition, process, seconds=120):
    begun = time.time()
    while not condition() and process.poll() is None and time.time() - begun < seconds:
        time.sleep(0.1)
    assert condition()


def worker_pids(process):
    """Return the ids of the processes that torchrun started."""
    pids = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if int(file.read().rsplit(")", 1)[1].split()[1]) == process.pid:
                    pids.append(int(pid))
        except OSError:
            pass
    return pids


def test_few_pairs_and_uneven_captions_are_shared_or_refused(tmp_path):
    data = write_dataset(tmp_path / "data", {"train": 3, "val": 2, "test": 2}, captions=3)
    tokens = data / "Flickr8k.token.txt"
    lines = tokens.read_text().splitlines(True)
    tokens.write_text("".join(lines[:4] + lines[6:7] + lines[9:]))  # 3, 1 and 1 of train
    given = ["--data_dir", data, "--epochs", 2, "--batch_size", 4, "--captions_per_image", 3]
    process = torchrun("--output_dir", tmp_path / "a", *given)
    printed, err = process.communicate(timeout=240)
    assert process.returncode == 0 and "of 1 step of 4 pairs" in printed, err
    assert "Warning" not in err  # not from torch either
    process = torchrun("--output_dir", tmp_path / "b", *given, "--batch_size", 3, nproc=4)
    printed, err = process.communicate(timeout=240)
    assert process.returncode != 0 and not (tmp_path / "b").exists()
    assert "a batch has fewer pairs than there are processes (4)" in err
    assert "train_flickr8k_sgd.py\", line" not in err  # there is no traceback of the script


def two_machines(tmp_path, *given, data=("data0", "data1")):
    """Run one process on each of two machines that have folders of their own.

    Returns (exit status, standard output, standard error) of each machine.
    """
    port = free_port()
    started = []
    for rank, folder in enumerate(data):
        machine = ["--nnodes=2", f"--node_rank={rank}", "--master_addr=127.0.0.1",
                   f"--master_port={port}"]
        folders = ["--data_dir", tmp_path / folder, "--output_dir", tmp_path / f"run{rank}"]
        started.append(torchrun(*folders, *given, nproc=1, machine=machine))
    printed = [process.communicate(timeout=240) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, printed)]


def test_two_machines_that_share_no_disk(tmp_path):
    for name in ("data0", "data1", "data"):
        write_synthetic(tmp_path / name, num_pictures={"train": 40, "val": 12, "test": 8})
    given = ["--epochs", 2, "--batch_size", 20]
    (status, out, err), (other_status, other_out, other_err) = two_machines(tmp_path, *given)
    assert (status, other_status) == (0, 0), err + other_err
    # Only the first machine prints and writes.
    assert "  with the bank " in out and "epoch" not in other_out
    assert sorted(os.listdir(tmp_path / "run0")) == sorted(RUN_FILES)
    assert not (tmp_path / "run1").exists()
    stores = [sorted(os.listdir(tmp_path / name / STORE_FOLDER)) for name in ("data0", "data1")]
    assert [name.partition("_0")[0] for name in stores[0]] == [
        name.partition("_0")[0] for name in stores[1]] and len(stores[0]) == 3

    def history(folder):
        rows = json.loads((tmp_path / folder / HISTORY).read_text())
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    process = torchrun("--data_dir", tmp_path / "data", "--output_dir", tmp_path / "run", *given)
    assert process.communicate(timeout=240) and process.returncode == 0
    assert history("run0") == history("run")

    (status, out, err), (other_status, _, other_err) = two_machines(
        tmp_path, "--resume", "--epochs", 3)
    assert (status, other_status) == (0, 0), err + other_err
    assert "resumed at epoch 3" in out and len(history("run0")) == 3

    write_synthetic(tmp_path / "data2", 1, {"train": 40, "val": 12, "test": 8})
    for status, _, err in two_machines(tmp_path, "--overwrite", data=("data0", "data2")):
        assert status != 0
        assert "photos, captions or their order differ between the machines" in err


def test_an_error_of_the_main_process_ends_all_processes(tmp_path):
    for status, _, err in two_machines(tmp_path, "--resume"):
        assert status != 0 and "nothing to resume in" in err and 'sgd.py", line' not in err


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc to find the processes")
def test_a_run_under_torchrun_killed_then_resumed(tmp_path):
    data, out = tmp_path / "synthetic", tmp_path / "out"
    write_synthetic(data, num_pictures={"train": 40, "val": 12, "test": 8})
    process = torchrun("--data_dir", data, "--output_dir", out, "--epochs", 500, "--batch_size", 20)
    wait_for((out / HISTORY).exists, process, 240)
    os.kill(worker_pids(process)[-1], signal.SIGKILL)
    # It ends, because no process waits for the one that was killed.
    printed, err = process.communicate(timeout=120)
    assert process.returncode != 0 and re.search(
        r"process \d of 2 lost the others|interrupted; to continue", err
    ), err
    assert printed.count("parameters") == 1  # only rank 0 prints

    config = json.loads((out / CONFIG).read_text())
    done = len(json.loads((out / HISTORY).read_text()))
    config["settings"]["epochs"] = done + 1  # so that the end is near
    (out / CONFIG).write_text(json.dumps(config))
    process = torchrun("--data_dir", data, "--output_dir", out, "--resume")
    printed, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "resumed at epoch" in printed and printed.count("  with the bank ") >= 1
    assert sorted(os.listdir(out)) == sorted(RUN_FILES)
    assert len(json.loads((out / HISTORY).read_text())) == done + 1 and json.loads(
        (out / TEST).read_text()
    )
    assert config["device"].startswith("2 x ")
    assert {"model_state_dict"} <= torch.load(out / BEST, weights_only=True).keys() & torch.load(
        out / LAST, weights_only=True).keys()
