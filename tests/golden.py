"""Losses of the first five training steps of every method on seeded tiny data, recorded beside this file.

A golden loss that moves says that the method is wired differently than when it was recorded: a label, a rate, an
augmentation, a memory that is no longer updated. A change that means to do that records the new losses and says why:

    python tests/golden.py aff_scl    # or another project: runs its cases and rewrites tests/golden/aff_scl.json
"""

import importlib
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).with_suffix("")
TOLERANCE = 2e-4  # relative; other processors and versions of torch sum in another order


def check(project: str, name: str, losses: list[float]) -> None:
    """AssertionError unless the losses are those recorded for this case, to TOLERANCE."""
    recorded = json.loads((FOLDER / f"{project}.json").read_text())[name]
    close = [abs(a - b) <= TOLERANCE * max(1e-3, abs(b)) for a, b in zip(losses, recorded)]
    assert len(losses) == len(recorded) and all(close), f"{project} {name}: {losses}, recorded {recorded}"


def record(project: str) -> None:
    """Run every case of tests/test_<project>_golden.py: CASES maps a name to a function of no arguments."""
    cases = importlib.import_module(f"test_{project}_golden").CASES
    FOLDER.mkdir(exist_ok=True)
    losses = {name: [round(float(x), 7) for x in case()] for name, case in cases.items()}
    (FOLDER / f"{project}.json").write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
    record(sys.argv[1])
