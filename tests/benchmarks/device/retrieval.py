"""Evaluation, Jaccard distance, clustering and re-ranking at the sizes of real data sets, on the device and the CPU.

The same features on both; medians on the device, one run after one that warms up on the CPU with all its threads. The
results must agree, and by how much they differ is kept.
"""

import torch

from common import evaluation, jaccard
from tests.benchmarks.bench_evaluation import bare_product, descriptors
from tests.benchmarks.bench_jaccard import features
from tests.benchmarks.device.figures import peak_mib, seconds

EVALUATED = {"Market-1501": (3368, 19732, 750, 6), "MSMT17": (11659, 82161, 3060, 15)}  # queries, gallery, ids, cameras
CLUSTERED = {"Market-1501": 12936, "MSMT17": 32621}  # training images
RE_RANKED = {"Market-1501": (3368, 19732)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure_evaluation(keep, small: bool) -> None:
    for name, (queries, gallery, ids, cams) in EVALUATED.items():
        queries, gallery, ids, size = (n // 20 for n in (queries, gallery, ids, 5120)) if small else (
            queries, gallery, ids, 2048)  # fmt: skip
        query, others, *rest = descriptors(queries, gallery, ids, size=size, cams=cams)
        there = query.to(DEVICE), others.to(DEVICE)
        title = f"{name}, {queries:,} x {gallery:,} of {size}"
        keep(f"{title}: metrics, device", seconds(lambda: evaluation.rank_metrics(*there, *rest), 3), "s")
        keep(f"{title}: bare product, device", seconds(lambda: bare_product(*there), 3), "s")
        remember_peak(keep, title, lambda: evaluation.rank_metrics(*there, *rest))
        found = evaluation.rank_metrics(*there, *rest)
        keep(f"{title}: metrics, CPU", seconds(lambda: evaluation.rank_metrics(query, others, *rest), 1), "s")
        here = evaluation.rank_metrics(query, others, *rest)
        differs(keep, f"{title}: mAP, device - CPU", found.mAP - here.mAP, 1e-3)


def measure_jaccard(keep, small: bool) -> None:
    for name, n in CLUSTERED.items():
        n = n // 40 if small else n
        x = features("clustered", n, "cpu")
        there, title = x.to(DEVICE), f"{name}, {n:,} x 2048"
        keep(f"{title}: Jaccard distance, device", seconds(lambda: jaccard.jaccard_distance(there), 2), "s")
        remember_peak(keep, title, lambda: jaccard.jaccard_distance(there))
        found = jaccard.jaccard_distance(there)
        keep(f"{title}: clustering (CPU)", seconds(lambda: jaccard.cluster(found, 0.6), 2), "s")
        keep(f"{title}: Jaccard distance, CPU", seconds(lambda: jaccard.jaccard_distance(x), 1), "s")
        here = jaccard.jaccard_distance(x)
        for where, dist in (("device", found), ("CPU", here)):
            keep(f"{title}: clusters, {where}", int(jaccard.cluster(dist, 0.6).max()) + 1, "")
            dist.data = 1 - dist.data  # similarities: an absent pair is at 0
        differs(keep, f"{title}: Jaccard distance, device - CPU, mean", abs(found - here).sum() / here.nnz, 1e-3)
        if name in RE_RANKED:
            re_ranking(keep, name, *(n // 40 if small else n for n in RE_RANKED[name]))


def re_ranking(keep, name: str, queries: int, gallery: int) -> None:
    x = features("clustered", queries + gallery, "cpu")
    there, title = x.to(DEVICE), f"{name}, {queries:,} x {gallery:,} of 2048"

    def call(feats):
        return jaccard.re_rank(feats[:queries], feats[queries:])

    keep(f"{title}: re-ranking, device", seconds(lambda: call(there), 2), "s")
    found = call(there).cpu()
    keep(f"{title}: re-ranking, CPU", seconds(lambda: call(x), 1), "s")
    differs(keep, f"{title}: re-ranked distances, device - CPU, mean", float((found - call(x)).abs().mean()), 1e-3)


def remember_peak(keep, title: str, work) -> None:
    """What the call takes beside the features."""
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated() / 2**20
        keep(f"{title}: memory beside the features", peak_mib(work) - before, "MiB")


def differs(keep, name: str, value: float, most: float) -> None:
    """Keep a difference; raises ValueError if it is more than rounding can explain."""
    keep(name, float(value), "")
    if not abs(value) <= most:
        raise ValueError(f"{name}: {value:.3g}, where at most {most:g} is rounding")
