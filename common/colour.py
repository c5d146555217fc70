"""Colour and blur of a batch of images in [0, 1], each image by its own parameter: the steps of transforms.Augment.

Parameters are tensors, one entry an image; nothing loops over images.
"""

import functools

import torch
from torch import Tensor

GREY = (0.2989, 0.587, 0.114)  # ITU-R 601, as in torchvision


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Images in [0, 1] blended with black; factor (B,), 1 keeps the image."""
    return (images * per_image(factor)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Images in [0, 1] blended with the mean of their grey version; factor (B,), 1 keeps the image."""
    return blend(images, to_grey(images).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Images in [0, 1] blended with their grey version; factor (B,), 1 keeps the image."""
    return blend(images, to_grey(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], the hue turned by shift (B,) in [-0.5, 0.5] of the circle, the rest kept."""
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - low
    red, green, blue = images.split(1, 1)
    safe = chroma.clamp_min(1e-12)
    hue = (
        torch.where(
            value == red,
            (green - blue) / safe,
            torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
        )
        / 6
    )
    turned = (hue + per_image(shift)) * 6  # (B, 1, H, W) in sixths of the circle
    sector = (vector((5.0, 3.0, 1.0), images.device) + turned).remainder(6)
    return value - chroma * torch.minimum(sector, 4 - sector).clamp(0, 1)


def color_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of images in [0, 1], each image in its own order.

    factors (B, 4) float in the order brightness, contrast, saturation (1 keeps), hue (0 keeps); order (B, 4) int64, a
    permutation of 0..3 a row: the step applied first, second, ...
    """
    hue_at = (order == 3).int().argmax(1)  # (B,) the dear step runs once, between the others before and after it
    position = torch.arange(4, device=order.device)
    images = light_steps(images, factors, torch.where(position < hue_at[:, None], order, 3))
    images = adjust_hue(images, factors[:, 3])
    return light_steps(images, factors, torch.where(position > hue_at[:, None], order, 3))


def light_steps(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness (0), contrast (1) and saturation (2) in the order of each row of order (B, 4); 3 keeps the image."""
    for position in range(4):
        for number, step in enumerate((adjust_brightness, adjust_contrast, adjust_saturation)):
            images = step(images, torch.where(order[:, position] == number, factors[:, number], 1.0))
    return images


def grayscale(images: Tensor, flags: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], grey in three channels where flags (B,) bool is set."""
    return torch.where(per_image(flags), to_grey(images), images)


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int = 5) -> Tensor:
    """Float images (B, C, H, W) blurred by a Gaussian of sigma (B,) > 0 pixels cut at the radius, borders reflected."""
    rows, columns = (blur_matrix(sigma, size, radius)[:, None] for size in images.shape[-2:])
    return rows @ images @ columns.transpose(-1, -2)


def blur_matrix(sigma: Tensor, size: int, radius: int) -> Tensor:
    """Weights (B, size, size) that blur a line of size pixels with a Gaussian of sigma (B,), reflected at both ends."""
    if size <= radius:
        raise ValueError(f"blur radius {radius} needs more than {radius} pixels a side, got {size}")
    out, source = torch.arange(size, device=sigma.device)[:, None], torch.arange(size, device=sigma.device)
    sides = torch.stack([source - out, source + out, 2 * (size - 1) - source - out]).float()  # itself, both reflections
    own = torch.stack([source >= 0, source > 0, source < size - 1])[:, None, :]  # the end pixels are not doubled
    weights = torch.exp(-0.5 * (sides / sigma[:, None, None, None]) ** 2) * ((sides.abs() <= radius) & own)
    weights = weights.sum(1)
    return weights / weights.sum(2, keepdim=True)


def to_grey(images: Tensor) -> Tensor:
    """Luma (B, 1, H, W) of images (B, 3, H, W)."""
    return (images * vector(GREY, images.device)).sum(1, keepdim=True)


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor * images + (1 - factor) * other, clamped to [0, 1]; factor (B,)."""
    factor = per_image(factor)
    return (factor * images + (1 - factor) * other).clamp_(0, 1)


def per_image(values: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1)."""
    return values[:, None, None, None]


@functools.lru_cache(maxsize=64)
def vector(values: tuple, device: torch.device) -> Tensor:
    """Constants as (1, C, 1, 1) float32 on device, made once, since making one waits for the GPU."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)
