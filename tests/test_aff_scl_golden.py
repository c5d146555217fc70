"""aff_scl as it is wired: losses of the first steps of every mode, recorded and against loops written from the paper;
defaults against a table typed from the paper.
"""

import contextlib
import copy
import io
import math
import tempfile
from pathlib import Path

import golden
import pytest
import torch
import torch.nn.functional as F
from conftest import write_market_and_duke

from aff_scl import flags, losses, train
from common import runtime, transforms
from common.epoch import Epoch

FLAGS = (  # a small rate: from random weights every larger step makes rounding visible in the losses
    "--weights none --backbone resnet18 --height 64 --width 32 --batch-size 16 --num-instances 4 --k1 6 --workers 1 "
    "--bn-groups 2 --lr 3e-6"
).split()
MODES = {
    "usl": [],
    "uda": ["--mode", "uda", "--source", "duke"],
    "sup": ["--mode", "sup", "--bn-groups", "1"],
    "ce_tri": ["--loss", "ce_tri"],
}
STEPS = {"usl": (5, 1), "uda": (3, 2), "sup": (2, 3), "ce_tri": (5, 1)}  # steps an epoch, epochs
LR, DECAY, TAU, MOMENTUM = 3e-6, 5e-4, 0.05, 0.1


class Trace:
    """What a training saw and gave: batches and losses step by step; source and target; the network before the first
    step; features of the target's images and their labels, epoch by epoch.
    """

    def __init__(self):
        self.batches, self.losses, self.domains, self.network, self.clusters = [], [], [], None, []


@contextlib.contextmanager
def traced():
    """Write down what passes through train.main; nothing is changed."""
    trace, names = Trace(), ("Epoch", "training_set", "optimised", "cluster")
    own = {name: getattr(train, name) for name in names}

    class Traced(Epoch):
        def __iter__(self):
            for batch in super().__iter__():
                trace.batches.append(batch)
                yield batch

        def add(self, images, **values):
            trace.losses.append(values["loss"].item())
            super().add(images, **values)

    def training_set(*args):
        trace.domains.append(own["training_set"](*args))
        return trace.domains[-1]

    def optimised(args, run, network):
        trace.network = copy.deepcopy(network)
        return own["optimised"](args, run, network)

    def cluster(feats, args, run):
        labels, found = own["cluster"](feats, args, run)
        trace.clusters.append((feats, labels))
        return labels, found

    for name, value in zip(names, (Traced, training_set, optimised, cluster)):
        setattr(train, name, value)
    try:
        yield trace
    finally:
        for name, value in own.items():
            setattr(train, name, value)


def trained(mode):
    """The trace of a short training of the mode, by the script's own main."""
    iters, epochs = STEPS[mode]
    with tempfile.TemporaryDirectory() as folder, traced() as trace, contextlib.redirect_stdout(io.StringIO()):
        root = Path(folder)
        places = [
            "--data-dir",
            write_market_and_duke(root / "data"),
            "--logs-dir",
            root / "logs",
            "--results-dir",
            root / "results",
        ]
        words = [*FLAGS, *MODES[mode], "--iters", iters, "--epochs", epochs, *places]
        train.main(train.parse_args([str(word) for word in words]))
    return trace


CASES = {mode: lambda mode=mode: trained(mode).losses for mode in MODES}


@pytest.fixture(scope="module")
def traces():
    found = {}

    def trace(mode):
        if mode not in found:
            found[mode] = trained(mode)
        return found[mode]

    return trace


@pytest.mark.filterwarnings("ignore:market|duke")
@pytest.mark.parametrize("mode", MODES)
def test_the_first_losses_are_those_recorded(traces, mode):
    golden.check("aff_scl", mode, traces(mode).losses)


# ------------------------------------------------------------------------------------------- the paper as plain loops
def in_halves(network, x, *domain):
    """Features of a batch, batch statistics over each half as on the paper's two GPUs."""
    return torch.cat([network(half, *domain) for half in x.chunk(2)])


def class_means(feats, labels):
    """Unit means of classes 0, 1, ..."""
    return torch.stack([F.normalize(feats[labels == i].mean(0), dim=0) for i in range(int(labels.max()) + 1)])


