"""The first five losses of every stage and method on the miniature trees: tests/golden/dapg.json.

Those of the stages with a plain loop beside them are checked in test_dapg_oracles.py, where they are computed anyway.
"""

import functools

import golden
import pytest
from dapg_runs import data_dir, finetuning_losses, gan_losses, pretraining_losses

FIVE = ["--iters", 5, "--epochs", 2, "--weights", "none"]
CONTRAST = [*FIVE, "--batch-size", 8, "--variant", "warmup=1", "queue=16", "bn_splits=2"]
DOWN = [*FIVE, "--batch-size", 32, "--lr", 2e-4]
# The rates are small, so that another order of summation stays below the tolerance for five steps.
PRETRAINING = {
    "robust, queue": [*CONTRAST, "--lr", 3e-5],
    "robust, batch negatives": ["--negatives", "batch", *CONTRAST, "--lr", 3e-5],
    "align": ["--stage", "align", "--source", "{data}/poses", *CONTRAST, "--lr", 3e-5],
    "simclr": ["--method", "simclr", *CONTRAST, "--lr", 1e-5],
    "byol": ["--method", "byol", *CONTRAST, "--lr", 3e-5],
    "moco": ["--method", "moco", *CONTRAST, "--lr", 3e-5],
}
FINETUNING = {"agw": ["--stage", "agw", *DOWN], "cil": ["--stage", "cil", *DOWN]}
GAN = ["--stage", "gan", "--height", 64, "--width", 64, *FIVE, "--batch-size", 4, "--variant", "ngf=4", "blocks=1"]


def pretraining_case(name: str) -> list[float]:
    return pretraining_losses(*(str(word).format(data=data_dir()) for word in PRETRAINING[name]))[0]


CASES = {name: functools.partial(pretraining_case, name) for name in PRETRAINING}
CASES |= {name: functools.partial(finetuning_losses, *flags) for name, flags in FINETUNING.items()}
CASES["gan"] = functools.partial(gan_losses, *GAN)


@pytest.mark.parametrize("name", ["moco", "gan"])
def test_the_first_five_losses_are_the_recorded_ones(name):
    golden.check("dapg", name, CASES[name]())
