"""Print a data set's statistics, or open every image: python -m common.datasets [check] NAME --data-dir DIR.

check exits with 1 for broken images, wrong names and an incomplete tree. Counts off the published table are reported
too, but a data set of one's own in a known layout may well differ.
"""

import argparse
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from common import commandline, datasets, pixels
from common.datasets import files, luperson

CHUNK = 4096  # paths handed to the threads at a time


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m common.datasets", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="+", metavar="[check] NAME", help=f"one of {', '.join(datasets.NAMES)}")
    parser.add_argument("--data-dir", default="data", help="folder that holds the data set's tree, or the tree itself")
    parser.add_argument("--split", choices=("detected", "labeled"), help="boxes of cuhk03")
    parser.add_argument("-j", "--workers", type=int, default=4, help="threads that open images; 0 is as 1")
    args = parser.parse_args(commandline.words(argv))
    if len(args.words) > 2 or (len(args.words) == 2 and args.words[0] != "check"):
        parser.error(f"expected NAME or check NAME, got {' '.join(args.words)}")
    if args.workers < 0:
        parser.error(f"--workers must be at least 0, not {args.workers}")
    return args


def fault(path: str) -> str | None:
    """Why the image is none that common.pixels reads, or None."""
    try:
        pixels.read(path, luperson.content(path))
    except (OSError, ValueError) as error:
        return str(error)
    return None


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    options = {"split": args.split} if args.split else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if len(args.words) > 1 else "default")  # a check reports the counts below
        warnings.simplefilter("default", files.LeftOut)
        try:
            data = datasets.load(args.words[-1], args.data_dir, **options)
        except (OSError, ValueError) as error:
            print(files.shown(str(error)), file=sys.stderr)
            return 1
        counts = data.check() if len(args.words) > 1 else []
    print(files.shown(data.statistics()))
    if len(args.words) == 1:
        return 0
    paths = sorted({sample.path for sample in data.train + data.query + data.gallery})
    faults = broken(paths, args.workers)
    lines = [*faults, *counts, f"{len(paths)} images opened, {len(faults)} broken", published(data, counts)]
    print("\n".join(files.shown(line) for line in lines))
    return 1 if faults else 0


def broken(paths: list[str], workers: int) -> list[str]:
    """One sentence for each image that cannot be decoded, in order."""
    faults, bar = [], tqdm(total=len(paths), desc="open", unit="img", disable=None)
    with ThreadPoolExecutor(max(workers, 1)) as pool, bar:
        for start in range(0, len(paths), CHUNK):
            for text in pool.map(fault, paths[start : start + CHUNK]):
                bar.update()
                faults += [text] if text else []
    return faults


def published(data: datasets.Dataset, differences: list[str]) -> str:
    """How the counts compare with the published table, in one sentence."""
    if data.kind == "synthetic":
        return "rendered people: there is no published table to compare with"
    if not data.published:
        return "the data set has no published table of counts"
    if differences:
        return "counts differ from the published table: expect it for a data set of your own, else check the download"
    return "counts are those of the published table"


if __name__ == "__main__":
    sys.exit(main())
