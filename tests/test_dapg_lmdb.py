"""LUPerson's LMDB: its keys, reading it from forked processes and from threads, and a training on it to its result."""

import hashlib
import json
import multiprocessing
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from dapg_trees import write_luperson

from common import datasets, images
from common.datasets import __main__ as command
from common.datasets import files, luperson
from dapg import test as dapg_test
from dapg import train
from dapg.data import LmdbStore
from prsnet import prepare


def write_lmdb(root: Path, count: int = 40) -> tuple[Path, list[str]]:
    """LUPerson/lmdb as its authors' converter writes it, and the files that it holds."""
    paths = [s.path for s in datasets.load("luperson", write_luperson(root / "files")).train[:count]]
    folder = root / "LUPerson" / "lmdb"
    folder.mkdir(parents=True)
    keys = [f"AA_bb_0000_{i:08d}" for i in range(len(paths))]
    with lmdb.open(str(folder), map_size=1 << 24) as env, env.begin(write=True) as out:
        for key, file in zip(keys, paths):
            out.put(key.encode(), Path(file).read_bytes())
    (folder / "keys.pkl").write_bytes(pickle.dumps(keys))
    return root, paths


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_lmdb(tmp_path_factory.mktemp("lmdb"))


def store(root: Path) -> LmdbStore:
    paths = [s.path for s in datasets.load("luperson", root).train]
    return LmdbStore(paths, (3, 64, 32), "bicubic", "off", torch.device("cpu"), None)


def test_it_gives_the_pixels_of_the_folder(tree):
    root, paths = tree
    folder = images.open_images(paths, 64, 32, cache="off")
    assert torch.equal(store(root).gather(np.arange(40)), folder.gather(np.arange(40)))
    with pytest.raises(ValueError, match="has no key"):
        luperson.read(datasets.load("luperson", root).train[0].path + "x")


def test_loader_processes_read_it_after_the_main_process_has(tree):
    root, _ = tree
    opened = store(root)
    first = opened.gather(np.arange(8))
    for _ in range(2):  # each epoch forks anew
        parts = [x for x, _ in images.batches(opened, np.arange(8).reshape(2, 4), "cpu", workers=2)]
        assert torch.equal(torch.cat(parts), first)
    assert torch.equal(opened.gather(np.arange(8)), first)  # the parent's handle is as it was


def child(path: str, queue) -> None:
    queue.put((len(luperson._opened), luperson.read(path), len(luperson._opened)))


def test_a_forked_process_closes_its_parents_handles_and_opens_its_own(tree):
    path = datasets.load("luperson", tree[0]).train[0].path
    content = luperson.read(path)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(path, queue))
    process.start()
    assert queue.get(timeout=60) == (0, content, 1)
    process.join()
    assert luperson.read(path) == content


def test_many_threads_open_it_once_and_read_the_same(tree, monkeypatch):
    paths = [s.path for s in datasets.load("luperson", tree[0]).train]
    luperson._after_fork()  # as in a process that has opened nothing
    opened, original = [], lmdb.open

    def slow(*args, **options):
        opened.append(args)
        threading.Event().wait(0.05)  # the others arrive meanwhile
        return original(*args, **options)

    monkeypatch.setattr(lmdb, "open", slow)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(luperson.read, paths * 5))
    assert read == [Path(file).read_bytes() for file in tree[1]] * 5 and len(opened) == 1


@pytest.mark.parametrize("threads", ["0", "4"])
def test_the_check_opens_every_image_and_names_the_broken_one(tree, tmp_path, capsys, threads):
    root, paths = write_lmdb(tmp_path, 6)
    with lmdb.open(str(root / "LUPerson/lmdb"), map_size=1 << 24) as env, env.begin(write=True) as out:
        out.put(b"AA_bb_0000_00000003", Path(paths[3]).read_bytes()[:60])
    assert command.main(["check", "luperson", "--data-dir", str(root), "-j", threads]) == 1
    said = capsys.readouterr().out
    assert "lmdb::AA_bb_0000_00000003: cannot be decoded" in said and "6 images opened, 1 broken" in said


