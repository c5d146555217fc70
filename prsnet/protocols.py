"""The three ways to measure retrieval that are on the table, always under their names.

image: the rule of every other paper: each gallery image is ranked for itself (Market-1501 rule).
centroid: the gallery images of an identity are averaged first, without those of the query's camera. A query then has
    usually one right answer, so AP = 1 / rank and mAP >= rank-1. It uses the gallery's identity labels, and people who
    are nobody's query vanish: its numbers are far higher and compare with nothing measured per image.
centroid-legacy: the same with the mistake of the published code: the gallery's camera numbers are read from the joint
    list of query and gallery with gallery indices, so from the wrong images. Pictures of the query's own camera leak
    into its centroid. Only this compares with the numbers that the paper prints.

Features are those of ReID in eval mode, (N, D), not normalised; centroids are means of them, then rows are scaled to
length 1 and compared by Euclidean distance, which is the order of the cosine.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common import checkpoints, evaluation
from common.evaluation import RankMetrics
from prsnet.settings import PROTOCOLS

TEST_IMAGES = "TEST_IMAGES_OF"  # file among the crops of a pre-training: the data sets whose test images are there


class Centroids(NamedTuple):
    """Averaged gallery images: feats (M, D), pids (M,), and the cameras that went into each."""

    feats: torch.Tensor
    pids: np.ndarray
    cameras: list[frozenset]


def evaluate(
    protocol: str,
    query: torch.Tensor,
    gallery: torch.Tensor,
    query_pids,
    gallery_pids,
    query_camids,
    gallery_camids,
    distractors: str = "drop",
    max_rank: int = 50,
) -> RankMetrics:
    """Metrics of query (Q, D) and gallery (G, D) features under a protocol; gallery rows of pid -1 are ignored.

    distractors: "drop" or "keep", what becomes of gallery identities without a query in the centroid protocols: kept,
    every image of pid 0 stands alone and every other identity gives one centroid.
    Memory: O(D x centroids) and one row of distances a query.
    Raises: ValueError for an unknown protocol, or if no query has a centroid.
    """
    if protocol not in PROTOCOLS or distractors not in ("drop", "keep"):
        raise ValueError(
            f"protocol {protocol!r}, distractors {distractors!r}: choose from {', '.join(PROTOCOLS)} and drop, keep"
        )
    qp, gp, qc, gc = (
        np.asarray(ids, dtype=np.int64) for ids in (query_pids, gallery_pids, query_camids, gallery_camids)
    )
    if protocol == "image":
        return evaluation.rank_metrics(F.normalize(query), F.normalize(gallery), qp, gp, qc, gc, max_rank=max_rank)
    kept = np.flatnonzero(gp != -1)
    gallery, gp, gc = gallery[torch.as_tensor(kept, device=gallery.device)], gp[kept], gc[kept]
    if protocol == "centroid-legacy":
        gc = np.concatenate([qc, gc])[: len(gc)]  # entry i of the joint list for gallery image i: the published mistake
    made = centroids(gallery, gp, gc, qp, qc, distractors)
    return rank_centroids(F.normalize(query), qp, qc, made, max_rank)


def centroids(
    gallery: torch.Tensor,
    pids: np.ndarray,
    camids: np.ndarray,
    query_pids: np.ndarray,
    query_camids: np.ndarray,
    distractors: str = "drop",
) -> Centroids:
    """For every query identity and each of its query cameras, the mean over its gallery images of the other cameras.

    Two cameras that leave the same set of cameras give one centroid. Order: by pid, then by query camera.
    """
    feats, owners, cameras = [], [], []

    def add(rows: np.ndarray, pid: int) -> None:
        feats.append(gallery[torch.as_tensor(rows, device=gallery.device)].mean(0))
        owners.append(pid)
        cameras.append(frozenset(camids[rows].tolist()))

    members = {pid: np.flatnonzero(pids == pid) for pid in np.unique(pids)}
    for pid in np.unique(query_pids):
        made = set()
        for camid in np.unique(query_camids[query_pids == pid]):
            rows = members.get(pid, np.empty(0, np.int64))
            rows = rows[camids[rows] != camid]
            seen = frozenset(camids[rows].tolist())
            if len(rows) and seen not in made:
                made.add(seen)
                add(rows, int(pid))
    if distractors == "keep":
        for pid in np.setdiff1d(pids, query_pids):
            for rows in members[pid][:, None] if pid == 0 else [members[pid]]:
                add(rows, int(pid))
    if not feats:
        raise ValueError("no query identity has a gallery image of another camera, so there is no centroid to rank")
    return Centroids(F.normalize(torch.stack(feats)), np.array(owners), cameras)


def rank_centroids(
    query: torch.Tensor, pids: np.ndarray, camids: np.ndarray, made: Centroids, max_rank: int
) -> RankMetrics:
    """Metrics of unit queries (Q, D); centroids of the query's pid that contain its camera are ignored."""
    by_pid: dict[int, list[int]] = {}
    for column, pid in enumerate(made.pids):
        by_pid.setdefault(int(pid), []).append(column)
    ap, inp, first = np.full(len(query), np.nan), [], []
    for start in range(0, len(query), 256):
        dist = torch.cdist(query[start : start + 256].double(), made.feats.double()).cpu().numpy()
        for row, values in enumerate(dist):
            q = start + row
            own = by_pid.get(int(pids[q]), [])
            right = [column for column in own if camids[q] not in made.cameras[column]]
            if not right:
                continue
            values[[column for column in own if column not in right]] = np.inf
            ranks = np.sort([1 + np.sum(values < values[c]) + np.sum(values[:c] == values[c]) for c in right])
            ap[q] = np.mean(np.arange(1, len(ranks) + 1) / ranks)
            inp.append(len(ranks) / ranks[-1])
            first.append(ranks[0])
    if not first:
        raise ValueError("no query has a centroid of its identity without its own camera")
    first = np.asarray(first)
    cmc = np.array([(first <= k).mean() for k in range(1, max_rank + 1)])
    return RankMetrics(float(np.nanmean(ap)), cmc, float(np.mean(inp)), ap, len(first))


