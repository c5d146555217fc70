"""SYSU-MM01 (Wu et al., RGB-Infrared Cross-Modality Person Re-Identification, ICCV 2017).

Tree: cam1..cam6/0001/0001.jpg and exp/{train_id,val_id,test_id}.txt, one comma-separated line of ids each. Cameras 1,
2, 4, 5 are visible, 3 and 6 near infrared. Training uses train and val ids (395), testing 96 others.
Camera and id come from the folder names. camids count from 0, so camera 3 is camid 2.
"""

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.datasets import files, lists
from common.datasets.base import Dataset, Sample, find_root, kind_of

TREES = ("SYSU-MM01", "sysu")
LAYOUT = tuple(f"cam{camera}" for camera in range(1, 7)) + ("exp",)
SOURCE = "ask its authors for SYSU-MM01 (Sun Yat-sen University, form on their page) and put it there"
RGB_CAMERAS, IR_CAMERAS = (1, 2, 4, 5), (3, 6)
MODES = {"all": (1, 2, 4, 5), "indoor": (1, 2)}
PUBLISHED = {"train": (34167, 395, 6), "query": (3803, 96, 2), "gallery": (6775, 96, 4)}


def load(data_dir: str | Path) -> Dataset:
    """SYSU-MM01: train holds both modalities, query all infrared and gallery all visible images of the test ids.

    The published gallery is a draw of one image a person and camera: `gallery_trial`.
    Raises: FileNotFoundError for missing folders; ValueError for a wrong id file, a modality without images, or ids
    without infrared or visible images.
    """
    root, _ = find_root("sysu", data_dir, TREES, (LAYOUT,), SOURCE)
    train_ids = [*ids(root, "train_id"), *ids(root, "val_id")]
    test_ids = ids(root, "test_id")
    both = sorted(set(train_ids) & set(test_ids))
    if both:
        raise ValueError(f"sysu: {root / 'exp'}: ids {both[:5]} are in train and in test; the lists do not fit")
    train = scan(root, train_ids, RGB_CAMERAS + IR_CAMERAS)
    query, gallery = scan(root, test_ids, IR_CAMERAS), scan(root, test_ids, RGB_CAMERAS)
    for name, wanted, found in (("training", train_ids, train), ("test", test_ids, query + gallery)):
        for modality, word in (("ir", "infrared"), ("rgb", "visible")):
            missing = sorted(set(wanted) - {s.pid for s in found if s.modality == modality})
            if missing:
                raise ValueError(
                    f"sysu: {len(missing)} {name} ids have no {word} images under {root}: "
                    f"{', '.join(f'{pid:04d}' for pid in missing[:8])}; the copy is incomplete"
                )
    data = Dataset("sysu", root, kind_of(root), train, query, gallery, PUBLISHED)
    data.check()
    return data


def ids(root: Path, name: str) -> list[int]:
    """The ids of exp/<name>.txt, ascending. Raises: FileNotFoundError, ValueError naming the file."""
    path = root / "exp" / f"{name}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"sysu: no {path}; take exp/ from the original archive (its .txt files)")
    words = lists.text(path).replace(",", " ").split()
    if not words or not all(word.isdigit() for word in words):
        wrong = next((word for word in words if not word.isdigit()), "nothing")
        raise ValueError(f"sysu: {path} holds {wrong[:80]!r}, expected comma-separated ids such as 1,2,4")
    return sorted({int(word) for word in words})


def scan(root: Path, pids: list[int], cameras: tuple[int, ...]) -> list[Sample]:
    """Samples of these people in these cameras, sorted by relative path."""
    places = {root / f"cam{camera}" / f"{pid:04d}": (camera, pid) for camera in cameras for pid in pids}
    samples = []
    for path in files.images([folder for folder in places if folder.is_dir()], deep=False):
        camera, pid = places[Path(path).parent]
        samples.append(Sample(path, pid, camera - 1, "ir" if camera in IR_CAMERAS else "rgb"))
    return sorted(samples, key=lambda s: Path(s.path).relative_to(root).as_posix())


