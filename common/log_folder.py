"""The log folder of a run: who may write there, where a command begins, checkpoints, and the traceback of an error.

It belongs to one run, and to one command at a time. What a run has trained is never trained again over it: a command
that would begin before the newest checkpoint leaves everything there as it is and says how to go on. A copy of a
checkpoint under another name is the user's, and is neither read nor removed.
"""

import contextlib
import os
import tempfile
import time
import traceback
from pathlib import Path

import torch

from common import checkpoints, devices, locks, processes, records, runfiles
from common.flags import RUN_FLAGS, compared
from common.processes import say

_claimed: list[Path] = []  # the log folder of this process's run, for the traceback of an error


class Finished(Exception):
    """The run that a command names was trained to its end before; the text says where it is and how to train again."""


def open_log(run, data_name: str) -> None:
    """Name the run's folders after its data: <logs>/<project>/<data>/<row>/seed<k>, and the same for its result.

    A log folder that is there is claimed; a new one waits until all inputs have been read: wrong ones leave none.
    """
    where = Path(run.project) / data_name / run.row
    run.args["data_name"] = data_name
    run.log_dir, run.results_dir = run.log_dir / where / f"seed{run.seed}", run.results_dir / where
    if run.log_dir.is_dir():
        claim(run)
    processes.barrier(run)
    say(
        run,
        f"{run.project} {run.row} on {data_name}, seed {run.seed}: {run.world_size} process(es) on "
        f"{devices.described(run.device)}; "
        f"log in {run.log_dir}",
    )


def claim(run) -> None:
    """Make the log folder and keep other commands out of it, on rank 0, until `record` or the end of the process.

    Raises: locks.Held if another command is at work there.
    """
    if run.main:
        run.log_dir.mkdir(parents=True, exist_ok=True)
        try:
            alone = run.held.enter_context(locks.hold(run.log_dir / ".lock", wait=False))
        except locks.Held as error:
            raise locks.Held(
                f"another command is training this run ({error}); wait for it, or give another --logs-dir or --seed"
            ) from error
        if alone:
            runfiles.remove_temporary(run.log_dir)
    _claimed[:] = [run.log_dir]


def keep_traceback() -> str:
    """Write the traceback to the run's log folder or, while it has none, to a temporary file; says where."""
    text, rank = traceback.format_exc().encode(errors="backslashreplace"), os.environ.get("RANK", 0)
    for folder in _claimed:
        with contextlib.suppress(OSError):
            (folder / f"error-rank{rank}.txt").write_bytes(text)
            return f" (details: {folder / f'error-rank{rank}.txt'})"
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(prefix="reid-", suffix=".txt", delete=False) as note:
        note.write(text)
        return f" (details: {note.name})"
    return ""


def forget() -> None:
    """A new run begins in this process: no log folder is claimed yet."""
    _claimed.clear()


def resume(run, model, optimizer, scheduler, grad_scaler=None, epochs: int | None = None) -> int:
    """The epoch to start from: 0, or what the checkpoint named by --resume says; mutates all arguments accordingly.

    epochs: of the whole training, where --epochs is only a part of it. A fresh run saves its epoch 0 at once, so that a
    full disk shows before hours of training.
    Raises: ValueError for an unreadable checkpoint, other method flags or images, or a log folder that holds more than
        this command would start from; Finished if it holds the whole training and its result.
    """
    newest, wanted = runfiles.newest(run.log_dir), run.args["resume"]
    path = newest if wanted == "auto" else Path(wanted) if wanted else None
    state = checkpoints.read(path) if path is not None else None
    if state is not None:
        _same_run(run, state, path)
    if newest is not None and runfiles.epoch_of(newest) > (state["epoch"] if state else 0):
        _leave_alone(run, newest, path, epochs or run.args["epochs"])
    processes.barrier(run)  # nobody still looks at the old files
    claim(run)
    if state is None:
        if wanted:
            say(run, f"--resume: there is no checkpoint in {run.log_dir}; training starts with epoch 1")
        save(run, 0, model, optimizer, scheduler, grad_scaler)
    else:
        checkpoints.fit(bare(model), state["state_dict"], path)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if grad_scaler is not None and state["scaler"]:
            grad_scaler.load_state_dict(state["scaler"])
        run.extra, run.spent = state["extra"], state["wall_s"]
        _tell_changes(run, state["args"])
        say(run, f"continuing after epoch {state['epoch']} from {path}")
    first = state["epoch"] if state else 0
    if run.main:
        records.trim_log(run.log_dir / "log.jsonl", first)
    return first