def all_metrics(data, feats: torch.Tensor, protocols=PROTOCOLS, distractors: str = "drop") -> dict[str, RankMetrics]:
    """Metrics by protocol of features (Q + G, D) in the order of data.query + data.gallery."""
    q = len(data.query)
    ids = [[getattr(s, key) for s in part] for key in ("pid", "camid") for part in (data.query, data.gallery)]
    return {name: evaluate(name, feats[:q], feats[q:], *ids, distractors=distractors) for name in protocols}


def flat(metrics: dict[str, RankMetrics]) -> dict[str, float]:
    """`image.mAP`, `centroid.rank1`, ...: the fractions of a result file."""
    out = {}
    for name, m in metrics.items():
        out |= {f"{name}.mAP": m.mAP, **{f"{name}.rank{k}": m.rank(k) for k in (1, 5, 10)}, f"{name}.mINP": m.mINP}
    return out


# ------------------------------------------------------------------------------- pre-training that saw the test images


def test_images_among(crops: Path) -> list[str]:
    """Names of the data sets whose test images `prepare --mix-include-test` put into a folder of crops."""
    note = Path(crops) / TEST_IMAGES
    return note.read_text(encoding="utf-8").split() if note.is_file() else []


def test_images_behind(weights: Path | None) -> list[str]:
    """The same of the pre-training that left a file of weights, as far as the file says."""
    content = checkpoints.load(weights) if weights is not None else {}
    flags = content.get("args") if isinstance(content, dict) else None
    return flags.get("test_images_of", []) if isinstance(flags, dict) else []


def seen(args: dict, data_name: str) -> str:
    """What stands beside a number on a data set whose test images were pre-trained with; "" where they were not."""
    name, rendered, _ = data_name.partition("-synthetic-")
    found = [other.partition("-synthetic-")[:2] for other in args.get("test_images_of", [])]
    return f"   pre-trained with test images of {name}" if (name, rendered) in found else ""
