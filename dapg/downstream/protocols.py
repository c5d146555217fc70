"""How a fine-tuned network is measured on SYSU-MM01 and RegDB, clean and with corrupted visible images (-C)."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from common import evaluation, inputs, processes
from common.datasets import regdb, sysu
from dapg.data import CorruptedStore
from dapg.downstream.agw import Extractor
from dapg.downstream.data import Data
from dapg.noise.names import BENCH20

TRIALS = 10  # published gallery draws of SYSU-MM01
FEATURES = ("pool", "bn")


@dataclass(frozen=True)
class Corruption:
    """What -C means: one type of `types` an image, uniform; severity 1..5, or 0 for uniform ones; repetitions."""

    types: tuple[str, ...] = BENCH20
    severity: int = 0
    draws: int = 10

    def copy(self, store, repetition: int, index: np.ndarray | None = None) -> CorruptedStore:
        """Visible test images corrupted; the seed is fixed, so that all models see the same ones."""
        return CorruptedStore(store, repetition, 0, self.types, self.severity, index)


def features(run, network, store, modality: str) -> dict[str, torch.Tensor]:
    """Unit pool and bn features (N, D) of a store, on the CPU."""
    both = inputs.extract(run, Extractor(network, modality), store, batch_size=64).cpu()
    return dict(zip(FEATURES, both.chunk(2, 1)))


def sysu_trials(run, network, data: Data, clean: bool, corruption: Corruption | None) -> dict[str, list[dict]]:
    """All and indoor search, single-shot, ten trials; on -C repetition r pairs trial r with corruption r."""
    gallery, store = data.parts["rgb"], data.stores["rgb"]
    q, (q_pids, q_camids) = features(run, network, data.stores["ir"], "ir"), columns(data.parts["ir"])
    draws = {mode: [sysu.gallery_trial(gallery, mode, trial) for trial in range(TRIALS)] for mode in sysu.MODES}
    g_pids, g_camids = columns(gallery)

    def trial(g: dict, rows: np.ndarray, drawn: np.ndarray) -> dict:
        """Metrics by feature, of the drawn images, whose features are those rows of g."""
        ids = q_pids, g_pids[drawn], q_camids, g_camids[drawn]
        return {kind: sysu.metrics(q[kind], g[kind][rows], *ids) for kind in FEATURES}

    found = defaultdict(list)
    if clean:
        g = features(run, network, store, "rgb")
        for mode, trials in draws.items():
            found[mode] = [trial(g, drawn, drawn) for drawn in trials]
    for repetition in range(corruption.draws if corruption else 0):
        drawn = {mode: trials[repetition % TRIALS] for mode, trials in draws.items()}
        index = np.unique(np.concatenate(list(drawn.values())))  # only these are corrupted and described
        g = features(run, network, corruption.copy(store, repetition, index), "rgb")
        for mode, images in drawn.items():
            found[f"{mode}_c"].append(trial(g, np.searchsorted(index, images), images))
    return found


def regdb_trials(run, network, data: Data, clean: bool, corruption: Corruption | None) -> dict[str, list[dict]]:
    """Visible to thermal and back; on -C the visible images are corrupted, query of the one and gallery of the other.

    Split s is paired with corruption s; further draws follow with s + 10, s + 20, ...
    """
    (v_pids, _), (t_pids, _) = (columns(data.parts[name]) for name in ("rgb", "ir"))
    thermal, found = features(run, network, data.stores["ir"], "ir"), defaultdict(list)
    copies = [("", data.stores["rgb"])] if clean else []
    for draw in range(corruption.draws if corruption else 0):
        copies.append(("_c", corruption.copy(data.stores["rgb"], data.split + 10 * draw)))
    for ending, store in copies:
        visible = features(run, network, store, "rgb")
        there = {kind: regdb.metrics(visible[kind], thermal[kind], v_pids, t_pids) for kind in FEATURES}
        back = {kind: regdb.metrics(thermal[kind], visible[kind], t_pids, v_pids) for kind in FEATURES}
        found[f"v2t{ending}"].append(there)
        found[f"t2v{ending}"].append(back)
    return found


def evaluate(
    run, network, data: Data, stage: str, clean: bool = True, corruption: Corruption | None = None
) -> dict[str, float]:
    """All metrics of a network: pool.* and bn.*, and without a prefix the feature of the published numbers.

    AGW's published clean numbers are of the bn feature; CIL's, and all -C numbers, of the pool feature.
    """
    trials = sysu_trials if data.data.name == "sysu" else regdb_trials
    metrics = {}
    for name, found in trials(run, network, data, clean, corruption).items():
        published = "bn" if stage == "agw" and not name.endswith("_c") else "pool"
        for prefix, kind in (("pool.", "pool"), ("bn.", "bn"), ("", published)):
            metrics |= summary([trial[kind] for trial in found], f"{prefix}{name}.")
    return metrics


def summary(results: list[evaluation.RankMetrics], prefix: str) -> dict[str, float]:
    """Means over trials, and the deviations of rank-1 and mAP."""
    values = {f"rank{k}": [m.rank(k) for m in results] for k in (1, 10, 20)}
    values |= {"mAP": [m.mAP for m in results], "mINP": [m.mINP for m in results]}
    out = {f"{prefix}{name}": float(np.mean(each)) for name, each in values.items()}
    if len(results) > 1:
        out |= {f"{prefix}std_{name}": float(np.std(values[name])) for name in ("rank1", "mAP")}
    return out


def columns(samples: list) -> tuple[np.ndarray, np.ndarray]:
    """pids and camids (N,)."""
    return np.array([s.pid for s in samples]), np.array([s.camid for s in samples])


def show(run, metrics: dict[str, float]) -> None:
    """Print the published feature's metrics, a line a protocol, in per cent."""
    names = (n.removesuffix(".rank1") for n in metrics if n.endswith(".rank1"))
    for name in sorted(n for n in names if n.split(".")[0] not in FEATURES):
        rank1, mean, inp = (100 * metrics[f"{name}.{k}"] for k in ("rank1", "mAP", "mINP"))
        processes.say(run, f"{name:<10} rank-1 {rank1:5.1f}   mAP {mean:5.1f}   mINP {inp:5.1f}")
