"""Evaluation, Jaccard distance, clustering and re-ranking at the sizes of real data sets, on the device and the CPU.

The same features on both, the CPU with all its threads. The results must agree, and by how much they differ is kept.
"""

import torch

from common import evaluation, jaccard
from tests.benchmarks.bench_evaluation import bare_product, descriptors
from tests.benchmarks.bench_jaccard import features
from tests.benchmarks.device.figures import peak_mib, seconds, timed

EVALUATED = {"Market-1501": (3368, 19732, 750, 6), "MSMT17": (11659, 82161, 3060, 15)}  # queries, gallery, ids, cameras
CLUSTERED = {"Market-1501": 12936, "MSMT17": 32621}  # training images
RE_RANKED = (3368, 19732)  # of Market-1501
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure_evaluation(keep, small: bool) -> None:
    for name, (queries, gallery, ids, cams) in EVALUATED.items():
        queries, gallery, ids = (n // 20 if small else n for n in (queries, gallery, ids))
        query, others, *rest = descriptors(queries, gallery, ids, cams=cams)
        there = query.to(DEVICE), others.to(DEVICE)
        title = f"{name}, {queries:,} x {gallery:,} of {query.shape[1]}"
        keep(f"{title}: metrics, device", seconds(lambda: evaluation.rank_metrics(*there, *rest), 3), "s")
        keep(f"{title}: bare product, device", seconds(lambda: bare_product(*there), 3), "s")
        keep_memory(keep, title, lambda: evaluation.rank_metrics(*there, *rest))
        found = evaluation.rank_metrics(*there, *rest)
        here, cost = timed(lambda: evaluation.rank_metrics(query, others, *rest))
        keep(f"{title}: metrics, CPU", cost, "s")
        differs(keep, f"{title}: mAP, device - CPU", found.mAP - here.mAP, 1e-3)


def measure_jaccard(keep, small: bool) -> None:
    jaccard.jaccard_distance(features("clustered", 400, DEVICE))  # loads the libraries
    for name, n in CLUSTERED.items():
        n = n // 40 if small else n
        x = features("clustered", n, "cpu")
        there, title = x.to(DEVICE), f"{name}, {n:,} x {x.shape[1]}"
        found, cost = timed(lambda: jaccard.jaccard_distance(there))
        keep(f"{title}: Jaccard distance, device", cost, "s")
        here, cost = timed(lambda: jaccard.jaccard_distance(x))
        keep(f"{title}: Jaccard distance, CPU", cost, "s")
        for where, dist in (("device", found), ("CPU", here)):
            labels, cost = timed(lambda dist=dist: jaccard.cluster(dist, 0.6))
            keep(f"{title}: clusters, {where}", int(labels.max()) + 1, "")
            dist.data = 1 - dist.data  # similarities: an absent pair is at 0
        keep(f"{title}: clustering (on the CPU)", cost, "s")
        differs(keep, f"{title}: Jaccard distance, device - CPU, mean", abs(found - here).sum() / here.nnz, 1e-3)
        if name == "Market-1501":
            keep_memory(keep, title, lambda: jaccard.jaccard_distance(there))
            re_ranking(keep, *(n // 40 if small else n for n in RE_RANKED))


def re_ranking(keep, queries: int, gallery: int) -> None:
    x = features("clustered", queries + gallery, "cpu")
    there, title = x.to(DEVICE), f"Market-1501, {queries:,} x {gallery:,} of {x.shape[1]}"

    def call(feats):
        return jaccard.re_rank(feats[:queries], feats[queries:])

    found, cost = timed(lambda: call(there))
    keep(f"{title}: re-ranking, device", cost, "s")
    here, cost = timed(lambda: call(x))
    keep(f"{title}: re-ranking, CPU", cost, "s")
    differs(keep, f"{title}: re-ranked distances, device - CPU, mean", (found.cpu() - here).abs().mean(), 1e-3)


def keep_memory(keep, title: str, work) -> None:
    """What the call takes beside the features."""
    before = torch.cuda.memory_allocated() / 2**20 if DEVICE == "cuda" else 0
    if (peak := peak_mib(work)) is not None:
        keep(f"{title}: memory beside the features", peak - before, "MiB")


def differs(keep, name: str, value: float, most: float) -> None:
    """Keep a difference; raises ValueError if it is more than rounding can explain."""
    keep(name, float(value), "")
    if not abs(value) <= most:
        raise ValueError(f"{name}: {value:.3g}, where at most {most:g} is rounding")
