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
    """Send kill -9 to a process and all below it, also to those with a session of their own, as torchrun's workers."""
    for one in (*reversed(descendants(pid)), pid):
        with contextlib.suppress(ProcessLookupError):  # loader workers come and go
            os.kill(one, signal.SIGKILL)
