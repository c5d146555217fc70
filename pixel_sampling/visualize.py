"""Draw the paper's figures 1, 3, 4 and 5.

python pixel_sampling/visualize.py 1 --synthetic small              # images, parts, changed images: vector beside flat
python pixel_sampling/visualize.py 3 --synthetic small              # pixel values: initial, erasing, pixel sampling
python pixel_sampling/visualize.py 4 --checkpoint OURS --against BASELINE HPM      # class activation maps
python pixel_sampling/visualize.py 5 --checkpoint OURS --against HPM               # rank lists, and the top 20 as CSV
"""

import csv
import functools
import io
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from common import flags
from pixel_sampling.flags import figures_args as parse_args
from pixel_sampling.flags import parse_args as train_flags

if __name__ == "__main__":
    arguments = flags.answer(parse_args)  # torch is loaded below

import numpy as np
import torch
import torch.nn.functional as F

from common import datasets, distances, images, inputs, runtime, transforms, visualize
from common.runfiles import replace
from pixel_sampling import model, sampling
from pixel_sampling.masks import open_masks, palette
from pixel_sampling.settings import QUERIES
from pixel_sampling.test import load_network, open_test


def training_batch(args, chosen):
    """Normalised training images (B, 3, H, W) and their parts (B, H, W); chosen(samples, rng) -> indices."""
    settings = vars(train_flags([])) | {
        "data_dir": args.data_dir or "data",
        "synthetic": args.synthetic,
        "cache": args.cache,
        "cache_dir": args.cache_dir,
        "workers": args.workers,
    }
    run = runtime.start(Namespace(**settings), "pixel_sampling")
    data = inputs.dataset(run, "prcc", mask_format=args.mask_format or "part6")
    samples = [data.train[i] for i in chosen(data.train, np.random.default_rng(args.seed))]
    store = images.open_images(
        [s.path for s in samples], settings["height"], settings["width"], interpolation="bilinear", cache="off"
    )
    parts = open_masks(samples, settings["height"], settings["width"], args.mask_format or "part6", cache="off").gather(
        np.arange(len(samples))
    )
    return transforms.normalize(store.gather(np.arange(len(samples)))), parts[:, 0], samples


def trio_and_others(samples, rng, others: int):
    """Two images of one person in the same clothes, one in other clothes, one of each of `others` more people."""
    pids = rng.permutation(np.unique([s.pid for s in samples]))

    def some(pid, camid):
        found = [i for i, s in enumerate(samples) if s.pid == pid and s.camid == camid]
        return int(rng.choice(found)) if found else next(i for i, s in enumerate(samples) if s.pid == pid)

    return [some(pids[0], camid) for camid in (0, 1, 2)] + [some(pid, 0) for pid in pids[1 : 1 + others]]


def figure1(args) -> list[Path]:
    """Rows: images, six parts, X' of this batch; vector beside flat."""
    x, parts, samples = training_batch(args, lambda s, rng: trio_and_others(s, rng, args.number - 3))
    rows, titles = [list(transforms.pictures(x)), [palette(6)[p] for p in parts.numpy()]], ["image", "parts"]
    for mode in ("vector", "flat"):
        changed = sampling.sample_pixels(x, parts, torch.Generator().manual_seed(args.seed), mode=mode)
        rows.append(list(transforms.pictures(changed).contiguous()))
        titles.append(f"changed ({mode})")
    columns = [f"({letter})" for letter in "abcdefghijklmnopqrstuvwxyz"[: len(samples)]]
    return [
        visualize.grid(
            Path(args.out) / "figure1.png",
            rows,
            row_titles=titles,
            column_titles=columns,
            title="(a)-(c) one person, (c) in other clothes; the rest other people",
        )
    ]


