"""What a file says about its pixels: they are what a viewer shows, or the file is refused with its path."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common import images, pixels, visualize
from common.datasets.__main__ import fault
from pixel_sampling import masks, parse

RED, BLUE, WHITE = [255, 0, 0], [0, 0, 255], [255, 255, 255]


def shown(path) -> np.ndarray:
    return np.asarray(pixels.read(path))


def noise(height=12, width=8, channels=3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def oriented(path, picture: Image.Image, value: int):
    exif = Image.Exif()
    exif[pixels.ORIENTATION] = value
    picture.save(path, exif=exif)
    return path


@pytest.mark.parametrize(
    "name, mode",
    [("a.jpg", "RGB"), ("a.jpg", "L"), ("a.jpg", "CMYK"), ("a.tif", "RGB"), ("a.bmp", "RGB")]
    + [("a.png", mode) for mode in ("RGB", "L", "P", "1")],
)
def test_ordinary_files_give_the_pixels_that_pillow_gives(tmp_path, name, mode):
    Image.fromarray(noise()).convert(mode).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert np.array_equal(shown(tmp_path / name), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_every_orientation_is_turned_upright(tmp_path, value, suffix):
    """Six blocks of colour, whose rows are stored in the order that the value names."""
    blocks = np.array([[[200, 40, 40], [40, 200, 40], [40, 40, 200]], [[200, 200, 40], [40, 200, 200], [9, 9, 9]]])
    upright = blocks.astype(np.uint8).repeat(16, 0).repeat(16, 1)
    across = upright.transpose(1, 0, 2)
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: across, 6: across[::-1], 7: across[::-1, ::-1], 8: across[:, ::-1]}[value]  # fmt: skip
    path = oriented(tmp_path / f"a.{suffix}", Image.fromarray(np.ascontiguousarray(stored)), value)
    assert np.abs(shown(path).astype(int) - upright).mean() < 9 and pixels.size(path) == (48, 32)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_exif_block_that_cannot_be_read_is_as_none(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12\0\x03")
    Image.fromarray(noise()).save(tmp_path / "b.jpg")
    assert np.array_equal(shown(tmp_path / "a.jpg"), shown(tmp_path / "b.jpg"))


def transparent(kind: str) -> tuple[Image.Image, dict]:
    """A left half of red and a right half of what is transparent, whose stored colour is blue."""
    colours = np.array([[RED, BLUE]], np.uint8).repeat(4, 0).repeat(3, 1)
    alpha = np.where(colours[..., :1] == 255, 255, 0).astype(np.uint8)
    if kind == "alpha":
        return Image.fromarray(np.concatenate([colours, alpha], 2)), {}
    if kind == "colour":
        return Image.fromarray(colours), {"transparency": tuple(BLUE)}
    palette = Image.fromarray((alpha[..., 0] == 0).astype(np.uint8))
    palette.putpalette(RED + BLUE)
    return palette, {"transparency": 1 if kind == "palette" else b"\xff\x00"}


@pytest.mark.parametrize("kind", ["alpha", "colour", "palette", "palette of alphas"])
def test_transparency_is_laid_over_white(tmp_path, kind):
    picture, options = transparent(kind)
    picture.save(tmp_path / "a.png", **options)
    assert shown(tmp_path / "a.png")[0].tolist() == [RED] * 3 + [WHITE] * 3


def test_grey_with_alpha_and_half_transparency_mix_with_white(tmp_path):
    Image.fromarray(np.array([[[0, 128], [100, 255], [7, 0]]], np.uint8), "LA").save(tmp_path / "a.png")
    assert shown(tmp_path / "a.png")[0].tolist() == [[127] * 3, [100] * 3, WHITE]


def png(rows: np.ndarray, kind: int) -> bytes:
    """A PNG of 16 bits a channel, rows (H, W, C); kind: PNG's colour type."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_colour_of_16_bits_gives_its_upper_eight(tmp_path):
    rows = np.random.default_rng(0).integers(0, 65536, (4, 5, 3))
    (tmp_path / "a.png").write_bytes(png(rows, 2))
    assert np.array_equal(shown(tmp_path / "a.png"), rows >> 8)
    rows = np.stack([rows[..., 0], np.full((4, 5), 65535)], -1)
    (tmp_path / "la.png").write_bytes(png(rows, 4))
    assert np.array_equal(shown(tmp_path / "la.png")[..., 1], rows[..., 0] >> 8)