def cross_entropy(logits, labels, smoothing=0.0):
    total = 0.0
    for row, label in zip(logits, labels.tolist()):
        log_share = row - torch.logsumexp(row, 0)
        total = total - (1 - smoothing) * log_share[label] - smoothing * log_share.mean()
    return total / len(logits)


def balance(q, means, hards):
    """Eq. (14) on the difference of the two predictions, the hard one fixed."""
    x = ((q @ means.T - q.detach() @ hards.T) / TAU).abs()
    b = math.exp(1.5 / 0.9) - 1
    near = 0.9 / b * (b * x + 1) * torch.log(b * x + 1) - 0.9 * x
    return torch.where(x < 1, near, 1.5 * x + 1.5 / b - 0.9).mean() / 4


def total_loss(q, labels, means, hards):
    """Eq. (8) with the paper's weights."""
    hard, mean = (cross_entropy(q @ rows.T / TAU, labels) for rows in (hards, means))
    return 0.75 * hard + 0.25 * mean + balance(q, means, hards)


def move(q, labels, means, hards):
    """Eqs. (10), (12), (13), identity by identity; means and hards are changed."""
    for i in set(labels.tolist()):
        members = q.detach()[labels == i]
        hardest = members[(members @ means[i]).argmin()]
        means[i] = F.normalize(MOMENTUM * means[i] + (1 - MOMENTUM) * members.mean(0), dim=0)
        hards[i] = F.normalize(MOMENTUM * hards[i] + (1 - MOMENTUM) * hardest, dim=0)


def triplet(feats, labels):
    """Batch-hard triplet loss with margin 0.3, anchor by anchor."""
    total = 0.0
    for i in range(len(feats)):
        dist = [(feats[i] - feats[j]).norm() for j in range(len(feats))]
        positive = max(dist[j] for j in range(len(feats)) if labels[j] == labels[i] and j != i)
        negative = min(dist[j] for j in range(len(feats)) if labels[j] != labels[i])
        total = total + torch.clamp(positive - negative + 0.3, min=0)
    return total / len(feats)


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.filterwarnings("ignore:market|duke")
def test_usl_equals_a_plain_loop_from_the_paper(traces):
    trace, found = traces("usl"), []
    network = copy.deepcopy(trace.network).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=LR, weight_decay=DECAY)
    means = class_means(*trace.clusters[0])
    hards = means.clone()
    for x, labels in trace.batches:
        q = in_halves(network, x)
        found.append(step(optimizer, total_loss(q, labels, means.clone(), hards.clone())))
        move(q, labels, means, hards)
    assert trace.losses == pytest.approx(found, rel=2e-4) and len(found) == 5


@pytest.mark.filterwarnings("ignore:market|duke")
def test_uda_equals_a_plain_loop_from_the_paper(traces):
    """Two epochs: target classes follow the source's and start anew, the source's rows go on."""
    trace, found = traces("uda"), []
    network = copy.deepcopy(trace.network)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR, weight_decay=DECAY)
    source = trace.domains[1]
    with torch.no_grad():
        feats = network.eval()(transforms.normalize(source.store.gather(torch.arange(len(source.store)))))
    source_means = class_means(feats, source.labels)
    source_hards, count = source_means.clone(), len(source_means)
    network.train()
    for epoch, clusters in enumerate(trace.clusters):
        optimizer.param_groups[0]["lr"] = LR * (1, 0.1)[epoch]  # two epochs for 60: the second is beyond a third
        target_means = class_means(*clusters)
        means, hards = (torch.cat([rows, target_means]) for rows in (source_means, source_hards))
        for (x_s, y_s), (x_t, y_t) in trace.batches[3 * epoch : 3 * epoch + 3]:
            q_s, q_t, y_t = in_halves(network, x_s, 0), in_halves(network, x_t, 1), y_t + count
            loss = total_loss(q_s, y_s, means.clone(), hards.clone()) + total_loss(
                q_t, y_t, means.clone(), hards.clone()
            )
            found.append(step(optimizer, loss))
            move(torch.cat([q_s, q_t]), torch.cat([y_s, y_t]), means, hards)
        source_means, source_hards = means[:count], hards[:count]
    assert trace.losses == pytest.approx(found, rel=2e-4) and len(found) == 6


