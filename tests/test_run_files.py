"""A run's files: never trained over, one command at a time, named by content; an error makes no folder."""

import json
import multiprocessing
import os
import signal
import sys
import time
from argparse import Namespace

import pytest
import torch

from aff_scl import train as aff_scl_train
from common import checkpoints, inputs, locks, log_folder, runfiles, runtime
from convnext_ap import train as convnext_train
from dapg import train as dapg_train
from prsnet import train as prsnet_train

FORK = multiprocessing.get_context("fork")
DATA = {"name": "market", "kind": "real", "images": 1, "ids": 1, "cams": 1, "digest": "d"}


def begin(where, resume=None, **flags):
    """A run of a network of two numbers, its parts, and the epoch from which it trains."""
    args = {"seed": 0, "resume": resume, "epochs": 3, "lr": 0.5, "amp": "off", "synthetic": None, **flags}
    run = runtime.Run("p", "row", args, torch.device("cpu"), 0, 1, where / "logs", where / "results", time.time())
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), args["lr"])
    parts = model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if "data_dir" in flags:
        inputs.dataset(run, "market")
    log_folder.open_log(run, "market")
    return run, parts, log_folder.resume(run, *parts)


def train(where, resume=None, until=None, **flags):
    """The whole of a run, or its first `until` epochs as if it had been killed then; its log folder."""
    run, (model, optimizer, scheduler), first = begin(where, resume, **flags)
    for epoch in range(first, until or run.args["epochs"]):
        runtime.step(run, model(torch.ones(1, 2)).square().sum(), [optimizer], runtime.scaler(run), "here")
        log_folder.save(run, epoch + 1, model, optimizer, scheduler, stats={"loss": 1.0})
    if until is None:
        runtime.record(run, {"mAP": 0.5}, DATA, {}, epoch=run.args["epochs"])
    run.held.close()
    return run.log_dir


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------- the same command once more


def test_the_same_command_again_leaves_a_finished_run_alone_and_says_where_it_is(tmp_path):
    folder = train(tmp_path)
    before = content(tmp_path)
    with pytest.raises(log_folder.Finished) as said:
        train(tmp_path)
    result = tmp_path / "results" / "p" / "market" / "row" / "seed0.json"
    for part in (str(folder), "finished after epoch 3", str(result), "--seed", "--logs-dir"):
        assert part in str(said.value)
    assert content(tmp_path) == before


def test_a_finished_run_is_one_line_and_no_failure(tmp_path, capsys):
    train(tmp_path)
    runtime.execute(lambda args: train(tmp_path), Namespace())
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{tmp_path / 'logs'}")


def test_a_finished_run_without_its_result_is_refused_and_resume_writes_the_result(tmp_path):
    train(tmp_path, until=3)
    with pytest.raises(ValueError, match=r"finished run without a result .*seed0.json; add --resume"):
        train(tmp_path)
    train(tmp_path, resume="auto")
    assert json.loads((tmp_path / "results/p/market/row/seed0.json").read_text())["epoch"] == 3


def test_an_unfinished_run_is_left_alone_without_resume(tmp_path):
    folder = train(tmp_path, until=2)
    before = content(folder)
    with pytest.raises(ValueError, match="unfinished run; add --resume"):
        train(tmp_path)
    assert content(folder) == before
    assert [runfiles.epoch_of(p) for p in runfiles.listed(folder)] == [1, 2]


def test_a_run_is_finished_when_all_its_stages_are(tmp_path):
    """--epochs is the first stage alone of some trainings, which then give resume the number of all."""
    train(tmp_path)
    run, parts, _ = begin(tmp_path, "auto")
    run.args["resume"] = None
    with pytest.raises(ValueError, match="unfinished run; add --resume"):
        log_folder.resume(run, *parts, epochs=5)


def test_a_run_of_other_flags_in_the_same_folder_is_left_alone_with_a_list_of_them(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match=r"other flags: --lr 0.5 -> 0.25; .*another --logs-dir"):
        train(tmp_path, lr=0.25)


def test_resuming_from_an_earlier_file_does_not_train_over_later_epochs(tmp_path):
    folder = train(tmp_path, until=2)
    with pytest.raises(ValueError, match="checkpoint_0002.pt is further than .*checkpoint_0001.pt: give --resume"):
        train(tmp_path, resume=str(folder / "checkpoint_0001.pt"))
    train(tmp_path, resume="auto")
    before = content(folder)
    with pytest.raises(log_folder.Finished):
        train(tmp_path, resume=str(folder / "checkpoint_0002.pt"))
    assert content(folder) == before


