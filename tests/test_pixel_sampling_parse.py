"""SCHP: the official checkpoint's names and shapes, folded in-place ABN, the letterbox, the parse tool."""

import collections
import subprocess
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PYTHON, ROOT, child_environment, script
from PIL import Image
from torch import nn

from common.datasets import files
from pixel_sampling import parse, schp
from pixel_sampling.masks import LUT, palette

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return schp.SCHP().eval()


def official(net, **changes):
    """A file as the official one is: `state_dict` with `module.` names, without batch counters."""
    state = {f"module.{k}": v.clone() for k, v in schp.expected_keys(net).items()}
    state.update({f"module.{k}": v for k, v in changes.items()})
    return {"state_dict": {k: v for k, v in state.items() if v is not None}, "epoch": 149}


def test_names_counts_and_shapes_are_the_official_checkpoints(net):
    keys = schp.expected_keys(net)
    groups = collections.Counter("stem" if k[:4] in ("conv", "bn1.", "bn2.", "bn3.") else k.split(".")[0] for k in keys)
    assert groups == {
        "stem": 15,
        "layer1": 50,
        "layer2": 65,
        "layer3": 350,
        "layer4": 50,
        "context_encoding": 25,
        "decoder": 22,
        "edge": 19,
        "fushion": 7,
    }
    assert len(keys) == 603 and round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 66.7
    shapes = {
        "conv1.weight": (64, 3, 3, 3),
        "layer4.0.conv2.weight": (512, 512, 3, 3),
        "context_encoding.bottleneck.0.weight": (512, 4096, 3, 3),
        "decoder.conv3.0.weight": (256, 304, 1, 1),
        "decoder.conv4.weight": (18, 256, 1, 1),
        "edge.conv5.weight": (2, 6, 1, 1),
        "fushion.3.weight": (18, 256, 1, 1),
        "context_encoding.stages.3.2.running_var": (512,),
        "layer1.0.downsample.1.bias": (256,),
        "edge.conv4.weight": (2, 256, 3, 3),
        "decoder.conv3.3.weight": (256,),
        "fushion.1.running_mean": (256,),
    }
    assert {k: tuple(keys[k].shape) for k in shapes} == shapes


def test_outputs_are_a_quarter_of_the_input(net):
    with torch.no_grad():
        out = net(torch.randn(2, 3, 64, 64))
    assert [tuple(x.shape) for x in out] == [(2, 18, 16, 16), (2, 18, 16, 16), (2, 2, 16, 16)]
    assert (
        net.layer4[0].conv2.dilation == (2, 2)
        and net.layer4[0].conv2.stride == (1, 1)
        and net.layer2[0].conv2.stride == (2, 2)
    )


def test_folded_batch_norm_equals_in_place_abn_with_negative_weights():
    g = torch.Generator().manual_seed(0)
    x, w, b = torch.randn(4, 6, 5, 5, generator=g), torch.randn(6, generator=g), torch.randn(6, generator=g)
    mean, var = torch.randn(6, generator=g), torch.rand(6, generator=g) + 0.1
    assert (w < 0).any()
    for module, slope in ((schp.norm(6), 1.0), (schp.Activated(6), 0.01)):
        with torch.no_grad():
            for name, value in (("weight", w), ("bias", b), ("running_mean", mean), ("running_var", var)):
                getattr(module, name).copy_(value)
        schp.fold_weights(module)
        v = [t[:, None, None] for t in (mean, var, w, b)]
        y = (x - v[0]) / torch.sqrt(v[1] + 1e-5) * (v[2].abs() + 1e-5) + v[3]
        assert torch.allclose(module.eval()(x), torch.where(y > 0, y, slope * y), atol=1e-5)


def test_every_norm_of_the_network_is_folded_once_on_loading(net, tmp_path):
    weight = -torch.rand(64) - 0.5
    torch.save(official(net, **{"bn1.weight": weight}), tmp_path / "atr.pth")
    other = schp.SCHP()
    assert schp.load_official(other, tmp_path / "atr.pth") == 603
    assert torch.allclose(other.bn1.weight, weight.abs() + 1e-5)
    for (name, a), b in zip(net.named_modules(), other.modules()):
        if isinstance(a, nn.BatchNorm2d) and name != "bn1":
            assert torch.allclose(b.weight, a.weight.abs() + 1e-5), name
        if isinstance(a, nn.Conv2d):
            assert torch.equal(a.weight, b.weight), name


