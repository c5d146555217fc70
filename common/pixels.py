"""From image files to pixels: the one place where this happens, and the rule for what a file says about its pixels.

Every reader uses it: the stores, LUPerson's LMDB, parsing, preparation, figures, and `python -m common.datasets check`.
The pixels are what a person sees in a viewer, as 8-bit RGB, or the file is refused with its path:

- Grey, colour, palette, CMYK and YCbCr of up to 8 bits a channel: as Pillow converts them. Colour profiles and gamma
  chunks are not applied.
- Colour, or grey with alpha, of 16 bits a channel: the upper eight bits.
- Orientation (EXIF, TIFF, XMP): the image is turned upright.
- Transparency (an alpha channel, transparent palette entries, a transparent colour): laid over white.
- Several pictures in a file: the first, which is what an animation (GIF, PNG, WebP, AVIF) or a phone's MPO shows. A
  TIFF of several pages is refused, for its other pages are images too.
- Grey of 16 or 32 bits and floating point: refused. Such files hold counts of a sensor, and only their owner knows
  which count is black and which is white.

Label maps (`labels`) are no pictures: their palette indices or grey values are kept as they are, untransformed.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.datasets import lists

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
ORIENTATION = 0x0112  # EXIF's tag
UPRIGHT = {  # its value -> what turns the stored rows upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Result = TypeVar("Result")


class Refusal(ValueError):
    """A file that could be decoded, but whose pixels would mean something else than their owner thinks."""


class Undecodable(ValueError):
    """A file that is broken, or that Pillow does not know."""


def read(path: str | Path, content: bytes | None = None) -> Image.Image:
    """The image as a viewer shows it, PIL RGB; `content`: the file's bytes where they do not lie at `path`.

    Raises: FileNotFoundError; ValueError for a file that cannot be decoded to its last row or that the rule refuses.
    """
    return _opened(path, content, _shown)


def decode(
    path: str | Path, channels: int, height: int, width: int, interpolation: str, content: bytes | None = None
) -> np.ndarray:
    """One image at network size, uint8 (C, H, W): RGB for 3 channels, a label map for 1. Raises as these."""
    try:
        image = read(path, content) if channels == 3 else Image.fromarray(labels(path))
    except Undecodable as error:
        remedy = "replace the file, or list all broken ones with python -m common.datasets check NAME"
        raise ValueError(f"{error}; {remedy}") from error
    if image.size != (width, height):
        image = image.resize((width, height), FILTERS[interpolation])
    return np.asarray(image, dtype=np.uint8).reshape(height, width, channels).transpose(2, 0, 1).copy()


def labels(path: str | Path) -> np.ndarray:
    """A label map (H, W) uint8: palette indices or grey values as stored. Raises: as `read`, and for another mode."""
    return _opened(path, None, _labels)


def size(path: str | Path) -> tuple[int, int]:
    """(width, height) of the image as `read` gives it, from the file's header where that tells. Raises: as `read`."""
    return _opened(path, None, lambda image: image.size if _as_stored(image) else _shown(image).size)


def _opened(path: str | Path, content: bytes | None, take: Callable[[Image.Image], Result]) -> Result:
    """take(image) of the open file, whatever fails said in one sentence with the path."""
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            return take(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image; the data set is incomplete") from None
    except Refusal as refusal:
        raise ValueError(f"{path}: {refusal}") from None
    except Exception as error:  # Pillow's readers raise whatever their parsing of broken bytes runs into
        unknown = isinstance(error, UnidentifiedImageError) and lists.foreign(_head(path, content))
        reason = unknown or str(error) or type(error).__name__
        raise Undecodable(f"{path}: cannot be decoded ({reason})") from error


def _head(path: str | Path, content: bytes | None) -> bytes:
    """The first bytes of the file."""
    if content is not None:
        return content[: lists.HEAD]
    with open(path, "rb") as file:
        return file.read(lists.HEAD)


def _shown(image: Image.Image) -> Image.Image:
    """The open image by the rule above."""
    if image.format == "TIFF" and image.n_frames > 1:
        raise Refusal(f"a TIFF of {image.n_frames} pages; save each page that you want as a file of its own")
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        depth = "floating point" if image.mode == "F" else "more than 8 bits"
        raise Refusal(
            f"grey values in {depth}, whose black and white only you know; save it with 8 bits, your range of values "
            "spread over 0..255"
        )
    turn = UPRIGHT.get(_orientation(image))
    if _transparent(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _transparent(image: Image.Image) -> bool:
    """Whether some pixels may be transparent."""
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or palette.endswith("A") or "transparency" in image.info


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation 1..8; 1 where the file has none, or an EXIF block that cannot be read, as viewers do."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # as above: the pixels are whole
        return 1


def _as_stored(image: Image.Image) -> bool:
    """Whether the header's size is the size shown."""
    return image.format != "TIFF" and _orientation(image) not in UPRIGHT


def _labels(image: Image.Image) -> np.ndarray:
    if image.mode not in ("P", "L"):
        raise Refusal(f"a label map has mode P or L, this has {image.mode}")
    return np.array(image, dtype=np.uint8)
