"""What a row's test gives without any training: its network with random weights, and colour histograms."""

from common import datasets, histogram, inputs, log_folder
from prsnet import protocols, train


def measure(run, args) -> tuple[dict[str, dict], datasets.Dataset]:
    """Metrics as in the row's result by baseline (untrained, histogram), and the data set; opens the run's log."""
    data = inputs.dataset(run, args.dataset)
    log_folder.open_log(run, inputs.data_name(data))
    samples, size = data.query + data.gallery, (args.height, args.width)
    store = inputs.open_images(run, samples, *size, name=f"{data.name} test", interpolation="bilinear")
    model, *_ = train.build(args, run, int(datasets.labels(data.train).max()) + 1, inputs.data_name(data))
    colours = protocols.all_metrics(data, histogram.color_histograms(store), args.protocol, args.centroid_distractors)
    return {"untrained": train.evaluate(run, args, model, data, store), "histogram": protocols.flat(colours)}, data
