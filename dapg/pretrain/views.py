"""Augmented views of uint8 images (sec. III-B)."""

import torch
from torch import Tensor

from common import colour, transforms
from dapg.channels import grey


class Views:
    """Augmented copies of uint8 images as uint8: pad and crop (or a resized crop), flip 0.5, grey 0.2."""

    def __init__(self, crop: str, grey: float = 0.2):
        self.crop, self.grey = crop, grey

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        scale = (0.2, 1.0) if self.crop == "rrc" else None
        geometry = transforms.draw_geometry(x.shape, generator, pad=0 if scale else None, crop_scale=scale)
        x = geometry.apply(x, "bicubic" if scale else "bilinear")
        turned = transforms.uniform(generator, (len(x),)) < self.grey
        return torch.where(colour.per_image(turned), grey(x), x)
