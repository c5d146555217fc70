"""AugMix (Hendrycks et al. 2020) for a batch of uint8 images on their device: operations, chains, mixture."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common import transforms

OPERATIONS = tuple("autocontrast equalize posterize rotate solarize shear_x shear_y translate_x translate_y".split())


def augmix(images: Tensor, generator: torch.Generator, severity: float = 3.0, width: int = 3) -> Tensor:
    """AugMix of uint8 (B, 3, H, W): `width` chains of 1-3 random operations each, mixed with the image, uint8.

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

    Levels as in AugMix: rotate int(30 l) degrees, shear 0.3 l, translate int(l / 3 of the side), posterize to
    4 - int(4 l) bits, solarize above 256 - int(256 l). Every operation is computed for the whole batch and chosen by
    image: no host wait.
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
    """Rotation about the centre, shear from the corner (0, 0) or translation of each image, bilinear, black outside.

    As PIL's rotate and transform: a pixel whose centre comes from outside the image is black, others blend what lies
    inside.
    """
    height, width = x.shape[-2:]
    angle = torch.where(kind == 3, torch.deg2rad(torch.trunc(30 * amount)), 0.0)
    shear = [torch.where(kind == number, 0.3 * amount, 0.0).view(-1, 1, 1) for number in (5, 6)]
    move = [
        torch.where(kind == number, torch.trunc(amount * side / 3), 0.0).view(-1, 1, 1)
        for number, side in ((7, width), (8, height))
    ]
    rows, columns = torch.meshgrid(
        torch.arange(height, device=x.device) - (height - 1) / 2,
        torch.arange(width, device=x.device) - (width - 1) / 2,
        indexing="ij",
    )  # from the centre; half the height or width more from the corner
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    across = cos * columns - sin * rows + shear[0] * (rows + height / 2) + move[0]
    down = sin * columns + cos * rows + shear[1] * (columns + width / 2) + move[1]
    grid = torch.stack([across * 2 / width, down * 2 / height], -1)
    inside = ((grid >= -1) & (grid < 1)).all(-1)[:, None]
    return torch.round(F.grid_sample(x, grid, padding_mode="border", align_corners=False)) * inside
