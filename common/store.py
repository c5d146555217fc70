"""Rows of uint8 that are made once, written to a .npy file and mapped by every process: decoded images and masks.

File systems differ: where one cannot lock, reserve space or map files (network drives, shared folders of virtual
machines), the work goes on without, and one warning says what that costs.
"""

import errno
import hashlib
import json
import multiprocessing
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common import locks
from common.datasets.files import CACHE_FOLDER

VERSION = 2  # part of the key: raise it when decoding changes
WITHOUT_LOCKS = "processes that start at once decode the same images each, which a --cache-dir on a local disk avoids"
CHUNK = 64  # rows a worker makes at a time
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Rows(NamedTuple):
    """What a store holds, make(item) for each item, uint8 of one shape, and who makes it: `workers` if at least two."""

    make: Callable[..., np.ndarray]
    items: Sequence
    shape: tuple[int, ...]
    title: str  # of the progress bar
    workers: int = 0
    threads: bool = False  # workers are threads, not processes

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape))


def place(paths: list[str], shape: tuple[int, ...], kind: str, cache_dir: str | Path | None, name: str) -> Path:
    """The store file of these image files; its name tells their content, the shape of a row and `kind`, the filter."""
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir(paths)
    stem = name.replace(" ", "-").replace(os.sep, "-")
    return folder / f"{stem}-{shape[-2]}x{shape[-1]}-{store_key(paths, shape, kind)[:16]}.npy"


def default_cache_dir(paths: list[str]) -> Path:
    """.reid_cache in the folder that all paths share, or in the one above if that holds images of the list itself."""
    parents = {os.path.dirname(os.path.abspath(path)) for path in paths}
    common = os.path.commonpath(sorted(parents))
    return Path(os.path.dirname(common) if common in parents else common) / CACHE_FOLDER


def store_key(paths: list[str], shape: tuple[int, ...], kind: str) -> str:
    """Hex SHA-256 of the file list (relative to its common folder), sizes, times of change, shape, kind and version."""
    full = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in full])
    digest = hashlib.sha256(json.dumps([VERSION, *shape, kind, len(paths)]).encode())
    for path in full:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such image; the data set is incomplete") from None
        digest.update(json.dumps([os.path.relpath(path, common), status.st_size, status.st_mtime_ns]).encode())
    return digest.hexdigest()


def open_rows(file: Path, rows: Rows) -> np.ndarray:
    """The rows, uint8 (N, *shape), mapped from `file`, which is written first if it is not there; others wait for that.

    Raises: OSError for a folder that cannot be written or a full disk, with the bytes needed; ValueError for a damaged
    file; whatever `make` raises.
    """
    if not file.exists():
        with locked(file.parent) as alone:
            if not file.exists():
                write(file, rows, alone)
    try:
        pixels = mapped(file)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file}: damaged ({error}); delete it, the next run writes it again") from error
    if pixels.shape != (len(rows.items), *rows.shape) or pixels.dtype != np.uint8:
        raise ValueError(
            f"{file}: holds {pixels.dtype} {pixels.shape}, expected uint8 {(len(rows.items), *rows.shape)}; "
            f"delete it, the next run writes it again"
        )
    return pixels


def mapped(file: Path) -> np.ndarray:
    """The array of a .npy file as a memory map, or read whole where the file system cannot map."""
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        if not isinstance(error, FileNotFoundError | PermissionError):
            size = file.stat().st_size
            warnings.warn(
                f"{file.parent} cannot map files ({error.strerror}), so each process reads {size:,} bytes into memory; "
                f"a --cache-dir on a local disk avoids it",
                stacklevel=3,
            )
            return np.load(file, allow_pickle=False)
        raise


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the cache folder's lock, which the system releases if this process dies; False where it knows no locks.

    Raises: OSError if the folder is not writable.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            alone = stack.enter_context(locks.hold(folder / ".lock", wait=True, without=WITHOUT_LOCKS))
        except OSError as error:
            raise OSError(
                error.errno,
                f"image cache {folder} cannot be written ({error.strerror}); give another folder "
                f"with --cache-dir, or use --cache off",
            ) from error
        yield alone


def write(file: Path, rows: Rows, alone: bool) -> None:
    """Make all rows: under a temporary name, flushed to disk, then renamed. `alone`: removes torn earlier attempts."""
    for torn in file.parent.glob(f"{file.name}.*.tmp") if alone else ():
        torn.unlink(missing_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    needed = len(rows.items) * rows.row_bytes
    try:
        with open(temporary, "xb") as out:
            np.lib.format.write_array_header_1_0(
                out, {"descr": "|u1", "fortran_order": False, "shape": (len(rows.items), *rows.shape)}
            )
            out.flush()
            offset = out.tell()
            reserve(out, offset, needed)
            fill(temporary, offset, rows)
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            error.errno,
            f"{file}: no space for {needed:,} bytes ({error.strerror}); free some, give another folder with "
            f"--cache-dir, or use --cache off",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def reserve(out, offset: int, length: int) -> None:
    """Take the space on the disk at once, where it can, so that a full one shows before the work."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(out.fileno(), offset, length)
        except OSError as error:
            if error.errno in FULL:
                raise


def fill(file: Path, offset: int, rows: Rows) -> None:
    """Make chunks of rows in workers, each written to its place in the file; the first error stops the rest."""
    chunks = [
        (file, offset + start * rows.row_bytes, rows.make, rows.items[start : start + CHUNK])
        for start in range(0, len(rows.items), CHUNK)
    ]
    with tqdm(total=len(rows.items), desc=rows.title, unit="img", disable=None) as bar:
        if rows.workers < 2 or len(chunks) < 2:
            for chunk in chunks:
                bar.update(write_chunk(*chunk))
            return
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        pool = (
            ThreadPoolExecutor(rows.workers) if rows.threads else ProcessPoolExecutor(rows.workers, mp_context=context)
        )
        with pool:
            try:
                for done in as_completed([pool.submit(write_chunk, *chunk) for chunk in chunks]):
                    bar.update(done.result())
            finally:
                pool.shutdown(cancel_futures=True)


def write_chunk(file: Path, position: int, make: Callable[..., np.ndarray], items: Sequence) -> int:
    """Make some rows and write them at a byte position of the file; returns their number."""
    rows = np.stack([make(item) for item in items])
    with open(file, "r+b") as out:
        out.seek(position)
        out.write(rows)
    return len(items)
