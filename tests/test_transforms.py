"""Augmentation: each primitive equals PIL or torchvision for the same parameters; draws have their distributions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps
from scipy import stats
from torchvision import transforms as classic

from common import colour
from common import transforms as T

H, W = 32, 16


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(batch: int = 12, height: int = H, width: int = W, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator(seed))


def pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_normalize_equals_torchvision_for_bytes_and_floats():
    images = random_images()
    expected = torch.stack(
        [classic.Normalize(T.IMAGENET_MEAN, T.IMAGENET_STD)(classic.ToTensor()(pil(image))) for image in images]
    )
    assert T.normalize(images).dtype == torch.float32
    torch.testing.assert_close(T.normalize(images), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(T.normalize(images.float() / 255), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("pad", [1, 10])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_flip_and_pad_crop_equal_pil_for_the_same_parameters(pad, kind):
    images = random_images(40)
    flags = torch.rand(40, generator=generator()) < 0.5
    top, left = torch.randint(0, 2 * pad + 1, (2, 40), generator=generator())
    got = T.pad_crop(images.to(kind), top, left, pad, flags)
    assert got.dtype == kind
    assert torch.equal(got, T.pad_crop(T.flip(images.to(kind), flags), top, left, pad))
    for image, flag, y, x, out in zip(images, flags, top.tolist(), left.tolist(), got):
        expected = ImageOps.mirror(pil(image)) if flag else pil(image)
        expected = ImageOps.expand(expected, pad).crop((x, y, x + W, y + H))
        assert torch.equal(tensor(expected), out.to(torch.uint8))


@pytest.mark.parametrize(
    "name, resample", [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)]
)
def test_resized_crop_equals_pil_for_the_same_boxes(name, resample):
    images = random_images(40, 40, 24)
    boxes = T.draw_crops(40, 40, 24, generator(), (0.05, 1.0), (0.3, 2.0))
    got = T.resized_crop(images, boxes, name)
    different = 0
    for image, (top, left, height, width), out in zip(images, boxes.tolist(), got):
        expected = tensor(pil(image).crop((left, top, left + width, top + height)).resize((24, 40), resample))
        difference = (out.int() - expected.int()).abs()
        assert difference.max() <= 1
        different += int((difference > 0).sum())
    assert different <= 0.03 * got.numel()  # sums that lie exactly between two grey levels


def test_nearest_crop_takes_the_pixel_below_each_centre_as_pil_does():
    images = random_images(40, 40, 24)
    boxes = T.draw_crops(40, 40, 24, generator(), (0.05, 1.0), (0.3, 2.0))
    got = T.resized_crop(images, boxes, "nearest")
    same = 0
    for image, (top, left, height, width), out in zip(images, boxes.tolist(), got):
        rows = [top + int(Fraction(2 * i + 1, 2) * height / 40) for i in range(40)]
        columns = [left + int(Fraction(2 * i + 1, 2) * width / 24) for i in range(24)]
        assert torch.equal(out, image[:, rows][:, :, columns])
        box = left, top, left + width, top + height
        expected = tensor(pil(image).crop(box).resize((24, 40), Image.Resampling.NEAREST))
        same += int((expected == out).sum())
    assert same > 0.97 * got.numel()  # PIL adds up steps in floating point and misses some centres on a border


@pytest.mark.parametrize("height, pad", [(32, 1), (64, 2), (255, 9), (256, 10), (288, 10), (384, 10)])
def test_a_small_image_is_moved_by_a_small_share_of_it(height, pad):
    drawn = T.draw_geometry((400, 3, height, height // 2), generator())
    assert drawn.pad == pad and int(drawn.top.max()) == int(drawn.left.max()) == 2 * pad
    assert T.draw_geometry((4, 3, height, 8), generator(), pad=0).top is None


@pytest.mark.parametrize("pad", [1, 10, 40])
def test_gpu_forms_of_crop_and_erasing_equal_those_of_the_cpu(pad):
    images = random_images(40)
    flags = torch.rand(40, generator=generator()) < 0.5
    top, left = torch.randint(0, 2 * pad + 1, (2, 40), generator=generator())
    expected = T.crop_by_slices(images, top, left, pad, flags)
    assert torch.equal(T.crop_by_index(images, top, left, pad, flags), expected)
    boxes, values = T.draw_erasing(40, H, W, generator(), 0.7), torch.randn(40, 3, H, W, generator=generator())
    masked, sliced = (write(expected.float(), boxes, values) for write in (T.overwrite_by_mask, T.overwrite_by_slices))
    assert torch.equal(masked, sliced) and not torch.equal(masked, expected.float())


def test_erase_overwrites_exactly_the_box_with_the_fill():
    images = torch.randn(3, 3, H, W, generator=generator())
    boxes = torch.tensor([[2, 3, 10, 5], [0, 0, 0, 0], [30, 15, 2, 1]])
    expected = images.clone()
    for image, (top, left, height, width) in zip(expected, boxes.tolist()):
        image[:, top : top + height, left : left + width] = torch.tensor(T.IMAGENET_MEAN)[:, None, None]
    assert torch.equal(T.erase(images.clone(), boxes, T.IMAGENET_MEAN), expected)
    noise = T.erase(images.clone(), boxes, "random", generator(1))
    assert torch.equal(noise[1], images[1]) and (noise[0, :, 2:12, 3:8] != images[0, :, 2:12, 3:8]).all()


@pytest.mark.parametrize(
    "step, oracle, low, high",
    [
        (colour.adjust_brightness, TF.adjust_brightness, 0, 2),
        (colour.adjust_contrast, TF.adjust_contrast, 0, 2),
        (colour.adjust_saturation, TF.adjust_saturation, 0, 2),
        (colour.adjust_hue, TF.adjust_hue, -0.5, 0.5),
    ],
)
def test_colour_steps_equal_torchvision(step, oracle, low, high):
    images = random_images(16).float() / 255
    images[0] = 0.5  # no chroma
    images[1] = 0.0
    factors = low + (high - low) * torch.rand(16, generator=generator())
    expected = torch.stack([oracle(image, factor) for image, factor in zip(images, factors.tolist())])
    torch.testing.assert_close(step(images, factors), expected, atol=2e-5, rtol=0)


def test_color_jitter_applies_each_images_own_order():
    images = random_images(30).float() / 255
    factors, order = T.draw_jitter(30, generator(), (0.4, 0.4, 0.4, 0.1), 1.0)
    oracles = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    got = colour.color_jitter(images, factors, order)
    for image, factor, steps, out in zip(images, factors.tolist(), order.tolist(), got):
        for number in steps:
            image = oracles[number](image, factor[number])
        torch.testing.assert_close(out, image, atol=5e-5, rtol=0)
    assert len({tuple(row) for row in order.tolist()}) > 10
    kept, _ = T.draw_jitter(30, generator(), (0.4, 0.4, 0.4, 0.1), 0.0)
    torch.testing.assert_close(colour.color_jitter(images, kept, order), images, atol=1e-5, rtol=0)


def test_grayscale_and_blur_equal_torchvision():
    images = random_images(8).float() / 255
    flags = torch.arange(8) % 2 == 0
    got = colour.grayscale(images, flags)
    torch.testing.assert_close(got[::2], TF.rgb_to_grayscale(images[::2], 3), atol=1e-6, rtol=0)
    assert torch.equal(got[1::2], images[1::2])
    sigma = torch.linspace(0.1, 2, 8)
    expected = torch.stack([TF.gaussian_blur(image, [11, 11], [s, s]) for image, s in zip(images, sigma.tolist())])
    torch.testing.assert_close(colour.gaussian_blur(images, sigma), expected, atol=1e-5, rtol=0)


def test_flip_rate_and_crop_offsets_are_uniform():
    geometry = T.draw_geometry((21000, 3, H, W), generator(), 0.3, 10)
    assert abs(geometry.flags.float().mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 21000)
    for offsets in (geometry.top, geometry.left):
        assert stats.chisquare(torch.bincount(offsets, minlength=21).numpy()).pvalue > 1e-3
    table = torch.bincount(geometry.top * 21 + geometry.left, minlength=441)
    assert stats.chisquare(table.numpy()).pvalue > 1e-3  # rows and columns independent


@pytest.mark.parametrize("height, width", [(256, 128), (24, 20)])
def test_erasing_boxes_follow_torchvisions_distribution(height, width):
    number = 4000
    boxes = T.draw_erasing(number, height, width, generator(), 1.0).double().numpy()
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    params = np.array(
        [classic.RandomErasing.get_params(image, (0.02, 0.4), (0.3, 10 / 3), [0.0])[:4] for _ in range(number)],
        dtype=np.float64,
    )
    kept, wanted = boxes[boxes[:, 2] > 0], params[params[:, 2] < height]
    assert abs(len(kept) - len(wanted)) <= 4 * math.sqrt(number * 0.01) + 1

    def features(b):
        room = np.maximum(height - b[:, 2], 1), np.maximum(width - b[:, 3], 1)
        return {
            "area": b[:, 2] * b[:, 3],
            "ratio": b[:, 2] / b[:, 3],
            "top": b[:, 0],
            "left": b[:, 1],
            "relative top": b[:, 0] / room[0],
            "relative left": b[:, 1] / room[1],
        }

    for (name, ours), theirs in zip(features(kept).items(), features(wanted).values()):
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-3, name


def test_erasing_that_seldom_fits_gives_up_after_ten_attempts_like_a_loop():
    area, ratio, size, number = (0.5, 0.9), (0.05, 20.0), (16, 16), 6000
    rng = np.random.default_rng(0)

    def loop() -> bool:
        for _ in range(10):
            share = rng.uniform(*area) * 256
            aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
            if round(math.sqrt(share * aspect)) < size[0] and round(math.sqrt(share / aspect)) < size[1]:
                return True
        return False

    expected = sum(loop() for _ in range(number)) / number
    got = (T.draw_erasing(number, *size, generator(), 1.0, area, ratio)[:, 2] > 0).double().mean().item()
    assert 0.05 < expected < 0.95 and abs(got - expected) < 5 * math.sqrt(2 * expected * (1 - expected) / number)


def test_erasing_probability_and_uniform_law():
    boxes = T.draw_erasing(8000, 256, 128, generator(), 0.5)
    assert abs((boxes[:, 2] > 0).double().mean().item() - 0.5) < 4 * math.sqrt(0.25 / 8000)
    rng = np.random.default_rng(0)

    def loop() -> tuple[int, int]:
        while True:
            share, aspect = rng.uniform(0.02, 0.4) * 256 * 128, rng.uniform(0.3, 10 / 3)
            size = round(math.sqrt(share * aspect)), round(math.sqrt(share / aspect))
            if size[0] < 256 and size[1] < 128:
                return size

    expected = np.array([loop() for _ in range(4000)])
    got = T.draw_erasing(4000, 256, 128, generator(), 1.0, law="uniform").double().numpy()
    for column in (0, 1):
        assert stats.ks_2samp(got[:, 2 + column], expected[:, column]).pvalue > 1e-3


@pytest.mark.parametrize(
    "height, width, ratio", [(256, 128, (3 / 4, 4 / 3)), (32, 32, (0.5, 2.0)), (8, 40, (3 / 4, 4 / 3))]
)
def test_crops_follow_torchvisions_distribution(height, width, ratio):
    boxes = T.draw_crops(3000, height, width, generator(), (0.2, 1.0), ratio).double().numpy()
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    expected = np.array([classic.RandomResizedCrop.get_params(image, [0.2, 1.0], list(ratio)) for _ in range(3000)])
    for column in range(4):
        assert stats.ks_2samp(boxes[:, column], expected[:, column]).pvalue > 1e-3


def test_every_image_draws_its_own_parameters_and_the_generator_decides_them():
    images = random_images(1).expand(64, -1, -1, -1).contiguous()
    augment = T.Augment(jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=0.5, erase_fill="random")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = augment(images, generator(1)), augment(images, generator(1)), augment(images, generator(2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    assert len({row.numpy().tobytes() for row in first}) == 64
    assert torch.equal(images, random_images(1).expand(64, -1, -1, -1))  # the input is left as it is


def test_batches_still_held_keep_their_values_when_memory_is_used_again():
    images, other = random_images(seed=1), random_images(seed=2)
    augment = T.Augment()
    expected = augment(images, generator()).clone()
    held = [keep(augment(images, generator())) for keep in (lambda x: x[3:5], torch.flatten, torch.Tensor.numpy)]
    for _ in range(4):
        augment(other, generator())
        T.normalize(other)
    assert torch.equal(held[0], expected[3:5]) and torch.equal(held[1], expected.view(-1))
    assert np.array_equal(held[2], expected.numpy())
    weight = torch.ones(3, requires_grad=True)
    loss = (T.normalize(images) * weight[:, None, None]).sum()  # only autograd holds the batch
    T.normalize(other)
    loss.backward()
    torch.testing.assert_close(weight.grad, T.normalize(images).sum((0, 2, 3)))


def test_first_images_do_not_depend_on_what_else_is_in_the_batch():
    images = random_images(20)
    other = torch.cat([images[:10], random_images(10, seed=9)])
    augment = T.Augment(jitter=(0.4, 0.4, 0.4, 0.1), crop_scale=(0.3, 1.0), pad=0)
    assert torch.equal(augment(images, generator())[:10], augment(other, generator())[:10])


@pytest.mark.parametrize("options", [dict(), dict(pad=0, crop_scale=(0.2, 1.0)), dict(pad=4, crop_scale=(0.5, 1.0))])
def test_label_maps_move_with_the_images(options):
    labels = torch.randint(0, 6, (16, 1, H // 4, W // 4), generator=generator(), dtype=torch.uint8)
    labels = labels.repeat_interleave(4, 2).repeat_interleave(4, 3)  # blocks of colour; 0 is black like the padding
    colours = torch.tensor([[0, 0, 0], [250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0], [0, 250, 250]])
    images = colours[labels[:, 0].long()].permute(0, 3, 1, 2).to(torch.uint8).contiguous()
    augment = T.Augment(erase=0.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="nearest", **options)
    moved, maps = augment(images, generator(), labels)
    assert maps.dtype == torch.uint8 and maps.shape == labels.shape
    assert torch.equal((moved * 255).round().long(), colours[maps[:, 0].long()].permute(0, 3, 1, 2))
    assert not torch.equal(maps, labels)
    smooth, same = T.Augment(**{**augment.options, "interpolation": "bilinear"})(images, generator(), labels)
    assert torch.equal(same, maps)
    nearest = (smooth.mul(255)[:, None] - colours[None, :, :, None, None]).abs().sum(2).argmin(1)
    assert (nearest == maps[:, 0]).float().mean() > 0.75  # only borders of blocks mix


def test_the_lineages_list_equals_pil_given_the_same_draws():
    images = random_images(32, 64, 32)
    got = T.Augment()(images, generator())
    same = generator()
    geometry = T.draw_geometry(images.shape, same)
    boxes = T.draw_erasing(32, 64, 32, same)
    to_tensor = classic.Compose([classic.ToTensor(), classic.Normalize(T.IMAGENET_MEAN, T.IMAGENET_STD)])
    for i, image in enumerate(images):
        image = ImageOps.mirror(pil(image)) if geometry.flags[i] else pil(image)
        y, x = int(geometry.top[i]), int(geometry.left[i])
        expected = to_tensor(ImageOps.expand(image, geometry.pad).crop((x, y, x + 32, y + 64)))
        top, left, height, width = boxes[i].tolist()
        expected[:, top : top + height, left : left + width] = torch.tensor(T.IMAGENET_MEAN)[:, None, None]
        torch.testing.assert_close(got[i], expected, atol=2e-6, rtol=0)


def test_augment_prints_its_options_and_refuses_wrong_input():
    augment = T.Augment(pad=4, channels_last=True)
    assert "pad=4" in repr(augment) and eval(repr(augment), {"Augment": T.Augment}).options == augment.options
    out = augment(random_images(), generator())
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="expected uint8 images on the generator's device cpu, got torch.float32"):
        augment(random_images().float(), generator())
    for options, words in ((dict(flip=1.5), "flip is 1.5"), (dict(erase_law="normal"), "'normal' is not one of")):
        with pytest.raises(ValueError, match=words):
            T.Augment(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_augmentation_never_waits_for_the_gpu():
    images = random_images(16).cuda()
    augment = T.Augment(jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=0.5, crop_scale=(0.5, 1.0), channels_last=True)
    random = torch.Generator("cuda").manual_seed(0)
    augment(images, random)  # makes the constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(images, random)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_the_pixels_of_the_cpu_for_the_same_parameters():
    images = random_images(16)
    geometry = T.draw_geometry(images.shape, generator(), crop_scale=(0.3, 1.0))
    moved = T.Geometry(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in geometry))
    difference = moved.apply(images.cuda()).cpu().int() - geometry.apply(images).int()
    assert difference.abs().max() <= 1
    crop = geometry._replace(boxes=None).apply(images)
    assert torch.equal(moved._replace(boxes=None).apply(images.cuda()).cpu(), crop)
