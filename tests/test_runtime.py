"""Rows and names of runs, seeds, the log, the result file."""

import json
import os
import random
import signal
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import convnext_ap.train as convnext_ap
import dapg.flags as dapg
import pixel_sampling.flags as pixel_sampling
import prsnet.flags as prsnet_flags
import prsnet.train as prsnet
from aff_scl import train
from common import flags, records, runtime


def parser_of_a_project():
    parser = ArgumentParser(prog="aff_scl/train.py")
    parser.add_argument("--tau", type=float, default=0.05)
    flags.add_run_flags(parser)
    return parser


def test_a_row_sets_defaults_and_explicit_flags_win():
    row = train.parse_args(["--row", "table5/lambda1=0.25"])
    assert (row.lambda1, row.lambda2, row.row) == (0.25, 0.75, "table5/lambda1=0.25")
    assert train.parse_args(["--row", "table5/lambda1=0.25", "--lambda1", "0.9"]).lambda1 == 0.9


def test_a_run_is_named_after_the_row_whose_flags_it_has():
    assert train.parse_args(["--dataset", "market"]).row == "table2/market"
    assert train.parse_args(["--lambda1", "0.25", "--lambda2", "0.75", "--seed", "3"]).row == "table5/lambda1=0.25"
    other = train.parse_args(["--row", "table5/lambda1=0.25", "--tau", "0.07"]).row
    assert other.startswith("custom-") and other != train.parse_args(["--tau", "0.06"]).row  # never the row's own name


def test_a_variant_beside_a_row_or_a_preset_changes_its_key_alone():
    own = dapg.parse_args(["--row", "cpu/robust/dapg"]).variant
    assert own == ["warmup=1"]
    words = ["--row", "cpu/robust/dapg", "--variant", "queue=16"]
    assert dapg.parse_args(words).variant == ["queue=16", "warmup=1"]
    again = dapg.parse_args([*words, "--variant", "warmup=3", "warmup=2"])
    assert again.variant == ["queue=16", "warmup=2"] and again.row.startswith("custom-")
    assert dapg.parse_args([*words, "--variant", "queue=16"]).row == dapg.parse_args(words).row
    authors = prsnet_flags.train_args(["--preset", "authors", "--variant", "norms=load"])
    assert authors.variant == ["erase=mean", "neck=polluted", "norms=load"]
    assert dapg.parse_args([]).variant == prsnet_flags.train_args([]).variant == []  # what was given before is gone


ALIASES = [
    (train, ["-d", "DukeMTMC-reID"], "duke", "table2/duke"),
    (train, ["-d", "market1501"], "market", "table2/market"),
    (convnext_ap, ["-d", "CUHK03-NP"], "cuhk03", "table4/cuhk03/ap"),
    (prsnet, ["-d", "Market-1501"], "market", "table3/market"),
    (dapg, ["--stage", "cil", "-d", "SYSU-MM01", "--weights", "imagenet"], "sysu", "cil/in/sysu"),
    (pixel_sampling, ["-d", "PRCC"], "prcc", pixel_sampling.parse_args([]).row),
]


@pytest.mark.parametrize("script, words, name, row", ALIASES, ids=lambda value: getattr(value, "__name__", None))
def test_another_name_of_a_data_set_is_the_same_run(script, words, name, row):
    args = script.parse_args(words)
    assert (args.dataset, args.row) == (name, row)


@pytest.mark.parametrize("script", [train, convnext_ap, prsnet], ids=lambda value: value.__name__)
@pytest.mark.parametrize("name", ["prcc", "sysu", "regdb", "luperson", "prsnet_pretrain"])
def test_data_sets_with_a_protocol_of_their_own_are_refused_where_the_market_rule_would_measure_them(
    script, name, capsys
):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["-d", name])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "has another protocol than Market-1501" in said
    assert said.rstrip().endswith("choose from market, duke, cuhk03, msmt17")


def test_a_negative_seed_is_refused_with_its_flag(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--seed", "-1"])
    assert "argument --seed: -1 is no whole number from 0" in capsys.readouterr().err


def test_an_unknown_data_set_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["-d", "mraket"])
    assert stop.value.code == 2 and "unknown data set 'mraket'; known: market, duke" in capsys.readouterr().err


def test_paper_defaults_follow_the_mode_and_data():
    main, duke, sup = (train.parse_args(argv) for argv in ([], ["-d", "duke"], ["--mode", "sup"]))
    assert (main.epochs, main.batch_size, main.num_instances, main.iters, main.bn_groups) == (60, 128, 8, 400, 2)
    assert (main.eps, duke.eps, main.k1, main.lr, main.weight_decay) == (0.65, 0.70, 30, 3.5e-4, 5e-4)
    assert (sup.epochs, sup.batch_size, sup.num_instances, sup.iters) == (120, 64, 4, None)
    assert train.parse_args(["--batch-size", "256", "--num-instances", "16"]).iters == 200


