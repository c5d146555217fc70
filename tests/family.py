"""The processes below a process. Knows nothing but the standard library; Linux."""

import contextlib
import os
import signal
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
    """
    found: list[int] = []
    while new := [one for one in (pid, *descendants(pid)) if one not in found]:
        found += new
        send(new, signal.SIGSTOP)
    send(found, signal.SIGKILL)


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # loader workers come and go
            os.kill(pid, number)
