"""Backgrounds: one wide painted scene per camera viewpoint, from which every box cuts its own piece.

The upper part is a wall, a shop, a hedge, a hall or a street; the lower part is ground in perspective. Beside its
colours a scene holds how its surfaces look in near infrared (plants bright) and how warm they are.
"""

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from common.synthetic.canvas import noise

HEIGHT, WIDTH, BASE = 760, 1400, 300  # pixels; BASE is the row where the ground begins
KINDS = ("street", "plaza", "grass", "indoor", "campus", "shops")


HAZE = 0.55  # how far backgrounds fade to one grey: at 0 an untrained network sees the place before the person


class Scene(NamedTuple):
    """All (HEIGHT, WIDTH): image uint8 x 3, infrared uint8, temperature float16 (degrees Celsius)."""

    image: np.ndarray
    infrared: np.ndarray
    temperature: np.ndarray


def _grey(rng: np.random.Generator, low: float, high: float, tint: float = 0.012) -> np.ndarray:
    return np.clip(rng.uniform(low, high) + rng.normal(0, tint, 3), 0.02, 0.98).astype(np.float32)


def _ground(rng: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Ground colour (h, WIDTH, 3) float32 and how much of it is plants (h, WIDTH)."""
    rows = np.arange(HEIGHT - BASE, dtype=np.float32)[:, None]
    depth = 260.0 / (rows + 130.0)
    across = (np.arange(WIDTH, dtype=np.float32) - WIDTH * rng.uniform(0.2, 0.8)) * depth
    along = depth * 900
    rough = noise(across * 3 + 11, along * 3) * 0.5 + noise(across * 0.6, along * 0.6 + 90)
    plants = np.zeros_like(rough)
    if kind == "grass":
        base = np.array([0.37, 0.42, 0.26], np.float32) * rng.uniform(0.9, 1.15)
        colour = base * (1 + 0.07 * rough[..., None])
        edge = 60 * rng.uniform(-2, 2)
        path = np.abs(across + 0.3 * along * rng.uniform(-1, 1) - edge) < rng.uniform(60, 130)
        colour = np.where(path[..., None], _grey(rng, 0.45, 0.65), colour)
        plants = 1.0 - path
    else:
        colour = _grey(rng, 0.47, 0.58) * np.ones((*rough.shape, 1), np.float32)
        tile = {"street": 400.0, "plaza": 46.0, "indoor": 70.0, "campus": 58.0, "shops": 38.0}[kind]
        tile *= rng.uniform(0.8, 1.3)
        column, row = np.floor(across / tile), np.floor(along / (tile * rng.uniform(0.7, 1.5)))
        shade = noise(column * 37 + 5, row * 53 + 9) * (0.05 if kind != "indoor" else 0.03)
        if kind == "plaza" and rng.random() < 0.6:
            shade = shade + 0.13 * ((column + row) % 2)
        joint = (across / tile - column < 2.0 / tile) | (along / tile % 1 < 3.0 / tile)
        colour = colour * (1 + shade + 0.035 * rough - 0.16 * joint)[..., None]
        if kind == "street":
            line = np.abs(across - rng.uniform(-150, 150) + along * rng.uniform(-0.5, 0.5)) < 9
            colour = np.where(line[..., None], np.float32(0.82), colour)
    return colour.astype(np.float32), plants.astype(np.float32)


def _wall(rng: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Upper part (BASE, WIDTH, 3) float32 and its plants."""
    xs, ys = np.arange(WIDTH, dtype=np.float32)[None], np.arange(BASE, dtype=np.float32)[:, None]
    plants = np.zeros((BASE, WIDTH), np.float32)
    if kind == "grass":
        leaves = noise(xs * 1.7, ys * 2.1) + 0.7 * noise(xs * 0.4 + 60, ys * 0.4)
        colour = np.array([0.29, 0.35, 0.23], np.float32) * (1 + 0.14 * leaves[..., None])
        return np.clip(colour, 0.02, 1), plants + 1
    colour = _grey(rng, 0.48, 0.62, 0.015) * np.ones((BASE, WIDTH, 1), np.float32)
    if kind in ("street", "campus"):
        brick = (ys % 12 < 2) | ((xs + 13 * (np.floor(ys / 12) % 2)) % 26 < 2)
        tint = np.array([0.50, 0.37, 0.31], np.float32) if rng.random() < 0.5 else _grey(rng, 0.5, 0.62, 0.02)
        colour = tint * (1 + 0.06 * noise(np.floor(xs / 26) * 31 + ys * 0, np.floor(ys / 12) * 17)[..., None])
        colour = colour * (1 - 0.18 * brick[..., None])
    pitch, wide = rng.uniform(150, 260), rng.uniform(0.4, 0.75)
    cell, place = np.floor(xs / pitch), xs % pitch / pitch
    tall = (ys > rng.uniform(20, 70)) & (ys < rng.uniform(170, 290 if kind in ("shops", "indoor") else 215))
    window = (place < wide) & tall
    frame = window & ((place < 0.02) | (place > wide - 0.02) | (np.abs(place - wide / 2) < 0.01))
    glow = _grey(rng, 0.3, 0.45, 0.015) if kind != "indoor" else _grey(rng, 0.6, 0.85)
    glass = glow * (1 + 0.18 * noise(xs * 0.5 + cell * 40, ys * 0.7)[..., None])
    colour = np.where(window[..., None], glass, colour)
    colour = np.where(frame[..., None], _grey(rng, 0.2, 0.9), colour)
    if kind == "shops":
        sign = (ys < 26) & (place < wide + 0.1)
        shades = np.stack([0.5 + 0.35 * noise(cell * 71 + 30 * i, cell * 0 + 13 * i + ys * 0) for i in range(3)], -1)
        colour = np.where(sign[..., None], np.clip(shades, 0.05, 0.95), colour)
    if kind in ("campus", "plaza"):
        bush = (ys > 225 + 16 * noise(xs * 0.8, ys * 0)) & (noise(xs * 0.12 + 33, ys * 0) > -0.4)
        leaf = np.array([0.29, 0.35, 0.23], np.float32) * (1 + 0.14 * noise(xs * 2, ys * 2)[..., None])
        colour, plants = np.where(bush[..., None], leaf, colour), bush.astype(np.float32)
    return colour.astype(np.float32), plants


def _furnish(rng: np.random.Generator, image: np.ndarray, kind: str) -> None:
    """Draws parked cars, poles, benches and bicycles into the float image, far to near."""
    for _ in range(int(rng.integers(3, 8))):
        x, y = int(rng.uniform(0, WIDTH)), BASE + int(rng.uniform(5, 70))
        colour = tuple(float(value) for value in _grey(rng, 0.25, 0.7, 0.06))
        choice = rng.random()
        if kind == "street" and choice < 0.6:
            _car(image, x, y, colour)
        elif choice < 0.5:
            cv2.line(image, (x, y), (x, 0), colour, 9, cv2.LINE_AA)
        elif choice < 0.75:
            cv2.rectangle(image, (x, y - 60), (x + 120, y - 46), colour, -1, cv2.LINE_AA)
            for leg in (8, 108):
                cv2.line(image, (x + leg, y - 50), (x + leg, y), colour, 6, cv2.LINE_AA)
        elif kind != "indoor":
            bicycle(image, x, y, 62, (0.08, 0.08, 0.09), colour)


def _car(image: np.ndarray, x: int, y: int, colour) -> None:
    body = np.array([(0, 0), (0, -46), (40, -62), (80, -112), (210, -112), (262, -62), (320, -52), (326, 0)]) + (x, y)
    cv2.fillPoly(image, [body.astype(np.int32)], colour, cv2.LINE_AA)
    glass = np.array([(52, -64), (86, -104), (204, -104), (246, -64)]) + (x, y)
    cv2.fillPoly(image, [glass.astype(np.int32)], (0.15, 0.18, 0.2), cv2.LINE_AA)
    for wheel in (64, 262):
        cv2.circle(image, (x + wheel, y), 30, (0.06, 0.06, 0.06), -1, cv2.LINE_AA)
        cv2.circle(image, (x + wheel, y), 15, (0.5, 0.5, 0.5), -1, cv2.LINE_AA)


def bicycle(image: np.ndarray, x: int, y: int, size: int, tyre, frame) -> None:
    """Draws a bicycle that stands on row `y`, from column `x` on, with wheels of diameter `size`, in place."""
    r, thick = size // 2, max(size // 18, 2)
    rear, front = (x + r, y - r), (x + int(3.3 * r), y - r)
    saddle, bar, pedal = (x + int(1.6 * r), y - int(2.5 * r)), (x + int(2.9 * r), y - int(2.7 * r)), (x + 2 * r, y - r)
    for wheel in (rear, front):
        cv2.circle(image, wheel, r, tyre, thick, cv2.LINE_AA)
    for one, two in ((rear, pedal), (pedal, saddle), (saddle, rear), (pedal, bar), (saddle, bar), (bar, front)):
        cv2.line(image, one, two, frame, thick, cv2.LINE_AA)
    cv2.line(image, (saddle[0] - r // 3, saddle[1]), (saddle[0] + r // 3, saddle[1]), tyre, 2 * thick, cv2.LINE_AA)


@lru_cache(maxsize=64)
def scene(seed: int) -> Scene:
    """The scene of `seed`, about 6 MB; the last 64 are kept for reuse within the process."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    kind = KINDS[int(rng.integers(len(KINDS)))]
    (wall, wall_plants), (ground, ground_plants) = _wall(rng, kind), _ground(rng, kind)
    image, plants = np.concatenate([wall, ground]), np.concatenate([wall_plants, ground_plants])
    image[BASE - 6 : BASE + 6] *= 0.72
    _furnish(rng, image, kind)
    xs, ys = np.arange(WIDTH, dtype=np.float32)[None], np.arange(HEIGHT, dtype=np.float32)[:, None]
    light = 1 + 0.10 * noise(xs * 0.11 + seed % 211, ys * 0.11) + 0.12 * (xs / WIDTH - 0.5) * rng.uniform(-1, 1)
    image = np.clip(image * light[..., None], 0.02, 0.98)
    grey = image @ np.array([0.35, 0.45, 0.20], np.float32)
    infrared = np.clip(0.85 * grey + 0.45 * plants * (0.6 + grey), 0.03, 0.95)
    temperature = 17.0 + 2.2 * (light - 1) * 4 - 2.0 * plants + 1.2 * (grey - grey.mean())
    image, infrared = (HAZE * 0.45 + (1 - HAZE) * layer for layer in (image, infrared))
    return Scene((image * 255).astype(np.uint8), (infrared * 255).astype(np.uint8), temperature.astype(np.float16))
