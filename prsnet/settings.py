"""What the flags offer: sizes and blocks of the networks, forms of the losses, protocols, masks. Knows no torch."""

from typing import NamedTuple

PROTOCOLS = ("image", "centroid", "centroid-legacy")
MARGIN = 0.5  # Paper silent: alpha and alpha_c
FORMS = ("mctl", "mctl-literal", "mctl-authors", "ctl", "ctl-literal", "ctl-authors", "none")
DISTANCES = ("l2", "sq")
RATIO = 0.75  # hidden share of the blocks, sec. III-A
THRESHOLDS = {"coco-gt": 0.0, "keypointrcnn": 0.0, "json": 0.3, "none": float("-inf")}  # kept: every score above this
BLOCKS = ("rep", "plain", "v2")


class Size(NamedTuple):
    """Widths and depths of both networks under one name."""

    dims: tuple[int, ...]  # channels of the encoder's stages
    depths: tuple[int, ...]  # N1 ... N4
    bottleneck: int  # length of the vector between encoder and decoder
    vit: tuple[int, int, int]  # MAE encoder: width, depth, heads
    vit_decoder: tuple[int, int, int]


SIZES = {
    "full": Size((96, 192, 384, 768), (3, 3, 9, 3), 2048, (768, 12, 12), (512, 8, 16)),  # the paper; ViT-B
    "small": Size((32, 64, 128, 256), (2, 2, 4, 2), 512, (192, 6, 3), (128, 4, 4)),  # one CPU
    "tiny": Size((8, 16, 24, 32), (1, 1, 2, 1), 64, (32, 2, 2), (16, 1, 2)),  # tests
}


def grid_of(height: int, width: int, block: tuple[int, int]) -> tuple[int, int]:
    """Blocks (gh, gw) of an image. Raises: ValueError, with the sizes that would fit, if the block does not divide it.

    Paper error: it asks for p_w / p_h >= 2 although p_w is the width; upright blocks of 16 x 8 (height x width) satisfy
    p_h / p_w >= 2 and cut 256 x 128 into 16 x 16, which is what the authors' code has.
    """
    for name, size, part in (("height", height, block[0]), ("width", width, block[1])):
        if part < 1 or size % part:
            fits = ", ".join(str(n) for n in range(2, size // 2 + 1) if size % n == 0)
            raise ValueError(
                f"--mask-block {block[0]} {block[1]} does not divide an image of {height} x {width}: its "
                f"{name} {part} must be one of {fits}"
            )
    return height // block[0], width // block[1]


def num_masked(grid: tuple[int, int], ratio: float) -> int:
    """Hidden blocks of an image. Raises: ValueError if that would be none or all of them."""
    blocks = grid[0] * grid[1]
    count = int(ratio * blocks)
    if not 0 < count < blocks:
        raise ValueError(
            f"--mask-ratio {ratio} hides {count} of {blocks} blocks; it must hide at least one and not all"
        )
    return count
