"""Draw the paper's figures that show data.

    python convnext_ap/figures.py lr                                          # Figure 2, learning rate
    python convnext_ap/figures.py erasing -d market --data-dir /data          # Figure 3, random erasing
    python convnext_ap/figures.py compare                                     # Figure 13, Table 5 as bars
    python convnext_ap/figures.py ranks --checkpoint AP                       # Figures 14 and 15, first five matches
    python convnext_ap/figures.py heat --checkpoint BASE AP                   # Figure 16, ConvNeXt beside ConvNeXt-AP
    python convnext_ap/figures.py cmc --checkpoint BASE A P AP                # Figure 17, rank 1 to 20
    python convnext_ap/figures.py parts --checkpoint AP                       # what refined part pooling looks at

A checkpoint is a file or a log folder. Figures 1 and 4-12 are drawings of the method.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from common import flags
from convnext_ap.flags import figures_args as parse_args

if __name__ == "__main__":
    arguments = flags.answer(parse_args)  # torch is loaded below

import matplotlib
import numpy as np
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common import inputs, runtime, transforms, visualize
from convnext_ap import schedule, train
from convnext_ap.test import check_unseen, load_network, of_test, open_test

HERE = Path(__file__).resolve().parent


def lr(args, out):
    """Figure 2: warm-up and cosine of the heads' learning rate, 50 epochs as printed and the 120 of sec. 5.1."""
    plans = [schedule.Plan(epochs) for epochs in args.epochs]
    curves = [
        visualize.Curve(
            f"{p.epochs} epochs", range(p.epochs), [schedule.learning_rate(e, p, "heads") for e in range(p.epochs)]
        )
        for p in plans
    ]
    return visualize.plot(out / "figure2.png", {"learning rate": curves}, x_label="epoch")


def erasing(args, out):
    """Figure 3: training images before and after random erasing, as the training draws it, but in every image."""
    flags = train.parse_args(
        [
            "--dataset",
            args.dataset or "market",
            "--data-dir",
            args.data_dir or "data",
            *(["--synthetic", args.synthetic] if args.synthetic else []),
            *(["--split", args.split] if args.split else []),
            "--variant",
            "erase=1",
            "--cache",
            "off",
        ]
    )
    run = runtime.start(flags, "convnext_ap")
    data = train.load_data(run, flags)
    chosen = np.sort(np.random.default_rng(args.seed).permutation(len(data.train))[: args.n])
    store = inputs.open_images(run, [data.train[i] for i in chosen], args.height, args.width, name="erasing")
    pixels = store.gather(np.arange(len(chosen))).to(run.device)
    augment = train.make_augment(flags)
    augment.options["flip"] = 0.0
    erased = augment(pixels, torch.Generator(run.device).manual_seed(args.seed))
    shown = [list(pixels.cpu()), list(transforms.pictures(erased).cpu())]
    return visualize.grid(out / "figure3.png", shown, row_titles=["image", "erased"])


def compare(args, out):
    """Figure 13: Table 5 as bars, the paper's numbers, its own method in another colour."""
    table = yaml.safe_load((HERE / "tables.yaml").read_text(encoding="utf-8"))["table5"]
    rows = yaml.safe_load((HERE / "experiments.yaml").read_text(encoding="utf-8"))
    figure = Figure(figsize=(11, 7), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (group, metrics) in zip(figure.subplots(len(table["columns"]), 1), table["columns"].items()):
        names, values = [], []
        for line in table["lines"]:
            own = "rows" in line
            paper = [rows[line["rows"][group]]["paper"][m] for m in metrics] if own else line["cited"].get(group)
            if paper:
                names.append(line["name"])
                values.append(paper)
        x, values = np.arange(len(names)), 100 * np.array(values)
        for k, metric in enumerate(metrics):
            tones = matplotlib.colormaps["tab20c"]
            colours = [tones((4 if "rows" in line else 0) + 2 * k) for line in table["lines"] if line["name"] in names]
            axis.bar(x + 0.4 * k - 0.2, values[:, k], 0.38, color=colours, label=metric.replace("rank", "rank-"))
        axis.set_xticks(x, names, rotation=30, ha="right", fontsize=8)
        axis.set_ylim(60, 100)
        axis.set_ylabel(f"{group} (%)")
        axis.legend(fontsize=8, loc="lower right")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "figure13.png")
    return out / "figure13.png"


