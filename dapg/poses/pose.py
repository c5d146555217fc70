"""Poses (sec. II-B): 18 OpenPose key points of each image, their picture, and the four canonical poses of Fig. 4.

A pose is float32 (18, 3): x and y as shares of width and height, and a confidence, 0 for a missing joint. Order: nose,
neck, right shoulder, elbow, wrist, left ..., right hip, knee, ankle, left ..., right and left eye, right and left ear.
"""

import colorsys
import json
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from common import keypoints, pixels, runfiles
from common.datasets import lists
from common.keypoints import COCO, OPENPOSE
from common.synthetic import layouts

LIMBS = [(1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0)]
LIMBS += [(0, 14), (14, 16), (0, 15), (15, 17)]
BODY25 = (0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18)  # without mid-hip (8) and feet (19-24)
FACE = (0, 14, 15, 16, 17)
ENOUGH = 8  # joints without which an image is dropped
POSES = 4


def from_coco(points: np.ndarray) -> np.ndarray:
    """OpenPose's 18 points (18, 3) of COCO's 17 (17, 3); the neck lies between the shoulders if both are there."""
    place = {name: i for i, name in enumerate(COCO)}
    out = np.stack([points[place.get(name, 0)] for name in OPENPOSE])
    left, right = points[place["left_shoulder"]], points[place["right_shoulder"]]
    both = left[2] > 0 and right[2] > 0
    out[1] = [*(left[:2] + right[:2]) / 2, min(left[2], right[2])] if both else [0, 0, 0]
    return out


def from_openpose_json(path: Path, width: int, height: int) -> np.ndarray | None:
    """The first person of an OpenPose file, 18 points or BODY-25; None without a person. Raises: ValueError."""
    people = lists.read_json(path).get("people", [])
    if not people:
        return None
    values = np.array(people[0].get("pose_keypoints_2d", []), np.float32)
    if len(values) not in (54, 75):
        raise ValueError(f"{path}: {len(values)} numbers in pose_keypoints_2d, expected 54 (18 points) or 75 (BODY-25)")
    points = values.reshape(-1, 3)
    points = points[list(BODY25)] if len(points) == 25 else points
    return (points / [width, height, 1]).astype(np.float32)


def picture(pose: np.ndarray, height: int = 256, width: int = 128) -> np.ndarray:
    """The pose drawn on black, uint8 (H, W, 3): limbs of hue i/17, 4 px wide at 256 rows, joints of hue j/18, radius 3.

    The limbs' colours tell left from right. Missing joints and their limbs are not drawn.
    """
    out = np.zeros((height, width, 3), np.uint8)
    unit = height / 256
    at = [(int(round(x * (width - 1))), int(round(y * (height - 1)))) for x, y in pose[:, :2]]

    def colour(hue):
        return tuple(int(255 * value) for value in colorsys.hsv_to_rgb(hue, 1, 1))

    for i, (a, b) in enumerate(LIMBS):
        if pose[a, 2] > 0 and pose[b, 2] > 0:
            cv2.line(out, at[a], at[b], colour(i / 17), max(1, round(4 * unit)))
    for j in range(18):
        if pose[j, 2] > 0:
            cv2.circle(out, at[j], max(1, round(3 * unit)), colour(j / 18), -1)
    return out


