"""PRCC (Yang, Wu, Zheng, Person Re-identification by Contour Sketch under Moderate Clothing Change, TPAMI 2021).

    prcc/rgb/train/<pid>/<A|B|C>_cropped_rgb<NNN>.jpg        prcc/rgb/test/<A|B|C>/<pid>/cropped_rgb<NNN>.jpg
    prcc/mask/<the same path>.png        human parsing, optional; see mask_path for all formats

A person wears the same clothes in cameras A and B (clothes 0) and others in C (clothes 1). The gallery is camera A;
`query` holds both query sets: camera B (same clothes) and camera C (cross-clothes), told apart by camid. Two
protocols: `metrics` (every image of A is in the gallery) and `single_shot_metrics` (one image a person, ten draws).
Paper error: the pixel sampling paper swaps the sizes of its two query sets; B has 3,873 images and C 3,543.
"""

import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.datasets import files
from common.datasets.base import Dataset, Sample, assemble, find_root, refuse

TREES = ("prcc", "PRCC")
LAYOUT = ("rgb/train", "rgb/test")
SOURCE = "ask the authors of PRCC (Qize Yang, Wei-Shi Zheng) for it, sign their agreement and put it there"
PUBLISHED = {"train": (17896, 150, 3), "query": (7416, 71, 2), "gallery": (3384, 71, 1)}
CAMERAS = "ABC"
GALLERY, SAME, CROSS = 0, 1, 2  # camids of A, B and C
TRAIN_NAME = re.compile(r"([ABC])_")
MASK_FORMATS = {"part6": ("mask",), "atr18": ("mask_atr18", "mask"), "npy6": ("mask_6", "../mask_6")}
# The 18 ATR labels as six parts: background, head, upper clothes, pants, arms (and bag), legs (and shoes).
ATR_TO_SIX = (0, 1, 1, 1, 2, 3, 3, 2, 3, 5, 5, 1, 5, 5, 4, 4, 4, 2)


def load(data_dir: str | Path, mask_format: str | None = None, strict_counts: bool = False) -> Dataset:
    """PRCC; with a mask_format every sample's `mask` is the path of its parsing, None where that file is missing.

    Raises: ValueError for names that are no PRCC names, unknown formats, and with strict_counts for counts off the
    published ones; FileNotFoundError without the tree, or without a folder of masks when masks are asked for.
    """
    root, _ = find_root("prcc", data_dir, TREES, (LAYOUT,), SOURCE)
    folder = mask_folder(root, mask_format) if mask_format else None
    train, test = scan_train(root, folder, mask_format), scan_test(root, folder, mask_format)
    check_validation(root, {s.pid for s in train})
    splits = {
        "train": train,
        "query": [s for s in test if s.camid != GALLERY],
        "gallery": [s for s in test if s.camid == GALLERY],
    }
    data = assemble("prcc", root, splits, PUBLISHED)
    if strict_counts and (messages := data.check()):
        raise ValueError(f"prcc under {root}: {'; '.join(messages)}")
    return data


def mask_folder(root: Path, mask_format: str) -> Path:
    """The folder that holds the masks of a format. Raises: ValueError, FileNotFoundError."""
    if mask_format not in MASK_FORMATS:
        raise ValueError(f"prcc: mask format {mask_format!r} is none of {', '.join(MASK_FORMATS)}")
    tried = [root / name for name in MASK_FORMATS[mask_format]]
    for folder in tried:
        if folder.is_dir():
            return folder.resolve() if ".." in folder.parts else folder
    raise FileNotFoundError(
        f"prcc: no {' or '.join(map(str, tried))} with {mask_format} masks; make them with "
        f"python -m pixel_sampling.parse (README, Masks)"
    )


def mask_path(folder: Path, relative: Path, mask_format: str) -> Path:
    """Where the mask of rgb/<relative> lies: part6 and atr18 as <relative>.png, the authors' npy6 as <relative>.npy."""
    return folder / relative.with_suffix(".npy" if mask_format == "npy6" else ".png")


def sample(root: Path, folder: Path | None, mask_format: str | None, file: Path, pid: int, camid: int) -> Sample:
    mask = mask_path(folder, file.relative_to(root / "rgb"), mask_format) if folder else None
    return Sample(
        str(file), pid, camid, clothes=int(camid == CROSS), mask=str(mask) if mask and mask.is_file() else None
    )


def person_folders(folder: Path) -> dict[Path, int]:
    """Folder -> pid of every person below a folder, in order. Raises ValueError for folders that are no numbers."""
    found = files.folders(folder)
    refuse(folder, [entry.name for entry in found if not entry.name.isdigit()], "no folder of a person (digits only)")
    return {entry: int(entry.name) for entry in found}


