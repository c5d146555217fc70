"""The two query sets of PRCC under its two protocols."""

from common import inputs, processes
from common.datasets import prcc
from pixel_sampling.settings import PROTOCOLS, QUERIES


def evaluate(run, network, data, store, flip: bool, protocols=tuple(PROTOCOLS)) -> dict:
    """Metrics of a network, see protocol_metrics. The feature is the mean over the image and its mirror image, cosine
    distance (paper silent, as its authors' code); the head networks use no mirror image.
    """
    return protocol_metrics(data, inputs.extract(run, network, store, flip=flip), protocols=protocols)


def without_gallery(data) -> list[int]:
    """The people with a query and no gallery image: `multi` leaves their queries out, `single10` cannot be run."""
    return sorted({s.pid for s in data.query} - {s.pid for s in data.gallery})


def possible_protocols(run, data) -> tuple[str, ...]:
    """Both protocols, or `multi` alone, and said, where people have no gallery image."""
    lost = without_gallery(data)
    if lost:
        processes.say(run, f"query people {lost[:5]} have no gallery image: multi without them, and no single10")
    return ("multi",) if lost else tuple(PROTOCOLS)


def protocol_metrics(data, feats, queries=tuple(QUERIES), protocols=tuple(PROTOCOLS)) -> dict:
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
        if "multi" in protocols:
            m = prcc.metrics(*part)
            found |= {f"{name}.mAP": m.mAP, f"{name}.mINP": m.mINP}
            found |= {f"{name}.rank{k}": m.rank(k) for k in (1, 5, 10)}
        if "single10" in protocols:
            m = prcc.single_shot_metrics(*part, trials=PROTOCOLS["single10"])
            found |= {f"{name}.single10.rank{k}": m.rank(k) for k in (1, 10)} | {f"{name}.single10.mrr": m.mrr}
    return found


def show(run, name, metrics):
    """Print rank-1 and mAP of the query sets."""
    found = {key: f"{100 * value:5.1f}" for key, value in metrics.items()}
    for query in [q for q in QUERIES if f"{q}.mAP" in metrics]:
        multi = f"rank-1 {found[f'{query}.rank1']}  mAP {found[f'{query}.mAP']}"
        single = found.get(f"{query}.single10.rank1")
        processes.say(run, f"{name:<16} {query:<6} multi {multi}" + (f"   single10 rank-1 {single}" if single else ""))


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
