"""Checkpoint files: whole or not at all, no code inside, errors that name the file and the way on."""

import multiprocessing
import os
import pickle
import random
import resource
import signal
import time

import pytest
import torch
from torch import nn

from common import checkpoints, runfiles

FORK = multiprocessing.get_context("fork")


def state(epoch, size=200_000):
    return {
        "schema": checkpoints.SCHEMA,
        "state_dict": {"w": torch.full((size,), float(epoch))},
        "optimizer": {},
        "scheduler": {},
        "scaler": {},
        "epoch": epoch,
        "args": {"lr": 0.1, "name": "x"},
        "extra": {"before": {"mAP": 0.5}},
        "wall_s": 1.5,
    }


def save_forever(folder):
    torch.set_num_threads(1)  # a forked child has none of its parent's threads
    for epoch in range(1, 10_000):
        checkpoints.write(folder, epoch, state(epoch))


def test_kill_during_save_keeps_last_checkpoint(tmp_path):
    draw = random.Random(0)
    for _ in range(20):
        child = FORK.Process(target=save_forever, args=(tmp_path,))
        child.start()
        while not runfiles.listed(tmp_path):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        newest = runfiles.newest(tmp_path)
        content = checkpoints.read(newest)
        assert content["epoch"] == runfiles.epoch_of(newest) and (content["state_dict"]["w"] == content["epoch"]).all()
    runfiles.remove_temporary(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


def full_disk(folder, queue):
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, 100_000)
    )  # the kernel refuses to write more, as a full disk does
    try:
        checkpoints.write(folder, 2, state(2))
    except OSError as error:
        queue.put(str(error))


def test_full_disk_leaves_the_old_file_and_names_path_and_bytes(tmp_path):
    checkpoints.write(tmp_path, 1, state(1))
    queue = FORK.Queue()
    child = FORK.Process(target=full_disk, args=(tmp_path, queue))
    child.start()
    message = queue.get(timeout=30)
    child.join()
    assert "checkpoint_0002.pt" in message and "bytes" in message and "space" in message
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_0001.pt"]
    assert checkpoints.read(tmp_path / "checkpoint_0001.pt")["epoch"] == 1


def test_two_newest_are_kept(tmp_path):
    for epoch in (1, 2, 9, 10, 11):
        checkpoints.write(tmp_path, epoch, state(epoch, 10))
    assert [runfiles.epoch_of(p) for p in runfiles.listed(tmp_path)] == [10, 11]


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_damaged_checkpoint_is_named_with_the_previous_one(tmp_path, damage):
    for epoch in (1, 2):
        path = checkpoints.write(tmp_path, epoch, state(epoch))
    content = path.read_bytes()
    path.write_bytes(
        {"cut": content[: len(content) // 2], "noise": random.Random(0).randbytes(5000), "empty": b""}[damage]
    )
    with pytest.raises(
        ValueError, match=r"checkpoint_0002.pt is not a readable.*previous one is .*checkpoint_0001.pt.*--resume"
    ):
        checkpoints.read(path)


def test_foreign_checkpoint_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="lacks args, epoch"):
        checkpoints.read(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoints.read(tmp_path / "absent.pt")


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_code_runs_from_a_checkpoint(tmp_path):
    touched = tmp_path / "touched"
    torch.save({**state(1, 10), "extra": Payload(touched)}, tmp_path / "checkpoint_0001.pt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        checkpoints.read(tmp_path / "checkpoint_0001.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(touched)))
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        checkpoints.read(tmp_path / "plain.pt")
    assert not touched.exists()


def test_weights_that_do_not_fit_are_all_listed():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    good = model.state_dict()
    checkpoints.fit(
        model, {f"module._orig_mod.{k}": v for k, v in good.items()}, "file"
    )  # wrappers' prefixes are accepted
    wrong = {
        "0.weight": torch.zeros(2, 4),
        "0.bias": good["0.bias"],
        "1.weight": good["1.weight"],
        "head.bias": torch.zeros(1),
    }
    with pytest.raises(
        ValueError,
        match=r"file does not fit.*1 missing: 1.bias; 1 unexpected: head.bias; "
        r"1 of another shape: 0.weight \(2, 4\) instead of \(2, 3\)",
    ):
        checkpoints.fit(model, wrong, "file")
