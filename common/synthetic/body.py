"""Draws one dressed person on a canvas, from the far parts to the near ones."""

from math import cos, hypot, sin

import numpy as np

from common.synthetic import bags, garments
from common.synthetic.canvas import HAT, LOWER, SHOE, UPPER, Canvas, Surface
from common.synthetic.identity import Garment, Identity, Outfit
from common.synthetic.pose import View, project, skeleton

TRUNK, HEAD, STRAND, SKIRT = 1, 2, 3, 5  # of Canvas.part; 4 is bags.BAG_PART
ARM, FOREARM, THIGH, SHIN, FOOT = 10, 12, 14, 16, 18  # + 0 left, + 1 right
STATIONS = np.array([0.0, 0.05, 0.11, 0.2, 0.36, 0.6, 0.84, 1.0])  # along the trunk, neck to crotch


class Figure:
    """A person placed on a canvas: pixel position of every joint, and the painters' order."""

    def __init__(
        self, canvas: Canvas, person: Identity, outfit: Outfit, view: View, foot: tuple[float, float], unit: float
    ):
        """`foot` (x, y) pixels of the ground point under the pelvis; `unit` pixels per average stature."""
        self.canvas, self.person, self.outfit, self.view, self.unit = canvas, person, outfit, view, unit
        self.size = unit * person.stature
        self.body = skeleton(person, view)
        names = list(self.body)
        placed = project(np.stack([self.body[name] for name in names]), view.yaw, view.pitch)
        self.at = {n: (foot[0] + unit * p[0], foot[1] + unit * p[1]) for n, p in zip(names, placed)}
        self.depth = {n: p[2] - self.body[n][1] * sin(view.pitch) for n, p in zip(names, placed)}
        self.foot, self.head_yaw = foot, view.yaw + view.head_yaw
        self.facing = cos(view.yaw)

    def place(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Pixels of a point of the body frame, in statures."""
        p = project(np.array([x, y, z]) * self.person.stature, self.view.yaw, self.view.pitch)
        return self.foot[0] + self.unit * p[0], self.foot[1] + self.unit * p[1]

    def around(self, lateral, fore) -> np.ndarray:
        """Half-width in pixels of an ellipse with the given half-axes (statures), seen at the view's yaw."""
        yaw = self.view.yaw
        return np.sqrt((np.asarray(lateral) * cos(yaw)) ** 2 + (np.asarray(fore) * sin(yaw)) ** 2) * self.size

    def draw(self) -> None:
        """Draws everything, far to near."""
        sides = sorted((0, 1), key=lambda side: self.depth["lr"[side] + "knee"] + self.depth["lr"[side] + "ankle"])
        if self.facing > 0:
            bags.backpack(self)
            self.curtain()
        behind = [(side, part) for side in sides for part in ("arm", "forearm") if self._arm_depth(side, part) < -0.045]
        for side, part in behind:
            self.arm(side, part)
        for side in sides:
            self.leg(side)
        self.pelvis()
        self.trunk()
        if self.facing > -0.3:
            self.neck()
            self.head()
        else:
            self.head()
            self.neck()
        for part in ("arm", "forearm"):
            for side in sides:
                if (side, part) not in behind:
                    self.arm(side, part)
        if self.facing <= 0:
            bags.backpack(self)
            self.curtain()
        bags.satchel(self)

    def _arm_depth(self, side: int, part: str) -> float:
        name, near, far = "lr"[side], *(("shoulder", "elbow") if part == "arm" else ("elbow", "hand"))
        return 0.5 * (self.depth[name + near] + self.depth[name + far]) - 0.4 * self.depth["pelvis"]

    def trunk_axes(self, garment: Garment | None, upto: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places along the trunk (0 neck, 1 crotch) and the lateral and fore half-axes there, in statures."""
        person, girth = self.person, self.person.girth
        lateral = np.array(
            [
                0.040,
                0.080,
                person.shoulders + 0.010,
                person.shoulders + 0.014,
                person.shoulders + 0.004,
                0.074 * girth,
                (person.hips + 0.038) * girth**0.6,
                (person.hips + 0.032) * girth**0.6,
            ]
        )
        fore = np.array(
            [
                0.036,
                0.045,
                0.056,
                0.066 * girth,
                (0.068 + 0.014 * person.bust) * girth,
                0.060 * girth,
                0.072 * girth,
                0.068 * girth,
            ]
        )
        if person.bust:
            lateral[5] -= 0.006
        places = np.linspace(0, upto, 24)
        lateral, fore = np.interp(places, STATIONS, lateral), np.interp(places, STATIONS, fore)
        if garment is not None:
            swell = garment.loose * np.clip(places / 0.2, 0, 1)
            slack = np.clip((places - 0.4) / 0.3, 0, 1) * garment.loose
            lateral, fore = lateral + swell + slack, fore + swell + slack
        beyond = np.maximum(places - 1, 0)
        lateral, fore = lateral + 0.028 * beyond, fore + (0.02 + 0.075 * self.view.stride) * beyond
        return places, lateral, fore

    def trunk(self) -> None:
        upper = self.outfit.upper
        start, stop = np.array(self.at["neck"]), np.array(self.at["pelvis"])
        _, lateral, fore = self.trunk_axes(upper, upper.length)
        end = start + (stop - start) * upper.length
        length = hypot(*(stop - start)) / self.size
        painter = garments.Torso(self.person, self.outfit, self.view.yaw, length)
        arc = 0.10 + 0.8 * sin(self.view.pitch)
        self.canvas.tube(
            start,
            end,
            self.around(lateral, fore),
            lambda u, v, z: painter(u, v * upper.length, z),
            TRUNK,
            caps=(0.012 * self.size, 0.0),
            arc=arc,
        )

    def pelvis(self) -> None:
        lower, start, stop = self.outfit.lower, np.array(self.at["neck"]), np.array(self.at["pelvis"])
        skirt = lower.cut == "skirt"
        upto = 1.0 + (1.5 * lower.length if skirt else 0.06)
        places, lateral, fore = self.trunk_axes(lower, upto)
        taper = 1 - 0.25 * np.clip((places - 0.85) / 0.25, 0, 1) * (not skirt)
        lateral, fore = (lateral - 0.008) * taper, (fore - 0.010) * taper
        first = 13 if not skirt else int(np.searchsorted(places, 0.62))
        axis = stop - start
        length = hypot(*axis) / self.size * (upto - places[first])
        paint = garments.limb(lower, 5 if skirt else 6, LOWER, self.view.yaw, length)
        belted = paint if not self.outfit.belt else _belted(paint)
        self.canvas.tube(
            start + axis * places[first],
            start + axis * upto,
            self.around(lateral, fore)[first:],
            belted,
            SKIRT if skirt else TRUNK,
            caps=(0.0, 0.0 if skirt else 0.02 * self.size),
            arc=0.10 + 0.8 * sin(self.view.pitch),
        )

    def leg(self, side: int) -> None:
        name, lower, size = "lr"[side], self.outfit.lower, self.size
        girth, yaw = self.person.girth**0.7, self.view.yaw
        hip, knee, ankle = (self.at[name + part] for part in ("hip", "knee", "ankle"))
        self.foot_(side)
        thigh = np.array([0.054, 0.053, 0.046, 0.038]) * girth
        shin = np.array([0.036, 0.038, 0.035, 0.027, 0.021]) * girth**0.7
        cover = 0.0 if lower.cut == "skirt" or self.outfit.upper.cut == "dress" else lower.length
        label = 12 + side
        bare = garments.skin(self.person, label)
        length = 0.5 * self.person.legs
        if cover < 0.95:
            self.canvas.tube(knee, ankle, shin * size, bare, SHIN + side, caps=(0.034 * size, 0.01 * size))
            if cover < 0.5:
                self.canvas.tube(hip, knee, thigh * size, bare, THIGH + side, caps=(0.03 * size, 0.034 * size))
        if cover > 0.5:
            share = min((cover - 0.5) * 2, 1.0)
            end = np.array(knee) + (np.array(ankle) - knee) * share * 1.04
            widths = np.interp(
                np.linspace(0, share, 5), np.linspace(0, 1, 5), shin + lower.loose * np.array([0.6, 0.6, 0.9, 1.2, 1.5])
            )
            self.canvas.tube(
                knee,
                end,
                widths * size,
                garments.limb(lower, 6, LOWER, yaw, length * share, length),
                SHIN + side,
                caps=(0.036 * size, 0.0),
                arc=0.15,
            )
        if cover > 0:
            share = min(cover * 2, 1.0)
            end = np.array(hip) + (np.array(knee) - hip) * share
            widths = np.interp(
                np.linspace(0, share, 4),
                np.linspace(0, 1, 4),
                thigh + lower.loose * (np.array([0.6, 1.4, 1.8, 1.8]) if lower.cut == "shorts" else 0.7),
            )
            self.canvas.tube(
                hip,
                end,
                widths * size,
                garments.limb(lower, 6, LOWER, yaw, length * share),
                THIGH + side,
                caps=(0.03 * size, 0.036 * size if share == 1 else 0.0),
                arc=0.0 if share == 1 else 0.2,
            )
        if self.person.boots and cover < 0.95 or self.person.boots and lower.cut == "leggings":
            start = np.array(knee) + (np.array(ankle) - knee) * 0.45
            paint = garments.shoe(self.person, 9 + side, 0.0, SHOE)
            self.canvas.tube(start, ankle, (np.array([0.037, 0.03, 0.026]) * size), paint, SHIN + side, arc=0.15)

    def foot_(self, side: int) -> None:
        name, size = "lr"[side], self.size
        heel, toe, ankle = (self.at[name + part] for part in ("heel", "toe", "ankle"))
        run = hypot(toe[0] - heel[0], toe[1] - heel[1])
        down = -(toe[0] - heel[0]) / max(run, 1.0)
        paint = garments.shoe(self.person, 9 + side, down, SHOE)
        self.canvas.tube(ankle, heel, np.array([0.023, 0.025]) * size, paint, FOOT + side, caps=(0.012 * size,) * 2)
        self.canvas.tube(
            heel,
            toe,
            np.array([0.025, 0.026, 0.025, 0.021]) * size,
            paint,
            FOOT + side,
            caps=(0.016 * size, 0.018 * size),
        )

    def arm(self, side: int, part: str) -> None:
        name, upper, size, yaw = "lr"[side], self.outfit.upper, self.size, self.view.yaw
        girth = self.person.girth**0.8
        shoulder, elbow, wrist, hand = (self.at[name + p] for p in ("shoulder", "elbow", "wrist", "hand"))
        bare, label = garments.skin(self.person, 14 + side), 7 if upper.cut == "dress" else 4
        short = upper.cut in ("tshirt", "dress")
        cloth_a = (np.array([0.025, 0.033, 0.032, 0.028]) * girth + upper.loose * 0.7) * size
        if part == "arm":
            if short:
                start = np.array(shoulder) + 0.2 * (np.array(elbow) - shoulder)
                self.canvas.tube(
                    start,
                    elbow,
                    np.array([0.029, 0.028, 0.025]) * girth * size,
                    bare,
                    ARM + side,
                    caps=(0.0, 0.024 * size),
                )
                share = 0.45 + 0.25 * (upper.seed % 7) / 7 if upper.cut == "tshirt" else 0.3
                end = np.array(shoulder) + (np.array(elbow) - shoulder) * share
                paint = garments.limb(upper, label, UPPER, yaw, 0.168 * share, sleeve=True)
                self.canvas.tube(
                    shoulder, end, cloth_a[:3] + 0.002 * size, paint, ARM + side, caps=(0.020 * size, 0.0), arc=0.15
                )
            else:
                paint = garments.limb(upper, label, UPPER, yaw, 0.168, sleeve=True)
                self.canvas.tube(shoulder, elbow, cloth_a, paint, ARM + side, caps=(0.020 * size, 0.027 * size))
            return
        self.canvas.tube(
            wrist, hand, np.array([0.016, 0.022, 0.015]) * size, bare, FOREARM + side, caps=(0.006 * size, 0.014 * size)
        )
        if short:
            self.canvas.tube(
                elbow,
                wrist,
                np.array([0.025, 0.024, 0.017]) * girth * size,
                bare,
                FOREARM + side,
                caps=(0.024 * size, 0.006 * size),
            )
        else:
            paint = garments.limb(upper, label, UPPER, yaw, 0.138, 0.168, sleeve=True)
            widths = (np.array([0.028, 0.027, 0.022]) * girth + upper.loose * 0.6) * size
            self.canvas.tube(elbow, wrist, widths, paint, FOREARM + side, caps=(0.026 * size, 0.004 * size), arc=0.12)
        if self.person.bag == "handbag" and side == self.person.seed % 2:
            bags.handbag(self, hand)

    def neck(self) -> None:
        base, head = np.array(self.at["neck"]), np.array(self.at["head"])
        top = base + (head - base) * 0.55
        self.canvas.tube(
            top,
            base + (0, 0.006 * self.size),
            np.array([0.027, 0.028, 0.034]) * self.size,
            garments.skin(self.person, 11, 0.82),
            HEAD,
        )
        colour = self.outfit.scarf or (self.outfit.upper.colour if self.outfit.upper.cut == "hoodie" else None)
        if colour is None:
            return
        scarf, upper = self.outfit.scarf is not None, self.outfit.upper
        label, material, tint = (17 if scarf else 4), (HAT if scarf else UPPER), np.array(colour, np.float32)

        def paint(u, v, z):
            return Surface(tint, label, material, garments.folds(upper, u, v * 0.2) * 0.95)

        back = self.place(0.0, 0.832, 0.012 if scarf else -0.028)
        widths = self.around([0.040, 0.052, 0.046], [0.044, 0.056, 0.05])
        half = np.array([0, 0.018 * self.size])
        self.canvas.tube(
            np.array(back) - half,
            np.array(back) + half,
            widths,
            paint,
            TRUNK,
            caps=(0.012 * self.size, 0.012 * self.size),
            arc=0.25 if self.facing > 0 else 0.1,
        )

    def head_axes(self) -> tuple[float, float]:
        lateral, fore = 0.70 * self.person.head, 0.84 * self.person.head
        return hypot(lateral * cos(self.head_yaw), fore * sin(self.head_yaw)) * self.size, self.person.head * self.size

    def head(self) -> None:
        person, size, style = self.person, self.size, self.person.hair_style
        (x, y), (across, up) = self.at["head"], self.head_axes()
        hair = garments.hair_strand(person, tip=2.0)
        away = -sin(self.head_yaw) * 0.16 * person.head * size
        swell = {"bald": 0.0, "crop": 0.02, "short": 0.07, "afro": 0.42}.get(style, 0.09)
        if swell and self.outfit.hat is None:
            self.canvas.ball(
                (x + away, y - (0.05 + 0.3 * swell) * up),
                across * (1 + swell),
                up * (1 + 0.6 * swell),
                lambda u, w, z: hair(u, w, z)._replace(keep=w < (0.15 if style != "afro" else 0.5)),
                HEAD,
            )
        if style in ("bun", "ponytail") and self.facing_head() > -0.2:
            self._knot(hair, away)
        painter = garments.Head(person, self.outfit.hat, self.head_yaw, HAT)
        self.canvas.ball((x, y), across, up, painter, HEAD, jaw=0.22)
        if style in ("bun", "ponytail") and self.facing_head() <= -0.2:
            self._knot(hair, away)

    def facing_head(self) -> float:
        return cos(self.head_yaw)

    def _knot(self, hair, away: float) -> None:
        """Bun or pony tail at the back of the head."""
        head, size = self.person.head, self.size
        yaw = self.head_yaw
        x, y = self.at["head"]
        x -= sin(yaw) * 0.95 * head * size
        if self.person.hair_style == "bun":
            self.canvas.ball((x, y - 0.45 * head * size), 0.36 * head * size, 0.34 * head * size, hair, HEAD)
        else:
            self.canvas.tube(
                (x, y - 0.3 * head * size),
                (x + 3 * away, y + 1.9 * head * size),
                np.array([0.25, 0.36, 0.3, 0.12]) * head * size,
                hair,
                STRAND,
                caps=(0.2 * head * size, 0.1 * head * size),
            )

    def curtain(self) -> None:
        """Long hair and the bob, hanging behind the neck."""
        drop = {"long": 2.3, "bob": 1.15}.get(self.person.hair_style)
        if drop is None:
            return
        head, size = self.person.head, self.size
        x, y = self.at["head"]
        x -= sin(self.head_yaw) * 0.34 * head * size
        across = self.head_axes()[0] / (head * size)
        widths = np.array([0.6, 1.02, 1.06, 1.0, 0.8]) * across * head * size
        paint = garments.hair_strand(self.person, tip=0.93)
        top = y - (0.2 if self.facing > 0 else 0.45) * head * size
        self.canvas.tube(
            (x, top), (x, y + drop * head * size), widths, paint, STRAND, caps=(0.2 * head * size, 0.0), arc=-0.1
        )


def _belted(paint):
    """The painter with a dark belt around its top."""

    def with_belt(u, v, z):
        surface = paint(u, v, z)
        belt = v < 0.10
        albedo = np.where(belt[:, None], np.float32(0.13), surface.albedo)
        return Surface(albedo, np.where(belt, 8, surface.label), surface.material, surface.relief)

    return with_belt
