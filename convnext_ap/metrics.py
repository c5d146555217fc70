"""Average precision as Market-1501's own evaluation code counts it, beside the rule of common.evaluation."""

import numpy as np
import torch

from common import distances
from common.datasets import Dataset


def trapezoid_ap(ranks: np.ndarray) -> float:
    """Area under the precision-recall curve by trapezoids, from the ranks (n,) of the hits, counted from 1.

    Each hit adds 1 / n times the mean of the precisions at it and just before it (1 before the first place). Never
    above the mean of the precisions at the hits.
    """
    ranks = np.sort(ranks)
    hits = np.arange(1, len(ranks) + 1)
    old = np.where(ranks > 1, (hits - 1) / np.maximum(ranks - 1, 1), 1.0)
    return float(((old + hits / ranks) / 2).mean())


def trapezoid_map(feats: torch.Tensor, data: Dataset, chunk: int = 256) -> float:
    """Mean trapezoidal AP of features (Q + G, D) under the Market-1501 rule; ties go by gallery index.

    Memory: chunk x G distances at a time.
    """
    q = len(data.query)
    pids, camids = (np.array([getattr(s, key) for s in data.query]) for key in ("pid", "camid"))
    gallery_pids, gallery_camids = (np.array([getattr(s, key) for s in data.gallery]) for key in ("pid", "camid"))
    found = []
    for start in range(0, q, chunk):
        dist = distances.pairwise(feats[start : min(start + chunk, q)], feats[q:], "sqeuclidean").cpu().numpy()
        for row, pid, camid in zip(dist, pids[start:], camids[start:]):
            kept = (gallery_pids != -1) & ~((gallery_pids == pid) & (gallery_camids == camid))
            order = np.argsort(row[kept], kind="stable")
            ranks = np.flatnonzero((gallery_pids[kept] == pid)[order]) + 1
            if len(ranks):
                found.append(trapezoid_ap(ranks))
    return float(np.mean(found))
