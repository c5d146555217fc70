"""Surfaces: how cloth, skin, hair, shoes and bags look at a place of the body.

Every function takes `theta` (azimuth around the limb in the body frame, 0 = front, pi/2 = the person's left) and
`along` (distance from the upper end, shares of the stature), float32 arrays of n points.
"""

from math import pi

import numpy as np

from common.synthetic.canvas import BAG, GLASS, HAIR, INNER, LOWER, SKIN, UPPER, Surface, noise
from common.synthetic.identity import Garment, Identity, Outfit


def wrap(angle: np.ndarray) -> np.ndarray:
    """Angles brought into [-pi, pi)."""
    return (angle + pi) % (2 * pi) - pi


def azimuth(u: np.ndarray, yaw: float) -> np.ndarray:
    """Body azimuth of the visible points of a limb seen at `yaw`, from their place across, u in [-1, 1]."""
    return wrap(np.arcsin(np.clip(u, -1, 1)) - yaw)


def _array(colour) -> np.ndarray:
    return np.array(colour, np.float32)


def _mix(share: np.ndarray, first, second) -> np.ndarray:
    """first where share is 0, second where it is 1; (n, 3) float32."""
    first = _array(first)
    return first + share[:, None].astype(np.float32) * (_array(second) - first)


def folds(garment: Garment, theta: np.ndarray, along: np.ndarray, steep: float = 1.0) -> np.ndarray:
    """(n,) brightness of the folds; loose cloth folds more. `steep` > 1 stretches folds along the limb."""
    shift = garment.seed % 251
    strength = min(0.05 + 5.0 * garment.loose, 0.12)
    slant = along * (420 / steep) + theta * 9
    return 1 + strength * noise(theta * 26 + along * 160 + shift, slant + shift * 3)


def dyed(garment: Garment, theta: np.ndarray, along: np.ndarray, sleeve: bool = False) -> np.ndarray:
    """(n, 3) or (3,) colour of the cloth with its pattern; `sleeve` chooses the sleeve of a raglan shirt."""
    colour, second, period = garment.colour, garment.second, garment.period
    if garment.pattern == "stripes":
        return _mix((along / period) % 1 < 0.45, colour, second)
    if garment.pattern == "vertical":
        return _mix((theta * 0.1 / period * 2) % 1 < 0.3, colour, second)
    if garment.pattern == "checks":
        rows, columns = (along / period) % 1 < 0.4, (theta * 0.1 / period) % 1 < 0.4
        return _mix(0.45 * rows + 0.45 * columns, colour, second)
    if garment.pattern == "block" and not sleeve:
        return _mix(along < 0.09 + 2 * period, second, colour)
    if garment.pattern == "block":
        return _mix(along < 0.10, second, colour)
    if garment.pattern == "raglan" and sleeve:
        return _array(second)
    if garment.pattern == "print" and not sleeve:
        return _printed(garment, theta, along)
    if garment.pattern == "side":
        return _mix(np.abs(np.abs(theta) - pi / 2) < 0.3, colour, second)
    return _array(colour)


def _printed(garment: Garment, theta: np.ndarray, along: np.ndarray) -> np.ndarray:
    """A picture on the chest: a disc, a box, a band or a blot, by the seed."""
    x, y = theta / 0.62, (along - 0.135) / (0.035 + 0.7 * garment.period)
    kind = garment.seed % 4
    if kind == 0:
        share = x * x + y * y < 1
    elif kind == 1:
        share = (np.abs(x) < 0.9) & (np.abs(y) < 0.8)
    elif kind == 2:
        share = (np.abs(y) < 0.4) & (np.abs(theta) < 1.4)
    else:
        share = (noise(x * 22 + garment.seed % 97, y * 22 + 31) > 0.1) & (x * x + y * y < 1.6)
    return _mix(share, garment.colour, garment.second)


