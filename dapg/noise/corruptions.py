"""The noise library (sec. II-A): 20 image corruptions in 5 severities on the CPU, the oracle of `device_corruptions`.

    out = corrupt(image, "fog", 3, numpy.random.default_rng(0))      # uint8 (H, W, 3) -> uint8 (H, W, 3)

The 15 types of ImageNet-C [13] are the training noise; four more and rain complete the 20 types of the -C benchmarks
(CIL). Parameters and algorithms follow the package `imagecorruptions` 1.1.2, which CIL runs, re-implemented; parameters
in pixels are those tuned for 224 x 224 and are not scaled with the image. All randomness is the given generator's.
Deviation: frost uses procedural textures instead of photographs (dapg/noise/frost.py), glass blur a vectorised gather
instead of a loop (exact=True runs it), with its mean PSNR within 0.6 dB, at severity 2 within 1.3.
"""

import io
from functools import cache

import cv2
import numpy as np
from PIL import Image

from dapg.noise.frost import frost_pool
from dapg.noise.names import BENCH20, EXTRA4, TRAIN15  # noqa: F401 for those who look for the types here

# Parameters of severities 1..5, from imagecorruptions.
GAUSSIAN_SIGMA = (0.08, 0.12, 0.18, 0.26, 0.38)
SHOT_RATE = (60, 25, 12, 5, 3)
IMPULSE_SHARE = (0.03, 0.06, 0.09, 0.17, 0.27)
DEFOCUS = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))  # radius, sigma of the softened edge
GLASS = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))  # sigma, delta, iterations of the loop
GLASS_GATHERS = (2, 1, 4, 3, 3)  # iterations of the vectorised form with the loop's PSNR
MOTION = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))  # radius, sigma
ZOOMS = tuple(
    tuple(1 + step * i for i in range(count))
    for step, count in ((0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11))
)
SNOW = (
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)  # mean, std, zoom, threshold, radius, sigma, blend
FROST = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
FOG = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))  # gain, decay
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
ELASTIC = tuple(250 * a for a in (0.05, 0.065, 0.085, 0.1, 0.12))
PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)
JPEG_QUALITY = (25, 18, 15, 10, 7)
SPECKLE = (0.15, 0.2, 0.35, 0.45, 0.6)
BLUR_SIGMA = (1, 2, 3, 4, 6)
SATURATE = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))
SPATTER = (
    (0.65, 0.3, 4, 0.69, 0.6, 0),
    (0.65, 0.3, 3, 0.68, 0.6, 0),
    (0.65, 0.3, 2, 0.68, 0.5, 0),
    (0.65, 0.3, 1, 0.65, 1.5, 1),
    (0.67, 0.4, 1, 0.65, 1.5, 1),
)  # loc, scale, sigma, threshold, strength, mud
RAIN = ((770, 10), (600, 30), (600, 30), (500, 60), (500, 60))  # pixels a drop, length
GREY = np.array([0.299, 0.587, 0.114], np.float32)


def corrupt(image: np.ndarray, name: str, severity: int, rng: np.random.Generator, exact: bool = False) -> np.ndarray:
    """The uint8 image (H, W, 3) under corruption `name` at `severity` 1..5, same shape and type.

    exact=True runs glass blur's published loop of pixel swaps. Raises: ValueError for an unknown name or severity, a
    wrong image, or a side below 32 pixels.
    """
    if name not in BENCH20:
        raise ValueError(f"unknown corruption {name!r}; known: {', '.join(BENCH20)}")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"{name}: severity {severity} is not one of 1..5")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 32:
        raise ValueError(f"{name}: expected uint8 (H, W, 3) of at least 32 x 32, got {image.dtype} {image.shape}")
    if name == "glass_blur" and exact:
        return glass_loop(image, severity, rng)
    return KERNELS[name](image, severity, rng)


def to_u8(x: np.ndarray) -> np.ndarray:
    """[0, 1] floats to uint8 by truncation, as imagecorruptions does; 0.001 levels protect whole values."""
    return (np.clip(x, 0, 1) * 255 + 1e-3).astype(np.uint8)


def unit(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32) / 255


# --------------------------------------------------------------------------------------------------------------- noise
def gaussian_noise(image, severity, rng):
    x = unit(image)
    return to_u8(x + rng.standard_normal(x.shape, np.float32) * GAUSSIAN_SIGMA[severity - 1])


def shot_noise(image, severity, rng):
    rate = SHOT_RATE[severity - 1]
    return to_u8(rng.poisson(unit(image) * rate) / rate)


