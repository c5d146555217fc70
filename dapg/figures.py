"""The paper's Figs. 1, 3 and 4, drawn from results and data."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np

from common import flags, inputs, records, runfiles, runtime, visualize
from dapg.data import open_store
from dapg.noise import groups
from dapg.noise.names import TRAIN15
from dapg.poses import gan, pose
from dapg.pretrain.views import Views

FIGURE1 = ("agw/in/sysu", "cil/in/sysu", "agw/ours/sysu", "cil/ours/sysu")
CHAIN1 = ("chain/agw-sysu-scratch", "chain/cil-sysu-scratch", "chain/agw-sysu", "chain/cil-sysu")  # synthetic people
FEATURES = "AGW's clean bars are of the feature after BNNeck (bn), CIL's and all of -C of the pooled one (pool)"


def figure1(size: str | None, out: Path) -> Path:
    """Fig. 1: rank-1 clean beside corrupted, all search on SYSU-MM01, of the paper, of the recorded results and of
    those made here.

    With synthetic people of `size` the rows of the small chain alone: nothing of the paper stands beside them.
    """
    names = CHAIN1 if size else FIGURE1
    rows, data = records.load_rows(flags.ROOT / "dapg"), f"sysu-synthetic-{size}" if size else "sysu"
    folders, keys = {"ours": "results", "here": flags.RUNS}, {"all.rank1": "", "all_c.rank1": " -C"}
    bars = {f"{source}{ending}": [] for source in ("paper", *folders) for ending in keys.values()}
    for name in names:
        for key, ending in keys.items():
            bars[f"paper{ending}"].append(100 * rows[name].get("paper", {}).get(key, np.nan))
            for source, folder in folders.items():
                files = sorted((flags.ROOT / folder / "dapg" / data / name).glob("seed*.json"))
                values = [json.loads(file.read_text())["metrics"][key] for file in files]
                bars[f"{source}{ending}"].append(100 * np.mean(values) if values else np.nan)
    place = f"synthetic people ({size})" if size else "SYSU-MM01"
    labels = [name.removeprefix("chain/").removesuffix("/sysu") for name in names]
    return draw_bars(out / "figure1.png", labels, bars, f"rank-1 (%), {place}, all search", FEATURES)


def draw_bars(path: Path, names: list[str], bars: dict[str, list[float]], title: str, note: str) -> Path:
    """Grouped bars, per cent, over a note; a missing value (nan) leaves a gap, a group of nothing else is left out.

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
    axes.set_xlabel(note)
    axes.legend()
    runfiles.replace(path, lambda file: figure.savefig(file, format="png", dpi=120))
    return path


def figure3(args, out: Path) -> Path:
    """Fig. 3: clean view, x_q, x_1, x_2, x_mix of six images, with the noises and severities that were drawn."""
    run, samples = opened(args, "luperson")
    chosen = samples[:: max(1, len(samples) // 6)][:6]
    store = open_store(run, chosen, 256, 128, "figure 3")
    pixels, generator = store.gather(np.arange(len(chosen))).to(run.device), runtime.generator(run, 0)
    views = tuple(Views("pad")(pixels, generator) for _ in range(3))
    draw = groups.draw_noise(len(chosen), np.random.default_rng(0))
    group = groups.noise_group(views, draw, generator)
    columns = [x.permute(0, 2, 3, 1).cpu().numpy() for x in (views[0], *group[:4])]
    rows = []
    for i, pictures in enumerate(zip(*columns)):
        names = [f"{TRAIN15[kind]} {level}" for kind, level in zip(draw.types[i], draw.severities[i])]
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
    own = {"dataset": args.dataset or dataset, "data_dir": args.data_dir or "data"}
    fixed = {"row": "figure", "seed": 0, "results_dir": ".", "compile": False, "deterministic": False}
    args = Namespace(**{**vars(args), **own, **fixed})
    run = runtime.start(args, "dapg")
    return run, inputs.dataset(run, args.dataset).train
