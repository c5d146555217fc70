"""Checkpoint files: written whole or not at all, read without running code, two kept.

A file holds {schema, state_dict, optimizer, scheduler, scaler, epoch, args, extra, wall_s}: tensors and plain
Python values only.
"""

import contextlib
import os
import re
import secrets
from pathlib import Path

import torch

SCHEMA = 1
KEYS = {"schema", "state_dict", "optimizer", "scheduler", "scaler", "epoch", "args", "extra", "wall_s"}
OWN = re.compile(r"checkpoint_(\d{4}|[1-9]\d{4,})\.pt")  # what `write` calls its files; all else is the user's
TEMPORARY = re.compile(r".+\.[0-9a-f]+\.tmp")
PREFIXES = ("module.", "_orig_mod.")
WEIGHTS_REMEDY = "give --weights a .pth file, imagenet or none"


def write(folder: Path, epoch: int, state: dict, keep: int = 2) -> Path:
    """Write folder/checkpoint_<epoch>.pt in one atomic step; of ours up to this epoch, the `keep` newest stay.

    Raises: OSError naming the path and the bytes needed when it cannot be written; older files stay as they were.
    """
    path = folder / f"checkpoint_{epoch:04d}.pt"
    replace(path, lambda file: torch.save(state, file))
    for old in [p for p in listed(folder) if epoch_of(p) <= epoch][:-keep]:
        old.unlink()
    return path


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


def epoch_of(path: Path) -> int:
    """The epoch in the name of one of the files of `listed`."""
    return int(OWN.fullmatch(path.name)[1])


def remove_temporary(folder: Path) -> None:
    """Remove what a killed run left half-written; only for the one process that may write there."""
    for path in folder.glob("*.tmp"):
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def read(path: Path) -> dict:
    """The content of one of our checkpoints, on the CPU.

    Raises: FileNotFoundError; ValueError for a cut or foreign file, naming the previous checkpoint where there is one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        state = load(path)
    except ValueError as error:
        raise ValueError(f"{error}{_previous(path)}") from error
    if not isinstance(state, dict) or not KEYS <= state.keys():
        missing = sorted(KEYS - set(state)) if isinstance(state, dict) else sorted(KEYS)
        raise ValueError(f"{path} is no checkpoint of this repository (it lacks {', '.join(missing)}){_previous(path)}")
    if state["schema"] != SCHEMA:
        raise ValueError(f"{path} has checkpoint schema {state['schema']}, this code reads {SCHEMA}")
    return state


def load(path: Path | str, name: str = "", remedy: str = ""):
    """The content of any PyTorch file, on the CPU; no code in it can run. `name` says in errors what it was to be.

    Raises: FileNotFoundError with the remedy; ValueError for what is no such file, or needs code to be read.
    """
    what = f"{name}: " if name else ""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what}no file {path}" + f"; {remedy}" * bool(remedy))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file torch.load raises IndexError, struct.error and a dozen others
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{what}{path} is not a readable checkpoint ({reason})") from error


def weights(path: Path | str) -> dict:
    """The state_dict in a file, also under `state_dict`, without wrappers' prefixes. Raises: as `load`."""
    return state_dict(load(path, "weights", WEIGHTS_REMEDY), path)


def state_dict(content, path: Path | str) -> dict:
    """The state_dict in the content of a file, as `weights`. Raises: ValueError if there is none."""
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    tensors = isinstance(content, dict) and all(isinstance(value, torch.Tensor) for value in content.values())
    if not tensors or not content:
        raise ValueError(f"weights: {path} holds no state_dict (a mapping from names to tensors)")
    return strip_prefixes(content)


def _previous(path: Path) -> str:
    older = [p for p in listed(path.parent) if epoch_of(p) < epoch_of(path)] if OWN.fullmatch(path.name) else []
    return f"; the previous one is {older[-1]}: continue with --resume {older[-1]}" if older else ""


def strip_prefixes(state_dict: dict) -> dict:
    """Keys without the `module.` and `_orig_mod.` that wrappers add."""

    def strip(key: str) -> str:
        while key.startswith(PREFIXES):
            key = key.split(".", 1)[1]
        return key

    return {strip(k): v for k, v in state_dict.items()}


def fit(model: torch.nn.Module, state_dict: dict, source: Path | str) -> None:
    """Load state_dict into model, strictly (mutates model).

    Raises: ValueError listing missing keys, unexpected keys and wrong shapes.
    """
    state_dict, own = strip_prefixes(state_dict), model.state_dict()
    problems = {
        "missing": [k for k in own if k not in state_dict],
        "unexpected": [k for k in state_dict if k not in own],
        "of another shape": [
            f"{k} {tuple(v.shape)} instead of {tuple(own[k].shape)}"
            for k, v in state_dict.items()
            if k in own and v.shape != own[k].shape
        ],
    }
    if any(problems.values()):
        text = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            for what, names in problems.items()
            if names
        )
        raise ValueError(f"{source} does not fit the model: {text}")
    model.load_state_dict(state_dict)
