"""Who is drawn and what they wear: seeded identities and, separately, their outfits.

An `Identity` holds what a change of clothes leaves alone (build, skin, hair, face, shoes, bag); an `Outfit` holds the
garments. Colours come from a realistic wardrobe, in which black, grey, navy, white and denim dominate, so that colour
alone says little, and cut, pattern, bag and hair say more.
"""

from typing import NamedTuple

import numpy as np

Colour = tuple[float, float, float]  # red, green, blue in [0, 1]

SKIN: tuple[tuple[Colour, float], ...] = (
    ((0.93, 0.76, 0.65), 3.0),
    ((0.87, 0.68, 0.55), 3.0),
    ((0.77, 0.57, 0.43), 2.0),
    ((0.59, 0.41, 0.30), 1.2),
    ((0.40, 0.27, 0.20), 1.0),
)
HAIR: tuple[tuple[Colour, float], ...] = (
    ((0.09, 0.08, 0.08), 4.0), ((0.19, 0.13, 0.10), 3.0), ((0.36, 0.24, 0.15), 2.0), ((0.66, 0.51, 0.31), 1.2),
    ((0.50, 0.22, 0.12), 0.6), ((0.62, 0.61, 0.60), 0.8),
)  # fmt: skip
CLOTH: tuple[tuple[Colour, float], ...] = (
    ((0.10, 0.10, 0.11), 4.0), ((0.30, 0.31, 0.33), 2.0), ((0.58, 0.59, 0.60), 2.0), ((0.90, 0.90, 0.88), 4.0),
    ((0.13, 0.17, 0.30), 3.2), ((0.20, 0.33, 0.56), 1.8), ((0.50, 0.66, 0.80), 1.4), ((0.66, 0.14, 0.15), 1.8),
    ((0.40, 0.12, 0.17), 0.9), ((0.85, 0.52, 0.56), 1.1), ((0.88, 0.70, 0.22), 0.9), ((0.86, 0.44, 0.15), 0.7),
    ((0.18, 0.36, 0.22), 1.1), ((0.41, 0.44, 0.26), 1.2), ((0.29, 0.58, 0.50), 0.7), ((0.72, 0.62, 0.47), 1.5),
    ((0.42, 0.30, 0.21), 1.0), ((0.43, 0.27, 0.50), 0.7),
)  # fmt: skip
LEGWEAR: tuple[tuple[Colour, float], ...] = (
    ((0.11, 0.11, 0.12), 5.0), ((0.18, 0.24, 0.37), 4.5), ((0.36, 0.46, 0.60), 2.5), ((0.14, 0.17, 0.26), 2.0),
    ((0.40, 0.40, 0.42), 1.6), ((0.70, 0.62, 0.49), 1.6), ((0.40, 0.36, 0.27), 1.0), ((0.85, 0.84, 0.82), 0.9),
    ((0.44, 0.16, 0.18), 0.4), ((0.33, 0.40, 0.30), 0.5),
)  # fmt: skip
SHOES: tuple[tuple[Colour, float], ...] = (
    ((0.10, 0.10, 0.10), 4.0), ((0.90, 0.90, 0.88), 3.0), ((0.45, 0.45, 0.47), 1.5), ((0.36, 0.24, 0.16), 1.5),
    ((0.62, 0.18, 0.18), 0.7), ((0.18, 0.26, 0.48), 0.8), ((0.75, 0.65, 0.50), 0.5),
)  # fmt: skip
# Near-infrared reflectance of cotton, wool, denim, polyester, nylon: a property of the fibre, not of the dye.
FABRIC_REFLECTANCE = (0.72, 0.55, 0.46, 0.63, 0.36)
# What a cut is made of, as indices into these: so the visible shape says something about infrared and heat.
FABRICS = {
    "tshirt": (0, 0, 0, 3, 3),
    "shirt": (0, 0, 0, 3, 1),
    "jacket": (4, 4, 4, 3, 2),
    "hoodie": (0, 0, 0, 3, 1),
    "coat": (1, 1, 1, 1, 4),
    "dress": (3, 3, 3, 0, 1),
    "trousers": (2, 2, 2, 0, 1),
    "leggings": (4, 4, 4, 4, 3),
    "shorts": (3, 3, 3, 0, 2),
    "skirt": (1, 1, 1, 3, 2),
}
# Insulation of the same fabrics: degrees that the outside of the garment lies above the air.
FABRIC_WARMTH = (6.0, 3.2, 5.2, 4.4, 3.8)


