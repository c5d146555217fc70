"""Checkpoint files: written whole or not at all, read without running code, two kept.

A file holds {schema, state_dict, optimizer, scheduler, scaler, epoch, args, extra, wall_s}, and `data`, what names the
images of the training, which older ones lack: tensors and plain Python values only.
"""

import re
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

from common import runfiles
from common.runfiles import OWN, epoch_of, listed, replace

SCHEMA = 1
KEYS = {"schema", "state_dict", "optimizer", "scheduler", "scaler", "epoch", "args", "extra", "wall_s"}
PREFIXES = ("module.", "_orig_mod.")


def write(folder: Path, epoch: int, state: dict, keep: int = 2) -> Path:
    """Write folder/checkpoint_<epoch>.pt in one atomic step; of ours up to this epoch, the `keep` newest stay.

    Raises: OSError naming the path and the bytes needed when it cannot be written; older files stay as they were.
    """
    path = folder / runfiles.name_of(epoch)
    replace(path, lambda file: torch.save(state, file))
    for old in [p for p in listed(folder) if epoch_of(p) <= epoch][:-keep]:
        old.unlink()
    return path


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


def read_newest(path: Path | str) -> tuple[Path, dict]:
    """The checkpoint file that a user names, or the newest of a log folder, and its content. Raises: as `read`."""
    file = runfiles.checkpoint(path)
    return file, read(file)


def load(path: Path | str, name: str = "", remedy: str = ""):
    """The content of any PyTorch file, on the CPU; no code in it can run. `name` says in errors what it was to be.

    Raises: FileNotFoundError with the remedy; ValueError for what is no such file, or needs code to be read.
    """
    what = f"{name}: " if name else ""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what}no file {path}" + f"; {remedy}" * bool(remedy))
    scalar, kinds = np.float64(0).__reduce__()[0], {type(np.dtype(kind)) for kind in "fdilq?"}
    plain = [Namespace, np.dtype, *kinds, *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(plain):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)  # plain: what scores and flags are made of
    except Exception as error:  # of a damaged file torch.load raises IndexError, struct.error and a dozen others
        told = f"{what}{path} is not a readable checkpoint ({reason(error)})" + f"; {remedy}" * bool(remedy)
        raise ValueError(told) from error


def reason(error: Exception) -> str:
    """Why torch could not load a file, in one line."""
    if code := re.search(r"GLOBAL (\S+)", str(error)):
        return f"reading it would run {code[1]}; let its program save the state_dict alone"
    if isinstance(error, (OSError, RuntimeError)):
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "cut, or not written by torch.save"


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
