"""Command line.

python -m common.synthetic market --out data                 # or duke, cuhk03, prcc, coco ...; --size full --seed 1
python -m common.synthetic sheet --out people.jpg            # one picture that shows everything
"""

import argparse
import sys

from common import commandline, synthetic
from common.synthetic.sheet import sheet


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m common.synthetic", description="Render synthetic people.")
    parser.add_argument("what", help=f"{', '.join(synthetic.names())}, or sheet for a contact sheet")
    parser.add_argument("--out", required=True, help="directory to write to; the picture's path for sheet")
    parser.add_argument("--size", default="small", help="small, medium or full (the real data set's counts)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-j", "--workers", type=int, default=None, help="processes; default all cores")
    return parser.parse_args(commandline.words(argv))


def main() -> int:
    args = parse_args()
    try:
        if args.what == "sheet":
            written = sheet(args.out, args.seed)
        else:
            written = synthetic.write(args.what, args.out, args.size, args.seed, args.workers)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
