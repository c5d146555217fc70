"""Frost textures without image files: procedural needle ice with the statistics of imagecorruptions' photographs."""

from functools import lru_cache

import cv2
import numpy as np

# Frost photographs of imagecorruptions: mean, std of their grey values, mean colour, how often the package draws them.
FROST_LOOKS = (
    (129, 14, (78, 149, 166), 0.2),
    (203, 19, (201, 205, 215), 0.4),
    (154, 24, (138, 153, 165), 0.2),
    (112, 33, (112, 123, 135), 0.2),
)
FROST_SIZE = 512


def spectrum_noise(rng: np.random.Generator, size: int, alpha: float) -> np.ndarray:
    """(size, size) float, mean 0, std 1, power spectrum |f|^-alpha."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    f[0, 0] = np.inf
    phase = np.exp(2j * np.pi * rng.random(f.shape))
    return standard(np.fft.irfft2(f ** (-alpha / 2) * phase, (size, size)))


def standard(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / max(x.std(), 1e-9)


def frost_texture(rng: np.random.Generator, look: int, size: int = FROST_SIZE) -> np.ndarray:
    """Needle ice, uint8 (size, size, 3), with the grey mean, deviation and colour of frost photograph `look`."""
    mean, std, colour, _ = FROST_LOOKS[look]
    needles = np.zeros((size, size), np.float32)
    for _ in range(10):
        half, angle = int(rng.integers(6, 26)), rng.uniform(0, np.pi)
        line = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
        dx, dy = int(round(half * np.cos(angle))), int(round(half * np.sin(angle)))
        cv2.line(line, (half - dx, half - dy), (half + dx, half + dy), 1.0, 1)
        seeds = (rng.random((size, size)) < 0.0015) * rng.random((size, size))
        needles = np.maximum(needles, cv2.filter2D(seeds.astype(np.float32), -1, line))
    needles = standard(cv2.GaussianBlur(np.clip(needles, 0, 1), (3, 3), 0.7))
    t = standard(0.7 * spectrum_noise(rng, size, 3.2) + 0.6 * needles + 0.3 * spectrum_noise(rng, size, 1.4))
    grey = np.clip(mean + std * t, 0, 255)[..., None]
    return (np.clip(grey * np.array(colour) / np.mean(colour), 0, 255) + 0.5).astype(np.uint8)


@lru_cache(maxsize=2)
def frost_pool(count: int = 32, seed: int = 0) -> np.ndarray:
    """Frost textures uint8 (count, 512, 512, 3), looks in the proportions of imagecorruptions' draws."""
    shares = np.array([look[3] for look in FROST_LOOKS])
    looks = np.searchsorted(np.cumsum(shares), (np.arange(count) + 0.5) / count)
    return np.stack([frost_texture(np.random.default_rng([seed, i]), int(look)) for i, look in enumerate(looks)])
