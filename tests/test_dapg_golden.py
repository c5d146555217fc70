"""The first five losses of every stage and method on the miniature trees: tests/golden/dapg.json."""

import functools

import golden
import pytest
from dapg_runs import data_dir, finetuning_losses, gan_losses, pretraining_losses

FIVE = ["--iters", 5, "--epochs", 2, "--weights", "none"]
CONTRAST = [*FIVE, "--batch-size", 8, "--variant", "warmup=1", "queue=16", "bn_splits=2"]
DOWN = [*FIVE, "--batch-size", 32, "--lr", 2e-4]


def align(*flags):
    return pretraining_losses("--stage", "align", "--source", data_dir() / "poses", *CONTRAST, *flags)


CASES = {
    "robust, queue": functools.partial(pretraining_losses, *CONTRAST, "--lr", 3e-5),
    "robust, batch negatives": functools.partial(pretraining_losses, "--negatives", "batch", *CONTRAST, "--lr", 3e-5),
    "simclr": functools.partial(pretraining_losses, "--method", "simclr", *CONTRAST, "--lr", 1e-5),
    "byol": functools.partial(pretraining_losses, "--method", "byol", *CONTRAST, "--lr", 3e-5),
    "moco": functools.partial(pretraining_losses, "--method", "moco", *CONTRAST, "--lr", 3e-5),
    "gan": functools.partial(
        gan_losses, "--stage", "gan", "--height", 64, "--width", 64, *FIVE, "--batch-size", 4, "--variant", "ngf=4",
        "blocks=1",
    ),
    "align": functools.partial(align, "--lr", 3e-5),
    "agw": functools.partial(finetuning_losses, "--stage", "agw", *DOWN),
    "cil": functools.partial(finetuning_losses, "--stage", "cil", *DOWN),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_first_five_losses_are_the_recorded_ones(name):
    golden.check("dapg", name, CASES[name]())
