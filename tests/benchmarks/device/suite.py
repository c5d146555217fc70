"""The tests that need a GPU, counted as they end."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TRAINING = ROOT / "tests" / "test_gpu_training.py"


class Counter:
    """Keeps how many tests passed, failed and were skipped, and each one that failed with its error's first line."""

    def __init__(self, keep):
        self.keep, self.counts = keep, {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when != "call" and report.outcome == "passed":
            return  # set up or torn down
        self.counts[report.outcome] += 1
        for name, count in self.counts.items():
            self.keep(name, count, "tests")
        if report.outcome == "failed":
            self.keep(f"failed: {report.nodeid}: {cause(report)}", round(report.duration, 2), "s")

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.counts["failed"] += 1
            self.keep("failed", self.counts["failed"], "tests")
            self.keep(f"failed: {report.nodeid}: not collected", 0, "s")


def cause(report) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).strip().splitlines()[0][:200]


def training(keep, small: bool) -> None:
    run(keep, str(TRAINING), "-k", "not compiled")


def compiled(keep, small: bool) -> None:
    run(keep, str(TRAINING), "-k", "compiled")


def rest(keep, small: bool) -> None:
    """Only files that have such tests are read: the others may need packages that are not here."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if path != TRAINING and marked(path)]
    run(keep, *files)


def marked(path: Path) -> bool:
    return "mark.gpu" in path.read_text(encoding="utf-8")


def run(keep, *where: str) -> None:
    """Raises RuntimeError if pytest could not do its work; tests that fail are figures."""
    words = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--durations=15", *where]
    code = pytest.main(words, plugins=[Counter(keep)])
    sys.stdout.flush()
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {pytest.ExitCode(code).name}")