def opened(args):
    """Networks of all checkpoints on the device, by their names in the figure, and run, data and store.

    Raises: ValueError if a network was trained with people of the test, or the checkpoints ask for other data or sizes.
    """
    networks = [load_network(path) for path in args.checkpoint]
    settings = [of_test(args, trained) for _, trained, _ in networks]
    check_alike({file: vars(own) for (*_, file), own in zip(networks, settings)})
    run, data, store = open_test(settings[0])
    found = {}
    for model, trained, _ in networks:
        name = f"{model.name}{check_unseen(run, data, trained)}"
        name = name if name not in found else f"{name} ({len(found) + 1})"
        found[name] = model.to(run.device, memory_format=torch.channels_last)
    return found, run, data, store


def check_alike(settings):
    """Raises ValueError unless the checkpoints {file: what it would be measured on} agree in data and size."""
    (first, wanted), *others = settings.items()
    for file, own in others:
        keys = ("dataset", "synthetic", "split", "height", "width")
        if other := [f"{key} {wanted[key]} and {own[key]}" for key in keys if own[key] != wanted[key]]:
            raise ValueError(
                f"{first} and {file} would be drawn with {', '.join(other)}, and a figure shows one data set at one "
                f"size: name the data with --dataset, --split, --synthetic or --real, and draw other sizes apart"
            )


def queries(args, data):
    return np.random.default_rng(args.seed).permutation(len(data.query))[: args.n]


def ranks(args, out):
    """Figures 14 and 15: queries and their five nearest gallery images, green right, red wrong, junk left out."""
    networks, run, data, store = opened(args)
    name, model = next(iter(networks.items()))
    feats = train.features(run, model, store)["H"]
    number = "15" if data.name == "duke" else "14"
    title = f"{name} on {inputs.data_name(data)}"
    path = out / f"figure{number}-{inputs.data_name(data)}.png"
    return visualize.data_rank_list(path, data, feats, queries(args, data), 5, title)


@torch.inference_mode()
def response(model, x):
    """Length over the channels of the last map T, (B, D, h, w) -> (B, h, w): where a network responds."""
    return model.feature_map(x).float().norm(dim=1)


def heat(args, out):
    """Figure 16: image, and the response map of each network, each map stretched to its own range.

    Paper silent: what its maps show; the channel norm of T is what its code base draws.
    """
    networks, run, data, store = opened(args)
    pixels = store.gather(queries(args, data)).to(run.device)
    columns = [list(pixels.cpu())]
    for model in networks.values():
        maps = response(model, transforms.normalize(pixels))
        columns.append([visualize.heat_map(image, m) for image, m in zip(pixels.cpu(), maps.cpu())])
    names = ["image", *networks]
    return visualize.grid(out / f"figure16-{inputs.data_name(data)}.png", list(zip(*columns)), column_titles=names)


def cmc(args, out):
    """Figure 17: CMC curves of all networks, mAP in the legend."""
    networks, run, data, store = opened(args)
    found = {
        name: inputs.rank_metrics(data, train.features(run, model, store)["H"]) for name, model in networks.items()
    }
    return visualize.cmc_curve(
        out / f"figure17-{inputs.data_name(data)}.png",
        {k: m.cmc for k, m in found.items()},
        mAP={k: m.mAP for k, m in found.items()},
        title=inputs.data_name(data),
    )


def parts(args, out):
    """Figure 7 on images: the probability of every part at every position, Eq. (1), one map a part."""
    networks, run, data, store = opened(args)
    model = next(iter(networks.values()))
    if model.assign is None:
        raise ValueError(f"{args.checkpoint[0]} is a {model.name}, which has no parts; give a -P or -AP checkpoint")
    pixels = store.gather(queries(args, data)).to(run.device)
    with torch.inference_mode():
        share = model.assign.probabilities(model.feature_map(transforms.normalize(pixels)).float()).cpu()
    rows = [
        [image, *(visualize.heat_map(image, m, scale=False) for m in maps)] for image, maps in zip(pixels.cpu(), share)
    ]
    names = ["image", *(f"part {i + 1}" for i in range(model.parts))]
    return visualize.grid(out / f"figure7-{inputs.data_name(data)}.png", rows, column_titles=names)


def main(args):
    draw = {"lr": lr, "erasing": erasing, "compare": compare, "ranks": ranks, "heat": heat, "cmc": cmc, "parts": parts}
    print(f"{args.figure}:", draw[args.figure](args, Path(args.out)))


if __name__ == "__main__":
    arguments = parse_args()
    runtime.execute(main, arguments)
