"""Seconds of a search in a gallery that is described already (`test.py --gallery-features`), and the memory it takes.

    python tests/benchmarks/bench_gallery.py                       # 200,000 rows of 2,048, 1.6 GB on the disk
    python tests/benchmarks/bench_gallery.py --rows 1000000 --device cuda

`open` reads the row lists and checks them; `search` reads all features and ranks 1, 16, 128 queries. The first search
after writing may still come from the memory that the system keeps of files.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the one allowed path line: repository root first

import torch

from common import distances, feature_files, records

ORIGIN = {"schema": feature_files.SCHEMA}


def write(folder: Path, rows: int, columns: int) -> None:
    """Random features of `rows` images, a block at a time."""
    draw = torch.Generator().manual_seed(0)
    sizes = [min(feature_files.ROWS, rows - start) for start in range(0, rows, feature_files.ROWS)]
    blocks = (torch.randn(size, columns, generator=draw) for size in sizes)
    about = [{"path": f"crops/{i:08d}.jpg", "split": "gallery"} for i in range(rows)]
    feature_files.write(folder, blocks, about, ORIGIN, {"gallery": "random"})


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--top", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write(Path(folder), args.rows, args.columns)
        print(f"write   {time.perf_counter() - start:8.2f} s, random numbers among it")
        start = time.perf_counter()
        gallery = feature_files.Gallery(folder, ORIGIN, "random")
        print(f"open    {time.perf_counter() - start:8.2f} s, {len(gallery):,} rows")
        for queries in (1, 16, 128):
            q = torch.randn(queries, args.columns, device=device)
            start = time.perf_counter()
            indices, _ = distances.nearest(q, gallery.blocks(device), args.top)
            indices = indices.cpu()  # waits for a GPU
            seconds = time.perf_counter() - start
            print(f"search  {seconds:8.2f} s, {queries} queries, {1000 * seconds / queries:.1f} ms a query")
    print(f"peak    {records.peak_mib() or 0:8.0f} MiB of this process, mapped pages of the file among them")


if __name__ == "__main__":
    main()
