"""The 15 training corruptions for a batch of images on their device: torch only, no loop over images.

    out = corrupt(images, types, severities, generator)   # uint8 (B, 3, H, W), types and severities (B,) on the host

The loop is over the types that occur. Types and severities lie on the host, so that nothing waits for the device; all
other randomness comes from a torch.Generator on it. `corruptions` is the oracle: brightness, contrast, pixelate
and JPEG (libjpeg's integer arithmetic) equal it to the bit, defocus and zoom blur within one grey level of rounding,
the random types in distribution.
"""

from functools import cache, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.images import to_device
from dapg.noise import corruptions as cpu
from dapg.noise.frost import frost_pool
from dapg.noise.jpeg import jpeg_round_trip

TYPES = cpu.TRAIN15
GREY = (0.299, 0.587, 0.114)


def corrupt(images: Tensor, types: np.ndarray, severities: np.ndarray, generator: torch.Generator) -> Tensor:
    """Image i under corruption TYPES[types[i]] at severities[i] in 1..5, -1 leaves it as it is; a new tensor.

    Raises: ValueError for images that are not uint8 (B, 3, H, W) with sides of at least 32, or wrong types, severities.
    """
    types, severities = np.asarray(types), np.asarray(severities)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 32:
        raise ValueError(f"expected uint8 (B, 3, H, W), sides at least 32, got {images.dtype} {tuple(images.shape)}")
    if types.shape != (len(images),) or severities.shape != types.shape:
        raise ValueError(f"{len(images)} images, types {types.shape}, severities {severities.shape}")
    if len(types) and (types.min() < -1 or types.max() >= len(TYPES) or severities.min() < 1 or severities.max() > 5):
        raise ValueError("types must lie in -1..14 and severities in 1..5")
    out = images.clone()
    for kind in np.unique(types[types >= 0]):
        where = np.flatnonzero(types == kind)
        index = to_device(torch.from_numpy(where), images.device)
        level = to_device(torch.from_numpy(severities[where].astype(np.int64) - 1), images.device)
        out[index] = KERNELS[TYPES[kind]](images.index_select(0, index), level, generator)
    return out


def unit(images: Tensor) -> Tensor:
    return images.to(torch.float32) / 255


def to_u8(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255 + 1e-3).to(torch.uint8)


