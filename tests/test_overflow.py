"""Steps that fp16 leaves out, on the CPU with its gradient scaler: nothing of them stays, they are counted, and a run
ends only when a hundred in a row did not succeed.
"""

import copy
import json
import os
from pathlib import Path

import dapg_runs
import pytest
import torch
from conftest import TINY, write_market_and_duke
from ranks import on_ranks

import aff_scl.losses
import aff_scl.train
import dapg.model
from common import log_folder, processes, runtime
from common.epoch import Epoch
from dapg.pretrain import baselines

GOOD, GRADIENT, LOSS = 1.0, 1e35, float("inf")  # factors of a loss: fine, its scaled gradient overflows, it overflows


def a_run(rank=0, world_size=1):
    args = {"amp": "fp16", "compile": False, "seed": 0}
    return runtime.Run("p", "r", args, torch.device("cpu"), rank, world_size, Path("."), Path("."), 0.0)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, **options)


def trained(factors, optimizer_of=sgd, run=None, scale=2.0**16):
    """(model, epoch, what each step returned, state_dict after each) of steps whose losses have these factors."""
    run, states, returned = run or a_run(), [], []
    model = processes.parallel(run, network())
    optimizer, scaler = optimizer_of(model), torch.amp.GradScaler("cpu", init_scale=scale)
    draw = torch.Generator().manual_seed(1 + run.rank)
    epoch = Epoch(run, 0, factors, len(factors))
    for factor in epoch:
        x = torch.randn(8, 4, generator=draw) * (factor if factor == LOSS else 1.0)
        loss = model(x).square().mean() * factor
        returned.append(runtime.step(run, loss, [optimizer], scaler, epoch.where))
        epoch.add(8, loss=loss)
        states.append(copy.deepcopy(log_folder.bare(model).state_dict()))
    return model, epoch, returned, states


def moved(before, after) -> set[str]:
    return {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}


def test_a_step_that_overflows_changes_no_weight_and_a_lost_batch_leaves_no_statistics(capsys):
    model, epoch, returned, states = trained([GOOD, GRADIENT, LOSS, GOOD])
    assert returned == [True, True, False, True]
    assert moved(states[0], states[1]) == {"running_mean", "running_var", "num_batches_tracked"}
    assert moved(states[1], states[2]) == {"num_batches_tracked"}
    assert moved(states[2], states[3]) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    means = epoch.means(model)
    assert means["skipped"] == 2 and 0 < means["loss"] < float("inf")
    assert ", 2 steps skipped (fp16); " in capsys.readouterr().out


def test_a_loss_that_overflows_beside_finite_gradients_changes_no_weight_either():
    model, x = network(), torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    before, scaler = copy.deepcopy(model.state_dict()), torch.amp.GradScaler("cpu")
    assert not runtime.step(a_run(), model(x).mean() + LOSS, [sgd(model)], scaler, "here")
    assert moved(before, model.state_dict()) <= {"running_mean", "running_var", "num_batches_tracked"}


def test_without_overflow_fp16_walks_as_a_loop_without_a_scaler():
    *_, states = trained([GOOD] * 4)
    model, draw = network(), torch.Generator().manual_seed(1)
    optimizer = sgd(model)
    for state in states:
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=draw)).square().mean().backward()
        optimizer.step()
        assert all(torch.allclose(value, state[name], atol=1e-6) for name, value in model.state_dict().items())


def test_the_mean_loss_is_over_the_steps_that_have_one(capsys):
    run, values = a_run(), [1.0, float("nan"), 4.0]
    epoch = Epoch(run, 0, values, 3)
    for value in epoch:
        run.skipped = torch.zeros(2)
        epoch.add(1, loss=torch.tensor(value), never=torch.tensor(float("inf")))
    assert epoch.means(network()) == {"loss": 2.5, "skipped": 0.0}
    assert "skipped" not in capsys.readouterr().out


def test_every_epoch_counts_from_nothing():
    run = a_run()
    first = trained([GOOD, LOSS, LOSS], run=run)
    assert first[1].means(first[0])["skipped"] == 2
    second = trained([LOSS, GOOD], run=run)
    assert second[1].means(second[0])["skipped"] == 1 and run.skipped.tolist() == [1, 0]