@pytest.mark.parametrize(
    "row, sentence",
    [
        ({"arg": ""}, "unknown keys arg"),
        ({"args": ["--x"]}, "args must be a string"),
        ({"processes": 0}, "processes must be a whole number from 1, not 0"),
        ({"processes": "one"}, "processes must be a whole number from 1, not 'one'"),
    ],
)
def test_rows_with_mistakes_are_refused(tmp_path, row, sentence):
    (tmp_path / "experiments.yaml").write_text(json.dumps({"table1/a": row}))
    with pytest.raises(ValueError, match=sentence):
        records.load_rows(tmp_path)
    with pytest.raises(FileNotFoundError, match="experiments.yaml"):
        records.load_rows(tmp_path / "none")


def test_a_row_may_be_like_another(tmp_path):
    rows = {
        "a": {
            "script": "pretrain.py",
            "args": "--lr 1 --epochs 2",
            "needs": ["x"],
            "processes": 2,
            "note": "its own",
            "paper": {"mAP": 1.0},
        },
        "b": {"like": "a", "args": "--lr 2"},
        "c": {"like": "b", "needs": [], "note": "mine"},
    }
    (tmp_path / "experiments.yaml").write_text(json.dumps(rows))
    read = records.load_rows(tmp_path)
    taken = {"script": "pretrain.py", "processes": 2}
    assert read["b"] == {**taken, "args": "--lr 1 --epochs 2 --lr 2", "needs": ["x"]}
    assert read["c"] == {**taken, "args": read["b"]["args"], "needs": [], "note": "mine"}
    (tmp_path / "experiments.yaml").write_text(json.dumps({"b": rows["b"], "a": rows["a"]}))
    with pytest.raises(ValueError, match="row b is like a, which is no row above it"):
        records.load_rows(tmp_path)


def a_run(seed=0, rank=0):
    return Namespace(seed=seed, rank=rank, device=torch.device("cpu"))


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_randomness_is_a_function_of_seed_epoch_and_rank():
    seen = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            for rank in (0, 1):
                runtime.seed_epoch(a_run(seed, rank), epoch)
                own = torch.rand(2, generator=runtime.generator(a_run(seed, rank), epoch)).tolist()
                seen[seed, epoch, rank] = (*draws(), *own)
    assert len({value for values in seen.values() for value in values}) == 8 * 5  # all streams differ
    runtime.seed_epoch(a_run(1, 1), 0)
    assert draws() == seen[1, 0, 1][:3]


def test_log_is_cut_back_to_the_checkpoint(tmp_path):
    log = tmp_path / "log.jsonl"
    for epoch in (1, 2, 3):
        records.append_log(log, {"epoch": epoch, "loss": 1 / epoch})
    with open(log, "a") as file:
        file.write('{"epoch": 4, "lo')
    records.trim_log(log, 2)
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == [1, 2]
    records.trim_log(tmp_path / "none.jsonl", 2)


def test_losses_on_amp_are_close_and_one_optimiser_step_is_taken(tmp_path):
    """fp16 and bf16 autocast give nearly the loss of float32; every call of step() is one optimiser step."""
    values = {}
    for amp in runtime.AMP_DTYPES:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        steps = []
        optimizer.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        run = runtime.Run("p", "r", {"amp": amp, "seed": 0}, torch.device("cpu"), 0, 1, tmp_path, tmp_path, 0.0)
        for _ in range(3):
            with run.autocast():
                output = model(torch.ones(2, 8))
            loss = torch.nn.functional.cross_entropy(output.float(), torch.tensor([0, 1]))
            runtime.step(run, loss, [optimizer], runtime.scaler(run), "here")
        assert len(steps) == 3
        values[amp] = loss.item()
    for amp in ("bf16", "fp16"):
        assert values[amp] == pytest.approx(values["off"], rel=0.02)


def test_known_errors_are_one_sentence_and_status_one(monkeypatch, capsys):
    left = []
    monkeypatch.setattr(runtime.os, "_exit", left.append)

    def main(args):
        raise ValueError("tau: 0 is not positive")

    runtime.execute(main, Namespace())
    said = capsys.readouterr().err
    assert left == [1] and said.startswith("error: tau: 0 is not positive (details: ") and said.count("\n") == 1
    note = Path(said.rpartition("details: ")[2].rstrip(")\n"))
    assert "Traceback" in note.read_text()
    note.unlink()


class Swallows:
    """Its finalizer ends in a signal; what the handler raises there is printed and forgotten by Python."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)
        for _ in range(1000):  # the handler runs between two of these
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number, ends", [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_that_comes_during_a_finalizer_ends_the_run_before_its_next_step(tmp_path, number, ends):
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run = runtime.start(parser_of_a_project().parse_args(["--logs-dir", str(tmp_path)]), "p")
        x = torch.ones(1, requires_grad=True)
        optimizer, scaler = torch.optim.SGD([x], 0.1), runtime.scaler(run)
        assert runtime.step(run, x.sum(), [optimizer], scaler, "here")
        swallowed = Swallows(number)
        del swallowed
        with pytest.raises(ends):
            runtime.step(run, x.sum(), [optimizer], scaler, "here")
        assert x.item() == pytest.approx(0.9)  # no step was taken
    finally:
        runtime._asked_to_stop.clear()
        for each, handler in before.items():
            signal.signal(each, handler)
