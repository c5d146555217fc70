"""Noise groups (sec. II-A), the mix, AugMix's operations."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dapg.noise import corruptions, device_corruptions, groups

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
    kept = groups.allowed_types(["fog", "snow"])
    assert (
        len(kept) == 13
        and corruptions.TRAIN15.index("fog") not in groups.draw_noise(500, np.random.default_rng(0), types=kept).types
    )
    with pytest.raises(ValueError, match="sleet"):
        groups.allowed_types(["sleet"])
    with pytest.raises(ValueError, match="three"):
        groups.allowed_types(list(corruptions.TRAIN15[:13]))


@pytest.mark.parametrize("name", ("autocontrast", "equalize"))
def test_histogram_operations_equal_pil(name):
    images = torch.from_numpy(np.random.default_rng(0).normal(120, 30, (3, 3, 40, 30)).clip(0, 255).astype(np.uint8))
    found = (groups.equalize(images) if name == "equalize" else groups.autocontrast(images.float())).to(torch.uint8)
    for image, ours in zip(images, found):
        pil = getattr(ImageOps, name)(Image.fromarray(image.permute(1, 2, 0).numpy()))
        assert np.abs(np.asarray(pil).astype(int) - ours.permute(1, 2, 0).numpy()).max() <= 1


def test_solarize_posterize_and_none_follow_their_levels():
    images, kind = pixels(4), torch.tensor([2.0, 4.0, -1.0, -1.0])
    out = groups.operate(images, kind, torch.tensor([0.26, 0.25, 0.3, 0.3]), torch.ones(4))
    assert torch.equal(out[0], images[0] & 0b11100000)  # 4 - int(1.04) = 3 bits
    assert torch.equal(out[1], torch.where(images[1] >= 192, 255 - images[1], images[1]))
    assert torch.equal(out[2:], images[2:])


def test_translation_moves_whole_pixels_with_black_behind():
    images = pixels(1)
    out = groups.operate(images, torch.tensor([7.0]), torch.tensor([0.3]), torch.ones(1))
    assert torch.equal(out[..., :-3], images[..., 3:]) and (out[..., -3:] == 0).all()  # trunc(0.3 * 32 / 3) = 3


def test_augmix_depends_on_the_generator_alone():
    one, two, other = (groups.augmix(pixels(), torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other) and one.dtype == torch.uint8
