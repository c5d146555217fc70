"""A training by a project's main, seen as it goes."""

import copy
import inspect
import tempfile
from unittest import mock

import torch

from common import log_folder, runtime


class Watched:
    """train.main(train.parse_args(flags)), run to its end in a folder that is gone afterwards.

    `epochs` holds for every call of train.train_one_epoch its arguments by name, with `batches` as a list, and under
    `start` the state of the bare network before it, `gradients` those of its last step, `means` what it returned.
    `losses` holds the loss of every step.
    """

    def __init__(self, train, flags):
        self.epochs, self.original = [], train.train_one_epoch
        self.signature = inspect.signature(self.original)
        with (
            tempfile.TemporaryDirectory() as out,
            mock.patch.object(train, "train_one_epoch", self.watch),
            mock.patch.object(runtime, "step", wraps=runtime.step) as step,
        ):
            places = ["--logs-dir", f"{out}/logs", "--results-dir", f"{out}/results"]
            train.main(train.parse_args([*map(str, flags), *places]))
        self.losses = [float(call.args[1].detach()) for call in step.call_args_list]

    def watch(self, *arguments):
        given = self.signature.bind(*arguments).arguments
        given["batches"] = list(given["batches"])
        model = log_folder.bare(next(value for value in given.values() if isinstance(value, torch.nn.Module)))
        start = copy.deepcopy(model.state_dict())
        means = self.original(**given)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.epochs.append({**given, "start": start, "gradients": gradients, "means": means})
        return means


def step(epoch: dict) -> tuple[dict, dict]:
    """What must not depend on the number of processes, of an epoch of one step: its means, and of every gradient the
    first hundred numbers, the sum and the length, as whole gradients would take long to send.
    """
    parts = {k: torch.stack([g.sum(), g.norm(), *g.flatten()[:100]]) for k, g in epoch["gradients"].items()}
    return epoch["means"], parts


def same(one: tuple, other: tuple, where) -> None:
    """AssertionError unless two steps are equal to 1e-5, gradients of the longest one."""
    for name, value in one[0].items():
        assert abs(other[0][name] - value) <= 1e-5 * max(0.1, abs(value)), (where, name, other[0][name], value)
    size = max(float(part[1]) for part in one[1].values())
    for name, part in one[1].items():
        assert (other[1][name] - part).abs().max() <= 1e-5 * size, (where, name)
