"""Evaluate a fine-tuned network, clean and corrupted, and draw the paper's figures.

python dapg/test.py --checkpoint logs/dapg/sysu/agw/ours/sysu/seed0                  # both protocols, clean and -C
python dapg/test.py --checkpoint CHECKPOINT --corruption fog --severity 3            # one type, one severity
python dapg/test.py --checkpoint CHECKPOINT --noise-exclude fog snow                 # -C without these types
python dapg/test.py --figure 1                                                       # clean and -C bars of results
python dapg/test.py --figure 1 --synthetic small                                     # of the small chain's results
python dapg/test.py --figure 3 --dataset luperson --synthetic small                  # noise groups of six images
python dapg/test.py --figure 4 --source row:generate/market --dataset market         # sources in the four poses
python dapg/test.py --weights CHECKPOINT --query DIR --gallery DIR --out DIR         # your own images
"""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

import numpy as np
import torch

from common import checkpoints, inputs, own_images, runtime, visualize
from dapg.downstream import agw
from dapg.downstream import stage as downstream
from dapg.flags import variants
from dapg.noise import corruptions, groups
from dapg.poses import gan, pose
from dapg.pretrain.stage import Views
from results import schema

FIGURE1 = ("agw/in/sysu", "cil/in/sysu", "agw/ours/sysu", "cil/ours/sysu")
CHAIN1 = ("chain/agw-sysu-scratch", "chain/cil-sysu-scratch", "chain/agw-sysu", "chain/cil-sysu")  # synthetic people

MODALITIES = {"visible": "rgb", "infrared": "ir"}


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(prog="dapg/test.py", allow_abbrev=False, description="Evaluate a checkpoint, draw figures.")
    parser.add_argument("--checkpoint", "--weights", help="checkpoint of stage agw or cil, or its log folder (newest)")
    parser.add_argument("--figure", type=int, choices=[1, 3, 4], help="draw this figure instead")
    parser.add_argument("-d", "--dataset", help="default: the checkpoint's; figures: luperson, market")
    parser.add_argument("--split", type=int, help="RegDB's split; default: the checkpoint's own")
    parser.add_argument("--corruption", choices=corruptions.BENCH20, help="this type alone instead of all 20")
    parser.add_argument("--severity", type=int, choices=range(1, 6), help="this severity instead of U{1..5}")
    parser.add_argument("--noise-exclude", nargs="+", default=[], metavar="NAME", choices=corruptions.BENCH20)
    parser.add_argument("--draws", type=int, default=10, help="repetitions of the corrupted benchmark")
    parser.add_argument("--source", default="row:generate/market", help="generated poses of figure 4: row:NAME or path")
    parser.add_argument("--out", default=".", help="folder for the pictures")
    parser.add_argument("--logs-dir", default=str(runtime.ROOT / "logs"))
    runtime.add_test_flags(parser)
    for part, default in (("query", "infrared"), ("gallery", "visible")):
        parser.add_argument(
            f"--{part}-modality",
            choices=list(MODALITIES),
            default=default,
            help=f"your own images: which stream describes --{part}"
            + ("; --export writes this one" if part == "gallery" else ""),
        )
    own_images.add_flags(parser)
    args = parser.parse_args(argv)
    own_images.check(parser, args)
    if (args.checkpoint is None) == (args.figure is None):
        parser.error("give --checkpoint to evaluate, or --figure 1, 3 or 4 to draw")
    return args


def load_network(path: str) -> tuple[agw.TwoStream, Namespace, Path]:
    """The network of a checkpoint file or log folder, the flags it was trained with, and the file."""
    file = Path(path)
    if file.is_dir():
        file = checkpoints.newest(file) or file / "checkpoint_*.pt"
    state = checkpoints.read(file)
    trained = Namespace(**state["args"])
    weights = checkpoints.strip_prefixes(state["state_dict"])
    if getattr(trained, "stage", None) not in ("agw", "cil") or "classifier.weight" not in weights:
        raise ValueError(f"{file} is no checkpoint of --stage agw or cil")
    network = agw.TwoStream(len(weights["classifier.weight"]), trained.backbone, variants(trained)["nl_inter"])
    checkpoints.fit(network, weights, file)
    return network.eval(), trained, file