@lru_cache(maxsize=256)
def constants(values: tuple, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of constants, made once a device, since making one waits for it."""
    return torch.tensor(values, dtype=dtype, device=device)


def pick(values: tuple, level: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Each image's entry (B, 1, 1, 1) of a table over severities; level (B,) in 0..4."""
    return constants(tuple(values), level.device, dtype)[level].view(-1, 1, 1, 1)


def uniform(generator, low, high, shape):
    return low + (high - low) * torch.rand(shape, device=generator.device, generator=generator)


# --------------------------------------------------------------------------------------------------------------- noise
def gaussian_noise(images, level, generator):
    noise = torch.randn(images.shape, device=images.device, generator=generator)
    return to_u8(unit(images) + noise * pick(cpu.GAUSSIAN_SIGMA, level))


def shot_noise(images, level, generator):
    rate = pick(cpu.SHOT_RATE, level)
    return to_u8(torch.poisson(unit(images) * rate, generator=generator) / rate)


def impulse_noise(images, level, generator):
    draw, share = uniform(generator, 0, 1, images.shape), pick(cpu.IMPULSE_SHARE, level)
    return torch.where(draw < share / 2, 0, torch.where(draw < share, 255, images))


# ---------------------------------------------------------------------------------------------------------------- blur
def mirrored(size: int, pad: int, kind: str, device: torch.device) -> Tensor:
    """Source index (size + 2 pad,) of a padded line: edge, reflect (border pixel once) or symmetric (twice)."""
    at = torch.arange(-pad, size + pad, device=device)
    if kind == "edge":
        return at.clamp(0, size - 1)
    once = kind == "reflect"
    period = 2 * size - 2 if once else 2 * size
    at = at.remainder(period)
    return torch.where(at < size, at, period - at - (0 if once else 1))


def padded(x: Tensor, pad: tuple[int, int], kind: str) -> Tensor:
    rows, columns = (mirrored(size, p, kind, x.device) for size, p in zip(x.shape[-2:], pad))
    return x.index_select(-2, rows).index_select(-1, columns)


def correlate(x: Tensor, kernels: Tensor, kind: str) -> Tensor:
    """Image b of x (B, C, H, W) correlated with kernels (B, k, k), k odd, by FFT."""
    reach = kernels.shape[-1] // 2
    wide = padded(x, (reach, reach), kind)
    size = [good_size(side) for side in wide.shape[-2:]]
    spectrum = torch.fft.rfft2(wide, s=size) * torch.fft.rfft2(kernels, s=size).conj()[:, None]
    return torch.fft.irfft2(spectrum, s=size)[..., : x.shape[-2], : x.shape[-1]]


@cache
def good_size(n: int) -> int:
    """The next length of small prime factors, for which FFTs are fast."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


@cache
def disks(device: torch.device) -> Tensor:
    """Kernels of defocus blur of all severities, (5, 21, 21)."""
    kernels = [np.pad(disk, (21 - len(disk)) // 2) for disk in map(cpu.disk, range(1, 6))]
    return torch.from_numpy(np.stack(kernels)).to(device)


def defocus_blur(images, level, generator):
    return to_u8(correlate(unit(images), disks(images.device)[level], "reflect"))


def blur(x: Tensor, sigma: Tensor, reach: int, kind: str = "edge", cut: float = 4.0) -> Tensor:
    """Gaussian blur of x (B, C, H, W), sigma (B, 1, 1, 1) or for both axes a pair of floats, cut at `cut` sigma."""
    pair = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    for axis, width in zip((-2, -1), pair):
        width = width if isinstance(width, Tensor) else constants((width,), x.device)
        taps = torch.arange(-reach, reach + 1, device=x.device)
        weight = torch.exp(-(taps**2) / (2 * width**2)) * (taps.abs() <= torch.floor(cut * width + 0.5))
        weight = weight / weight.sum(-1, keepdim=True)
        line = x.index_select(axis, mirrored(x.shape[axis], reach, kind, x.device))
        x = sum(line.narrow(axis, i, x.shape[axis]) * weight[..., i : i + 1] for i in range(2 * reach + 1))
    return x


def glass_blur(images, level, generator):
    sigma = pick(tuple(row[0] for row in cpu.GLASS), level)
    delta = pick(tuple(row[1] for row in cpu.GLASS), level)[:, 0]  # (B, 1, 1)
    rounds = pick(cpu.GLASS_GATHERS, level)[:, 0]
    x = to_u8(blur(unit(images), sigma, 6))
    batch, channels, height, width = x.shape
    rows = torch.arange(height, device=x.device).view(1, -1, 1)
    columns = torch.arange(width, device=x.device).view(1, 1, -1)
    inside = (rows >= delta) & (rows < height - delta) & (columns >= delta) & (columns < width - delta)
    for i in range(max(cpu.GLASS_GATHERS)):
        dy, dx = torch.floor((uniform(generator, 0, 2, (2, batch, height, width)) - 1) * delta).long()
        moves = inside & (rounds > i)
        source = torch.where(moves, (rows + dy) * width + columns + dx, rows * width + columns)  # (B, H, W)
        x = x.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, channels, -1)).view_as(x)
    return to_u8(blur(unit(x), sigma, 6))


def line_kernels(radius: Tensor, sigma: Tensor, angle: Tensor, reach: int) -> Tensor:
    """Kernels (B, 4 reach + 1, 4 reach + 1) of motion blur for radius <= reach, sigma, angle in degrees, each (B,)."""
    steps = torch.arange(2 * reach + 1, device=angle.device)[None]
    weight = torch.exp(-(steps**2) / (2 * sigma[:, None] ** 2)) * (steps <= 2 * radius[:, None])
    weight = weight / weight.sum(1, keepdim=True)
    turn = torch.deg2rad(angle)[:, None]
    down, right = (torch.ceil(steps * f(turn) - 0.5).long() for f in (torch.sin, torch.cos))
    side = 4 * reach + 1
    flat = torch.zeros(len(angle), side * side, device=angle.device)
    return flat.scatter_add_(1, (2 * reach + down) * side + 2 * reach + right, weight).view(-1, side, side)


def motion_blur(images, level, generator):
    radius, sigma = (pick(column, level).flatten() for column in zip(*cpu.MOTION))
    angle = uniform(generator, -45, 45, len(images))
    return to_u8(correlate(unit(images), line_kernels(radius, sigma, angle, 20), "edge"))


@lru_cache(maxsize=32)
def zoom_weights(size: int, device: torch.device) -> Tensor:
    """(5, 16, size, size) bilinear weights of each magnification about the centre, zeros where a list is shorter."""
    out = np.zeros((5, 16, size, size), np.float32)
    rows = np.arange(size)
    for severity, zooms in enumerate(cpu.ZOOMS):
        for i, zoom in enumerate(zooms):
            at = np.clip((rows - (size - 1) / 2) / zoom + (size - 1) / 2, 0, size - 1)
            low = np.minimum(at.astype(np.int64), size - 2)
            np.add.at(out[severity, i], (rows, low), 1 - (at - low))
            np.add.at(out[severity, i], (rows, low + 1), at - low)
    return torch.from_numpy(out).to(device)


def zoom_blur(images, level, generator):
    x = unit(images)
    total, counts = x.clone(), pick(tuple(map(len, cpu.ZOOMS)), level)
    tall, wide = (zoom_weights(size, images.device) for size in images.shape[-2:])
    for i in range(16):
        total += tall[level, i][:, None] @ x @ wide[level, i][:, None].transpose(-1, -2)
    return to_u8(total / (counts + 1))


# ------------------------------------------------------------------------------------------------------------- weather
@lru_cache(maxsize=32)
def zoom_matrix(size: int, device: torch.device) -> Tensor:
    """(5, size, size) weights of corruptions.centre_zoom for the magnifications of snow."""
    out = np.zeros((5, size, size), np.float32)
    for severity, row in enumerate(cpu.SNOW):
        low, share = cpu.zoom_line(size, row[2])
        np.add.at(out[severity], (np.arange(size), low), 1 - share)
        np.add.at(out[severity], (np.arange(size), low + 1), share)
    return torch.from_numpy(out).to(device)


def snow(images, level, generator):
    mean, std, _, threshold, radius, sigma, mix = (pick(column, level) for column in zip(*cpu.SNOW))
    x, (height, width) = unit(images), images.shape[-2:]
    layer = mean + std * torch.randn(len(x), 1, height, width, device=x.device, generator=generator)
    tall, wide = zoom_matrix(height, x.device)[level][:, None], zoom_matrix(width, x.device)[level][:, None]
    layer = tall @ layer @ wide.transpose(-1, -2)
    layer = torch.where(layer < threshold, 0, layer).clamp(0, 1)
    angle = uniform(generator, -135, -45, len(x))
    layer = correlate(layer, line_kernels(radius.flatten(), sigma.flatten(), angle, 12), "edge")
    layer = torch.round(layer * 255) / 255
    grey = (x * constants(GREY, x.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
    x = mix * x + (1 - mix) * torch.maximum(x, grey * 1.5 + 0.5)
    return to_u8(x + layer + layer.flip((-2, -1)))


@cache
def textures(device: torch.device) -> Tensor:
    """The frost textures uint8 (T, 3, 512, 512) on the device."""
    return torch.from_numpy(frost_pool()).permute(0, 3, 1, 2).contiguous().to(device)


def frost(images, level, generator):
    pool, (batch, _, height, width) = textures(images.device), images.shape
    a, b = (pick(column, level) for column in zip(*cpu.FROST))
    places = len(pool), max(1, pool.shape[2] - height + 1), max(1, pool.shape[3] - width + 1)
    which, top, left = (torch.floor(uniform(generator, 0, 1, (batch, 1, 1, 1)) * count).long() for count in places)
    rows = (top + torch.arange(height, device=images.device).view(1, 1, -1, 1)) % pool.shape[2]
    columns = torch.arange(width, device=images.device).view(1, 1, 1, -1)
    columns = torch.where(uniform(generator, 0, 1, (batch, 1, 1, 1)) < 0.5, columns, width - 1 - columns)
    columns = (left + columns) % pool.shape[3]
    cut = pool[which, torch.arange(3, device=images.device).view(1, 3, 1, 1), rows, columns]
    return to_u8((a * images.float() + b * cut.float()) / 255)


def plasma(batch: int, size: int, decay: Tensor, generator: torch.Generator) -> Tensor:
    """Diamond-square height maps (B, size, size) on a torus, min 0, max 1; decay (B,)."""
    field = torch.zeros(batch, size, size, device=decay.device)
    step, wobble = size, torch.full((batch, 1, 1), 100.0, device=decay.device)

    def middle(total):
        return total / 4 + wobble * wobble * uniform(generator, -1, 1, total.shape)

    while step >= 2:
        half = step // 2
        corner = field[:, ::step, ::step]
        pairs = corner + corner.roll(-1, 1)
        field[:, half::step, half::step] = middle(pairs + pairs.roll(-1, 2))
        inner = field[:, half::step, half::step]
        field[:, ::step, half::step] = middle(inner + inner.roll(1, 1) + corner + corner.roll(-1, 2))
        field[:, half::step, ::step] = middle(inner + inner.roll(1, 2) + corner + corner.roll(-1, 1))
        step, wobble = half, wobble / decay.view(-1, 1, 1)
    field -= field.amin((1, 2), keepdim=True)
    return field / field.amax((1, 2), keepdim=True)


def fog(images, level, generator):
    gain, decay = (pick(column, level) for column in zip(*cpu.FOG))
    x, (height, width) = unit(images), images.shape[-2:]
    size = 1 << (max(height, width) - 1).bit_length()
    top = x.amax((1, 2, 3), keepdim=True)
    x = x + gain * plasma(len(x), size, decay.flatten(), generator)[:, None, :height, :width]
    return to_u8(x * (top / (top + gain)))


# -------------------------------------------------------------------------------------------------------------- digital
@cache
def brightness_tables(device: torch.device) -> Tensor:
    """(5 * 256 * 256,) uint8, severity, largest channel, channel."""
    return torch.from_numpy(np.stack([cpu.brightness_table(s) for s in range(1, 6)])).flatten().to(device)


def brightness(images, level, generator):
    largest = images.amax(1, keepdim=True).to(torch.int32)
    index = (level.view(-1, 1, 1, 1).to(torch.int32) * 256 + largest) * 256 + images
    return brightness_tables(images.device)[index]


def contrast(images, level, generator):
    mean = images.sum((2, 3), dtype=torch.int64).double() / (images.shape[2] * images.shape[3])  # (B, 3)
    c = constants(cpu.CONTRAST, images.device, torch.float64)[level].view(-1, 1, 1)
    value = torch.arange(256, device=images.device, dtype=torch.float64)
    table = ((value - mean[..., None]) * c + mean[..., None]) / 255
    table = (table.clamp(0, 1) * 255 + 1e-3).to(torch.uint8)  # (B, 3, 256)
    return table.gather(2, images.flatten(2).long()).view_as(images)


def elastic_transform(images, level, generator):
    batch, _, height, width = images.shape
    field = uniform(generator, -0.005 * height, 0.005 * height, (batch, 2, height, width))
    sides = (0.01 * height, 0.01 * width)
    field = blur(field, sides, int(3 * max(sides) + 0.5), "symmetric", cut=3.0) * pick(cpu.ELASTIC, level)
    columns = torch.arange(width, device=images.device) + field[:, 0]
    rows = torch.arange(height, device=images.device)[:, None] + field[:, 1]
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], -1)
    return to_u8(F.grid_sample(unit(images), grid, mode="bilinear", padding_mode="reflection", align_corners=False))


@lru_cache(maxsize=64)
def boxes(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """First and end source pixel and PIL's 22-bit weight (5, size) of the box that each output pixel repeats."""
    first, end = (np.zeros((5, size), np.int64) for _ in range(2))
    for severity, share in enumerate(cpu.PIXELATE):
        small = int(size * share)
        scale = size / small
        centre, at = (np.arange(small)[:, None] + 0.5) * scale, np.arange(size)
        inside = (at >= np.floor(centre - scale / 2 + 0.5)) & (at < np.floor(centre + scale / 2 + 0.5))
        reach = (at - centre + 0.5) * (1 / scale)
        inside &= (reach > -0.5) & (reach <= 0.5)
        low, high = inside.argmax(1), size - inside[:, ::-1].argmax(1)
        cell = np.cumsum(np.r_[0.5, np.ones(size - 1)] * (small / size)).astype(np.int64)  # PIL adds up, ties and all
        first[severity], end[severity] = low[cell], high[cell]
    weight = np.floor((1 << 22) / (end - first) + 0.5).astype(np.int64)
    return tuple(torch.from_numpy(table).to(device) for table in (first, end, weight))


def box_line(images: Tensor, level: Tensor) -> Tensor:
    """Mean of each pixel's box along the last axis, rounded as PIL rounds."""
    first, end, weight = (table[level][:, None, None, :] for table in boxes(images.shape[-1], images.device))
    sums = F.pad(images.to(torch.int64).cumsum(-1), (1, 0))
    total = sums.gather(-1, end.expand(*images.shape)) - sums.gather(-1, first.expand(*images.shape))
    return ((total * weight + (1 << 21)) >> 22).clamp(0, 255)


def pixelate(images, level, generator):
    return box_line(box_line(images, level).transpose(-1, -2), level).transpose(-1, -2).to(torch.uint8)


def jpeg_compression(images, level, generator):
    return jpeg_round_trip(images, constants(cpu.JPEG_QUALITY, images.device, torch.int64)[level])


KERNELS = {name: globals()[name] for name in TYPES}
