"""What the code does on this machine's GPU: the tests that need one, then the benchmarks, in ten minutes.

    python tests/benchmarks/gpu.py                          # everything; writes results/benchmarks/CARD-TIME.json
    python tests/benchmarks/gpu.py --only aff_scl jaccard   # these parts alone
    python tests/benchmarks/gpu.py --small                  # tries the script itself; its figures mean nothing

Every part is a process of its own with a time box, to which comes what the parts before it left of theirs; it is
killed with all its children when that is over. The file is written anew, in one step, after each part: whatever stops
the command, the parts that ended are in it, and after a signal (Ctrl-C, SIGTERM) also what the one under way had
measured. A part that fails leaves its error's first sentence, one that cannot run the reason. Nothing is downloaded.
`python results/render.py` shows the files as a table.

Status: 0 if all parts ended well and no test failed, 1 if not (without a CUDA device nothing is written), 128 + the
signal if stopped.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the one allowed path line: repository root first

from common.runfiles import replace
from tests import family

SCHEMA = 1
MINUTES = 10  # for which the boxes below are made; with other --minutes they change in proportion
NEEDED = {"torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "yaml": "pyyaml", "PIL": "pillow",
          "scipy": "scipy", "tqdm": "tqdm"}  # fmt: skip
PACKAGES = {**NEEDED, "pytest": "pytest", "cv2": "opencv-python", "sklearn": "scikit-learn"}


@dataclass(frozen=True)
class Part:
    """`command` is run with `--figures FILE` behind it, into which it writes figures (device/figures.py) as it goes."""

    name: str
    title: str
    box_s: float
    command: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # modules beside NEEDED

    def missing(self) -> list[str]:
        """Packages that this part needs and this Python does not have."""
        return [PACKAGES.get(module, module) for module in self.needs if importlib.util.find_spec(module) is None]


TESTS = ("pytest", "cv2", "sklearn")
PARTS = (
    Part("tests-training", "Tests: every stage trains and continues, networks, NCCL", 190, needs=TESTS),
    Part("tests-rest", "Tests: kernels, memory, caches, waits of the host", 60, needs=TESTS),
    Part("aff_scl", "AFF_SCL: training", 25),
    Part("convnext_ap", "ConvNeXt-AP: training, and SimAM's share", 40),
    Part("pixel_sampling", "Pixel sampling: training, and sampling's share", 25),
    Part("prsnet", "PRSNet: pre-training and fine-tuning, share of the card's peak", 35),
    Part("dapg", "DAPG: stages, and noise groups against one core", 30, needs=("cv2",)),
    Part("evaluation", "Evaluation at the size of Market-1501 and MSMT17", 25),
    Part("jaccard", "Jaccard distance, clustering, re-ranking against the CPU", 45),
    Part("tests-compile", "Tests: --compile", 85, needs=TESTS),
)  # together 560 s
START_S = 30  # for starting, looking at the card, and the end
WORK = {part.name: f"training.{part.name}" for part in PARTS} | {  # module in device/, function(keep, small)
    "tests-training": "suite.training",
    "tests-rest": "suite.rest",
    "tests-compile": "suite.compiled",
    "evaluation": "retrieval.measure_evaluation",
    "jaccard": "retrieval.measure_jaccard",
}


class Stop:
    """Remembers the first SIGTERM or SIGINT; raises nothing, as a process that just starts would then be lost."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.catch)

    def catch(self, number: int, frame) -> None:
        self.number = self.number or number


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything together (default: 10)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"some of: {', '.join(names)}")
    parser.add_argument("--out", type=Path, help="folder of the file (default: results/benchmarks; logs/ if --small)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script itself")
    parser.add_argument("--part", choices=["describe", *names], help=argparse.SUPPRESS)  # the process of one part
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes:g}: expected more than 0")
    args.out = args.out or ROOT / ("logs/benchmarks" if args.small else "results/benchmarks")
    return args


# ------------------------------------------------------------------------------------------------------ the whole


def main(args: argparse.Namespace, parts: tuple[Part, ...] = PARTS) -> int:
    began = time.monotonic()
    absent = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if absent:
        return refuse(f"this Python has no {', '.join(absent)}; see requirements.txt")
    described = describe()
    if isinstance(described, str):
        return refuse(described)
    chosen = [part for part in parts if not args.only or part.name in args.only]
    now = datetime.now(timezone.utc)
    record = {
        "schema": SCHEMA,
        "date": now.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "tests/benchmarks/gpu.py", *sys.argv[1:]]),
        "minutes": args.minutes,
        "small": args.small,
        **described,
    }
    slug = re.sub(r"[^A-Za-z0-9]+", "-", described["card"]["name"]).strip("-")
    args.out.mkdir(parents=True, exist_ok=True)
    scale = args.minutes / MINUTES
    spare_s = START_S * scale - (time.monotonic() - began)
    return run_parts(chosen, record, args.out / f"{slug}-{now:%Y%m%dT%H%M%S}.json", args.small, scale, spare_s)


