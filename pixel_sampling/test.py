"""Evaluate a trained network on PRCC: both query sets, both protocols, results as CSV.

python pixel_sampling/test.py --checkpoint logs/pixel_sampling/prcc/T2-c/seed0        # a folder (its newest) or a file
python pixel_sampling/test.py --checkpoint CHECKPOINT --protocol single10 --query cross --csv scores.csv
python pixel_sampling/test.py --checkpoint AUTHORS.pth --arch bot --data-dir /data     # bare weights, the authors'
python pixel_sampling/test.py --weights CHECKPOINT --query DIR --gallery DIR --out DIR # your own images: ranking.csv
"""

import csv
import io
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from common import flags
from pixel_sampling.flags import PLAIN, PROTOCOLS, QUERIES, own_query
from pixel_sampling.flags import parse_args as train_flags
from pixel_sampling.flags import test_args as parse_args

if __name__ == "__main__":
    arguments = flags.answer(parse_args)  # torch is loaded below

from torch.nn.functional import normalize

from common import checkpoints, inputs, own_images, processes, runfiles, runtime
from pixel_sampling import model
from pixel_sampling.evaluate import protocol_metrics, without_gallery
from pixel_sampling.head import HeadStore
from pixel_sampling.masks import open_masks

FORM = "unit length, image and mirror image"
COLUMNS = ("rank1", "rank5", "rank10", "mAP", "mINP", "mrr")


def load_network(path: str, arch: str | None = None) -> tuple:
    """The network of a checkpoint (or, with `arch`, of bare weights) in eval mode, the flags of its training, the file.

    Raises: FileNotFoundError, ValueError for files that are no checkpoint of this project or do not fit.
    """
    file = runfiles.checkpoint(path)
    if arch is not None:
        found = model.read_weights(file, "resnet50")
        network = model.build(arch, classes(found.tensors, file), "resnet50")
        if not model.load_weights(network, found):
            raise ValueError(
                f"{file} holds a trunk without the rest of --arch {arch}; give the weights of that network"
            )
        return network.eval(), vars(train_flags(["--arch", arch, *PLAIN])), file
    state = checkpoints.read(file)
    trained = state["args"]
    if "ps_mode" not in trained:
        raise ValueError(
            f"{file} is no checkpoint of pixel_sampling (it was trained with other flags); for bare weights give --arch"
        )
    weights = checkpoints.strip_prefixes(state["state_dict"])
    network = model.build(trained["arch"], classes(weights, file), trained["backbone"])
    checkpoints.fit(network, weights, file)
    return network.eval(), trained, file


def classes(weights: dict, file: Path) -> int:
    """How many people a network was trained on."""
    sizes = [len(v) for k, v in weights.items() if "classifier" in k and k.endswith("weight")]
    if not sizes:
        raise ValueError(f"{file} holds no classifier, so it is no network of this project")
    return sizes[0]


def open_test(args, trained: dict):
    """The run, the data set and the test store (query, then gallery) of a checkpoint's flags under the given ones."""
    settings = {**vars(train_flags(["--arch", trained["arch"], *PLAIN])), **trained}
    settings = flags.of_test(args, settings, "mask_format")
    run, head = runtime.start(settings, "pixel_sampling"), trained["arch"].startswith("head")
    data = inputs.dataset(run, settings.dataset, **({"mask_format": settings.mask_format} if head else {}))
    if "data_name" in trained:  # bare weights do not say what they were trained with
        inputs.trained_on(run, data, trained)
    samples, size = data.query + data.gallery, (settings.height, settings.width)
    store = inputs.open_images(run, samples, *size, name=f"{data.name} test", interpolation="bilinear")
    if head:
        masks = open_masks(
            samples,
            *size,
            settings.mask_format,
            cache=args.cache,
            cache_dir=args.cache_dir,
            device=run.device,
            name=f"{data.name} test masks",
        )
        store = HeadStore(trained["arch"], store, masks)
    return run, data, store


def table(metrics: dict, name: str, data: str, protocols: tuple[str, ...]) -> list[dict]:
    """One line for each query set and protocol; a mean reciprocal rank never stands in the column of mAP."""
    lines = []
    for query in QUERIES:
        for protocol in protocols:
            prefix = f"{query}." if protocol == "multi" else f"{query}.single10."
            values = {column: metrics[prefix + column] for column in COLUMNS if prefix + column in metrics}
            if values:
                lines.append({"checkpoint": name, "data": data, "protocol": protocol, "query": query, **values})
    return lines


def run_own_images(args, network, trained: dict, file: Path) -> None:
    """Ranking, features or program of folders of images: cosine distance, image and mirror image, as in the test."""
    if trained["arch"].startswith("head"):
        raise ValueError(f"{file}: {trained['arch']} looks at parsing masks in the test too, so folders are not enough")
    args = Namespace(**{**vars(args), "query": own_query(args)})
    descriptor = own_images.Descriptor(network, FORM, flip=True, after=normalize)
    own_images.run(
        args,
        descriptor,
        own_images.origin("pixel_sampling", network, trained, "bilinear"),
        Path(args.out or file.parent),
    )


def main(args):
    network, trained, file = load_network(args.checkpoint, args.arch)
    if own_images.wanted(args):
        return run_own_images(args, network, trained, file)
    run, data, store = open_test(args, trained)
    protocols = tuple(PROTOCOLS) if args.protocol == "both" else (args.protocol,)
    if "single10" in protocols and (lost := without_gallery(data)):
        raise ValueError(f"single10 draws a gallery image a person, and {lost[:5]} have none: use --protocol multi")
    network = network.to(run.device)
    feats = inputs.extract(run, network, store, batch_size=args.batch_size, flip=not trained["arch"].startswith("head"))
    metrics = protocol_metrics(data, feats, tuple(QUERIES) if args.query == "both" else (args.query,), protocols)
    lines = table(metrics, file.name, inputs.data_name(data), protocols)
    if args.export_features and run.main:
        own_images.export_data(
            args.export_features,
            normalize(feats),
            data,
            own_images.origin("pixel_sampling", network, trained, "bilinear"),
            FORM,
        )
    for line in lines:
        processes.say(
            run,
            f"{line['query']:<6} {line['protocol']:<9} "
            + "   ".join(f"{k} {100 * line[k]:5.1f}" for k in COLUMNS if k in line),
        )
    if args.csv and run.main:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["checkpoint", "data", "protocol", "query", *COLUMNS])
        writer.writeheader()
        writer.writerows(lines)
        Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
        runfiles.replace(Path(args.csv), lambda out: out.write(text.getvalue().encode()))


if __name__ == "__main__":
    runtime.execute(main, arguments)
