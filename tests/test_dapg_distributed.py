"""DAPG killed and continued, and its stages in two gloo processes. Each test runs the real scripts."""

import json
import shutil

import pytest
import torch
from conftest import PYTHON, ROOT, TORCHRUN, kill_when, script, write_market
from dapg_trees import write_luperson, write_regdb, write_sysu
from test_resume import assert_equal

from common import checkpoints

SIZE = ["--backbone", "resnet18", "--height", 64, "--width", 32, "--workers", 0]
ROBUST = ["--stage", "robust", "--batch-size", 8, "--epochs", 3, "--iters", 2, "--variant", "warmup=1", "queue=16"]
BOTH = pytest.mark.parametrize("launcher", [PYTHON, TORCHRUN], ids=["one_process", "two_processes"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return write_luperson(write_regdb(write_sysu(write_market(root, train_ids=6, test_ids=2))))


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
    (found,) = (out / "results").rglob("seed0.json")
    return json.loads(found.read_text())["metrics"]


@pytest.mark.slow
@BOTH
def test_a_killed_stage_one_continues_to_the_bit(data, tmp_path, launcher):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(data, whole, *ROBUST, launcher=launcher)
    kill_when([*launcher, *command(data, broken, *ROBUST)], broken, "logs/**/checkpoint_0001.pt")
    assert checkpoints.epoch_of(checkpoints.newest(log_dir(broken))) < 3
    assert "continuing after epoch" in run(data, broken, *ROBUST, "--resume", launcher=launcher)
    first, second = (checkpoints.read(checkpoints.newest(log_dir(out))) for out in (whole, broken))
    for key in ("epoch", "state_dict", "optimizer", "scheduler", "extra"):  # the queue and its pointer among them
        assert_equal(first[key], second[key], key)
    assert (log_dir(whole) / "log.jsonl").read_text() == (log_dir(broken) / "log.jsonl").read_text()
    assert result(whole) == result(broken)
    assert_equal(*(torch.load(log_dir(out) / "trunk.pt", weights_only=True) for out in (whole, broken)), "trunk")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["--negatives", "batch"], ["--method", "simclr"], ["--method", "byol"], ["--method", "moco"]], ids=str
)
def test_other_pretrainings_train_in_two_processes(data, tmp_path, flags):
    few = ["--stage", "robust", "--batch-size", 8, "--epochs", 1, "--iters", 2, "--variant", "warmup=1", "queue=16"]
    run(data, tmp_path, *few, *flags, launcher=TORCHRUN)
    assert 0 <= result(tmp_path)["instance.mAP"] <= 1


@pytest.mark.slow
def test_alignment_trains_in_two_processes(data, tmp_path):
    poses = tmp_path / "poses"
    poses.mkdir()
    for file in sorted((data / "market1501/bounding_box_train").glob("*.jpg")):
        for i in range(4):  # the images themselves stand in for their generated poses
            shutil.copy(file, poses / f"{file.stem}_p{i}.jpg")
    run(
        data,
        tmp_path,
        "--stage",
        "align",
        "--weights",
        "none",
        "--source",
        poses,
        "--batch-size",
        8,
        "--epochs",
        1,
        "--iters",
        2,
        "--variant",
        "warmup=1",
        "queue=16",
        launcher=TORCHRUN,
    )
    assert {"mc", "spread", "instance.mAP"} <= result(tmp_path).keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, dataset, keys", [("agw", "sysu", ("all", "all_c")), ("cil", "regdb", ("v2t", "t2v_c"))]
)
def test_finetuning_and_evaluation_in_two_processes(data, tmp_path, stage, dataset, keys):
    """Two processes train; then one and two processes measure the same checkpoint, clean and corrupted, equally."""
    run(
        data,
        tmp_path,
        "--stage",
        stage,
        "--dataset",
        dataset,
        "--weights",
        "none",
        "--batch-size",
        32,
        "--epochs",
        1,
        "--iters",
        2,
        "--variant",
        "draws=2",
        launcher=TORCHRUN,
    )
    trained = result(tmp_path)
    said = []
    for launcher in (PYTHON, TORCHRUN):
        done = script(
            ROOT / "dapg/test.py",
            "--checkpoint",
            log_dir(tmp_path),
            "--data-dir",
            data,
            "--draws",
            2,
            "--workers",
            0,
            launcher=launcher,
        )
        assert done.returncode == 0, done.stderr
        said.append([line for line in done.stdout.splitlines() if "rank-1" in line])
    assert said[0] == said[1] and len(said[0]) == 4
    for key in keys:
        (line,) = (line for line in said[0] if line.split()[0] == key)
        assert line.split()[2] == f"{100 * trained[f'{key}.rank1']:.1f}"
