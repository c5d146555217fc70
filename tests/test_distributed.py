"""Several gloo processes on the CPU: equal memories, equal metrics, and what one rank's failure does to the others."""

import json
import textwrap

import pytest
import torch
from conftest import PYTHON, ROOT, TINY, TORCHRUN, script
from ranks import on_ranks

from common import processes

HEADER = f"""
import sys
from argparse import ArgumentParser, Namespace
sys.path.insert(0, {str(ROOT)!r})
import torch
from common import processes, runtime, flags
parser = ArgumentParser()
flags.add_run_flags(parser)
args = parser.parse_args([])
args.row, args.epochs = "row", 1
"""


def program(tmp_path, body):
    path = tmp_path / "program.py"
    path.write_text(HEADER + textwrap.dedent(body))
    return path


def test_nan_on_one_rank_stops_all_before_any_weight_changes(tmp_path):
    path = program(
        tmp_path,
        f"""
        args.logs_dir = {str(tmp_path / "logs")!r}
        def main(args):
            run = runtime.start(args, "p")
            model = torch.nn.Linear(2, 1)
            optimizer = torch.optim.Adam(model.parameters(), lr=0.25)
            before = model.weight.clone()
            loss = model(torch.ones(1, 2)).sum() * (float("nan") if run.rank == 1 else 1.0)
            try:
                runtime.step(run, loss, [optimizer], runtime.scaler(run), "epoch 3, step 7")
            except ValueError:
                print(f"rank {{run.rank}} unchanged {{torch.equal(before, model.weight)}}", flush=True)
                raise
        runtime.execute(main, args)
        """,
    )
    done = script(path, launcher=TORCHRUN)
    assert done.returncode != 0
    assert "epoch 3, step 7, lr 0.25" in done.stderr
    assert all(f"rank {rank} unchanged True" in done.stdout for rank in (0, 1))  # lines of two processes may join


def test_a_finished_rank_ends_without_a_shutdown_of_the_interpreter(tmp_path):
    """There gloo's threads may abort it, and torchrun would call a finished run failed."""
    path = program(
        tmp_path,
        f"""
        import atexit, os
        args.logs_dir = {str(tmp_path / "logs")!r}
        atexit.register(os._exit, 9)
        def main(args):
            run = runtime.start(args, "p")
            torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))(torch.ones(1, 2)).sum().backward()
            print(f"rank {{run.rank}} is done")  # not flushed
        runtime.execute(main, args)
        """,
    )
    done = script(path, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert all(f"rank {rank} is done" in done.stdout for rank in (0, 1))


def test_failure_on_one_rank_ends_the_job(tmp_path):
    path = program(
        tmp_path,
        f"""
        args.logs_dir = {str(tmp_path / "logs")!r}
        def main(args):
            run = runtime.start(args, "p")
            if run.rank == 1:
                raise ValueError("rank one gives up")
            processes.gather(run, torch.ones(1))
        runtime.execute(main, args)
        """,
    )
    done = script(path, launcher=TORCHRUN, timeout=60)
    assert done.returncode != 0 and "error: rank one gives up" in done.stderr


def test_one_and_two_processes_train_and_evaluate(market_dir, tmp_path):
    metrics = []
    for name, launcher in (("one", PYTHON), ("two", TORCHRUN)):
        out = tmp_path / name
        done = script(
            ROOT / "aff_scl/train.py", "--data-dir", market_dir, *TINY, "--epochs", 1, "--logs-dir", out / "logs",
            "--results-dir", out / "results", launcher=launcher
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        metrics.append(json.loads(next((out / "results").rglob("seed0.json")).read_text())["metrics"])
    for key in (
        "before.mAP",
        "before.rank1",
        "before.rank10",
        "before.mINP",
    ):  # the same weights: the same numbers, whoever extracts what
        assert metrics[0][key] == metrics[1][key]


@pytest.mark.slow
def test_restarted_job_ends_where_the_quiet_one_does(market_dir, tmp_path):
    """torchrun --max-restarts: rank 1 dies once after epoch 1; the second life resumes and ends with equal numbers."""
    crash = tmp_path / "crash.py"
    crash.write_text(
        textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {str(ROOT)!r})
        from aff_scl import train
        from common import runtime
        args = train.parse_args()
        original = runtime.seed_epoch
        def fragile(run, epoch):
            first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
            if os.environ.get("CRASH") and first_life and epoch == 1 and run.rank == 1:
                os._exit(3)
            original(run, epoch)
        runtime.seed_epoch = fragile
        runtime.execute(train.main, args)
        """)
    )
    metrics = []
    for name, crashes in (("quiet", ""), ("crashed", "1")):
        out = tmp_path / name
        launcher = [*TORCHRUN, "--max-restarts=1"]
        done = script(
            crash, "--data-dir", market_dir, *TINY, "--epochs", 2, "--logs-dir", out / "logs", "--results-dir",
            out / "results", "--resume", launcher=launcher, CRASH=crashes
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        metrics.append(json.loads(next((out / "results").rglob("seed0.json")).read_text())["metrics"])
    assert metrics[0] == metrics[1]


def gradients_of_a_sum_of_gathered_rows():
    torch.distributed.init_process_group("gloo")
    a, b = (torch.ones(2, 3, requires_grad=True) for _ in range(2))
    (2 * (processes.gather_rows(a) + processes.gather_rows(b))).sum().backward()
    return a.grad, b.grad


def test_gathered_rows_share_their_gradient_with_others_unharmed():
    """Autograd hands both the same tensor: summed over the ranks in its place, it would count twice."""
    for a, b in on_ranks(2, gradients_of_a_sum_of_gathered_rows):
        assert torch.equal(a, torch.full((2, 3), 4.0)) and torch.equal(b, a)
