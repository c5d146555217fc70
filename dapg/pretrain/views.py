"""Augmented views of uint8 images (sec. III-B), and the channel enhancement of generated poses (sec. II-B)."""

import torch
from torch import Tensor

from common import colour, transforms


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


def grey(x: Tensor) -> Tensor:
    """uint8 images in grey, one channel, rounded."""
    return (colour.to_grey(x.float()) + 0.5).to(torch.uint8)


def channel_enhancement(x: Tensor, generator: torch.Generator) -> Tensor:
    """CAJ's rule on uint8 images: red, green or blue in all channels with probability 1/4 each, else grey or as is."""
    draw = torch.floor(transforms.uniform(generator, (len(x),)) * 4).long()
    half = transforms.uniform(generator, (len(x),)) < 0.5
    other = torch.where(colour.per_image(half), grey(x).expand_as(x), x)
    single = x.gather(1, colour.per_image(draw.clamp(max=2)).expand(-1, 1, *x.shape[2:])).expand_as(x)
    return torch.where(colour.per_image(draw < 3), single, other)
