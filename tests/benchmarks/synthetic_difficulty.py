"""How hard the synthetic Market-1501 (small) is: colour histograms, an untrained network, a trained one.

    python tests/benchmarks/synthetic_difficulty.py --data-dir data/synthetic-small [--seed 0] [--epochs 30]

Prints mAP and rank-1 (Market rule) of (a) an HSV histogram in six stripes, (b) ResNet-18 and ResNet-50 with random
weights, (c) ResNet-18 trained with labels from scratch on the CPU; and, for untrained features of the training set, the
share of images whose nearest neighbour is the same person: in one camera, anywhere, in other cameras.
"""

import argparse
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torchvision import models

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import synthetic


def load(root: Path, folder: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 (N, 128, 64, 3), pids (N,), camids (N,) of a folder in Market's layout."""
    paths = sorted((root / folder).glob("*.jpg"))
    images = np.stack([cv2.imread(str(path))[..., ::-1] for path in paths])
    names = [path.name.split("_") for path in paths]
    return images, np.array([int(n[0]) for n in names]), np.array([int(n[1][1]) - 1 for n in names])


def histogram(images: np.ndarray) -> np.ndarray:
    """(N, 6 * 128) float32 unit rows: roots of HSV histograms (8 x 4 x 4 bins) in six horizontal stripes.

    Columns are weighted by a Gaussian around the middle of the box, against background, as usual in hand-made features.
    """
    rows, mask = [], np.exp(-((np.arange(64) - 31.5) / 16) ** 2)
    for image in images:
        hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV).astype(np.int64)
        bins = hsv[..., 0] * 8 // 180 * 16 + hsv[..., 1] // 64 * 4 + hsv[..., 2] // 64
        weights = np.broadcast_to(mask, bins.shape)
        rows.append(np.concatenate([np.bincount(part.ravel(), weight.ravel(), 128) for part, weight in zip(
            np.array_split(bins, 6), np.array_split(weights, 6))]))
    feats = np.sqrt(np.stack(rows))
    return (feats / np.linalg.norm(feats, axis=1, keepdims=True)).astype(np.float32)


def metrics(query: tuple, gallery: tuple) -> tuple[float, float]:
    """mAP and rank-1 by the Market rule, of (feats, pids, camids) each."""
    order = np.argsort(-(query[0] @ gallery[0].T), axis=1, kind="stable")
    precisions, firsts = [], []
    for row, pid, camid in zip(order, query[1], query[2]):
        row = row[~((gallery[1][row] == pid) & (gallery[2][row] == camid) | (gallery[1][row] == -1))]
        hits = np.flatnonzero(gallery[1][row] == pid)
        if len(hits):
            precisions.append(np.mean(np.arange(1, len(hits) + 1) / (hits + 1)))
            firsts.append(hits[0] == 0)
    return float(np.mean(precisions)), float(np.mean(firsts))


def tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> normalised float32 (N, 3, H, W)."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    scaled = torch.from_numpy(np.ascontiguousarray(images)).float() / 255
    return ((scaled - mean) / std).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def extract(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    model.eval()
    return torch.cat([F.normalize(model(tensor(images[i:i + 64]))) for i in range(0, len(images), 64)]).numpy()


def backbone(name: str) -> torch.nn.Module:
    model = getattr(models, name)(weights=None)
    model.fc = torch.nn.Identity()
    return model


def standardise(model: torch.nn.Module, images: np.ndarray) -> None:
    """Batch statistics from data, one pass: without them an untrained network's normalisation layers do nothing."""
    model.train()
    with torch.inference_mode():
        for i in range(0, 512, 64):
            model(tensor(images[i:i + 64]))


def neighbours(feats: np.ndarray, pids: np.ndarray, camids: np.ndarray) -> tuple[float, float, float]:
    """Share of images whose nearest other image is the same person: in one camera, everywhere, in other cameras."""
    sim, same = feats @ feats.T, pids[:, None] == pids
    np.fill_diagonal(sim, -2)
    rows, one = np.arange(len(pids)), camids[:, None] == camids
    shares = []
    for allowed in (one, np.ones_like(one), ~one):
        best = np.where(allowed, sim, -2).argmax(1)
        valid = (same & allowed & (sim > -2)).any(1)
        shares.append(float(same[rows, best][valid].mean()))
    return tuple(shares)


def batch_hard(feats: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    dist = torch.cdist(feats, feats)
    same = labels[:, None] == labels
    return F.softplus((dist * same).amax(1) - (dist + 1e4 * same).amin(1)).mean()


def train(images: np.ndarray, pids: np.ndarray, epochs: int, seed: int) -> torch.nn.Module:
    """ResNet-18 from scratch: 16 people x 4 images, cross entropy + batch-hard triplet, flip, shift, erasing, gains."""
    torch.manual_seed(seed)
    rng, (classes, labels) = np.random.default_rng(seed), np.unique(pids, return_inverse=True)
    model = backbone("resnet18")
    head = torch.nn.Sequential(torch.nn.BatchNorm1d(512), torch.nn.Linear(512, len(classes)))
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, 7e-4, weight_decay=5e-3)
    steps = epochs * 12
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.25)
    model.train()
    for _ in range(steps):
        people = [np.flatnonzero(labels == person) for person in rng.choice(len(classes), 16, replace=False)]
        rows = np.concatenate([rng.choice(own, 4, replace=len(own) < 4) for own in people])
        batch, y = augment(tensor(images[rows]), rng), torch.from_numpy(labels[rows])
        feats = model(batch)
        loss = F.cross_entropy(head(feats), y, label_smoothing=0.1) + batch_hard(feats, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def augment(batch: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    padded, out = F.pad(batch, (6, 6, 6, 6)), torch.empty_like(batch)
    for i in range(len(batch)):
        y, x = rng.integers(0, 13, 2)
        image = padded[i, :, y:y + 128, x:x + 64]
        out[i] = image.flip(2) if rng.random() < 0.5 else image
        out[i] = out[i] * float(np.exp(rng.normal(0, 0.2))) + torch.from_numpy(rng.normal(0, 0.25, (3, 1, 1))).float()
        if rng.random() < 0.5:
            h, w = rng.integers(16, 56), rng.integers(10, 32)
            y, x = rng.integers(0, 128 - h), rng.integers(0, 64 - w)
            out[i, :, y:y + h, x:x + w] = 0
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default="data/synthetic-small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=30, help="of 12 steps; 0 leaves (c) out")
    args = parser.parse_args()
    root = synthetic.write("market", args.data_dir, "small", args.seed)
    parts = {folder: load(root, folder) for folder in ("bounding_box_train", "query", "bounding_box_test")}
    images, pids, camids = parts["bounding_box_train"]

    def report(title: str, embed) -> None:
        query, gallery = ((embed(parts[p][0]), *parts[p][1:]) for p in ("query", "bounding_box_test"))
        mean_ap, rank1 = metrics(query, gallery)
        print(f"{title:<42} mAP {100 * mean_ap:5.1f}   rank-1 {100 * rank1:5.1f}", flush=True)

    report("(a) HSV histogram, 6 stripes", histogram)
    for name in ("resnet18", "resnet50"):
        torch.manual_seed(args.seed)
        model = backbone(name)
        for state in ("untrained", "untrained, batch statistics"):
            if "statistics" in state:
                standardise(model, images)
            report(f"(b) {name}, {state}", lambda x: extract(model, x))
            shares = neighbours(extract(model, images), pids, camids)
            one, anywhere, other = shares
            print(f"    nearest is same pid: {one:.2f} in one camera, {anywhere:.2f} anywhere, {other:.2f} in others")
    if args.epochs:
        start = time.perf_counter()
        model = train(images, pids, args.epochs, args.seed)
        report(f"(c) resnet18, {args.epochs} epochs ({time.perf_counter() - start:.0f} s)", lambda x: extract(model, x))


if __name__ == "__main__":
    main()
