"""The processes below a process. Knows nothing but the standard library; Linux."""

import contextlib
import os
import signal
import time
from pathlib import Path


def descendants(pid: int) -> list[int]:
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        own = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return []
    return own + [below for child in own for below in descendants(child)]


def kill(pid: int) -> None:
    """Send kill -9 to a process and all below it, also to those with a session of their own, as torchrun's workers.

    All are halted before the first one dies: none can start another meanwhile, or lose its parent and not be found.
    Returns when they have ended and given back what they held, after 20 s at the latest.
    """
    found: list[int] = []
    while new := [one for one in (pid, *descendants(pid)) if one not in found]:
        found += new
        send(new, signal.SIGSTOP)
    send(found, signal.SIGKILL)
    late = time.monotonic() + 20
    while not all(map(ended, found)) and time.monotonic() < late:
        time.sleep(0.01)


def ended(pid: int) -> bool:
    """A process runs no more, whether or not its parent has looked at it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # loader workers come and go
            os.kill(pid, number)