class Torso:
    """Painter of the upper garment around the trunk: neckline, open front, pattern, straps, belt."""

    def __init__(self, person: Identity, outfit: Outfit, yaw: float, length: float):
        self.person, self.outfit, self.yaw, self.length = person, outfit, yaw, length

    def __call__(self, u: np.ndarray, v: np.ndarray, z: np.ndarray) -> Surface:
        upper, theta, along = self.outfit.upper, azimuth(u, self.yaw), v * self.length
        albedo = np.empty((len(u), 3), np.float32)
        albedo[:] = dyed(upper, theta, along)
        label = np.full(len(u), 7 if upper.cut == "dress" else 4, np.uint8)
        material = np.full(len(u), UPPER, np.uint8)
        relief = folds(upper, theta, along)
        front = np.abs(theta)
        if upper.cut in ("jacket", "coat"):
            gap = 0.16 + 0.5 * np.clip(along, 0, 0.12) + (upper.seed % 5) * 0.05
            relief[(front > gap) & (front < gap + 0.13)] *= 0.84
            inner = self.outfit.inner
            opened = np.flatnonzero((front < gap) & (v < inner.length))
            albedo[opened] = _broad(dyed(inner, theta[opened], along[opened]), len(opened))
            material[opened], relief[opened] = INNER, relief[opened] * 0.93
            below = (front < gap) & (v >= inner.length)
            albedo[below], material[below] = _array(self.outfit.lower.colour), LOWER
            label[below] = 5 if self.outfit.lower.cut == "skirt" else 6
        elif upper.cut == "shirt" or upper.seed % 3 == 0 and upper.cut == "hoodie":
            relief[front < 0.05] *= 0.72
        if upper.cut == "hoodie":
            relief[(np.abs(along - 0.235) < 0.006) & (front < 0.85)] *= 0.72
        self._neckline(theta, along, albedo, label, material, relief)
        self._straps(theta, along, albedo, label, material, relief)
        relief *= 1 - 0.16 * np.exp(-(((v - upper.length) / 0.035) ** 2))
        return Surface(albedo, label, material, relief)

    def _neckline(self, theta, along, albedo, label, material, relief) -> None:
        depth = {"tshirt": 0.026, "dress": 0.05, "shirt": 0.032, "hoodie": 0.012}.get(self.outfit.upper.cut, 0.022)
        bare = along < depth * (1 - (theta / 0.75) ** 2)
        rim = (along < 0.012 + depth * (1 - (theta / 0.8) ** 2)) & ~bare
        relief[rim] *= 0.8
        albedo[bare], label[bare], material[bare] = _array(self.person.skin), 11, SKIN

    def _straps(self, theta, along, albedo, label, material, relief) -> None:
        if self.person.bag == "backpack":
            strap = (np.abs(np.abs(theta) - 0.72 - along * 1.2) < 0.13) & (along < 0.21)
        elif self.person.bag == "satchel":
            side = np.where(np.abs(theta) < pi / 2, theta, wrap(pi - theta))
            strap = (np.abs(side - 0.85 + along * 5.2) < 0.12) & (along < 0.33)
        else:
            strap = None
        if self.outfit.belt and self.outfit.upper.cut in ("coat", "dress"):
            belt = np.abs(along - 0.2) < 0.012
            albedo[belt] *= 0.45
            label[belt] = 8
        if strap is not None:
            albedo[strap], label[strap], material[strap] = _array(self.person.bag_colour) * 0.85, 16, BAG
            relief[strap] = 1.0


def _broad(colour: np.ndarray, count: int) -> np.ndarray:
    return np.broadcast_to(colour, (count, 3))


def limb(
    garment: Garment,
    label: int,
    material: int,
    yaw: float,
    length: float,
    start: float = 0.0,
    sleeve: bool = False,
    steep: float = 1.6,
):
    """Painter of a sleeve or a trouser leg of `length` that begins `start` below the joint (shares of the stature)."""

    def paint(u, v, z):
        theta, along = azimuth(u, yaw), v * length + start
        relief = folds(garment, theta, along, steep) * (1 - 0.10 * np.exp(-((v / 0.12) ** 2)))
        return Surface(dyed(garment, theta, along, sleeve), label, material, relief)

    return paint


def skin(person: Identity, label: int, shade: float = 1.0):
    """Painter of bare skin."""
    return lambda u, v, z: Surface(_array(person.skin) * shade, label, SKIN, 0.9 + 0.1 * z)


def hair_strand(person: Identity, tip: float = 1.0):
    """Painter of hanging hair; thins out beyond `tip` along the strand."""

    def paint(u, v, z):
        streak = noise(u * 60 + person.seed % 199, v * 14 + 5)
        keep = v < tip + 0.06 * streak
        return Surface(_array(person.hair) * (1 + 0.0 * v[:, None]), 2, HAIR, 1 + 0.16 * streak, keep)

    return paint


def shoe(person: Identity, label: int, down: float, material: int):
    """Painter of a shoe; `down` is the downward part of the direction of u, which tells where the sole is."""

    def paint(u, v, z):
        albedo = _mix(u * down > 0.55, person.shoes, person.sole) if abs(down) > 0.3 else _array(person.shoes)
        relief = 0.82 + 0.26 * (np.abs(v - 0.45) < 0.25) if not person.boots else 0.95 + 0.05 * z
        return Surface(albedo, label, material, relief)

    return paint