@pytest.mark.filterwarnings("ignore:market|duke")
def test_sup_equals_a_plain_loop_from_the_paper(traces):
    """Table 7: label smoothing 0.1; the rate of an epoch is 0.01, 0.1 and 0.01 of --lr where 3 epochs stand for 120."""
    trace, found = traces("sup"), []
    network = copy.deepcopy(trace.network).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=LR, weight_decay=DECAY)
    for i, (x, labels) in enumerate(trace.batches):
        optimizer.param_groups[0]["lr"] = LR * (0.01, 0.1, 0.01)[i // 2]
        output = network(x)
        loss = cross_entropy(output.logits, labels, smoothing=0.1) + triplet(output.pooled, labels)
        found.append(step(optimizer, loss))
    assert trace.losses == pytest.approx(found, rel=2e-4) and len(found) == 6


@pytest.mark.filterwarnings("ignore:market|duke")
def test_the_baseline_loss_equals_a_plain_loop_from_the_paper(traces):
    trace, found = traces("ce_tri"), []
    network = copy.deepcopy(trace.network).train()
    network.set_classifier(class_means(*trace.clusters[0]))
    optimizer = torch.optim.Adam(network.parameters(), lr=LR, weight_decay=DECAY)
    for x, labels in trace.batches:
        halves = [network(half) for half in x.chunk(2)]
        logits, pooled = (torch.cat([getattr(half, name) for half in halves]) for name in ("logits", "pooled"))
        found.append(step(optimizer, cross_entropy(logits, labels) + triplet(pooled, labels)))
    assert trace.losses == pytest.approx(found, rel=2e-4) and len(found) == 5


# ------------------------------------------------------------------------------------------------- the paper's settings
PAPER = {  # typed from sec. 3.4 (lambda), sec. 4.2 (the rest), Figure 4 (eps)
    "height": 256, "width": 128, "batch_size": 128, "num_instances": 8, "lr": 3.5e-4, "epochs": 60,
    "weight_decay": 5e-4, "k1": 30, "lambda1": 0.75, "lambda2": 0.25, "eps": 0.65, "weights": "imagenet",
    "backbone": "resnet50", "arch": "aff", "bn_groups": 2,
}  # fmt: skip
PAPER_VARIANTS = {"min_samples": 4, "k2": 6}  # sec. 4.2
LINEAGE = {"tau": 0.05, "iters": 400, "lb": "logits", "loss": "scl", "neck": "bn"}  # the paper says nothing
LINEAGE_VARIANTS = {"momentum": 0.1, "hard_ref": "mean", "hard_init": "mean", "dsbn": "on", "camera": "on"}
STRONG_BASELINE = {
    "batch_size": 64,
    "num_instances": 4,
    "epochs": 120,
    "lr": 3.5e-4,
    "weight_decay": 5e-4,
    "bn_groups": 1,
}


def test_defaults_are_those_printed_in_the_paper():
    args, duke, sup = (vars(train.parse_args(words)) for words in ([], ["-d", "duke"], ["--mode", "sup"]))
    assert {name: args[name] for name in PAPER | LINEAGE} == PAPER | LINEAGE
    chosen = flags.variants(train.parse_args([]))
    assert {name: chosen[name] for name in PAPER_VARIANTS | LINEAGE_VARIANTS} == PAPER_VARIANTS | LINEAGE_VARIANTS
    assert duke["eps"] == 0.70 and {name: sup[name] for name in STRONG_BASELINE} == STRONG_BASELINE
    assert (losses.ALPHA, losses.GAMMA) == (0.9, 1.5)


def test_adam_and_its_rate_are_those_of_section_4_2(tmp_path):
    args = train.parse_args(["--weights", "none", "--backbone", "resnet18", "--logs-dir", str(tmp_path)])
    run = runtime.start(args, "aff_scl")
    _, optimizer, scheduler = train.optimised(args, run, train.build(args, run, 0))
    rates = []
    for _ in range(args.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(20 * [3.5e-4] + 20 * [3.5e-5] + 20 * [3.5e-6])
    assert [train.thirds(15)(epoch) for epoch in (0, 4, 5, 9, 10, 14)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["weight_decay"] == 5e-4