def figure3(args) -> list[Path]:
    """Density of the normalised values of one batch of 64: initial, random erasing, pixel sampling."""
    x, parts, _ = training_batch(args, lambda s, rng: rng.permutation(len(s))[:64].tolist())
    draw = torch.Generator().manual_seed(args.seed)
    boxes = transforms.draw_erasing(len(x), *x.shape[2:], draw, 0.5, law="uniform")
    kinds = {
        "initial": x,
        "random erasing": transforms.erase(x.clone(), boxes, transforms.IMAGENET_MEAN),
        "pixel sampling": sampling.sample_pixels(x, parts, draw),
    }
    edges = np.linspace(-2.2, 2.8, 101)
    panels = {}
    for name, values in kinds.items():
        density = np.histogram(values.numpy(), edges, density=True)[0]
        panels[f"density, {name}"] = [visualize.Curve(name, (edges[1:] + edges[:-1]) / 2, density)]
    return [
        visualize.plot(
            Path(args.out) / "figure3.png",
            panels,
            x_label="normalised pixel value",
            title="Pixel sampling leaves the distribution as it is",
        )
    ]


def class_maps(network, x: torch.Tensor, labels: torch.Tensor, folded: bool) -> torch.Tensor:
    """BoT: the map before pooling weighted by the classifier rows of the labels (B,), signed, (B, h, w).

    Folded, the neck is applied to every place of the map, so that the mean of a map is the score of its class; else
    the row is taken as it stands, and the neck left out.
    """
    with torch.no_grad():
        maps, weights = network.backbone(x), network.classifier.weight[labels]  # (B, D, h, w), (B, D)
        if folded:
            neck = network.neck
            maps = (maps - neck.running_mean[:, None, None]) / torch.sqrt(neck.running_var + neck.eps)[:, None, None]
            maps = maps * neck.weight[:, None, None] + neck.bias[:, None, None]
        return torch.einsum("bchw,bc->bhw", maps, weights)


