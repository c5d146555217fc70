"""A trained network on one's own images: ranked lists, features and an exported program, without data set or ids.

A project's test.py gives a `Descriptor`, whose Euclidean distance is the project's ranking, and calls `run`:

    python aff_scl/test.py --weights W --query DIR --gallery DIR --out DIR     # ranking.csv, ranking.png
    python aff_scl/test.py --weights W --gallery DIR --export-features DIR     # features.npy, .jsonl, .json
    python aff_scl/test.py --weights W --query DIR --gallery-features DIR      # the same lists from these features
    python aff_scl/test.py --weights W --export trunk.pt2                      # a program for torch.export.load

Every file is written under a temporary name and renamed, after all images were read. A gallery is described and
searched `feature_files.ROWS` images at a time, so no number of images needs more memory than that (`rank`).
"""

import csv
import hashlib
import io
import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from common import devices, distances, evaluation, feature_files, images, records, transforms, visualize
from common.datasets import files
from common.flags import method_flags
from common.runfiles import replace

RANKING = ("ranking.csv", "ranking.png")
SHOWN_QUERIES, SHOWN_RANKS = 8, 10  # of ranking.png
MARKET_NAME = re.compile(r"(-?\d+)_c(\d+)")  # a name that says who and which camera, as in Market-1501
TOLERANCE = 1e-4  # between a network and its exported program


class Descriptor(nn.Module):
    """Normalised images (B, 3, H, W) -> features (B, D): `after` of the network's output, or, with `flip`, of the mean
    over the image and its mirror image. `form` says in a word what feature of the network that is.
    """

    def __init__(
        self, network: nn.Module, form: str, flip: bool = False, after: Callable[[Tensor], Tensor] | None = None
    ):
        super().__init__()
        self.network, self.form, self.flip, self.after = network, form, flip, after

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


def origin(project: str, network: nn.Module, trained: dict, interpolation: str = "bicubic") -> dict:
    """What must be equal of two sets of features for their distances to mean anything, beside the form.

    Args: trained: the flags of the network's training, height and width among them; interpolation of its images.
    """
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {
        "schema": feature_files.SCHEMA,
        "project": project,
        "weights": digest.hexdigest()[:16],
        "training": records.digest(method_flags(trained)),
        "height": trained["height"],
        "width": trained["width"],
        "interpolation": interpolation,
        "metric": "euclidean",
    }


def wanted(args: Namespace) -> bool:
    """Whether the flags ask for work that needs no data set."""
    return bool(args.gallery or args.gallery_features or args.export)


def run(
    args: Namespace, descriptor: Descriptor, origin: dict, out: Path, gallery_descriptor: Descriptor | None = None
) -> None:
    """Do what `wanted` flags ask: rank a gallery for --query, write features, export (the gallery's) network.

    Args: origin: `origin` of the network; out: folder for ranking.csv and ranking.png.
    Raises: FileNotFoundError, ValueError for a folder without images, an image that cannot be read, or features that
        are not the network's, with the path.
    """
    device, size = devices.choose(), (origin["height"], origin["width"])
    networks = {"query": descriptor, "gallery": gallery_descriptor or descriptor}
    if args.export:
        export(networks["gallery"], size, Path(args.export))
    given = {name: folder for name in networks if (folder := getattr(args, name))}
    paths = {name: listed(f"--{name}", folder) for name, folder in given.items()}
    forms = {name: network.form for name, network in networks.items()}

    def features(name: str) -> Iterator[Tensor]:
        """(b, D) on the device, feature_files.ROWS images at a time."""
        for start in range(0, len(paths[name]), feature_files.ROWS):
            part = paths[name][start : start + feature_files.ROWS]
            store = images.open_images(part, *size, interpolation=origin["interpolation"], cache="off", name=name)
            yield evaluation.extract(networks[name].to(device), store, device=device, batch_size=64)

    described = args.gallery_features
    if described:
        gallery = feature_files.Gallery(described, origin, forms["gallery"])  # before any query is described
    query = torch.cat(list(features("query"))) if args.query else None
    if args.export_features:
        rows = [{"path": path, "split": name, **known_ids(path)} for name in paths for path in paths[name]]
        blocks = chain([] if query is None else [query], features("gallery"))
        feature_files.write(args.export_features, blocks, rows, origin, {name: forms[name] for name in paths})
        described = args.export_features
        gallery = feature_files.Gallery(described, origin, forms["gallery"], "--export-features")
    if args.query and described:
        rank(Path(out), paths["query"], gallery, query, gallery.blocks(device), args.top, gallery.name)
    elif args.query:
        rank(Path(out), paths["query"], paths["gallery"], query, features("gallery"), args.top)


