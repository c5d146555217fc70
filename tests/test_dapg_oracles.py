"""Training against plain loops written from the papers with none of our training code, and the papers' settings.

The loops get the initial weights, the images that went into the network, and the draws that a paper leaves open.
"""

import copy
import math

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from dapg_runs import data_dir, finetuning, pretraining, pretraining_losses, recorded
from test_dapg_golden import CONTRAST, FINETUNING, FIVE, PRETRAINING
from torch import nn

from common import runtime
from dapg.downstream import stage as downstream
from dapg.flags import parse_args, variants
from dapg.noise.groups import draw_noise

MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def five_steps(name: str) -> tuple[list[float], dict, list[torch.Tensor]]:
    """Our losses, which are also the recorded ones, the initial state, and the images (V, 8, 3, H, W) of each step."""
    losses, initial, seen = pretraining_losses(*(str(word).format(data=data_dir()) for word in PRETRAINING[name]))
    golden.check("dapg", name, losses)
    return losses, initial, seen


def part(state: dict, name: str) -> dict:
    return {key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(name + ".")}


def encoder(state: dict, name: str) -> nn.Sequential:
    """A ResNet-18 with an MLP as its head."""
    trunk = torchvision.models.resnet18(weights=None)
    trunk.fc = nn.Identity()
    trunk.load_state_dict(part(state, f"{name}.trunk"))
    return nn.Sequential(trunk, head(part(state, f"{name}.head")))


def head(state: dict) -> nn.Sequential:
    """Linear, ReLU, linear; with BatchNorm between where the weights are of that."""
    last = max(key for key in state if key.endswith("weight"))
    norm = [nn.BatchNorm1d(len(state["1.weight"]))] if "1.weight" in state else []
    (hidden, inputs), (outputs, _) = state["0.weight"].shape, state[last].shape
    out = nn.Sequential(nn.Linear(inputs, hidden), *norm, nn.ReLU(), nn.Linear(hidden, outputs))
    out.load_state_dict(state)
    return out


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def multi_contrast(q, keys, negatives, tau):
    """Eq. (2), image by image: -log of the positives' share of exp(q k / tau)."""
    losses = []
    for i in range(len(q)):
        positive = sum(torch.exp(q[i] @ key[i] / tau) for key in keys)
        losses.append(-torch.log(positive / (positive + torch.exp(negatives[i] @ q[i] / tau).sum())))
    return sum(losses) / len(losses)


def jensen_shannon(rows):
    """Eqs. (4) and (5) of a list of probability vectors."""
    middle = sum(rows) / len(rows)
    return sum((p * (p / middle).log()).sum() for p in rows) / len(rows)


def warmed(step: int, lr: float) -> float:
    """The rate in step 1..5 of a warm-up of one epoch of five steps."""
    return lr * step / 5


def moco_loop(state, groups, lr, keys_of, loss_of, which_of, optimizer_of):
    """Two encoders, momentum 0.999, shuffled BatchNorm in two groups, a queue of 16 that a key of each image enters."""
    query, slow, queue = encoder(state, "encoder_q"), encoder(state, "encoder_k"), state["queue"].clone()
    optimizer, place, losses = optimizer_of(query.parameters()), 0, []
    shuffle = torch.Generator().manual_seed(0)
    for number, group in enumerate(groups, start=1):
        views = group if group.dtype != torch.uint8 else (group / 255 - MEAN) / STD
        optimizer.param_groups[0]["lr"] = warmed(number, lr)
        queries, keys = keys_of(views)
        z = unit(query(queries.flatten(0, 1))).unflatten(0, queries.shape[:2])
        with torch.no_grad():
            for old, new in zip(slow.parameters(), query.parameters()):
                old.copy_(0.999 * old + 0.001 * new)
            rows = keys.transpose(0, 1).flatten(0, 1)  # image after image
            order = torch.randperm(len(rows), generator=shuffle)
            k = torch.empty(len(rows), 128)
            for half in order.chunk(2):
                k[half] = unit(slow(rows[half]))
            k = k.unflatten(0, (8, -1)).transpose(0, 1)
        loss = loss_of(z, k, queue)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        for image, chosen in enumerate(which_of()):
            queue[place % 16] = k[chosen, image]
            place += 1
    return losses


