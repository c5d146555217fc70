"""The three stages of ConvNeXt-AP against recorded losses, against a plain loop written from the paper, and against
themselves on several processes; the defaults against what the paper prints.
"""

import functools
import tempfile
from pathlib import Path
from unittest import mock

import golden
import pytest
import torch
from conftest import write_market
from ranks import on_ranks
from torch import nn
from torchvision import models
from watched import Watched, same, step

from common import transforms
from convnext_ap import schedule, train

TINY = (
    "--trunk tiny --height 128 --width 32 --parts 3 --batch-size 8 --num-instances 2 --epochs 1 --rpp-epochs 1 "
    "--joint-epochs 1 --workers 1"
).split()
STAGES = ("pcb", "assign", "joint")
EXACT = ["--variant", "dropout=0", "drop_path=0"]  # nothing random within the network


def watched(data_dir, *flags):
    return Watched(train, [*TINY, "--data-dir", data_dir, *flags])


@functools.cache
def five_steps(*flags):
    """The losses of five steps of every stage, from random weights on the miniature Market-1501."""
    with tempfile.TemporaryDirectory() as folder:
        return watched(write_market(Path(folder)), "--iters", "5", *flags).losses


CASES = {
    **{f"ap {stage}": lambda i=i: five_steps()[5 * i : 5 * i + 5] for i, stage in enumerate(STAGES)},
    "base": lambda: five_steps("--simam", "none", "--parts", "0"),
    "triplet": lambda: five_steps("--parts", "0", "--loss", "id+triplet"),
    "id": lambda: five_steps("--parts", "0", "--loss", "id"),
}


@pytest.mark.parametrize("name", CASES)
def test_five_steps_give_the_recorded_losses(name):
    golden.check("convnext_ap", name, CASES[name]())


# --------------------------------------------------------------------------------------------- a loop from the paper


def attend(x):
    """SimAM, Eq. (6), by Eq. (3) at its least value with w and b of Eqs. (4) and (5), one mean a channel."""
    mu, s2, lam = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True), 1e-4
    w = 2 * (x - mu) / ((x - mu) ** 2 + 2 * s2 + 2 * lam)
    b = -(x + mu) * w / 2
    e = w**2 * s2 + (1 + w * mu + b) ** 2 + (1 - w * x - b) ** 2 + lam * w**2
    return x * torch.sigmoid(1 / e)


