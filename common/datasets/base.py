"""What every data set module shares: samples, the Dataset record, the search for its tree, and reading of file
names."""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.datasets import files
from common.datasets.files import MARKER

SPLITS = ("train", "query", "gallery")
BOX_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
WITHOUT = "if they do not belong to the data set, give a tree without them (links will do)"  # data may be read-only
BOXES = tuple(BOX_FOLDERS.values())  # the layout of Market-1501, which others took over


class Sample(NamedTuple):
    """One image: pid is the raw identity (0 distractor, -1 junk), camid counts from 0."""

    path: str
    pid: int
    camid: int
    modality: str = "rgb"
    clothes: int = -1
    mask: str | None = None


@dataclass
class Dataset:
    """A loaded data set; train, query and gallery are lists of Sample, sorted by path relative to root (POSIX
    order)."""

    name: str
    root: Path
    kind: str  # "real" | "synthetic"
    train: list[Sample]
    query: list[Sample]
    gallery: list[Sample]
    published: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # images without junk, ids, cams

    def statistics(self) -> str:
        """Table of images, ids and cameras of each split; junk and distractors are counted apart and are no ids."""
        lines = [
            f"{self.name} ({self.kind}) {self.root}",
            f"{'split':<8} {'images':>8} {'ids':>6} {'cameras':>8} {'distractors':>12} {'junk':>6}",
        ]
        for split in SPLITS:
            samples = getattr(self, split)
            images, ids, cameras = counts(samples)
            junk = sum(s.pid == -1 for s in samples)
            distractors = sum(s.pid == 0 for s in samples) if zero_is_distractor(self) else 0
            ids -= bool(distractors)
            lines.append(f"{split:<8} {images + junk:>8} {ids:>6} {cameras:>8} {distractors:>12} {junk:>6}")
        return "\n".join(lines)

    def differences(self) -> list[str]:
        """What differs from the published table, one sentence a split; real data only."""
        messages = []
        for split, expected in self.published.items():
            images, ids, cameras = counts(getattr(self, split))
            found = images, ids - (split == "gallery" and zero_is_distractor(self)), cameras
            if found != expected and self.kind == "real":
                messages.append(
                    f"{split} has {found[0]} images, {found[1]} ids, {found[2]} cameras instead of the "
                    f"published {expected[0]}, {expected[1]}, {expected[2]}"
                )
        return messages

    def check(self) -> list[str]:
        """`differences`, also given as one warning."""
        messages = self.differences()
        if messages:
            warnings.warn(
                f"{self.name} under {self.root}: {'; '.join(messages)} (junk left out); a data set of your own is "
                "fine, but its results fill no cell of a table; else check the download",
                stacklevel=2,
            )
        return messages

    def digest(self) -> str:
        """Hex SHA-256 over the sorted relative paths and file sizes of all splits; the same wherever the data lies."""
        return digest({s.path for split in SPLITS for s in getattr(self, split)}, self.root)


def digest(paths: set[str], root: str | Path) -> str:
    """Hex SHA-256 over the sorted paths, relative to `root`, and sizes of files; the same wherever the tree lies."""
    rows = sorted([Path(os.path.relpath(path, root)).as_posix(), os.path.getsize(path)] for path in paths)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def counts(samples: list[Sample]) -> tuple[int, int, int]:
    """Numbers of images, ids (pid 0 included) and cameras of the samples that are not junk."""
    kept = [s for s in samples if s.pid != -1]
    return len(kept), len({s.pid for s in kept}), len({s.camid for s in kept})


def zero_is_distractor(data: Dataset) -> bool:
    """Whether pid 0 stands for distractors: it is in the gallery and no query or training image carries it."""
    return any(s.pid == 0 for s in data.gallery) and not any(s.pid == 0 for s in data.query + data.train)


def labels(samples: list[Sample]) -> np.ndarray:
    """Training class of each sample, (N,) int64 in 0..C-1 by ascending pid. Raises ValueError for junk (pid -1)."""
    pids = np.array([s.pid for s in samples], dtype=np.int64)
    if len(pids) == 0:
        return pids
    if pids.min() < 0:
        raise ValueError(f"{samples[int(pids.argmin())].path}: pid {pids.min()} is junk and cannot be a training class")
    return np.unique(pids, return_inverse=True)[1].astype(np.int64).reshape(-1)


