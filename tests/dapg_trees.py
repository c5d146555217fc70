"""Miniature trees of SYSU-MM01, RegDB, LUPerson and Market-1501's key points: striped pictures."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dapg.poses import pose


def picture(rng, stripes, infrared):
    """64 x 32: the person's stripes, in grey if infrared, with noise."""
    x = np.repeat(np.repeat(stripes, 16, 0), 32, 1).astype(float)
    x = x.mean(2, keepdims=True).repeat(3, 2) if infrared else x
    return Image.fromarray((x + rng.normal(0, 12, x.shape)).clip(0, 255).astype(np.uint8))


def people(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count + 1, 4, 1, 3))


def write_sysu(root: Path, train=8, val=2, test=4, images=3) -> Path:
    base, stripes, rng = root / "SYSU-MM01", people(train + val + test), np.random.default_rng(1)
    (base / "exp").mkdir(parents=True)
    groups = {
        "train_id": range(1, train + 1),
        "val_id": range(train + 1, train + val + 1),
        "test_id": range(train + val + 1, train + val + test + 1),
    }
    for name, ids in groups.items():
        (base / "exp" / f"{name}.txt").write_text(",".join(map(str, ids)) + "\n")
    for pid in range(1, train + val + test + 1):
        for camera in range(1, 7):
            folder = base / f"cam{camera}" / f"{pid:04d}"
            folder.mkdir(parents=True)
            for i in range(images + pid % 2):
                picture(rng, stripes[pid], camera in (3, 6)).save(folder / f"{i + 1:04d}.jpg")
    return root


def write_regdb(root: Path, people_count=12, images=3) -> Path:
    base, stripes, rng = root / "RegDB", people(people_count, 2), np.random.default_rng(2)
    (base / "idx").mkdir(parents=True)
    for word in ("Visible", "Thermal"):
        for pid in range(1, people_count + 1):
            (base / word / str(pid)).mkdir(parents=True)
            for i in range(images):
                picture(rng, stripes[pid], word == "Thermal").save(base / word / str(pid) / f"{i}.bmp")
    for split in range(1, 11):
        order = np.random.default_rng(split).permutation(people_count) + 1
        for part, ids in (("train", order[: people_count // 2]), ("test", order[people_count // 2 :])):
            for word in ("Visible", "Thermal"):
                lines = [
                    f"{word}/{pid}/{i}.bmp {label}\n" for label, pid in enumerate(sorted(ids)) for i in range(images)
                ]
                (base / "idx" / f"{part}_{word.lower()}_{split}.txt").write_text("".join(lines))
    return root


def write_luperson(root: Path, count=40) -> Path:
    stripes, rng = people(count, 3), np.random.default_rng(3)
    for i in range(count):
        folder = root / "LUPerson" / ("us" if i % 2 else "uk")
        folder.mkdir(parents=True, exist_ok=True)
        picture(rng, stripes[i], False).save(folder / f"us_nyc_{i % 7:04d}_{i:08d}.jpg")
    return root


def write_poses(market: Path) -> None:
    """poses.json beside a miniature Market-1501: the built-in poses, a little moved."""
    rng, canon = np.random.default_rng(4), pose.builtin()
    files = sorted((market / "bounding_box_train").glob("*.jpg"))
    poses = {}
    for i, file in enumerate(files):
        p = canon[i % 4].copy()
        p[:, :2] += rng.normal(0, 0.01, (18, 2)) * (p[:, 2:] > 0)
        poses[file.name] = p.tolist()
    (market / "poses.json").write_text(json.dumps(poses))