class Garment(NamedTuple):
    """One garment. `seed` places folds and prints; `fabric` indexes FABRIC_REFLECTANCE and FABRIC_WARMTH."""

    cut: str  # tshirt | shirt | jacket | coat | hoodie | dress | trousers | leggings | shorts | skirt
    colour: Colour
    second: Colour  # of stripes, checks, blocks, prints, trims
    pattern: str  # plain | stripes | vertical | checks | block | print | raglan | side
    period: float  # of the pattern, as a share of the stature
    fabric: int
    loose: float  # added half-width, as a share of the stature
    length: float  # upper: hem along the torso axis (1 = crotch); lower: share of the leg that is covered
    seed: int


class Outfit(NamedTuple):
    """Clothes of one person on one day. `inner` is seen through an open jacket or coat."""

    upper: Garment
    inner: Garment
    lower: Garment
    hat: Colour | None
    scarf: Colour | None
    belt: bool


class Identity(NamedTuple):
    """What stays when clothes change. Lengths are shares of the stature; `stature` itself is relative to 1."""

    stature: float
    girth: float  # 1 = average
    shoulders: float  # half-distance of the shoulder joints
    hips: float  # half-distance of the hip joints
    head: float  # half-height of the head
    legs: float  # height of the hip joints
    bust: float
    skin: Colour
    hair: Colour
    hair_style: str  # bald | crop | short | bob | long | ponytail | bun | afro
    beard: bool
    glasses: str  # none | clear | dark
    shoes: Colour
    sole: Colour
    boots: bool
    bag: str  # none | backpack | satchel | handbag
    bag_colour: Colour
    bag_trim: Colour
    gait: float  # stride length
    swing: float  # arm swing
    seed: int


def _pick(rng: np.random.Generator, table: tuple, spread: float = 0.03) -> Colour:
    """A colour drawn by weight from `table`, moved a little, so that two black coats differ slightly."""
    weights = np.array([weight for _, weight in table])
    base = np.array(table[rng.choice(len(table), p=weights / weights.sum())][0])
    moved = np.clip(base * (1 + rng.normal(0, spread)) + rng.normal(0, spread / 2, 3), 0.03, 0.97)
    return tuple(float(value) for value in moved)


def _choose(rng: np.random.Generator, options: dict[str, float]) -> str:
    weights = np.array(list(options.values()))
    return list(options)[rng.choice(len(options), p=weights / weights.sum())]


def identity(rng: np.random.Generator) -> Identity:
    """Draws a person."""
    woman = rng.random() < 0.5
    styles = (
        {"long": 4, "ponytail": 3, "bob": 3, "bun": 1.5, "short": 0.7}
        if woman
        else {"short": 4, "crop": 3, "bald": 1, "afro": 0.6, "long": 0.3, "bun": 0.2}
    )
    return Identity(
        stature=float(rng.normal(0.965 if woman else 1.02, 0.03)),
        girth=float(np.clip(rng.lognormal(0.04 if woman else 0.12, 0.12), 0.88, 1.5)),
        shoulders=float(rng.normal(0.097 if woman else 0.109, 0.005)),
        hips=float(rng.normal(0.054 if woman else 0.050, 0.003)),
        head=float(rng.normal(0.070, 0.002)),
        legs=float(rng.normal(0.512, 0.008)),
        bust=float(rng.uniform(0.4, 1.0)) if woman else 0.0,
        skin=_pick(rng, SKIN),
        hair=_pick(rng, HAIR, 0.05),
        hair_style=_choose(rng, styles),
        beard=bool(not woman and rng.random() < 0.3),
        glasses=_choose(rng, {"none": 7, "clear": 2, "dark": 1}),
        shoes=_pick(rng, SHOES),
        sole=(0.86, 0.86, 0.84) if rng.random() < 0.5 else (0.14, 0.13, 0.13),
        boots=bool(rng.random() < (0.3 if woman else 0.12)),
        bag=_choose(rng, {"none": 4, "backpack": 3, "satchel": 1.6, "handbag": 1.6 if woman else 0.5}),
        bag_colour=_pick(rng, CLOTH),
        bag_trim=_pick(rng, CLOTH),
        gait=float(rng.uniform(0.75, 1.15)),
        swing=float(rng.uniform(0.5, 1.15)),
        seed=int(rng.integers(2**31)),
    )


