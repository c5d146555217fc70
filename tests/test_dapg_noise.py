"""Noise groups (sec. II-A), the mix, AugMix's operations."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dapg.noise import augmix, corruptions, device_corruptions, groups, names

QUIET = [corruptions.TRAIN15.index(name) for name in ("brightness", "contrast", "pixelate", "jpeg_compression")]


def pixels(count=6, height=64, width=32, seed=0):
    smooth = np.random.default_rng(seed).integers(0, 256, (count, 3, height // 8, width // 8)).astype(np.uint8)
    return torch.from_numpy(smooth.repeat(8, 2).repeat(8, 3))


def test_types_are_distinct_uniform_and_severities_in_range():
    draw = groups.draw_noise(3000, np.random.default_rng(0), severity_max=3)
    assert all(len(set(row)) == 3 for row in draw.types)
    assert set(draw.severities.ravel()) == {1, 2, 3}
    share = np.bincount(draw.types[:, 0], minlength=15) / 3000
    assert share.min() > 0.04 and share.max() < 0.095
    assert np.allclose(draw.weights.sum(1), 1, atol=1e-6) and 0 <= draw.mix.min() and draw.mix.max() <= 1


def test_a_group_reuses_n1_and_s1_in_all_three_and_n2_in_two():
    """With deterministic noises the group equals the CPU oracle run on the same draws, image for image."""
    views = tuple(pixels(seed=s) for s in (1, 2, 3))
    draw = groups.draw_noise(6, np.random.default_rng(0), types=np.array(QUIET))
    group = groups.noise_group(views, draw, torch.Generator().manual_seed(0))
    for i in range(6):
        images = [v[i].permute(1, 2, 0).numpy() for v in views]
        want = groups.noise_group_cpu(images, draw, i, np.random.default_rng(0))
        for found, wanted in zip(group[:3], want[:3]):
            assert np.array_equal(found[i].permute(1, 2, 0).numpy(), wanted)
        n1, s1 = corruptions.TRAIN15[draw.types[i, 0]], int(draw.severities[i, 0])
        assert np.array_equal(want[0], corruptions.corrupt(images[0], n1, s1, np.random.default_rng(0)))


def test_chain_is_noise_upon_noise_of_one_image():
    images, draw = pixels(), groups.draw_noise(6, np.random.default_rng(1), types=np.array(QUIET))
    group, x = groups.noise_chain(images, draw, torch.Generator().manual_seed(0)), images
    for step, found in enumerate(group[:3]):
        x = device_corruptions.corrupt(x, draw.types[:, step], draw.severities[:, step], torch.Generator())
        assert torch.equal(found, x)


def test_the_mix_is_a_convex_combination():
    views, draw = tuple(pixels(seed=s) for s in (1, 2, 3)), groups.draw_noise(6, np.random.default_rng(2))
    group = groups.noise_group(views, draw, torch.Generator().manual_seed(0))
    parts = torch.stack([views[0], *group[:3]]).int()
    assert (group.mix.int() >= parts.amin(0) - 1).all() and (group.mix.int() <= parts.amax(0) + 1).all()
    want = torch.from_numpy(draw.mix).view(-1, 1, 1, 1) * views[0]
    for i in range(3):
        share = torch.from_numpy((1 - draw.mix) * draw.weights[:, i]).view(-1, 1, 1, 1)
        want = want + share * group[i]
    assert (group.mix - want).abs().max() <= 0.51


def test_excluded_types_are_never_drawn_and_unknown_ones_are_named():
    kept = names.allowed_types(["fog", "snow"])
    assert (
        len(kept) == 13
        and corruptions.TRAIN15.index("fog") not in groups.draw_noise(500, np.random.default_rng(0), types=kept).types
    )
    with pytest.raises(ValueError, match="rain: no training noise .a type of the test's alone"):
        names.allowed_types(["rain"])
    with pytest.raises(ValueError, match="sleet"):
        names.allowed_types(["sleet"])
    with pytest.raises(ValueError, match="three"):
        names.allowed_types(list(corruptions.TRAIN15[:13]))


@pytest.mark.parametrize("name", ("autocontrast", "equalize"))
def test_histogram_operations_equal_pil(name):
    images = torch.from_numpy(np.random.default_rng(0).normal(120, 30, (3, 3, 40, 30)).clip(0, 255).astype(np.uint8))
    found = (augmix.equalize(images) if name == "equalize" else augmix.autocontrast(images.float())).to(torch.uint8)
    for image, ours in zip(images, found):
        pil = getattr(ImageOps, name)(Image.fromarray(image.permute(1, 2, 0).numpy()))
        assert np.abs(np.asarray(pil).astype(int) - ours.permute(1, 2, 0).numpy()).max() <= 1


def test_solarize_posterize_and_none_follow_their_levels():
    images, kind = pixels(4), torch.tensor([2.0, 4.0, -1.0, -1.0])
    out = augmix.operate(images, kind, torch.tensor([0.26, 0.25, 0.3, 0.3]), torch.ones(4))
    assert torch.equal(out[0], images[0] & 0b11100000)  # 4 - int(1.04) = 3 bits
    assert torch.equal(out[1], torch.where(images[1] >= 192, 255 - images[1], images[1]))
    assert torch.equal(out[2:], images[2:])


def test_translation_moves_whole_pixels_with_black_behind():
    images = pixels(1)
    out = augmix.operate(images, torch.tensor([7.0]), torch.tensor([0.3]), torch.ones(1))
    assert torch.equal(out[..., :-3], images[..., 3:]) and (out[..., -3:] == 0).all()  # trunc(0.3 * 32 / 3) = 3


@pytest.mark.parametrize("kind, level", [(3, 0.26), (3, 0.3), (5, 0.3), (6, 0.21), (7, 0.3), (8, 0.2)])
@pytest.mark.parametrize("sign", [1, -1])
def test_geometric_operations_are_pils_as_augmix_calls_it(kind, level, sign):
    """Rotation by int(30 l) degrees, shear of 0.3 l from the corner, int(l / 3 of the side) pixels; PIL, bilinear."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 96, 48)).astype(np.uint8))
    image, size = Image.fromarray(images[0].permute(1, 2, 0).numpy()), (48, 96)
    shear, across, down = (sign * v for v in (0.3 * level, int(level * 48 / 3), int(level * 96 / 3)))
    matrices = {
        5: (1, shear, 0, 0, 1, 0),
        6: (1, 0, 0, shear, 1, 0),
        7: (1, 0, across, 0, 1, 0),
        8: (1, 0, 0, 0, 1, down),
    }
    if kind == 3:
        want = image.rotate(sign * int(30 * level), resample=Image.BILINEAR)
    else:
        want = image.transform(size, Image.AFFINE, matrices[kind], resample=Image.BILINEAR)
    found = augmix.operate(images, *(torch.tensor([float(v)]) for v in (kind, level, sign)))[0].permute(1, 2, 0).numpy()
    gap = np.abs(np.asarray(want).astype(int) - found)
    assert np.quantile(gap, 0.995) <= 1 and (found == 0).mean() == pytest.approx(
        (np.asarray(want) == 0).mean(), abs=3e-3
    )


