"""Poses: joint order, pictures, canonical poses, readers."""

import json
import re

import cv2
import numpy as np
import pytest

from common.keypoints import COCO, OPENPOSE
from dapg.poses import pose


def test_coco_maps_to_openpose_by_name():
    coco = np.array([[i, 10 * i, 1] for i in range(17)], np.float32)
    found = pose.from_coco(coco)
    for i, name in enumerate(OPENPOSE):
        if name != "neck":
            assert np.array_equal(found[i], coco[COCO.index(name)]), name
    assert np.array_equal(found[1], [5.5, 55, 1])
    coco[6, 2] = 0
    assert pose.from_coco(coco)[1, 2] == 0  # no neck without both shoulders


def test_missing_joints_and_their_limbs_are_not_drawn():
    front = pose.builtin()[0]
    whole = pose.picture(front)
    assert whole.shape == (256, 128, 3) and (whole.max(2) > 0).mean() > 0.02
    knee = front.copy()
    knee[9] = 0
    less = pose.picture(knee)
    x, y = (front[9, :2] * [127, 255]).round().astype(int)
    assert whole[y, x].any() and not less[y, x].any()
    assert not pose.picture(np.zeros((18, 3))).any()


def test_left_and_right_differ_in_colour_and_back_is_front_mirrored():
    front, back, right, left = pose.builtin()
    a, b = (tuple(pose.picture(front)[int(p[1] * 255), int(round(p[0] * 127))]) for p in (front[4], front[7]))
    assert a != b
    assert np.allclose(back[2, 0], 1 - front[2, 0]) and back[0, 2] == 0
    assert np.allclose(left[7, :2], [1 - right[4, 0], right[4, 1]]) and left[14, 2] == 0 and left[15, 2] == 1


def test_canonical_poses_are_real_ones_and_deterministic():
    rng, canon = np.random.default_rng(0), pose.builtin()
    poses = {}
    for i in range(80):
        p = canon[i % 4].copy()
        p[:, :2] += rng.normal(0, 0.004, (18, 2)) * (p[:, 2:] > 0)
        poses[f"{i}.jpg"] = p
    found = pose.canonical(poses)
    assert found.shape == (4, 18, 3) and np.array_equal(found, pose.canonical(poses))
    sources = [next(i for i, p in enumerate(poses.values()) if np.array_equal(p, f)) for f in found]
    assert {i % 4 for i in sources} == {0, 1, 2, 3}
    assert np.array_equal(pose.canonical(dict(list(poses.items())[:20])), canon)


@pytest.mark.parametrize("count", [18, 25])
def test_openpose_files_of_both_sizes_are_read(tmp_path, count):
    points = [[i, 2 * i, 0.5] for i in range(count)]
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"people": [{"pose_keypoints_2d": sum(points, [])}]}))
    found = pose.from_openpose_json(file, 64, 128)
    want = [points[i] for i in (pose.BODY25 if count == 25 else range(18))]
    assert np.allclose(found, np.array(want) / [64, 128, 1])
    file.write_text(json.dumps({"people": []}))
    assert pose.from_openpose_json(file, 64, 128) is None
    file.write_text(json.dumps({"people": [{"pose_keypoints_2d": [1, 2, 3]}]}))
    with pytest.raises(ValueError, match="3 numbers"):
        pose.from_openpose_json(file, 64, 128)


def test_a_wrong_file_of_poses_is_named(tmp_path):
    (tmp_path / "poses.json").write_text("{")
    with pytest.raises(ValueError, match="is no file of poses"):
        pose.load(tmp_path, [], "real", "", "cpu")
    (tmp_path / "poses.json").write_text('{"a.jpg": [[1, 2, 3]]}')
    with pytest.raises(ValueError, match="expected 18 joints"):
        pose.load(tmp_path, [], "real", "", "cpu")
    few = np.zeros((18, 3))
    few[:7] = 0.5
    pose.write(tmp_path / "poses.json", {"few.jpg": few, "all.jpg": pose.builtin()[0]})
    assert list(pose.read(tmp_path / "poses.json")) == ["all.jpg"]  # fewer than 8 joints are dropped


def test_without_key_points_the_detector_is_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="detector=PATH"):
        pose.load(tmp_path, ["a.jpg"], "real", "", "cpu")


def test_the_best_person_of_a_detection_keeps_joints_above_the_threshold():
    import torch

    keypoints = torch.ones(2, 17, 3)
    keypoints[1, :, 0] = torch.arange(17.0)
    scores = torch.full((2, 17), 3.0)
    scores[1, 15] = -1
    people = {"scores": torch.tensor([0.2, 0.9]), "keypoints": keypoints, "keypoints_scores": scores}
    found = pose.best_person(people, 0.0)
    assert found[OPENPOSE.index("left_ankle"), 2] == 0 and found[OPENPOSE.index("right_ankle"), 0] == 16


@pytest.mark.slow
def test_keypoint_rcnn_is_read_from_a_file_and_finds_what_it_finds(tmp_path):
    """The whole path of a detector's file, with random weights: the points of a found person lie in the picture."""
    import torch
    from torchvision.models import detection

    torch.manual_seed(0)
    network = detection.keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    older = {
        re.sub(r"(inner|layer)_blocks\.(\d)\.0\.", r"\1_blocks.\2.", key): value
        for key, value in network.state_dict().items()
    }  # the names in torchvision's own file
    torch.save(older, tmp_path / "detector.pth")
    for i in range(2):
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), np.random.default_rng(i).integers(0, 256, (128, 64, 3), np.uint8))
    found = pose.detect([str(tmp_path / f"{i}.jpg") for i in range(2)], str(tmp_path / "detector.pth"), "cpu", -1e9)
    assert sorted(found) == ["0.jpg", "1.jpg"]
    for points in found.values():
        assert points.shape == (18, 3) and points[:, :2].min() >= 0 and points[:, :2].max() <= 1.01
        assert (points[:, 2] == 1).all()


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "--variant detector: no file .*gone.pth; get https"),
        (b"text", "detector: .*gone.pth is not a readable"),
        ({"a": 1}, "gone.pth does not fit torchvision's keypointrcnn_resnet50_fpn"),
        ([1], "gone.pth does not fit"),
    ],
)
def test_a_file_that_is_no_detector_is_named(tmp_path, content, message):
    import torch

    path = tmp_path / "gone.pth"
    if content is not None:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        pose.detector(str(path))
