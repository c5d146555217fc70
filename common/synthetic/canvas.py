"""Drawing board: tubes and balls with shading, label, material and part written for every pixel they cover.

All drawing happens at several times the final resolution with hard edges; shrinking the result gives soft edges in the
image and exact labels in its companions.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

MATERIALS = ("background", "skin", "hair", "upper", "inner", "lower", "shoe", "bag", "hat", "glass")
SKIN, HAIR, UPPER, INNER, LOWER, SHOE, BAG, HAT, GLASS = range(1, 10)


class Surface(NamedTuple):
    """What a part looks like at n points; every field broadcasts to n."""

    albedo: np.ndarray  # (n, 3) or (3,) float32 in [0, 1]
    label: np.ndarray | int  # index into keypoints.ATR
    material: np.ndarray | int  # index into MATERIALS
    relief: np.ndarray | float = 1.0  # brightness of folds and seams
    keep: np.ndarray | None = None  # (n,) bool, where the part is present at all


_CENTRES = np.arange(128) + 0.5
Painter = Callable[[np.ndarray, np.ndarray, np.ndarray], Surface]


@lru_cache(maxsize=1)
def noise_tile() -> np.ndarray:
    """(256, 256) float32 of smooth noise, mean 0, about unit deviation, seamless at the borders; the same always."""
    rng, tile = np.random.default_rng(20150915), np.zeros((256, 256), np.float32)
    for cells, weight in ((6, 1.0), (14, 0.7), (34, 0.4)):
        grid = np.pad(rng.normal(size=(cells, cells)).astype(np.float32), 2, mode="wrap")
        big = cv2.resize(grid, None, fx=256 / cells, fy=256 / cells, interpolation=cv2.INTER_CUBIC)
        start = (big.shape[0] - 256) // 2
        tile += weight * big[start : start + 256, start : start + 256]
    return tile / tile.std()


def noise(across: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Noise at the given places (in tile pixels), nearest sample, same shape, float32."""
    return noise_tile()[along.astype(np.int32) & 255, across.astype(np.int32) & 255]