def test_the_augmix_mixture_has_the_share_of_a_uniform_draw(monkeypatch):
    """m ~ Beta(1, 1): with chains that end in white, a black image becomes 255 m."""
    monkeypatch.setattr(augmix, "augmix_chain", lambda images, *_: torch.full_like(images, 255))
    share = augmix.augmix(torch.zeros(2000, 3, 1, 1, dtype=torch.uint8), torch.Generator().manual_seed(0)).float() / 255
    assert abs(share.mean() - 0.5) < 0.03 and abs(share.std() - 12**-0.5) < 0.02


def test_snow_adds_its_layer_and_the_layer_turned_by_half_a_circle():
    """On black all but the layers is constant, so the picture equals itself turned, and not itself mirrored."""
    black, snow = np.zeros((64, 48, 3), np.uint8), corruptions.TRAIN15.index("snow")
    batch = torch.from_numpy(black).permute(2, 0, 1)[None]
    kinds = np.array([snow]), np.array([2])
    on_device = device_corruptions.corrupt(batch, *kinds, torch.Generator().manual_seed(0))[0].permute(1, 2, 0).numpy()
    for found in (corruptions.corrupt(black, "snow", 2, np.random.default_rng(0)), on_device):
        assert np.abs(found.astype(int) - found[::-1, ::-1]).max() <= 1 and found.std() > 3
        assert (
            np.abs(found.astype(int) - found[::-1]).max() > 20 and np.abs(found.astype(int) - found[:, ::-1]).max() > 20
        )


def test_augmix_depends_on_the_generator_alone():
    one, two, other = (augmix.augmix(pixels(), torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other) and one.dtype == torch.uint8