def pages(path):
    """Two pictures in one file."""
    Image.fromarray(noise()).save(path, save_all=True, append_images=[Image.fromarray(noise()[::-1].copy())])


def counts(kind):
    """What writes a grey picture of this type, of 7000 and more."""
    return lambda path: Image.fromarray(np.arange(7000, 7096).reshape(12, 8).astype(kind)).save(path)


@pytest.mark.parametrize(
    "name, make, said",
    [
        ("a.png", counts("uint16"), "more than 8 bits"),
        ("a.tif", counts("uint16"), "more than 8 bits"),
        ("a.tif", counts("int32"), "more than 8 bits"),
        ("a.tif", counts("float32"), "floating point"),
        ("a.tif", pages, "a TIFF of 2 pages; save each page"),
        ("a.jpg", lambda path: path.write_bytes(b""), "cannot be decoded .an empty file"),
        ("a.jpg", lambda path: path.write_text("<!DOCTYPE html><html>"), "cannot be decoded .a web page"),
        ("a.jpg", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    ],
)
def test_what_nobody_can_show_is_refused_with_its_path_by_every_reader(tmp_path, name, make, said):
    path = tmp_path / name
    make(path)
    readers = [
        lambda: pixels.read(path),
        lambda: pixels.read(path, path.read_bytes()),
        lambda: images.open_images([str(path)], 12, 8, cache="off").gather([0]),
        lambda: visualize.picture(path),
    ]
    for read in readers:
        with pytest.raises(ValueError, match=f"{path}: .*{said}") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert re.search(said, parse.read(path)) and re.search(said, fault(str(path)))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animation_is_its_first_picture(tmp_path, name):
    pages(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 2
        first = np.asarray(image.convert("RGB"))
    assert np.array_equal(shown(tmp_path / name), first)


def test_the_stores_and_the_check_see_the_same_upright_picture(tmp_path):
    path = str(oriented(tmp_path / "a.png", Image.fromarray(noise(8, 12)), 6))
    store = images.open_images([path], 12, 8, cache_dir=tmp_path / "cache")
    assert np.array_equal(store.gather([0])[0].permute(1, 2, 0).numpy(), np.rot90(noise(8, 12), -1))
    assert np.array_equal(parse.read(path).permute(1, 2, 0).numpy(), np.rot90(noise(8, 12), -1)) and fault(path) is None


def test_label_maps_keep_their_indices_whatever_their_palette_and_transparency_say(tmp_path):
    labels = np.random.default_rng(1).integers(0, 6, (12, 8), dtype=np.uint8)
    image = Image.fromarray(labels)
    image.putpalette(masks.palette(256).tobytes())
    image.save(tmp_path / "mask.png", transparency=0)
    assert np.array_equal(pixels.labels(tmp_path / "mask.png"), labels)
    oriented(tmp_path / "photo.png", Image.fromarray(noise(8, 12)), 8)  # shown as 8 x 12, as its mask is
    assert np.array_equal(masks.read_parts(tmp_path / "mask.png", "part6", tmp_path / "photo.png"), labels)
    Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="deep.png: a label map has mode P or L, this has I;16"):
        pixels.labels(tmp_path / "deep.png")


def test_bytes_are_read_as_the_file_that_holds_them(tmp_path):
    content = io.BytesIO()
    Image.fromarray(noise()).save(content, "PNG")
    assert np.array_equal(np.asarray(pixels.read("x::key", content.getvalue())), noise())
    with pytest.raises(ValueError, match="^x::key: cannot be decoded"):
        pixels.read("x::key", content.getvalue()[:60])
