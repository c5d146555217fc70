"""A trained network on one's own images: ranked lists, features and an exported program, without data set or ids.

A project's test.py gives a `Descriptor`, whose Euclidean distance is the project's ranking, and calls `run`:

    python aff_scl/test.py --weights W --query DIR --gallery DIR --out DIR     # ranking.csv, ranking.png
    python aff_scl/test.py --weights W --gallery DIR --export-features DIR     # features.npy, features.jsonl
    python aff_scl/test.py --weights W --export trunk.pt2                      # a program for torch.export.load

Every file is written under a temporary name and renamed, after all images were read.
"""

import csv
import io
import json
import os
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common import devices, distances, evaluation, images, transforms, visualize
from common.datasets import files
from common.runfiles import replace

RANKING = ("ranking.csv", "ranking.png")
SHOWN_QUERIES, SHOWN_RANKS = 8, 10  # of ranking.png
MARKET_NAME = re.compile(r"(-?\d+)_c(\d+)")  # a name that says who and which camera, as in Market-1501
TOLERANCE = 1e-4  # between a network and its exported program


class Descriptor(nn.Module):
    """Normalised images (B, 3, H, W) -> features (B, D): `after` of the network's output, or, with `flip`, of the mean
    over the image and its mirror image.
    """

    def __init__(self, network: nn.Module, flip: bool = False, after: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.network, self.flip, self.after = network, flip, after

    def forward(self, x: Tensor) -> Tensor:
        out = self.network(x).float()
        if self.flip:
            out = (out + self.network(x.flip(3)).float()) / 2
        return self.after(out) if self.after else out


class FromPixels(nn.Module):
    """uint8 RGB images (B, 3, H, W) -> features (B, D): normalisation, then the descriptor."""

    def __init__(self, descriptor: nn.Module):
        super().__init__()
        self.descriptor = descriptor
        self.register_buffer("mean", torch.tensor(transforms.IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(transforms.IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.descriptor((pixels.float() / 255 - self.mean) / self.std)


# --------------------------------------------------------------------------------------------------------------- flags


def add_flags(parser: ArgumentParser, query: bool = True) -> None:
    """Flags for one's own images; without `query` the script has a --query of its own."""
    group = parser.add_argument_group("your own images", "folders of images, searched in depth; no data set is needed")
    if query:
        group.add_argument("--query", metavar="PATH", help="folder of images, or one image, to look for in --gallery")
    group.add_argument("--gallery", metavar="PATH", help="folder of images to rank for each query")
    group.add_argument("--top", type=int, default=100, metavar="N", help="ranks a query in ranking.csv; 0: all")
    group.add_argument(
        "--export-features", metavar="PATH", help="write PATH/features.npy and .jsonl, or to PATH if it ends in .npy"
    )
    group.add_argument("--export", metavar="FILE.pt2", help="write the network as a program for torch.export.load")


def check(parser: ArgumentParser, args: Namespace) -> None:
    """End the process with one sentence for flags that do not fit together."""
    if args.query and not args.gallery:
        parser.error("--query PATH needs --gallery PATH")
    if args.gallery and not (args.query or args.export_features):
        parser.error("--gallery PATH needs --query PATH, or --export-features PATH to describe one folder")
    if args.export and not args.export.endswith(".pt2"):
        parser.error(f"--export {args.export}: the name must end in .pt2")
    if args.top < 0:
        parser.error(f"--top must be at least 0, not {args.top}")


def wanted(args: Namespace) -> bool:
    """Whether the flags ask for work that needs no data set."""
    return bool(args.gallery or args.export)


# ------------------------------------------------------------------------------------------------------------ what runs


def run(
    args: Namespace,
    descriptor: nn.Module,
    size: tuple[int, int],
    out: Path,
    *,
    interpolation: str = "bicubic",
    gallery_descriptor: nn.Module | None = None,
) -> None:
    """Do what `wanted` flags ask: rank --gallery for --query, write features, export (the gallery's) network.

    Args: size (height, width) of the network's images; out: folder for ranking.csv and ranking.png.
    Raises: FileNotFoundError, ValueError for a folder without images or an image that cannot be read, with its path.
    """
    device = devices.choose()
    of_gallery = gallery_descriptor or descriptor
    if args.export:
        export(of_gallery, size, Path(args.export))
    if not args.gallery:
        return
    parts = {"query": (args.query, descriptor)} if args.query else {}
    parts["gallery"] = (args.gallery, of_gallery)
    paths = {name: listed(f"--{name}", folder) for name, (folder, _) in parts.items()}
    feats = {}
    for name, (_, network) in parts.items():
        store = images.open_images(paths[name], *size, interpolation=interpolation, cache="off", name=name)
        feats[name] = evaluation.extract(network.to(device), store, device=device, batch_size=64).cpu()
    if args.export_features:
        rows = [{"path": path, "split": name, **known_ids(path)} for name in parts for path in paths[name]]
        write_features(args.export_features, torch.cat(list(feats.values())), rows)
    if args.query:
        rank(Path(out), paths["query"], paths["gallery"], feats["query"], feats["gallery"], args.top)


def listed(flag: str, folder: str) -> list[str]:
    """The images under a folder by relative path, or the one image that is named. Raises: FileNotFoundError."""
    if Path(folder).is_file():
        return [folder]
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{flag} {folder}: no such folder or image")
    found = files.images(folder, ours=is_result)
    if not found:
        raise FileNotFoundError(f"{flag} {folder}: no image in it")
    return found


def is_result(path: str) -> bool:
    """Whether an image is the picture of an earlier ranking, which lies beside its list."""
    return Path(path).name == RANKING[1] and Path(path).with_name(RANKING[0]).is_file()


def known_ids(path: str) -> dict[str, int]:
    """{"pid": .., "camid": ..} of a file named as Market-1501 names its images, camera from 0; else {}."""
    match = MARKET_NAME.match(Path(path).name)
    return {"pid": int(match[1]), "camid": int(match[2]) - 1} if match else {}


def rank(out: Path, query: list[str], gallery: list[str], q: Tensor, g: Tensor, top: int = 0) -> None:
    """Write ranking.csv (query, rank, gallery, distance) and ranking.png into `out`."""
    shown = min(len(gallery), max(top or len(gallery), SHOWN_RANKS))
    indices, values = (x.numpy() for x in distances.knn(q, shown, y=g))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["query", "rank", "gallery", "distance"])
    for name, places, row in zip(query, indices[:, : top or None], values):
        writer.writerows([name, k + 1, gallery[i], f"{row[k]:.6f}"] for k, i in enumerate(places))
    out.mkdir(parents=True, exist_ok=True)
    list_file, sheet = (out / name for name in RANKING)
    replace(list_file, lambda file: file.write(os.fsencode(text.getvalue())))  # names byte for byte
    rows = [
        [visualize.Cell(query[n], visualize.BLUE, files.shown(Path(query[n]).name)[:24])]
        + [_cell(query[n], gallery[i], value) for i, value in zip(indices[n, :SHOWN_RANKS], values[n])]
        for n in range(min(len(query), SHOWN_QUERIES))
    ]
    titles = ["query", *(f"rank {k + 1}" for k in range(min(shown, SHOWN_RANKS)))]
    visualize.grid(sheet, rows, column_titles=titles, gap_after=1)
    print(files.shown(f"ranking: {len(query)} queries, {len(gallery)} gallery images: {list_file}, {sheet}"))


def _cell(query: str, image: str, distance: float) -> visualize.Cell:
    """A gallery image with its distance, framed green or red where both names say who it is."""
    ids = [known_ids(path).get("pid") for path in (query, image)]
    if None in ids:
        return visualize.Cell(image, None, f"{distance:.3f}")
    same = ids[0] == ids[1]
    mark = "\u2713" if same else "\u2717"
    return visualize.Cell(image, visualize.GREEN if same else visualize.RED, f"{mark} {distance:.3f}")


def write_features(path: str | Path, feats: Tensor, rows: Sequence[dict]) -> None:
    """Features (N, D) as float32 .npy, and one line of JSON a row beside it, in the same order."""
    path = Path(path)
    file = path if path.suffix == ".npy" else path / "features.npy"
    if len(feats) != len(rows):
        raise ValueError(f"{len(feats)} features for {len(rows)} images")
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    replace(file.with_suffix(".jsonl"), lambda out: out.write(lines.encode()))
    replace(file, lambda out: np.save(out, feats.float().cpu().numpy()))
    print(files.shown(f"features: {file} {tuple(feats.shape)}, {file.with_suffix('.jsonl')}"))


def sample_rows(data) -> list[dict]:
    """Path, split, pid and camid of a data set's query and gallery images, for write_features."""
    return [
        {"path": s.path, "split": split, "pid": s.pid, "camid": s.camid}
        for split in ("query", "gallery")
        for s in getattr(data, split)
    ]


@torch.no_grad()
def export(descriptor: nn.Module, size: tuple[int, int], path: Path) -> None:
    """Write FromPixels(descriptor) by torch.export for any batch size, load it back and compare.

    Raises: ValueError, and leaves `path` as it was, if torch.export fails or the loaded program differs by more than
        TOLERANCE.
    """
    network = FromPixels(descriptor).cpu().eval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, *size), generator=generator, dtype=torch.uint8)
    try:
        program = torch.export.export(network, (pixels[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--export {path}: torch.export cannot follow the network ({reason})") from error
    content = io.BytesIO()
    torch.export.save(program, content)
    content.seek(0)
    loaded = torch.export.load(content).module()
    difference = max((loaded(x) - network(x)).abs().max().item() for x in (pixels, pixels[:1]))
    if not difference <= TOLERANCE:
        raise ValueError(f"--export {path}: the program differs by {difference:.2e} from the network; nothing written")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, lambda file: file.write(content.getbuffer()))
    print(
        f"program: {files.shown(path)}, uint8 RGB (B, 3, {size[0]}, {size[1]}) -> (B, {network(pixels).shape[1]}), "
        f"loaded back, max abs difference {difference:.1e}"
    )