def gallery_trial(samples: list[Sample], mode: str, trial: int) -> np.ndarray:
    """Indices into `samples` (the gallery) of the published single-shot draw of a trial 0..9.

    One image of each person and camera by `random.Random(trial)`, people ascending, cameras in order within each (all:
    1, 2, 4, 5; indoor: 1, 2): 301 and 112 images of the real set.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r}: expected all or indoor")
    folders: dict[tuple[int, int], list[int]] = {}
    for index, sample in enumerate(samples):
        folders.setdefault((sample.pid, sample.camid + 1), []).append(index)
    rng = random.Random(trial)
    chosen = []
    for pid in sorted({sample.pid for sample in samples}):
        for camera in MODES[mode]:
            if (pid, camera) in folders:
                chosen.append(rng.choice(sorted(folders[pid, camera], key=lambda i: samples[i].path)))
    return np.array(chosen, dtype=np.int64)


class Ranked(NamedTuple):
    """Order of the gallery for each query: pids and keep (Q, G) after sorting; keep is False where a row is ignored."""

    pids: np.ndarray
    keep: np.ndarray


def metrics(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids):
    """One trial: similarity is the dot product, ties by gallery index.

    A query of camera 3 (camid 2) ignores every gallery image of camera 2 (camid 1): both stand in the same room. CMC is
    taken on the list with each identity's first image only, AP and INP on the full list. Queries without a match left
    are skipped. CMC is padded to 20 ranks with its last value where fewer identities are there.
    Returns RankMetrics. Memory: Q x G. Raises: ValueError for NaN or Inf, unequal lengths, or no valid query.
    """
    import torch  # protocols import torch when they run, so that a missing data set is said before it loads

    from common import distances

    (q, _), (g, _) = distances.features(query, "query"), distances.features(gallery, "gallery")
    fields = [np.asarray(x) for x in (query_pids, gallery_pids, query_camids, gallery_camids)]
    for name, values, size in zip(
        ("query_pids", "gallery_pids", "query_camids", "gallery_camids"), fields, (len(q), len(g), len(q), len(g))
    ):
        if len(values) != size:
            raise ValueError(f"{name}: {len(values)} entries for {size} rows")
    pids, gallery_pids, camids, gallery_camids = fields
    with distances.fp32(q.device):
        order = torch.argsort(-(q @ g.to(q.device).T), dim=1, stable=True).cpu().numpy()
    return ranked_metrics(pids, Ranked(gallery_pids[order], ~same_room(camids, gallery_camids[order])))


def same_room(camids: np.ndarray, gallery_camids: np.ndarray) -> np.ndarray:
    """(Q, G) bool: where a query of camera 3 ignores a gallery image, of camera 2; gallery_camids (G,) or (Q, G)."""
    return (camids[:, None] == 2) & (gallery_camids == 1)


def ranked_metrics(pids: np.ndarray, ranked: Ranked, max_rank: int = 20):
    """RankMetrics of sorted lists; see `metrics`."""
    from common.evaluation import RankMetrics

    ap, inp, cmc = np.full(len(pids), np.nan), [], np.zeros(max_rank)
    for row, pid in enumerate(pids):
        line = ranked.pids[row][ranked.keep[row]]
        hits = np.flatnonzero(line == pid)
        if len(hits) == 0:
            continue
        ap[row] = np.mean(np.arange(1, len(hits) + 1) / (hits + 1))
        inp.append(len(hits) / (hits[-1] + 1))
        before = len(np.unique(line[: hits[0]]))  # identities that come first
        cmc[before:] += 1
    if not inp:
        raise ValueError("no valid query: no query has an image of its identity left in the gallery")
    return RankMetrics(float(np.nanmean(ap)), cmc / len(inp), float(np.mean(inp)), ap, len(inp))