def refuse(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 1


def describe() -> dict | str:
    """Card, versions and commit, as a process of its own finds them; a sentence where there is no usable card."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", "describe"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    return last_line(done.stderr).removeprefix("error: ") or f"looking at the card ended with {done.returncode}"


def run_parts(parts: list[Part], record: dict, file: Path, small: bool, scale: float = 1, spare_s: float = 0) -> int:
    """Run the parts one after another, write `file` after each; the status of the whole command.

    Boxes times `scale`, and `spare_s` more, are when each part ends at the latest, counted from now.
    """
    began, end = time.monotonic(), spare_s
    done = {part.name: {"title": part.title, "status": "not run", "why": "stopped before it"} for part in parts}
    record |= {"parts": done, "seconds": 0.0}
    stop = Stop()
    for part in parts:
        end += part.box_s * scale
        done[part.name] |= attempt(part, end - (time.monotonic() - began), small, stop)
        record["seconds"] = round(time.monotonic() - began, 1)
        replace(file, lambda out: out.write(json.dumps(record, indent=1).encode() + b"\n"))
        show(done[part.name])
        if stop.number:
            break
    print(f"{record['seconds']:.0f} s; written to {file}", flush=True)
    if stop.number:
        return 128 + stop.number
    return 0 if all(fine(entry) for entry in done.values()) else 1


def fine(entry: dict) -> bool:
    failed = [figure for figure in entry.get("figures", []) if figure["name"] == "failed" and figure["value"]]
    return entry["status"] == "done" and not failed


# ---------------------------------------------------------------------------------------------------------- a part


def attempt(part: Part, box_s: float, small: bool, stop: Stop) -> dict:
    """What a part left: status (done | failed | out of time | stopped | not run), why, seconds, box_s, figures."""
    if missing := part.missing():
        return {"why": f"this Python has no {', '.join(missing)}"}
    if box_s <= 0:
        return {"why": "no time was left"}
    print(f"{part.title} ({part.name}), at most {box_s:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        figures, log, began = Path(folder) / "figures.json", Path(folder) / "log", time.monotonic()
        own = (sys.executable, str(Path(__file__).resolve()), "--part", part.name, *["--small"] * small)
        code = bounded([*(part.command or own), "--figures", str(figures)], log, box_s, stop)
        entry = {"seconds": round(time.monotonic() - began, 1), "box_s": round(box_s, 1), **read(figures)}
        error, text = entry.pop("error", None), log.read_text(encoding="utf-8", errors="replace")
    if code == 0:
        return entry | {"status": "done", "why": None}
    if code is None and stop.number:
        return entry | {"status": "stopped", "why": f"stopped by {signal.Signals(stop.number).name}"}
    if code is None:
        return entry | {"status": "out of time", "why": f"killed after its {box_s:.0f} s"}
    print("\n".join(text.splitlines()[-30:]), file=sys.stderr, flush=True)
    ended = f"ended with signal {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return entry | {"status": "failed", "why": error or last_line(text) or ended}


def bounded(command: list[str], log: Path, box_s: float, stop: Stop) -> int | None:
    """The exit status of a command; None if it was killed, with all its children, after box_s seconds or for a stop."""
    end = time.monotonic() + box_s
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        while process.poll() is None and not stop.number and time.monotonic() < end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        code = process.returncode
        if code is None:
            family.kill(process.pid)
            process.wait()
        with contextlib.suppress(ProcessLookupError):  # what it left behind in its group, its parents gone
            os.killpg(process.pid, signal.SIGKILL)
    return code


def read(figures: Path) -> dict:
    return json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else {"figures": []}


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def show(entry: dict) -> None:
    for figure in entry.get("figures", []):
        print(f"  {figure['name']:<64} {figure['value']:>12,.4g} {figure['unit']}")
    print(f"  {entry['status']}{': ' + entry['why'] if entry['why'] else ''}", flush=True)


def run_one(args: argparse.Namespace) -> int:
    """The process of one part: its error goes into the figures' file as a sentence, its traceback to the log."""
    from tests.benchmarks.device import figures

    if args.part == "describe":
        from tests.benchmarks.device import card

        return card.main()
    module, function = WORK[args.part].split(".")
    keep = figures.Figures(args.figures)
    try:
        getattr(importlib.import_module(f"tests.benchmarks.device.{module}"), function)(keep, args.small)
    except Exception as error:
        keep.fail(error)
        raise
    return 0


if __name__ == "__main__":
    arguments = parse_args()
    sys.exit(run_one(arguments) if arguments.part else main(arguments))
