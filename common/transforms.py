"""Batched augmentation on the device: every image draws its own parameters, with no host sync.

    augment = Augment(flip=0.5, erase=0.5)                           # the list of the unsupervised papers
    x = augment(images, generator)                     # uint8 (B, 3, H, W) -> float32 (B, 3, H, W), normalised
    x, masks = augment(images, generator, masks)       # label maps uint8 (B, 1, H, W) move through the same geometry

All randomness comes from the given torch.Generator on the images' device. Primitives take their parameters as tensors,
one entry an image, so that tests can compare them with PIL or torchvision. On a GPU nothing loops over images; on the
CPU crop and erasing copy slices image by image, at a fraction of the cost of indices and masks.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import colour
from common.colour import per_image, vector
from common.images import lend

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ATTEMPTS = 10  # draws of a rectangle before giving up, as in torchvision


def normalize(images: Tensor, mean: tuple = IMAGENET_MEAN, std: tuple = IMAGENET_STD) -> Tensor:
    """(x - mean) / std a channel, float32 (B, C, H, W); uint8 images are scaled to [0, 1] first, floats lie there, and
    need no gradient."""
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    shift = vector(tuple(-m / s for m, s in zip(mean, std)), images.device)[0]
    out = lend(images.shape, torch.float32, images.device).copy_(images)
    for b, s, plane in zip(shift, std, out.unbind(1), strict=True):  # one pass a channel
        torch.add(b, plane, alpha=1 / (unit * s), out=plane)
    return out


def pictures(x: Tensor, mean: tuple = IMAGENET_MEAN, std: tuple = IMAGENET_STD) -> Tensor:
    """Normalised images (B, 3, H, W) as values in [0, 1] again."""
    return (x * vector(std, x.device) + vector(mean, x.device)).clamp(0, 1)


def flip(images: Tensor, flags: Tensor) -> Tensor:
    """Images (B, C, H, W) mirrored left to right where flags (B,) bool is set."""
    position = torch.arange(len(flags), device=flags.device) + len(flags) * flags
    return torch.cat([images, images.flip(-1)]).index_select(0, position)


def pad_crop(images: Tensor, top: Tensor, left: Tensor, pad: int, flags: Tensor | None = None) -> Tensor:
    """Images (B, C, H, W), uint8 or float, padded by pad zeros a side and cropped to H x W at (top, left), each (B,)
    int64 in 0..2*pad; mirrored before that where flags (B,) bool is set."""
    flags = torch.zeros_like(top, dtype=torch.bool) if flags is None else flags
    return (crop_by_slices if images.device.type == "cpu" else crop_by_index)(images, top, left, pad, flags)


def crop_by_index(images: Tensor, top: Tensor, left: Tensor, pad: int, flags: Tensor) -> Tensor:
    """pad_crop on any device, with no loop and no host sync."""
    height, width = images.shape[-2:]
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    columns = torch.where(flags[:, None], width + 2 * pad - 1 - columns, columns)
    return take(F.pad(images, (pad, pad, pad, pad)), rows, columns)


def crop_by_slices(images: Tensor, top: Tensor, left: Tensor, pad: int, flags: Tensor) -> Tensor:
    """pad_crop on the CPU: each image is moved in memory as one run of numbers, then its margins are cleared."""
    batch, channels, height, width = images.shape
    out = lend(images.shape, images.dtype, images.device)
    size = channels * height * width
    mirrored = np.empty((channels * height, width), out.numpy().dtype)  # of one image, stays in the cache
    moves = zip(images.numpy(), out.numpy(), flags.tolist(), (top - pad).tolist(), (left - pad).tolist())
    for image, to, flag, y, x in moves:
        flat = (cv2.flip(image.reshape(-1, width), 1, mirrored) if flag else image).reshape(-1)
        step = min(max(y * width + x, -size), size)
        to.reshape(-1)[max(0, -step) : size - max(0, step)] = flat[max(0, step) : size - max(0, -step)]
        to[:, : max(0, -y)] = to[:, max(0, height - max(0, y)) :] = 0
        to[:, :, : max(0, -x)] = to[:, :, max(0, width - max(0, x)) :] = 0
    return out


def resized_crop(images: Tensor, boxes: Tensor, interpolation: str = "bilinear") -> Tensor:
    """Boxes (B, 4) int64 (top, left, height, width) cut out and resized to the images' own size, as PIL does it.

    bilinear and bicubic are PIL's normalised filters (bicubic a = -0.5, edges of the box repeated by weight), rounded
    to uint8 after each direction if the images are uint8; nearest takes the pixel below the centre, for label maps.
    """
    height, width = images.shape[-2:]
    if interpolation == "nearest":
        rows, columns = (nearest_index(boxes[:, i], boxes[:, i + 2], size) for i, size in enumerate((height, width)))
        return take(images, rows, columns)
    rows = resize_matrix(boxes[:, 0], boxes[:, 2], height, interpolation)[:, None]  # (B, 1, H, H)
    columns = resize_matrix(boxes[:, 1], boxes[:, 3], width, interpolation)[:, None]
    out = rounded(images.float() @ columns.transpose(-1, -2), images.dtype)
    return rounded(rows @ out, images.dtype).to(images.dtype)


def erase(images: Tensor, boxes: Tensor, fill: tuple | str, generator: torch.Generator | None = None) -> Tensor:
    """Float images (B, C, H, W) with the boxes (B, 4) int64 (top, left, height, width; height 0 for none) overwritten.

    fill: one value a channel, or "random" for standard normal noise from the generator. Writes into images.
    """
    values = (
        torch.randn(images.shape, device=images.device, generator=generator)
        if fill == "random"
        else vector(fill, images.device)
    )
    write = overwrite_by_slices if images.device.type == "cpu" else overwrite_by_mask
    return write(images, boxes, values.expand_as(images))


def overwrite_by_mask(images: Tensor, boxes: Tensor, values: Tensor) -> Tensor:
    """Write the boxes of values into images, on any device, with no loop and no host sync."""
    y, x = (torch.arange(size, device=images.device) for size in images.shape[-2:])
    top, left, height, width = boxes[:, :, None].unbind(1)  # (B, 1) each
    inside = ((y >= top) & (y < top + height))[:, None, :, None] & ((x >= left) & (x < left + width))[
        :, None, None, :
    ]  # (B, 1, H, W)
    return images.mul_(~inside).addcmul_(inside.to(images.dtype), values)


def overwrite_by_slices(images: Tensor, boxes: Tensor, values: Tensor) -> Tensor:
    """Write the boxes of values into images, on the CPU."""
    for image, value, (top, left, height, width) in zip(images.numpy(), values.numpy(), boxes.tolist()):
        image[:, top : top + height, left : left + width] = value[:, top : top + height, left : left + width]
    return images


class Geometry(NamedTuple):
    """Where each image of a batch is mirrored and cut; apply() moves images and label maps alike."""

    flags: Tensor  # (B,) bool, mirror first
    top: Tensor | None  # (B,) int64 in 0..2*pad, or None without padding
    left: Tensor | None
    pad: int
    boxes: Tensor | None  # (B, 4) int64 resized crop after that, or None

    def apply(self, images: Tensor, interpolation: str = "bilinear") -> Tensor:
        """Images (B, C, H, W) of any type moved by this geometry; interpolation "nearest" for label maps."""
        if self.pad:
            images = pad_crop(images, self.top, self.left, self.pad, self.flags)
        else:
            images = flip(images, self.flags)
        return images if self.boxes is None else resized_crop(images, self.boxes, interpolation)


def draw_geometry(
    shape: tuple,
    generator: torch.Generator,
    flip: float = 0.5,
    pad: int | None = None,
    crop_scale: tuple | None = None,
    crop_ratio: tuple = (3 / 4, 4 / 3),
) -> Geometry:
    """Random geometry for images of the shape (B, C, H, W): mirror with probability flip, crop after padding by pad
    zeros, and with crop_scale a resized crop of that share of the area and a log-uniform ratio width / height.

    pad None is the papers' 10 pixels, and the same share of images that are lower than their 256: ten pixels of a small
    image would move a person half out of it.
    """
    batch, height, width = shape[0], shape[-2], shape[-1]
    device = generator.device
    pad = min(10, 10 * height // 256) if pad is None else pad
    flags = torch.rand(batch, device=device, generator=generator) < flip
    top = left = boxes = None
    if pad:
        top, left = torch.randint(0, 2 * pad + 1, (2, batch), device=device, generator=generator)
    if crop_scale is not None:
        boxes = draw_crops(batch, height, width, generator, crop_scale, crop_ratio)
    return Geometry(flags, top, left, pad, boxes)


def draw_crops(batch: int, height: int, width: int, generator: torch.Generator, scale: tuple, ratio: tuple) -> Tensor:
    """Boxes (B, 4) int64 as torchvision's RandomResizedCrop: the first of ten that fits, else the largest, centred."""
    area, aspect, place = uniform(generator, (3, batch, ATTEMPTS, 2)).unbind(0)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area[..., 0])
    aspect = log_uniform(aspect[..., 0], ratio)  # width / height
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    drawn = rectangles(heights, widths, place, height, width, fits)
    whole = width / height
    box_width = width if whole >= ratio[0] and whole <= ratio[1] or whole < ratio[0] else round(height * ratio[1])
    box_height = height if whole >= ratio[0] else round(width / ratio[0])
    centred = (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
    return torch.where(fits.any(1, keepdim=True), drawn, vector(centred, drawn.device).view(4).long())


def draw_erasing(
    batch: int,
    height: int,
    width: int,
    generator: torch.Generator,
    probability: float = 0.5,
    area: tuple = (0.02, 0.4),
    ratio: tuple = (0.3, 10 / 3),
    law: str = "log",
) -> Tensor:
    """Boxes (B, 4) int64 (top, left, height, width) of random erasing, height 0 with probability 1 - probability.

    As torchvision's RandomErasing: area a uniform share of the image, ratio height / width log-uniform (law="log") or
    uniform (law="uniform", as in the first ReID code), strictly smaller than the image, ten attempts, then none.
    """
    share, aspect, place = uniform(generator, (3, batch, ATTEMPTS, 2)).unbind(0)
    share = height * width * (area[0] + (area[1] - area[0]) * share[..., 0])
    aspect = log_uniform(aspect[..., 0], ratio) if law == "log" else ratio[0] + (ratio[1] - ratio[0]) * aspect[..., 0]
    heights, widths = (share * aspect).sqrt().round(), (share / aspect).sqrt().round()
    fits = (heights < height) & (widths < width)
    boxes = rectangles(heights, widths, place, height, width, fits)
    erased = fits.any(1) & (uniform(generator, (batch,)) < probability)
    return boxes * erased[:, None]


def draw_jitter(batch: int, generator: torch.Generator, strength: tuple, probability: float) -> tuple[Tensor, Tensor]:
    """Factors and orders for color_jitter from strengths (brightness, contrast, saturation, hue) as in ColorJitter.

    A factor is uniform in [max(0, 1 - s), 1 + s], the hue shift in [-s, s]; others get those that keep them.
    """
    device = generator.device
    keep = vector((1.0, 1.0, 1.0, 0.0), device).view(4)
    low = vector((*(max(0.0, 1 - s) for s in strength[:3]), -strength[3]), device).view(4)
    high = vector((*(1 + s for s in strength[:3]), strength[3]), device).view(4)
    factors = low + (high - low) * uniform(generator, (batch, 4))
    chosen = uniform(generator, (batch, 1)) < probability
    return torch.where(chosen, factors, keep), uniform(generator, (batch, 4)).argsort(1)


class Augment:
    """Random augmentation of a batch in one call: geometry, colour, normalisation, erasing, in this order.

    Args: flip probability; pad zeros a side before the crop (black pixels, since it comes before normalisation;
    None: as draw_geometry); crop_scale for a resized crop (None: no) with crop_ratio; jitter strengths (brightness,
    contrast, saturation, hue) with jitter_p; grey and blur probabilities, blur_sigma range in pixels; erase
    probability, erase_area, erase_ratio, erase_law, and erase_fill, written after normalisation: values a channel
    (default: the ImageNet mean as it stands, the lineage's quirk) or "random".
    """

    def __init__(
        self,
        *,
        flip: float = 0.5,
        pad: int | None = None,
        crop_scale: tuple | None = None,
        crop_ratio: tuple = (3 / 4, 4 / 3),
        interpolation: str = "bilinear",
        jitter: tuple | None = None,
        jitter_p: float = 1.0,
        grey: float = 0.0,
        blur: float = 0.0,
        blur_sigma: tuple = (0.1, 2.0),
        erase: float = 0.5,
        erase_area: tuple = (0.02, 0.4),
        erase_ratio: tuple = (0.3, 10 / 3),
        erase_law: str = "log",
        erase_fill: tuple | str = IMAGENET_MEAN,
        mean: tuple = IMAGENET_MEAN,
        std: tuple = IMAGENET_STD,
        channels_last: bool = False,
    ):
        self.options = {key: value for key, value in locals().items() if key != "self"}
        for key in ("flip", "jitter_p", "grey", "blur", "erase"):
            if not 0 <= self.options[key] <= 1:
                raise ValueError(f"{key} is {self.options[key]}, expected a probability")
        if erase_law not in ("log", "uniform"):
            raise ValueError(f"erase_law {erase_law!r} is not one of log, uniform")

    def __repr__(self) -> str:
        return f"Augment({', '.join(f'{key}={value!r}' for key, value in self.options.items())})"

    def __call__(self, images: Tensor, generator: torch.Generator, maps: Tensor | None = None):
        """uint8 (B, 3, H, W) -> float32 (B, 3, H, W); with maps (B, C, H, W) of labels: (images, maps moved alike)."""
        if generator.device.type != images.device.type or images.dtype != torch.uint8:
            raise ValueError(
                f"expected uint8 images on the generator's device {generator.device}, got {images.dtype} "
                f"on {images.device}"
            )
        o = self.options
        geometry = draw_geometry(images.shape, generator, o["flip"], o["pad"], o["crop_scale"], o["crop_ratio"])
        out = self.color(geometry.apply(images, o["interpolation"]), generator)
        out = normalize(out, o["mean"], o["std"])
        if o["erase"]:
            boxes = draw_erasing(
                len(images),
                *images.shape[-2:],
                generator,
                o["erase"],
                o["erase_area"],
                o["erase_ratio"],
                o["erase_law"],
            )
            out = erase(out, boxes, o["erase_fill"], generator)
        if o["channels_last"]:
            out = out.contiguous(memory_format=torch.channels_last)
        return out if maps is None else (out, geometry.apply(maps, "nearest"))

    def color(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The colour steps that are switched on, result in [0, 1]; the uint8 images as they are if none is."""
        o, batch = self.options, len(images)
        if o["jitter"] is None and not o["grey"] and not o["blur"]:
            return images
        out = images.float().div_(255)
        if o["jitter"] is not None:
            out = colour.color_jitter(out, *draw_jitter(batch, generator, o["jitter"], o["jitter_p"]))
        if o["grey"]:
            out = colour.grayscale(out, uniform(generator, (batch,)) < o["grey"])
        if o["blur"]:
            low, high = o["blur_sigma"]
            blurred = colour.gaussian_blur(out, low + (high - low) * uniform(generator, (batch,)))
            out = torch.where(per_image(uniform(generator, (batch,)) < o["blur"]), blurred, out)
        return out


def uniform(generator: torch.Generator, shape: tuple) -> Tensor:
    """Uniform draws in [0, 1) on the generator's device."""
    return torch.rand(shape, device=generator.device, generator=generator)


def log_uniform(draws: Tensor, bounds: tuple) -> Tensor:
    """Uniform draws in [0, 1) turned into log-uniform ones between the bounds."""
    low, high = math.log(bounds[0]), math.log(bounds[1])
    return torch.exp(low + (high - low) * draws)


def rectangles(heights: Tensor, widths: Tensor, place: Tensor, height: int, width: int, fits: Tensor) -> Tensor:
    """First rectangle of each row that fits, placed uniformly: (B, A) sizes, (B, A, 2) draws -> (B, 4) int64."""
    first = fits.int().argmax(1, keepdim=True)
    top = (place[..., 0] * (height - heights + 1)).floor()
    left = (place[..., 1] * (width - widths + 1)).floor()
    return torch.stack([side.gather(1, first)[:, 0] for side in (top, left, heights, widths)], 1).long()


def take(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels (B, C, h, w) of images (B, C, H, W) at rows (B, h) and columns (B, w)."""
    batch, channels, _, width = images.shape
    cut = images.gather(2, rows[:, None, :, None].expand(batch, channels, -1, width))
    return cut.gather(3, columns[:, None, None, :].expand(batch, channels, rows.shape[1], -1))


def nearest_index(start: Tensor, length: Tensor, out: int) -> Tensor:
    """Source index (B, out) of each output pixel under nearest neighbour, PIL's rule: floor of the centre."""
    return start[:, None] + (2 * torch.arange(out, device=start.device) + 1) * length[:, None] // (2 * out)


def resize_matrix(start: Tensor, length: Tensor, out: int, interpolation: str) -> Tensor:
    """Weights (B, out, out) that resize the interval of each row to out pixels, PIL's normalised filter."""
    source = torch.arange(out, device=start.device)
    centres = start[:, None] + (torch.arange(out, device=start.device) + 0.5) * (length[:, None] / out)
    distance = (source + 0.5 - centres[..., None]).abs()  # (B, out, out); the box is never larger than out
    if interpolation == "bilinear":
        weights = (1 - distance).clamp_min(0)
    elif interpolation == "bicubic":
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    else:
        raise ValueError(f"interpolation {interpolation!r} is not one of bilinear, bicubic, nearest")
    inside = (source >= start[:, None]) & (source < (start + length)[:, None])
    weights = weights * inside[:, None, :]
    return weights / weights.sum(2, keepdim=True)


def rounded(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Float images rounded to whole grey levels in 0..255 if dtype is uint8, else as they are."""
    return images.add_(0.5).floor_().clamp_(0, 255) if dtype == torch.uint8 else images
