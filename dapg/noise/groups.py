"""Noise groups of the robustness training (sec. II-A, Fig. 3), batched on the device.

For an image, three noise types n1, n2, n3 and severities are drawn once. With views a, b, c of it:
x_q = n1(a), x_1 = n2(n1(b)), x_2 = n3(n2(n1(c))), and x_mix = m a + (1 - m)(w1 x_q + w2 x_1 + w3 x_2) as in AugMix.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.images import to_device
from dapg.noise import corruptions, device_corruptions
from dapg.noise.augmix import augmix_chain


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


def draw_noise(batch: int, rng: np.random.Generator, severity_max: int = 5, types: list[int] | None = None) -> Draw:
    """Distinct types, uniform; severities U{1..severity_max}; w ~ Dirichlet(1, 1, 1), m ~ Beta(1, 1).

    Paper silent: with or without replacement (distinct), the severities, the mixing weights (AugMix's).
    """
    types = np.asarray(range(len(corruptions.TRAIN15)) if types is None else types)
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
        to_device(torch.from_numpy(np.ascontiguousarray(values)), clean.device) for values in (draw.weights.T, draw.mix)
    )
    if augmix_ops:
        chains = [augmix_chain(chain, generator) for chain in chains]
    total = sum(w.view(-1, 1, 1, 1) * chain.float() for w, chain in zip(weights, chains))
    m = m.view(-1, 1, 1, 1)
    return (m * clean.float() + (1 - m) * total + 0.5).clamp(0, 255).to(torch.uint8)


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
