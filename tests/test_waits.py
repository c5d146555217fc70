"""On a GPU the host waits once a step, where runtime.step says so, in every stage of every project; and --deterministic
goes through all of them.
"""

import contextlib
import functools
import os
import tempfile
from pathlib import Path

import dapg_runs
import numpy as np
import prsnet_small
import pytest
import test_convnext_ap_train
import test_pixel_sampling_train
import torch
from conftest import TINY, write_market_and_duke
from prcc_tree import write_prcc

import aff_scl.train
import convnext_ap.train
import pixel_sampling.train
import prsnet.pretrain
import prsnet.train
from common.epoch import Epoch
from dapg.noise import device_corruptions

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of --deterministic, read when CUDA starts
MODES = ["", "--amp fp16", "--deterministic"]  # the last refuses operators without a deterministic kernel
PLAIN = " ".join(test_pixel_sampling_train.PLAIN)
SCRIPTS = {  # module, its smallest flags, and what is added to them
    "aff_scl": (aff_scl.train, [*TINY, "--epochs", 1], [
        "", "--loss ce_tri", "--lb memory --variant hard_ref=hard", "--cam se --variant swap=on post=relu pool=gem",
        "--mode uda --source duke", "--mode sup --bn-groups 1 -b 8",
    ]),
    "convnext_ap": (convnext_ap.train, [*test_convnext_ap_train.TINY, "--epochs", 1], [
        "", "--loss id --parts 0", "--variant optimizer=adamw circle_on=concat",
    ]),
    "pixel_sampling": (pixel_sampling.train, test_pixel_sampling_train.TINY, [
        "", f"--arch head_body {PLAIN}", "--ps-mode random --consistency mse", "--arch mgn --consistency none --re",
        "--arch hpm --consistency none", "--arch pcb --consistency none --aug code",
    ]),
    "prsnet-pretrain": (prsnet.pretrain, [*prsnet_small.WORDS, "--batch-size", 16, "--epochs", 1], [
        "--clip 1", "--model mae --mask-block 16 8",
    ]),
    "prsnet": (prsnet.train, [*prsnet_small.WORDS, *"-b 8 --num-instances 4 --epochs 1 --weights none".split()], [
        "", "--centroid ctl --dist sq",
    ]),
}  # fmt: skip
BATCHES = "--weights none --batch-size 8 --epochs 1 --variant queue=16 warmup=1"
CROSS = "--weights none --batch-size 32 --epochs 1"
STAGES = {  # of dapg: what takes the steps of one epoch, and the flags
    "robust": (dapg_runs.pretraining_losses, f"--stage robust {BATCHES}"),
    "robust of the batch": (dapg_runs.pretraining_losses, f"--stage robust --negatives batch {BATCHES}"),
    "robust chain": (dapg_runs.pretraining_losses, f"--stage robust --noise-base chain --loss infonce {BATCHES}"),
    "simclr": (dapg_runs.pretraining_losses, f"--stage robust --method simclr {BATCHES}"),
    "byol": (dapg_runs.pretraining_losses, f"--stage robust --method byol {BATCHES}"),
    "moco": (dapg_runs.pretraining_losses, f"--stage robust --method moco {BATCHES}"),
    "align": (dapg_runs.pretraining_losses, f"--stage align --source {{poses}} {BATCHES} stage2_noise=0.5"),
    "gan": (dapg_runs.gan_losses, "--stage gan --height 128 --width 64 -b 4 --epochs 1 --variant ngf=4 blocks=1"),
    "agw": (dapg_runs.finetuning_losses, f"--stage agw --dataset sysu {CROSS}"),
    "agw of channels": (dapg_runs.finetuning_losses, f"--stage agw --dataset sysu {CROSS} --variant visible=channels"),
    "cil": (dapg_runs.finetuning_losses, f"--stage cil --dataset sysu {CROSS}"),
}


@functools.cache
def people() -> Path:
    """Miniatures of the data sets of four projects in one --data-dir, for this process."""
    people.folder = tempfile.TemporaryDirectory()
    return write_prcc(write_market_and_duke(prsnet_small.people(Path(people.folder.name), 48)))


@pytest.fixture
def watched(monkeypatch):
    """From an epoch's second step on, waits that CUDA can see raise; holds the epochs' numbers of steps.

    The first step makes constants, and the wait of runtime.step is for an event, which is no error.
    """
    walk, steps = Epoch.__iter__, []

    def watching(self):
        steps.append(0)
        try:
            for batch in walk(self):
                steps[-1] += 1
                torch.cuda.set_sync_debug_mode("error" if steps[-1] > 1 else "default")
                yield batch
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Epoch, "__iter__", watching)
    monkeypatch.setattr(dapg_runs, "recorded", lambda: contextlib.nullcontext([]))  # which looks at every loss
    yield steps
    torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")


def on_gpu(test):
    """The marks of a test for a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


@pytest.mark.parametrize("project", SCRIPTS)
def test_the_flags_of_every_form_are_those_of_its_script(project):
    module, words, all_more = SCRIPTS[project]
    for more in all_more:
        assert module.parse_args([str(word) for word in (*words, *more.split())]).epochs >= 1


@on_gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("project, more", [(name, more) for name, (_, _, all) in SCRIPTS.items() for more in all])
def test_a_step_of_a_script_waits_for_nothing(project, more, mode, watched, tmp_path):
    module, words, _ = SCRIPTS[project]
    places = ["--data-dir", people(), "--logs-dir", tmp_path / "logs", "--results-dir", tmp_path / "results"]
    iters = [] if project == "prsnet-pretrain" else ["--iters", 3]
    module.main(module.parse_args([str(word) for word in (*words, *more.split(), *iters, *places, *mode.split())]))
    assert watched and min(watched) >= 3


@on_gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_of_a_stage_of_dapg_waits_for_nothing(stage, mode, watched):
    take, words = STAGES[stage]
    kinds, images = np.arange(15).repeat(5), torch.zeros(75, 3, 64, 32, dtype=torch.uint8, device="cuda")
    draw = torch.Generator("cuda").manual_seed(0)
    device_corruptions.corrupt(images, kinds, np.tile(range(1, 6), 15), draw)  # their constants are made once
    take(*words.format(poses=dapg_runs.data_dir() / "poses").split(), "--iters", "3", *mode.split())
    assert watched == [3]
