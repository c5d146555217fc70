"""How hard a rendered Market-1501 is before any training: colour histograms and networks with random weights.

    python tests/benchmarks/synthetic_difficulty.py --size small

Prints mAP and rank-1 (Market rule) of the colour-histogram baseline and of untrained ResNet-18 and ResNet-50, as they
are and with BatchNorm statistics of the data; and for the training images how often the nearest other image is the same
person, within one camera and among other cameras: what clustering without labels starts from. What training reaches on
the same data, without and with labels: `python aff_scl/train.py --row demo` and `--row demo-supervised`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torchvision import models

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import datasets, distances, evaluation, histogram, images, inputs, synthetic, transforms


def untrained(name: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = models.get_model(name, weights=None)
    model.fc = torch.nn.Identity()
    return model


@torch.no_grad()
def standardise(model: torch.nn.Module, store: images.ImageStore) -> None:
    """Give the normalisation layers the statistics of 512 images (mutates model)."""
    model.train()
    for indices in torch.arange(min(512, len(store))).split(64):
        model(transforms.normalize(store.gather(indices)))


def neighbours(feats: torch.Tensor, samples: list) -> tuple[float, float]:
    """Share of images whose nearest other image is the same person: in the same camera, among other cameras."""
    pids, camids = (torch.tensor([getattr(s, key) for s in samples]) for key in ("pid", "camid"))
    dist = distances.pairwise(feats, feats, "cosine").fill_diagonal_(np.inf)
    same, one = pids[:, None] == pids, camids[:, None] == camids
    shares = []
    for allowed in (one, ~one):
        best = dist.masked_fill(~allowed, np.inf).argmin(1)
        possible = (same & allowed).fill_diagonal_(False).any(1)
        shares.append(float(same[torch.arange(len(best)), best][possible].float().mean()))
    return shares[0], shares[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", help="written on first use; default data/synthetic-SIZE")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--size", default="small", help="small, medium or full")
    args = parser.parse_args()
    args.data_dir = args.data_dir or f"data/synthetic-{args.size}"
    synthetic.write("market", args.data_dir, args.size)
    data = datasets.load("market", args.data_dir)
    test, train = (
        images.open_images([s.path for s in part], 128, 64, name=name)
        for part, name in ((data.query + data.gallery, "test"), (data.train, "train"))
    )

    def show(name, feats):
        m = inputs.rank_metrics(data, feats)
        print(f"{name:<44} mAP {100 * m.mAP:5.1f}   rank-1 {100 * m.rank(1):5.1f}", flush=True)

    show("colour histogram", histogram.color_histograms(test))
    for name in ("resnet18", "resnet50"):
        model = untrained(name, args.seed)
        for text in ("random weights", "random weights, BN statistics of the data"):
            show(f"{name}, {text}", evaluation.extract(model, test))
            within, across = neighbours(evaluation.extract(model, train), data.train)
            print(f"    nearest is the same person: {within:.2f} within a camera, {across:.2f} among other cameras")
            standardise(model, train)


if __name__ == "__main__":
    main()