def find_root(
    name: str, data_dir: str | Path, trees: tuple[str, ...], layouts: tuple[tuple[str, ...], ...], source: str
) -> tuple[Path, tuple[str, ...]]:
    """First of data_dir/tree, then data_dir itself, that holds every path of one of the layouts, and that layout.

    Raises: FileNotFoundError that names the trees tried, or what is missing from a tree that has a part of a layout.
    """
    roots = [Path(data_dir) / tree for tree in trees] + [Path(data_dir)]
    for root in roots:
        for layout in layouts:
            if all((root / part).exists() for part in layout):
                return root, layout
    for root in roots:
        for layout in layouts:
            missing = [part for part in layout if not (root / part).exists()]
            if len(missing) < len(layout):
                raise FileNotFoundError(f"{name}: {root} holds no {' and no '.join(missing)}; {remedy(name, source)}")
    wanted = " or ".join(layout[0] for layout in layouts)
    tried = ", ".join(str(root) for root in roots[:-1])
    raise FileNotFoundError(f"{name}: no {wanted} under {tried} or {data_dir} itself; {remedy(name, source)}")


def remedy(name: str, source: str) -> str:
    """Where the data comes from and what to do without it, as the end of an error message."""
    return f"{source}, or write a stand-in with: python -m common.synthetic {name} --out data (README, Datasets)"


def kind_of(root: Path) -> str:
    """'synthetic' when the marker file lies in root or in the folder that holds it, else 'real'."""
    return "synthetic" if (root / MARKER).exists() or (root.parent / MARKER).exists() else "real"


def scan(folder: Path, pattern: re.Pattern, to_sample: Callable[[Path, re.Match], Sample]) -> list[Sample]:
    """Samples of one folder, sorted by file name. Raises ValueError naming images whose names do not match the
    pattern."""
    found = [Path(path) for path in files.images(folder, deep=False)]
    matches = [pattern.match(file.name) for file in found]
    refuse(
        folder,
        [file.name for file, match in zip(found, matches) if match is None],
        f"not named as the data set names its images ({pattern.pattern})",
    )
    return [to_sample(file, match) for file, match in zip(found, matches)]


def scan_boxes(root: Path, pattern: re.Pattern) -> dict[str, list[Sample]]:
    """The three lists of a tree in Market-1501's layout; the pattern's groups are pid and camera (from 1)."""

    def to_sample(file: Path, match: re.Match) -> Sample:
        return Sample(str(file), int(match[1]), int(match[2]) - 1)

    return {split: scan(root / folder, pattern, to_sample) for split, folder in BOX_FOLDERS.items()}


def refuse(folder: Path, names: list[str], why: str, remedy: str = WITHOUT) -> None:
    """ValueError that names at most five of the names, if there are any."""
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ValueError(f"{folder}: {shown}: {why}; {remedy}")


def assemble(
    name: str, root: Path, splits: dict[str, list[Sample]], published: dict[str, tuple[int, int, int]]
) -> Dataset:
    """Dataset from its three lists, sorted, checked at the door; warns about counts off the published table.

    Raises: ValueError for a split without images, a camera number below 1 in a name, or a single camera in query and
    gallery.
    """
    root = Path(root)
    for split in SPLITS:
        if not splits[split]:
            raise ValueError(f"{name}: {split} has no images under {root}; the download or extraction is incomplete")
        negative = [s.path for s in splits[split] if s.camid < 0]
        refuse(root, negative, "camera 0 in the file name, cameras count from 1")
    if len({s.camid for s in splits["query"] + splits["gallery"]}) == 1:
        only = splits["query"][0].camid + 1
        raise ValueError(
            f"{name}: all query and gallery images under {root} have camera {only}, so no query has a "
            f"match on another camera; check the camera numbers in the file names"
        )
    ordered = {
        split: sorted(samples, key=lambda s: Path(s.path).relative_to(root).as_posix())
        for split, samples in splits.items()
    }
    data = Dataset(name, root, kind_of(root), ordered["train"], ordered["query"], ordered["gallery"], published)
    data.check()
    return data
