"""Other systems than Linux, simulated: modules, signals, units, start methods, consoles and paths that differ there."""

import ast
import importlib.util
import io
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import ROOT

from common import commandline, images, records, runtime
from results import render, reproduce, schema

SOURCES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts[0] != "tests" and not any(part.startswith(".") for part in path.parts)
)
POSIX_ONLY = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "crypt", "readline"}
WINDOWS_ONLY = {"msvcrt", "winreg", "_winapi"}
NOT_EVERYWHERE = {  # attributes that some systems lack, by module
    "os": {"fork", "killpg", "setsid", "getuid", "uname", "sysconf", "posix_fallocate", "sched_getaffinity", "pread"}
    | {"register_at_fork", "getpgid", "mkfifo", "statvfs", "geteuid", "setpgrp", "pwrite", "getloadavg"},
    "signal": {
        "SIGHUP",
        "SIGKILL",
        "SIGUSR1",
        "SIGUSR2",
        "SIGALRM",
        "SIGQUIT",
        "alarm",
        "pause",
        "sigwait",
        "setitimer",
    },
}


def named(path):
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def trees():
    return {named(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def imported(node):
    names = (
        [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
    )
    return {name.partition(".")[0] for name in names}


# -------------------------------------------------------------------------------------------------- modules and signals


def test_a_module_that_one_system_lacks_is_imported_with_a_way_out(trees):
    for path, tree in trees.items():
        ways_out = [n for n in ast.walk(tree) if isinstance(n, ast.Try) for n in ast.walk(n)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and imported(node) & (POSIX_ONLY | WINDOWS_ONLY):
                assert node in ways_out, f"{path}, line {node.lineno}: {imported(node)}"


def asked_for(tree):
    """(module, attribute) of every hasattr(module, "attribute")."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "hasattr":
            yield ast.unparse(call.args[0]), getattr(call.args[1], "value", "")


def test_what_one_system_lacks_is_asked_for_before_it_is_used(trees):
    for path, tree in trees.items():
        asked = set(asked_for(tree))
        if ("os", "killpg") in asked:
            asked.add(("signal", "SIGKILL"))  # sent to process groups alone
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in NOT_EVERYWHERE.get(ast.unparse(node.value), ()):
                used = ast.unparse(node.value), node.attr
                assert used in asked, f"{path}, line {node.lineno}: {'.'.join(used)}"


@pytest.mark.parametrize("path", ["common/records.py", "common/locks.py", "common/images.py"])
def test_the_modules_that_use_them_load_without_resource_and_fcntl(monkeypatch, path):
    for name in ("resource", "fcntl"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("_as_on_windows", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert getattr(module, "resource", None) is getattr(module, "fcntl", None) is None


def test_peak_memory_is_bytes_on_macos_kib_elsewhere_and_unknown_on_windows(monkeypatch):
    usage = SimpleNamespace(ru_maxrss=3 * 2**30)
    fake = SimpleNamespace(getrusage=lambda who: usage, RUSAGE_SELF=0)
    monkeypatch.setattr(records, "resource", fake)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert records.peak_mib() == 3 * 2**10
    monkeypatch.setattr(sys, "platform", "linux")
    assert records.peak_mib() == 3 * 2**20
    monkeypatch.setattr(records, "resource", None)
    monkeypatch.setattr(sys, "platform", "win32")
    assert records.peak_mib() is None


def test_a_result_without_peak_memory_is_written_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "resource", None)
    args = {"seed": 0, "amp": "off"}
    folder = tmp_path / "p" / "market" / "row"
    run = runtime.Run("p", "row", args, runtime.torch.device("cpu"), 0, 1, tmp_path, folder, 0.0)
    data = {"name": "market", "kind": "real", "images": 1, "ids": 1, "cams": 1, "digest": "d"}
    path = runtime.record(run, {"mAP": 0.5}, data, {})
    assert json.loads(path.read_text())["peak_mib"] is None
    assert schema.read(path, tmp_path).metrics == {"mAP": 0.5}


def sleeper():
    return subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)


def test_an_interrupted_row_ends_where_there_are_no_process_groups(monkeypatch):
    monkeypatch.delattr(os, "killpg")
    monkeypatch.delattr(signal, "SIGKILL")
    for force in (False, True):
        child = sleeper()
        reproduce._end(child, force)
        assert child.wait(30) != 0


@pytest.mark.parametrize("force, number", [(False, signal.SIGTERM), (True, signal.SIGKILL)])
def test_an_interrupted_row_is_asked_to_end_and_then_killed(force, number):
    child = sleeper()
    reproduce._end(child, force)
    assert child.wait(30) == -number


def test_rows_are_planned_and_run_without_a_hangup_signal(tmp_path, monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "experiments.yaml").write_text('a: {args: ""}')
    (tmp_path / "fake" / "train.py").write_text(
        "import argparse\n"
        "def parse_args(argv=None):\n"
        "    parser = argparse.ArgumentParser()\n"
        "    parser.add_argument('--row'), parser.add_argument('--seed', type=int)\n"
        "    return parser.parse_args(argv)\n"
    )
    assert reproduce.main(["fake/a"], tmp_path) == 1  # it ran, and left no result


# ------------------------------------------------------------------------------------------------- processes that spawn


ALLOWED = {"sys.path.insert", "layouts_vi.register", "PrintedLoader.add_constructor"}


def test_a_spawned_process_may_import_any_file_without_starting_its_work(trees):
    """Spawned workers import the script; at its top level only the path line and a table's entries may be made."""
    for path, tree in trees.items():
        lines = [n.value for n in tree.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
        assert {ast.unparse(call.func) for call in lines} <= ALLOWED, path
        guards = [ast.unparse(n.test) for n in tree.body if isinstance(n, ast.If)]
        starts = [ast.unparse(n) for n in tree.body if isinstance(n, ast.If | ast.Expr)]
        if any("main(" in text or "execute(" in text for text in starts):
            assert "__name__ == '__main__'" in guards, path


def test_what_workers_are_given_can_be_pickled(tmp_path, market_dir):
    paths = sorted(map(str, (market_dir / "market1501" / "query").glob("*.jpg")))
    for cache in ("off", "disk"):
        store = images.open_images(paths, 16, 8, cache=cache, cache_dir=tmp_path, workers=1)
        item, index = pickle.loads(pickle.dumps(images.Decoded(store)))[1]
        assert index == 1 and np.array_equal(item, store.decode(1))
        assert pickle.loads(pickle.dumps(images.stack)) is images.stack


# ------------------------------------------------------------------------------------------------------------- consoles


UNUSUAL = "Übung 训练 \udcff.jpg"  # the last one stands for a byte that is no UTF-8


def console(monkeypatch, encoding):
    """Streams to a console of another encoding, and the bytes that reach it."""
    reached = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(reached, encoding=encoding, write_through=True))
    return reached


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk", "utf-8"])
def test_what_the_console_cannot_show_ends_no_program(monkeypatch, encoding):
    left = []
    monkeypatch.setattr(runtime.os, "_exit", left.append)
    monkeypatch.setattr(sys, "argv", ["render.py"])

    def fail(args):
        raise ValueError(UNUSUAL)

    with monkeypatch.context() as swapped:
        reached = console(swapped, encoding)
        runtime.execute(lambda args: print(UNUSUAL), None)  # a run's message
        runtime.execute(fail, None)  # its error
        said = reached.getvalue().split(b"\\udcff.jpg")
    assert len(said) == 3 and b"error: " in said[1] and left == [1]
    with monkeypatch.context() as swapped:
        reached = console(swapped, encoding)
        render.parse_args()  # a tool's first step
        print(UNUSUAL)
        assert b"\\udcff.jpg" in reached.getvalue()


def test_a_program_without_a_console_starts(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    commandline.console()


# ---------------------------------------------------------------------------------------------------------------- paths


def test_a_tilde_is_the_home_folder_wherever_a_path_may_begin(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    given = "~/data --data-dir=~/data detector=~/k.pth --variant=detector=~/k.pth ~ a~b --lr=1e-4 -b".split()
    home = "/home/me"
    expected = [f"{home}/data", f"--data-dir={home}/data", f"detector={home}/k.pth", f"--variant=detector={home}/k.pth"]
    assert commandline.words(given) == [*expected, home, "a~b", "--lr=1e-4", "-b"]
    assert given[0] == "~/data"


@pytest.mark.parametrize(
    "script, flags",
    [
        ("aff_scl/train.py", ["--weights=~/w", "--data-dir=~/d"]),
        ("convnext_ap/train.py", ["--weights=~/w", "--logs-dir=~/l"]),
        ("pixel_sampling/train.py", ["--weights", "~/w", "--cache-dir=~/c"]),
        ("prsnet/train.py", ["--weights=~/w", "--resume=~/r"]),
        ("prsnet/pretrain.py", ["--results-dir=~/r"]),
        ("prsnet/deploy.py", ["--out=~/o"]),
        ("dapg/train.py", ["--stage=align", "--source=~/s", "--weights=~/w"]),
        ("aff_scl/test.py", ["--checkpoint=~/c", "--against=~/a", "--out=~/o"]),
        ("convnext_ap/test.py", ["--weights=~/c", "--query=~/q", "--gallery=~/g"]),
        ("pixel_sampling/test.py", ["--checkpoint=~/c", "--csv=~/x"]),
        ("prsnet/test.py", ["--checkpoint=~/c", "--images=~/i"]),
        ("dapg/test.py", ["--checkpoint=~/c", "--logs-dir=~/l"]),
        ("convnext_ap/figures.py", ["lr", "--out=~/o"]),
        ("pixel_sampling/visualize.py", ["3", "--checkpoint=~/c", "--out=~/o"]),
        ("pixel_sampling/parse.py", ["--root=~/r", "--ckpt=~/c"]),
        ("prsnet/prepare.py", ["--coco-images=~/c", "--out=~/o", "--synthetic=small"]),
        ("common/datasets/__main__.py", ["market", "--data-dir=~/d"]),
        ("common/synthetic/__main__.py", ["market", "--out=~/o"]),
        ("results/reproduce.py", ["aff_scl", "--data-dir=~/d", "--logs-dir=~/l"]),
    ],
)
def test_every_script_takes_a_tilde_in_its_path_flags(monkeypatch, script, flags):
    monkeypatch.setenv("HOME", "/home/me")
    args = vars(schema.parser_of((ROOT / script).parent, Path(script).name)(flags))
    assert "~" not in str(args)
    assert sum(str(value).startswith("/home/me/") for value in args.values()) == sum("~" in word for word in flags)


def test_names_of_rows_are_folders_on_every_system():
    for path in ROOT.glob("*/experiments.yaml"):
        for row in yaml.safe_load(path.read_text(encoding="utf-8")):
            assert not set(row) & set('<>:"\\|?*') and not any(p != p.strip(". ") for p in Path(row).parts), row
