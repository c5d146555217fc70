"""Pixel sampling is the permutation that Eqs. (1)-(2) describe, in every mode and both vectorisations."""

import numpy as np
import pytest
import torch

from pixel_sampling import sampling
from pixel_sampling.sampling import FORMS, MODES, sample_pixels

CASES = [(mode, form) for mode in MODES for form in FORMS]


def batch(seed=0, size=(6, 3, 12, 8), dtype=torch.float32):
    """Images with distinct values everywhere, and parts in which image 2 lacks class 3 and image 4 both classes."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randperm(int(np.prod(size)), generator=g).to(dtype).view(size)
    parts = torch.randint(0, 6, (size[0], *size[2:]), generator=g)
    parts[2][parts[2] == 3] = 1
    parts[4][(parts[4] == 2) | (parts[4] == 3)] = 0
    return values, parts.to(torch.uint8)


def draws(seed=7):
    return torch.Generator().manual_seed(seed)


def naive(images, parts, generator, classes=(2, 3), flat=False):
    """Eqs. (1)-(2) word for word: a bank, filled image by image of the shuffled batch, empties into the batch."""
    images, parts, out = images.numpy(), parts.numpy(), images.numpy().copy()
    batch, channels, height, width = images.shape
    for part in classes:
        bank = []
        order = torch.randperm(batch, generator=generator).tolist()

        def places(i):
            if flat:
                return [
                    (c, y, x)
                    for c in range(channels)
                    for y in range(height)
                    for x in range(width)
                    if parts[i, y, x] == part
                ]
            return [(slice(None), y, x) for y in range(height) for x in range(width) if parts[i, y, x] == part]

        for i in order:
            bank += [images[(i, *place)].copy() for place in places(i)]
        bank = iter(bank)
        for i in range(batch):
            for place in places(i):
                out[(i, *place)] = next(bank)
        assert next(bank, None) is None  # every bank pixel is used exactly once
    return torch.from_numpy(out)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_eq1_eq2_equal_the_loop_over_images(form, flat, seed):
    images, parts = batch(seed)
    got = sample_pixels(images, parts, draws(seed), mode="flat" if flat else "vector", form=form)
    assert torch.equal(got, naive(images, parts, draws(seed), flat=flat))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_both_vectorisations_agree_for_every_memory_layout(mode, layout):
    images, parts = batch(3)
    images = images.contiguous(memory_format=layout)
    one, two = (sample_pixels(images, parts, draws(), mode=mode, form=form) for form in FORMS)
    assert torch.equal(one, two)
    assert not torch.equal(one, images)


@pytest.mark.parametrize("mode, form", CASES)
def test_the_operation_permutes_values_within_the_batch(mode, form):
    images, parts = batch(1)
    got = sample_pixels(images, parts, draws(), mode=mode, form=form)
    assert torch.equal(got.flatten().sort().values, images.flatten().sort().values)
    for part in (2, 3):  # and within each class
        where = (parts == part)[:, None].expand_as(images)
        assert torch.equal(got[where].sort().values, images[where].sort().values)


@pytest.mark.parametrize("mode, form", [case for case in CASES if case[0] != "flat"])
def test_vectors_stay_whole_so_every_channel_keeps_its_histogram(mode, form):
    images, parts = batch(2)
    got = sample_pixels(images, parts, draws(), mode=mode, form=form)
    before = {tuple(v) for v in images.permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    assert {tuple(v) for v in got.permute(0, 2, 3, 1).reshape(-1, 3).tolist()} == before
    for channel in range(3):
        assert torch.equal(got[:, channel].flatten().sort().values, images[:, channel].flatten().sort().values)


def test_flat_mode_moves_values_between_channels():
    images, parts = batch(2)
    got = sample_pixels(images, parts, draws(), mode="flat")
    assert not torch.equal(got[:, 0].flatten().sort().values, images[:, 0].flatten().sort().values)


@pytest.mark.parametrize("mode, form", CASES)
def test_other_parts_and_images_without_clothes_stay(mode, form):
    images, parts = batch(0)
    got = sample_pixels(images, parts, draws(), mode=mode, form=form)
    keep = ((parts != 2) & (parts != 3))[:, None].expand_as(images)
    assert torch.equal(got[keep], images[keep])
    assert torch.equal(got[4], images[4])


@pytest.mark.parametrize("mode, form", CASES)
def test_class_absent_from_the_batch_is_a_no_op(mode, form):
    images, parts = batch(0)
    parts[(parts == 2) | (parts == 3)] = 5
    assert torch.equal(sample_pixels(images, parts, draws(), mode=mode, form=form), images)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["vector", "random"])
def test_it_commutes_with_normalisation_per_channel_and_flat_does_not(mode, form):
    images, parts = batch(5)
    mean, std = torch.tensor([1.0, 2.0, 3.0])[:, None, None], torch.tensor([2.0, 4.0, 8.0])[:, None, None]

    def apart(mode):
        first = sample_pixels((images - mean) / std, parts, draws(), mode=mode, form=form)
        return (first - (sample_pixels(images, parts, draws(), mode=mode, form=form) - mean) / std).abs().max()

    assert apart(mode) == 0
    assert apart("flat") > 0


@pytest.mark.parametrize("form", FORMS)
def test_random_mode_differs_from_vector_only_in_the_order_of_the_bank(form):
    images, parts = batch(4)
    vector = sample_pixels(images, parts, draws(), classes=(2,), form=form)
    random = sample_pixels(images, parts, draws(), classes=(2,), mode="random", form=form)
    assert not torch.equal(vector, random)
    place = (parts == 2)[:, None].expand_as(images)
    assert torch.equal(vector[place].sort().values, random[place].sort().values)


def test_upper_and_pants_are_shuffled_apart_and_from_the_unchanged_images():
    images, parts = batch(6)
    g = draws(9)
    both = sample_pixels(images, parts, g)
    g = draws(9)
    upper = sample_pixels(images, parts, g, classes=(2,))
    pants = sample_pixels(images, parts, g, classes=(3,))
    assert torch.equal(
        both, torch.where((parts == 2)[:, None], upper, torch.where((parts == 3)[:, None], pants, images))
    )


def test_same_generator_state_gives_the_same_images_and_leaves_the_input_alone():
    images, parts = batch(8)
    copy = images.clone()
    one, two = (sample_pixels(images, parts, draws(1)) for _ in range(2))
    assert torch.equal(one, two) and torch.equal(images, copy)
    assert not torch.equal(one, sample_pixels(images, parts, draws(2)))


def test_no_gradient_flows_and_uint8_and_one_image_work():
    images, parts = batch(0)
    assert not sample_pixels(images.requires_grad_(True), parts, draws()).requires_grad
    tiny = torch.randint(0, 256, (1, 3, 5, 4), dtype=torch.uint8)
    labels = torch.full((1, 1, 5, 4), 2, dtype=torch.uint8)
    assert torch.equal(sample_pixels(tiny, labels, draws()), tiny)  # its own bank in its own order


def test_about_two_donors_fill_a_garment():
    """The raster stream of a garment flows on into the next silhouette, so a target has about two donors."""
    g = torch.Generator().manual_seed(0)
    parts = torch.zeros(32, 32, 16, dtype=torch.uint8)
    for i in range(32):
        top, height, width = (
            int(torch.randint(low, high, (1,), generator=g)) for low, high in ((4, 8), (10, 18), (6, 12))
        )
        parts[i, top : top + height, :width] = 2
    images = torch.arange(32.0)[:, None, None, None].expand(32, 3, 32, 16)
    got = sample_pixels(images, parts, draws(), classes=(2,))
    donors = [len(got[i, 0][parts[i] == 2].unique()) for i in range(32)]
    assert 1.5 < np.mean(donors) < 2.6


@pytest.mark.parametrize(
    "shape, mode, form, message",
    [
        ((5, 12, 8), "vector", None, "need parts"),
        ((6, 8, 12), "vector", None, "need parts"),
        ((6, 12, 8), "hue", None, "known are"),
        ((6, 12, 8), "flat", "loop", "known are"),
    ],
)
def test_wrong_arguments_are_named(shape, mode, form, message):
    with pytest.raises(ValueError, match=message):
        sample_pixels(batch()[0], torch.zeros(shape, dtype=torch.uint8), draws(), mode=mode, form=form)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode, form", CASES)
def test_gpu_gives_the_cpus_pixels_without_a_host_sync(mode, form):
    images, parts = batch(1)
    expected = sample_pixels(images, parts, draws(), mode=mode)
    there = images.cuda(), parts.cuda()
    torch.cuda.set_sync_debug_mode("error" if form == "fixed" else "default")
    try:
        got = sample_pixels(*there, draws(), mode=mode, form=form)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.cpu(), expected)


def test_the_default_form_is_the_fast_one_of_the_device():
    images, parts = batch(1)
    seen = []
    original = dict(sampling.SOURCES)
    try:
        sampling.SOURCES["boolean"] = lambda *a: seen.append("boolean") or original["boolean"](*a)
        sample_pixels(images, parts, draws())
    finally:
        sampling.SOURCES.update(original)
    assert seen == ["boolean", "boolean"]
