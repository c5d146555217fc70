"""Masks: palette, the 18 -> 6 map, three formats, alignment with images, head crops, and what is wrong with a mask."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from common import images, transforms
from common.datasets import Sample
from common.keypoints import ATR
from pixel_sampling import head, masks
from pixel_sampling.masks import LUT, open_masks, palette, read_parts, write_labels
from pixel_sampling.sampling import sample_pixels

COLOURS = np.array([
    (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128), (128, 128, 128),
    (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128), (192, 0, 128), (64, 128, 128),
    (192, 128, 128), (0, 64, 0), (128, 64, 0)
])  # fmt: skip
NAMES = {
    "background": 0,
    "hat": 1,
    "hair": 1,
    "sunglasses": 1,
    "upper-clothes": 2,
    "skirt": 3,
    "pants": 3,
    "dress": 2,
    "belt": 3,
    "left-shoe": 5,
    "right-shoe": 5,
    "face": 1,
    "left-leg": 5,
    "right-leg": 5,
    "left-arm": 4,
    "right-arm": 4,
    "bag": 4,
    "scarf": 2,
}


def test_palette_is_pascal_vocs():
    assert np.array_equal(palette(18), COLOURS)


def test_lut_follows_the_authors_answer_label_by_label():
    assert [NAMES[name] for name in ATR] == LUT.tolist() == [0, 1, 1, 1, 2, 3, 3, 2, 3, 5, 5, 1, 5, 5, 4, 4, 4, 2]


def coded(folder, number=3, size=(90, 50), labels=6, mask_format="part6", seed=0):
    """Images whose colour encodes their label (label * 40 + 20 in every channel) with masks, in blocks."""
    rng, samples = np.random.default_rng(seed), []
    for i in range(number):
        blocks = rng.integers(0, labels, (9, 5)).repeat(10, 0).repeat(10, 1).astype(np.uint8)[: size[0], : size[1]]
        image, mask = folder / f"{i}.png", folder / "mask" / f"{i}.png"
        Image.fromarray(
            np.repeat((LUT[blocks] if labels == 18 else blocks)[..., None] * 40 + 20, 3, 2).astype(np.uint8)
        ).save(image)
        write_labels(mask, blocks)
        samples.append(Sample(str(image), i, 0, mask=str(mask)))
    return samples


@pytest.mark.parametrize("interpolated", [False, True])
def test_a_colour_coded_mask_stays_aligned_through_resize_flip_pad_and_crop(tmp_path, interpolated):
    samples = coded(tmp_path, 4)
    store = images.open_images(
        [s.path for s in samples], 64, 32, interpolation="bilinear" if interpolated else "nearest"
    )
    maps = open_masks(samples, 64, 32, "part6").gather(np.arange(4))
    pixels = store.gather(np.arange(4))
    for seed in range(5):
        geometry = transforms.draw_geometry(pixels.shape, torch.Generator().manual_seed(seed), pad=3)
        x, parts = geometry.apply(pixels), geometry.apply(maps, "nearest")[:, 0]
        decoded = (x[:, 0].float() - 20) / 40
        black = x[:, 0] == 0  # the padding: black, and background
        assert (parts[black] == 0).all()
        off = ((decoded - parts).abs() > 0.02) & ~black
        # bilinear resizing mixes colours along the borders of blocks, nearest does not
        assert off.float().mean() < (0.35 if interpolated else 0.0) + 1e-9
        inner = (
            torch.nn.functional.max_pool2d(parts[:, None].float(), 3, 1, 1)[:, 0]
            == -torch.nn.functional.max_pool2d(-parts[:, None].float(), 3, 1, 1)[:, 0]
        )
        assert not (off & inner & ~black).any() or not interpolated
        assert (off & inner & ~black).float().mean() == 0


def test_atr18_and_part6_and_npy6_give_the_same_parts(tmp_path):
    samples = coded(tmp_path, 3, labels=18)
    atr = open_masks(samples, 45, 25, "atr18").gather(np.arange(3))
    six, scores = [], []
    for s in samples:
        parts = read_parts(s.mask, "atr18")
        write_labels(tmp_path / "six" / f"{s.pid}.png", parts)
        six.append(s._replace(mask=str(tmp_path / "six" / f"{s.pid}.png")))
        np.save(tmp_path / f"{s.pid}.npy", np.eye(6, dtype=np.float32)[atr[s.pid, 0].numpy()])
        scores.append(s._replace(mask=str(tmp_path / f"{s.pid}.npy")))
    assert torch.equal(open_masks(six, 45, 25, "part6").gather(np.arange(3)), atr)
    assert torch.equal(open_masks(scores, 45, 25, "npy6").gather(np.arange(3)), atr)
    assert atr.max() == 5


def test_npy6_resizes_scores_with_aligned_corners_before_the_argmax(tmp_path):
    scores = np.zeros((2, 2, 6), np.float32)
    scores[0, :, 1], scores[1, :, 2] = 1.0, 0.6
    np.save(tmp_path / "a.npy", scores)
    got = masks.read_scores(str(tmp_path / "a.npy"), 7, 3)
    assert got[:, 0].tolist() == [1, 1, 1, 1, 2, 2, 2]  # row k: 1 - k/6 against 0.6 k/6, equal at k = 3.75


@pytest.mark.parametrize("cache", ["disk", "device", "off"])
def test_every_cache_gives_the_same_maps_and_missing_masks_are_counted_warned_and_empty(tmp_path, cache):
    samples = coded(tmp_path, 4)
    samples[2] = samples[2]._replace(mask=None)
    with pytest.warns(UserWarning, match="1 of 4 images .* have no mask.*2.png"):
        store = open_masks(samples, 30, 20, "part6", cache=cache)
    got = store.gather(torch.tensor([3, 2, 0]))
    assert got.shape == (3, 1, 30, 20) and got.dtype == torch.uint8 and store.missing == 1
    assert not got[1].any() and got[0].any() and "3 of 4 images" in store.statistics()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(got, open_masks(samples, 30, 20, "part6", cache="off").gather(torch.tensor([3, 2, 0])))


def test_an_image_without_a_mask_is_unchanged_by_sampling(tmp_path):
    samples = coded(tmp_path, 4)
    samples[1] = samples[1]._replace(mask=None)
    with pytest.warns(UserWarning):
        maps = open_masks(samples, 90, 50, "part6").gather(np.arange(4))
    x = torch.rand(4, 3, 90, 50)
    changed = sample_pixels(x, maps, torch.Generator().manual_seed(0))
    assert torch.equal(changed[1], x[1]) and not torch.equal(changed, x)


def test_what_is_wrong_with_a_mask_is_named(tmp_path):
    samples = coded(tmp_path, 1)
    good = samples[0]

    def error(mask_format="part6", kind=ValueError, **change):
        with pytest.raises(kind) as caught:
            open_masks([good._replace(**change)], 30, 20, mask_format, cache_dir=tmp_path / "cache")
        return str(caught.value)

    write_labels(tmp_path / "small.png", np.zeros((9, 5), np.uint8))
    assert "is 5x9 but its image is 50x90" in error(mask=str(tmp_path / "small.png"))
    write_labels(tmp_path / "seven.png", np.full((90, 50), 7, np.uint8))
    assert "label 7, but part6 has labels 0..5; these look like ATR labels: use --mask-format atr18" in error(
        mask=str(tmp_path / "seven.png")
    )
    write_labels(tmp_path / "lip.png", np.full((90, 50), 19, np.uint8))
    assert "label 19, but atr18 has labels 0..17" in error("atr18", mask=str(tmp_path / "lip.png"))
    write_labels(tmp_path / "six.png", np.full((90, 50), 5, np.uint8))
    assert "hold no label above 5 and look like part6: use --mask-format part6" in error(
        "atr18", mask=str(tmp_path / "six.png")
    )
    Image.new("RGB", (50, 90)).save(tmp_path / "rgb.png")
    assert "mode P or L, this has RGB" in error(mask=str(tmp_path / "rgb.png"))
    (tmp_path / "cut.png").write_bytes((tmp_path / "seven.png").read_bytes()[:60])
    assert "cut.png: cannot be decoded" in error(mask=str(tmp_path / "cut.png"))
    np.save(tmp_path / "flat.npy", np.zeros((4, 4)))
    assert "scores (h, w, 6)" in error("npy6", mask=str(tmp_path / "flat.npy"))
    np.save(tmp_path / "pickled.npy", np.array([{}], object), allow_pickle=True)
    assert "not a readable .npy" in error("npy6", mask=str(tmp_path / "pickled.npy"))
    assert "none of the 1 images" in error(kind=FileNotFoundError, mask=None)
    assert "none of part6" in error("lip20")
    assert not list((tmp_path / "cache").glob("*.tmp")) and not list((tmp_path / "cache").glob("*.npy"))


# ---------------------------------------------------------------------------------------------------------------- heads


def test_head_boxes_equal_the_loop_with_margin_and_clipping():
    g = torch.Generator().manual_seed(0)
    parts = torch.zeros(12, 256, 128, dtype=torch.uint8)
    for i in range(12):
        top, left = int(torch.randint(0, 200, (1,), generator=g)), int(torch.randint(0, 90, (1,), generator=g))
        parts[i, top : top + 5 + 4 * i, left : left + 3 + 2 * i] = 1
    for box, one in zip(head.head_boxes(parts).tolist(), parts.numpy()):
        rows, columns = np.nonzero(one == 1)
        assert box == [
            max(rows.min() - 10, 0),
            min(rows.max() + 10, 256),
            max(columns.min() - 10, 0),
            min(columns.max() + 10, 128),
        ]


def test_fewer_than_five_head_pixels_fall_back_to_the_fixed_box():
    parts = torch.zeros(2, 256, 128, dtype=torch.uint8)
    parts[0, 100, 60:64] = 1
    parts[1, 100, 60:65] = 1
    assert head.head_boxes(parts).tolist() == [[0, 64, 32, 96], [90, 110, 50, 74]]


def test_head_crop_equals_cut_and_bilinear_resize():
    g = torch.Generator().manual_seed(1)
    x, parts = torch.rand(5, 3, 256, 128, generator=g), torch.zeros(5, 256, 128, dtype=torch.uint8)
    for i in range(5):
        parts[i, 10 * i : 10 * i + 20 + i, 40 : 60 + 3 * i] = 1
    got = head.crop_heads(x, parts)
    for i, (top, bottom, left, right) in enumerate(head.head_boxes(parts).tolist()):
        expected = torch.nn.functional.interpolate(
            x[i : i + 1, :, top:bottom, left:right], (128, 128), mode="bilinear", align_corners=False
        )
        assert torch.allclose(got[i : i + 1], expected, atol=2e-4)


def test_network_inputs_of_the_head_rows():
    x, parts = torch.randint(0, 256, (2, 3, 64, 32), dtype=torch.uint8), torch.ones(2, 1, 64, 32, dtype=torch.uint8)
    assert head.network_input("bot", x, None) is x
    heads = head.network_input("head", x, parts)
    both = head.network_input("head_body", x, parts)
    assert heads.shape == (2, 3, 32, 32) and heads.dtype == torch.uint8
    assert torch.equal(both[:, :, :64], x) and torch.equal(both[:, :, 64:], heads)