def test_stage_one_is_the_papers_loop():
    """Sec. II-A: x_q against x_1, x_2, x_mix and the queue, Eqs. (1)-(5) with delta 0.5, tau 0.7; Adam."""
    ours, state, groups = five_steps("robust, queue")
    rng = np.random.default_rng([0, 1, 0])

    def loss_of(z, k, queue):
        mc = multi_contrast(z[0], k, [queue] * 8, 0.7)
        js = sum(jensen_shannon([(queue @ z[v, i] / 0.1).softmax(0) for v in (1, 2, 3)]) for i in range(8)) / 8
        return 0.5 * mc + (1 - 0.5) * js

    def which_of():
        draw_noise(8, rng)  # the step's other draws on the host
        return rng.integers(0, 3, 8)

    def adam(parameters):
        return torch.optim.Adam(parameters)

    theirs = moco_loop(state, groups, 3e-5, lambda views: (views, views[1:]), loss_of, which_of, adam)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_alignment_is_the_papers_loop():
    """Sec. II-B: an anchor, one generated pose as its positive, the queue; Eq. (2) with one positive."""
    ours, state, groups = five_steps("align")

    def loss_of(z, k, queue):
        return multi_contrast(z[0], k, [queue] * 8, 0.7)

    theirs = moco_loop(
        state, groups, 3e-5, lambda views: (views[:1], views[1:]), loss_of, lambda: [0] * 8, torch.optim.Adam
    )
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_batch_negatives_are_the_papers_loop():
    """Eq. (2) read literally: the groups of the batch's other images, one encoder, all four images with gradient."""
    ours, state, groups = five_steps("robust, batch negatives")
    network, theirs = encoder(state, "encoder_q"), []
    adam = torch.optim.Adam(network.parameters())
    for number, group in enumerate(groups, start=1):
        adam.param_groups[0]["lr"] = warmed(number, 3e-5)
        z = unit(network(((group / 255 - MEAN) / STD).flatten(0, 1))).unflatten(0, (4, 8))
        others = [torch.cat([z[1:, j] for j in range(8) if j != i]) for i in range(8)]
        mc = multi_contrast(z[0], z[1:], others, 0.7)
        js = sum(jensen_shannon([(others[i] @ z[v, i] / 0.1).softmax(0) for v in (1, 2, 3)]) for i in range(8)) / 8
        loss = (mc + js) / 2
        adam.zero_grad()
        loss.backward()
        adam.step()
        theirs.append(float(loss.detach()))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_byol_and_simclr_are_their_papers_loops():
    """Grill et al. 2020: m from 0.996 to 1 by half a cosine; Chen et al. 2020: each of 2 N views among the others."""
    ours, state, groups = five_steps("byol")
    online, slow, predictor = encoder(state, "online"), encoder(state, "target"), head(part(state, "predictor"))
    weights, theirs = [*online.parameters(), *predictor.parameters()], []
    sgd = torch.optim.SGD(weights, lr=1, momentum=0.9, weight_decay=1e-4)
    for number, (one, two) in enumerate(groups, start=1):
        sgd.param_groups[0]["lr"] = warmed(number, 3e-5)
        p = [unit(predictor(online(x))) for x in (one, two)]
        with torch.no_grad():
            z = [unit(slow(x)) for x in (two, one)]
        loss = sum((2 - 2 * (a * b).sum(1)).mean() for a, b in zip(p, z))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        theirs.append(float(loss.detach()))
        m = 1 - 0.004 * (math.cos(math.pi * (number - 1) / 10) + 1) / 2
        for old, new in zip(slow.parameters(), online.parameters()):
            old.data = m * old.data + (1 - m) * new.data
    assert ours == pytest.approx(theirs, rel=2e-4)

    ours, state, groups = five_steps("simclr")
    network, theirs = encoder(state, "encoder"), []
    sgd = torch.optim.SGD(network.parameters(), lr=1, momentum=0.9, weight_decay=1e-4)
    for number, views in enumerate(groups, start=1):
        sgd.param_groups[0]["lr"] = warmed(number, 1e-5)
        z = unit(network(views.flatten(0, 1)))
        similar, terms = (z @ z.T / 0.1).exp(), []
        for i in range(16):
            terms.append(-torch.log(similar[i, (i + 8) % 16] / (similar[i].sum() - similar[i, i])))
        loss = sum(terms) / 16
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        theirs.append(float(loss.detach()))
    assert ours == pytest.approx(theirs, rel=2e-4)


@pytest.mark.parametrize("stage", ["agw", "cil"])
def test_finetuning_is_agws_and_cils_loop(monkeypatch, stage):
    """CE + WRT, for CIL + 12 JS; SGD with momentum 0.9 (Nesterov), a tenth of the rate below the neck, warm-up."""
    lr = 2e-4
    args, run, model, optimizer, data = finetuning(data_dir(), *FINETUNING[stage])
    network, seen, make = copy.deepcopy(model), [], downstream.views
    monkeypatch.setattr(downstream, "views", lambda *given: seen.append(make(*given)) or seen[-1])
    runtime.seed_epoch(run, 0)
    labels = downstream.epoch_batches(args, run, data, 0)[2]
    with recorded() as ours:
        downstream.train_one_epoch(args, run, model, optimizer, runtime.scaler(run), data, 0)
    golden.check("dapg", stage, ours)
    head = [network.neck.weight, network.classifier.weight]
    rest = [p for p in network.parameters() if p.requires_grad and all(p is not q for q in head)]
    rate = lr / 10  # the first of ten epochs of warm-up, of AGW's 81
    groups = [{"params": rest, "lr": 0.1 * rate}, {"params": head, "lr": rate}]
    sgd, theirs = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=5e-4), []
    for (visible, infrared), chosen in zip(seen, labels):
        pooled, logits = network.train()(visible, infrared)
        versions = len(visible) // 16
        rows = [
            [*range(16 * v, 16 * v + 16), *range(16 * (versions + v), 16 * (versions + v) + 16)]
            for v in range(versions)
        ]
        both = [*chosen.tolist(), *chosen.tolist()]
        loss = (
            weighted_triplet(pooled[rows[0]], both)
            + sum(-logits[row].log_softmax(0)[label] for row, label in zip(rows[0], both)) / 32
        )
        if stage == "cil":
            p = [logits[row].softmax(1) for row in rows]
            loss = loss + 12 * sum(jensen_shannon([version[i] for version in p]) for i in range(32)) / 32
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        theirs.append(float(loss.detach()))
    assert ours == pytest.approx(theirs, rel=2e-4)


