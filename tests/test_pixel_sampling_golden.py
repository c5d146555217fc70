"""Trainings of pixel_sampling against recorded losses, against a plain loop written from the paper, and against
themselves on several processes; the defaults against what the paper prints.
"""

import functools
import tempfile
from pathlib import Path
from unittest import mock

import golden
import pytest
import torch
from prcc_tree import write_prcc
from ranks import on_ranks
from torch import nn
from torchvision import models
from watched import Watched, same, step

from common import checkpoints, transforms
from pixel_sampling import train

TINY = (
    "--weights none --backbone resnet18 --height 32 --width 16 --batch-size 8 --num-instances 2 --epochs 1 "
    "--workers 1 --lr 0.1"  # a hundredth of it in the first epoch of the warm-up
).split()
PLAIN = ["--ps-mode", "off", "--consistency", "none"]
METHODS = {
    "bot": PLAIN,
    "ps": ["--consistency", "none"],
    "ps l2": [],
    "ps l2 re": ["--re"],
    "upper": ["--ps-classes", "upper"],
    "code": "--ps-mode flat --mask-align none --aug code --consistency sigmoid".split(),
    "mgn": ["--arch", "mgn", "--consistency", "none"],
}
pytestmark = pytest.mark.filterwarnings("ignore:prcc under")


@functools.cache
def people():
    """A miniature PRCC with enough people and images for five steps; gone at the end."""
    folder = tempfile.TemporaryDirectory()
    for image in (write_prcc(Path(folder.name), train=8, test=2, images=3) / "prcc/rgb/test").rglob("*00[23].jpg"):
        image.unlink()  # the test is of no interest here
    return folder


def watched(*flags, data_dir=None):
    """A training in float64, as rounding decides on which side of a ReLU some pixel of a network falls; without its
    checkpoints of 180 MB.
    """
    original = train.model.build

    def exact(*given):
        network = original(*given).double()
        network.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
        return network

    with mock.patch.object(train.model, "build", exact), mock.patch.object(checkpoints, "write"):
        return Watched(train, [*TINY, "--data-dir", data_dir or people().name, *flags])


@functools.cache
def five_steps(name):
    """Five steps of a method, with a hundred times the usual weight decay, to be seen so soon."""
    return watched("--iters", "5", "--weight-decay", "0.05", *METHODS[name])


CASES = {name: lambda name=name: five_steps(name).losses for name in METHODS if name != "mgn"}


@pytest.mark.parametrize("name", CASES)
def test_five_steps_give_the_recorded_losses(name):
    golden.check("pixel_sampling", name, CASES[name]())


# --------------------------------------------------------------------------------------------- a loop from the paper


class Paper(nn.Module):
    """The baseline, BoT, on torchvision's ResNet-18 with the last stride taken out: t before, b after the neck."""

    def __init__(self, state):
        super().__init__()
        self.resnet = models.resnet18()
        self.resnet.fc = nn.Identity()
        for layer in (self.resnet.layer4[0].conv1, self.resnet.layer4[0].downsample[0]):
            layer.stride = (1, 1)
        self.neck = nn.BatchNorm1d(512)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(512, state["classifier.weight"].shape[0], bias=False)
        for name, part in (("backbone", self.resnet), ("neck", self.neck), ("classifier", self.classifier)):
            own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            part.load_state_dict(own)

    def forward(self, x):
        t = self.resnet(x)
        return t, self.classifier(self.neck(t))


def changed(images, parts, orders):
    """X' of Eqs. (1) and (2), pixel by pixel: upper clothes (2), then pants (3), each with an order of its own."""
    out = images.clone()
    for part, order in zip((2, 3), orders, strict=True):
        bank = [images[i, :, y, x] for i in order for y, x in (parts[i] == part).nonzero().tolist()]  # Eq. (1)
        slots = [(i, y, x) for i in range(len(images)) for y, x in (parts[i] == part).nonzero().tolist()]
        for (i, y, x), value in zip(slots, bank, strict=True):
            out[i, :, y, x] = value  # Eq. (2)
    return out


