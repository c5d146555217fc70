"""Runs: torchrun set-up, flags and rows, seeding, checkpoints, the log and the result file.

A script calls `flags.parse`, `start`, `log_folder.open_log` and `resume`, and per epoch `seed_epoch`, `step` and
`log_folder.save`; at the end `record`.
Everything works the same with one process and under torchrun. Nothing here calls a collective operation inside a branch
that only some ranks take.
"""

import contextlib
import datetime
import os
import random
import shlex
import signal
import sys
import time
import warnings
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

from common import commandline, devices, log_folder, records
from common.evaluation import AMP_DTYPES
from common.flags import PLACES, ROOT
from common.log_folder import Finished


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
    data: dict[str, dict] = field(default_factory=dict)  # of each data set that was read: inputs.identity
    own_data: list[str] = field(default_factory=list)  # those of them whose counts are not the published ones
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)  # the log folder's lock
    skipped: torch.Tensor | None = None  # under fp16: steps left out, (2,) in this epoch and in a row until now
    statistics: tuple = ((), ())  # under fp16: running statistics, and copies of them after the last finite loss

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
    _asked_to_stop.clear()
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, _stop)
    log_folder.forget()
    rank, world_size, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = devices.choose(local, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if device.type == "cpu" and getattr(args, "amp", "off") == "fp16":
        raise ValueError("--amp fp16 needs a GPU, this runs on the CPU; use --amp bf16 or --amp off")
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
        _join(device, datetime.timedelta(hours=1))
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


_asked_to_stop: list[int] = []  # numbers of the signals that came


def _stop(number: int, _) -> None:
    """The handler: end this process, at once or, where Python swallows what is raised (in a finalizer, which often runs
    right after a backward pass), before the next step.
    """
    _asked_to_stop.append(number)
    _stop_if_asked()


def _stop_if_asked() -> None:
    if signal.SIGTERM in _asked_to_stop:
        sys.exit(143)
    if _asked_to_stop:
        raise KeyboardInterrupt


def _join(device: torch.device, timeout: datetime.timedelta) -> None:
    """Default process group under torchrun. Keys carry the number of restarts, as the addresses of an earlier life of
    the job may still lie in the launcher's store and would be connected to.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    options = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
    dist.init_process_group(**options, store=store, rank=rank, world_size=world_size, timeout=timeout)


def execute(main, args: Namespace) -> None:
    """Call main(args); a known error ends the process with one sentence and status 1, its traceback goes to a file.

    A run that is finished already is said in one line, with status 0: what the command asks for is there.
    Under torchrun the process ends here.
    """
    commandline.console()
    warnings.formatwarning = _one_line
    try:
        main(args)
    except Finished as done:
        if os.environ.get("RANK", "0") == "0":
            print(done, flush=True)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        known = error if isinstance(error, ValueError | OSError) else devices.out_of_memory(error, args)
        if known is None:
            raise
        print(f"error: {known}{log_folder.keep_traceback()}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # do not wait for other ranks: torchrun ends them
    if dist.is_available() and dist.is_initialized():
        leave()


def leave() -> NoReturn:
    """End of a process that has a process group: status 0, and no shutdown of the interpreter.

    gloo's threads outlive destroy_process_group where DistributedDataParallel was used. One that still drops the
    tensors of its last collective while the interpreter shuts down aborts the process, and torchrun would report a
    failure of a run whose results are all written.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _one_line(message, category, filename, lineno, line=None) -> str:
    """What a user should know, without the line of code that says it; where it stands for warnings of libraries."""
    where = "warning" if category is UserWarning else f"{filename}:{lineno}: {category.__name__}"
    return f"{where}: {message}\n"


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

TRIES = 100  # steps in a row that fp16 may leave out before the run ends


def begin_epoch(run: Run) -> None:
    """Count the steps that fp16 leaves out from 0, and keep the running statistics as they are now."""
    if run.skipped is not None:
        run.skipped[0].zero_()
    running, kept = run.statistics
    if running:
        torch._foreach_copy_(kept, running)


def scaler(run: Run) -> torch.amp.GradScaler:
    """A gradient scaler that is active only for fp16 on a GPU."""
    return torch.amp.GradScaler(run.device.type, enabled=run.args["amp"] == "fp16" and run.device.type == "cuda")


def step(run: Run, loss: torch.Tensor, optimizers: list, grad_scaler: torch.amp.GradScaler, where: str) -> bool:
    """One backward pass and one step of each optimiser; returns whether the loss was finite, on every rank the same.

    The finiteness of the loss is agreed over all ranks and read on the host after the backward pass has been queued and
    before the step, so that a GPU never runs dry for it. Under fp16 a step whose loss or gradients overflow changes
    no weight, lowers the scale and is counted (run.skipped); a loop moves memories and queues by its batch only where
    the loss was finite. Hooks of an optimiser see gradients without the scale.
    Raises: SystemExit or KeyboardInterrupt after a signal that asked for it; ValueError on every rank, with `where` and
        the learning rate: without fp16 for a loss that is not finite, before any parameter changes; under fp16 after
        TRIES steps in a row that were left out.
    """
    _stop_if_asked()
    state = torch.isfinite(loss.detach()).to(torch.float32).reshape(1)
    if grad_scaler.is_enabled():
        run.skipped = torch.zeros(2, device=loss.device) if run.skipped is None else run.skipped
        state = torch.cat([state, -run.skipped[1:]])
    if run.world_size > 1:
        dist.all_reduce(state, dist.ReduceOp.MIN)
    if grad_scaler.is_enabled():
        loss = loss * (state[0] / state[0])  # NaN, so that every gradient says so, where it is not finite on any rank
    host, done = state, None
    if run.device.type == "cuda":
        host = torch.empty(len(state), pin_memory=True)
        host.copy_(state, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    grad_scaler.scale(loss).backward()
    if done is not None:
        done.synchronize()
    finite, *in_a_row = host.tolist()
    _check(finite, in_a_row, f"at {where}, lr {optimizers[0].param_groups[0]['lr']:g}")
    for optimizer in optimizers:
        grad_scaler.unscale_(optimizer)
    if grad_scaler.is_enabled():
        _count_skipped(run, grad_scaler, optimizers, finite)
    for optimizer in optimizers:
        grad_scaler.step(optimizer)
    grad_scaler.update()
    return finite > 0


def _check(finite: float, in_a_row: list[float], where: str) -> None:
    """Raises ValueError as `step` says; in_a_row: minus the steps left out until now, under fp16."""
    if not in_a_row and not finite:
        raise ValueError(
            f"the loss is not finite {where}, on at least one process; no weight was changed; lower --lr or use "
            "--amp off"
        )
    if in_a_row and in_a_row[0] <= -TRIES:
        raise ValueError(
            f"none of the last {TRIES} steps succeeded in fp16 {where}: losses or gradients overflow at every scale; "
            "use --amp bf16 or off, or lower --lr"
        )


def _count_skipped(run: Run, grad_scaler: torch.amp.GradScaler, optimizers: list, finite: float) -> None:
    """Count on the device whether the scaler leaves this step out; a batch whose loss was not finite leaves no trace in
    the running statistics.
    """
    found = [flag for one in optimizers for flag in grad_scaler._found_inf_per_device(one).values()]
    for optimizer in optimizers:
        _start_momentum(optimizer)
    skips = torch.stack(found).amax().clamp(max=1)  # those flags are what grad_scaler.step goes by
    run.skipped = torch.stack([run.skipped[0] + skips, (run.skipped[1] + 1) * skips])
    running, kept = run.statistics
    if running:
        torch._foreach_copy_(kept, running) if finite else torch._foreach_copy_(running, kept)


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Momentum of SGD from 0 where there is none yet: its fused kernel, left out at the first step, would go on from
    memory that nobody has set. The first step that counts is the same.
    """
    for group in optimizer.param_groups:
        for p in group["params"] if group.get("momentum") else ():
            if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


# ------------------------------------------------------------------------------------------------------- result file


def record(
    run: Run, metrics: dict, data: dict, protocol: dict, epoch: int | None = None, selection: str = "last"
) -> Path:
    """Write the result file of a finished run (fields: results/README.md) and its log on rank 0; returns the path.

    The log folder is then free for other commands.

    Args: metrics flat name -> number, retrieval metrics as fractions; data {name, kind, images, ids, cams, digest} and
        of rendered people {rendered}, of real data {published}, which is False too where another data set that the run
        read, such as a source, is one of the user's own.
    """
    path = run.results_dir / f"seed{run.seed}.json"
    if not run.main:
        return path
    gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else None
    peak = torch.cuda.max_memory_allocated(run.device) / 2**20 if gpu else records.peak_mib()
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
        "data": {**data, "published": False} if run.own_data and data["kind"] == "real" else data,
        "env": {
            **records.environment(torch.version.cuda if gpu else None, torch.get_num_threads()),
            "gpu": gpu,
            "world_size": run.world_size,
            "amp": run.args.get("amp", "off"),
            "batch_per_gpu": run.args.get("batch_size", 0) // run.world_size or None,
        },
        "wall_s": round(run.spent + time.time() - run.started, 1),
        "peak_mib": peak and round(peak, 1),
    }
    records.write_result(path, result, run.log_dir / "log.jsonl")
    run.held.close()
    return path


def _command(run: Run) -> str:
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    launcher = f"torchrun --nproc_per_node={run.world_size}" if run.world_size > 1 else "python"
    flag = "--results-dir"  # where a run was recorded is no part of repeating it
    kept = [word for before, word in zip(sys.argv, sys.argv[1:]) if flag not in (before, word.partition("=")[0])]
    return shlex.join([*launcher.split(), name, *kept])
