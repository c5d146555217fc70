"""DAPG killed and continued, by its real scripts, and its whole stages in two gloo processes."""

import json

import numpy as np
import pytest
import torch
from conftest import PYTHON, ROOT, TORCHRUN, kill_when, script
from dapg_runs import data_dir, run_main, run_test
from ranks import on_ranks
from test_resume import assert_equal

from common import checkpoints, runfiles

SIZE = ["--backbone", "resnet18", "--height", 64, "--width", 32, "--workers", 0]
ROBUST = ["--stage", "robust", "--batch-size", 8, "--epochs", 3, "--iters", 2, "--variant", "warmup=1", "queue=16"]
BOTH = pytest.mark.parametrize("launcher", [PYTHON, TORCHRUN], ids=["one_process", "two_processes"])


def command(data, out, *flags):
    places = ["--data-dir", data, "--logs-dir", out / "logs", "--results-dir", out / "results"]
    return [str(c) for c in (ROOT / "dapg/train.py", *places, *SIZE, *flags)]


def run(data, out, *flags, launcher=PYTHON):
    done = script(*command(data, out, *flags), launcher=launcher)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def log_dir(out):
    (found,) = (out / "logs" / "dapg").rglob("seed0")
    return found


def result(out):
    (found,) = out.rglob("seed0.json")
    return json.loads(found.read_text())["metrics"]


@pytest.mark.slow
@BOTH
def test_a_killed_stage_one_continues_to_the_bit(tmp_path, launcher):
    data = data_dir()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(data, whole, *ROBUST, launcher=launcher)
    kill_when([*launcher, *command(data, broken, *ROBUST)], broken, "logs/**/checkpoint_0001.pt")
    assert runfiles.epoch_of(runfiles.newest(log_dir(broken))) < 3
    assert "continuing after epoch" in run(data, broken, *ROBUST, "--resume", launcher=launcher)
    first, second = (checkpoints.read(runfiles.newest(log_dir(out))) for out in (whole, broken))
    for key in ("epoch", "state_dict", "optimizer", "scheduler", "extra"):  # the queue and its pointer among them
        assert_equal(first[key], second[key], key)
    assert (log_dir(whole) / "log.jsonl").read_text() == (log_dir(broken) / "log.jsonl").read_text()
    assert result(whole) == result(broken)
    assert_equal(*(torch.load(log_dir(out) / "trunk.pt", weights_only=True) for out in (whole, broken)), "trunk")


def whole_stages(data, out, many: list[list]) -> None:
    """Each stage from its flags to its result file, on this rank."""
    for number, flags in enumerate(many):
        run_main(data, out / str(number), *flags)


def test_whole_stages_train_in_two_processes(tmp_path):
    few = ["--batch-size", 8, "--epochs", 1, "--iters", 2, "--weights", "none", "--variant", "warmup=1", "queue=16"]
    many = [
        ["--method", "byol", *few],
        ["--negatives", "batch", "--noise-exclude", "frost", *few],
        ["--stage", "align", "--source", data_dir() / "poses", *few],
    ]
    on_ranks(2, whole_stages, data_dir(), tmp_path, many)
    for number, flags in enumerate(many):
        found = result(tmp_path / str(number))
        assert 0 <= found["instance.mAP"] <= 1 and ("mc" in found) == ("byol" not in flags)


def evaluated(data, checkpoint, out) -> list[str]:
    said = run_test(data, "--checkpoint", checkpoint, "--draws", 2, "--export-features", out)
    return [line for line in said.splitlines() if "rank-1" in line]


@pytest.mark.parametrize(
    "stage, dataset, keys", [("agw", "sysu", ("all", "all_c")), ("cil", "regdb", ("v2t", "t2v_c"))]
)
def test_finetuning_and_evaluation_in_two_processes(tmp_path, stage, dataset, keys):
    """Two processes train; then one and two processes measure the same checkpoint, clean and corrupted, equally."""
    flags = [
        "--stage", stage, "--dataset", dataset, "--weights", "none", "--batch-size", 32, "--epochs", 1, "--iters", 2
    ]  # fmt: skip
    on_ranks(2, whole_stages, data_dir(), tmp_path, [[*flags, "--variant", "draws=2"]])
    trained, said = result(tmp_path), evaluated(data_dir(), log_dir(tmp_path / "0"), tmp_path / "one")
    assert on_ranks(2, evaluated, data_dir(), log_dir(tmp_path / "0"), tmp_path / "two") == [said, []]  # rank 0 speaks
    assert len(said) == 4
    assert np.allclose(*(np.load(tmp_path / name / "features.npy") for name in ("one", "two")), atol=1e-6)
    for key in keys:
        (line,) = (line for line in said if line.split()[0] == key)
        assert line.split()[2] == f"{100 * trained[f'{key}.rank1']:.1f}"
