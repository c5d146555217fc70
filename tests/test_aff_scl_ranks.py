"""aff_scl on one, two and four processes: the same batch gives the same loss, gradient and memory in every mode."""

from argparse import Namespace
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from ranks import on_ranks
from torch import nn

from aff_scl import flags, losses, train
from common import records, runtime, transforms
from common.datasets import Sample
from common.images import ImageStore

MODES = {
    "sup": "--mode sup",
    "ce_tri": "--loss ce_tri --bn-groups 1",
    "usl, 1 group": "--bn-groups 1 --lb memory",
    "usl, 2 groups": "--bn-groups 2",
    "usl, 4 groups": "--bn-groups 4",
    "uda": "--mode uda --source duke --bn-groups 2",
    "uda, one normalisation": "--mode uda --source duke --bn-groups 1 --variant dsbn=off",
}
TINY = "--weights none --backbone resnet18 --height 32 --width 16 -b 16 --num-instances 4 --iters 1 --lr 1e-3"


def domain(classes, seed):
    """Images (6 a class) of a data set that is nowhere on disk, with their labels."""
    draw = np.random.default_rng(seed)
    stripes = np.repeat(draw.integers(40, 216, (classes, 3, 8, 1)), 6, 0).repeat(4, 2).repeat(16, 3)
    pixels = (stripes + draw.normal(0, 25, stripes.shape)).clip(0, 255).astype(np.uint8)
    store = ImageStore([""] * len(pixels), (3, 32, 16), "bicubic", "disk", torch.device("cpu"), pixels)
    samples = [Sample("", n // 6 + 1, n % 2) for n in range(len(pixels))]
    return Namespace(data=Namespace(train=samples), store=store, labels=torch.arange(len(pixels)) // 6)


def unit_rows(count, seed):
    rows = torch.randn(count, 512, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows)


def with_small_trunk(build_model, args, num_classes):
    """The network of the flags on two convolutions instead of ResNet's."""
    network = build_model(args, num_classes)
    layers = {"conv1": nn.Conv2d(3, 8, 3, 2, bias=False), "bn1": nn.BatchNorm2d(8), "relu": nn.ReLU()}
    layers |= {"conv2": nn.Conv2d(8, 512, 3, 2, bias=False), "bn2": nn.BatchNorm2d(512), "relu2": nn.ReLU()}
    network.backbone = nn.Sequential(OrderedDict(layers))
    return network


def first_steps(folder):
    """Mode -> loss, gradients, memory and running statistics after its first step, in double precision, without
    augmentation.
    """
    train.build_model = partial(with_small_trunk, train.build_model)
    transforms.Augment = lambda **_: lambda images, generator: transforms.normalize(images).double()
    results = {}
    for mode, words in MODES.items():
        args = train.parse_args([*TINY.split(), *words.split(), "--logs-dir", folder])
        run = runtime.start(args, "aff_scl")
        target, source, feats = domain(5, seed=0), domain(6, seed=1), unit_rows(30, seed=0)
        network = train.build(args, run, 5 if args.mode == "sup" else 0).double()
        model, optimizer, _ = train.optimised(args, run, network)
        training, memory = (run, args, model, optimizer, runtime.scaler(run), 0), None
        if args.mode == "sup":
            stats = train.supervised_epoch(*training, target)
        elif args.loss == "ce_tri":
            network.set_classifier = partial(in_double, network, network.set_classifier)
            stats = train.baseline_epoch(*training, target, target.labels, losses.class_means(feats, target.labels))
        else:
            memory = train.new_memory(args, feats, target.labels)
            if args.mode == "usl":
                stats = train.usl_epoch(*training, target, target.labels, memory)
            else:
                known = train.new_memory(args, unit_rows(36, seed=1), source.labels)
                memory = losses.Memory.join(known, memory)
                stats = train.uda_epoch(*training, source, target, target.labels, memory)
        results[mode] = {
            "loss": stats["loss"],
            "gradient": flat({name: w.grad for name, w in network.named_parameters() if w.grad is not None}),
            "running": flat({name: b for name, b in network.named_buffers() if b.is_floating_point()}),
            "memory": torch.cat([memory.means, memory.hards]) if memory else None,
        }
    return results


def in_double(network, set_classifier, means):
    set_classifier(means)
    network.double()


def flat(tensors):
    """All values in the order of their names, one vector."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process gives."""
    return on_ranks(1, first_steps, str(tmp_path_factory.mktemp("one")))[0]


@pytest.mark.parametrize("world", [2, 4])
def test_the_first_step_does_not_depend_on_the_number_of_processes(alone, world, tmp_path):
    ranks = on_ranks(world, first_steps, str(tmp_path))
    for rank in ranks:
        for mode, expected in alone.items():
            for name in ("gradient", "running"):
                difference = (rank[mode][name] - expected[name]).norm() / expected[name].norm()
                assert difference < 1e-11, (mode, name, float(difference))
            assert rank[mode]["loss"] == pytest.approx(expected["loss"], rel=1e-6), mode
            if expected["memory"] is not None:
                torch.testing.assert_close(rank[mode]["memory"], expected["memory"], rtol=0, atol=1e-6)
                assert torch.equal(rank[mode]["memory"], ranks[0][mode]["memory"]), "memories of ranks differ"


def test_hard_init_is_that_of_the_source_rows_too(tmp_path):
    for start, equal in (("mean", True), ("hardest", False)):
        words = f"{TINY} --mode uda --source duke --variant hard_init={start} --logs-dir {tmp_path}"
        args = train.parse_args(words.split())
        run = runtime.start(args, "aff_scl")
        memory = train.source_memory(run, args, train.build(args, run, 0), domain(6, seed=1))
        assert torch.equal(memory.means, memory.hards) == equal


REFUSED = {
    (
        3,
        "",
    ): "3 processes cannot share a batch of 128 images in 2 group(s) of batch statistics evenly; use one of 1, 2, 4",
    (
        3,
        "--mode sup",
    ): "3 processes cannot share a batch of 64 images in 1 group(s) .*use one of 1, 2, 4, 8, 16, 32, 64",
    (6, "--bn-groups 4 -b 96"): "use one of 1, 2, 4, 8, 12",
}


@pytest.mark.parametrize("world, words", REFUSED)
def test_a_number_of_processes_that_would_train_something_else_is_refused(world, words):
    with pytest.raises(ValueError, match=REFUSED[world, words].replace("(s)", r"\(s\)")):
        flags.check_processes(train.parse_args(words.split()), world)


def test_four_processes_hold_every_row_of_the_paper():
    """What `run_tables.sh DATA --gpus 4` runs."""
    for name, row in records.load_rows(ROOT / "aff_scl").items():
        if row.get("script", "train.py") == "train.py":
            args = train.parse_args(["--row", name])
            for world in (1, 2, 4):
                flags.check_processes(args, world)
