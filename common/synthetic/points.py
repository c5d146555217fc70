"""Where the key points of a drawn body.Figure lie, and which of them are seen."""

from math import cos, sin

import numpy as np

from common.synthetic.body import ARM, FOOT, FOREARM, HEAD, SHIN, SKIRT, STRAND, THIGH, TRUNK, Figure


def keypoints(figure: Figure) -> np.ndarray:
    """(17, 3) float64 in canvas pixels: x, y, 2 if seen, else 1. Seen = the joint's own part is what is drawn."""
    rows = _face_points(figure)
    for joint, parts, trunk in (
        ("shoulder", (ARM,), True),
        ("elbow", (ARM, FOREARM), False),
        ("wrist", (FOREARM,), False),
        ("hip", (THIGH,), True),
        ("knee", (THIGH, SHIN), False),
        ("ankle", (SHIN, FOOT), False),
    ):
        for side in (0, 1):
            name = "lr"[side] + joint
            allowed = {part + side for part in parts}
            if trunk and figure.depth[name] - figure.depth["pelvis"] * 0.4 > -0.045:
                allowed |= {TRUNK, SKIRT}
            if joint == "knee":
                allowed.add(SKIRT)
            rows.append((*figure.at[name], allowed))
    return np.array([(x, y, 1.0 + _seen(figure, x, y, allowed)) for x, y, allowed in rows])


def _face_points(figure) -> list:
    (x, y), (_, up), rows = figure.at["head"], figure.head_axes(), []
    yaw, head = figure.head_yaw, figure.person.head * figure.size
    for side, high, ahead in (
        (0, -0.2, 1.0),
        (0.36, 0.06, 0.84),
        (-0.36, 0.06, 0.84),
        (0.95, 0.0, -0.05),
        (-0.95, 0.0, -0.05),
    ):
        px = x + (side * 0.70 * cos(yaw) + ahead * 0.84 * sin(yaw)) * head
        near = ahead * cos(yaw) - side * sin(yaw)
        rows.append((0.96 * px + 0.04 * x, y - high * up, {HEAD, STRAND} if near > -0.12 else set()))
    return rows


def _seen(figure, x: float, y: float, allowed: set) -> bool:
    column, row = int(x), int(y)
    if not (0 <= column < figure.canvas.width and 0 <= row < figure.canvas.height):
        return False
    return int(figure.canvas.part[row * figure.canvas.width + column]) in allowed
