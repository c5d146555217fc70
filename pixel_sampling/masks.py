"""Parsing masks: the 18 ATR labels, the six parts, three file formats, and a store of label maps at network size.

    masks = open_masks(data.train, 256, 128, "part6")       # six parts whatever the format
    masks.gather(indices)                                   # uint8 (B, 1, H, W), 0..5; all 0 where a mask is missing

part6: PNG of values 0..5, size of the image. atr18: PNG of ATR labels 0..17, size of the image. npy6: the authors'
float (h, w, 6) scores, resized bilinearly with aligned corners, then argmax.
"""

import hashlib
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common import pixels, store
from common.datasets.prcc import ATR_TO_SIX, MASK_FORMATS
from common.images import to_device
from common.runfiles import replace

PARTS = ("background", "head", "upper clothes", "pants", "arms", "legs")
LUT = np.array(ATR_TO_SIX, np.uint8)  # as the authors state it in an issue of their repository
LABELS = {"part6": 6, "atr18": 18}
CHECKED = 64  # masks that are looked at to tell the formats apart


def palette(number: int = 18) -> np.ndarray:
    """PASCAL VOC colours (number, 3) uint8: bit 3i + c of the label is bit 7 - i of channel c."""
    label = np.arange(number)[:, None]
    bits = (label >> (3 * np.arange(8)[:, None, None] + np.arange(3))) & 1  # (8, number, 3)
    return (bits << (7 - np.arange(8)[:, None, None])).sum(0).astype(np.uint8)


def write_labels(path: Path, labels: np.ndarray) -> None:
    """Write a label map (H, W) uint8 as a palette PNG, in one atomic step."""
    image = Image.fromarray(labels)
    image.putpalette(palette(256).tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, lambda file: image.save(file, "png"))


def read_parts(path: str, mask_format: str, image: str | None = None) -> np.ndarray:
    """The six-part map (H, W) uint8 of a PNG mask, at its own size. With `image`, both must have one size.

    Raises: ValueError naming the file for what is no label map, labels outside the format, or another size.
    """
    try:
        labels = pixels.labels(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"mask {error}; write it again with python -m pixel_sampling.parse") from error
    if image is not None and (size := pixels.size(image)) != labels.shape[::-1]:
        raise ValueError(
            f"mask {path} is {labels.shape[1]}x{labels.shape[0]} but its image is {size[0]}x{size[1]}; "
            f"{mask_format} masks have the size of their image: write it with python -m pixel_sampling.parse"
        )
    known = LABELS[mask_format]
    if labels.max(initial=0) >= known:
        hint = (
            "; these look like ATR labels: use --mask-format atr18"
            if mask_format == "part6" and labels.max() < 18
            else ""
        )
        raise ValueError(f"mask {path} holds label {labels.max()}, but {mask_format} has labels 0..{known - 1}{hint}")
    return LUT[labels] if mask_format == "atr18" else labels


def read_scores(path: str, height: int, width: int) -> np.ndarray:
    """The six-part map (height, width) uint8 of an npy6 mask: scores resized with aligned corners, then argmax."""
    try:
        scores = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"mask {path}: not a readable .npy file ({error})") from error
    if scores.ndim != 3 or scores.shape[2] != 6 or not np.isfinite(scores).all():
        raise ValueError(f"mask {path} holds {scores.dtype} {scores.shape}; npy6 masks are finite scores (h, w, 6)")
    tensor = torch.from_numpy(scores.astype(np.float32)).permute(2, 0, 1)[None]
    return (
        F.interpolate(tensor, (height, width), mode="bilinear", align_corners=True)[0].argmax(0).to(torch.uint8).numpy()
    )


def decode(path: str | None, image: str, mask_format: str, height: int, width: int) -> np.ndarray:
    """One mask at network size, (height, width) uint8 in 0..5, by nearest neighbour; zeros for a missing one."""
    if path is None:
        return np.zeros((height, width), np.uint8)
    if mask_format == "npy6":
        return read_scores(path, height, width)
    labels = Image.fromarray(read_parts(path, mask_format, image))
    return np.array(labels.resize((width, height), Image.Resampling.NEAREST))