def _leave_alone(run, newest: Path, path: Path | None, epochs: int) -> None:
    """Raises Finished or ValueError, since `newest` is further than where the command starts: 0, or the file `path`."""
    try:
        state = checkpoints.read(newest)
    except ValueError:
        if path is None:
            raise
        return  # a damaged one is the reason to go back to the one before
    _same_run(run, state, newest)
    result, again = run.results_dir / f"seed{run.seed}.json", "another --seed, or another --logs-dir and --results-dir"
    if state["epoch"] >= epochs and result.is_file():
        raise Finished(
            f"{run.log_dir} holds this run, finished after epoch {state['epoch']}; its result is {result}. "
            f"Nothing was done; to train it again give {again}"
        )
    if state["epoch"] >= epochs:
        raise ValueError(
            f"{newest} belongs to a finished run without a result {result}; add --resume to evaluate it "
            f"and write that, or give {again} to train it again"
        )
    if path is None:
        raise ValueError(
            f"{newest} belongs to an unfinished run; add --resume to continue it, or delete {run.log_dir}, "
            "or choose another --logs-dir"
        )
    raise ValueError(
        f"{newest} is further than {path}: give --resume without a file to continue it, or another --logs-dir"
    )


def _same_run(run, state: dict, path: Path) -> None:
    """Raises ValueError if the training of a checkpoint and this one differ in their flags or their images."""
    _same_method(run, state["args"], path)
    stored = state.get("data", {})  # older checkpoints do not say
    for name in sorted(run.data.keys() & stored.keys()):
        before, now = stored[name], run.data[name]
        if changed := [
            f"{key.replace('_', ' ')} {before.get(key)} -> {now.get(key)}"
            for key in before | now
            if now.get(key) != before.get(key)
        ]:
            raise ValueError(
                f"{path} was trained on other images of {name} ({', '.join(changed)}); give the --data-dir that holds "
                f"those (it was {state['args']['data_dir']}), or another --logs-dir and --results-dir for a new run"
            )


def _same_method(run, stored: dict, path: Path) -> None:
    """Raises ValueError with the flags in which a checkpoint's training and this one differ."""
    before, now = compared(stored, run.args)
    wrong = [
        f"--{k.replace('_', '-')} {before.get(k)} -> {now.get(k)}"
        for k in sorted((now.keys() | before.keys()) - RUN_FLAGS)
        if now.get(k) != before.get(k)
    ]
    if wrong:
        raise ValueError(
            f"{path} was written with other flags: {', '.join(wrong)}; use the same flags, or another --logs-dir for a "
            "new run"
        )


def _tell_changes(run, stored: dict) -> None:
    for key in sorted(RUN_FLAGS - {"resume", "row"}):
        if run.args.get(key) != stored.get(key):
            say(run, f"note: --{key.replace('_', '-')} was {stored.get(key)} and is {run.args.get(key)} now")


def save(run, epoch: int, model, optimizer, scheduler, grad_scaler=None, stats: dict | None = None) -> None:
    """Write the state after `epoch` epochs, on rank 0: the log line, then the checkpoint, whole or not at all."""
    if not run.main:
        return
    if stats is not None:
        records.append_log(run.log_dir / "log.jsonl", {"epoch": epoch, **stats})
    state = {
        "schema": checkpoints.SCHEMA,
        "state_dict": bare(model).state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": grad_scaler.state_dict() if grad_scaler is not None else {},
        "epoch": epoch,
        "args": run.args,
        "extra": run.extra,
        "data": run.data,
        "wall_s": run.spent + time.time() - run.started,
    }
    checkpoints.write(run.log_dir, epoch, state)


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside DistributedDataParallel and torch.compile."""
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return model