def objective(t, logits, labels, consistency):
    """Eqs. (3)-(6) by loops over images, labels smoothed by 0.1."""
    n, classes = logits.shape
    identity = triplet = 0.0
    for i in range(n):
        wanted = torch.full((classes,), 0.1 / classes, dtype=t.dtype)
        wanted[labels[i]] += 0.9
        identity = identity - (wanted * logits[i].log_softmax(0)).sum() / n  # Eq. (4)
        d = (t[i] - t).square().sum(1).clamp_min(1e-12).sqrt()
        triplet = triplet + (0.3 + d[labels == labels[i]].max() - d[labels != labels[i]].min()).clamp_min(0) / n  # (5)
    x, copies = t[: n // 2], t[n // 2 :]
    pairs = sum((a - b).norm() for a, b in zip(x, copies)) / (n // 2)  # Eq. (3)
    return identity + triplet + (pairs if consistency else 0)  # Eq. (6)


@pytest.mark.parametrize("name", ["bot", "ps", "ps l2"])
def test_five_steps_equal_a_loop_written_from_the_paper(name):
    """SGD with momentum 0.9 and weight decay, at a hundredth of the learning rate, as in the first epoch."""
    (epoch,) = five_steps(name).epochs
    model, draws, expected = Paper(epoch["start"]).double().train(), train.shuffles(epoch["run"], 0), []
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.001, momentum=0.9, weight_decay=0.05)
    for x, parts, labels in epoch["batches"]:
        if name != "bot":
            orders = [torch.randperm(8, generator=draws).tolist() for _ in range(2)]
            x, labels = torch.cat([x, changed(x, parts, orders)]), torch.cat([labels, labels])
        loss = objective(*model(x.double()), labels, consistency=name == "ps l2")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    assert len(expected) == 5 and five_steps(name).losses == pytest.approx(expected, rel=1e-8)


# ------------------------------------------------------------------------------------------------- several processes


def first_steps(data_dir, methods):
    """The first step of the methods, augmentation off."""
    found, still = {}, transforms.Augment(flip=0.0, pad=0, erase=0.0)
    for name in methods:
        with mock.patch.object(train, "augmentation", lambda args: still):
            (epoch,) = watched("--iters", "1", *METHODS[name], data_dir=data_dir).epochs
        found[name] = step(epoch)
    return found


def test_two_and_four_processes_take_the_first_step_of_one():
    one = first_steps(people().name, ["bot", "ps", "ps l2", "mgn"])
    for world, methods in ((2, ["ps l2", "mgn"]), (4, ["bot", "ps", "ps l2"])):
        for rank in on_ranks(world, first_steps, people().name, methods):
            for name in methods:
                same(one[name], rank[name], (world, name))


def refusal(data_dir):
    with pytest.raises(ValueError, match="3 processes must divide the 4 identities of a batch"):
        watched(data_dir=data_dir)


def test_processes_that_do_not_divide_the_identities_are_refused():
    on_ranks(3, refusal, people().name)


# ----------------------------------------------------------------------------------------------------------- defaults


def test_defaults_are_what_the_paper_prints_and_the_readme_decides():
    args = vars(train.parse_args([]))
    printed = {
        "height": 256, "width": 128, "batch_size": 64, "num_instances": 4, "lr": 3.5e-3,  # sec. III-A.2
        "backbone": "resnet50", "weights": "imagenet", "aug": "paper", "re": False,  # sec. III-A.2; flip, crop
        "arch": "bot", "ps_mode": "vector", "ps_classes": "both", "consistency": "l2",  # sec. III-C; Eqs. (1)-(3)
    }  # fmt: skip
    decided = {"epochs": 60, "weight_decay": 5e-4, "label_smooth": 0.1, "mask_align": "crop", "selection": "last"}
    assert {name: args[name] for name in printed | decided} == printed | decided
