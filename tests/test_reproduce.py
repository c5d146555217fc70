"""results/reproduce.py: which rows run, in which order, and what is skipped, continued, reported or stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from results import plan, reproduce, schema

ROOT = Path(__file__).resolve().parents[1]
TRAIN = """
import argparse, json, os, pathlib, shlex, sys, time, yaml
HERE = pathlib.Path(__file__).resolve().parent

def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="fake/train.py", allow_abbrev=False)
    for flag in ("--row", "--data-dir", "--synthetic", "--dataset", "--mode"):
        parser.add_argument(flag)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--logs-dir", default=str(HERE.parent / "logs"))
    parser.add_argument("--results-dir", default=str(HERE.parent / "runs"))
    parser.add_argument("--resume", nargs="?", const="auto")
    row = parser.parse_known_args(argv)[0].row
    rows = yaml.safe_load((HERE / "experiments.yaml").read_text())
    return parser.parse_args(shlex.split(rows[row].get("args", "")) + list(argv))

def main(args):
    with open(HERE / "calls.jsonl", "a") as file:
        file.write(json.dumps(vars(args)) + "\\n")
    if args.mode == "fail":
        sys.exit(3)
    if args.mode == "sleep":
        (HERE / "pid").write_text(str(os.getpid()))
        time.sleep(600)
    data = "market" + (f"-synthetic-{args.synthetic}" if args.synthetic else "")
    path = pathlib.Path(args.results_dir) / "fake" / data / args.row / f"seed{args.seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "synthetic" if args.synthetic else "real"
    result = {"schema": 1, "project": "fake", "row": args.row, "seed": args.seed, "command": "c", "git": {}, "env": {}}
    result |= {"args": {**vars(args), "data_name": data}, "metrics": {"mAP": 0.5}, "epoch": 1, "selection": "last"}
    result |= {"protocol": {}, "wall_s": 1, "peak_mib": 1}
    result["data"] = {"name": data, "kind": kind, "images": 1, "ids": 1, "cams": 1, "digest": "d", "published": True}
    if args.mode != "silent":
        path.write_text(json.dumps(result))

if __name__ == "__main__":
    main(parse_args())
