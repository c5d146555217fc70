"""Semantic-guided pixel sampling (sec. II-A): clothes of a batch re-drawn from the pixels of its other images.

    changed = sample_pixels(images, parts, generator)      # (B, 3, H, W) and (B, H, W) in 0..5 -> (B, 3, H, W)

For each class (2 upper clothes, 3 pants) the images are shuffled; the class pixels of the shuffled batch in raster
order, the bank of Eq. (1), fill the class pixels of the batch in its own order, Eq. (2). Every bank pixel is used
exactly once, so the operation permutes pixels within the batch. There is no loop over images.
"""

import torch
from torch import Tensor

from common.images import to_device
from pixel_sampling.settings import MODES, PANTS, UPPER

FORMS = ("fixed", "boolean")


def sample_pixels(
    images: Tensor,
    parts: Tensor,
    generator: torch.Generator,
    classes: tuple = (UPPER, PANTS),
    mode: str = "vector",
    form: str | None = None,
) -> Tensor:
    """Images with the pixels of each class replaced, Eqs. (1)-(2); no gradient, the images themselves stay.

    Args: images (B, 3, H, W) of any type; parts (B, H, W) or (B, 1, H, W) integers on the same device; generator on
        the CPU, one permutation of the batch per class is drawn from it; mode "vector" moves 3-vectors (the paper),
        "flat" single values in the order image, channel, row, column (what the authors' code does), "random" 3-vectors
        from a bank that is shuffled pixel by pixel; form "fixed" has fixed shapes and never waits for the device,
        "boolean" gathers only the class pixels and waits once a class; both give the same values. Default: "boolean"
        on the CPU, where it is several times faster, "fixed" elsewhere.
    Returns: (B, 3, H, W), in channels_last memory (contiguous for "flat").
    Paper error: Eq. (2) writes the bank back into the shuffled batch, which changes nothing; the target here is the
        batch in its own order, as in the authors' code.
    Paper silent: "upper or pants" changes both, always, each with its own shuffle and from the unchanged images.
    """
    if parts.ndim == 4:
        parts = parts.squeeze(1)
    if images.ndim != 4 or parts.shape != (images.shape[0], *images.shape[2:]):
        raise ValueError(
            f"images {tuple(images.shape)} need parts {(images.shape[0], *images.shape[2:])}, got {tuple(parts.shape)}"
        )
    if mode not in MODES or form not in (None, *FORMS):
        raise ValueError(f"mode {mode!r} and form {form!r}: known are {', '.join(MODES)} and {', '.join(FORMS)}")
    form = form or ("boolean" if images.device.type == "cpu" else "fixed")
    batch, channels, height, width = images.shape
    with torch.no_grad():
        source = None
        for part in classes:
            mask = parts == part
            mask = mask[:, None].expand(images.shape).reshape(batch, -1) if mode == "flat" else mask.reshape(batch, -1)
            order = torch.randperm(batch, generator=generator)
            keys = torch.rand(mask.shape, generator=generator) if mode == "random" else None
            order, keys = (None if t is None else to_device(t, images.device) for t in (order, keys))
            source = SOURCES[form](mask, order, keys, source)
        if mode == "flat":
            values = images.reshape(-1) if source is None else images.reshape(-1)[source]
            return values.view(images.shape)
        pixels = images.permute(0, 2, 3, 1).reshape(-1, channels)  # a view of channels_last images
        pixels = pixels.clone() if source is None else pixels.index_select(0, source)
        return pixels.view(batch, height, width, channels).permute(0, 3, 1, 2)


def boolean_source(mask: Tensor, order: Tensor, keys: Tensor | None, source: Tensor | None) -> Tensor:
    """Flat position (B * L,) each element takes its value from: the k-th slot takes the k-th bank element.

    mask (B, L) bool; order (B,) the image shuffle; keys (B, L) or None sorts the bank; source the positions chosen for
    earlier classes, None at the first (classes are disjoint, so they only complete each other).
    """
    length = mask.shape[1]
    source = torch.arange(mask.numel(), device=mask.device) if source is None else source
    place = mask.view(-1).nonzero()[:, 0]  # slots, Eq. (2)
    image, within = mask[order].nonzero(as_tuple=True)
    bank = order[image] * length + within  # Eq. (1)
    if keys is not None:
        bank = bank[keys.view(-1)[bank].argsort(stable=True)]
    source[place] = bank
    return source


def fixed_source(mask: Tensor, order: Tensor, keys: Tensor | None, source: Tensor | None) -> Tensor:
    """The same as boolean_source with shapes that do not depend on the mask, hence without waiting for the device.

    The shuffled batch is split stably into class pixels, the bank, then the rest, by their running counts; the k-th
    class pixel of the batch looks up the k-th entry.
    """
    length, own = mask.shape[1], torch.arange(mask.numel(), device=mask.device)
    shuffled = mask[order].view(-1)
    position = (order[:, None] * length + torch.arange(length, device=mask.device)).view(-1)  # of the shuffled batch
    if keys is None:
        rank = shuffled.cumsum(0)
        place = torch.where(shuffled, rank - 1, rank[-1] + own - rank)  # a permutation of all places
        bank = torch.empty_like(own).scatter_(0, place, position)  # Eq. (1), then the other pixels
    else:
        bank = position[torch.where(shuffled, keys[order].view(-1), 2.0).argsort(stable=True)]
    flat = mask.view(-1)  # slots, Eq. (2)
    chosen = bank[(flat.cumsum(0) - 1).clamp_min(0)]
    return torch.where(flat, chosen, own if source is None else source)


SOURCES = {"boolean": boolean_source, "fixed": fixed_source}
