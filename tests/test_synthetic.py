"""common.synthetic writes data sets: determinism, layouts and counts, atomic writing."""

import json
import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from common import synthetic
from common.synthetic import layouts, layouts_vi, street

ROOT = Path(__file__).resolve().parents[1]
TINY = layouts.Count(train_ids=4, test_ids=3, train_pairs=8, query=6, train=12, gallery=8, distractors=2, junk=2)


@pytest.fixture(autouse=True)
def tiny_counts(monkeypatch):
    """`small` market with few images, so that writing takes a second; the other sizes keep their counts."""
    monkeypatch.setitem(layouts.COUNTS, ("market", "small"), TINY)


def bytes_below(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_same_seed_gives_same_bytes_for_any_number_of_workers(tmp_path):
    one = synthetic.write("market", tmp_path / "one", workers=1)
    two = synthetic.write("market", tmp_path / "two", workers=2)
    other = synthetic.write("market", tmp_path / "other", seed=1, workers=1)
    assert bytes_below(one) == bytes_below(two)
    assert bytes_below(one) != bytes_below(other)


def test_market_small_has_native_names_sizes_and_stamp(tmp_path):
    root = synthetic.write("market", tmp_path, workers=1)
    assert root == tmp_path / "market1501" / "Market-1501-v15.09.15"
    counts = {folder.name: len(list(folder.iterdir())) for folder in root.iterdir() if folder.is_dir()}
    assert counts == {"bounding_box_train": 12, "query": 6, "bounding_box_test": 12}
    for path in root.rglob("*.jpg"):
        assert re.fullmatch(r"(-1|\d{4})_c[1-6]s\d_\d{6}_\d\d\.jpg", path.name)
        assert cv2.imread(str(path)).shape == (128, 64, 3)
    assert json.loads((root / "SYNTHETIC").read_text()) == {"size": "small", "seed": 0, "version": synthetic.VERSION}


def test_second_call_touches_nothing(tmp_path):
    root = synthetic.write("market", tmp_path, workers=1)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert synthetic.write("market", tmp_path, workers=1) == root
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_other_seed_replaces_synthetic_data_but_never_real_data(tmp_path):
    root = synthetic.write("market", tmp_path, workers=1)
    before = bytes_below(root)
    assert bytes_below(synthetic.write("market", tmp_path, seed=3, workers=1)) != before
    (root / "SYNTHETIC").unlink()
    with pytest.raises(FileExistsError, match="not synthetic"):
        synthetic.write("market", tmp_path, workers=1)


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    draw, calls = layouts.draw, []

    def failing(name, item, seed):
        calls.append((tmp_path / layouts.ROOTS["market"]).exists())
        if len(calls) == 5:
            raise KeyboardInterrupt
        return draw(name, item, seed)

    monkeypatch.setattr(layouts, "draw", failing)
    with pytest.raises(KeyboardInterrupt):
        synthetic.write("market", tmp_path, workers=1)
    assert calls == [False] * 5  # nothing under the final name while it writes
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / layouts.ROOTS["market"]).exists()


def test_drafts_of_killed_processes_are_removed_and_those_of_living_ones_kept(tmp_path):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    folder = tmp_path / "market1501"
    dead, alive = (folder / f".Market-1501-v15.09.15.{platform.node()}.{pid}.tmp" for pid in (done.pid, 1))
    old = folder / f".Market-1501-v15.09.15.{platform.node()}.old.{done.pid}.tmp"
    dead.mkdir(parents=True)
    alive.mkdir()
    old.mkdir()
    synthetic.write("market", tmp_path, workers=1)
    assert not dead.exists() and not old.exists() and alive.exists()


def test_older_people_are_moved_away_whole_before_the_new_ones_come(tmp_path, monkeypatch):
    """Killed while the older ones are removed, the root is either complete or not there."""
    root = synthetic.write("market", tmp_path, workers=1)
    (root / "SYNTHETIC").write_text('{"size": "small", "seed": 0, "version": 0}')
    whole = len(bytes_below(root))
    seen = []

    def removed(folder, **options):
        seen.append(
            (Path(folder).name, Path(folder).exists() and len(bytes_below(Path(folder))), len(bytes_below(root)))
        )
        return remove(folder, **options)

    remove = synthetic.shutil.rmtree
    monkeypatch.setattr(synthetic.shutil, "rmtree", removed)
    assert synthetic.write("market", tmp_path, workers=1) == root
    assert [(count, left) for name, count, left in seen if ".old." in name] == [(whole, whole)]
    assert sorted(path.name for path in root.parent.iterdir()) == [root.name]