def test_a_hundred_in_a_row_end_the_run_and_ninety_nine_do_not():
    run = a_run()
    trained([LOSS] * 99 + [GOOD] + [LOSS] * 99 + [GOOD], run=run, scale=2.0**100)
    assert run.skipped.tolist()[1] == 0
    with pytest.raises(ValueError, match=r"none of the last 100 steps succeeded in fp16 at epoch 1, step 101, lr 0.01"):
        trained([LOSS] * 101)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_first_step_that_is_left_out_leaves_no_unset_momentum(kind):
    """Memory that nobody has set is NaN here; the fused kernels are those of a GPU."""
    options = {"lr": 0.01} | ({"momentum": 0.9, "nesterov": True} if kind is torch.optim.SGD else {})
    torch.use_deterministic_algorithms(True)
    try:
        found = [
            trained([LOSS, GOOD, GOOD], lambda model, fused=fused: kind(model.parameters(), **options, fused=fused))[3]
            for fused in (True, False)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.allclose(value, found[1][-1][name], atol=1e-6) for name, value in found[0][-1].items())


@pytest.mark.parametrize("fused", [True, False])
def test_hooks_of_an_optimiser_see_gradients_without_the_scale(fused):
    seen = []

    def watched(model):
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        parameters = list(model.parameters())
        optimizer.register_step_pre_hook(
            lambda *_: seen.append(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        )
        return optimizer

    trained([GOOD], watched)
    model = network()
    model(torch.randn(8, 4, generator=torch.Generator().manual_seed(1))).square().mean().backward()
    assert seen[0].item() == pytest.approx(
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item(), rel=1e-4
    )


def one_rank_overflows():
    run = a_run(int(os.environ["RANK"]), 2)
    torch.distributed.init_process_group("gloo")
    overflow = LOSS if run.rank == 1 else GOOD
    _, _, returned, states = trained([GOOD, overflow, GOOD], run=run)
    return {"returned": returned, "skipped": run.skipped, "weights": [state["0.weight"] for state in states]}


def test_an_overflow_on_one_process_leaves_the_step_out_on_all():
    first, second = on_ranks(2, one_rank_overflows)
    assert first["returned"] == second["returned"] == [True, False, True]
    assert first["skipped"].tolist() == second["skipped"].tolist() == [1, 0]
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"]))
    assert torch.equal(first["weights"][0], first["weights"][1])
    assert not torch.equal(first["weights"][1], first["weights"][2])


# ------------------------------------------------------------------- what a loop moves by a batch besides the weights
def spied(monkeypatch, owner, name, seen):
    """Calls of a method, and whether its first argument was finite, are added to `seen`."""
    own = getattr(owner, name)

    def spy(self, values, *rest):
        seen.append(bool(values.isfinite().all()))
        return own(self, values, *rest)

    monkeypatch.setattr(owner, name, spy)


def second_is_lost(monkeypatch, owner, name):
    """What the second call of a function returns is NaN; the run has a gradient scaler."""
    own, calls = getattr(owner, name), []

    def overflowing(*args):
        calls.append(1)
        found, factor = own(*args), float("nan") if len(calls) == 2 else 1.0
        if isinstance(found, tuple):  # loss, parts, keys
            return found[0] * factor, found[1], found[2] * factor
        return found * factor

    monkeypatch.setattr(owner, name, overflowing)
    monkeypatch.setattr(runtime, "scaler", lambda run: torch.amp.GradScaler("cpu", init_scale=16.0))


@pytest.mark.filterwarnings("ignore:market|duke")
@pytest.mark.parametrize("words, memories", [("", 1), ("--mode uda --source duke", 2)])
def test_a_lost_batch_does_not_move_the_memories_of_aff_scl(words, memories, monkeypatch, tmp_path):
    seen = []
    second_is_lost(monkeypatch, aff_scl.train, "forward")
    spied(monkeypatch, aff_scl.losses.Memory, "update", seen)
    data = write_market_and_duke(tmp_path / "data")
    places = ["--data-dir", data, "--logs-dir", tmp_path / "logs", "--results-dir", tmp_path / "results"]
    flags = [*TINY, *words.split(), "--iters", 3, "--epochs", 1, *places]
    aff_scl.train.main(aff_scl.train.parse_args([str(word) for word in flags]))
    assert seen == [True] * 2 * memories
    (log,) = (tmp_path / "results").rglob("seed0.log.jsonl")
    line = json.loads(log.read_text())
    assert line["skipped"] == 1 and 0 < line["loss"] < 20


def test_a_lost_batch_does_not_enter_the_queue_of_dapg(monkeypatch):
    seen = []
    second_is_lost(monkeypatch, baselines.MoCo, "loss")
    spied(monkeypatch, dapg.model.Contrast, "after_step", seen)
    words = "--stage robust --method moco --weights none -b 8 --epochs 1 --iters 3 --variant queue=16 warmup=1"
    dapg_runs.pretraining_losses(*words.split())
    assert seen == [True, True]