def activation_maps(
    network, x: torch.Tensor, labels: torch.Tensor | None, folded: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (B, H, W) in [0, 1] and the classes (B,) they are for: the given ones, else the predicted.

    BoT: class_maps, ReLU. Other networks: Grad-CAM of the last map for the class score summed over branches.
    """
    with torch.no_grad():
        labels = network.scores(x).argmax(1) if labels is None else labels
    if isinstance(network, model.BoT):
        maps = class_maps(network, x, labels, folded).relu()
    else:
        layer = network.branches[2] if isinstance(network, model.MGN) else network.backbone
        maps = visualize.grad_cam(Scores(network), layer, x, lambda scores: scores.gather(1, labels[:, None])[:, 0])
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    maps = (maps - low) / (high - low).clamp_min(1e-12)
    return F.interpolate(maps[:, None], x.shape[2:], mode="bilinear", align_corners=False)[:, 0], labels


class Scores(torch.nn.Module):
    """A network as the function from images to its class scores."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network.scores(x)


def titled(network, trained: dict) -> str:
    """A short name of a network for a column."""
    words = [trained["arch"], *(["PS"] if trained["ps_mode"] != "off" else [])]
    return " + ".join([*words, *([trained["consistency"]] if trained["consistency"] != "none" else [])])


def figure4(args) -> list[Path]:
    """Columns: image, the networks of --against, ours, each fed at its own size; heat over the image, half and half."""
    loaded = [load_network(path) for path in [*args.against, args.checkpoint]]
    if any(trained["arch"].startswith("head") for _, trained, _ in loaded):
        raise ValueError("figure 4 draws networks of whole images; the head networks look at crops")
    run, data, _ = open_test(args, loaded[-1][1])
    samples = data.train if args.split == "train" else data.query
    chosen = np.sort(np.random.default_rng(args.seed).permutation(len(samples))[: args.number])
    known = torch.from_numpy(datasets.labels(data.train)[chosen]).to(run.device) if args.split == "train" else None
    paths = [samples[i].path for i in chosen]

    @functools.cache
    def opened(*size: int) -> torch.Tensor:
        """The images at the size of a network."""
        return images.open_images(paths, *size, interpolation="bilinear", cache="off").gather(np.arange(len(paths)))

    pictures = [p.permute(1, 2, 0).numpy() for p in opened(loaded[-1][1]["height"], loaded[-1][1]["width"])]
    columns, names = [pictures], ["image"]
    for network, trained, _ in loaded:
        x = transforms.normalize(opened(trained["height"], trained["width"]).to(run.device))
        maps, _ = activation_maps(network.to(run.device), x, known, args.cam == "neck")
        columns.append([visualize.heat_map(p, m.cpu().numpy(), scale=False) for p, m in zip(pictures, maps)])
        names.append(titled(network, trained))
    title = "Class activation maps, " + (
        "true class" if known is not None else "predicted class of the training people"
    )
    return [visualize.grid(Path(args.out) / "figure4.png", list(zip(*columns)), column_titles=names, title=title)]


def ranked(args, path: str):
    """Data, query indices of the chosen set, their top 20 (indices, matches, distances), a name, the file."""
    network, trained, file = load_network(path)
    run, data, store = open_test(args, trained)
    feats = inputs.extract(
        run, network.to(run.device), store, batch_size=args.batch_size, flip=not trained["arch"].startswith("head")
    )
    own = [i for i, s in enumerate(data.query) if s.camid == QUERIES[args.query]]
    dist = distances.pairwise(feats[: len(data.query)][own], feats[len(data.query) :], "cosine").cpu().numpy()
    top = visualize.top_matches(dist, [data.query[i].pid for i in own], [s.pid for s in data.gallery], k=20)
    return data, own, top, titled(network, trained), file


def figure5(args) -> list[Path]:
    """Rank lists of the same queries: (a) the first of --against, (b) ours; (c) failures of ours.

    The queries are those that ours alone gets right, else any that ours gets right, else any.
    """
    results = [ranked(args, path) for path in [*args.against[:1], args.checkpoint]]
    data, own, (_, ours, _), _, _ = results[-1]
    rng = np.random.default_rng(args.seed)
    other = results[0][2][1]
    candidates = [ours[:, 0] & ~other[:, 0], ours[:, 0], np.ones(len(ours), bool)]
    better = rng.permutation(np.flatnonzero(next(kept for kept in candidates if kept.any())))[: args.number]
    failed = rng.permutation(np.flatnonzero(~ours[:, 0]))[: args.number]
    sheets = [(letter, result, better) for letter, result in zip("ab" if len(results) > 1 else "b", results)] + [
        ("c", results[-1], failed)
    ]
    written = []
    for letter, (_, _, (indices, matches, dist), name, _), rows in sheets:
        if len(rows):
            title = f"({letter}) {name}, {args.query} clothes" + (": failures" if letter == "c" else "")
            written.append(
                visualize.rank_list(
                    Path(args.out) / f"figure5{letter}.png",
                    [data.query[own[i]].path for i in rows],
                    [s.path for s in data.gallery],
                    indices[rows, :6],
                    matches[rows, :6],
                    dist[rows, :6],
                    title=title,
                )
            )
    return [*written, *(write_csv(Path(args.out) / f"figure5-{n}.csv", result) for n, result in enumerate(results))]


def write_csv(path: Path, result) -> Path:
    """The first 20 gallery images of every query."""
    data, own, (indices, matches, dist), name, file = result
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["network", "checkpoint", "query", "rank", "gallery", "distance", "match"])
    for row, query in enumerate(own):
        relative = Path(data.query[query].path).relative_to(data.root).as_posix()
        for rank, index in enumerate(indices[row]):
            if index >= 0:
                gallery = Path(data.gallery[index].path).relative_to(data.root).as_posix()
                writer.writerow(
                    [name, file.name, relative, rank + 1, gallery, f"{dist[row, rank]:.6f}", int(matches[row, rank])]
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, lambda out: out.write(text.getvalue().encode()))
    return path


def main(args):
    for path in {1: figure1, 3: figure3, 4: figure4, 5: figure5}[args.figure](args):
        print(path)


if __name__ == "__main__":
    runtime.execute(main, arguments)
