"""common.synthetic: determinism, layouts and counts, atomic writing, and companions that agree with the image."""

import json
import platform
import re
import subprocess
import sys
from collections import Counter
from math import pi
from pathlib import Path

import cv2
import numpy as np
import pytest

from common import synthetic
from common.keypoints import ATR, COCO
from common.synthetic import identity as people
from common.synthetic import infrared, layouts, layouts_vi, render, street
from common.synthetic.camera import camera, look
from common.synthetic.pose import View

ROOT = Path(__file__).resolve().parents[1]
TINY = layouts.Count(train_ids=4, test_ids=3, train_pairs=8, query=6, train=12, gallery=8, distractors=2, junk=2)


@pytest.fixture(autouse=True)
def tiny_counts(monkeypatch):
    """`small` market with few images, so that writing takes a second; the other sizes keep their counts."""
    monkeypatch.setitem(layouts.COUNTS, ("market", "small"), TINY)


def bytes_below(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def dressed(key: int) -> tuple[people.Identity, people.Outfit]:
    identity = people.identity(np.random.default_rng(key))
    return identity, people.outfit(identity, np.random.default_rng(1000 + key))


def shot(identity, outfit, view=View(), key=0, **options) -> render.Rendered:
    eye = camera(np.random.default_rng(77))
    return render.person(identity, outfit, view, eye, np.random.default_rng(key), **options)


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


def test_shapes_and_types_are_as_documented():
    out = shot(*dressed(1), View(height=200, width=90))
    assert (out.image.shape, out.image.dtype) == ((200, 90, 3), np.uint8)
    assert (out.parsing.shape, out.parsing.dtype) == ((200, 90), np.uint8)
    assert (out.keypoints.shape, out.keypoints.dtype) == ((17, 3), np.float32)
    assert out.infrared.shape == out.thermal.shape == (200, 90)
    assert out.infrared.dtype == out.thermal.dtype == np.uint8
    assert out.parsing.max() < len(ATR) == 18
    assert shot(*dressed(1), companions=False).infrared is None


def test_seen_key_points_lie_on_their_own_parts():
    upper, bags = {4, 7, 17}, {16}
    legs = {5, 6, 7, 4, 12, 13, 9, 10}
    belongs = {
        "nose": {11, 3, 2},
        "eye": {11, 3, 2, 1},
        "ear": {11, 2, 1, 3},
        "shoulder": upper | {14, 15, 11, 2} | bags,
        "elbow": upper | {14, 15},
        "wrist": upper | {14, 15},
        "hip": upper | legs | {8} | bags,
        "knee": legs,
        "ankle": legs,
    }
    wrong = seen = 0
    for key in range(40):
        view = View(yaw=key * pi / 8, phase=key * 0.7, height=384, width=192)
        out = shot(*dressed(key), view, companions=False)
        for name, (x, y, visible) in zip(COCO, out.keypoints):
            if visible == 2:
                seen += 1
                wrong += int(out.parsing[int(y), int(x)]) not in belongs[name.split("_")[-1]]
    assert seen > 40 * 8 and wrong <= 0.01 * seen


def test_left_is_left_and_faces_are_seen_only_from_the_front():
    identity, outfit = dressed(3)
    outfit = outfit._replace(hat=None)
    front = shot(identity, outfit, View(yaw=0.0, stride=0.0), companions=False)
    back = shot(identity, outfit, View(yaw=pi, stride=0.0), companions=False)
    names = list(COCO)
    for joint in ("shoulder", "hip", "knee", "ankle"):
        left, right = names.index(f"left_{joint}"), names.index(f"right_{joint}")
        assert front.keypoints[left, 0] > front.keypoints[right, 0]
        assert back.keypoints[left, 0] < back.keypoints[right, 0]
    assert (front.keypoints[:3, 2] == 2).all() and (back.keypoints[:3, 2] < 2).all()
    shoes = [np.nonzero(front.parsing == label)[1].mean() for label in (9, 10)]
    assert shoes[0] > shoes[1]


def test_parsing_covers_the_person_and_nothing_else():
    identity, outfit = dressed(8)
    plain = camera(np.random.default_rng(5))._replace(resolution=1.0, blur=0.0, noise=0.0)
    one, two = (
        render.person(
            identity._replace(skin=tone, hair=tone),
            outfit,
            View(),
            plain,
            np.random.default_rng(1),
            compress=False,
            companions=False,
        )
        for tone in ((0.9, 0.7, 0.6), (0.3, 0.2, 0.15))
    )
    changed = (one.image.astype(int) - two.image).any(-1)
    bare = np.isin(one.parsing, (2, 11, 12, 13, 14, 15))
    near = cv2.dilate(bare.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    assert np.array_equal(one.parsing, two.parsing)
    assert changed[bare].mean() > 0.95 and not changed[~near].any()


def test_change_of_clothes_keeps_hair_face_and_shoes():
    identity, first = dressed(12)
    second = people.outfit(identity, np.random.default_rng(4))._replace(hat=None, scarf=None)
    first = first._replace(hat=None, scarf=None)
    assert first.upper.colour != second.upper.colour
    one, two = (shot(identity, outfit, companions=False, compress=False) for outfit in (first, second))
    for labels in ((2,), (11,), (9, 10)):
        both = np.isin(one.parsing, labels) & np.isin(two.parsing, labels)
        either = np.isin(one.parsing, labels) | np.isin(two.parsing, labels)
        assert both.sum() > 0.6 * either.sum() > 0
        inner = cv2.erode(both.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        assert np.abs(one.image[inner].astype(int) - two.image[inner]).mean() < 6
    cloth = np.isin(one.parsing, (4, 7)) & np.isin(two.parsing, (4, 7))
    assert np.abs(one.image[cloth].astype(int) - two.image[cloth]).mean() > 12


def dyed(outfit: people.Outfit, colour, second=None) -> people.Outfit:
    """The outfit in other colours; with a second one in checks, else plain."""
    changed = {"colour": colour, "second": second or colour, "pattern": "checks" if second else "plain"}
    return outfit._replace(
        **{part: getattr(outfit, part)._replace(**changed) for part in ("upper", "inner", "lower")}, scarf=None
    )


def test_infrared_does_not_know_the_hue_of_cloth_and_thermal_no_colour_at_all():
    for key in range(6):
        identity, outfit = dressed(20 + key)
        red, green = (shot(identity, dyed(outfit, colour)) for colour in ((0.7, 0.2, 0.3), (0.2, 0.7, 0.3)))
        assert np.abs(red.image.astype(int) - green.image).max() > 20
        assert np.abs(red.infrared.astype(int) - green.infrared).max() <= 1  # rounding of the mean of the channels
        bright = shot(identity, dyed(outfit, (0.9, 0.9, 0.9), (0.1, 0.1, 0.1)))
        assert np.array_equal(red.thermal, green.thermal) and np.array_equal(red.thermal, bright.thermal)


def test_infrared_sees_a_part_of_how_dark_cloth_is_and_so_its_pattern():
    identity, outfit = dressed(31)
    black, white, checks = (
        shot(identity, dyed(outfit._replace(hat=None), *colours))
        for colours in (((0.1,) * 3,), ((0.9,) * 3,), ((0.9,) * 3, (0.1,) * 3))
    )
    cloth = cv2.erode((white.parsing == 4).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    means = [picture.infrared[cloth].mean() for picture in (black, checks, white)]
    assert means[0] < means[1] < means[2]
    kept = 1 - infrared.PIGMENT
    assert means[0] / means[2] == pytest.approx((kept + 0.1 * (1 - kept)) / (kept + 0.9 * (1 - kept)), abs=0.05)
    assert (checks.infrared[cloth] / white.infrared[cloth].astype(float)).std() > 0.05  # the folds are in both


def test_what_the_eye_sees_of_a_garment_says_something_about_its_infrared_and_its_heat():
    """Otherwise nothing but the outline of a stranger could be found again in the other modality."""
    seen = []
    for key in range(60):
        picture = shot(*dressed(200 + key), View(height=128, width=64), key)
        cloth = picture.parsing == 4
        if cloth.sum() > 60:
            seen.append((picture.image[cloth].mean(), picture.infrared[cloth].mean()))
    assert 0.5 < np.corrcoef(np.array(seen).T)[0, 1] < 0.85
    assert all(max(Counter(fabrics).values()) >= 3 for fabrics in people.FABRICS.values())  # of five: the cut tells it


def test_the_two_cameras_of_regdb_see_people_from_one_side_and_before_their_own_backgrounds(tmp_path, monkeypatch):
    """The frame around people says nothing: pairs taken at once would be found by it alone."""
    monkeypatch.setitem(layouts_vi.REGDB, "small", (24, 4))
    visible, thermal = (layouts_vi.eye("regdb", key, 0) for key in (0, 1))
    assert (visible.directions, visible.pitch) == (thermal.directions, thermal.pitch)
    assert visible.scenes != thermal.scenes
    root, features = synthetic.write("regdb", tmp_path, workers=1), {}
    for word in ("Visible", "Thermal"):
        files = [
            root / word / str(pid) / f"{word[0].lower()}_{pid:05d}_{i}.bmp" for pid in range(1, 25) for i in (1, 2)
        ]
        grey = np.stack([cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) for file in files]).astype(np.float32)
        edges = np.abs(np.diff(grey, axis=2))
        edges[:, 8:-8, 8:-9] = 0
        edges = edges.reshape(len(files), -1)
        features[word] = (edges - edges.mean(0)) / np.linalg.norm(edges - edges.mean(0), axis=1, keepdims=True)
    found = (features["Visible"] @ features["Thermal"].T).argmax(1)
    assert (found // 2 == np.arange(48) // 2).mean() < 0.2  # chance 0.04; 0.9 and more where pairs are taken at once


def test_infrared_knows_the_fabric_and_thermal_the_skin():
    identity, outfit = dressed(31)
    outfit = outfit._replace(hat=None, scarf=None)
    pictures = [shot(identity, outfit._replace(upper=outfit.upper._replace(fabric=fabric))) for fabric in (0, 4)]
    cloth = pictures[0].parsing == 4
    assert pictures[0].infrared[cloth].mean() > pictures[1].infrared[cloth].mean() + 30
    heat, parsing = pictures[0].thermal.astype(float), pictures[0].parsing
    assert heat[parsing == 11].mean() > heat[cloth].mean() + 10 > heat[parsing == 0].mean() + 20
    assert infrared.shown(np.array([infrared.COLD, infrared.HOT])).tolist() == [0, 255]


def test_occluders_remove_labels_and_hide_key_points():
    identity, outfit = dressed(2)
    free, hidden = (shot(identity, outfit, View(occluder=kind), key=3) for kind in ("none", "box"))
    assert (hidden.parsing > 0).sum() < 0.95 * (free.parsing > 0).sum()
    assert (hidden.keypoints[:, 2] == 2).sum() < (free.keypoints[:, 2] == 2).sum()
    assert np.allclose(hidden.keypoints[:, :2], free.keypoints[:, :2])


def test_cut_off_boxes_mark_key_points_outside():
    out = shot(*dressed(2), View(bottom=-0.3), companions=False)
    assert (out.keypoints[15:, 2] == 0).all() and (out.keypoints[15:, 1] >= 128).all()


def test_frames_of_one_walk_are_nearer_to_each_other_than_to_another_walk():
    identity, outfit = dressed(40)
    eye = camera(np.random.default_rng(6))

    def frame(walk: int, index: int) -> np.ndarray:
        view = look(eye, np.random.default_rng(walk), np.random.default_rng([walk, index + 1]), index, 128, 64)
        out = render.person(identity, outfit, view, eye, np.random.default_rng([walk, index + 9]), companions=False)
        return cv2.GaussianBlur(out.image, (0, 0), 3).astype(float)

    for walk in range(3):
        within = np.abs(frame(walk, 0) - frame(walk, 1)).mean()
        across = np.mean([np.abs(frame(walk, 0) - frame(other, 0)).mean() for other in range(20, 26)])
        assert within < across


def test_drawing_uses_no_global_randomness():
    for path in sorted((ROOT / "common" / "synthetic").glob("*.py")):
        text = path.read_text()
        assert not re.search(r"^\s*(import random|from random)", text, re.M), path
        assert not re.search(r"np\.random\.(seed|rand|randn|randint|uniform|normal|choice)\b", text), path


def test_no_workers_means_no_extra_processes(tmp_path, monkeypatch):
    monkeypatch.setitem(street.SCENES, ("voc", "small"), (1, 0))
    for module in (street, synthetic):
        monkeypatch.setattr(module, "get_context", lambda *_: pytest.fail("started processes"))
    assert (synthetic.write("voc", tmp_path, workers=0) / "VOC2012" / "JPEGImages" / "2012_000001.jpg").is_file()