def test_its_digest_follows_keys_and_sizes_but_not_the_place(tree, tmp_path):
    first = datasets.load("luperson", tree[0]).digest()
    rows = [[f"AA_bb_0000_{i:08d}", Path(file).stat().st_size] for i, file in enumerate(tree[1])]
    assert first == hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert datasets.load("luperson", write_lmdb(tmp_path / "a")[0]).digest() == first
    assert datasets.load("luperson", write_lmdb(tmp_path / "b", 39)[0]).digest() != first


def test_a_training_on_it_runs_to_its_result(tree, tmp_path):
    words = "--stage robust --backbone resnet18 --height 64 --width 32 --batch-size 8 --epochs 1 --iters 2 --workers 2"
    words = [*words.split(), "--variant", "warmup=1", "queue=16", "--data-dir", str(tree[0])]
    train.main(train.parse_args([*words, "--logs-dir", f"{tmp_path}/logs", "--results-dir", f"{tmp_path}/results"]))
    (file,) = (tmp_path / "results").rglob("seed0.json")
    result = json.loads(file.read_text())
    assert np.isfinite(result["metrics"]["mc"]) and result["data"]["images"] == 40
    assert result["data"]["digest"] == datasets.load("luperson", tree[0]).digest()


def test_figure_3_is_drawn_from_it(tree, tmp_path, capsys):
    words = ["--figure", "3", "--dataset", "luperson", "--data-dir", tree[0], "--out", tmp_path, "--workers", "0"]
    dapg_test.main(dapg_test.parse_args([str(word) for word in words]))
    assert (tmp_path / "figure3.jpg").is_file()


def test_its_images_join_a_pretraining(tree, tmp_path):
    root = prepare.prepare(
        prepare.parse_args(["--mix", "luperson", "--data-dir", str(tree[0]), "--out", str(tmp_path)])
    )
    assert [(root / f"mix/luperson_{i:06d}.jpg").read_bytes() for i in (0, 39)] == [
        Path(tree[1][i]).read_bytes() for i in (0, 39)
    ]
    assert len(datasets.load("person_crops", tmp_path).train) == 40


def test_of_several_one_is_read_and_the_others_are_said(tree, tmp_path):
    root, _ = write_lmdb(tmp_path, 2)
    (root / "LUPerson" / "part2").mkdir()
    (root / "LUPerson" / "part2" / "data.mdb").touch()
    with pytest.warns(files.LeftOut, match="LUPerson/lmdb is read and not .*LUPerson/part2"):
        assert len(datasets.load("luperson", root).train) == 2


def test_what_is_no_lmdb_is_named(tmp_path):
    (tmp_path / "LUPerson.lmdb").write_bytes(b"<!DOCTYPE html>" * 999)
    with pytest.raises(ValueError, match="LUPerson.lmdb cannot be opened as an LMDB"):
        datasets.load("luperson", tmp_path)


def write_keys(folder, keys):
    folder.mkdir(parents=True)
    (folder / "data.mdb").write_bytes(b"")
    (folder / "keys.pkl").write_bytes(pickle.dumps(keys))


@pytest.mark.parametrize("keys", [["b", "a"], {"keys": [b"b", b"a"], "vids": [1, 2]}], ids=["list", "dictionary"])
def test_lmdb_keys_may_be_a_list_or_a_dictionary(tmp_path, keys):
    write_keys(tmp_path / "LUPerson" / "lmdb", keys)
    assert [s.path.split(luperson.SEPARATOR)[1] for s in datasets.load("luperson", tmp_path).train] == ["a", "b"]


class Payload:
    def __reduce__(self):
        return (print, ("ran",))


def test_keys_cannot_run_code(tmp_path, capsys):
    write_keys(tmp_path / "LUPerson" / "lmdb", Payload())
    with pytest.raises(ValueError, match="no list of keys"):
        datasets.load("luperson", tmp_path)
    assert "ran" not in capsys.readouterr().out


def test_an_lmdb_without_the_package_is_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    write_keys(tmp_path / "LUPerson" / "lmdb", ["a"])
    with pytest.raises(ValueError, match="pip install lmdb, or unpack the images into a folder"):
        luperson.read(datasets.load("luperson", tmp_path).train[0].path)
