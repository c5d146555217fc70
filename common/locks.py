"""One process at a time: a lock on a file that the system releases when its holder dies, however that happens."""

import contextlib
import errno
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # everything else
    msvcrt = None

PLACE = 2**20  # the byte that msvcrt locks, far behind the holder's name: a locked byte cannot be read
BUSY = {errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
POLL_S = 0.1  # msvcrt cannot wait
ALONE = "see to it that no two commands write there at once"

_held: dict[str, BinaryIO] = {}  # path -> open file of the locks of this process
_told: set[Path] = set()  # folders without locks that were warned of


class Held(BlockingIOError):
    """Another process holds the lock; the text names the file and the process."""


@contextlib.contextmanager
def hold(path: Path, wait: bool, without: str = ALONE) -> Iterator[bool]:
    """Hold the lock on a file, made if it is not there and left behind, in a folder that is there.

    Yields True, or False where the file system knows no locks, which is warned of once a folder, the text ending with
    `without`. A process that holds the lock already gets it again; only the outer block releases it. Processes that are
    forked do not inherit it.
    Raises: Held if another process holds it and not wait; OSError if the file cannot be written.
    """
    name = os.path.realpath(path)
    if name in _held:
        yield True
        return
    with open(name, "a+b", buffering=0) as file:
        held, reason = _locked(file, Path(path), wait)
        if held:
            _held[name] = file
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())  # for the message of the next one
        elif (folder := Path(path).parent) not in _told:
            _told.add(folder)
            warnings.warn(f"{folder} cannot be locked ({reason}); {without}", stacklevel=4)
        try:
            yield held
        finally:
            if _held.pop(name, None) is not None and fcntl is None:  # closing is enough for flock
                _windows(file, msvcrt.LK_UNLCK)


def _locked(file: BinaryIO, path: Path, wait: bool) -> tuple[bool, str]:
    """True once the lock is taken; False, and why, where there are none. Raises: Held."""
    while fcntl is not None or msvcrt is not None:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            else:
                _windows(file, msvcrt.LK_NBLCK)
            return True, ""
        except OSError as error:
            if error.errno not in BUSY:
                return False, error.strerror
        if not wait:
            file.seek(0)
            raise Held(f"{path} is held by {file.read(200).decode(errors='replace') or 'another process'}")
        time.sleep(POLL_S)
    return False, "this Python has no file locks"


def _windows(file: BinaryIO, mode: int) -> None:
    file.seek(PLACE)
    msvcrt.locking(file.fileno(), mode, 1)


def _forget() -> None:
    """In a process that was forked: its copy of an open file would keep the lock after the holder has died."""
    for file in _held.values():
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