def impulse_noise(image, severity, rng):
    """Each value, not each pixel, becomes 0 or 255 with probability p, half each."""
    draw, share, out = rng.random(image.shape, np.float32), IMPULSE_SHARE[severity - 1], image.copy()
    out[draw < share / 2] = 0
    out[(draw >= share / 2) & (draw < share)] = 255
    return out


def speckle_noise(image, severity, rng):
    x = unit(image)
    return to_u8(x + x * rng.standard_normal(x.shape, np.float32) * SPECKLE[severity - 1])


# ---------------------------------------------------------------------------------------------------------------- blur
@cache
def disk(severity: int) -> np.ndarray:
    """Kernel of defocus blur, float32 (k, k), sum about 1: a disk with softened edge."""
    radius, alias = DEFOCUS[severity - 1]
    line = np.arange(-8, 9) if radius <= 8 else np.arange(-radius, radius + 1)
    grid = (line[:, None] ** 2 + line[None] ** 2 <= radius**2).astype(np.float32)
    size = 3 if radius <= 8 else 5
    return cv2.GaussianBlur(grid / grid.sum(), (size, size), sigmaX=alias)


def defocus_blur(image, severity, rng):
    return to_u8(cv2.filter2D(unit(image), -1, disk(severity)))


def blur(x: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur cut at 4 sigma with the border repeated, equal to skimage's `gaussian` (mode nearest)."""
    size = 2 * int(4 * sigma + 0.5) + 1
    return cv2.GaussianBlur(x, (size, size), sigmaX=sigma, borderType=cv2.BORDER_REPLICATE)


def gaussian_blur(image, severity, rng):
    return to_u8(blur(unit(image), BLUR_SIGMA[severity - 1]))


def glass_blur(image, severity, rng):
    """Blur, move pixels by random offsets in [-delta, delta), blur; a border of delta pixels stays in place."""
    sigma, delta, _ = GLASS[severity - 1]
    x = to_u8(blur(unit(image), sigma))
    height, width = x.shape[:2]
    rows, columns = np.mgrid[delta : height - delta, delta : width - delta]
    for _ in range(GLASS_GATHERS[severity - 1]):
        dy, dx = rng.integers(-delta, delta, (2, *rows.shape))
        moved = x.copy()
        moved[delta : height - delta, delta : width - delta] = x[rows + dy, columns + dx]
        x = moved
    return to_u8(blur(unit(x), sigma))


def glass_loop(image, severity, rng):
    """The published algorithm: pixels are overwritten in place, one after another, from the lower right."""
    sigma, delta, iterations = GLASS[severity - 1]
    x = to_u8(blur(unit(image), sigma))
    height, width = x.shape[:2]
    for _ in range(iterations):
        offsets = rng.integers(-delta, delta, (height, width, 2)).tolist()
        for row in range(height - delta, delta, -1):
            for column in range(width - delta, delta, -1):
                dx, dy = offsets[row][column]
                x[row, column] = x[row + dy, column + dx]  # the published swap assigns through views: it only copies
    return to_u8(blur(unit(x), sigma))


def motion_kernel(radius: int, sigma: float, angle: float) -> np.ndarray:
    """One-sided line kernel (4 radius + 1)^2 float32, sum 1: correlation with it smears along `angle` degrees."""
    steps = np.arange(2 * radius + 1)
    weight = np.exp(-(steps**2) / (2 * sigma**2))
    weight /= weight.sum()
    dy = -np.ceil(steps * np.sin(np.deg2rad(angle)) - 0.5).astype(int)
    dx = -np.ceil(steps * np.cos(np.deg2rad(angle)) - 0.5).astype(int)
    kernel = np.zeros((4 * radius + 1, 4 * radius + 1), np.float32)
    np.add.at(kernel, (2 * radius - dy, 2 * radius - dx), weight)
    return kernel


def shift_blur(x: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    return cv2.filter2D(x, -1, motion_kernel(radius, sigma, angle), borderType=cv2.BORDER_REPLICATE)


def motion_blur(image, severity, rng):
    return to_u8(shift_blur(unit(image), *MOTION[severity - 1], rng.uniform(-45, 45)))


def zoom_blur(image, severity, rng):
    x, (height, width) = unit(image), image.shape[:2]
    centre, zooms, total = ((width - 1) / 2, (height - 1) / 2), ZOOMS[severity - 1], unit(image)
    for zoom in zooms:
        move = np.array([[zoom, 0, centre[0] * (1 - zoom)], [0, zoom, centre[1] * (1 - zoom)]])
        total = total + cv2.warpAffine(x, move, (width, height), borderMode=cv2.BORDER_REPLICATE)
    return to_u8(total / (len(zooms) + 1))


# ------------------------------------------------------------------------------------------------------------- weather
def centre_zoom(layer: np.ndarray, zoom: float) -> np.ndarray:
    """The layer (H, W) magnified about its centre, linear, ends of the crop mapped to the ends of the enlargement."""
    rows, columns = (zoom_line(size, zoom) for size in layer.shape)
    out = layer
    for axis, (low, share) in enumerate((rows, columns)):
        share = share[:, None] if axis == 0 else share[None]
        out = np.take(out, low, axis) * (1 - share) + np.take(out, low + 1, axis) * share
    return out.astype(np.float32)


def zoom_line(size: int, zoom: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower source index (size,) and weight of the next one, for one axis of centre_zoom."""
    crop = int(np.ceil(size / zoom))
    grown = max(int(round(crop * zoom)), size)
    position = (np.arange(size) + (grown - size) // 2) * (crop - 1) / max(grown - 1, 1) + (size - crop) // 2
    low = np.minimum(position.astype(np.int64), size - 2)
    return low, (position - low).astype(np.float32)


def snow(image, severity, rng):
    mean, std, zoom, threshold, radius, sigma, mix = SNOW[severity - 1]
    x = unit(image)
    layer = centre_zoom(rng.normal(mean, std, x.shape[:2]).astype(np.float32), zoom)
    layer = np.clip(np.where(layer < threshold, 0, layer), 0, 1)
    layer = np.round(shift_blur(layer, radius, sigma, rng.uniform(-135, -45)) * 255)[..., None].astype(np.float32) / 255
    grey = (x @ GREY)[..., None]
    x = mix * x + (1 - mix) * np.maximum(x, grey * 1.5 + 0.5)
    return to_u8(x + layer + layer[::-1, ::-1])


def frost(image, severity, rng):
    """a * image + b * a random, perhaps mirrored crop of a random texture."""
    a, b = FROST[severity - 1]
    textures = frost_pool()
    texture, (height, width) = textures[rng.integers(len(textures))], image.shape[:2]
    top, left = (int(rng.integers(max(1, size - wanted + 1))) for size, wanted in zip(texture.shape, (height, width)))
    rows, columns = (top + np.arange(height)) % texture.shape[0], (left + np.arange(width)) % texture.shape[1]
    cut = texture[rows[:, None], columns[None]]
    if rng.random() < 0.5:
        cut = cut[:, ::-1]
    return to_u8((a * image.astype(np.float32) + b * cut) / 255)


def plasma(size: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """Diamond-square height map (size, size) on a torus, min 0, max 1; size a power of two."""
    field, step, wobble = np.zeros((size, size)), size, 100.0

    def middle(total):
        return total / 4 + wobble * rng.uniform(-wobble, wobble, total.shape)

    while step >= 2:
        half = step // 2
        corner = field[::step, ::step]
        pairs = corner + np.roll(corner, -1, 0)
        field[half::step, half::step] = middle(pairs + np.roll(pairs, -1, 1))
        inner = field[half::step, half::step]
        field[::step, half::step] = middle(inner + np.roll(inner, 1, 0) + corner + np.roll(corner, -1, 1))
        field[half::step, ::step] = middle(inner + np.roll(inner, 1, 1) + corner + np.roll(corner, -1, 0))
        step, wobble = half, wobble / decay
    field -= field.min()
    return field / field.max()


def fog(image, severity, rng):
    gain, decay = FOG[severity - 1]
    x, (height, width) = unit(image), image.shape[:2]
    size = 1 << (max(height, width) - 1).bit_length()
    top = float(x.max())
    x = x + gain * plasma(size, decay, rng)[:height, :width, None]
    return to_u8(x * (top / (top + gain)))


def spatter(image, severity, rng):
    loc, scale, sigma, threshold, strength, mud = SPATTER[severity - 1]
    x = unit(image)
    layer = blur(rng.normal(loc, scale, x.shape[:2]).astype(np.float32), sigma)
    layer[layer < threshold] = 0
    if mud:
        mask = blur((layer > threshold).astype(np.float32), strength)[..., None]
        mask[mask < 0.8] = 0
        return to_u8(x * (1 - mask) + mask * np.array([63, 42, 20], np.float32) / 255)
    grey = (layer * 255).clip(0, 255).astype(np.uint8)
    dist = cv2.distanceTransform(255 - cv2.Canny(grey, 50, 150), cv2.DIST_L2, 5)
    dist = cv2.equalizeHist(cv2.blur(np.minimum(dist, 20), (3, 3)).astype(np.uint8))
    dist = cv2.filter2D(dist, cv2.CV_8U, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]))
    mask = layer * cv2.blur(dist, (3, 3)).astype(np.float32)
    mask = (mask / max(float(mask.max()), 1e-9) * strength)[..., None]
    return to_u8(x + mask * np.array([175, 238, 238], np.float32) / 255)


def rain(image, severity, rng):
    """Streaks of grey 200, one slant an image, then a box blur and a darker image (albumentations 0.5.2, as CIL).

    Deviation: the slant that is sampled is also drawn; the old package always drew +10.
    """
    area, length = RAIN[severity - 1]
    full = image.shape
    image = image if full[0] >= 65 else cv2.resize(image, (full[1], 65))
    out, (height, width) = image.copy(), image.shape[:2]
    slant = int(rng.integers(-10, 11))
    for _ in range(height * width // area):
        low, high = max(0, -slant), min(width, width - slant)
        x, y = int(rng.integers(low, max(high, low + 1))), int(rng.integers(0, max(1, height - length)))
        cv2.line(out, (x, y), (x + slant, y + length), (200, 200, 200), 1)
    out = cv2.blur(out, (2 + severity, 2 + severity)).astype(np.float32) - (0.05 + 0.05 * severity) * 255
    out = np.clip(out, 0, 255).astype(np.uint8)
    return out if full[0] >= 65 else cv2.resize(out, (full[1], full[0]))


# -------------------------------------------------------------------------------------------------------------- digital
@cache
def brightness_table(severity: int) -> np.ndarray:
    """New value uint8 (256, 256) for [largest channel, channel] of a pixel: V of HSV raised."""
    top, value = np.meshgrid(np.arange(256.0), np.arange(256.0), indexing="ij")
    raised = np.minimum(top / 255 + BRIGHTNESS[severity - 1], 1)
    return to_u8(raised * np.where(top > 0, np.minimum(value / np.maximum(top, 1), 1), 1))


def brightness(image, severity, rng):
    return brightness_table(severity)[image.max(2, keepdims=True), image]


def contrast_table(mean: np.ndarray, severity: np.ndarray) -> np.ndarray:
    """New value uint8 (..., 256) of each value for channel means (...) in 0..255 and severities (...)."""
    c = np.array(CONTRAST)[np.asarray(severity) - 1][..., None]
    return to_u8(((np.arange(256.0) - mean[..., None]) * c + mean[..., None]) / 255)


def contrast(image, severity, rng):
    mean = image.reshape(-1, 3).sum(0, dtype=np.int64) / (image.shape[0] * image.shape[1])
    return contrast_table(mean, np.full(3, severity))[np.arange(3), image]


def saturate(image, severity, rng):
    """S * a + b in HSV; a grey pixel has hue 0, so severities 4 and 5 turn it reddish, as in imagecorruptions."""
    a, b = SATURATE[severity - 1]
    x = unit(image)
    top, low = x.max(2, keepdims=True), x.min(2, keepdims=True)
    chroma = top - low
    wanted = np.clip(np.where(top > 0, chroma / np.maximum(top, 1e-9), 0) * a + b, 0, 1) * top
    grey = np.array([0, 1, 1], np.float32)  # how far each channel of pure red lies below the largest
    below = np.where(chroma > 0, (top - x) / np.maximum(chroma, 1e-9), grey)
    return to_u8(top - below * wanted)


def elastic_transform(image, severity, rng):
    """Displacement alpha * smoothed U(-0.005 H, 0.005 H) in both directions, bilinear, border mirrored."""
    x, (height, width) = unit(image), image.shape[:2]
    bound = 0.005 * height
    fields = rng.uniform(-bound, bound, (2, height, width)).astype(np.float32)
    dx, dy = (ELASTIC[severity - 1] * smooth(field) for field in fields)
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return to_u8(cv2.remap(x, columns + dx, rows + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT))


def smooth(field: np.ndarray) -> np.ndarray:
    """Gaussian filter of a field (H, W), sigma (0.01 H, 0.01 W), cut at 3 sigma, border mirrored."""
    height, width = field.shape
    size = tuple(2 * int(3 * 0.01 * side + 0.5) + 1 for side in (width, height))
    return cv2.GaussianBlur(field, size, sigmaX=0.01 * width, sigmaY=0.01 * height, borderType=cv2.BORDER_REFLECT)


def pixelate(image, severity, rng):
    height, width = image.shape[:2]
    small = (int(width * PIXELATE[severity - 1]), int(height * PIXELATE[severity - 1]))
    shrunk = Image.fromarray(image).resize(small, Image.Resampling.BOX)
    return np.asarray(shrunk.resize((width, height), Image.Resampling.NEAREST))


def jpeg_compression(image, severity, rng):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY[severity - 1])
    return np.asarray(Image.open(buffer))


KERNELS = {name: globals()[name] for name in BENCH20}