def weighted_triplet(feats, labels):
    """AGW's: softmax weights over an anchor's positives and negatives, 1e-6 in the denominators."""
    terms = []
    for a in range(len(feats)):
        d = (feats - feats[a]).square().sum(1).clamp_min(1e-12).sqrt()
        p, n = ([j for j in range(len(labels)) if (labels[j] == labels[a]) is same] for same in (True, False))
        wp, wn = torch.exp(d[p] - d[p].max()), torch.exp(-d[n])
        far, near = ((w * part).sum() / (w.sum() + 1e-6) for w, part in ((wp, d[p]), (wn, d[n])))
        terms.append(F.softplus(far - near))
    return sum(terms) / len(terms)


# Typed from the papers: sec. III-B for the two stages; Ye et al. 2022 and their code for AGW, Chen et al. 2021 for CIL,
# Qian et al. 2018 for PN-GAN, LUPerson's recipe for the baselines.
PAPERS = {
    "--stage robust": dict(
        dataset="luperson", epochs=300, lr=0.0075, delta=0.5, tau=0.7, height=256, width=128, loss="eq1", weights="none"
    ),
    "--stage align": dict(
        dataset="market", epochs=200, lr=0.0075, tau=0.7, height=256, width=128, weights="row:robust/dapg"
    ),
    "--stage gan": dict(dataset="market", epochs=20, lr=2e-4, batch_size=32, height=256, width=128),
    "--stage agw": dict(
        dataset="sysu", epochs=81, lr=0.1, weight_decay=5e-4, batch_size=64, height=288, width=144, weights="imagenet"
    ),
    "--stage cil": dict(
        dataset="sysu", epochs=81, lr=0.1, weight_decay=5e-4, batch_size=64, height=288, width=144, weights="imagenet"
    ),
    "--method simclr": dict(dataset="luperson", epochs=300, tau=0.1, lr=0.06, batch_size=256, weight_decay=1e-4),
    "--method byol": dict(dataset="luperson", epochs=300, lr=0.06, batch_size=256, weight_decay=1e-4),
    "--preset stable": dict(lr=7.5e-4, tau=0.1, severity_max=3),
}
VARIANTS = dict(
    cil_weight=12.0,
    ngf=64,
    blocks=9,
    momentum=0.999,
    pairs_per_epoch=160000,
    gan_held_out=0.0,
    visible="colour",
    trunk_lr=0.1,
    rates="agw",
    draws=10,
)


@pytest.mark.parametrize("words", PAPERS)
def test_defaults_are_the_papers(words):
    args = parse_args(words.split())
    assert {name: getattr(args, name) for name in PAPERS[words]} == PAPERS[words]
    chosen = variants(args)
    assert {name: chosen[name] for name in VARIANTS} == VARIANTS and chosen["select"] == "last"


@pytest.mark.parametrize(
    "words, cache",
    [("", "off"), ("--method byol", "off"), ("--cache device", "device"), ("--subset 20000", "disk"),
     ("--synthetic small", "disk"), ("--stage align", "disk"), ("--stage align -d LUPerson", "off")],
)  # fmt: skip
def test_the_whole_of_luperson_is_not_kept_decoded_unless_asked_for(words, cache):
    assert parse_args(words.split()).cache == cache


def test_the_optimisers_are_the_papers():
    """Adam with its own betas and no decay in both stages [21]; SGD for the baselines and for fine-tuning."""
    for flags in (["--stage", "robust"], ["--stage", "align", "--source", data_dir() / "poses"]):
        optimizer = pretraining(data_dir(), *flags, *CONTRAST)[3]
        group = optimizer.param_groups[0]
        assert type(optimizer) is torch.optim.Adam and group["betas"] == (0.9, 0.999) and group["weight_decay"] == 0
    group = pretraining(data_dir(), "--method", "simclr", *CONTRAST)[3].param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)
    groups = finetuning(data_dir(), "--stage", "agw", *FIVE, "--batch-size", 32)[3].param_groups
    assert [(g["initial_lr"], g["momentum"], g["nesterov"], g["weight_decay"]) for g in groups] == [
        (pytest.approx(rate), 0.9, True, 5e-4) for rate in (0.01, 0.1)
    ]
