"""PRSNet: losses of the first five steps of both scripts, as recorded, and as loops written from the paper; what the
scripts do by default against tables typed from the paper.
"""

import copy
import json
import tempfile
from pathlib import Path

import golden
import numpy as np
import prsnet_small as small
import pytest
import torch
import torch.nn.functional as F

from common import runtime
from prsnet import flags, masking, pretrain, train
from prsnet.model import SIZES


# ------------------------------------------------------------------------------------------------------ recorded losses
def five_epochs(script, parse, root: Path, words) -> list[float]:
    """Losses of five epochs of one step each, through the script's own main."""
    out = Path(tempfile.mkdtemp(dir=root))
    places = ["--data-dir", root, "--logs-dir", out, "--results-dir", out, *small.WORDS, "--epochs", 5, *words]
    script.main(parse([str(word) for word in places]))
    (log,) = out.rglob("log.jsonl")
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def pretraining(*words):
    with tempfile.TemporaryDirectory() as folder:
        words = ("--batch-size", 16, "--lr", 0.16, "--warmup", 1, "--weight-decay", 0.5, *words)
        return five_epochs(pretrain, flags.pretrain_args, small.people(Path(folder), 16), words)


def finetuning(*words, model="prsnet"):
    """From the weights of a short pre-training."""
    with tempfile.TemporaryDirectory() as folder:
        root = small.people(Path(folder), 16)
        weights = "none"
        if "--preset" not in words:
            before = ("--batch-size", 16, "--lr", 0.16, "--model", model)
            five_epochs(pretrain, flags.pretrain_args, root, before)
            (weights,) = root.rglob("best.pt")
        words = ("--iters", 1, "--lr", 0.004, "--weight-decay", 0.05, "--weights", weights, "--model", model, *words)
        return five_epochs(train, flags.train_args, root, ("--batch-size", 16, *words))


CASES = {
    "pretrain": pretraining,
    "pretrain mae": lambda: pretraining("--model", "mae"),
    "pretrain authors": lambda: pretraining("--preset", "authors", "--bottleneck", 32),
    "mctl": finetuning,
    "ctl": lambda: finetuning("--centroid", "ctl"),
    "mae": lambda: finetuning(model="mae"),
    "authors": lambda: finetuning("--preset", "authors"),
}


@pytest.mark.parametrize("name", CASES)
def test_five_steps_have_the_recorded_losses(name):
    golden.check("prsnet", name, CASES[name]())


# ------------------------------------------------------------------------------------- loops written from the paper
def test_five_steps_of_pretraining_equal_a_loop_from_the_paper(monkeypatch):
    for model in ("prsnet", "mae"):
        args, fixed = small.pretrain_args("--model", model), small.Fixed(8)
        monkeypatch.setattr(masking, "draw", fixed.draw)
        run = runtime.start(args, "prsnet")
        network, optimizer, scheduler = pretrain.build(args, run, 1)
        theirs, state = copy.deepcopy(network), (runtime.scaler(run), small.store(8), fixed.augment)
        rest = run, args, network, optimizer, scheduler, *state
        ours = [pretrain.train_one_epoch(*rest, epoch)["loss"] for epoch in range(5)]
        assert ours == pytest.approx(loop_of_pretraining(theirs.train(), fixed), rel=1e-4)


