"""CIL's augmentation of the visible images (Chen et al. 2021), on top of AGW."""

import torch
from torch import Tensor

from common import colour, transforms
from dapg.noise.augmix import augmix


def soft_erasing(x: Tensor, generator: torch.Generator) -> Tensor:
    """CIL's soft random erasing, then self patch mixing, each with probability 0.5, of images in [0, 1].

    A rectangle of uniform ratio becomes (1 - m) patch + m noise, N(0, 1), m ~ Beta(0.5, 1); then one becomes a mixture
    with a patch of the same size from elsewhere in the image. Deviation: values outside [0, 1] are clipped; CIL's code
    wraps them.
    """
    height, width = x.shape[2:]
    for source in ("noise", "patch"):
        boxes = transforms.draw_erasing(len(x), height, width, generator, law="uniform")
        m = colour.per_image(mixing(len(x), generator))
        if source == "noise":
            other = torch.randn(x.shape, device=x.device, generator=generator)
        else:
            place = transforms.uniform(generator, (2, len(x)))
            top, left = (torch.floor(place[i] * ((height, width)[i] - boxes[:, 2 + i] + 1)).long() for i in (0, 1))
            rows = (torch.arange(height, device=x.device) + (top - boxes[:, 0])[:, None]).clamp(0, height - 1)
            columns = (torch.arange(width, device=x.device) + (left - boxes[:, 1])[:, None]).clamp(0, width - 1)
            other = transforms.take(x, rows, columns)
        mask = transforms.erase(torch.zeros_like(x), boxes, (1.0, 1.0, 1.0))
        x = x + mask * m * (other - x)
    return x.clamp(0, 1)


def mixing(batch: int, generator: torch.Generator) -> Tensor:
    """Draws (B,) of Beta(0.5, 1): u^(1 / 0.5) of a uniform u."""
    return transforms.uniform(generator, (batch,)).square()


def versions(x: Tensor, settings: dict, generator: torch.Generator) -> Tensor:
    """Clean and two AugMix versions (3 B, 3, H, W), normalised, of augmented visible uint8 images.

    Paper silent: CIL's code erases in place, so its clean image is erased too; cil_clean=raw keeps it whole.
    """
    erased = (soft_erasing(x.float() / 255, generator) * 255 + 0.5).to(torch.uint8)
    clean = erased if settings["cil_clean"] == "erased" else x
    return transforms.normalize(torch.cat([clean, *(augmix(erased, generator) for _ in range(2))]))
