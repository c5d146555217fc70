"""Time of common.evaluation and common.jaccard beside the forms in which ReID code is usually written.

    python tests/benchmarks/bench_usual.py                     # the sizes of Market-1501, minutes on two cores
    python tests/benchmarks/bench_usual.py --small --json out.json

The usual forms: metrics from the full distance matrix, every row of it sorted, one query at a time; the Jaccard
distance with a dense N x N matrix of weights, Python loops over rows, and scikit-learn's DBSCAN on the dense result.
Both sides get the same features in one process, and their results must agree. Ours is the median of some runs, the
usual form runs once. Features as in bench_evaluation.py and bench_jaccard.py, `clustered`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the one allowed path line: repository root first

import numpy as np
import torch
from sklearn.cluster import DBSCAN

from common import distances, evaluation, jaccard
from tests.benchmarks.bench_evaluation import interleave, market
from tests.benchmarks.bench_jaccard import features

EPS = 0.6


def usual_metrics(dist: np.ndarray, query_pids, gallery_pids, query_camids, gallery_camids) -> float:
    """mAP: the whole matrix sorted, then a loop over the queries."""
    order = np.argsort(dist, axis=1)
    aps = []
    for i in range(len(dist)):
        pids, camids = gallery_pids[order[i]], gallery_camids[order[i]]
        junk = (pids == -1) | ((pids == query_pids[i]) & (camids == query_camids[i]))
        hits = (pids == query_pids[i])[~junk]
        if hits.any():
            precision = hits.cumsum() / np.arange(1, len(hits) + 1)
            aps.append((precision * hits).sum() / hits.sum())
    return float(np.mean(aps))


def usual_jaccard(x: torch.Tensor, k1: int = 30, k2: int = 6) -> np.ndarray:
    """(N, N) float32: neighbours by blocks of products, then everything dense and row by row."""
    n, n2 = len(x), round(k1 / 2) + 1
    nearest = np.concatenate([torch.mm(part, x.T).topk(k1).indices.numpy() for part in x.split(1024)])

    def reciprocal(i: int, k: int) -> np.ndarray:
        ahead = nearest[i, :k]
        return ahead[(nearest[ahead, :k] == i).any(1)]

    weights = np.zeros((n, n), np.float32)
    for i in range(n):
        base = reciprocal(i, k1)
        members = base
        for j in base:
            other = reciprocal(j, n2)
            if 3 * len(np.intersect1d(other, base)) > 2 * len(other):
                members = np.append(members, other)
        members = np.unique(members)
        closeness = torch.exp(2 * (x[members] @ x[i]) - 2)
        weights[i, members] = (closeness / closeness.sum()).numpy()
    weights = np.stack([weights[nearest[i, :k2]].mean(0) for i in range(n)])
    holders = [np.flatnonzero(weights[:, column]) for column in range(n)]
    result = np.empty((n, n), np.float32)
    for i in range(n):
        shared = np.zeros(n, np.float32)
        for column in np.flatnonzero(weights[i]):
            rows = holders[column]
            shared[rows] += np.minimum(weights[i, column], weights[rows, column])
        result[i] = 1 - shared / (2 - shared)
    return result.clip(min=0)


def usual_cluster(dist: np.ndarray) -> np.ndarray:
    return DBSCAN(eps=EPS, min_samples=4, metric="precomputed").fit_predict(dist)


def timed(call) -> tuple:
    """What a call returns, and its seconds."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def agree(name: str, ours, usual, tolerance: float) -> None:
    difference = float(np.abs(np.asarray(ours) - np.asarray(usual)).max())
    if not difference <= tolerance:
        raise SystemExit(f"{name}: ours and the usual form differ by {difference}")


def measure_metrics(args: argparse.Namespace) -> list[dict]:
    case = market("clustered", args.small, "cpu")
    dist = distances.pairwise(*case[:2])
    ours = interleave(
        {
            "from_features": lambda: evaluation.rank_metrics(*case),
            "from_distances": lambda: evaluation.rank_metrics_from_distances(dist, *case[2:]),
        },
        args.repeats,
        "cpu",
    )
    usual, seconds = timed(lambda: usual_metrics(dist.numpy(), *case[2:]))
    agree("mAP", evaluation.rank_metrics_from_distances(dist, *case[2:]).mAP, usual, 1e-9)
    _, product = timed(lambda: torch.cdist(*case[:2]))
    return [
        row("metrics from distances", ours["from_distances"], seconds),
        row("metrics from features", ours["from_features"], product + seconds),
    ]


def measure_jaccard(args: argparse.Namespace) -> list[dict]:
    x = features("clustered", 1300 if args.small else 12936, "cpu")
    matrix = jaccard.jaccard_distance(x)
    ours = interleave(
        {"distance": lambda: jaccard.jaccard_distance(x), "cluster": lambda: jaccard.cluster(matrix, EPS)},
        args.repeats,
        "cpu",
    )
    dense, seconds = timed(lambda: usual_jaccard(x))
    for start in range(0, len(x), 1000):  # an absent pair of the sparse matrix is at distance 1
        part = matrix[start : start + 1000]
        full = np.ones(part.shape, np.float32)
        full[np.repeat(np.arange(part.shape[0]), np.diff(part.indptr)), part.indices] = part.data
        agree("Jaccard distance", full, dense[start : start + 1000], 1e-5)
    labels, cluster_seconds = timed(lambda: usual_cluster(dense))
    agree("clusters", jaccard.cluster(matrix, EPS), labels, 0)
    return [row("Jaccard distance", ours["distance"], seconds), row("clustering", ours["cluster"], cluster_seconds)]


def row(name: str, ours_s: float, usual_s: float) -> dict:
    print(f"{name:<24} ours {ours_s:8.3f} s   usual {usual_s:8.2f} s   {usual_s / ours_s:8.1f} x", flush=True)
    return {"call": name, "ours_s": ours_s, "usual_s": usual_s, "ratio": usual_s / ours_s}


def main(args: argparse.Namespace) -> None:
    rows = measure_metrics(args) + measure_jaccard(args)
    if args.json:
        record = {"threads": torch.get_num_threads(), "torch": torch.__version__, "small": args.small, "rows": rows}
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tenth of the images")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours; the usual form runs once")
    parser.add_argument("--json", help="file to write the figures to")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
