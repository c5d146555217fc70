"""Time and memory of common.jaccard at the size of Market-1501, beside the bare k-nearest-neighbour search in torch.

    python tests/benchmarks/bench_jaccard.py                   # N = 12,936 and Q + G = 23,100, minutes on two cores
    python tests/benchmarks/bench_jaccard.py --small --json out.json
    python tests/benchmarks/bench_jaccard.py --large                  # adds N = 32,621 (MSMT17), time and peak

Both sides run in turn in one process; medians and their ratio are printed. Features: `clustered` has N / 17 identities
in a 48-dimensional normal space, deviation 0.75 around them (1 between them), mapped to 2,048 dimensions by one random
matrix with 0.3 noise added, rows normalised: neighbourhoods overlap, V has about 65 entries a row. `random` is noise in
2,048 dimensions without structure: a few rows are neighbours of very many, so that most pairs are below distance 1.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the one allowed path line: repository root first

import torch

from common import jaccard
from tests.benchmarks.bench_evaluation import interleave, peak_mib, peak_mib_of_new_process


def features(kind: str, n: int, device: str, size: int = 2048, latent: int = 48) -> torch.Tensor:
    """(n, size) unit rows, made in parts so that no temporary copy hides the peak that is measured."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(n // 17 + 1, latent, generator=generator)
    labels = torch.randint(len(centres), (n,), generator=generator)
    mapping = torch.randn(latent, size, generator=generator) / latent**0.5
    x = torch.empty(n, size)
    for part in torch.arange(n).split(512):
        inner = centres[labels[part]] + 0.75 * torch.randn(len(part), latent, generator=generator)
        noise = torch.randn(len(part), size, generator=generator)
        x[part] = torch.nn.functional.normalize(inner @ mapping + 0.3 * noise if kind == "clustered" else noise)
    return x.to(device)


def bare_neighbours(x: torch.Tensor, k: int = 31, rows: int = 1024) -> None:
    for start in range(0, len(x), rows):
        torch.mm(x[start : start + rows], x.T).topk(k)


def measure_jaccard(kind: str, n: int, args: argparse.Namespace) -> dict:
    x = features(kind, n, args.device)
    matrix = jaccard.jaccard_distance(x)
    times = interleave(
        {
            "bare_neighbours": lambda: bare_neighbours(x),
            "jaccard": lambda: jaccard.jaccard_distance(x),
            "cluster": lambda: jaccard.cluster(matrix, 0.6),
        },
        args.repeats if n < 20000 else 1,
        args.device,
    )
    row = {"call": "jaccard_distance", "features": kind, "n": n, "entries_per_row": matrix.nnz / n}
    row |= {"clusters": int(jaccard.cluster(matrix, 0.6).max()) + 1, **{f"{k}_s": v for k, v in times.items()}}
    row["ratio"] = times["jaccard"] / times["bare_neighbours"]
    del x, matrix
    row["peak_mib"] = peak_mib_of_new_process(__file__, ["--kind", kind, "--n", str(n), "--device", args.device])
    return row


def measure_re_rank(num_query: int, num_gallery: int, args: argparse.Namespace) -> dict:
    x = features("clustered", num_query + num_gallery, args.device)
    query, gallery = x[:num_query], x[num_query:]
    times = interleave(
        {"bare_neighbours": lambda: bare_neighbours(x), "re_rank": lambda: jaccard.re_rank(query, gallery)},
        max(1, args.repeats // 2),
        args.device,
    )
    row = {"call": "re_rank", "features": "clustered", "n": len(x), **{f"{k}_s": v for k, v in times.items()}}
    row["ratio"] = times["re_rank"] / times["bare_neighbours"]
    del x, query, gallery
    flags = ["--n", str(num_query + num_gallery), "--num-query", str(num_query), "--device", args.device]
    row["peak_mib"] = peak_mib_of_new_process(__file__, flags)
    return row


def measure_peak(args: argparse.Namespace) -> float:
    x = features(args.kind, args.n, args.device)
    jaccard.jaccard_distance(x[:200])  # load the libraries
    if args.num_query:
        return peak_mib(lambda: jaccard.re_rank(x[: args.num_query], x[args.num_query :]), args.device)
    return peak_mib(lambda: jaccard.jaccard_distance(x), args.device)


def main(args: argparse.Namespace) -> None:
    if args.peak:
        print(measure_peak(args))
        return
    tasks = [
        lambda: measure_jaccard("clustered", 1300 if args.small else 12936, args),
        lambda: measure_jaccard("random", 1300 if args.small else 12936, args),
        lambda: measure_re_rank(*((337, 1973) if args.small else (3368, 19732)), args),
    ]
    if args.large:
        tasks.append(lambda: measure_jaccard("clustered", 32621, args))
    rows = []
    for task in tasks:
        rows.append(task())
        cells = (f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items())
        print("  ".join(cells), flush=True)
    if args.json:
        record = {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": args.device, "rows": rows}
        Path(args.json).write_text(json.dumps(record, indent=1))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tenth of the images")
    parser.add_argument("--large", action="store_true", help="also N = 32,621")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file to write the figures to")
    for flag, default in (("--kind", "clustered"), ("--n", 0), ("--num-query", 0)):
        parser.add_argument(flag, type=type(default), default=default, help=argparse.SUPPRESS)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
