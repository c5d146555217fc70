"""One, two and four gloo processes: the same global batch gives the same loss, gradient, queue and statistics."""

import dataclasses
import functools
import re

import numpy as np
import pytest
import torch
from dapg_runs import data_dir, finetuning, pretraining
from ranks import on_ranks

from common import log_folder, processes, runtime
from common.images import ImageStore
from dapg.downstream import stage as downstream
from dapg.flags import parse_args
from dapg.noise import groups
from dapg.pretrain import stage as pretrain
from dapg.pretrain.align import Align
from dapg.pretrain.robust import Robust

FEW = ["--height", 32, "--weights", "none", "--epochs", 2, "--iters", 2]
CONTRAST = [*FEW, "--batch-size", 8, "--variant", "queue=16"]
DOWN = [*FEW, "--batch-size", 32]
CASES = {
    "robust, queue": [*CONTRAST, "bn_splits=2"],  # two groups of keys on a rank, one, and one on two ranks
    "robust, batch negatives": ["--negatives", "batch", *CONTRAST],
    "align": ["--stage", "align", "--source", "{data}/poses", *CONTRAST, "bn_splits=2"],
    "simclr": ["--method", "simclr", *CONTRAST],
    "byol": ["--method", "byol", *CONTRAST],
    "moco": ["--method", "moco", *CONTRAST, "bn_splits=2"],
    "agw": ["--stage", "agw", *DOWN],
    "cil": ["--stage", "cil", *DOWN],
}


def make_images(data, name: str, flags: list[str]) -> tuple[torch.Tensor, ...]:
    """The network's inputs in the first global batch, as one process draws them; images along dimension 1."""
    if name in ("agw", "cil"):
        args, run, _, _, opened = finetuning(data, *flags)
        *index, _ = (part[0] for part in downstream.epoch_batches(args, run, opened, 0))
        pixels = [opened.stores[part].gather(i) for part, i in zip(("train_rgb", "train_ir"), index)]
        views = downstream.views(args, *pixels, runtime.generator(run, 0))
        return tuple(x.unflatten(0, (-1, len(index[0]))).clone() for x in views)
    args, run, _, _, _, store, generated = pretraining(data, *flags)
    index = pretrain.epoch_batches(args, run, len(store), 0)[0]
    step = pretrain.make_step(args, run, 0, generated)
    return (step.images(store.gather(index), torch.from_numpy(index)),)


def first_steps(data, images: dict[str, tuple[torch.Tensor, ...]]) -> dict[str, dict]:
    """By case the loss and gradient of the first step on this rank's share of the images, and what it leaves behind."""
    processes.parallel = functools.partial(in_double, processes.parallel)  # ends with this process
    return {name: first_step(data, name, flags(data, name), images[name]) for name in CASES}


def in_double(parallel, run, model):
    """The network in float64, where another order of summation is no other ReLU; losses stay in float32."""
    model.double()
    if hasattr(model, "queue"):
        model.queue = model.queue.float()
    for module in (model, getattr(model, "neck", model)):
        module.register_forward_pre_hook(lambda _, inputs: tuple(x.double() for x in inputs))
    return parallel(run, model)


def first_step(data, name: str, words: list[str], images: tuple[torch.Tensor, ...]) -> dict:
    if name in ("agw", "cil"):
        args, run, model, _, opened = finetuning(data, *words)
        labels = torch.from_numpy(downstream.epoch_batches(args, run, opened, 0)[2][0])
        views = [own_share(run, x).flatten(0, 1) for x in images]
        (loss, parts), keys = downstream.objective(args, run, model.train(), *views, labels), None
    else:
        args, run, model, _, _, _, generated = pretraining(data, *words)
        step = pretrain.make_step(args, run, 0, generated)
        loss, parts, keys = step.loss(model.train(), own_share(run, *images))
    loss.backward()
    bare = log_folder.bare(model)
    if hasattr(bare, "after_step"):
        bare.after_step(keys, 0.5)
    processes.sync_buffers(run, bare)
    gradient = torch.cat([p.grad.flatten() for p in bare.parameters() if p.grad is not None])
    return {
        "loss": processes.gather(run, loss[None]).mean(),
        "parts": processes.gather(run, torch.stack([part.detach().float() for part in parts.values()])[None]).mean(0),
        "gradient": gradient[::53].clone(),
        "norm": gradient.norm(),
        "buffers": torch.cat([b.flatten().float() for b in bare.buffers()]),
        "parameters": len(gradient),
    }