def test_wrong_checkpoints_are_refused_by_name(net, tmp_path):
    class Code:
        def __reduce__(self):
            return (print, ("this must not run",))

    cases = {
        "cut.pth": ("parser: .*not a readable checkpoint", b"PK\x03\x04 cut"),
        "code.pth": ("parser: .*not a readable checkpoint", {"state_dict": {}, "x": Code()}),
        "bare.pth": ("no `state_dict`", {"conv1.weight": torch.zeros(1)}),
        "lip.pth": ("20 labels, ATR has 18", official(net, **{"fushion.3.weight": torch.zeros(20, 256, 1, 1)})),
        "missing.pth": ("1 missing: conv1.weight", official(net, **{"conv1.weight": None})),
    }
    for name, (message, content) in cases.items():
        (tmp_path / name).write_bytes(content) if isinstance(content, bytes) else torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            schp.load_official(net, tmp_path / name)
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match="parser: no file .*gone.pth; get exp-schp"):
        schp.load_official(net, tmp_path / "gone.pth")


@pytest.mark.parametrize("height, width", [(200, 81), (33, 90), (512, 512), (700, 300), (2, 1)])
def test_letterbox_puts_pixels_where_the_spec_says(height, width):
    """(x, y) -> 255.5 + s (x - (w-1)/2): the grid, read backwards, is that map at every output pixel."""
    grid = schp.letterbox_grid(height, width)[0].double()
    s = 511 / max(width - 1, height - 1)
    for v in (0, 100, 255, 511):
        for u in (0, 77, 511):
            x, y = (grid[v, u, 0] + 1) / 2 * (width - 1), (grid[v, u, 1] + 1) / 2 * (height - 1)
            if width > 1:
                assert 255.5 + s * (x - (width - 1) / 2) == pytest.approx(u, abs=2e-3 * s + 1e-3)
            assert 255.5 + s * (y - (height - 1) / 2) == pytest.approx(v, abs=2e-3 * s + 1e-3)


@pytest.mark.parametrize("height, width", [(64, 40), (40, 64), (150, 57)])
def test_letterbox_round_trip_keeps_labels(height, width):
    rows, columns = torch.arange(height) * 3 // height, torch.arange(width) * 2 // width
    labels = rows[:, None] * 2 + columns[None]
    hot = F.one_hot(labels, 6).permute(2, 0, 1).float()
    boxed = F.grid_sample(hot[None], schp.letterbox_grid(height, width), mode="nearest", align_corners=True)[0]
    assert (schp.labels_at(boxed, height, width) == labels).float().mean() > 0.99


def test_input_is_bgr_normalised_and_black_outside():
    image = torch.zeros(3, 100, 40, dtype=torch.uint8)
    image[0], image[2] = 255, 51
    x = schp.letterbox(image)
    expected = [(0.2 - 0.406) / 0.225, (0 - 0.456) / 0.224, (1 - 0.485) / 0.229]
    assert torch.allclose(x[:, 256, 256], torch.tensor(expected), atol=1e-5)
    assert torch.allclose(x[:, 256, 0], torch.tensor([-0.406 / 0.225, -0.456 / 0.224, -0.485 / 0.229]), atol=1e-5)


def test_parse_tool_runs_on_odd_sizes_resumes_and_names_broken_images(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"a.jpg": (31, 77), "deep/b.png": (90, 13), "deep/c.bmp": (1, 5), "wide.png": (2000, 3)}
    for name, size in sizes.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(tmp_path / "in" / name)
    command = [
        "-m", "pixel_sampling.parse", "--root", tmp_path / "in", "--ckpt", "none", "--out", tmp_path / "out",
        "--size", "64", "--overlays", "4"
    ]  # fmt: skip
    done = script(*command)
    assert done.returncode == 0, done.stderr
    for name, size in sizes.items():
        mask = Image.open((tmp_path / "out" / name).with_suffix(".png"))
        assert mask.mode == "P" and mask.size == size and np.array(mask).max() < 6
        assert mask.getpalette()[:18] == palette(6).ravel().tolist()
    assert (
        "4 images" in done.stdout
        and "per cent of pixels" in done.stdout
        and max(Image.open(tmp_path / "out" / "overlays.png").size) < 3000
    )
    kept = (tmp_path / "out" / "a.png").stat().st_mtime_ns
    (tmp_path / "out" / "deep" / "b.png").unlink()
    (tmp_path / "in" / "cut.jpg").write_bytes((tmp_path / "in" / "a.jpg").read_bytes()[:200])
    again = script(*command)
    assert (
        again.returncode == 1
        and "cut.jpg: cannot be decoded" in again.stderr
        and "error: 1 of 2 images" in again.stderr
    )
    assert "5 images" in again.stdout and "3 have a mask" in again.stdout
    assert (tmp_path / "out" / "a.png").stat().st_mtime_ns == kept and (tmp_path / "out" / "deep" / "b.png").is_file()


