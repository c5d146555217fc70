"""Files of a run, written whole or not at all, and the names of its checkpoints. Knows no torch."""

import contextlib
import os
import re
import secrets
from pathlib import Path

OWN = re.compile(r"checkpoint_(\d{4}|[1-9]\d{4,})\.pt")  # of checkpoints.write; all else is the user's
TEMPORARY = re.compile(r".+\.[0-9a-f]+\.tmp")


def replace(path: Path, write_to) -> None:
    """Call write_to(binary file) on a temporary file beside `path`, flush it to the disk and move it into place.

    The temporary name is drawn, so that no two processes, whatever their machines, write to the same one.
    Raises: OSError with path and bytes written so far; the temporary file is removed and `path` is left as it was.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    written = 0
    try:
        with open(temporary, "xb") as file:
            try:
                write_to(file)
                file.flush()
                os.fsync(file.fileno())
            finally:
                with contextlib.suppress(OSError, ValueError):
                    written = file.tell()
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = (
            error.__context__ if isinstance(error, RuntimeError) else error
        )  # torch.save closes its archive over a failed write
        if isinstance(reason, (SystemExit, KeyboardInterrupt)):  # a signal that came while torch.save wrote
            raise reason from None
        if not isinstance(reason, OSError):
            raise
        raise OSError(
            f"could not write {path} ({written} bytes written): {reason}; free some space or choose another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def listed(folder: Path) -> list[Path]:
    """The checkpoints that `write` made in a folder, oldest first; copies under other names are not among them."""
    found = [path for path in folder.iterdir() if OWN.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=epoch_of)


def newest(folder: Path) -> Path | None:
    return (listed(folder) or [None])[-1]


def checkpoint(path: str | Path) -> Path:
    """The checkpoint file that a user names, or the newest of a log folder. Raises: FileNotFoundError."""
    path = Path(path)
    file = newest(path) or path / "checkpoint_*.pt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint {file}")
    return file


def of_row(
    project: str,
    row: str,
    name: str,
    logs_dir: str | Path,
    synthetic: str | None,
    script: str = "train.py",
    seed: int = 0,
) -> Path:
    """The file `name` that a finished row of a project left in its log folder, on any data set of this kind and size.

    `synthetic`: the size of rendered people, None for real ones. Raises: FileNotFoundError naming the row to run first;
    ValueError if two data sets have one.
    """
    ending = f"-synthetic-{synthetic}" if synthetic else ""
    found = [
        path
        for path in sorted(Path(logs_dir).glob(f"{project}/*/{row}/seed{seed}/{name}"))
        if path.relative_to(logs_dir).parts[1].partition("-synthetic-")[2] == ending.rpartition("-")[2]
    ]
    if not found:
        size = f" --synthetic {synthetic}" if synthetic else ""
        raise FileNotFoundError(
            f"row {row} has left no {name} under {logs_dir}/{project}; run it first, to its end: "
            f"python {project}/{script} --row {row}{size}"
        )
    if len(found) > 1:
        raise ValueError(f"row {row} has several {name}: {', '.join(map(str, found))}; give one as a path")
    return found[0]


def name_of(epoch: int) -> str:
    """The name of the checkpoint after `epoch` epochs; `epoch_of` is the way back."""
    return f"checkpoint_{epoch:04d}.pt"


def epoch_of(path: Path) -> int:
    """The epoch in the name of one of the files of `listed`."""
    return int(OWN.fullmatch(path.name)[1])


def remove_temporary(folder: Path) -> None:
    """Remove what a killed run left half-written; only for the one process that may write there."""
    for path in folder.glob("*.tmp"):
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)