def test_a_damaged_newest_checkpoint_may_be_trained_over_from_the_one_before(tmp_path):
    folder = train(tmp_path)
    whole = checkpoints.read(folder / "checkpoint_0003.pt")["state_dict"]["weight"]
    (folder / "checkpoint_0003.pt").write_bytes(b"cut")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        train(tmp_path)
    train(tmp_path, resume=str(folder / "checkpoint_0002.pt"))
    assert torch.equal(checkpoints.read(folder / "checkpoint_0003.pt")["state_dict"]["weight"], whole)


def test_resume_that_finds_nothing_says_so_and_starts_with_epoch_1(tmp_path, capsys):
    folder = train(tmp_path, resume="auto")
    assert f"--resume: there is no checkpoint in {folder}; training starts with epoch 1" in capsys.readouterr().out
    train(tmp_path, resume="auto")
    said = capsys.readouterr().out
    assert "there is no checkpoint" not in said and "continuing after epoch 3" in said


# -------------------------------------------------------------------------------------------- names that are the user's


@pytest.mark.parametrize(
    "copy",
    [
        "checkpoint_0060_best.pt",
        "checkpoint_0060 (1).pt",
        "checkpoint_0060_copy_0001.pt",
        "._checkpoint_0060.pt",
        "checkpoint_60.pt",
        "checkpoint_00060.pt",
        "checkpoint_0099.pt.bak",
        "Copy of checkpoint_0060.pt",
        "notes.tmp",
    ],
)
def test_a_users_own_copy_is_neither_read_nor_removed(tmp_path, copy):
    folder = train(tmp_path, until=1)
    (folder / copy).write_text("mine")
    train(tmp_path, resume="auto")
    assert (folder / copy).read_text() == "mine"
    assert [p.name for p in runfiles.listed(folder)] == ["checkpoint_0002.pt", "checkpoint_0003.pt"]


def test_epochs_beyond_9999_are_ours_too(tmp_path):
    for epoch in (9998, 9999, 10000, 10001):
        checkpoints.write(tmp_path, epoch, {})
    assert [runfiles.epoch_of(p) for p in runfiles.listed(tmp_path)] == [10000, 10001]


# ------------------------------------------------------------------------------------------------ one command at a time


def hold_a_run(queue, where):
    run, _, _ = begin(where, "auto")
    (run.log_dir / "checkpoint_0001.pt.0123abcd.tmp").write_text("being written")
    queue.put(str(run.log_dir))
    signal.pause()


def test_two_commands_do_not_train_one_run_and_a_killed_one_leaves_no_lock(tmp_path):
    queue = FORK.Queue()
    child = FORK.Process(target=hold_a_run, args=(queue, tmp_path))
    child.start()
    being_written = os.path.join(queue.get(timeout=30), "checkpoint_0001.pt.0123abcd.tmp")
    for resume in (None, "auto"):
        with pytest.raises(locks.Held, match=rf"another command .*held by process {child.pid} on .*--logs-dir"):
            begin(tmp_path, resume)
    assert os.path.isfile(being_written)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    train(tmp_path, resume="auto")
    assert not os.path.exists(being_written)


def test_another_seed_may_be_trained_at_the_same_time_and_a_finished_run_is_free(tmp_path):
    first, _, _ = begin(tmp_path)
    second, _, _ = begin(tmp_path, seed=1)
    assert first.log_dir != second.log_dir
    runtime.record(first, {"mAP": 0.5}, DATA, {})
    queue = FORK.Queue()
    child = FORK.Process(target=hold_a_run, args=(queue, tmp_path))  # the lock was given back
    child.start()
    assert queue.get(timeout=30) == str(first.log_dir)
    child.kill()
    child.join()


