"""Fewer colours in visible images: grey, and CAJ's channel enhancement (sec. II-B; also an option of fine-tuning)."""

import torch
from torch import Tensor

from common import colour, transforms


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
