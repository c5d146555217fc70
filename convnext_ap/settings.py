"""Variants of the network that the flags offer, and the sizes that fit them. Knows no torch."""

from typing import NamedTuple

STRIDE = 32  # pixels of the image a position of the last map covers
POSITIONS = ("none", "dw", "mlp", "branch")


class Trunk(NamedTuple):
    """Blocks and channels of the four stages of a ConvNeXt, and what its residual branches are scaled by at first."""

    depths: tuple
    channels: tuple
    layer_scale: float


TRUNKS = {
    "base": Trunk((3, 3, 27, 3), (128, 256, 512, 1024), 1e-6),  # ConvNeXt-B, the paper's: the counts leave no other
    "tiny": Trunk((1, 1, 3, 1), (24, 48, 96, 192), 0.1),  # ours, for one CPU and random weights; not ConvNeXt-T
}


def name_of(attention: str, parts: int) -> str:
    """The paper's name of a variant: ConvNeXt, ConvNeXt-A, ConvNeXt-P or ConvNeXt-AP."""
    letters = "A" * (attention != "none") + "P" * (parts > 0)
    return f"ConvNeXt-{letters}" if letters else "ConvNeXt"


def check_size(height: int, width: int, attention: str, parts: int) -> None:
    """Raises ValueError for an input whose last map is empty, too low for the parts, or too small for SimAM."""
    rows, columns = height // STRIDE, width // STRIDE
    if rows < 1 or columns < 1:
        raise ValueError(
            f"an input of {height}x{width} is too small: the trunk divides both sides by {STRIDE}; "
            f"use at least --height {STRIDE} --width {STRIDE}"
        )
    if parts > rows:
        raise ValueError(
            f"{parts} parts do not fit the {rows}x{columns} map of a {height}x{width} input, a part needs "
            f"a row: use --parts {rows} or fewer, or --height {parts * STRIDE} or more"
        )
    if attention != "none" and rows * columns < 2:
        raise ValueError(
            f"SimAM takes the variance over a map, and the last one of a {height}x{width} input has a "
            f"single position: use --height {2 * STRIDE} or more, or --simam none"
        )