def person_images(folder: Path) -> list[tuple[Path, int]]:
    """(image, pid) of everybody with a folder in this folder, by pid's folder and name."""
    pids = person_folders(folder)
    return [(path, pids[path.parent]) for path in map(Path, files.images(pids, deep=False))]


def scan_train(root: Path, folder: Path | None, mask_format: str | None) -> list[Sample]:
    found = person_images(root / "rgb/train")
    wrong = [path.relative_to(root).as_posix() for path, _ in found if not TRAIN_NAME.match(path.name)]
    refuse(root, wrong, "not named A_, B_ or C_...")
    return [sample(root, folder, mask_format, path, pid, CAMERAS.index(path.name[0])) for path, pid in found]


def scan_test(root: Path, folder: Path | None, mask_format: str | None) -> list[Sample]:
    missing = [camera for camera in CAMERAS if not (root / "rgb/test" / camera).is_dir()]
    if missing:
        raise FileNotFoundError(f"prcc: {root / 'rgb/test'} holds no folder {', '.join(missing)}; {SOURCE}")
    return [
        sample(root, folder, mask_format, path, pid, camid)
        for camid, camera in enumerate(CAMERAS)
        for path, pid in person_images(root / "rgb/test" / camera)
    ]


def check_validation(root: Path, train_pids: set[int]) -> None:
    """Warn if rgb/val, which no protocol uses, holds other people than rgb/train."""
    if (root / "rgb/val").is_dir():
        others = set(person_folders(root / "rgb/val").values()) ^ train_pids
        if others:
            warnings.warn(
                f"prcc: rgb/val and rgb/train under {root} differ in {len(others)} people; rgb/val is not "
                f"used, but the tree is not the published one",
                stacklevel=3,
            )


# ------------------------------------------------------------------------------------------------------------ protocols


def metrics(query, gallery, query_pids, gallery_pids, max_rank: int = 50):
    """RankMetrics of the `multi` protocol: every query on its own against all of camera A, cosine, no camera rule.

    rank1 is the share of queries whose first gallery image is of the same person, mAP the mean over queries of the
    mean precision at every right image. This is what the paper's authors and Simple-CCReID run.
    """
    from common import (
        evaluation,  # protocols import torch when they run, so that a missing data set is said before it loads
    )

    other = np.zeros(len(query_pids), np.int64), np.ones(len(gallery_pids), np.int64)
    return evaluation.rank_metrics(query, gallery, query_pids, gallery_pids, *other, metric="cosine", max_rank=max_rank)


class SingleShot(NamedTuple):
    """Means over the draws: cmc (K,) float64, and mrr, the mean reciprocal rank (with one right image, its AP)."""

    cmc: np.ndarray
    mrr: float

    def rank(self, k: int) -> float:
        return float(self.cmc[min(k, len(self.cmc)) - 1])


def single_shot_trials(gallery_pids, trials: int = 10, seed: int = 3) -> np.ndarray:
    """Gallery indices (trials, P) int64: one random image of each person, people ascending by pid.

    Deviation: PRCC's own draw depends on the order in which a file system lists folders; ours on the sorted list.
    """
    gallery_pids, rng = np.asarray(gallery_pids), np.random.default_rng(seed)
    own = [np.flatnonzero(gallery_pids == pid) for pid in np.unique(gallery_pids)]
    return np.array([[rng.choice(indices) for indices in own] for _ in range(trials)], np.int64)


def single_shot_metrics(query, gallery, query_pids, gallery_pids, trials: int = 10, seed: int = 3) -> SingleShot:
    """The `single10` protocol, PRCC's own: the gallery holds one image a person, means over ten draws.

    Ties go to the lower pid. Its mAP is a mean reciprocal rank and never stands beside one of `metrics`. Raises:
    ValueError if a query's person is not in the gallery.
    """
    import torch

    from common import distances

    query_pids, gallery_pids = np.asarray(query_pids), np.asarray(gallery_pids)
    people = np.unique(gallery_pids)
    lost = np.setdiff1d(query_pids, people)
    if len(lost):
        raise ValueError(f"prcc: query people {lost[:5].tolist()} have no gallery image")
    own = np.searchsorted(people, query_pids)
    ranks = []
    for chosen in single_shot_trials(gallery_pids, trials, seed):
        part = gallery[torch.from_numpy(chosen)] if isinstance(gallery, torch.Tensor) else np.asarray(gallery)[chosen]
        dist = np.asarray(torch.as_tensor(distances.pairwise(query, part, "cosine")).cpu())  # (Q, P)
        right = dist[np.arange(len(own)), own][:, None]
        ahead = (dist < right) | ((dist == right) & (np.arange(len(people)) < own[:, None]))
        ranks.append(ahead.sum(1))  # (Q,) from 0
    ranks = np.stack(ranks)
    cmc = np.bincount(ranks.ravel(), minlength=len(people)).cumsum() / ranks.size
    return SingleShot(cmc, float((1 / (1 + ranks)).mean()))