def export_data(path: str, feats: Tensor, data, origin: dict, forms: str | dict[str, str]) -> None:
    """Write the features (Q + G, D) of a data set's query and gallery as `--gallery-features` takes them.

    Args: origin: `origin`; forms: `Descriptor.form`, or that of each split.
    """
    splits = ("query", "gallery")
    rows = [
        {"path": s.path, "split": name, "pid": s.pid, "camid": s.camid} for name in splits for s in getattr(data, name)
    ]
    forms = forms if isinstance(forms, dict) else dict.fromkeys(splits, forms)
    feature_files.write(path, feats.split(feature_files.ROWS), rows, origin, forms)


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


def rank(
    out: Path,
    query: list[str],
    gallery: Sequence[str],
    q: Tensor,
    blocks: Iterable[Tensor],
    top: int = 0,
    name: str = "gallery",
) -> None:
    """Write ranking.csv (query, rank, gallery, distance) and ranking.png into `out`.

    Args: q (Q, D) and blocks of (b, D), the features of all gallery images in order; top: ranks a query, 0: all; name
        of the blocks in errors.
    Memory: a block of the gallery, its distances to 2,048 queries at most, and top places a query.
    """
    shown = min(len(gallery), max(top or len(gallery), SHOWN_RANKS))
    indices, values = (x.cpu().numpy() for x in distances.nearest(q, blocks, shown, name=name))
    paths = {i: gallery[i] for i in set(indices.flat)}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["query", "rank", "gallery", "distance"])
    for image, places, row in zip(query, indices[:, : top or None], values):
        writer.writerows([image, k + 1, paths[i], f"{row[k]:.6f}"] for k, i in enumerate(places))
    out.mkdir(parents=True, exist_ok=True)
    list_file, sheet = (out / name for name in RANKING)
    replace(list_file, lambda file: file.write(os.fsencode(text.getvalue())))  # names byte for byte
    said = f"ranking: {len(query)} queries, {len(gallery)} gallery images: {list_file}"
    rows = [
        [visualize.Cell(query[n], visualize.BLUE, files.shown(Path(query[n]).name)[:24])]
        + [_cell(query[n], paths[i], value) for i, value in zip(indices[n, :SHOWN_RANKS], values[n])]
        for n in range(min(len(query), SHOWN_QUERIES))
    ]
    gone = [cell.image for row in rows for cell in row if not Path(cell.image).is_file()]
    if gone:  # of a gallery that was described elsewhere
        sheet.unlink(missing_ok=True)
        print(files.shown(f"{said}; no {sheet.name}, since {gone[0]} is not there"))
        return
    titles = ["query", *(f"rank {k + 1}" for k in range(min(shown, SHOWN_RANKS)))]
    visualize.grid(sheet, rows, column_titles=titles, gap_after=1)
    print(files.shown(f"{said}, {sheet}"))


def _cell(query: str, image: str, distance: float) -> visualize.Cell:
    """A gallery image with its distance, framed green or red where both names say who it is."""
    ids = [known_ids(path).get("pid") for path in (query, image)]
    if None in ids:
        return visualize.Cell(image, None, f"{distance:.3f}")
    same = ids[0] == ids[1]
    mark = "\u2713" if same else "\u2717"
    return visualize.Cell(image, visualize.GREEN if same else visualize.RED, f"{mark} {distance:.3f}")


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