class MaskStore:
    """Six-part maps of a list of samples, addressed by index; made by open_masks. `missing` counts absent files."""

    def __init__(self, samples: list, height: int, width: int, mask_format: str, device: torch.device, maps):
        self.samples, self.shape, self.mask_format, self.device = samples, (height, width), mask_format, device
        self.pixels = maps  # (N, H, W) memory map | tensor on the device | None: decode at every use
        self.missing = sum(s.mask is None for s in samples)

    def __len__(self) -> int:
        return len(self.samples)

    def gather(self, indices) -> torch.Tensor:
        """Maps (B, 1, H, W) uint8 of the indices (B,)."""
        index = torch.as_tensor(np.asarray(indices), dtype=torch.int64)
        if isinstance(self.pixels, torch.Tensor):
            return self.pixels[to_device(index, self.device)][:, None]
        if self.pixels is not None:
            return torch.from_numpy(self.pixels[index.numpy()])[:, None]
        chosen = [self.samples[i] for i in index.tolist()]
        return torch.from_numpy(np.stack([decode(s.mask, s.path, self.mask_format, *self.shape) for s in chosen]))[
            :, None
        ]

    def statistics(self, most: int = 2000) -> str:
        """Share of pixels of each part, and of images without upper clothes or pants, over at most `most` images."""
        maps = self.gather(np.linspace(0, len(self) - 1, min(len(self), most)).astype(np.int64)).cpu().flatten(1)
        shares = torch.stack([(maps == part).float().mean(1) for part in range(6)], 1)  # (n, 6)
        without = 100 * (shares == 0).float().mean(0)
        parts = ", ".join(f"{name} {100 * share:.1f}" for name, share in zip(PARTS, shares.mean(0).tolist()))
        return (
            f"masks ({self.mask_format}): {len(self) - self.missing} of {len(self)} images; "
            f"per cent of pixels: {parts}; images without upper clothes {without[2]:.1f} %, pants {without[3]:.1f} %"
        )


def open_masks(
    samples: list,
    height: int,
    width: int,
    mask_format: str,
    *,
    cache: str = "disk",
    cache_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
    workers: int = 2,
    name: str = "masks",
) -> MaskStore:
    """The masks of the samples at network size, decoded once into a memory map; cache as for images.open_images.

    A missing mask counts as all background, so pixel sampling leaves its image alone; one warning says how many.
    Raises: ValueError, naming the file, for a mask of another size than its image, with unknown labels or unreadable;
    FileNotFoundError if no sample has a mask.
    """
    if mask_format not in MASK_FORMATS:
        raise ValueError(f"mask format {mask_format!r} is none of {', '.join(MASK_FORMATS)}")
    found = [s for s in samples if s.mask is not None]
    if not found:
        raise FileNotFoundError(
            f"none of the {len(samples)} images ({name}) has a {mask_format} mask; "
            "make them with python -m pixel_sampling.parse"
        )
    if mask_format == "atr18":
        check_atr([s.mask for s in found[:: max(1, len(found) // CHECKED)]], name)
    if len(found) < len(samples):
        first = next(s.path for s in samples if s.mask is None)
        warnings.warn(
            f"{len(samples) - len(found)} of {len(samples)} images ({name}) have no mask, e.g. {first}; "
            "their clothes stay unchanged",
            stacklevel=2,
        )
    device, maps = torch.device(device), None
    if cache != "off":
        maps = open_store(samples, found, height, width, mask_format, cache_dir, workers, name)
        maps = torch.from_numpy(np.array(maps)).to(device) if cache == "device" else maps
    return MaskStore(samples, height, width, mask_format, device, maps)


def check_atr(paths: list[str], name: str) -> None:
    """Raises: ValueError where no mask holds a label above 5: those of six parts would pass for ATR labels."""

    def largest(path: str) -> int:
        try:
            return int(pixels.labels(path).max(initial=0))
        except (OSError, ValueError):
            return LABELS["atr18"]  # no label map: named where it is read

    if all(largest(path) < len(PARTS) for path in paths):
        raise ValueError(
            f"the masks of {name}, e.g. {paths[0]}, hold no label above 5 and look like part6: use "
            "--mask-format part6, or write ATR labels with python -m pixel_sampling.parse --labels atr18"
        )


def open_store(
    samples: list, found: list, height: int, width: int, mask_format: str, cache_dir, workers: int, name: str
) -> np.ndarray:
    """Memory map (N, H, W) of the store file, written first if it is not there."""
    present = hashlib.sha256(bytes(s.mask is not None for s in samples)).hexdigest()
    file = store.place([s.mask for s in found], (1, height, width), f"{mask_format} {present}", cache_dir, name)

    def make(sample) -> np.ndarray:
        return decode(sample.mask, sample.path, mask_format, height, width)

    return store.open_rows(file, store.Rows(make, samples, (height, width), f"decode {name}", workers, threads=True))
