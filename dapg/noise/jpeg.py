"""A JPEG round trip for a batch of images in torch: what libjpeg's default coder and decoder do, in the same integers.

Colour conversion, 4:2:0 subsampling, the accurate integer DCT, quantisation and "fancy" upsampling follow libjpeg
(-turbo) step by step; the entropy coder in between loses nothing and is left out. Equal to Pillow to the bit.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (
    16, 11, 10, 16, 24, 40, 51, 61,
    12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77,
    24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
CHROMA = (17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66) + (
    99,
) * 38
BITS, PASS1 = 13, 2  # fraction bits of the DCT's constants and of its intermediate values
C = {
    "0.298": 2446,
    "0.390": 3196,
    "0.541": 4433,
    "0.765": 6270,
    "0.899": 7373,
    "1.175": 9633,
    "1.501": 12299,
    "1.847": 15137,
    "1.961": 16069,
    "2.053": 16819,
    "2.562": 20995,
    "3.072": 25172,
}


def jpeg_round_trip(images: Tensor, quality: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) coded with quality (B,) in 1..100 and decoded again, uint8."""
    height, width = images.shape[-2:]
    x = F.pad(images.float(), (0, -width % 16, 0, height % 2), mode="replicate").to(torch.int32)
    red, green, blue = x.unbind(1)
    luma = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    offset = (128 << 16) + 32767
    cb = (-11059 * red - 21709 * green + 32768 * blue + offset) >> 16
    cr = (32768 * red - 27439 * green - 5329 * blue + offset) >> 16
    scale = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality).to(torch.int32).view(-1, 1, 1)
    luma = plane(luma, table(LUMA, scale))[:, :height, :width]
    half = (height + 1) // 2, (width + 1) // 2
    small = (plane(shrink(c), table(CHROMA, scale))[:, : half[0], : half[1]] for c in (cb, cr))
    cb, cr = (enlarge(c)[:, :height, :width] - 128 for c in small)
    red = luma + ((91881 * cr + 32768) >> 16)
    green = luma + ((-22554 * cb - 46802 * cr + 32768) >> 16)
    blue = luma + ((116130 * cb + 32768) >> 16)
    return torch.stack([red, green, blue], 1).clamp(0, 255).to(torch.uint8)


@cache
def base(values: tuple, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device).view(1, 8, 8)


def table(values: tuple, scale: Tensor) -> Tensor:
    """Quantisation tables (B, 8, 8) of the images' qualities."""
    return ((base(values, scale.device) * scale + 50) // 100).clamp(1, 255)


def shrink(plane: Tensor) -> Tensor:
    """Mean of 2 x 2 pixels, rounded down and up in alternate columns."""
    total = plane[:, ::2, ::2] + plane[:, ::2, 1::2] + plane[:, 1::2, ::2] + plane[:, 1::2, 1::2]
    return (total + 1 + torch.arange(total.shape[2], device=plane.device) % 2) >> 2


def enlarge(plane: Tensor) -> Tensor:
    """Each pixel as 2 x 2 by the triangle filter: 3/4 of the nearer, 1/4 of the farther neighbour."""
    up, down = torch.cat([plane[:, :1], plane[:, :-1]], 1), torch.cat([plane[:, 1:], plane[:, -1:]], 1)
    rows = torch.stack([3 * plane + up, 3 * plane + down], 2).flatten(1, 2)  # (B, 2h, w)
    left, right = torch.cat([rows[..., :1], rows[..., :-1]], 2), torch.cat([rows[..., 1:], rows[..., -1:]], 2)
    return torch.stack([(3 * rows + left + 8) >> 4, (3 * rows + right + 7) >> 4], 3).flatten(2, 3)


def plane(x: Tensor, quant: Tensor) -> Tensor:
    """One plane (B, h, w) of 0..255 through DCT and quantisation by (B, 8, 8) and back."""
    batch, height, width = x.shape
    x = F.pad(x.float()[:, None], (0, -width % 8, 0, -height % 16), mode="replicate")[:, 0].to(torch.int32) - 128
    blocks = x.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).transpose(2, 3)  # (B, rows, columns, 8, 8)
    coded = forward_pass(forward_pass(blocks, 4, first=True), 3, first=False)
    step = quant[:, None, None] * 8
    coded = coded.sign() * ((coded.abs() + step // 2) // step) * quant[:, None, None]
    back = inverse_pass(inverse_pass(coded, 3, BITS - PASS1), 4, BITS + PASS1 + 3) + 128
    return back.clamp(0, 255).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]


def descale(x: Tensor, bits: int) -> Tensor:
    return (x + (1 << (bits - 1))) >> bits


def odd_part(t0, t1, t2, t3):
    """The shared odd half of both transforms: (a, b, c, d) before descaling."""
    z1, z2, z3, z4 = t0 + t3, t1 + t2, t0 + t2, t1 + t3
    z5 = (z3 + z4) * C["1.175"]
    z1, z2 = z1 * -C["0.899"], z2 * -C["2.562"]
    z3, z4 = z3 * -C["1.961"] + z5, z4 * -C["0.390"] + z5
    return (t0 * C["0.298"] + z1 + z3, t1 * C["2.053"] + z2 + z4, t2 * C["3.072"] + z2 + z3, t3 * C["1.501"] + z1 + z4)


def forward_pass(x: Tensor, axis: int, first: bool) -> Tensor:
    """One direction of the forward DCT along the axis; the first pass keeps PASS1 more bits, the second drops them."""
    d = x.unbind(axis)
    sums, gaps = [d[i] + d[7 - i] for i in range(4)], [d[i] - d[7 - i] for i in range(4)]
    t10, t13, t11, t12 = sums[0] + sums[3], sums[0] - sums[3], sums[1] + sums[2], sums[1] - sums[2]
    bits = BITS - PASS1 if first else BITS + PASS1
    out = [None] * 8
    for place, value in ((0, t10 + t11), (4, t10 - t11)):
        out[place] = value << PASS1 if first else descale(value, PASS1)
    z1 = (t12 + t13) * C["0.541"]
    out[2], out[6] = descale(z1 + t13 * C["0.765"], bits), descale(z1 - t12 * C["1.847"], bits)
    for place, value in zip((7, 5, 3, 1), odd_part(gaps[3], gaps[2], gaps[1], gaps[0])):
        out[place] = descale(value, bits)
    return torch.stack(out, axis)


def inverse_pass(x: Tensor, axis: int, bits: int) -> Tensor:
    """One direction of the inverse DCT along the axis, descaled by `bits`."""
    d = x.unbind(axis)
    z1 = (d[2] + d[6]) * C["0.541"]
    t2, t3 = z1 - d[6] * C["1.847"], z1 + d[2] * C["0.765"]
    t0, t1 = (d[0] + d[4]) << BITS, (d[0] - d[4]) << BITS
    even = (t0 + t3, t1 + t2, t1 - t2, t0 - t3)
    odd = odd_part(d[7], d[5], d[3], d[1])[::-1]
    out = [e + o for e, o in zip(even, odd)] + [e - o for e, o in zip(even[::-1], odd[::-1])]
    return torch.stack([descale(value, bits) for value in out], axis)