@pytest.mark.parametrize(
    "name, size, seed, message",
    [
        ("markt", "small", 0, "choose from market"),
        ("market", "tiny", 0, "choose from small"),
        ("market", "small", -1, "negative"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, name, size, seed, message):
    with pytest.raises(ValueError, match=message):
        synthetic.write(name, tmp_path, size, seed)


def test_options_of_jpeg_go_to_jpeg_files_alone(tmp_path, monkeypatch, capfd):
    """RegDB's files are .bmp; OpenCV 5 warns once an image when a format is given options of another."""
    given, original = {}, cv2.imwrite

    def recorded(path, image, options):
        given.setdefault(Path(path).suffix, []).append(list(options))
        return original(path, image, options)

    monkeypatch.setattr(cv2, "imwrite", recorded)
    monkeypatch.setitem(layouts_vi.REGDB, "small", (4, 2))
    synthetic.write("regdb", tmp_path, workers=1)
    synthetic.write("market", tmp_path, workers=1)
    assert given[".bmp"] == [[]] * 16 and given[".jpg"] == [[cv2.IMWRITE_JPEG_QUALITY, 95]] * len(given[".jpg"])
    assert "unsupported" not in capfd.readouterr().err


def test_command_line_explains_wrong_names_in_one_line(tmp_path):
    for words in (
        ["nobody", "--out", str(tmp_path)],
        ["market", "--out", str(tmp_path), "--size", "huge"],
        ["sheet", "--out", str(tmp_path / "sheet.txt")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "common.synthetic", *words], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# counts as published with the data sets
FULL = {
    "market": {"bounding_box_train": 12936, "query": 3368, "bounding_box_test": 19732},
    "duke": {"bounding_box_train": 16522, "query": 2228, "bounding_box_test": 17661},
    "cuhk03": {
        "labeled/bounding_box_train": 7368,
        "labeled/query": 1400,
        "labeled/bounding_box_test": 5328,
        "detected/bounding_box_train": 7365,
        "detected/query": 1400,
        "detected/bounding_box_test": 5332,
    },
    "msmt17": {"train": 32621, "test": 11659 + 82161},
}
PEOPLE = {"market": (751, 750), "duke": (702, 702), "cuhk03": (767, 700), "msmt17": (1041, 3060)}


@pytest.mark.parametrize("name", FULL)
def test_full_plan_has_the_published_counts(name):
    items, texts = layouts.plan(name, "full", 0)
    depth = 2 if name == "cuhk03" else 1
    assert Counter("/".join(item.path.split("/")[:depth]) for item in items) == FULL[name]
    assert [item.path for item in items] == sorted({item.path for item in items})
    train = {item.person for item in items if "train" in item.path}
    test = {item.person for item in items if ("test" if name == "msmt17" else "query") in item.path}
    assert (len(train), len(test)) == PEOPLE[name] and not train & test
    if name == "market":
        gallery = [Path(item.path).name for item in items if item.path.startswith("bounding_box_test")]
        labels = Counter(path.split("_")[0] for path in gallery)
        assert (labels["0000"], labels["-1"], len(labels)) == (2798, 3819, 752)
    if name == "duke":
        assert len({item.person for item in items if item.path.startswith("bounding_box_test")}) == 1110
    if name == "msmt17":
        lines = {path: text.splitlines() for path, text in texts.items()}
        assert {path: len(text) for path, text in lines.items()} == {
            "list_train.txt": 30248,
            "list_val.txt": 2373,
            "list_query.txt": 11659,
            "list_gallery.txt": 82161,
        }
        listed = [f"train/{line.split()[0]}" for line in lines["list_train.txt"] + lines["list_val.txt"]]
        listed += [f"test/{line.split()[0]}" for line in lines["list_query.txt"] + lines["list_gallery.txt"]]
        assert sorted(listed) == [item.path for item in items]


@pytest.mark.parametrize("name", synthetic.names())
def test_medium_lies_between_small_and_full(name):
    def images(size):
        if name in street.ROOTS:
            return sum(street.SCENES[name, size])
        return len((synthetic.OWN[name].plan(size, 0) if name in synthetic.OWN else layouts.plan(name, size, 0))[0])

    small, medium = images("small"), images("medium")
    assert 3 * small < medium and medium < (1e9 if name == "market" else 25 * small)  # market's small is tiny here
    if name in FULL:
        items = layouts.plan(name, "medium", 0)[0]
        assert len({item.person for item in items if "train" in item.path}) == 200


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("name", FULL)  # SYSU-MM01 and RegDB name no queries: tests/test_dapg_data.py
def test_every_query_has_a_match_in_another_camera(name, size):
    items, texts = layouts.plan(name, size, 4)
    queries = (
        {f"test/{line.split()[0]}" for line in texts["list_query.txt"].splitlines()}
        if texts
        else {item.path for item in items if "query" in item.path}
    )
    gallery = {
        (item.path.split("/")[0] if name == "cuhk03" else "", item.person, item.source)
        for item in items
        if item.path not in queries and "train" not in item.path and item.kind in ("box", "tight")
    }
    for item in items:
        if item.path in queries:
            part = item.path.split("/")[0] if name == "cuhk03" else ""
            assert any(p == part and person == item.person and source != item.source for p, person, source in gallery)


def test_plan_differs_between_seeds_and_not_between_calls():
    assert layouts.plan("duke", "small", 5) == layouts.plan("duke", "small", 5)
    assert layouts.plan("duke", "small", 5) != layouts.plan("duke", "small", 6)


def test_spread_sums_and_respects_limits():
    for seed in range(20):
        counts = layouts.spread(np.random.default_rng(seed), 57, 10, 2, 7)
        assert counts.sum() == 57 and counts.min() >= 2 and counts.max() <= 7
    with pytest.raises(ValueError, match="cannot spread"):
        layouts.spread(np.random.default_rng(0), 71, 10, 2, 7)


def test_no_workers_means_no_extra_processes(tmp_path, monkeypatch):
    monkeypatch.setitem(street.SCENES, ("voc", "small"), (1, 0))
    for module in (street, synthetic):
        monkeypatch.setattr(module, "get_context", lambda *_: pytest.fail("started processes"))
    assert (synthetic.write("voc", tmp_path, workers=0) / "VOC2012" / "JPEGImages" / "2012_000001.jpg").is_file()
