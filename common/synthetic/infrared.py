"""Near-infrared and thermal pictures: functions of material, shading and warmth, never of a garment's hue.

What the visible and the infrared picture of a person share is the shape, what a cut is made of (identity.FABRICS), and
a part of how dark the cloth is, prints and stripes included; the thermal picture shares the first two.
"""

import numpy as np

from common.synthetic.canvas import BAG, GLASS, HAIR, HAT, INNER, LOWER, SHOE, SKIN, UPPER, Canvas
from common.synthetic.identity import FABRIC_REFLECTANCE, FABRIC_WARMTH, Identity, Outfit

AIR = 17.0  # degrees Celsius around the person
PIGMENT = 0.4  # share of a dye's darkness that near infrared still sees; the rest is transparent there
COLD, HOT = 10.0, 36.0  # degrees that a thermal camera shows as black and white


def reflectance(person: Identity, outfit: Outfit) -> np.ndarray:
    """(10,) float32 near-infrared reflectance by material, of cloth without its dye."""
    table = np.zeros(10, np.float32)
    table[[SKIN, HAIR, SHOE, BAG, HAT, GLASS]] = (
        0.66,
        0.34,
        0.30 + 0.2 * person.boots,
        0.30 + 0.06 * (person.seed % 5),
        0.5,
        0.08,
    )
    table[UPPER] = FABRIC_REFLECTANCE[outfit.upper.fabric]
    table[INNER] = FABRIC_REFLECTANCE[outfit.inner.fabric]
    table[LOWER] = FABRIC_REFLECTANCE[outfit.lower.fabric] * 0.92
    return table


def warmth(person: Identity, outfit: Outfit) -> np.ndarray:
    """(10,) float32 surface temperature by material, degrees Celsius."""
    table = np.zeros(10, np.float32)
    table[[SKIN, HAIR, SHOE, BAG, HAT, GLASS]] = (33.0, 26.5, 20.5, 18.5, 23.0, 24.0)
    for material, garment in ((UPPER, outfit.upper), (INNER, outfit.inner), (LOWER, outfit.lower)):
        table[material] = AIR + FABRIC_WARMTH[garment.fabric] + 2.0 - 60 * garment.loose
    return table


def near_infrared(canvas: Canvas, person: Identity, outfit: Outfit) -> np.ndarray:
    """(height * width,) float32 in [0, 1]; 0 where nobody is drawn."""
    cloth = np.isin(canvas.material, (UPPER, INNER, LOWER))
    dark = np.where(cloth, PIGMENT * (1 - canvas.albedo.mean(1)), 0)
    return reflectance(person, outfit)[canvas.material] * (1 - dark).astype(np.float32) * canvas.shade


def thermal(canvas: Canvas, person: Identity, outfit: Outfit) -> np.ndarray:
    """(height * width,) float32 degrees; folds that stand off the body are a little cooler. 0 where nobody is drawn."""
    return warmth(person, outfit)[canvas.material] + np.where(canvas.part > 0, 3.0 * (canvas.shade - 1), 0)


def shown(temperature: np.ndarray) -> np.ndarray:
    """Degrees -> uint8 grey values of a thermal camera."""
    return (np.clip((temperature - COLD) / (HOT - COLD), 0, 1) * 255 + 0.5).astype(np.uint8)