def loop_of_pretraining(network, fixed):
    """Losses of Eq. (1), AdamW with decay of matrices only, warm-up of one step, half a cosine."""
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": 1.0},
            {"params": [p for p in network.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    found = []
    for step, (numbers, x) in enumerate(fixed.batches):
        masked = fixed.hidden(numbers)
        rebuilt = network(x, masked)
        m = torch.zeros(len(x), 64, 32, dtype=torch.bool)
        for b, i, j in masked.nonzero().tolist():
            m[b, 4 * i : 4 * i + 4, 2 * j : 2 * j + 2] = True
        errors = [(x[b, c] - rebuilt[b, c])[m[b]] ** 2 for b in range(len(x)) for c in range(3)]
        loss = torch.cat(errors).mean()  # Eq. (1): over B * sum(m) values, of which every image has as many
        for group in adam.param_groups:
            group["lr"] = 0.32 * 8 / 256 * (0 if step == 0 else 0.5 * (1 + np.cos(np.pi * (step - 1) / 4)))
        adam.zero_grad()
        loss.backward()
        adam.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("model, form", [("prsnet", "mctl"), ("prsnet", "ctl"), ("mae", "mctl")])
def test_five_steps_equal_a_loop_from_the_paper(model, form, monkeypatch):
    labels = small.labels()
    args, fixed = small.finetune_args("--model", model, "--centroid", form), small.Fixed(len(labels))
    monkeypatch.setattr(masking, "draw", fixed.draw)
    run = runtime.start(args, "prsnet")
    network, optimizer, centres, scheduler = train.build(args, run, len(small.SIZES), "market")
    theirs = copy.deepcopy(network).train()
    state, ours = (runtime.scaler(run), small.store(len(labels)), labels, fixed.augment), []
    for epoch in range(5):
        ours.append(train.train_one_epoch(run, args, network, [optimizer, centres], *state, epoch))
        scheduler.step()
    theirs = loop_of_finetuning(theirs, fixed, labels, form)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


def loop_of_finetuning(network, fixed, labels, form):
    """Eqs. (2) and (3) or (4), cross-entropy and centre loss of small batches of three images a person."""
    theirs = [p for name, p in network.named_parameters() if name not in ("centres", "neck.bias")]
    adam, found = torch.optim.Adam(theirs, weight_decay=0.05), []
    for epoch, (numbers, x) in enumerate(fixed.batches):
        y, log = labels[numbers], {}
        f, hidden = network.encoder(x), fixed.hidden(numbers)
        log["id"] = F.cross_entropy(network.classifier(network.neck(f)), y, label_smoothing=0.1)
        if form == "mctl":
            fm = network.encoder(x, hidden)
        d = ((f[:, None] - f[None]) ** 2).sum(2).clamp_min(1e-24).sqrt()
        terms = []
        for a in range(len(x)):
            own = [d[a, j] for j in range(len(x)) if y[j] == y[a] and j != a]
            if own:
                terms.append(F.relu(max(own) - min(d[a, j] for j in range(len(x)) if y[j] != y[a]) + 0.5))
        log["triplet"] = torch.stack(terms).mean()
        gaps = f - network.centres[y]
        log["centre"] = 5e-4 * (gaps**2).sum(1).mean()
        groups = {pid: (y == pid).nonzero().flatten().tolist() for pid in dict.fromkeys(y.tolist())}
        slots = []
        for i in range(3):
            taking = {pid: (g[i], [j for j in g if j != g[i]]) for pid, g in groups.items() if i < len(g) > 1}
            terms = []
            for pid, (q, rest) in taking.items():
                gaps = []
                for other, (_, members) in taking.items():
                    if other != pid:
                        own, points = f[rest].mean(0), f[members].mean(0)
                        if form == "mctl":
                            share = len(rest) / (len(rest) + len(members))  # lambda1; lambda2 = 1 - share
                            own = (own + share * fm[rest].mean(0)) / (1 + share)
                            points = (points + (1 - share) * fm[members].mean(0)) / (2 - share)
                        gaps.append((f[q] - own).norm() - (f[q] - points).norm())
                terms.append(F.relu(max(gaps) + 0.5))
            if len(terms) > 1:
                slots.append(torch.stack(terms).mean())
        log["centroid"] = torch.stack(slots).mean()
        adam.param_groups[0]["lr"] = 0.01 * [1, 1, 0.1, 0.01, 0.01][epoch]  # five epochs for 120: warm-up below one
        adam.zero_grad()
        network.centres.grad = None
        sum(log.values()).backward()
        adam.step()
        network.centres.data -= 0.5 * network.centres.grad / 5e-4
        found.append({"loss": sum(v.item() for v in log.values()), **{k: v.item() for k, v in log.items()}})
    return found


# ------------------------------------------------------------------------------------------------------------- defaults
SHARED = {  # sec. III-A, III-B
    "height": 256,
    "width": 128,
    "mask_ratio": 0.75,
    "mask_block": [16, 8],
    "bottleneck": 2048,
    "model": "prsnet",
    "size": "full",
    "block": "rep",
    "preset": "paper",
    "seed": 0,
}
PRETRAINING = {  # Eq. (1); the paper is silent from --epochs on, these are the authors'
    "mask_loss": "masked",
    "epochs": 400,
    "batch_size": 128,
    "warmup": 20,
    "lr": 3e-4,
    "weight_decay": 0.05,
    "crop_scale": [0.2, 1.0],
    "crop_ratio": [0.375, 0.667],
    "clip": 0.0,
    "weights": "none",
}
FINETUNING = {  # Eq. (4), sec. IV; the paper is silent from --dist on
    "centroid": "mctl",
    "dataset": "market",
    "weights": "pretrain/prsnet",
    "dist": "l2",
    "margin": 0.5,
    "loss_weights": [1.0, 1.0, 5e-4, 1.0],
    "batch_size": 64,
    "num_instances": 4,
    "epochs": 120,
    "iters": None,
    "lr": 3.5e-4,
    "weight_decay": 5e-4,
    "mae_head": "linear",
    "variant": [],
    "protocol": ["image", "centroid", "centroid-legacy"],
    "centroid_distractors": "drop",
}


def test_defaults_are_those_of_the_paper():
    for parse, table in ((flags.pretrain_args, PRETRAINING), (flags.train_args, FINETUNING)):
        args = vars(parse([]))
        assert {name: args[name] for name in SHARED | table} == SHARED | table
    full = SIZES["full"]  # Figure 2: N1 ... N4; dimensions of ConvNeXt-T; MAE's ViT-B and its decoder
    assert full == ((96, 192, 384, 768), (3, 3, 9, 3), 2048, (768, 12, 12), (512, 8, 16))


@pytest.mark.parametrize("dataset, ids", [("market", 4), ("cuhk03", 8), ("duke", 8), ("msmt17", 8)])
def test_authors_mae_has_no_masked_pass_and_small_batches(dataset, ids):
    args = flags.train_args(["--preset", "authors", "--model", "mae", "--dataset", dataset])
    assert (args.centroid, args.batch_size, args.num_instances) == ("ctl-authors", 4 * ids, 4)
    assert args.variant == ["erase=mean", "norms=drop"] and args.mae_head == "authors24"
    assert flags.pretrain_args(["--preset", "authors", "--model", "mae"]).mask_loss == "masked"
