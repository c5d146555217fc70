"""How a body stands: a walking skeleton in 3-D, seen from any of the eight directions or between them.

Body frame: x to the person's left, y up, z forward, origin on the ground under the pelvis, unit = average stature.
Camera frame: X to the right of the image, Y down, Z towards the camera.
"""

from math import cos, pi, sin
from typing import NamedTuple

import numpy as np

from common.synthetic.identity import Identity

ORIENTATIONS = ("front", "front-right", "right", "back-right", "back", "back-left", "left", "front-left")
ARMS = ("swing", "pocket", "phone", "carry")


class View(NamedTuple):
    """One look at a person: the pose, where the light comes from, and how the box was cut.

    Box: `centre` moves the person sideways (share of the box width), `top` and `bottom` are the empty shares of the
    box height above the head and below the feet; negative values cut the person off.
    """

    yaw: float = 0.0  # radians; 0 = facing the camera, positive = turned towards the right of the image
    phase: float = 0.8  # of the walk, radians
    stride: float = 1.0  # 0 = standing, 1 = walking
    arms: tuple[str, str] = ("swing", "swing")  # left, right, each of ARMS
    head_yaw: float = 0.0  # relative to the body
    pitch: float = 0.12  # of the camera looking down, radians
    light: tuple[float, float, float] = (-0.45, -0.5, 0.75)  # towards the light, camera frame
    height: int = 128
    width: int = 64
    centre: float = 0.0
    top: float = 0.05
    bottom: float = 0.05
    scene: tuple[int, float, float, float] = (0, 0.5, 0.5, 1.0)  # background: viewpoint, place across, down, zoom
    exposure: float = 1.0
    occluder: str = "none"  # none | pole | bicycle | box | person
    companion: bool = False  # somebody else stands behind


def orientation(yaw: float) -> str:
    """The nearest of the eight names in ORIENTATIONS; "right" means walking towards the right of the image."""
    return ORIENTATIONS[round(yaw / (pi / 4)) % 8]


def _arm(person: Identity, side: int, mode: str, swing: float) -> tuple[list, list, list]:
    """Elbow, wrist and fingertip relative to the shoulder; `side` +1 left, -1 right; `swing` forward angle."""
    out, bend, inward = 0.10 + 0.07 * (person.girth - 0.9), 0.22 + 0.25 * max(0.0, swing), 0.0
    if mode == "pocket":
        swing, bend, inward, out = -0.25, 0.75, 0.25, 0.28
    elif mode == "phone":
        swing, bend, inward = 0.25, 2.05, 0.45
    elif mode == "carry":
        swing, bend = 0.12 * swing, 0.12
    elbow = [side * 0.168 * sin(out), -0.168 * cos(swing) * cos(out), 0.168 * sin(swing)]
    angle = swing + bend
    fore = [side * (sin(out) * 0.4 - inward), -cos(angle), sin(angle)]
    norm = (fore[0] ** 2 + 1.0) ** 0.5
    fore = [value / norm for value in fore]
    wrist = [elbow[i] + 0.138 * fore[i] for i in range(3)]
    return elbow, wrist, [wrist[i] + 0.062 * fore[i] for i in range(3)]


def _leg(swing: float, bend: float, person: Identity) -> tuple[list, list, list, list]:
    """Knee, ankle, heel and toe relative to the hip joint, for a thigh swung forward and a bent knee."""
    thigh, shin = 0.475 * person.legs, person.legs * 0.525 - 0.042
    knee = [0.0, -thigh * cos(swing), thigh * sin(swing)]
    low = swing - bend
    ankle = [0.0, knee[1] - shin * cos(low), knee[2] + shin * sin(low)]
    tilt = max(-0.15, min(0.9, -low * 0.9)) if low < 0 else -0.35 * low  # heel lifts behind, toe lifts in front
    ahead, down = cos(tilt), -sin(tilt)
    heel = [0.0, ankle[1] - 0.028 * ahead, ankle[2] - 0.028 - 0.02 * sin(tilt)]
    toe = [0.0, heel[1] + 0.128 * down, heel[2] + 0.128 * ahead]
    return knee, ankle, heel, toe


def skeleton(person: Identity, view: View) -> dict[str, np.ndarray]:
    """Joints of `person` in the body frame, name -> (3,) float64, scaled by the stature, feet on the ground."""
    joints: dict[str, list] = {}
    reach, lift = 0.40 * person.gait * view.stride, 0.95 * view.stride
    for name, side, phase in (("l", 1, view.phase), ("r", -1, view.phase + pi)):
        swing = reach * sin(phase) + 0.02
        bend = 0.06 + lift * max(0.0, cos(phase + 0.35)) ** 1.5
        hip = [side * person.hips, person.legs, 0.0]
        parts = _leg(swing, bend, person)
        for part, offset in zip(("knee", "ankle", "heel", "toe"), parts):
            joints[name + part] = [hip[i] + offset[i] for i in range(3)]
            joints[name + part][0] += side * (0.012 if part == "toe" else -0.004)
        joints[name + "hip"] = hip
        shoulder = [side * (person.shoulders - 0.002), 0.792, -0.003]
        arm = _arm(person, side, view.arms[0 if side > 0 else 1], -0.52 * person.swing * view.stride * sin(phase))
        for part, offset in zip(("elbow", "wrist", "hand"), arm):
            joints[name + part] = [shoulder[i] + offset[i] for i in range(3)]
        joints[name + "shoulder"] = shoulder
    lean = 0.012 + 0.02 * view.stride
    joints["neck"], joints["pelvis"] = [0.0, 0.826, lean], [0.0, person.legs - 0.02, 0.0]
    joints["head"] = [0.0, 0.868 + person.head, lean + 0.016]
    names = list(joints)
    points = np.array([joints[name] for name in names])
    points[:, 2] += lean * np.clip((points[:, 1] - person.legs) / 0.3, 0, 1) * 0.5
    points[:, 1] -= min(points[names.index(n), 1] for n in ("lheel", "rheel", "ltoe", "rtoe")) - 0.014
    return dict(zip(names, points * person.stature))


def project(points: np.ndarray, yaw: float, pitch: float) -> np.ndarray:
    """(..., 3) body frame -> (..., 3) camera frame (X right, Y down, Z towards the camera), orthographic."""
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    across, ahead = x * cos(yaw) + z * sin(yaw), z * cos(yaw) - x * sin(yaw)
    return np.stack([across, -y * cos(pitch) + ahead * sin(pitch), ahead * cos(pitch) + y * sin(pitch)], -1)
