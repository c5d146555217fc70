"""Noise groups of the robustness training (sec. II-A, Fig. 3) and AugMix operations, batched on the device.

For an image, three noise types n1, n2, n3 and severities are drawn once. With views a, b, c of it:
x_q = n1(a), x_1 = n2(n1(b)), x_2 = n3(n2(n1(c))), and x_mix = m a + (1 - m)(w1 x_q + w2 x_1 + w3 x_2) as in AugMix.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import transforms
from dapg.noise import corruptions, device_corruptions

OPERATIONS = (
    "autocontrast",
    "equalize",
    "posterize",
    "rotate",
    "solarize",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)


class Draw(NamedTuple):
    """Host draws of a batch: types and severities (B, 3), AugMix weights w (B, 3) and m (B,)."""

    types: np.ndarray
    severities: np.ndarray
    weights: np.ndarray
    mix: np.ndarray


class Group(NamedTuple):
    """uint8 (B, 3, H, W) each: the anchor noise image, the second and third noise image, the mix; and the draw."""

    q: Tensor
    one: Tensor
    two: Tensor
    mix: Tensor
    draw: Draw


def allowed_types(exclude: list[str]) -> np.ndarray:
    """Indices of the training corruptions without `exclude`. Raises: ValueError for unknown names, fewer than three."""
    unknown = sorted(set(exclude) - set(corruptions.TRAIN15))
    if unknown:
        raise ValueError(f"--noise-exclude {', '.join(unknown)}: known are {', '.join(corruptions.TRAIN15)}")
    kept = np.array([i for i, name in enumerate(corruptions.TRAIN15) if name not in exclude])
    if len(kept) < 3:
        raise ValueError(f"--noise-exclude leaves {len(kept)} noise types, a group needs three distinct ones")
    return kept


def draw_noise(batch: int, rng: np.random.Generator, severity_max: int = 5, types: np.ndarray | None = None) -> Draw:
    """Distinct types, uniform; severities U{1..severity_max}; w ~ Dirichlet(1, 1, 1), m ~ Beta(1, 1).

    Paper silent: with or without replacement (distinct), the severities, the mixing weights (AugMix's).
    """
    types = np.arange(len(corruptions.TRAIN15)) if types is None else types
    chosen = types[rng.random((batch, len(types))).argsort(1)[:, :3]]
    severities = rng.integers(1, severity_max + 1, (batch, 3))
    return Draw(
        chosen, severities, rng.dirichlet((1, 1, 1), batch).astype(np.float32), rng.beta(1, 1, batch).astype(np.float32)
    )


def noise_group(
    views: tuple[Tensor, Tensor, Tensor], draw: Draw, generator: torch.Generator, augmix_ops: bool = False
) -> Group:
    """The group of views a, b, c, uint8 (B, 3, H, W) each, three different augmentations of the same images ("views").

    The second noise lies on top of the first, the third on top of the first two: same types and severities, fresh
    fields. augmix_ops also runs AugMix's nine operations on the chains of the mix.
    """
    a, b, c = views
    n = draw.types.T, draw.severities.T
    first = device_corruptions.corrupt(torch.cat([a, b, c]), np.tile(n[0][0], 3), np.tile(n[1][0], 3), generator)
    x_q, b, c = first.chunk(3)
    second = device_corruptions.corrupt(torch.cat([b, c]), np.tile(n[0][1], 2), np.tile(n[1][1], 2), generator)
    x_1, c = second.chunk(2)
    x_2 = device_corruptions.corrupt(c, n[0][2], n[1][2], generator)
    return Group(x_q, x_1, x_2, mixed(a, (x_q, x_1, x_2), draw, generator, augmix_ops), draw)


def noise_chain(images: Tensor, draw: Draw, generator: torch.Generator, augmix_ops: bool = False) -> Group:
    """Fig. 3's flow ("chain"): n1 of the image, n2 of that, n3 of that, three corruptions and an aligned mix.

    The four images are augmented afterwards, each for itself.
    """
    chain, x = [], images
    for step in range(3):
        x = device_corruptions.corrupt(x, draw.types[:, step], draw.severities[:, step], generator)
        chain.append(x)
    return Group(*chain, mixed(images, chain, draw, generator, augmix_ops), draw)


def mixed(clean: Tensor, chains, draw: Draw, generator: torch.Generator, augmix_ops: bool) -> Tensor:
    """AugMix's skip connection: m clean + (1 - m) sum_i w_i chain_i on [0, 1] floats, rounded to uint8."""
    weights, m = (
        torch.from_numpy(np.ascontiguousarray(values)).to(clean.device, non_blocking=True)
        for values in (draw.weights.T, draw.mix)
    )
    if augmix_ops:
        chains = [augmix_chain(chain, generator) for chain in chains]
    total = sum(w.view(-1, 1, 1, 1) * chain.float() for w, chain in zip(weights, chains))
    m = m.view(-1, 1, 1, 1)
    return (m * clean.float() + (1 - m) * total + 0.5).clamp(0, 255).to(torch.uint8)


# -------------------------------------------------------------------------------------------------------------- AugMix
def augmix(images: Tensor, generator: torch.Generator, severity: float = 3.0, width: int = 3) -> Tensor:
    """AugMix (Hendrycks et al. 2020) of uint8 (B, 3, H, W): `width` chains of 1-3 random operations, mixed, uint8.

    Level l ~ U(0.1, severity) / 10; colour, contrast, brightness and sharpness are left out, as they overlap the
    benchmark.
    """
    batch, device = len(images), images.device
    weights = torch.distributions.utils.clamp_probs(transforms.uniform(generator, (width, batch))).log().neg()
    weights = weights / weights.sum(0)  # exponential draws, normalised: Dirichlet(1, 1, 1)
    m = transforms.uniform(generator, (batch,)).view(-1, 1, 1, 1)  # Beta(1, 1)
    total = torch.zeros(images.shape, device=device)
    for w in weights:
        total += w.view(-1, 1, 1, 1) * augmix_chain(images, generator, severity).float()
    return ((1 - m) * images.float() + m * total + 0.5).clamp(0, 255).to(torch.uint8)


def augmix_chain(images: Tensor, generator: torch.Generator, severity: float = 3.0) -> Tensor:
    """Each image through 1, 2 or 3 random operations."""
    depth = 1 + torch.floor(transforms.uniform(generator, (len(images),)) * 3)
    for step in range(3):
        kind = torch.floor(transforms.uniform(generator, (len(images),)) * len(OPERATIONS))
        level = (0.1 + (severity - 0.1) * transforms.uniform(generator, (len(images),))) / 10
        sign = torch.where(transforms.uniform(generator, (len(images),)) < 0.5, -1.0, 1.0)
        images = operate(images, torch.where(step < depth, kind, -1.0), level, sign)
    return images


def operate(images: Tensor, kind: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Operation OPERATIONS[kind] of each image at level in [0, 0.3], signed where it has a direction; kind -1: none.

    Levels as in AugMix: rotate 30 l degrees, shear 0.3 l, translate l / 3 of the side, posterize to 4 - int(4 l) bits,
    solarize above 256 - int(256 l). Every operation is computed for the whole batch and chosen by image: no host wait.
    """
    level = level.view(-1, 1, 1, 1)
    bits = 4 - torch.floor(4 * level)
    step = 2 ** (8 - bits)
    x = images.float()
    results = (
        autocontrast(x),
        equalize(images).float(),
        torch.floor(x / step) * step,
        None,
        torch.where(x >= 256 - torch.floor(256 * level), 255 - x, x),
    )
    out = x
    for number, result in enumerate(results):
        if result is not None:
            out = torch.where((kind == number).view(-1, 1, 1, 1), result, out)
    out = torch.where(((kind == 3) | (kind >= 5)).view(-1, 1, 1, 1), warp(x, kind, level.flatten() * sign), out)
    return out.clamp(0, 255).to(torch.uint8)


def autocontrast(x: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, torch.floor((x - low) * (255 / (high - low).clamp_min(1))), x)


def equalize(images: Tensor) -> Tensor:
    """Histogram equalisation of each channel, PIL's rule."""
    flat = images.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    top = 255 - (counts.flip(2) > 0).int().argmax(2, keepdim=True)  # the largest value that occurs
    step = (flat.shape[2] - counts.gather(2, top)) // 255
    table = ((counts.cumsum(2) - counts + step // 2) // step.clamp_min(1)).clamp(0, 255)
    keep = (step == 0) | ((counts > 0).sum(2, keepdim=True) <= 1)
    table = torch.where(keep, torch.arange(256, device=flat.device), table)
    return table.gather(2, flat).view_as(images).to(torch.uint8)


def warp(x: Tensor, kind: Tensor, amount: Tensor) -> Tensor:
    """Rotation, shear or translation of each image, bilinear, black outside."""
    height, width = x.shape[-2:]
    angle = torch.where(kind == 3, torch.deg2rad(30 * amount), 0.0)
    shear = [torch.where(kind == number, 0.3 * amount, 0.0) for number in (5, 6)]
    move = [
        torch.where(kind == number, torch.trunc(amount * side / 3), 0.0) for number, side in ((7, width), (8, height))
    ]
    rows, columns = torch.meshgrid(
        torch.arange(height, device=x.device) - (height - 1) / 2,
        torch.arange(width, device=x.device) - (width - 1) / 2,
        indexing="ij",
    )
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    across = cos * columns + (shear[0].view(-1, 1, 1) - sin) * rows + move[0].view(-1, 1, 1)
    down = (shear[1].view(-1, 1, 1) + sin) * columns + cos * rows + move[1].view(-1, 1, 1)
    grid = torch.stack([across * 2 / width, down * 2 / height], -1)
    return torch.round(F.grid_sample(x, grid, padding_mode="zeros", align_corners=False))


# ------------------------------------------------------------------------------------------------ the same on the CPU
def noise_group_cpu(views, draw: Draw, row: int, rng: np.random.Generator):
    """The group of one image's views uint8 (H, W, 3), row `row` of the draw, by the oracle: x_q, x_1, x_2, x_mix."""
    chains = []
    for length, x in enumerate(views, start=1):
        for step in range(length):
            name = corruptions.TRAIN15[draw.types[row, step]]
            x = corruptions.corrupt(x, name, int(draw.severities[row, step]), rng)
        chains.append(x)
    total = sum(w * chain.astype(np.float32) for w, chain in zip(draw.weights[row], chains))
    m = draw.mix[row]
    mix = (m * views[0].astype(np.float32) + (1 - m) * total + 0.5).clip(0, 255).astype(np.uint8)
    return (*chains, mix)