def pictures(poses: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Pictures of poses (B, 18, 3) as uint8 (B, 3, H, W)."""
    return torch.from_numpy(np.stack([picture(p, height, width) for p in poses])).permute(0, 3, 1, 2).contiguous()


# --------------------------------------------------------------------------------------------------------- where from
def load(root: Path, paths: list[str], kind: str, weights: str, device) -> dict[str, np.ndarray]:
    """Pose of each image that has at least 8 joints: file name -> (18, 3); kept in root/poses.json.

    Sources in this order: root/poses.json; OpenPose files root/poses/<stem>_keypoints.json; the key points of synthetic
    people; torchvision's Keypoint R-CNN (`weights`: its checkpoint, or "download").
    """
    cache = Path(root) / "poses.json"
    if cache.is_file():
        return read(cache)
    if (Path(root) / "poses").is_dir():
        poses = openpose_folder(Path(root) / "poses", paths)
    elif kind == "synthetic":
        poses = synthetic(Path(root), paths)
    else:
        poses = detect(paths, weights, device)
    write(cache, poses)
    return {name: pose for name, pose in poses.items() if (pose[:, 2] > 0).sum() >= ENOUGH}


def read(path: Path) -> dict[str, np.ndarray]:
    """poses.json, images with fewer than 8 joints left out. Raises: ValueError naming what is wrong."""
    try:
        poses = {name: np.array(points, np.float32) for name, points in json.loads(path.read_text()).items()}
    except (json.JSONDecodeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no file of poses ({error}); delete it, the next run writes it again") from error
    wrong = [name for name, pose in poses.items() if pose.shape != (18, 3)]
    if wrong:
        shape = poses[wrong[0]].shape
        raise ValueError(f"{path}: {wrong[0]} has shape {shape}, expected 18 joints of x, y, confidence")
    return {name: pose for name, pose in poses.items() if (pose[:, 2] > 0).sum() >= ENOUGH}


def write(path: Path, poses: dict[str, np.ndarray]) -> None:
    text = json.dumps({name: np.round(pose, 4).tolist() for name, pose in sorted(poses.items())})
    runfiles.replace(path, lambda file: file.write(text.encode()))


def openpose_folder(folder: Path, paths: list[str]) -> dict[str, np.ndarray]:
    """OpenPose's files of the images, <stem>_keypoints.json or <stem>.json; images without one have no pose."""
    poses = {}
    for path in map(Path, paths):
        for name in (f"{path.stem}_keypoints.json", f"{path.stem}.json"):
            if (folder / name).is_file():
                pose = from_openpose_json(folder / name, *pixels.size(path))
                if pose is not None:
                    poses[path.name] = pose
    if not poses:
        raise ValueError(
            f"{folder} holds no OpenPose file of any image, expected names such as {Path(paths[0]).stem}_keypoints.json"
        )
    return poses


def synthetic(root: Path, paths: list[str]) -> dict[str, np.ndarray]:
    """Key points of synthetic Market-1501 images, from the renderer that drew them."""
    stamp = json.loads((root / "SYNTHETIC").read_text())
    items = {item.path: item for item in layouts.plan("market", stamp["size"], stamp["seed"])[0]}
    poses = {}
    for path in tqdm(paths, desc="key points", disable=None):
        drawn = layouts.draw("market", items[Path(path).relative_to(root).as_posix()], stamp["seed"])
        height, width = drawn.image.shape[:2]
        poses[Path(path).name] = (from_coco(drawn.keypoints) / [width, height, 1]).astype(np.float32)
    return poses


def detect(paths: list[str], weights: str, device, threshold: float = 0.0) -> dict[str, np.ndarray]:
    """Poses by torchvision's Keypoint R-CNN: the best-scored person, joints whose score (a logit) exceeds threshold."""
    model = detector(weights).to(device)
    poses = {}
    for path in tqdm(paths, desc="Keypoint R-CNN", disable=None):
        image = np.array(pixels.read(path))
        with torch.inference_mode():
            found = model([torch.from_numpy(image).permute(2, 0, 1).float().to(device) / 255])[0]
        if len(found["scores"]):
            pose = best_person(found, threshold)
            poses[Path(path).name] = (pose / [image.shape[1], image.shape[0], 1]).astype(np.float32)
    return poses


def detector(weights: str):
    """Keypoint R-CNN from a checkpoint file or, with "download", torchvision's own. Raises: as keypoints.detector."""
    if not weights:
        raise FileNotFoundError(
            "poses: the data set has no poses.json and no poses/ folder, so they must be detected: give --variant "
            "detector=PATH of torchvision's Keypoint R-CNN (COCO_V1), or detector=download"
        )
    return keypoints.detector(None if weights == "download" else weights, "--variant detector", min_size=512)


def best_person(found: dict, threshold: float) -> np.ndarray:
    """OpenPose points (18, 3) in pixels of the best-scored person in a detector's output."""
    best = int(found["scores"].argmax())
    points = found["keypoints"][best].cpu().numpy().astype(np.float32)
    points[:, 2] = found["keypoints_scores"][best].cpu().numpy() > threshold
    points[points[:, 2] == 0] = 0
    return from_coco(points)


# ---------------------------------------------------------------------------------------------------- canonical poses
def builtin() -> np.ndarray:
    """Front, back, right and left profile (4, 18, 3): the fallback where too few complete poses exist."""
    front = np.array([
        (0.50, 0.12), (0.50, 0.20), (0.38, 0.21), (0.33, 0.34), (0.31, 0.46), (0.62, 0.21), (0.67, 0.34),
        (0.69, 0.46), (0.42, 0.49), (0.42, 0.69), (0.42, 0.89), (0.58, 0.49), (0.58, 0.69), (0.58, 0.89),
        (0.47, 0.105), (0.53, 0.105), (0.43, 0.115), (0.57, 0.115)
    ])  # fmt: skip
    right = np.array([
        (0.58, 0.12), (0.48, 0.20), (0.49, 0.21), (0.45, 0.34), (0.52, 0.45), (0.47, 0.21), (0.53, 0.33),
        (0.60, 0.43), (0.50, 0.49), (0.58, 0.68), (0.55, 0.88), (0.49, 0.49), (0.44, 0.69), (0.33, 0.85),
        (0.56, 0.10), (0, 0), (0.49, 0.11), (0, 0)
    ])  # fmt: skip
    front, right = (np.column_stack([points, (points.sum(1) > 0)]) for points in (front, right))
    back = front.copy()
    back[:, 0] = 1 - back[:, 0]
    back[[0, 14, 15]] = 0
    swap = [0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16]
    left = right[swap].copy()
    left[:, 0] = np.where(left[:, 2] > 0, 1 - left[:, 0], 0)
    return np.stack([front, back, right, left]).astype(np.float32)


def canonical(poses: dict[str, np.ndarray], seed: int = 0) -> np.ndarray:
    """Four poses (4, 18, 3): medoids of k-means (10 restarts) over poses with a complete body.

    Poses are centred on the mid-hip, scaled by neck-hip length, and joined by which joints of the face are seen. The
    medoid is a real pose; a mean would be blurred. Fewer than 40 complete poses: the built-in four.
    """
    from sklearn.cluster import KMeans

    body = [i for i in range(18) if i not in FACE]
    whole = np.stack([p for _, p in sorted(poses.items()) if (p[body, 2] > 0).all()] or [np.zeros((18, 3))])
    if len(whole) < 10 * POSES:
        return builtin()
    middle = (whole[:, 8, :2] + whole[:, 11, :2]) / 2
    length = np.linalg.norm(whole[:, 1, :2] - middle, axis=1).clip(1e-3)
    shape = ((whole[:, body, :2] - middle[:, None]) / length[:, None, None]).reshape(len(whole), -1)
    points = np.column_stack([shape, whole[:, FACE, 2] > 0])
    fitted = KMeans(POSES, n_init=10, random_state=seed).fit(points)
    distance = np.linalg.norm(points[:, None] - fitted.cluster_centers_[None], axis=2)
    return whole[distance.argmin(0)]