"""
ROWS = """
table2/market: {paper: {mAP: 0.788}, args: "--dataset market"}
table4/mean: {args: "--dataset market --lr 0.5"}
table4/hard: {args: "--dataset market --lr 0.2", needs: [pretrain]}
table40: {args: ""}
pretrain: {args: "--lr 0.01"}
fails: {args: "--mode fail"}
after: {args: "", needs: [fails]}
silent: {args: "--mode silent"}
sleeps: {args: "--mode sleep"}
alone: {args: "--lr 0.3", processes: 1}
"""
LAYOUT = "table4: {title: Losses, columns: {M: [mAP]}, lines: [{name: total, rows: table2/market}]}"


@pytest.fixture()
def root(tmp_path):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "experiments.yaml").write_text(ROWS)
    (tmp_path / "fake" / "tables.yaml").write_text(LAYOUT)
    (tmp_path / "fake" / "train.py").write_text(TRAIN)
    return tmp_path


def calls(root):
    path = root / "fake" / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def statuses(root, capsys, *argv):
    """Status by row and seed of a dry run."""
    capsys.readouterr()
    assert reproduce.main([*argv, "--dry-run"], root) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " seed " in line]
    return {f"{words[1].removeprefix('fake/')}:{words[3]}": words[0] for words in lines}


def test_a_table_is_its_rows_and_those_its_layout_shows(root, capsys):
    assert list(statuses(root, capsys, "fake/table4")) == [
        "table2/market:0",
        "table4/mean:0",
        "pretrain:0",
        "table4/hard:0",
    ]


def test_patterns_are_project_row_beginning_or_glob(root, capsys):
    assert len(statuses(root, capsys, "fake")) == ROWS.count("args:")
    assert list(statuses(root, capsys, "fake/table4/mean")) == ["table4/mean:0"]
    assert list(statuses(root, capsys, "fake/*mean", "fake/table40")) == ["table4/mean:0", "table40:0"]
    assert list(statuses(root, capsys, "fake/table2", "--seeds", "3", "5")) == ["table2/market:3", "table2/market:5"]


def test_needed_rows_run_first_and_only_once(root):
    assert reproduce.main(["fake/table4/hard", "fake/pretrain"], root) == 0
    assert [call["row"] for call in calls(root)] == ["pretrain", "table4/hard"]


def test_all_seeds_of_a_row_start_from_seed_0_of_what_it_needs(root, capsys):
    assert list(statuses(root, capsys, "fake/table4/hard", "--seeds", "1", "2")) == [
        "pretrain:0", "table4/hard:1", "table4/hard:2"
    ]  # fmt: skip
    chosen = statuses(root, capsys, "fake/pretrain", "fake/table4/hard", "--seeds", "2")
    assert list(chosen) == ["pretrain:0", "pretrain:2", "table4/hard:2"]
    assert reproduce.main(["fake/after", "--seeds", "1"], root) == 1
    assert "fake/after seed 1: not run, because fails failed" in capsys.readouterr().err


def test_what_is_done_on_data_of_the_users_own_says_so(root, capsys):
    assert reproduce.main(["fake/table4/mean", "fake/table40"], root) == 0
    for row, said in (("table4/mean", False), ("table40", True)):
        path = root / "runs" / "fake" / "market" / row / "seed0.json"
        result = json.loads(path.read_text())
        result["data"]["published"] = said
        path.write_text(json.dumps(result))
    for words in (["--dry-run"], ["--list"]):
        capsys.readouterr()
        assert reproduce.main(["fake/table4/mean", "fake/table40", *words], root) == 0
        assert capsys.readouterr().out.count("on other data (1 images, 1 people)") == 1


@pytest.mark.parametrize(
    "pattern, close", [("fake/tabel4", "fake/table4"), ("fkae", "fake"), ("fake/table2/markte", "fake/table2/market")]
)
def test_an_unknown_pattern_names_what_comes_close(root, capsys, pattern, close):
    assert reproduce.main([pattern], root) == 2
    said = capsys.readouterr().err
    assert f"no row matches {pattern}" in said and close in said


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"a": {"needs": ["b"]}, "b": {"needs": ["a"]}}, "in a circle"),
        ({"a": {"needs": ["z"]}}, "needs z, which is not a row"),
        ({"a": {"args": "--nonsense 1"}}, "--nonsense"),
        ({"a": {"script": "gone.py"}}, "gone.py does not exist"),
    ],
)
def test_rows_that_cannot_be_planned_are_refused(root, capsys, rows, message):
    (root / "fake" / "experiments.yaml").write_text(yaml.safe_dump(rows))
    assert reproduce.main(["fake/a"], root) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_starts_nothing_and_prints_the_commands(root, capsys):
    assert (
        reproduce.main(
            ["fake/table4/mean", "--dry-run", "--data-dir", "/data", "--gpus", "4", "--", "--lr", "0.7"], root
        )
        == 0
    )
    assert calls(root) == []
    assert (
        "torchrun --standalone --nproc_per_node=4 fake/train.py --row table4/mean --seed 0 --data-dir /data --lr 0.7"
        in capsys.readouterr().out
    )


def test_a_row_of_one_process_runs_in_one_whatever_the_number_of_gpus(root, capsys):
    assert reproduce.main(["fake/alone", "fake/table40", "--dry-run", "--gpus", "4"], root) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "python fake/train.py --row alone --seed 0" in lines
    assert "torchrun --standalone --nproc_per_node=4 fake/train.py --row table40 --seed 0" in lines
    assert reproduce.main(["fake/alone", "--gpus", "4"], root) == 0  # in 4 it would write no result file, but fail
    assert [call["row"] for call in calls(root)] == ["alone"]


def test_finished_rows_are_skipped_by_seed_data_kind_and_flags(root, capsys):
    assert reproduce.main(["fake/table4/mean", "--seeds", "0", "1"], root) == 0
    assert len(calls(root)) == 2
    assert statuses(root, capsys, "fake/table4/mean", "--seeds", "0", "1", "2") == {
        "table4/mean:0": "done",
        "table4/mean:1": "done",
        "table4/mean:2": "new",
    }
    assert statuses(root, capsys, "fake/table4/mean", "--synthetic", "small") == {"table4/mean:0": "new"}
    assert statuses(root, capsys, "fake/table4/mean", "--data-dir", "/elsewhere") == {"table4/mean:0": "done"}
    assert reproduce.main(["fake/table4/mean", "--dry-run", "--", "--lr", "0.9"], root) == 0
    assert "other flags: lr 0.5 -> 0.9" in capsys.readouterr().out
    assert reproduce.main(["fake/table4/mean", "--seeds", "0", "1"], root) == 0
    assert len(calls(root)) == 2


def test_a_recorded_result_is_named_and_does_not_stand_for_a_run_made_here(root, capsys):
    assert reproduce.main(["fake/table4/mean", "--record"], root) == 0
    assert (root / "results" / "fake" / "market" / "table4" / "mean" / "seed0.json").is_file()
    assert statuses(root, capsys, "fake/table4/mean", "--record") == {"table4/mean:0": "done"}
    assert reproduce.main(["fake/table4/mean", "--dry-run"], root) == 0
    said = capsys.readouterr().out
    assert "new       fake/table4/mean seed 0 (recorded: results/fake/market/table4/mean/seed0.json)" in said
    assert reproduce.main(["--list"], root) == 0
    assert "recorded: market seed 0" in capsys.readouterr().out
    assert reproduce.main(["fake/table4/mean"], root) == 0
    assert len(calls(root)) == 2 and (root / "runs" / "fake" / "market" / "table4" / "mean" / "seed0.json").is_file()
    assert reproduce.main(["--list"], root) == 0
    assert "done: market seed 0; recorded: market seed 0" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        reproduce.main(["fake", "--record", "--results-dir", "elsewhere"], root)


def test_real_and_synthetic_results_do_not_stand_for_each_other(root, capsys):
    assert reproduce.main(["fake/table4/mean", "--synthetic", "small"], root) == 0
    assert statuses(root, capsys, "fake/table4/mean", "--synthetic", "small") == {"table4/mean:0": "done"}
    assert statuses(root, capsys, "fake/table4/mean", "--synthetic", "full") == {"table4/mean:0": "new"}
    assert statuses(root, capsys, "fake/table4/mean") == {"table4/mean:0": "new"}


def test_a_result_that_needs_no_data_holds_for_all(root, capsys):
    assert reproduce.main(["fake/table4/mean"], root) == 0
    path = root / "runs" / "fake" / "market" / "table4" / "mean" / "seed0.json"
    assert statuses(root, capsys, "fake/table4/mean", "--synthetic", "small") == {"table4/mean:0": "new"}
    path.write_text(path.read_text().replace('"images": 1', '"images": 0'))
    assert statuses(root, capsys, "fake/table4/mean", "--synthetic", "small") == {"table4/mean:0": "done"}


def test_an_interrupted_row_is_continued(root, capsys):
    logs = root / "logs" / "fake" / "market" / "table4" / "mean" / "seed0"
    logs.mkdir(parents=True)
    (logs / "checkpoint_0000.pt").touch()
    assert statuses(root, capsys, "fake/table4/mean") == {"table4/mean:0": "new"}
    (logs / "checkpoint_0007.pt").touch()
    assert statuses(root, capsys, "fake/table4/mean", "--synthetic", "small") == {"table4/mean:0": "new"}
    assert statuses(root, capsys, "fake/table4/mean") == {"table4/mean:0": "continue"}
    assert reproduce.main(["fake/table4/mean"], root) == 0
    assert calls(root)[0]["resume"] == "auto"


def test_flags_after_a_dash_make_a_run_of_its_own_which_is_continued_and_found_done(tmp_path, capsys):
    """aff_scl/table2/market with other flags is custom-<hash>; a copy of a checkpoint says nothing about its epochs."""
    words = [
        "aff_scl/table2/market", "--results-dir", str(tmp_path), "--logs-dir", str(tmp_path), "--", "--epochs", "4"
    ]  # fmt: skip
    spec, args = schema.load_rows(ROOT, "aff_scl")["table2/market"], reproduce.parse_args(words)
    job = plan.planned_one(ROOT, spec, args, "aff_scl", "table2/market", 0)
    assert job.status == "new" and job.folder.startswith("custom-")
    folder = tmp_path / "aff_scl" / "market" / job.folder / "seed0"
    folder.mkdir(parents=True)
    for name in ("checkpoint_0002.pt", "checkpoint_0009_best.pt", "checkpoint_0009 (1).pt"):
        (folder / name).touch()
    job = plan.planned_one(ROOT, spec, args, "aff_scl", "table2/market", 0)
    assert (job.status, job.remark) == ("continue", "after epoch 2")
    flags = vars(schema.row_args(ROOT, "aff_scl", "train.py", tuple(job.flags)))
    result = {"schema": 1, "project": "aff_scl", "row": job.folder, "seed": 0, "command": "c", "git": {}, "env": {}}
    result |= {"args": flags, "metrics": {"mAP": 0.5}, "epoch": 4, "selection": "last", "protocol": {}}
    result |= {"wall_s": 1, "peak_mib": 1}
    result["data"] = {"name": "market", "kind": "real", "images": 1, "ids": 1, "cams": 1, "digest": "d"}
    (folder.parent / "seed0.json").write_text(json.dumps(result))
    assert plan.planned_one(ROOT, spec, args, "aff_scl", "table2/market", 0).status == "done"


def test_folders_can_be_chosen(root, tmp_path, capsys):
    where = ["--results-dir", str(tmp_path / "r"), "--logs-dir", str(tmp_path / "l")]
    assert reproduce.main(["fake/table4/mean", *where], root) == 0
    assert (tmp_path / "r" / "fake" / "market" / "table4" / "mean" / "seed0.json").is_file()
    assert statuses(root, capsys, "fake/table4/mean", *where) == {"table4/mean:0": "done"}
    assert statuses(root, capsys, "fake/table4/mean") == {"table4/mean:0": "new"}


def test_a_failing_row_does_not_stop_the_rest_and_is_reported(root, capsys):
    assert reproduce.main(["fake/fails", "fake/after", "fake/silent", "fake/table4/mean"], root) == 1
    assert [call["row"] for call in calls(root)] == ["fails", "silent", "table4/mean"]
    said = capsys.readouterr().err
    assert "fake/fails seed 0: exit status 3" in said
    assert "fake/after seed 0: not run, because fails failed" in said
    assert "fake/silent seed 0: ended without a result file" in said
    assert "table4/mean" not in said


def test_a_broken_result_file_stops_the_plan(root, capsys):
    path = root / "runs" / "fake" / "market" / "table4" / "mean" / "seed0.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"schema": 1, "pro')
    assert reproduce.main(["fake/table4/mean"], root) == 2
    assert str(path) in capsys.readouterr().err


def test_list_shows_rows_flags_and_paper(root, capsys):
    assert reproduce.main(["--list"], root) == 0
    said = capsys.readouterr().out
    assert (
        "fake/table2/market: train.py --dataset market" in said and "paper: mAP 78.8" in said and "row pretrain" in said
    )
    assert reproduce.main(["--list", "fake/table4"], root) == 0
    assert "pretrain:" not in capsys.readouterr().out


def test_list_says_what_a_row_needs_and_whether_it_is_done(root, capsys):
    assert reproduce.main(["fake/table2/market", "fake/table4/mean", "--synthetic", "small"], root) == 0
    capsys.readouterr()
    other = root / "runs" / "fake" / "market-synthetic-small" / "table4" / "mean" / "seed0.json"
    content = json.loads(other.read_text())
    content["args"]["lr"] = 0.3
    other.write_text(json.dumps(content))
    assert reproduce.main(["--list"], root) == 0
    said = capsys.readouterr().out
    parts = {part.partition(":")[0]: part for part in re.split(r"\n(?=\S)", said)}
    assert "needs data set market\n" in parts["fake/table2/market"]
    assert parts["fake/table2/market"].endswith("done: market-synthetic-small seed 0")
    assert parts["fake/table4/mean"].endswith("missing (with other flags: market-synthetic-small)")
    assert "needs data set market; row pretrain\n" in parts["fake/table4/hard"]
    assert parts["fake/table4/hard"].endswith("\n    missing") and "needs nothing but" in parts["fake/table40"]
    assert said.endswith("10 rows, of them 1 done, 0 recorded\n")


def test_list_shows_all_rows_of_the_five_projects_with_what_each_needs(capsys):
    assert reproduce.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [f"{project}/{row}" for project in schema.projects(ROOT) for row in schema.load_rows(ROOT, project)]
    assert [line.partition(": ")[0] for line in lines if not line.startswith(" ")][:-1] == rows
    for start in ("    needs ", "    recorded: ", "    missing"):
        assert any(line.startswith(start) for line in lines)
    assert sum(line.startswith("    needs ") for line in lines) == len(rows) > 200
    assert sum(line.startswith(("    done: ", "    recorded: ", "    missing")) for line in lines) == len(rows)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_child_and_all_further_rows(root, number):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from results import reproduce\n"
        f"sys.exit(reproduce.main(['fake/sleeps', 'fake/table40'], Path({str(root)!r})))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    until = time.time() + 60
    while not (root / "fake" / "pid").is_file() or not (root / "fake" / "pid").read_text():
        assert time.time() < until and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(20) == 130
    assert "stopped during fake/sleeps seed 0" in process.stderr.read()
    with pytest.raises(ProcessLookupError):
        os.kill(int((root / "fake" / "pid").read_text()), 0)
    assert [call["row"] for call in calls(root)] == ["sleeps"]
