"""Batch statistics over groups of the global batch: the same for any number of processes."""

import os

import pytest
import torch
from ranks import on_ranks
from torch import nn

from common import batchnorm, processes


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4)
    )
    nn.init.normal_(model[1].weight, 1.0, 0.3)
    nn.init.normal_(model[1].bias, 0.0, 0.3)
    return model.double()


def images():
    return torch.randn(8, 3, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 10


def oracle(groups):
    """Every layer once a group, by PyTorch's own layers: loss, gradients, and running statistics of the mean."""
    model = network()
    x, running = images().chunk(groups), []
    for layer in model:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            before = [layer.running_mean.clone(), layer.running_var.clone()]
            after, out = [], []
            for part in x:
                layer.running_mean, layer.running_var = before[0].clone(), before[1].clone()
                out.append(layer(part))
                after.append(torch.stack([layer.running_mean, layer.running_var]))
            running.append(torch.stack(after).mean(0))
            x = out
        else:
            x = [layer(part) for part in x]
    loss = torch.cat(x).square().mul(torch.arange(8.0)[:, None]).mean()
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()], running


def first_step(groups):
    """Loss, gradients and running statistics of one step on this rank's share of the images."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    run = type(
        "Run",
        (),
        {"world_size": world, "rank": rank, "device": torch.device("cpu"), "args": {"amp": "off", "compile": False}},
    )
    model = batchnorm.over_groups(network(), world, groups)
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    wrapped = processes.parallel(run, model).train()
    loss = wrapped(images()[share]).square().mul(torch.arange(8.0)[share, None]).mean()
    loss.backward()
    loss = processes.gather(run, loss[None]).mean()
    processes.sync_buffers(run, model)
    running = [torch.stack([m.running_mean, m.running_var]) for m in (model[1], model[5])]
    return loss.detach(), [p.grad for p in model.parameters()], running


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_loss_gradient_and_running_statistics_do_not_depend_on_the_number_of_processes(world, groups):
    expected = oracle(groups)
    for loss, gradients, running in on_ranks(world, first_step, groups):
        torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients, expected[1], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(running, expected[2], rtol=1e-9, atol=1e-11)


def test_evaluation_and_one_group_in_one_process_are_torchs_own_to_the_bit():
    ours, own, x = batchnorm.over_groups(network(), 1), network(), images()
    assert torch.equal(ours.train()(x), own.train()(x)) and torch.equal(ours.eval()(x), own.eval()(x))
    assert ours.state_dict().keys() == own.state_dict().keys()
    grouped = batchnorm.over_groups(network(), 1, groups=4).eval()
    assert torch.equal(grouped(x), network().eval()(x))


def test_three_processes_cannot_hold_two_groups():
    with pytest.raises(ValueError, match="3 processes cannot hold 2 .*use 1, 2, 4"):
        batchnorm.over_groups(network(), 3, 2)


def test_a_plain_average_over_all_steps_with_momentum_none():
    model, x = batchnorm.over_groups(nn.BatchNorm1d(3), 1, groups=2), torch.randn(3, 4, 3)
    model.momentum = None
    for batch in x:
        model(batch)
    assert torch.allclose(model.running_mean, x.mean((0, 1)), atol=1e-6) and model.num_batches_tracked == 3
