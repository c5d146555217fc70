"""PRCC: its tree, both protocols against loops, and the synthetic people written in its layout."""

import json
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from common import datasets, synthetic
from common.datasets import prcc
from common.synthetic import layouts_prcc

TINY = layouts_prcc.Count(3, 2, (5, 4, 6), (3, 3, 3), (3, 4, 5))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Synthetic PRCC with few people."""
    before = dict(layouts_prcc.COUNTS)
    layouts_prcc.COUNTS["small"] = TINY
    try:
        yield synthetic.write("prcc", tmp_path_factory.mktemp("data"), workers=1)
    finally:
        layouts_prcc.COUNTS.update(before)


@pytest.fixture
def tree(root, tmp_path):
    """A copy that a test may change, without the mark of synthetic data."""
    copy = tmp_path / "prcc"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".reid_cache"))
    (copy / "SYNTHETIC").unlink()
    return copy


def test_folders_say_camera_clothes_and_split(root):
    data = datasets.load("prcc", root.parent)
    assert data.kind == "synthetic" and (len(data.train), len(data.query), len(data.gallery)) == (15, 9, 3)
    assert Counter(s.camid for s in data.train) == {0: 5, 1: 4, 2: 6}
    assert Counter(s.camid for s in data.query) == {1: 4, 2: 5} and {s.camid for s in data.gallery} == {0}
    for s in data.train + data.query + data.gallery:
        parts = s.path.split("/")
        letter = parts[-1][0] if "/train/" in s.path else parts[-3]
        assert "ABC"[s.camid] == letter and s.pid == int(parts[-2]) and s.clothes == (letter == "C") and s.mask is None
    assert not {s.pid for s in data.train} & {s.pid for s in data.query}
    relative = [s.path for s in data.query]
    assert relative == sorted(relative)


@pytest.mark.parametrize("mask_format, folder", [("part6", "mask"), ("atr18", "mask_atr18"), ("npy6", "mask_6")])
def test_masks_are_found_in_three_formats_and_missing_ones_are_none(tree, mask_format, folder):
    if mask_format == "npy6":  # the authors' folder beside or in the tree
        for path in sorted((tree / "mask/train").rglob("*.png")):
            out = tree.parent / "mask_6" / path.relative_to(tree / "mask").with_suffix(".npy")
            out.parent.mkdir(parents=True, exist_ok=True)
            np.save(out, np.eye(6, dtype=np.float32)[np.array(Image.open(path))])
    with pytest.warns(UserWarning, match="published"):
        data = datasets.load("prcc", tree.parent, mask_format=mask_format)
    assert all(folder in s.mask for s in data.train)
    Path(data.train[0].mask).unlink()
    with pytest.warns(UserWarning):
        again = datasets.load("prcc", tree.parent, mask_format=mask_format)
    assert again.train[0].mask is None and again.train[1].mask == data.train[1].mask


def test_counts_off_the_published_table_warn_or_with_strict_counts_raise(tree):
    with pytest.warns(
        UserWarning, match="train has 15 images, 3 ids, 3 cameras instead of the published 17896, 150, 3"
    ):
        datasets.load("prcc", tree.parent)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="published"):
        datasets.load("prcc", tree.parent, strict_counts=True)


@pytest.mark.filterwarnings("ignore:prcc under")
def test_what_is_wrong_with_a_tree_is_named(tree):
    with pytest.raises(ValueError, match="none of part6, atr18, npy6"):
        datasets.load("prcc", tree.parent, mask_format="lip")
    with pytest.raises(FileNotFoundError, match="no .*mask_6.* python -m pixel_sampling.parse"):
        datasets.load("prcc", tree.parent, mask_format="npy6")
    person = next((tree / "rgb/val").iterdir())
    person.rename(person.with_name("999"))
    with pytest.warns(UserWarning, match="differ in 2 people"):
        datasets.load("prcc", tree.parent)
    file = next((tree / "rgb/train").rglob("*.jpg"))
    file.rename(file.with_name("D_cropped_rgb001.jpg"))
    with pytest.raises(ValueError, match="D_cropped_rgb001.jpg"):
        datasets.load("prcc", tree.parent)
    (tree / "rgb/train" / "someone").mkdir()
    with pytest.raises(ValueError, match="someone: no folder of a person"):
        datasets.load("prcc", tree.parent)
    shutil.rmtree(tree / "rgb/test/B")
    shutil.rmtree(tree / "rgb/train/someone")
    file.with_name("D_cropped_rgb001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="no folder B"):
        datasets.load("prcc", tree.parent)
    with pytest.raises(FileNotFoundError, match="prcc: no rgb/train under"):
        datasets.load("prcc", tree.parent / "nowhere")


# ------------------------------------------------------------------------------------------------------------ protocols


def scores(seed, people=6):
    rng = np.random.default_rng(seed)
    gallery_pids = np.sort(np.concatenate([np.arange(people), rng.integers(0, people, 14)]))
    query_pids = rng.integers(0, people, 9)
    return (
        rng.normal(size=(9, 5)).astype(np.float32),
        rng.normal(size=(len(gallery_pids), 5)).astype(np.float32),
        query_pids,
        gallery_pids,
    )


def cosine(q, g):
    return 1 - (q / np.linalg.norm(q)) @ (g / np.linalg.norm(g))


@pytest.mark.parametrize("seed", range(3))
def test_multi_equals_the_loop_over_queries_and_never_drops_a_gallery_image(seed):
    query, gallery, query_pids, gallery_pids = scores(seed)
    firsts, precisions = [], []
    for q, pid in zip(query, query_pids):
        order = sorted(range(len(gallery)), key=lambda g: cosine(q, gallery[g]))
        hits = [rank for rank, g in enumerate(order, 1) if gallery_pids[g] == pid]
        firsts.append(hits[0])
        precisions.append(np.mean([n / rank for n, rank in enumerate(hits, 1)]))
    m = prcc.metrics(query, gallery, query_pids, gallery_pids, max_rank=5)
    assert m.mAP == pytest.approx(np.mean(precisions)) and m.num_valid == 9
    assert [m.rank(k) for k in (1, 3)] == pytest.approx([np.mean(np.array(firsts) <= k) for k in (1, 3)])


@pytest.mark.parametrize("seed", range(3))
def test_single10_equals_the_loop_over_trials(seed):
    query, gallery, query_pids, gallery_pids = scores(seed)
    ranks = []
    for chosen in prcc.single_shot_trials(gallery_pids):
        for q, pid in zip(query, query_pids):
            order = sorted(chosen, key=lambda g: cosine(q, gallery[g]))
            ranks.append([gallery_pids[g] for g in order].index(pid) + 1)
    m = prcc.single_shot_metrics(torch.from_numpy(query), torch.from_numpy(gallery), query_pids, gallery_pids)
    assert m.mrr == pytest.approx(np.mean(1 / np.array(ranks)))
    assert [m.rank(k) for k in (1, 2, 50)] == pytest.approx([np.mean(np.array(ranks) <= k) for k in (1, 2)] + [1.0])


def test_the_draw_is_one_image_of_each_person_and_repeats():
    gallery_pids = np.array([7, 3, 3, 9, 7, 3])
    draws = prcc.single_shot_trials(gallery_pids)
    assert draws.shape == (10, 3) and np.array_equal(gallery_pids[draws], np.tile([3, 7, 9], (10, 1)))
    assert np.array_equal(draws, prcc.single_shot_trials(gallery_pids)) and len(np.unique(draws, axis=0)) > 1


def test_equal_distances_go_to_the_lower_pid_and_lost_people_are_named():
    same = np.ones((1, 2), np.float32)
    assert prcc.single_shot_metrics(same, np.ones((2, 2), np.float32), [5], [4, 5]).rank(1) == 0
    assert prcc.single_shot_metrics(same, np.ones((2, 2), np.float32), [4], [4, 5]).rank(1) == 1
    with pytest.raises(ValueError, match="people .*8.* no gallery image"):
        prcc.single_shot_metrics(same, same, [8], [4])


# ------------------------------------------------------------------------------------------------------------ synthetic


def test_full_plan_has_the_published_counts_and_small_every_camera():
    items, _ = layouts_prcc.plan("full", 0)
    count = Counter(
        tuple(item.path.split("/")[1:3])
        if "/test/" in item.path
        else (item.path.split("/")[1], item.path.split("/")[-1][0])
        for item in items
    )
    assert {k: v for k, v in count.items() if k[0] != "val"} == {
        ("train", "A"): 5952,
        ("train", "B"): 5317,
        ("train", "C"): 6627,
        ("test", "A"): 3384,
        ("test", "B"): 3873,
        ("test", "C"): 3543,
    }
    assert len(items) == 33698 and sum(v for k, v in count.items() if k[0] == "val") == 5002
    people = {
        split: {i.person for i in items if i.path.startswith(f"rgb/{split}/")} for split in ("train", "val", "test")
    }
    assert (
        (len(people["train"]), len(people["test"])) == (150, 71)
        and people["val"] == people["train"]
        and not people["train"] & people["test"]
    )
    assert [item.path for item in items] == sorted({item.path for item in items})


def test_clothes_change_for_camera_c_and_nothing_else_does():
    for key in range(5):
        (one, first), (two, second) = (layouts_prcc.somebody(0, key, day) for day in (0, 1))
        assert one == two and first.upper != second.upper and first.lower != second.lower
    assert layouts_prcc.somebody(0, 1, 0) != layouts_prcc.somebody(1, 1, 0)


def test_masks_are_the_parsing_of_their_image(root):
    assert json.loads((root / "SYNTHETIC").read_text())["size"] == "small"
    images = sorted((root / "rgb").rglob("*.jpg"))
    assert len(images) == 15 + 9 + 12
    for image in images:
        relative = image.relative_to(root / "rgb").with_suffix(".png")
        six, atr = (np.array(Image.open(root / folder / relative)) for folder in ("mask", "mask_atr18"))
        assert six.shape == atr.shape == cv2.imread(str(image)).shape[:2]
        assert np.array_equal(np.array(prcc.ATR_TO_SIX, np.uint8)[atr], six)
        assert (six == 2).mean() > 0.02 and 0.1 < (six > 0).mean() < 0.9


def test_the_same_person_looks_alike_in_a_and_b_and_other_in_c(root):
    """Median colour of the upper garment: nearer between A and B than between A and C."""

    def colours(camera):
        found = {}
        for image in sorted((root / "rgb/test" / camera).rglob("*.jpg")):
            mask = np.array(Image.open(root / "mask" / image.relative_to(root / "rgb").with_suffix(".png")))
            found.setdefault(image.parent.name, []).append(np.median(np.array(Image.open(image))[mask == 2], axis=0))
        return {pid: np.mean(values, axis=0) for pid, values in found.items()}

    a, b, c = (colours(camera) for camera in "ABC")
    same, other = (np.mean([np.abs(a[pid] - x[pid]).mean() for pid in a]) for x in (b, c))
    assert same < other