class Paper(nn.Module):
    """Figure 4 with torchvision's blocks: SimAM behind the depthwise convolution, a head for the map and each part."""

    def __init__(self, state, parts, classes):
        super().__init__()
        setting = [models.convnext.CNBlockConfig(*s) for s in ((24, 48, 1), (48, 96, 1), (96, 192, 3), (192, None, 1))]
        self.trunk = models.ConvNeXt(setting, 0.0, 0.1).features
        self.trunk.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("trunk.")})
        self.reduce = nn.ModuleList(nn.Linear(192, 256) for _ in range(1 + parts))
        self.norm = nn.ModuleList(nn.BatchNorm1d(256) for _ in range(1 + parts))
        self.classify = nn.ModuleList(nn.Linear(256, classes) for _ in range(1 + parts))
        self.w = nn.Parameter(state["assign.conv.weight"][:, :, 0, 0].clone())  # (p, D)
        for i in range(1 + parts):
            own = slice(256 * i, 256 * i + 256)
            names = ("weight", "bias", "running_mean", "running_var")
            norm = {name: state[f"heads.norm.{name}"][own] for name in names}
            self.norm[i].load_state_dict(norm | {"num_batches_tracked": torch.tensor(0)})
            for name, layer in (("reduce", self.reduce[i]), ("classify", self.classify[i])):
                layer.load_state_dict(
                    {"weight": state[f"heads.{name}"][i].T, "bias": state[f"heads.{name}_bias"][i].flatten()}
                )

    def forward(self, x, refined):
        """Features and logits, a list each, of the global head and the parts from top to bottom."""
        for stage in self.trunk:
            for layer in stage:
                if isinstance(layer, models.convnext.CNBlock):
                    x = x + layer.layer_scale * layer.block[1:](attend(layer.block[0](x)))
                else:
                    x = layer(x)
        parts, height, width = len(self.w), x.shape[2], x.shape[3]
        pooled = [x.mean((2, 3))]
        share = torch.einsum("pd,bdhw->bphw", self.w, x).softmax(1)  # Eq. (1)
        for i in range(parts):
            if refined:
                pooled.append((share[:, i : i + 1] * x).sum((2, 3)) * parts / (height * width))  # Eq. (2)
            else:
                pooled.append(x[:, :, i * height // parts : -(-(i + 1) * height // parts)].mean((2, 3)))
        feats = [norm(reduce(g)) for norm, reduce, g in zip(self.norm, self.reduce, pooled)]
        return feats, [layer(h) for layer, h in zip(self.classify, feats)]


def circle(h, labels, m=0.25, gamma=32):
    """The double sum of Eq. (7) with margins over all pairs of the batch."""
    h = h / h.norm(dim=1, keepdim=True)
    positive, negative = [], []
    for i in range(len(h)):
        for j in range(i):
            s = h[i] @ h[j]
            if labels[i] == labels[j]:
                positive.append(-gamma * (1 + m - s.detach()).clamp_min(0) * (s - (1 - m)))
            else:
                negative.append(gamma * (s.detach() + m).clamp_min(0) * (s - m))
    return torch.log1p(sum(p.exp() for p in positive) * sum(n.exp() for n in negative))


def test_five_steps_of_every_stage_equal_a_loop_written_from_the_paper(market_dir):
    """Stripes at learning rate 0.02 of the first warm-up epoch; W alone at 0.01 with all else in eval mode; all at
    0.01. The trunk learns at a tenth, SGD with Nesterov's momentum 0.9, gradient norm at most 5; and weight decay, here
    a hundred times the usual one, to be seen in five steps.
    """
    ours = watched(market_dir, "--iters", "5", "--weight-decay", "0.05", *EXACT)
    assert len(ours.epochs) == len(STAGES)
    model, expected = Paper(ours.epochs[0]["start"], 3, 8), []
    trunk, heads = list(model.trunk.parameters()), [p for n, p in model.named_parameters() if n[0] in "rnc"]
    plans = {"pcb": [(trunk, 0.002), (heads, 0.02)], "assign": [([model.w], 0.01)]}
    plans["joint"] = [(trunk, 0.001), (heads, 0.01), ([model.w], 0.01)]
    for stage, epoch in zip(STAGES, ours.epochs):
        groups = [{"params": weights, "lr": rate} for weights, rate in plans[stage]]
        learning = [p for group in groups for p in group["params"]]
        optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=0.05)
        model.train(stage != "assign")
        for x, labels in epoch["batches"]:
            feats, logits = model(x, refined=stage != "pcb")
            ids = [nn.functional.cross_entropy(each, labels) for each in logits]
            loss = sum(ids[1:]) if stage == "assign" else sum(ids) + circle(feats[0], labels) / 8
            gradients = torch.autograd.grad(loss, learning)
            norm = sum(g.square().sum() for g in gradients).sqrt()
            for p, g in zip(learning, gradients):
                p.grad = g * min(1.0, 5.0 / float(norm))
            optimizer.step()
            expected.append(float(loss.detach()))
    assert ours.losses == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------- several processes


def first_steps(data_dir):
    """The first step of every stage and of the other losses, augmentation off."""
    found, still = {}, transforms.Augment(flip=0.0, pad=0, erase=0.0)
    for flags in ([], ["--parts", "0", "--loss", "id"], ["--parts", "0", "--loss", "id+triplet"]):
        with mock.patch.object(train, "make_augment", lambda args: still):
            for stage, epoch in zip(STAGES, watched(data_dir, "--iters", "1", *flags, *EXACT).epochs):
                found[f"{flags} {stage}"] = step(epoch)
    return found


def test_two_and_four_processes_take_the_first_step_of_one_in_every_stage(market_dir):
    one = first_steps(market_dir)
    assert len(one) == 5
    for world in (2, 4):
        for rank in on_ranks(world, first_steps, market_dir):
            for name, expected in one.items():
                same(expected, rank[name], (world, name))


# ----------------------------------------------------------------------------------------------------------- defaults


def test_defaults_are_what_the_paper_prints_and_the_readme_decides():
    args = train.parse_args([])
    printed = {
        "height": 256, "width": 128,  # sec. 5.1
        "epochs": 120, "warmup": 5, "lr": 0.1,  # sec. 5.1
        "trunk": "base", "parts": 6,  # 88.00 M and 90.74 M parameters, Tables 2-4
        "loss": "id+circle",  # sec. 3.4
        "weights": "imagenet", "dataset": "market",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in printed} == printed
    decided = {"simam": "dw", "rpp_epochs": 5, "joint_epochs": 10, "batch_size": 64, "num_instances": 4}  # README
    decided |= {"weight_decay": 5e-4, "variant": []}
    assert {name: getattr(args, name) for name in decided} == decided
    assert train.variants(args)["erase"] == 0.5  # p, sec. 5.1
    assert schedule.learning_rate(0, train.make_plan(args), "heads") == pytest.approx(0.02)  # lr_init, sec. 5.1
