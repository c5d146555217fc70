"""One call, one box: a person in front of a camera, with everything that is known about every pixel."""

from typing import NamedTuple

import cv2
import numpy as np

from common.synthetic import identity as people
from common.synthetic import infrared, pose
from common.synthetic.body import Figure
from common.synthetic.camera import Camera, expose, stream
from common.synthetic.canvas import Canvas
from common.synthetic.identity import Identity, Outfit
from common.synthetic.points import keypoints
from common.synthetic.pose import View
from common.synthetic.scene import BASE, HEIGHT, WIDTH, bicycle, scene


class Rendered(NamedTuple):
    """A box of H x W pixels.

    image uint8 (H, W, 3) RGB; parsing uint8 (H, W), indices into common.keypoints.ATR; keypoints float32 (17, 3): x, y
    in pixels and 0 outside the box, 1 hidden, 2 seen (COCO's order); infrared and thermal uint8 (H, W), or
    None if not asked for.
    """

    image: np.ndarray
    parsing: np.ndarray
    keypoints: np.ndarray
    infrared: np.ndarray | None
    thermal: np.ndarray | None


class _Layers:
    """The growing picture: colour (h, w, 3), infrared, temperature float32, and a mask of what hides the person."""

    def __init__(self, view: View, source: Camera, height: int, width: int, companions: bool):
        self.height, self.width, self.companions = height, width, companions
        viewpoint, across, down, zoom = view.scene
        backdrop = scene(source.scenes[viewpoint % len(source.scenes)])
        wide, high = int(width * zoom), int(height * zoom)
        x = int(across % 1 * (WIDTH - wide))
        y = int(np.clip(BASE - (0.10 + 0.5 * down) * high, 0, HEIGHT - high))

        def cut(layer):
            return cv2.resize(layer[y : y + high, x : x + wide], (width, height), interpolation=cv2.INTER_LINEAR)

        self.colour = cut(backdrop.image).astype(np.float32) * np.float32(1 / 255)
        self.infrared = cut(backdrop.infrared).astype(np.float32) * np.float32(1 / 255) if companions else None
        self.temperature = cut(backdrop.temperature.astype(np.float32)) if companions else None
        self.hidden = np.zeros((height, width), bool)

    def shadow(self, x: float, y: float, radius: float, light: tuple[float, float, float]) -> None:
        """Darkens the ground around (x, y) and away from the light."""
        first, last = max(int(y - 0.6 * radius), 0), max(min(int(y + 0.3 * radius), self.height), 0)
        rows = slice(first, max(last, first))
        xs = (np.arange(self.width, dtype=np.float32)[None] - np.float32(x)) / np.float32(radius)
        ys = (np.arange(first, rows.stop, dtype=np.float32)[:, None] - np.float32(y)) / np.float32(radius)
        along = xs * np.float32(-np.sign(light[0]) / 1.4)
        near = np.exp(-((xs / 0.55) ** 2)) * np.exp(-((ys / 0.13) ** 2))
        cast = np.exp(-(((ys + 0.35 * along) / 0.11) ** 2)) * ((along > 0) * np.exp(-((along * 1.6) ** 2)))
        dark = 1 - 0.45 * near - 0.30 * cast * (1 - near)
        self.colour[rows] *= dark[..., None]
        if self.companions:
            self.infrared[rows] *= dark

    def add(self, canvas: Canvas, person: Identity, outfit: Outfit) -> np.ndarray:
        """Puts a drawn figure on top; returns its mask (h, w) bool."""
        mask = (canvas.part > 0).reshape(self.height, self.width)
        flat = np.flatnonzero(canvas.part)
        self.colour.reshape(-1, 3)[flat] = canvas.albedo[flat] * canvas.shade[flat, None]
        if self.companions:
            self.infrared[mask] = infrared.near_infrared(canvas, person, outfit)[flat]
            self.temperature[mask] = infrared.thermal(canvas, person, outfit)[flat]
        return mask


def person(
    identity: Identity,
    outfit: Outfit,
    view: View,
    camera: Camera,
    rng: np.random.Generator,
    *,
    companions: bool = True,
    compress: bool = True,
) -> Rendered:
    """The box that `camera` records of a person.

    `rng` draws sensor noise, occluders and passers-by; equal arguments and an equally seeded `rng` give equal pixels.
    `companions` also renders near infrared and heat; `compress` passes the image through the camera's JPEG stream.
    """
    scale = max(2.0, 320 / view.height) if view.height < 256 else 1.5
    height, width = round(view.height * scale), round(view.width * scale)
    layers = _Layers(view, camera, height, width, companions)
    unit, foot = _frame(identity, view, height, width)
    if view.companion:
        _stranger(
            layers,
            view,
            unit,
            (foot[0] + rng.choice([-1, 1]) * unit * rng.uniform(0.16, 0.4), foot[1] - unit * rng.uniform(0.02, 0.12)),
            rng,
        )
    layers.shadow(foot[0], foot[1] - 0.01 * unit, 0.30 * unit, view.light)
    canvas = Canvas(height, width, view.light)
    figure = Figure(canvas, identity, outfit, view, foot, unit)
    figure.draw()
    layers.add(canvas, identity, outfit)
    _occlude(layers, view, unit, foot, rng)
    return _record(layers, canvas, figure, view, camera, rng, compress)


