"""The skeleton of an epoch: what it counts, prints and refuses; means over the ranks."""

import os

import pytest
import torch
from ranks import on_ranks

from common.epoch import Epoch


def make_run():
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    return type(
        "Run",
        (),
        {
            "world_size": world,
            "rank": rank,
            "main": rank == 0,
            "device": torch.device("cpu"),
            "skipped": None,
            "statistics": ((), ()),
        },
    )


def walk():
    """Two steps whose losses are 1, 2 on rank 0 and 3, 4 on rank 1; a buffer that differs between ranks."""
    run, model = make_run(), torch.nn.BatchNorm1d(2)
    model.running_mean.fill_(float(run.rank))
    epoch = Epoch(run, 4, [torch.ones(3), torch.ones(3)], 2)
    for x in epoch:
        epoch.add(len(x), loss=torch.tensor(2.0 * run.rank + epoch.step), part=torch.tensor(1.0, requires_grad=True))
        assert epoch.where == f"epoch 5, step {epoch.step}"
    return {**epoch.means(model, "stage"), "buffer": model.running_mean.tolist()}


def test_the_means_are_over_steps_and_ranks_not_rank_zeros():
    assert on_ranks(1, walk) == [{"loss": 1.5, "part": 1.0, "buffer": [0.0, 0.0]}]
    assert on_ranks(2, walk) == 2 * [{"loss": 2.5, "part": 1.0, "buffer": [0.5, 0.5]}]


def test_one_line_is_printed(capsys):
    walk()
    assert capsys.readouterr().out.startswith("epoch 5 (stage): loss 1.500, part 1.000; ")


def test_an_epoch_without_a_step_is_refused():
    epoch = Epoch(make_run(), 0, [], 0)
    with pytest.raises(ValueError, match="epoch 1 has no batch"):
        list(epoch)
        epoch.means(torch.nn.Linear(1, 1))