def run_own_images(args) -> None:
    """Ranking, features or program of folders of images, with the feature of the clean published numbers."""
    network, trained, _ = load_network(args.checkpoint)

    def stream(modality: str) -> own_images.Descriptor:
        half = int(trained.stage == "agw")  # bn for AGW, pool for CIL
        extractor = agw.Extractor(network, MODALITIES[modality])
        return own_images.Descriptor(extractor, after=lambda both: both.chunk(2, 1)[half])

    own_images.run(
        args,
        stream(args.query_modality),
        (trained.height, trained.width),
        Path(args.out),
        interpolation="lanczos",
        gallery_descriptor=stream(args.gallery_modality),
    )


def export_features(path: str, run, network, data: downstream.Data, stage: str) -> None:
    """The clean features of query and gallery, of the stage's published kind."""
    names = ("ir", "rgb") if data.data.name == "sysu" else ("rgb", "ir")
    kind = "bn" if stage == "agw" else "pool"
    feats = [downstream.features(run, network, data.stores[name], name)[kind] for name in names]
    own_images.write_features(path, torch.cat(feats), own_images.sample_rows(data.data))


def evaluate(args) -> None:
    """Clean and corrupted metrics of a checkpoint; with --corruption or --severity the corrupted ones alone."""
    network, trained, file = load_network(args.checkpoint)
    given = {k: getattr(args, k) for k in ("dataset", "data_dir", "synthetic") if getattr(args, k) is not None}
    given |= {"synthetic": None} if args.real else {}
    here = {k: getattr(args, k) for k in ("workers", "cache", "cache_dir", "amp", "logs_dir")}
    merged = Namespace(
        **{
            **vars(trained),
            "results_dir": ".",
            **given,
            **here,
            "compile": False,
            "split": args.split or getattr(trained, "split", None),
        }
    )
    run = runtime.start(merged, "dapg")
    data = downstream.Data(merged, run).open(merged, run)
    if args.export_features and run.main:
        export_features(args.export_features, run, network.to(run.device), data, merged.stage)
    types = [args.corruption] if args.corruption else [t for t in corruptions.BENCH20 if t not in args.noise_exclude]
    single = args.corruption is not None or args.severity is not None
    chosen = downstream.choose(types, args.severity or 0, args.draws)
    metrics = downstream.evaluate(run, network.to(run.device), data, merged.stage, clean=not single, chosen=chosen)
    runtime.say(
        run,
        f"{file.name} on {inputs.data_name(data.data)}; -C with {', '.join(types)}, severity "
        f"{args.severity or '1..5'}, {args.draws} draws",
    )
    downstream.show(run, metrics)


def figure1(size: str | None, out: Path) -> Path:
    """Fig. 1: rank-1 clean beside corrupted, all search on SYSU-MM01, of the paper and of the results there are.

    With synthetic people of `size` the rows of the small chain alone: nothing of the paper stands beside them.
    """
    names = CHAIN1 if size else FIGURE1
    rows, found = schema.load_rows(runtime.ROOT, "dapg"), schema.read_all(runtime.ROOT, "dapg")
    bars = {"paper": [], "paper -C": [], "ours": [], "ours -C": []}
    for name in names:
        own = [r.metrics for r in found if r.row == name and r.size == (size or "")]
        for key, ending in (("all.rank1", ""), ("all_c.rank1", " -C")):
            bars[f"paper{ending}"].append(100 * rows[name].get("paper", {}).get(key, np.nan))
            bars[f"ours{ending}"].append(100 * np.mean([m[key] for m in own]) if own else np.nan)
    place = f"synthetic people ({size})" if size else "SYSU-MM01"
    labels = [name.removeprefix("chain/").removesuffix("/sysu") for name in names]
    return draw_bars(out / "figure1.png", labels, bars, f"rank-1 (%), {place}, all search")


