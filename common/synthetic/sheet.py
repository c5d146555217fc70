"""The contact sheet: one picture that shows people, cameras, clothes, labels, key points, infrared and heat."""

import colorsys
from math import pi
from pathlib import Path

import cv2
import numpy as np

from common.keypoints import ATR
from common.synthetic import identity as people
from common.synthetic import pose, render
from common.synthetic.camera import camera, look
from common.synthetic.layouts import generator

HEIGHT, WIDTH, COLUMNS = 144, 72, 12
BONES = (
    (5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12), (11, 12), (11, 13), (13, 15), (12, 14), (14, 16),
    (0, 5), (0, 6),
)  # fmt: skip


def palette() -> np.ndarray:
    """(18, 3) uint8: a colour for each parsing label, black for the background."""
    rows = [colorsys.hsv_to_rgb(i * 0.382 % 1, 0.75, 1.0 - 0.3 * (i % 2)) for i in range(len(ATR))]
    return (np.array(rows) * (np.arange(len(ATR)) > 0)[:, None] * 255).astype(np.uint8)


def overlay(image: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
    """A copy of the image (H, W, 3) with bones, seen points filled and hidden points as rings."""
    out = np.ascontiguousarray(image).copy()
    place = [(int(x), int(y)) for x, y, _ in keypoints]
    for one, two in BONES:
        if keypoints[one, 2] and keypoints[two, 2]:
            cv2.line(out, place[one], place[two], (255, 210, 60), 1, cv2.LINE_AA)
    for point, seen in zip(place, keypoints[:, 2]):
        if seen:
            colour, thickness = ((60, 255, 90), -1) if seen == 2 else ((255, 70, 60), 1)
            cv2.circle(out, point, 2, colour, thickness, cv2.LINE_AA)
    return out


def sheet(path: str | Path, seed: int = 0) -> Path:
    """Draws the sheet to `path` (suffix .jpg or .png) and returns it. Raises ValueError for other suffixes."""
    path = Path(path)
    if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise ValueError(f"{path}: the contact sheet is written as .jpg or .png")
    rows = [*_cameras(seed), _turning(seed), _clothes(seed), *_companions(seed)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), np.vstack(rows)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82]):
        raise OSError(f"could not write {path}; is the disk full?")
    return path


def _person(seed: int, key: int) -> people.Identity:
    return people.identity(generator(seed, 90, key))


def _cameras(seed: int) -> list[np.ndarray]:
    """Four people, each seen twice by six cameras."""
    cameras, rows = [camera(generator(seed, 91, index)) for index in range(6)], []
    for key in range(4):
        identity = _person(seed, key)
        outfit, row = people.outfit(identity, generator(seed, 92, key)), []
        for column in range(COLUMNS):
            walk = (seed, 93, key, column // 2)
            frame = generator(*walk, column % 2 + 1)
            view = look(cameras[column // 2], generator(*walk), frame, column % 2, HEIGHT, WIDTH)
            row.append(render.person(identity, outfit, view, cameras[column // 2], frame, companions=False).image)
        rows.append(np.hstack(row))
    return rows


def _plain(seed: int, identity: people.Identity, outfit: people.Outfit, yaw: float, phase: float) -> render.Rendered:
    view = pose.View(yaw=yaw, phase=phase, height=HEIGHT, width=WIDTH, top=0.03, bottom=0.03)
    source = camera(generator(seed, 91, 1))._replace(resolution=1.0, blur=0.0, noise=0.004, quality=92)
    return render.person(identity, outfit, view, source, generator(seed, 94))


def _turning(seed: int) -> np.ndarray:
    """One person from twelve directions."""
    identity = _person(seed, 4)._replace(bag="backpack")
    outfit = people.outfit(identity, generator(seed, 92, 4))
    return np.hstack(
        [_plain(seed, identity, outfit, column * 2 * pi / COLUMNS, column).image for column in range(COLUMNS)]
    )


def _clothes(seed: int) -> np.ndarray:
    """Four people with three outfits each: what changes and what stays."""
    images = []
    for key in range(5, 9):
        for day in range(3):
            outfit = people.outfit(_person(seed, key), generator(seed, 95, key, day))
            images.append(_plain(seed, _person(seed, key), outfit, 0.35, 0.9 + day).image)
    return np.hstack(images)


def _companions(seed: int) -> list[np.ndarray]:
    """Six people, two a row: seen from behind and in front, labels, key points, near infrared, heat."""
    tiles, colours = [], palette()
    for key in range(9, 15):
        outfit = people.outfit(_person(seed, key), generator(seed, 92, key))
        out = _plain(seed, _person(seed, key), outfit, 0.5 * (key - 11), 0.8 * key)
        tiles += [_plain(seed, _person(seed, key), outfit, 2.5, key).image, out.image, colours[out.parsing]]
        tiles += [overlay(out.image, out.keypoints)]
        tiles += [np.repeat(grey[..., None], 3, 2) for grey in (out.infrared, out.thermal)]
    return [np.hstack(tiles[start : start + COLUMNS]) for start in range(0, len(tiles), COLUMNS)]