class Canvas:
    """Flat arrays of height * width points: albedo, shade, label, material, part."""

    def __init__(self, height: int, width: int, light: tuple[float, float, float]):
        self.height, self.width = height, width
        self.albedo = np.zeros((height * width, 3), np.float32)
        self.shade = np.ones(height * width, np.float32)
        self.label = np.zeros(height * width, np.uint8)
        self.material = np.zeros(height * width, np.uint8)
        self.part = np.zeros(height * width, np.uint8)
        norm = float(np.linalg.norm(light))
        self.light = tuple(float(value) / norm for value in light)

    def _window(self, low: tuple[float, float], high: tuple[float, float]) -> tuple | None:
        x0, y0 = max(int(low[0]), 0), max(int(low[1]), 0)
        x1, y1 = min(int(high[0]) + 2, self.width), min(int(high[1]) + 2, self.height)
        if x0 >= x1 or y0 >= y1:
            return None
        xs, ys = np.arange(x0, x1), np.arange(y0, y1)[:, None]
        return xs.astype(np.float32) + 0.5, ys.astype(np.float32) + 0.5, ys * self.width + xs

    def _write(self, where: np.ndarray, lambert: np.ndarray, surface: Surface, part: int) -> None:
        shade = (0.52 + 0.58 * np.maximum(lambert, 0)) * surface.relief
        albedo, label, material = surface.albedo, surface.label, surface.material
        if surface.keep is not None:
            keep = surface.keep
            where, shade = where[keep], shade[keep]
            albedo = albedo[keep] if np.ndim(albedo) == 2 else albedo
            label = label[keep] if np.ndim(label) else label
            material = material[keep] if np.ndim(material) else material
        self.albedo[where], self.shade[where] = albedo, shade
        self.label[where], self.material[where], self.part[where] = label, material, part

    def tube(
        self,
        start,
        end,
        widths,
        paint: Painter,
        part: int,
        caps: tuple[float, float] = (0.0, 0.0),
        arc: float = 0.0,
        square: bool = False,
    ) -> None:
        """A limb from `start` to `end` (x, y in pixels) with half-widths `widths` (k >= 2, evenly spaced, pixels).

        `caps` are the lengths in pixels of the rounded ends; `arc` bends cross-sections downwards, as seen from above,
        in half-widths; `square` flattens the shading (bags). paint(u, v, z): u in (-1, 1) across (positive to the
        right of a limb that points down), v along (0 at start, 1 at end, beyond in the caps), z in [0, 1] bulge.
        """
        ax, ay = float(start[0]), float(start[1])
        dx, dy = float(end[0]) - ax, float(end[1]) - ay
        length = max((dx * dx + dy * dy) ** 0.5, 1.0)
        tx, ty = (dx / length, dy / length) if dx * dx + dy * dy > 0.25 else (0.0, 1.0)
        ex, ey = ax + tx * length, ay + ty * length
        table, low, high = _profile(widths, caps, length)
        pad = float(table.max()) * (1 + abs(arc)) + max(caps) + 1
        window = self._window((min(ax, ex) - pad, min(ay, ey) - pad), (max(ax, ex) + pad, max(ay, ey) + pad))
        if window is None:
            return
        xs, ys, flat = window
        xs, ys = xs - ax, ys - ay
        along, across = xs * tx + ys * ty, xs * ty - ys * tx
        step = len(table) / (high - low)
        half = table[np.clip(((along - low) * step).astype(np.int32), 0, len(table) - 1)]
        if arc:
            along = along - arc * np.sqrt(np.maximum(half * half - across * across, 0))
            half = table[np.clip(((along - low) * step).astype(np.int32), 0, len(table) - 1)]
        inside = (np.abs(across) < half) & (along > low) & (along < high)
        u, v = across[inside] / half[inside], along[inside] / length
        if not len(u):
            return
        z = np.sqrt(np.maximum(1 - (u * u * u * u if square else u * u), 0))
        lambert = u * (ty * self.light[0] - tx * self.light[1]) * (0.5 if square else 1) + z * self.light[2]
        self._write(flat[inside], lambert, paint(u, v, z), part)

    def ball(self, centre, radius_x: float, radius_y: float, paint: Painter, part: int, jaw: float = 0.0) -> None:
        """An ellipsoid at `centre` (pixels); `jaw` narrows its lower half. paint(u, w, z): unit normal, w downwards."""
        cx, cy = float(centre[0]), float(centre[1])
        window = self._window((cx - radius_x, cy - radius_y), (cx + radius_x, cy + radius_y))
        if window is None:
            return
        xs, ys, flat = window
        w = (ys - cy) / radius_y
        u = (xs - cx) / (radius_x * (1 - jaw * np.maximum(w, 0) ** 2))
        rest = 1 - u * u - w * w
        inside = rest > 0
        u, w, z = u[inside], np.broadcast_to(w, rest.shape)[inside], np.sqrt(rest[inside])
        if len(u):
            lambert = u * self.light[0] + w * self.light[1] + z * self.light[2]
            self._write(flat[inside], lambert, paint(u, w, z), part)


@lru_cache(maxsize=16)
def _even(count: int) -> np.ndarray:
    return np.linspace(0, 1, count)


def _profile(widths, caps: tuple[float, float], length: float) -> tuple[np.ndarray, float, float]:
    """Half-width by place along a tube as a table of 128, with the places (pixels) of its two ends."""
    low, high = -caps[0], length + caps[1]
    places = low + _CENTRES * ((high - low) / 128)
    table = np.interp(places / length, _even(len(widths)), widths)
    if caps[0]:
        table *= np.sqrt(np.maximum(1 - np.minimum(places / caps[0], 0) ** 2, 0))
    if caps[1]:
        table *= np.sqrt(np.maximum(1 - np.maximum((places - length) / caps[1], 0) ** 2, 0))
    return table.astype(np.float32), low, high
