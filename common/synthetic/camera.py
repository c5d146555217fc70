"""Cameras: where they look, how they see people (`look`), and what they do to a picture (`expose`).

CAMERA_STRENGTH is the one number that scales how far cameras differ in colour, exposure and contrast: at 0 all cameras
see the same colours, at 1 raw colours no longer match between cameras.
"""

from math import exp, pi
from typing import NamedTuple

import cv2
import numpy as np

from common.synthetic.pose import View

CAMERA_STRENGTH = 0.2


class Camera(NamedTuple):
    """A fixed camera. Colours: out = contrast * (gains * in ** gamma * exposure - 0.5) + 0.5, after `saturation`."""

    scenes: tuple[int, ...]  # seeds of its viewpoints
    gains: tuple[float, float, float]
    gamma: float
    exposure: float
    contrast: float
    saturation: float
    resolution: float  # share of the output resolution that the sensor resolves
    blur: float  # pixels at 128 rows
    noise: float  # deviation, of 1
    quality: int  # of its JPEG stream
    pitch: float  # radians downwards
    directions: tuple[float, ...]  # in which people walk here (yaw)
    light: tuple[float, float, float]
    clutter: float  # probability of something in front


def camera(rng: np.random.Generator) -> Camera:
    """Draws a camera."""
    s = CAMERA_STRENGTH
    warm, green = rng.normal(0, 0.11 * s), rng.normal(0, 0.05 * s)
    path = rng.uniform(-pi, pi)
    side = rng.choice([-1, 1]) * rng.uniform(0.3, 1.0)
    return Camera(
        scenes=tuple(int(value) for value in rng.integers(2**31, size=3)),
        gains=(exp(warm), exp(green), exp(-warm)),
        gamma=exp(rng.normal(0, 0.20 * s)),
        exposure=exp(rng.normal(0, 0.16 * s)),
        contrast=exp(rng.normal(-0.05, 0.15 * s)),
        saturation=float(np.clip(1 - abs(rng.normal(0, 0.25 * s)), 0.4, 1)),
        resolution=rng.uniform(0.72, 1.0),
        blur=rng.uniform(0.0, 0.55),
        noise=rng.uniform(0.004, 0.016),
        quality=int(rng.integers(60, 92)),
        pitch=rng.uniform(0.05, 0.32),
        directions=(path, path + pi, path + rng.uniform(0.6, 2.5)),
        light=(float(side), -0.6, float(rng.uniform(0.5, 0.9))),
        clutter=float(rng.uniform(0.02, 0.12)),
    )


def look(
    source: Camera,
    track: np.random.Generator,
    frame: np.random.Generator,
    index: float,
    height: int,
    width: int,
    jitter: float = 1.0,
) -> View:
    """View of frame `index` of one walk past `source`.

    `track` decides what the frames of the walk share (direction, arms, place, light), `frame` what differs (box
    jitter, occluders); `jitter` scales the detector's errors. Give `track` freshly seeded for each frame.
    """
    yaw = source.directions[int(track.choice(len(source.directions), p=(0.45, 0.35, 0.2)))] + track.normal(0, 0.2)
    standing = track.random() < 0.12
    arms = tuple(str(track.choice(["swing", "pocket", "phone", "carry"], p=(0.74, 0.10, 0.06, 0.10))) for _ in "lr")
    phase, step = track.uniform(0, 2 * pi), track.uniform(0.35, 0.9)
    place, drift = track.uniform(0.02, 0.98, 2), track.normal(0, 0.012)
    head_yaw, zoom = track.normal(0, 0.22), track.uniform(0.8, 1.3)
    exposure = exp(track.normal(0, 0.07 * CAMERA_STRENGTH))
    loose, clutter = track.uniform(0.0, 0.045), track.random() < source.clutter
    kind = str(track.choice(["pole", "bicycle", "box", "person"]))
    company, viewpoint = track.random() < 0.08, int(track.integers(len(source.scenes)))
    miss = frame.random() < 0.07 * jitter
    return View(
        yaw=float(yaw + frame.normal(0, 0.06)),
        phase=float(phase + step * index + frame.normal(0, 0.15)),
        stride=0.15 if standing else 1.0,
        arms=arms,
        head_yaw=float(head_yaw + frame.normal(0, 0.1)),
        pitch=source.pitch,
        light=source.light,
        height=height,
        width=width,
        centre=float(frame.normal(0, 0.045 * jitter)),
        top=float(loose + frame.normal(0, 0.015 * jitter)),
        bottom=float(-frame.uniform(0.05, 0.22) if miss else loose + frame.normal(0, 0.015 * jitter)),
        scene=(viewpoint, float(place[0] + drift * index), float(place[1]), float(zoom)),
        exposure=float(exposure),
        occluder=kind if clutter and frame.random() < 0.6 else "none",
        companion=bool(company),
    )


def expose(
    image: np.ndarray, source: Camera, exposure: float, size: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """What `source` records of float32 image (h, w, 3) in [0, 1]: uint8 (height, width, 3), size (width, height)."""
    width, height = size
    sensed = (max(int(width * source.resolution), 8), max(int(height * source.resolution), 16))
    small = cv2.resize(image, sensed, interpolation=cv2.INTER_AREA)
    if source.blur > 0.15:
        small = cv2.GaussianBlur(small, (0, 0), source.blur * height / 128)
    grey = small @ np.array([0.299, 0.587, 0.114], np.float32)
    small = grey[..., None] + source.saturation * (small - grey[..., None])
    small = np.power(np.clip(small, 0, 1), np.float32(source.gamma)) * np.array(source.gains, np.float32)
    small = source.contrast * (small * (source.exposure * exposure) - 0.5) + 0.5
    small += rng.normal(0, 1, small.shape[:2])[..., None].astype(np.float32) * source.noise
    small += rng.normal(0, 1, small.shape).astype(np.float32) * (0.5 * source.noise)
    out = (np.clip(small, 0, 1) * 255 + 0.5).astype(np.uint8)
    if sensed != size:
        out = cv2.resize(out, size, interpolation=cv2.INTER_LINEAR)
    return out


def stream(image: np.ndarray, quality: int) -> np.ndarray:
    """The uint8 image (h, w, 3) after JPEG at `quality`."""
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]
