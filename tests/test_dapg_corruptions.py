"""The noise library: spec of each corruption on the CPU, and the batched device version against it."""

import cv2
import numpy as np
import pytest
import torch

from dapg.noise import corruptions, device_corruptions, frost

SEVERITIES = (1, 2, 3, 4, 5)
EXACT = ("brightness", "contrast", "pixelate", "jpeg_compression")
ROUNDED = ("defocus_blur", "zoom_blur")
# Not monotone in imagecorruptions either: severity 2 of glass is milder than 1, and so on.
LOOSE = {"glass_blur", "frost", "fog", "snow", "saturate"}


def people(count=4, height=128, width=64):
    """Smooth pictures with edges and texture, a stand-in for crops of people."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    out = []
    for _ in range(count):
        picture = np.full((height, width, 3), rng.integers(60, 190, 3), np.float64)
        for _ in range(6):
            top, left = rng.integers(0, height - 16), rng.integers(0, width - 10)
            picture[top : top + rng.integers(12, 60), left : left + rng.integers(6, 30)] = rng.integers(10, 245, 3)
        picture += (12 * np.sin(rows / 3) * np.cos(columns / 2))[..., None]
        out.append(cv2.GaussianBlur(picture.clip(0, 255).astype(np.uint8), (3, 3), 0.6))
    return np.stack(out)


IMAGES = people()


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


def on_device(images, name, severity, seed=0):
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    kind = device_corruptions.TYPES.index(name)
    out = device_corruptions.corrupt(
        batch, np.full(len(batch), kind), np.full(len(batch), severity), torch.Generator().manual_seed(seed)
    )
    return out.permute(0, 2, 3, 1).numpy()


def test_there_are_15_training_and_20_benchmark_types():
    assert (len(corruptions.TRAIN15), len(corruptions.BENCH20)) == (15, 20)
    assert set(corruptions.BENCH20) == {*corruptions.TRAIN15, *corruptions.EXTRA4, "rain"}
    assert device_corruptions.TYPES == corruptions.TRAIN15


@pytest.mark.parametrize("name", corruptions.BENCH20)
def test_shape_type_and_determinism(name):
    for height, width in ((128, 64), (32, 32), (77, 51)):
        image = people(1, height, width)[0]
        before = image.copy()
        for severity in (1, 5):
            one, two = (corruptions.corrupt(image, name, severity, np.random.default_rng(3)) for _ in range(2))
            assert one.shape == image.shape and one.dtype == np.uint8 and np.array_equal(one, two)
        assert np.array_equal(image, before)


@pytest.mark.parametrize("name", corruptions.BENCH20)
def test_psnr_falls_with_severity(name):
    values = [
        np.mean(
            [
                psnr(im, corruptions.corrupt(im, name, s, np.random.default_rng([i, s, k])))
                for i, im in enumerate(IMAGES)
                for k in range(3)
            ]
        )
        for s in SEVERITIES
    ]
    if name not in LOOSE:
        assert values[-1] < values[0] and all(b < a + 0.5 for a, b in zip(values, values[1:])), values
    if name in ("snow", "glass_blur", "saturate"):
        assert values[-1] < values[0], values


@pytest.mark.parametrize("name", corruptions.BENCH20)
def test_constant_images_survive(name):
    for value in (0, 128, 255):
        image = np.full((64, 48, 3), value, np.uint8)
        for severity in SEVERITIES:
            out = corruptions.corrupt(image, name, severity, np.random.default_rng(0))
            if name in ("contrast", "pixelate", "zoom_blur", "gaussian_blur", "glass_blur", "motion_blur"):
                assert np.array_equal(out, image)
        if name in device_corruptions.TYPES:
            out = on_device(image[None], name, 5)
            assert np.isfinite(out).all() and out.dtype == np.uint8


def test_wrong_input_is_named():
    image = IMAGES[0]
    for arguments, words in (
        ((image, "sleet", 1), "unknown corruption"),
        ((image, "fog", 6), "1..5"),
        ((image[:20], "fog", 1), "32 x 32"),
        ((image.astype(float), "fog", 1), "uint8"),
    ):
        with pytest.raises(ValueError, match=words):
            corruptions.corrupt(*arguments, np.random.default_rng(0))


@pytest.mark.parametrize("radius, sigma", corruptions.MOTION)
def test_motion_kernel_sums_to_one_and_is_one_sided(radius, sigma):
    for angle in (-45, -10.5, 0, 33, 45):
        kernel = corruptions.motion_kernel(radius, sigma, angle)
        assert abs(kernel.sum() - 1) < 1e-5
        assert kernel[:, : 2 * radius].sum() == 0  # cos > 0: everything lies to one side
        ours = device_corruptions.line_kernels(
            torch.tensor([float(radius)]), torch.tensor([float(sigma)]), torch.tensor([float(angle)]), radius
        )[0].numpy()
        assert np.abs(ours - kernel).max() < 1e-5


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_rate_is_right_for_every_channel(severity):
    image = np.full((256, 128, 3), 100, np.uint8)
    share = corruptions.IMPULSE_SHARE[severity - 1]
    for out in (
        corruptions.corrupt(image, "impulse_noise", severity, np.random.default_rng(0)),
        on_device(image[None], "impulse_noise", severity)[0],
    ):
        n = 256 * 128
        for channel in range(3):
            for value in (0, 255):
                found = (out[..., channel] == value).sum()
                assert abs(found - n * share / 2) < 4 * np.sqrt(n * share / 2)
        mixed = ((out == 100).any(2) & (out != 100).any(2)).mean()
        assert mixed > share  # values, not pixels, are hit


def test_fog_map_spans_zero_to_one():
    for decay in (1.4, 2.0):
        field = corruptions.plasma(128, decay, np.random.default_rng(0))
        ours = device_corruptions.plasma(3, 128, torch.full((3,), decay), torch.Generator().manual_seed(0)).numpy()
        assert field.min() == 0 and field.max() == 1
        assert (ours.min((1, 2)) == 0).all() and (ours.max((1, 2)) == 1).all()


def test_frost_textures_have_the_photographs_statistics():
    for look, (mean, std, colour, _) in enumerate(frost.FROST_LOOKS):
        texture = frost.frost_texture(np.random.default_rng(look), look).astype(float)
        grey = texture.mean(2)
        gradient = np.hypot(*np.gradient(grey)).mean()
        assert abs(grey.mean() - mean) < 6 and abs(grey.std() - std) < 6
        assert abs(gradient - (5.9, 7.9, 10.1, 13.8)[look]) < 2.5
        assert np.abs(texture.mean((0, 1)) / grey.mean() - np.array(colour) / np.mean(colour)).max() < 0.05


@pytest.mark.parametrize("severity", SEVERITIES)
def test_glass_gather_has_the_loops_psnr(severity):
    values = []
    for exact in (False, True):
        pairs = [
            (im, corruptions.corrupt(im, "glass_blur", severity, np.random.default_rng([i, severity]), exact))
            for i, im in enumerate(people(2, 64, 48))
        ]
        values.append(np.mean([psnr(a, b) for a, b in pairs]))
    assert abs(values[0] - values[1]) < (1.3 if severity == 2 else 0.6)


# ---------------------------------------------------------------------------------------------------- device, batched
@pytest.mark.parametrize("name", EXACT)
def test_deterministic_device_versions_equal_the_oracle_to_the_bit(name):
    noise = np.random.default_rng(1).integers(0, 256, (2, 77, 51, 3)).astype(np.uint8)
    for images in (IMAGES, noise):
        for severity in SEVERITIES:
            want = np.stack([corruptions.corrupt(im, name, severity, np.random.default_rng(0)) for im in images])
            assert np.array_equal(on_device(images, name, severity), want)


@pytest.mark.parametrize("name", ROUNDED)
def test_deterministic_filters_differ_by_rounding_only(name):
    for severity in SEVERITIES:
        want = np.stack([corruptions.corrupt(im, name, severity, np.random.default_rng(0)) for im in IMAGES])
        found = on_device(IMAGES, name, severity)
        assert np.abs(found.astype(int) - want).max() <= 1 and (found != want).mean() < 0.01


@pytest.mark.parametrize("name", [n for n in corruptions.TRAIN15 if n not in EXACT + ROUNDED])
def test_random_device_versions_have_the_oracles_psnr(name):
    copies = 32 if name in ("frost", "fog", "snow") else 6
    images = np.concatenate([people(4, 96, 48)] * copies)
    for severity in SEVERITIES:
        want = [
            corruptions.corrupt(im, name, severity, np.random.default_rng([i, severity])) for i, im in enumerate(images)
        ]
        found = on_device(images, name, severity, seed=severity)
        gap = np.mean([psnr(a, b) for a, b in zip(images, found)]) - np.mean([psnr(a, b) for a, b in zip(images, want)])
        assert abs(gap) < 1.0, (severity, gap)


def test_a_batch_of_mixed_types_and_severities_is_the_sum_of_its_parts():
    images = torch.from_numpy(np.concatenate([IMAGES] * 4)).permute(0, 3, 1, 2).contiguous()
    types = np.array([10, 11, 13, 14, -1, 10, 11, 13] * 2)
    severities = np.array([1, 2, 3, 4, 5, 5, 4, 3] * 2)
    out = device_corruptions.corrupt(images, types, severities, torch.Generator().manual_seed(0))
    for i, (kind, severity) in enumerate(zip(types, severities)):
        image = images[i].permute(1, 2, 0).numpy()
        name = corruptions.TRAIN15[kind]
        want = image if kind < 0 else corruptions.corrupt(image, name, int(severity), np.random.default_rng(0))
        assert np.array_equal(out[i].permute(1, 2, 0).numpy(), want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_and_gpu_agree_where_deterministic():
    batch = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).contiguous()
    for name in EXACT + ROUNDED:
        kind = np.full(len(batch), device_corruptions.TYPES.index(name))
        for severity in SEVERITIES:
            levels = np.full(len(batch), severity)
            cpu = device_corruptions.corrupt(batch, kind, levels, torch.Generator())
            gpu = device_corruptions.corrupt(batch.cuda(), kind, levels, torch.Generator("cuda")).cpu()
            assert (cpu.int() - gpu.int()).abs().max() <= (0 if name in EXACT else 1)
