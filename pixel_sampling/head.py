"""Head crops of the head and head + body rows (Table IV), from the six-part label map."""

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD = 1
MARGIN = 10  # pixels around the head at 256 x 128
FEWEST = 5  # head pixels below which the fixed box is taken


def head_boxes(parts: Tensor) -> Tensor:
    """Boxes (B, 4) int64 (top, bottom, left, right), ends exclusive, around the head pixels of parts (B, H, W).

    Rows [min - 10, max + 10) and the same for columns, clipped; with fewer than 5 head pixels rows 0..63, columns
    32..95. Rows, columns and margins are for 256 x 128 and scale with the map.
    """
    _, height, width = parts.shape
    margin, mask = round(MARGIN * height / 256), parts == HEAD
    sides = []
    for size, along in ((height, mask.any(2)), (width, mask.any(1))):  # (B, H), (B, W)
        first, last = along.int().argmax(1), size - 1 - along.flip(1).int().argmax(1)
        sides += [(first - margin).clamp_min(0), (last + margin).clamp_max(size)]
    fixed, few = (0, height // 4, width // 4, width // 4 * 3), mask.sum((1, 2)) < FEWEST
    found = torch.stack(sides, 1)
    found[:, 1::2] = torch.maximum(found[:, 1::2], found[:, ::2] + 1)  # a box is never empty
    return torch.stack([torch.where(few, number, side) for number, side in zip(fixed, found.unbind(1))], 1)


def crop_heads(images: Tensor, parts: Tensor) -> Tensor:
    """Heads (B, 3, W, W) cut out of images (B, 3, H, W) and resized bilinearly; type as the images', uint8 rounded.

    parts (B, H, W) or (B, 1, H, W). Pixels outside the box are never read.
    """
    parts = parts.squeeze(1) if parts.ndim == 4 else parts
    height, width = images.shape[2:]
    top, bottom, left, right = head_boxes(parts).unbind(1)
    place = (torch.arange(width, device=images.device) + 0.5) / width
    axes = []
    for low, high, size in ((left, right, width), (top, bottom, height)):
        at = (low[:, None] + place * (high - low)[:, None] - 0.5).clamp(min=low[:, None], max=high[:, None] - 1)
        axes.append(2 * at / (size - 1) - 1)  # (B, W)
    grid = torch.stack([axes[0][:, None, :].expand(-1, width, -1), axes[1][:, :, None].expand(-1, -1, width)], 3)
    heads = F.grid_sample(images.float(), grid, mode="bilinear", align_corners=True, padding_mode="border")
    return heads.add_(0.5).floor_().clamp_(0, 255).to(torch.uint8) if images.dtype == torch.uint8 else heads


def network_input(arch: str, images: Tensor, parts: Tensor | None) -> Tensor:
    """What the network takes: the images, their heads (B, 3, W, W), or images above heads (B, 3, H + W, W)."""
    if arch not in ("head", "head_body"):
        return images
    heads = crop_heads(images, parts)
    return heads if arch == "head" else torch.cat([images, heads], 2)


class HeadStore:
    """Image and mask stores of a test set, seen through network_input: what evaluation.extract gathers from."""

    def __init__(self, arch: str, images, masks):
        self.arch, self.images, self.masks = arch, images, masks

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, indices) -> Tensor:
        """Network inputs (B, 3, h, w) uint8 of the given indices."""
        pixels = self.images.gather(indices)
        return network_input(self.arch, pixels, self.masks.gather(indices).to(pixels.device))
