"""What a row's test gives without any training: its network with random weights, colour histograms, and chance."""

from common import datasets, evaluation, histogram
from pixel_sampling import train
from pixel_sampling.evaluate import QUERIES, evaluate, possible_protocols, protocol_metrics


def measure(run, args) -> tuple[dict[str, dict], datasets.Dataset]:
    """Metrics as in the row's result by baseline, and the data set; opens the run's log.

    chance: rank-1 of the protocol `multi` alone.
    """
    data, _, _, store = train.open_data(run, args)
    protocols = possible_protocols(run, data)
    network, *_ = train.build(args, run, int(datasets.labels(data.train).max()) + 1)
    found = {
        "untrained": evaluate(run, network, data, store, not args.arch.startswith("head"), protocols),
        "histogram": protocol_metrics(data, histogram.color_histograms(store), protocols=protocols),
    }
    gallery = [s.pid for s in data.gallery]
    pids = {name: [s.pid for s in data.query if s.camid == camid] for name, camid in QUERIES.items()}
    found["chance"] = {f"{name}.rank1": evaluation.chance(own, gallery) for name, own in pids.items() if own}
    return found, data
