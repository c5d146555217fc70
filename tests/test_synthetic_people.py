"""common.synthetic draws people: shapes, key points, parsings, infrared and heat agree with the image."""

import re
from collections import Counter
from math import pi
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import synthetic
from common.keypoints import ATR, COCO
from common.synthetic import identity as people
from common.synthetic import infrared, layouts_vi, render
from common.synthetic.camera import camera, look
from common.synthetic.pose import View
from dapg.untrained import Gradients

ROOT = Path(__file__).resolve().parents[1]


def dressed(key: int) -> tuple[people.Identity, people.Outfit]:
    identity = people.identity(np.random.default_rng(key))
    return identity, people.outfit(identity, np.random.default_rng(1000 + key))


def shot(identity, outfit, view=View(), key=0, **options) -> render.Rendered:
    eye = camera(np.random.default_rng(77))
    return render.person(identity, outfit, view, eye, np.random.default_rng(key), **options)


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


def test_the_two_cameras_of_regdb_share_a_walk_but_neither_its_moments_nor_the_frame_around_it(tmp_path, monkeypatch):
    """Outlines say something, as they do in the real set, and pairs are no twins that nothing has to be learnt for."""
    monkeypatch.setitem(layouts_vi.REGDB, "small", (48, 4))
    unlearnt = Gradients()
    visible, thermal = (layouts_vi.eye("regdb", key, 0) for key in (0, 1))
    assert visible.pitch == thermal.pitch and visible.scenes != thermal.scenes
    root, found = synthetic.write("regdb", tmp_path, workers=1), {}
    names = {
        word: [root / word / str(pid) / f"{word[0].lower()}_{pid:05d}_{i}.bmp" for pid in range(1, 49) for i in (1, 2)]
        for word in ("Visible", "Thermal")
    }
    images = [torch.from_numpy(np.stack([cv2.imread(str(file)) for file in names[word]])) for word in names]
    for part in ("whole", "around"):
        visible, thermal = (unlearnt.pooled(each.permute(0, 3, 1, 2), None) for each in images)
        nearest = (F.normalize(visible) @ F.normalize(thermal).T).argmax(1)
        found[part] = (nearest // 2 == torch.arange(96) // 2).float().mean().item()
        for each in images:
            each[:, 8:-8, 8:-8] = 128
    assert 0.1 < found["whole"] < 0.45 and found["around"] < 0.12, found  # chance 0.02, twins 0.9 and more


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