def _upper(rng: np.random.Generator, woman: bool) -> Garment:
    cut = _choose(rng, {"tshirt": 4, "shirt": 2.2, "jacket": 2.4, "hoodie": 1.8, "coat": 1.2, "dress": 0.9 * woman})
    patterns = {
        "tshirt": {"plain": 3, "stripes": 2, "print": 3, "block": 1.2, "raglan": 1.2},
        "shirt": {"plain": 3, "checks": 3, "stripes": 1.5, "vertical": 1.5},
        "jacket": {"plain": 4, "block": 2, "raglan": 1},
        "hoodie": {"plain": 3, "print": 2, "raglan": 1.5},
        "coat": {"plain": 5, "checks": 1},
        "dress": {"plain": 2, "stripes": 1, "checks": 1, "block": 1},
    }
    length = {
        "tshirt": (0.86, 1.02),
        "shirt": (0.84, 1.04),
        "jacket": (0.82, 1.0),
        "hoodie": (0.88, 1.0),
        "coat": (1.25, 1.75),
        "dress": (1.5, 2.1),
    }[cut]
    loose = {"tshirt": 0.004, "shirt": 0.005, "jacket": 0.014, "hoodie": 0.012, "coat": 0.015, "dress": 0.002}[cut]
    return Garment(
        cut=cut,
        colour=_pick(rng, CLOTH),
        second=_pick(rng, CLOTH),
        pattern=_choose(rng, patterns[cut]),
        period=float(rng.uniform(0.022, 0.07)),
        fabric=FABRICS[cut][int(rng.integers(5))],
        loose=loose * float(rng.uniform(0.6, 1.6)),
        length=float(rng.uniform(*length)),
        seed=int(rng.integers(2**31)),
    )


def _lower(rng: np.random.Generator, woman: bool) -> Garment:
    cut = _choose(rng, {"trousers": 6, "leggings": 1.5 * woman, "shorts": 1.6, "skirt": 2.0 * woman})
    length = {"trousers": (0.97, 1.0), "leggings": (0.85, 1.0), "shorts": (0.34, 0.52), "skirt": (0.34, 0.8)}[cut]
    return Garment(
        cut=cut,
        colour=_pick(rng, LEGWEAR),
        second=_pick(rng, CLOTH),
        pattern=_choose(rng, {"plain": 8, "checks": 0.7, "side": 0.9}),
        period=float(rng.uniform(0.03, 0.06)),
        fabric=FABRICS[cut][int(rng.integers(5))],
        loose=0.001 if cut == "leggings" else float(rng.uniform(0.004, 0.014)),
        length=float(rng.uniform(*length)),
        seed=int(rng.integers(2**31)),
    )


def outfit(person: Identity, rng: np.random.Generator) -> Outfit:
    """Draws clothes for `person`; draw again, with another generator, for a change of clothes."""
    woman = person.bust > 0
    upper = _upper(rng, woman)
    inner = _upper(rng, False)._replace(cut="tshirt", loose=0.0, length=0.95)
    return Outfit(
        upper=upper,
        inner=inner,
        lower=_lower(rng, woman),
        hat=_pick(rng, CLOTH) if rng.random() < 0.10 else None,
        scarf=_pick(rng, CLOTH) if rng.random() < (0.3 if upper.cut == "coat" else 0.05) else None,
        belt=bool(rng.random() < 0.3),
    )