def _record(
    layers: _Layers,
    canvas: Canvas,
    figure: Figure,
    view: View,
    camera: Camera,
    rng: np.random.Generator,
    compress: bool,
) -> Rendered:
    """Shrinks the layers to the box, with the camera's faults in the image and none in the companions."""
    size = (view.width, view.height)
    image = expose(layers.colour, camera, view.exposure, size, rng)
    if compress:
        image = stream(image, camera.quality)
    canvas.label[layers.hidden.ravel()] = 0
    canvas.part[layers.hidden.ravel()] = 0
    parsing = cv2.resize(canvas.label.reshape(layers.height, layers.width), size, interpolation=cv2.INTER_NEAREST_EXACT)
    points = keypoints(figure)
    points[:, :2] *= (view.width / layers.width, view.height / layers.height)
    outside = (points[:, :2] < 0).any(1) | (points[:, 0] >= view.width) | (points[:, 1] >= view.height)
    points[outside, 2] = 0
    near = heat = None
    if layers.companions:
        near = cv2.resize(np.clip(layers.infrared * 1.05, 0, 1), size, interpolation=cv2.INTER_AREA)
        near = (np.clip(near + rng.normal(0, 0.012, near.shape), 0, 1) * 255 + 0.5).astype(np.uint8)
        heat = cv2.GaussianBlur(cv2.resize(layers.temperature, size, interpolation=cv2.INTER_AREA), (0, 0), 0.6)
        heat = infrared.shown(heat + rng.normal(0, 0.15, heat.shape))
    return Rendered(image, parsing, points.astype(np.float32), near, heat)


def _frame(identity: Identity, view: View, height: int, width: int) -> tuple[float, tuple[float, float]]:
    """Pixels per stature and the ground point that put the person into the box as `view` says."""
    joints = pose.project(np.stack(list(pose.skeleton(identity, view).values())), view.yaw, view.pitch)
    high = joints[:, 1].min() - 1.15 * identity.head * identity.stature
    low = joints[:, 1].max() + 0.022
    unit = height * (1 - view.top - view.bottom) / (low - high)
    middle = 0.5 * (joints[:, 0].min() + joints[:, 0].max())
    return unit, (width * (0.5 + view.centre) - 0.7 * middle * unit, view.top * height - high * unit)


def _stranger(
    layers: _Layers, view: View, unit: float, foot: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """Draws somebody else; returns the mask (h, w)."""
    identity = people.identity(rng)
    outfit = people.outfit(identity, rng)
    other = view._replace(yaw=view.yaw + rng.normal(0, 0.8), phase=rng.uniform(0, 6), arms=("swing", "swing"))
    canvas = Canvas(layers.height, layers.width, view.light)
    Figure(canvas, identity, outfit, other, foot, unit).draw()
    return layers.add(canvas, identity, outfit)


def _occlude(layers: _Layers, view: View, unit: float, foot: tuple[float, float], rng: np.random.Generator) -> None:
    """Draws what stands in front of the person and marks it as hiding."""
    if view.occluder == "none":
        return
    if view.occluder == "person":
        side = rng.choice([-1, 1]) * rng.uniform(0.14, 0.34)
        place = (foot[0] + side * unit, foot[1] + rng.uniform(0.02, 0.3) * unit)
        layers.hidden |= _stranger(layers, view, unit * 1.06, place, rng)
        return
    board = np.full((layers.height, layers.width, 3), -1, np.float32)
    tint = rng.uniform(0.1, 0.75) + rng.normal(0, 0.06, 3)
    colour = tuple(float(value) for value in np.clip(tint, 0.03, 0.95))
    x, y = int(foot[0] + rng.uniform(-0.2, 0.2) * unit), int(foot[1] + 0.05 * unit)
    if view.occluder == "pole":
        cv2.line(board, (x, 0), (x, layers.height), colour, int(unit * rng.uniform(0.03, 0.09)))
    elif view.occluder == "bicycle":
        bicycle(board, x - int(0.45 * unit), y, int(0.34 * unit), (0.07, 0.07, 0.08), colour)
    else:
        cv2.rectangle(
            board,
            (x - int(0.35 * unit), y - int(rng.uniform(0.15, 0.42) * unit)),
            (x + int(rng.uniform(0.0, 0.5) * unit), layers.height),
            colour,
            -1,
        )
    mask = board[..., 0] >= 0
    layers.colour[mask] = board[mask] * (
        0.85 + 0.3 * np.linspace(0, 1, layers.width, dtype=np.float32)[np.nonzero(mask)[1], None]
    )
    layers.hidden |= mask
    if layers.companions:
        layers.infrared[mask], layers.temperature[mask] = 0.4, infrared.AIR
