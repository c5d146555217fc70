"""Random block masks (sec. III-A): which of the N blocks of an image are hidden, and the image with holes.

A mask is a boolean map (B, gh, gw), True = hidden. Every image has exactly the same number of hidden blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prsnet.settings import RATIO, grid_of, num_masked  # noqa: F401 re-exported


def draw(batch: int, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Noise (B, N) on the generator's device; from_noise makes a mask of it."""
    return torch.rand(batch, grid[0] * grid[1], device=generator.device, generator=generator)


def from_noise(noise: Tensor, grid: tuple[int, int], count: int) -> Tensor:
    """The `count` blocks with the smallest noise of every image are hidden: (B, N) -> (B, gh, gw) bool."""
    hidden = torch.zeros_like(noise, dtype=torch.bool)
    return hidden.scatter_(1, noise.argsort(1)[:, :count], True).view(-1, *grid)


def authors_region(noise: Tensor, grid: tuple[int, int], count: int) -> Tensor:
    """The blocks over which the authors' code takes the loss, (B, gh, gw) bool: N - count of them, chosen by chance.

    Their code reads the 0/1 prefix with the permutation instead of its inverse, and with the other polarity.
    """
    return (noise.argsort(1) >= count).view(-1, *grid)


def random_mask(batch: int, grid: tuple[int, int], ratio: float, generator: torch.Generator) -> Tensor:
    """(B, gh, gw) bool, int(ratio * N) hidden blocks an image, uniform without replacement, independent per image."""
    return from_noise(draw(batch, grid, generator), grid, num_masked(grid, ratio))


def to_pixels(masked: Tensor, height: int, width: int) -> Tensor:
    """(B, gh, gw) bool -> (B, 1, H, W) bool."""
    rows, columns = height // masked.shape[1], width // masked.shape[2]
    return masked.repeat_interleave(rows, 1).repeat_interleave(columns, 2)[:, None]


def apply(images: Tensor, masked: Tensor) -> Tensor:
    """Normalised images (B, 3, H, W) with hidden pixels set to 0 (sec. III-A), the ImageNet mean colour."""
    return images.masked_fill(to_pixels(masked, *images.shape[-2:]), 0)


def reconstruction_loss(images: Tensor, rebuilt: Tensor, region: Tensor | None) -> Tensor:
    """Mean squared error over a region, Eq. (1), () float32.

    Args: images, rebuilt (B, 3, H, W), normalised; region (B, gh, gw) bool, the blocks that count, or None for all.
    Paper error: Eq. (1) sums i from 0 to len(m), one too many. Every image has the same number of hidden blocks, so
    its B * sum(m) is the number of values summed over, with i over pixels and channels.
    """
    if images.shape != rebuilt.shape:
        raise ValueError(f"reconstruction {tuple(rebuilt.shape)} of images {tuple(images.shape)}: shapes differ")
    error = (images.float() - rebuilt.float()).square()
    if region is None:
        return error.mean()
    m = to_pixels(region, *images.shape[-2:]).to(error.dtype)
    return (error * m).sum() / (m.sum() * images.shape[1])


def mean_colour(images: Tensor) -> Tensor:
    """Every image's mean colour everywhere, (B, 3, H, W): what a network that has learnt nothing could draw at best."""
    return images.mean((2, 3), keepdim=True).expand_as(images)


def paste_visible(images: Tensor, rebuilt: Tensor, masked: Tensor) -> Tensor:
    """The reconstruction with the visible blocks of the image put back, (B, 3, H, W)."""
    return torch.where(to_pixels(masked, *images.shape[-2:]), rebuilt, images)


def enlarge(values: Tensor, height: int, width: int) -> Tensor:
    """Maps (B, h, w) enlarged bilinearly to (B, H, W)."""
    return F.interpolate(values[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]