def test_without_locks_nothing_of_another_command_is_swept(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    folder = train(tmp_path, until=1)
    (folder / "checkpoint_0002.pt.0123abcd.tmp").touch()
    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked"):
        train(tmp_path, resume="auto")
    assert (folder / "checkpoint_0002.pt.0123abcd.tmp").exists()


def test_two_processes_of_one_number_write_to_two_temporary_files(tmp_path, monkeypatch):
    """Process numbers repeat on other machines and in containers that share a drive."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    seen = []

    def outer(file):
        seen.append(file.name)
        runfiles.replace(tmp_path / "x", lambda other: (seen.append(other.name), other.write(b"inner")))
        file.write(b"outer")

    runfiles.replace(tmp_path / "x", outer)
    assert seen[0] != seen[1] and (tmp_path / "x").read_bytes() == b"outer"


@pytest.mark.parametrize("stop", [SystemExit(143), KeyboardInterrupt()])
def test_a_signal_that_comes_while_torch_writes_ends_the_run_as_it_does_elsewhere(tmp_path, stop):
    """torch.save closes its archive over the exception and says RuntimeError."""

    class Signalled:
        def __init__(self, file):
            self.file, self.left = file, 3

        def write(self, block):
            self.left -= 1
            if self.left == 0:
                raise stop
            return self.file.write(block)

    (tmp_path / "x.pt").write_bytes(b"before")
    with pytest.raises(type(stop)) as found:
        runfiles.replace(tmp_path / "x.pt", lambda file: torch.save({"x": torch.zeros(10**6)}, Signalled(file)))
    assert found.value is stop and (tmp_path / "x.pt").read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


# --------------------------------------------------------------------------------------- named by content, not by place


def weights_files(tmp_path):
    """Two files of the same content in different places, and one of another."""
    paths = [tmp_path / "a.pth", tmp_path / "moved" / "b=1.pth", tmp_path / "c.pth"]
    (tmp_path / "moved").mkdir()
    for path, value in zip(paths, (1, 1, 2)):
        path.write_bytes(bytes([value]) * 3_000_000)
    return map(str, paths)


@pytest.mark.parametrize(
    "parse, flags",
    [
        (aff_scl_train.parse_args, ["--weights", "{}"]),
        (convnext_train.parse_args, ["--weights", "{}"]),
        (prsnet_train.parse_args, ["--weights", "{}"]),
        (dapg_train.parse_args, ["--stage", "agw", "--weights", "{}"]),
        (dapg_train.parse_args, ["--stage", "generate", "--source", "{}"]),
        (dapg_train.parse_args, ["--stage", "gan", "--variant", "detector={}", "ngf=32"]),
    ],
)
def test_a_moved_file_leaves_the_name_of_a_run_and_other_content_changes_it(tmp_path, parse, flags):
    same, moved, other = (parse([word.format(path) for word in flags]) for path in weights_files(tmp_path))
    assert same.row == moved.row != other.row and same.row.startswith("custom-")
    assert str(tmp_path) in str(vars(moved).values())  # the path itself is still what is opened


def test_a_folder_of_generated_poses_counts_by_its_files(tmp_path):
    for name, files in (("a", "xy"), ("b", "xy"), ("c", "xz")):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / f"{file}.jpg").write_bytes(b"12")
    rows = [dapg_train.parse_args(["--stage", "align", "--source", str(tmp_path / name)]).row for name in "abc"]
    assert rows[0] == rows[1] != rows[2]


def test_a_log_folder_counts_by_its_newest_checkpoint_alone(tmp_path):
    """Two pre-trainings are two methods, however alike their files look; a lock or a picture beside one is nothing."""
    for name, byte in (("a", 1), ("same", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint_0060.pt").write_bytes(bytes([byte]) * 1000)
    (tmp_path / "same" / ".lock").write_text("4711")
    rows = {
        name: dapg_train.parse_args(["--stage", "agw", "--weights", str(tmp_path / name)]).row
        for name in ("a", "same", "other")
    }
    assert rows["a"] == rows["same"] != rows["other"]


def test_words_and_names_of_rows_are_never_taken_for_files(tmp_path, monkeypatch):
    for name in ("none", "imagenet", "demo"):
        (tmp_path / name).mkdir()
    (tmp_path / "demo" / "pretrain").touch()
    elsewhere = [aff_scl_train.parse_args(["--weights", name]).row for name in ("none", "imagenet")]
    row = prsnet_train.parse_args(["--row", "demo/pretrained"]).row
    monkeypatch.chdir(tmp_path)
    assert [aff_scl_train.parse_args(["--weights", name]).row for name in ("none", "imagenet")] == elsewhere
    assert prsnet_train.parse_args(["--row", "demo/pretrained"]).row == row == "demo/pretrained"


def test_other_paths_name_no_run(tmp_path):
    places = ["--data-dir", "--cache-dir", "--logs-dir", "--results-dir"]
    flags = [word for place in places for word in (place, str(tmp_path / place))]
    for script in (aff_scl_train, convnext_train, prsnet_train, dapg_train):
        assert script.parse_args(flags).row == script.parse_args([]).row


def test_a_run_continues_with_another_period_of_evaluations_than_it_began_with(tmp_path):
    train(tmp_path, until=1)
    folder = train(tmp_path, resume="auto", eval_period=5)
    assert checkpoints.epoch_of(runfiles.newest(folder)) == 3


def test_a_recorded_command_repeats_the_run_and_records_nothing(tmp_path, monkeypatch):
    for place in (["--results-dir", "results"], ["--results-dir=results"]):
        monkeypatch.setattr(runtime.sys, "argv", ["train.py", "--row", "demo", *place, "--seed", "3"])
        train(tmp_path / place[0])
    commands = [json.loads(path.read_text())["command"] for path in tmp_path.rglob("seed0.json")]
    assert commands == ["python train.py --row demo --seed 3"] * 2


def test_resume_after_the_weights_moved_continues_and_after_they_changed_refuses(tmp_path):
    a, b = {"weights": "a.pth", "contents": {"weights": "file:1"}}, {"weights": "b.pth"}
    train(tmp_path, until=1, **a)
    with pytest.raises(ValueError, match="--weights file:1 -> file:2"):
        train(tmp_path, resume="auto", contents={"weights": "file:2"}, weights="a.pth")
    with pytest.raises(ValueError, match="--weights a.pth -> b.pth"):
        train(tmp_path, resume="auto", **b)  # nothing is there any more, so nothing tells that it was the same
    folder = train(tmp_path, resume="auto", contents={"weights": "file:1"}, **b)
    assert runfiles.epoch_of(runfiles.newest(folder)) == 3


def test_a_checkpoint_from_before_contents_were_kept_continues_by_path(tmp_path):
    train(tmp_path, until=1, weights="a.pth")
    train(tmp_path, resume="auto", weights="a.pth", contents={"weights": "file:1"})


# --------------------------------------------------------------------------------------------- an error makes no folder


def failing(where, claimed):
    def main(args):
        runtime.start(args, "p")
        if claimed:
            begin(where)
        raise ValueError("the data are not there")

    return main


def arguments(where):
    parsed = aff_scl_train.parse_args(["--logs-dir", str(where / "logs"), "--weights", "none"])
    return Namespace(**vars(parsed))


def test_an_error_before_training_makes_no_folder_and_its_traceback_is_kept_elsewhere(tmp_path, monkeypatch, capsys):
    left = []
    monkeypatch.setattr(runtime.os, "_exit", left.append)
    monkeypatch.setattr(log_folder.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    runtime.execute(failing(tmp_path, claimed=False), arguments(tmp_path))
    (note,) = (tmp_path / "tmp").iterdir()
    assert left == [1] and f"error: the data are not there (details: {note})" in capsys.readouterr().err
    assert "Traceback" in note.read_text() and [p.name for p in tmp_path.iterdir()] == ["tmp"]


def test_the_traceback_of_a_run_lies_in_its_log_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime.os, "_exit", lambda status: None)
    runtime.execute(failing(tmp_path, claimed=True), arguments(tmp_path))
    note = tmp_path / "logs/p/market/row/seed0/error-rank0.txt"
    assert str(note) in capsys.readouterr().err and "Traceback" in note.read_text()


def test_wrong_data_and_wrong_checkpoints_leave_the_users_folder_as_it_was(tmp_path, monkeypatch, capsys):
    from aff_scl import test as aff_scl_test

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime.os, "_exit", lambda status: None)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    flags = ["--data-dir", str(tmp_path), "--logs-dir", "logs", "--results-dir", "results", "--weights", "none"]
    for main, args in (
        (aff_scl_train.main, aff_scl_train.parse_args(flags)),
        (aff_scl_test.main, aff_scl_test.parse_args(["--checkpoint", "gone.pt"])),
    ):
        runtime.execute(main, args)
        assert capsys.readouterr().err.startswith("error: ")
    assert not list(tmp_path.iterdir())
