"""Correct the number of people (`data.ids`) in recorded results, where it was counted otherwise than inputs.count_ids.

    python results/recount.py --data-dir data             # synthetic people are rendered again where they are missing
    python results/recount.py --data-dir data --check     # change nothing; exit 1 if a number is wrong

Each result's data set is loaded as the run loaded it. A result is touched only if the data are those it records, by the
digest of the files or, for synthetic people, whose JPEGs may differ by a byte between machines, by size, seed and
version of the renderer and the numbers of images and cameras; and nothing in it but that one number.
"""

import argparse
import functools
import json
import re
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from common import commandline

ROOT = Path(__file__).resolve().parents[1]


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = argparse.ArgumentParser(prog="results/recount.py", allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default="data", help="folder that holds the data sets")
    parser.add_argument("--results-dir", default=str(ROOT / "results"))
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a number is wrong")
    return parser.parse_args(commandline.words(argv))


if __name__ == "__main__":
    arguments = parse_args()  # torch is loaded below

from common import datasets, inputs, synthetic
from common.runfiles import replace
from results import schema


@functools.cache
def described(name: str, size: str, data_dir: str, split: int | None) -> dict:
    """The `data` entry that a run would record now; synthetic people are written first."""
    folder = Path(data_dir) / f"synthetic-{size}" if size else Path(data_dir)
    if size:
        synthetic.write(name, folder, size=size)
    return inputs.describe(datasets.load(name, folder, **({"split": split} if split else {})))


def same_data(now: dict, recorded: dict) -> bool:
    keys = ("name", "kind", "images", "cams", "rendered") if "rendered" in recorded else ("digest",)
    return all(now.get(key) == recorded[key] for key in keys)


def main(args: Namespace) -> int:
    """The number of wrong counts."""
    wrong = 0
    for project in schema.projects(ROOT):
        for result in schema.read_all(ROOT, project, Path(args.results_dir)):
            content, name = result.content, result.data.partition("-synthetic-")[0]
            if name not in datasets.NAMES:
                continue  # a measurement without data
            try:
                now = described(name, result.size, args.data_dir, content["protocol"].get("split") or None)
            except (FileNotFoundError, ValueError) as error:
                print(f"{result.path}: not checked, {error}")
                continue
            recorded = content["data"]
            if not same_data(now, recorded):
                print(f"{result.path}: not checked, the files under {args.data_dir} are others")
            elif now["ids"] != recorded["ids"]:
                print(f"{result.path}: {recorded['ids']} -> {now['ids']}")
                wrong += 1
                if not args.check:
                    correct(result.path, now["ids"])
    return wrong


def correct(path: Path, ids: int) -> None:
    """Write the number into the file, every other byte of which stays."""
    before = path.read_text(encoding="utf-8")
    after, count = re.subn(r'("ids": )\d+', rf"\g<1>{ids}", before)
    if count != 1 or {**json.loads(after)["data"], "ids": 0} != {**json.loads(before)["data"], "ids": 0}:
        raise ValueError(f'{path} holds {count} times "ids": expected once, under data; correct it by hand')
    replace(path, lambda file: file.write(after.encode()))


if __name__ == "__main__":
    found = main(arguments)
    print(f"{found} numbers {'are wrong' if arguments.check else 'corrected'}")
    sys.exit(1 if arguments.check and found else 0)