@pytest.mark.slow
def test_a_killed_parse_leaves_whole_masks_and_continues_to_those_of_a_quiet_run(tmp_path):
    rng = np.random.default_rng(1)
    (tmp_path / "in").mkdir()
    for i in range(40):
        size = rng.integers(9, 70, 2)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"in/{i:02d}.png")

    def command(out):
        tail = f"--root {tmp_path / 'in'} --ckpt none --out {tmp_path / out} --size 64 --batch-size 1 --labels atr18"
        return ["-m", "pixel_sampling.parse", *tail.split()]

    process = subprocess.Popen(
        [*PYTHON, *command("cut")], cwd=ROOT, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.time() + 120
    while len(list(tmp_path.glob("cut/*.png"))) < 3:
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    done = sorted(tmp_path.glob("cut/*.png"))
    assert 3 <= len(done) < 40
    for mask in done:  # nothing half-written under a final name
        assert np.array(Image.open(mask)).shape == Image.open(tmp_path / "in" / mask.name).size[::-1]
    again, quiet = script(*command("cut")), script(*command("quiet"))
    assert again.returncode == quiet.returncode == 0, again.stderr
    assert f"40 images under {tmp_path / 'in'}, {len(done)} have a mask" in again.stdout
    for image in sorted((tmp_path / "in").iterdir()):
        one, two = (np.array(Image.open(tmp_path / out / image.name)) for out in ("cut", "quiet"))
        assert np.array_equal(one, two), image.name
    assert sorted(p.name for p in tmp_path.glob("cut/*.png")) == sorted(p.name for p in (tmp_path / "in").iterdir())


def test_parse_keeps_18_labels_if_asked_and_part6_is_their_lut(net):
    image = torch.randint(0, 256, (3, 40, 21), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (labels,) = parse.parse(net, [image], 64)
    assert labels.shape == (40, 21) and labels.dtype == np.uint8 and LUT[labels].max() < 6


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: None, "no folder"),
        (lambda p: p.mkdir(), "say with --out"),
        (lambda p: (p / "prcc/rgb").mkdir(parents=True), "holds no image"),
    ],
)
def test_parse_tool_explains_what_is_missing(tmp_path, make, message, capsys):
    make(tmp_path / "x")
    assert parse.main(["--root", str(tmp_path / "x"), "--ckpt", "none"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("tree", ["prcc", "PRCC"])
def test_masks_of_prcc_go_where_training_looks_for_their_format(tmp_path, tree):
    (tmp_path / tree / "rgb").mkdir(parents=True)
    for labels, folder in (("part6", "mask"), ("atr18", "mask_atr18")):
        found = parse.folders(tmp_path, None, labels)
        assert found == (tmp_path / tree / "rgb", tmp_path / tree / folder)


def test_a_folder_of_links_is_parsed_and_masks_inside_it_are_no_images(tmp_path):
    for name in ("disk/a.jpg", "photos/b.WEBP", "photos/@eaDir/t.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 16)).save(tmp_path / name)
    photos = tmp_path / "photos"
    (photos / "part2").symlink_to(tmp_path / "disk")
    (photos / "masks").mkdir()
    Image.new("L", (8, 16)).save(photos / "masks" / "b.png")
    (tmp_path / "link").symlink_to(photos / "masks")
    for out in (photos / "masks", tmp_path / "link"):
        with pytest.warns(files.LeftOut, match="hidden or system entries: 1 .@eaDir"):
            pairs = parse.listed(*parse.folders(photos, str(out)))
        assert pairs == [(photos / "b.WEBP", out / "b.png"), (photos / "part2/a.jpg", out / "part2/a.png")]
    with pytest.raises(ValueError, match="photos is the folder of the images; give the masks a folder of their own"):
        parse.folders(photos, str(photos))
    Image.new("RGB", (8, 16)).save(photos / "b.jpg")
    with pytest.raises(ValueError, match="b.jpg and .*b.WEBP would both be written to .*b.png; parse one of them from"):
        parse.listed(photos, photos / "masks")
