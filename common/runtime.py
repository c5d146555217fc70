"""Runs: torchrun set-up, flags and rows, seeding, checkpoints, the log and the result file.

A script calls `parse`, `start`, `open_log`, `resume`, and per epoch `seed_epoch`, `step`, `save`; at the end `record`.
Everything works the same with one process and under torchrun. Nothing here calls a collective operation inside a branch
that only some ranks take.
"""

import contextlib
import datetime
import os
import random
import resource
import shlex
import signal
import sys
import time
import traceback
import warnings
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import checkpoints, processes, records
from common.flags import (  # noqa: F401 some are re-exported
    AMP_DTYPES,
    PLACES,
    ROOT,
    RUN_FLAGS,
    add_run_flags,
    add_test_flags,
    method_flags,
    parse,
    variants,
)


@dataclass
class Run:
    """A script's own execution: `args` holds plain values, `extra` what `save` keeps beside the model."""

    project: str
    row: str
    args: dict
    device: torch.device
    rank: int
    world_size: int
    log_dir: Path  # final after open_log
    results_dir: Path
    started: float
    spent: float = 0.0  # seconds of earlier lives of this run, from the checkpoint
    extra: dict = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return self.args["seed"]

    @property
    def main(self) -> bool:
        return self.rank == 0

    def autocast(self):
        dtype = AMP_DTYPES[self.args["amp"]]
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


# ----------------------------------------------------------------------------------------------------------- start, end


def start(args: Namespace, project: str) -> Run:
    """Set up device, process group and seeds, with and without torchrun; `open_log` follows once the data are known.

    Mutates global state once: torch seeds and backend flags, signal handlers, the default process group.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rank, world_size, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision(
            "high"
        )  # TF32 in the network; kernels of common switch it off for themselves
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not args.deterministic
    if "RANK" in os.environ and not dist.is_initialized():
        _join("nccl" if device.type == "cuda" else "gloo", datetime.timedelta(hours=1))
    run = Run(
        project,
        args.row,
        _plain(args),
        device,
        rank,
        world_size,
        Path(args.logs_dir),
        Path(args.results_dir),
        time.time(),
    )
    _seed(args.seed)  # the same on all ranks: they build equal models
    return run


def _join(backend: str, timeout: datetime.timedelta) -> None:
    """Default process group under torchrun. Keys carry the number of restarts, as the addresses of an earlier life of
    the job may still lie in the launcher's store and would be connected to.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def open_log(run: Run, data_name: str) -> None:
    """Name the run's folders after its data: <logs>/<project>/<data>/<row>/seed<k>, and the same for its result."""
    where = Path(run.project) / data_name / run.row
    run.args["data_name"] = data_name
    run.log_dir, run.results_dir = run.log_dir / where / f"seed{run.seed}", run.results_dir / where
    if run.main:
        run.log_dir.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_temporary(run.log_dir)
    processes.barrier(run)
    say(
        run,
        f"{run.project} {run.row} on {data_name}, seed {run.seed}: {run.world_size} process(es) on {run.device.type}; "
        f"log in {run.log_dir}",
    )