def draw_bars(path: Path, names: list[str], bars: dict[str, list[float]], title: str) -> Path:
    """Grouped bars, per cent; a missing value (nan) leaves a gap, a group of nothing else is left out.

    Raises: ValueError if there is no value at all.
    """
    from matplotlib.figure import Figure

    bars = {label: values for label, values in bars.items() if not np.isnan(values).all()}
    if not bars:
        raise ValueError("figure 1: there is no result to draw; run the rows first (bash dapg/run_chain.sh)")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(bars)
    for i, (label, values) in enumerate(bars.items()):
        axes.bar_label(
            axes.bar(np.arange(len(names)) + width * (i - (len(bars) - 1) / 2), values, width, label=label),
            fmt="%.1f",
            fontsize=7,
        )
    axes.set_xticks(np.arange(len(names)), names)
    axes.set_ylabel(title)
    axes.legend()
    checkpoints.replace(path, lambda file: figure.savefig(file, format="png", dpi=120))
    return path


def figure3(args, out: Path) -> Path:
    """Fig. 3: clean view, x_q, x_1, x_2, x_mix of six images, with the noises and severities that were drawn."""
    run, samples = opened(args, "luperson")
    chosen = samples[:: max(1, len(samples) // 6)][:6]
    store = inputs.open_images(run, chosen, 256, 128, "figure 3")
    pixels, generator = store.gather(np.arange(len(chosen))).to(run.device), runtime.generator(run, 0)
    views = tuple(Views("pad")(pixels, generator) for _ in range(3))
    draw = groups.draw_noise(len(chosen), np.random.default_rng(0))
    group = groups.noise_group(views, draw, generator)
    columns = [x.permute(0, 2, 3, 1).cpu().numpy() for x in (views[0], *group[:4])]
    rows = []
    for i, pictures in enumerate(zip(*columns)):
        names = [f"{corruptions.TRAIN15[kind]} {level}" for kind, level in zip(draw.types[i], draw.severities[i])]
        captions = ["", names[0], f"+ {names[1]}", f"+ {names[2]}", f"{draw.mix[i]:.2f} clean"]
        rows.append([visualize.Cell(image, caption=text) for image, text in zip(pictures, captions)])
    return visualize.grid(out / "figure3.jpg", rows, column_titles=["clean", "x_q", "x_1", "x_2", "x_mix"])


def figure4(args, out: Path) -> Path:
    """Fig. 4: source images and their four generated poses."""
    _, samples = opened(args, "market")
    chosen = [s.path for s in samples[:: max(1, len(samples) // 5)][:5]]
    files = gan.generated_files(args, chosen)
    rows = [[path, *files[pose.POSES * i : pose.POSES * (i + 1)]] for i, path in enumerate(chosen)]
    titles = ["source", *(f"pose {i + 1}" for i in range(pose.POSES))]
    return visualize.grid(out / "figure4.jpg", rows, column_titles=titles)


def opened(args, dataset: str):
    """A run without a log, and the training samples of the figure's data set."""
    defaults = {
        "dataset": dataset,
        "data_dir": "data",
        "row": "figure",
        "seed": 0,
        "results_dir": ".",
        "compile": False,
        "deterministic": False,
    }
    args = Namespace(**{**defaults, **{k: v for k, v in vars(args).items() if v is not None}})
    args = Namespace(**{"synthetic": None, "cache_dir": None, **vars(args)})
    run = runtime.start(args, "dapg")
    return run, inputs.dataset(run, args.dataset).train


def main(args):
    if args.checkpoint:
        return run_own_images(args) if own_images.wanted(args) else evaluate(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    draw = {1: lambda: figure1(args.synthetic, out), 3: lambda: figure3(args, out), 4: lambda: figure4(args, out)}
    print(draw[args.figure]())


if __name__ == "__main__":
    arguments = parse_args()
    with torch.inference_mode():
        runtime.execute(main, arguments)
