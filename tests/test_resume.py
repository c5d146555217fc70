"""A killed run continues to the bit, with one process and with two. Each test runs the real training script."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch
from conftest import PYTHON, ROOT, TINY, TORCHRUN, child_environment, kill_when, script

from common import checkpoints, runfiles

TRAIN = ROOT / "aff_scl" / "train.py"


def command(market_dir, out, *more):
    return [
        str(c)
        for c in (
            TRAIN,
            "--data-dir",
            market_dir,
            *TINY,
            "--epochs",
            4,
            "--logs-dir",
            out / "logs",
            "--results-dir",
            out / "results",
            *more,
        )
    ]


def log_dir(out):
    (found,) = (out / "logs").glob("aff_scl/*/*/seed0")
    return found


def assert_equal(a, b, where="checkpoint"):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [PYTHON, TORCHRUN], ids=["one_process", "two_processes"])
def test_killed_run_continues_to_the_bit(market_dir, tmp_path, launcher):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = script(*command(market_dir, whole), launcher=launcher)
    assert done.returncode == 0, done.stderr
    kill_when([*launcher, *command(market_dir, broken)], broken, "logs/aff_scl/*/*/seed0/checkpoint_0002.pt")
    refused = script(*command(market_dir, broken), launcher=PYTHON)
    assert refused.returncode == 1 and "add --resume" in refused.stderr
    done = script(*command(market_dir, broken, "--resume"), launcher=launcher)
    assert done.returncode == 0 and "continuing after epoch" in done.stdout, done.stderr
    first, second = (checkpoints.read(runfiles.newest(log_dir(out))) for out in (whole, broken))
    for key in ("epoch", "state_dict", "optimizer", "scheduler", "extra"):
        assert_equal(first[key], second[key], key)
    assert (log_dir(whole) / "log.jsonl").read_text() == (log_dir(broken) / "log.jsonl").read_text()
    results = [
        json.loads(next((out / "results").rglob("seed0.json")).read_text())["metrics"] for out in (whole, broken)
    ]
    assert results[0] == results[1]
    assert not list(tmp_path.rglob("*.tmp"))


def test_resume_with_other_method_flags_is_refused_with_a_list(market_dir, tmp_path):
    assert script(*command(market_dir, tmp_path, "--epochs", 2)).returncode == 0
    checkpoint = runfiles.newest(log_dir(tmp_path))
    again = script(*command(market_dir, tmp_path, "--epochs", 2, "--tau", 0.07, "--workers", 2, "--resume", checkpoint))
    assert again.returncode == 1 and "--tau 0.05 -> 0.07" in again.stderr and "--workers" not in again.stderr
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    cut = script(*command(market_dir, tmp_path, "--epochs", 2, "--resume"))
    assert cut.returncode == 1 and "not a readable checkpoint" in cut.stderr and "checkpoint_0001.pt" in cut.stderr


def test_sigterm_ends_the_run_and_keeps_the_checkpoint(market_dir, tmp_path):
    process = subprocess.Popen(
        [*PYTHON, *command(market_dir, tmp_path, "--epochs", 500)],
        start_new_session=True,
        env=child_environment(),
        stdout=subprocess.DEVNULL,
    )
    while not list(tmp_path.glob("logs/aff_scl/*/*/seed0/checkpoint_0001.pt")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) != 0
    assert checkpoints.read(runfiles.newest(log_dir(tmp_path)))["epoch"] >= 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no orphan