def execute(main, args: Namespace) -> None:
    """Call main(args); a known error ends the process with one sentence and status 1, its traceback goes to a file."""
    warnings.formatwarning = _one_line
    try:
        main(args)
    except (ValueError, FileNotFoundError, OSError) as error:
        note = Path(args.logs_dir) / f"error-rank{os.environ.get('RANK', 0)}.txt"
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(traceback.format_exc())
        print(f"error: {error} (details: {note})", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # do not wait for other ranks: torchrun ends them
    if dist.is_initialized():
        dist.destroy_process_group()


def _one_line(message, category, filename, lineno, line=None) -> str:
    """What a user should know, without the line of code that says it; where it stands for warnings of libraries."""
    where = "warning" if category is UserWarning else f"{filename}:{lineno}: {category.__name__}"
    return f"{where}: {message}\n"


def say(run: Run, text: str) -> None:
    """Print on rank 0."""
    if run.main:
        print(text, flush=True)


def _plain(args: Namespace) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


# ------------------------------------------------------------------------------------------------------------- seeding


def _seed(*numbers: int) -> None:
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seed_epoch(run: Run, epoch: int) -> None:
    """Make all global randomness of this epoch a function of (seed, epoch, rank)."""
    _seed(run.seed, epoch + 1, run.rank)


def generator(run: Run, epoch: int, stream: int = 0) -> torch.Generator:
    """A generator on the run's device, a function of (seed, epoch, rank, stream): one stream per independent use."""
    state = np.random.SeedSequence((run.seed, epoch + 1, run.rank, stream + 1)).generate_state(1, np.uint64)[0]
    return torch.Generator(run.device).manual_seed(int(state >> np.uint64(1)))


# ------------------------------------------------------------------------------------------------------- optimiser step


def scaler(run: Run) -> torch.amp.GradScaler:
    """A gradient scaler that is active only for fp16 on a GPU."""
    return torch.amp.GradScaler(run.device.type, enabled=run.args["amp"] == "fp16" and run.device.type == "cuda")


def step(run: Run, loss: torch.Tensor, optimizers: list, grad_scaler: torch.amp.GradScaler, where: str) -> None:
    """One backward pass and one step of each optimiser.

    The finiteness of the loss is agreed over all ranks and read on the host after the backward pass has been queued and
    before the step, so that a GPU never runs dry for it.
    Raises: ValueError on every rank, with `where` and the learning rate, before any parameter changes.
    """
    finite = torch.isfinite(loss.detach()).to(torch.float32).reshape(1)
    if run.world_size > 1:
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    done = None
    if run.device.type == "cuda":
        host = torch.empty(1, pin_memory=True)
        host.copy_(finite, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        finite = host
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    grad_scaler.scale(loss).backward()
    if done is not None:
        done.synchronize()
    if finite.item() == 0:
        rate = optimizers[0].param_groups[0]["lr"]
        raise ValueError(
            f"the loss is not finite at {where}, lr {rate:g}, on at least one process; no weight was changed; "
            "lower --lr or use --amp off"
        )
    for optimizer in optimizers:
        grad_scaler.step(optimizer)
    grad_scaler.update()


# ----------------------------------------------------------------------------------------------------- checkpoints, log


def resume(run: Run, model, optimizer, scheduler, grad_scaler=None) -> int:
    """The epoch to start from: 0, or what the checkpoint named by --resume says; mutates all arguments accordingly.

    A fresh run saves its epoch 0 at once, so that a full disk shows before hours of training.
    Raises: ValueError for an unreadable checkpoint, other method flags, or without --resume an unfinished run in the
        log folder.
    """
    newest = checkpoints.newest(run.log_dir)
    path = newest if run.args["resume"] == "auto" else Path(run.args["resume"]) if run.args["resume"] else None
    if path is None:
        if newest is not None and 0 < checkpoints.epoch_of(newest) < run.args["epochs"]:
            raise ValueError(
                f"{newest} belongs to an unfinished run; add --resume to continue it, or delete {run.log_dir}, "
                "or choose another --logs-dir"
            )
        processes.barrier(run)  # nobody still looks at the old files
        if run.main:
            checkpoints.clear(run.log_dir)
            (run.log_dir / "log.jsonl").unlink(missing_ok=True)
        save(run, 0, model, optimizer, scheduler, grad_scaler)
        return 0
    state = checkpoints.read(path)
    _same_method(run, state["args"], path)
    checkpoints.fit(bare(model), state["state_dict"], path)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    if grad_scaler is not None and state["scaler"]:
        grad_scaler.load_state_dict(state["scaler"])
    run.extra, run.spent = state["extra"], state["wall_s"]
    if run.main:
        records.trim_log(run.log_dir / "log.jsonl", state["epoch"])
    say(run, f"continuing after epoch {state['epoch']} from {path}")
    return state["epoch"]


def _same_method(run: Run, stored: dict, path: Path) -> None:
    now, before = ({k: v for k, v in a.items() if k not in RUN_FLAGS} for a in (run.args, stored))
    wrong = [
        f"--{k.replace('_', '-')} {before.get(k)} -> {now.get(k)}"
        for k in sorted(now.keys() | before.keys())
        if now.get(k) != before.get(k)
    ]
    if wrong:
        raise ValueError(
            f"{path} was written with other flags: {', '.join(wrong)}; use the same flags, or another --logs-dir for a "
            "new run"
        )
    for key in sorted(RUN_FLAGS - {"resume", "row"}):
        if run.args.get(key) != stored.get(key):
            say(run, f"note: --{key.replace('_', '-')} was {stored.get(key)} and is {run.args.get(key)} now")


def save(run: Run, epoch: int, model, optimizer, scheduler, grad_scaler=None, stats: dict | None = None) -> None:
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
        "wall_s": run.spent + time.time() - run.started,
    }
    checkpoints.write(run.log_dir, epoch, state)


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside DistributedDataParallel and torch.compile."""
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return model


def record(
    run: Run, metrics: dict, data: dict, protocol: dict, epoch: int | None = None, selection: str = "last"
) -> Path:
    """Write the result file of a finished run (fields: results/README.md) and its log on rank 0; returns the path.

    Args: metrics flat name -> number, retrieval metrics as fractions; data {name, kind, images, ids, cams, digest}.
    """
    path = run.results_dir / f"seed{run.seed}.json"
    if not run.main:
        return path
    gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else None
    peak = (
        torch.cuda.max_memory_allocated(run.device) / 2**20
        if gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    result = {
        "schema": records.SCHEMA,
        "project": run.project,
        "row": run.row,
        "seed": run.seed,
        "command": _command(run),
        "args": {k: v for k, v in run.args.items() if k not in PLACES},
        "git": records.git_state(ROOT),
        "metrics": {k: float(v) for k, v in metrics.items()},
        "epoch": epoch,
        "selection": selection,
        "protocol": {"dataset": data["name"], **protocol},
        "data": data,
        "env": {
            **records.environment(),
            "gpu": gpu,
            "world_size": run.world_size,
            "amp": run.args.get("amp", "off"),
            "batch_per_gpu": run.args.get("batch_size", 0) // run.world_size or None,
        },
        "wall_s": round(run.spent + time.time() - run.started, 1),
        "peak_mib": round(peak, 1),
    }
    records.write_result(path, result, run.log_dir / "log.jsonl")
    return path


def _command(run: Run) -> str:
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    launcher = f"torchrun --nproc_per_node={run.world_size}" if run.world_size > 1 else "python"
    return shlex.join([*launcher.split(), name, *sys.argv[1:]])