def own_share(run, x: torch.Tensor) -> torch.Tensor:
    return x.chunk(run.world_size, 1)[run.rank]


def flags(data, name: str) -> list[str]:
    return [str(word).format(data=data) for word in CASES[name]]


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict]]:
    data = data_dir()
    images = {name: make_images(data, name, flags(data, name)) for name in CASES}
    return {world: on_ranks(world, first_steps, data, images) for world in (1, 2, 4)}


def gap(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", [2, 4])
def test_the_first_step_is_that_of_one_process(found, world, name):
    want = found[1][0][name]
    assert len(found[world]) == world
    for rank in found[world]:
        gaps = {key: gap(rank[name][key], want[key]) for key in ("loss", "parts", "gradient", "norm", "buffers")}
        assert max(gaps.values()) < 1e-5 and rank[name]["parameters"] == want["parameters"], gaps


@pytest.mark.parametrize("world", [1, 2, 4])
def test_host_draws_are_those_of_the_global_batch(monkeypatch, world):
    """Noise types, severities, mixtures and poses: the ranks' together are what one process draws."""
    draws = []
    monkeypatch.setattr(groups, "noise_group", lambda views, draw, *_: draws.append(draw) or views + views)
    _, run, _, _, _, store, _ = pretraining(data_dir(), *CONTRAST)
    args, _, _, _, _, poses, generated = pretraining(data_dir(), *flags(data_dir(), "align"))
    chosen = []
    monkeypatch.setattr(generated, "gather", lambda index: chosen.append(index) or ImageStore.gather(generated, index))
    for rank in range(world):
        one = dataclasses.replace(run, rank=rank, world_size=world)
        pixels, index = store.gather(np.arange(8 // world)), torch.arange(8 // world)
        Robust(args, one, 3).images(pixels, index)
        Align(args, one, 3, generated).images(pixels, index)
    together = [np.concatenate(part) for part in zip(*draws)]
    alone = Robust(args, run, 3)
    want = groups.draw_noise(8, alone.rng, args.severity_max, alone.types)
    assert all(np.array_equal(a, b) for a, b in zip(together, want))
    assert np.array_equal(np.concatenate(chosen) % 4, np.random.default_rng([0, 4, 0]).integers(0, 4, 8))


def test_identities_are_drawn_once_for_the_ranks(monkeypatch):
    args, run, _, _, opened = finetuning(data_dir(), "--stage", "agw", *DOWN)
    whole = downstream.epoch_batches(args, run, opened, 2)
    for world in (2, 4):
        ranks = [dataclasses.replace(run, rank=rank, world_size=world) for rank in range(world)]
        parts = [downstream.epoch_batches(args, one, opened, 2) for one in ranks]
        for found, want in zip(zip(*parts), whole):
            assert np.array_equal(np.concatenate(found, 1), want)
        assert all(len(set(row)) == 4 // world for row in parts[0][2].tolist())  # whole identities


@pytest.mark.parametrize(
    "world, words, message",
    [
        (2, "--stage gan", "--stage gan trains on one process; start it with python"),
        (3, "--stage robust", "--batch-size 256 does not split over 3 processes; use 255 or 258"),
        (3, "--stage robust -b 12", "3 processes cannot hold the 4 groups .*use 1, 2, 4, 8, 12, 16 ... processes"),
        (3, "--stage agw", "3 processes cannot share the 8 identities of a batch evenly; use 1, 2, 4, 8 processes"),
        (16, "--stage cil", "16 processes cannot share the 8 identities"),
    ],
)
def test_a_number_of_processes_that_would_change_the_method_is_refused_at_parsing(
    monkeypatch, capsys, world, words, message
):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(SystemExit, match="2"):
        parse_args(words.split())
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "world, words",
    [(8, "--stage robust"), (3, "--stage robust --negatives batch -b 255"), (3, "--method simclr -b 255"),
     (8, "--stage agw"), (3, "--stage generate"), (3, "--stage align -b 255 --variant bn_splits=3")],
)  # fmt: skip
def test_every_number_of_processes_that_keeps_the_method_is_taken(monkeypatch, world, words):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    parse_args(words.split())
