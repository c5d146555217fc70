"""Time and memory of common.evaluation at the size of Market-1501, beside the bare blocked matrix product.

    python tests/benchmarks/bench_evaluation.py                # 3,368 x 19,732 x 2,048, about a minute on two cores
    python tests/benchmarks/bench_evaluation.py --small --json out.json
    python tests/benchmarks/bench_evaluation.py --device cuda

Both sides run in turn in one process; medians and their ratio are printed. Features: `clustered` has 750 identities,
about 18 matches a query and 18 % distractors, most matches near the query; `random` has the same ids and unrelated
features, so that matches lie anywhere in the list. `junk` is `clustered` where the first 3,819 rows are of pid -1, as
in the sorted list of the real data set; their distances are not needed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the one allowed path line: repository root first

import numpy as np
import torch

from common import distances, evaluation


def interleave(calls: dict, repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each call, after one round of warming up."""
    times = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_mib(call, device: str) -> float:
    """MiB that a call takes on top of what is there: allocator peak on CUDA, resident size on the CPU."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak; Linux only
    before = resident_mib("VmRSS")
    call()
    return resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**10


def peak_mib_of_new_process(script: str, arguments: list[str]) -> float:
    """`script --peak` prints its own peak_mib; a fresh process holds no freed memory that a call could reuse unseen."""
    out = subprocess.run([sys.executable, script, "--peak", *arguments], capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])


def market(kind: str, small: bool, device: str) -> tuple:
    """query (Q, D), gallery (G, D) unit rows, and the four id arrays."""
    num_query, num_gallery, size = (337, 1973, 512) if small else (3368, 19732, 2048)
    num_ids, num_junk = num_query * 750 // 3368, num_gallery * 3819 // 19732 if kind == "junk" else 0
    query, gallery, *ids = descriptors(num_query, num_gallery, num_ids, kind, size, 2798 / 15913, num_junk)
    return query.to(device), gallery.to(device), *ids


def descriptors(
    num_query: int, num_gallery: int, num_ids: int, kind="clustered", size=2048, distractors=0.0, num_junk=0, cams=6
) -> tuple:
    """As `market` of any size, on the CPU."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    query_pids = rng.integers(1, num_ids + 1, num_query)
    gallery_pids = rng.integers(1, num_ids + 1, num_gallery)
    gallery_pids[rng.random(num_gallery) < distractors] = 0
    gallery_pids[:num_junk] = -1
    centres = torch.randn(num_ids + 1, size, generator=generator)

    def feats(pids):
        x = torch.randn(len(pids), size, generator=generator)
        for part in torch.arange(len(pids)).split(512):  # in parts, as a temporary copy could hide the measured peak
            if kind != "random":
                x[part] += 0.5 * centres[torch.from_numpy(pids)[part].clamp(min=0)]
            x[part] = torch.nn.functional.normalize(x[part])
        return x

    camids = [rng.integers(0, cams, n) for n in (num_query, num_gallery)]
    return feats(query_pids), feats(gallery_pids), query_pids, gallery_pids, *camids


def bare_product(query: torch.Tensor, gallery: torch.Tensor, rows: int = 256) -> None:
    for start in range(0, len(query), rows):
        torch.mm(query[start : start + rows], gallery.T)


def measure(kind: str, args: argparse.Namespace) -> dict:
    case = market(kind, args.small, args.device)
    dist = distances.pairwise(*case[:2])
    times = interleave(
        {
            "bare_product": lambda: bare_product(*case[:2]),
            "rank_metrics": lambda: evaluation.rank_metrics(*case),
            "from_distances": lambda: evaluation.rank_metrics_from_distances(dist, *case[2:]),
        },
        args.repeats,
        args.device,
    )
    row = {"features": kind, **{f"{name}_s": value for name, value in times.items()}}
    row["ratio"] = times["rank_metrics"] / times["bare_product"]
    flags = ["--kind", kind, "--device", args.device] + ["--small"] * args.small
    row["peak_mib"] = peak_mib_of_new_process(__file__, flags)
    row["matrix_mib"] = dist.numel() * 4 / 2**20
    return row


def main(args: argparse.Namespace) -> None:
    if args.peak:
        case = market(args.kind, args.small, args.device)
        evaluation.rank_metrics(case[0][:8], case[1], case[2][:8], case[3], case[4][:8], case[5])  # load the libraries
        print(peak_mib(lambda: evaluation.rank_metrics(*case), args.device))
        return
    rows = []
    for kind in ("clustered", "random", "junk"):
        rows.append(measure(kind, args))
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{v:9s}" for k, v in rows[-1].items()), flush=True)
    if args.json:
        record = {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": args.device, "rows": rows}
        Path(args.json).write_text(json.dumps(record, indent=1))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tenth of the images, 512 dimensions")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--kind", default="clustered", help=argparse.SUPPRESS)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