def bag(person: Identity, rows: float = 0.5):
    """Painter of a bag with a flap or pocket of the trim colour below `rows`."""

    def paint(u, v, z):
        trim = (v > rows) & (np.abs(u) < 0.72) & (v < 0.93)
        seam = (np.abs(v - rows) < 0.03) | (np.abs(np.abs(u) - 0.72) < 0.05) & trim
        colour = person.bag_trim if person.seed % 3 == 0 else tuple(0.82 * value for value in person.bag_colour)
        return Surface(_mix(trim, person.bag_colour, colour), 16, BAG, np.where(seam, 0.7, 1.0) * (0.92 + 0.08 * z))

    return paint


class Head:
    """Painter of the head: hairline, face, brows, eyes, nose, mouth, beard, glasses, cap."""

    def __init__(self, person: Identity, hat, yaw: float, hat_material: int):
        self.person, self.hat, self.hat_material = person, hat, hat_material
        self.cos, self.sin = float(np.cos(yaw)), float(np.sin(yaw))

    def __call__(self, u: np.ndarray, w: np.ndarray, z: np.ndarray) -> Surface:
        person = self.person
        x, y, ahead = u * self.cos - z * self.sin, -w, u * self.sin + z * self.cos
        albedo = np.empty((len(u), 3), np.float32)
        albedo[:] = person.skin
        label, material = np.full(len(u), 11, np.uint8), np.full(len(u), SKIN, np.uint8)
        relief = np.ones(len(u), np.float32)
        face, side = ahead > 0.25, np.abs(x)
        relief[face & (np.abs(x - 0.06) < 0.09) & (np.abs(y + 0.14) < 0.2)] = 1.10
        relief[face & (np.abs(x) < 0.17) & (np.abs(y + 0.34) < 0.05)] = 0.74
        relief[face & (((side - 0.36) / 0.24) ** 2 + ((y - 0.07) / 0.14) ** 2 < 1)] = 0.78
        albedo[face & (((side - 0.36) / 0.14) ** 2 + ((y - 0.05) / 0.065) ** 2 < 1)] = (0.10, 0.08, 0.08)
        brow = face & (np.abs(side - 0.37) < 0.2) & (np.abs(y - 0.25) < 0.05)
        albedo[brow] = _array(person.hair) * 0.8
        lips = face & (side < 0.25) & (np.abs(y + 0.5) < 0.055)
        albedo[lips] = _array(person.skin) * (0.82, 0.55, 0.55)
        if person.beard:
            beard = (y < -0.22) & (ahead > -0.15) & ~(lips | (face & (side < 0.3) & (y > -0.38)))
            albedo[beard] = 0.55 * _array(person.hair) + 0.25 * _array(person.skin)
        if person.glasses != "none":
            rim = (
                (ahead > -0.1)
                & (np.abs(y - 0.07) < (0.11 if person.glasses == "dark" else 0.035))
                & ((side > 0.1) | (np.abs(y - 0.1) < 0.04))
                & (face | (np.abs(y - 0.1) < 0.04))
            )
            albedo[rim], material[rim] = (0.06, 0.06, 0.07), GLASS
            label[rim] = 3 if person.glasses == "dark" else 11
        hair = self._hair(side, y, ahead)
        albedo[hair], label[hair], material[hair] = person.hair, 2, HAIR
        relief[hair] = 1 + 0.14 * noise(x[hair] * 55 + person.seed % 199, ahead[hair] * 22 + y[hair] * 18)
        if self.hat is not None:
            cap = y > 0.30 + 0.08 * (1 - ahead)
            brim = (np.abs(y - 0.34) < 0.09) & (ahead > 0.35)
            albedo[cap | brim], label[cap | brim], material[cap | brim] = self.hat, 1, self.hat_material
            relief[cap] = 1.0
            relief[brim] = 0.72
        return Surface(albedo, label, material, relief)

    def _hair(self, side, y, ahead) -> np.ndarray:
        """(n,) bool: where hair grows, by style; the hairline rises from the nape over the ear to the forehead."""
        style = self.person.hair_style
        if style == "bald":
            return (ahead < -0.25) & (np.abs(y + 0.1) < 0.22)
        fringe = {"crop": 0.56, "short": 0.46, "afro": 0.42, "bob": 0.36, "long": 0.44}.get(style, 0.52)
        if style in ("bob", "long"):
            return (y > fringe - 0.25 * side) | (ahead < 0.30 - 0.1 * y) | ((side > 0.78) & (y > -0.6))
        return (y > fringe + 0.1 * (ahead > 0.6)) | ((ahead < 0.10 + 0.55 * np.maximum(y, 0)) & (y > -0.45))
