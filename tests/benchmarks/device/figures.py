"""What a part measured, written as it goes, and how it measures on a device whose work is queued."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common.runfiles import replace


class Figures:
    """A file {"figures": [{"name", "value", "unit"}], "error"}, written anew in one step after each figure."""

    def __init__(self, file: Path | None = None):
        self.file, self.found = file, {"figures": []}

    def __call__(self, name: str, value: float, unit: str) -> None:
        """Add a figure, or replace the one of this name."""
        new = {"name": name, "value": value, "unit": unit}
        for figure in self.found["figures"]:
            if figure["name"] == name:
                figure.update(new)
                break
        else:
            self.found["figures"].append(new)
        self.write()

    def fail(self, error: BaseException) -> None:
        """Keep an error's first sentence."""
        lines = str(error).strip().splitlines()
        self.found["error"] = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
        self.write()

    def write(self) -> None:
        if self.file is not None:
            replace(self.file, lambda out: out.write(json.dumps(self.found).encode()))


def wait() -> None:
    """Let the device finish, so that the clock is honest."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable) -> tuple:
    """What work() returns, and its seconds, with the device's queue empty before and after."""
    wait()
    began = time.perf_counter()
    result = work()
    wait()
    return result, time.perf_counter() - began


def seconds(work: Callable, repeats: int) -> float:
    """Median seconds of some calls, after one that warms up."""
    return statistics.median([timed(work)[1] for _ in range(repeats + 1)][1:])


def peak_mib(work: Callable) -> float | None:
    """MiB that the device's allocator held at most during work(), what was there before included; None on the CPU."""
    wait()
    if not torch.cuda.is_available():
        work()
        return None
    torch.cuda.reset_peak_memory_stats()
    work()
    wait()
    return torch.cuda.max_memory_allocated() / 2**20


def fitting(batch: int, least: int, work: Callable[[int], None]) -> None:
    """work(batch), with half of the batch where the card's memory does not hold it, down to `least`.

    Raises: torch.OutOfMemoryError if even that does not fit.
    """
    while True:
        try:
            return work(batch)
        except torch.OutOfMemoryError:
            if batch // 2 < least:
                raise
        torch.cuda.empty_cache()
        print(f"a batch of {batch} does not fit this card; {batch // 2} is tried", flush=True)
        batch //= 2
