"""The two query sets of PRCC under its two protocols."""

from common import inputs, runtime
from common.datasets import prcc

QUERIES = {"cross": prcc.CROSS, "same": prcc.SAME}


def evaluate(run, network, data, store, flip: bool) -> dict:
    """Metrics of a network, see protocol_metrics. The feature is the mean over the image and its mirror image, cosine
    distance (paper silent, as its authors' code); the head networks use no mirror image.
    """
    return protocol_metrics(data, inputs.extract(run, network, store, flip=flip))


def protocol_metrics(data, feats, queries=tuple(QUERIES)) -> dict:
    """Metrics of features (Q + G, D) in the order data.query + data.gallery, as fractions.

    cross.rank1, same.mAP ... belong to the protocol `multi`, cross.single10.rank1, cross.single10.mrr ... to
    `single10`. A set without queries is left out.
    """
    q, gallery, found = len(data.query), [s.pid for s in data.gallery], {}
    for name in queries:
        chosen = [i for i, s in enumerate(data.query) if s.camid == QUERIES[name]]
        if not chosen:
            continue
        part = feats[:q][chosen], feats[q:], [data.query[i].pid for i in chosen], gallery
        multi, single = prcc.metrics(*part), prcc.single_shot_metrics(*part)
        found |= {
            f"{name}.mAP": multi.mAP,
            f"{name}.mINP": multi.mINP,
            **{f"{name}.rank{k}": multi.rank(k) for k in (1, 5, 10)},
            f"{name}.single10.rank1": single.rank(1),
            f"{name}.single10.rank10": single.rank(10),
            f"{name}.single10.mrr": single.mrr,
        }
    return found


def show(run, name, metrics):
    """Print rank-1 and mAP of the query sets."""
    found = {key: f"{100 * value:5.1f}" for key, value in metrics.items()}
    for query in [q for q in QUERIES if f"{q}.mAP" in metrics]:
        multi = f"rank-1 {found[f'{query}.rank1']}  mAP {found[f'{query}.mAP']}"
        runtime.say(run, f"{name:<16} {query:<6} multi {multi}   single10 rank-1 {found[f'{query}.single10.rank1']}")


def keep_best(best: dict, metrics: dict, epoch: int) -> dict:
    """The authors' selection: for each query set on its own, the epoch with the largest rank1 + mAP on the test set."""
    for name in [q for q in QUERIES if f"{q}.mAP" in metrics]:
        own = {k: v for k, v in metrics.items() if k.startswith(f"{name}.")} | {f"{name}.epoch": epoch}
        if (
            f"{name}.mAP" not in best
            or own[f"{name}.rank1"] + own[f"{name}.mAP"] > best[f"{name}.rank1"] + best[f"{name}.mAP"]
        ):
            best = {k: v for k, v in best.items() if not k.startswith(f"{name}.")} | own
    return best
