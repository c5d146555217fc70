"""Print a data set's statistics, or open every image: python -m common.datasets [check] NAME --data-dir DIR."""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from tqdm import tqdm

from common import datasets


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m common.datasets", description=__doc__)
    parser.add_argument("words", nargs="+", metavar="[check] NAME", help=f"one of {', '.join(datasets.NAMES)}")
    parser.add_argument("--data-dir", default="data", help="folder that holds the data set's tree, or the tree itself")
    parser.add_argument("--split", choices=("detected", "labeled"), help="boxes of cuhk03")
    parser.add_argument("-j", "--workers", type=int, default=4, help="threads that open images")
    args = parser.parse_args(argv)
    if len(args.words) > 2 or (len(args.words) == 2 and args.words[0] != "check"):
        parser.error(f"expected NAME or check NAME, got {' '.join(args.words)}")
    return args


def fault(path: str) -> str | None:
    """Why the image cannot be decoded to its last row, or None."""
    try:
        with Image.open(path) as image:
            image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        return f"{path}: {error}"
    return None


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    options = {"split": args.split} if args.split else {}
    try:
        data = datasets.load(args.words[-1], args.data_dir, **options)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(data.statistics())
    if len(args.words) == 1:
        return 0
    paths = sorted({sample.path for sample in data.train + data.query + data.gallery})
    with ThreadPoolExecutor(args.workers) as pool:
        faults = [text for text in tqdm(pool.map(fault, paths), total=len(paths), desc="open", disable=None) if text]
    print("\n".join([*faults, f"{len(paths)} images opened, {len(faults)} broken"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
