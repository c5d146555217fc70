"""common/visualize.py: what is drawn where, and Grad-CAM against its definition."""

import sys

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common import visualize
from common.visualize import BLUE, GREEN, RED, Cell, Curve


def flat(colour, height=64, width=32):
    return np.full((height, width, 3), colour, dtype=np.uint8)


def colours(path):
    """The exact colours of a picture: (R, G, B) -> pixel positions (n, 2) as row, column."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return lambda colour: np.argwhere((pixels == colour).all(-1))


def loop_top_matches(dist, qp, gp, qc, gc, k):
    rows = []
    for q in range(len(qp)):
        order = sorted(range(len(gp)), key=lambda g: (dist[q][g], g))
        rows.append([g for g in order if gp[g] != -1 and not (gp[g] == qp[q] and gc[g] == qc[q])][:k])
    return rows


def test_top_matches_equals_a_loop_with_junk_ties_and_short_lists():
    rng = np.random.default_rng(0)
    qp, qc = rng.integers(1, 5, 20), rng.integers(0, 3, 20)
    gp, gc = rng.integers(-1, 5, 60), rng.integers(0, 3, 60)
    dist = rng.integers(0, 6, (20, 60)) / 6  # many ties
    for k in (1, 7, 100):
        indices, matches, distances = visualize.top_matches(torch.tensor(dist), qp, gp, qc, gc, k)
        for q, expected in enumerate(loop_top_matches(dist, qp, gp, qc, gc, k)):
            padding = [-1] * (k - len(expected))
            assert indices[q].tolist() == expected + padding
            assert matches[q].tolist() == [gp[g] == qp[q] for g in expected] + [False] * len(padding)
            assert np.array_equal(
                distances[q], [dist[q, g] for g in expected] + [np.nan] * len(padding), equal_nan=True
            )


def test_top_matches_without_cameras_keeps_the_same_camera():
    indices, matches, _ = visualize.top_matches([[0.3, 0.1]], [5], [5, 6], k=2)
    assert indices.tolist() == [[1, 0]] and matches.tolist() == [[False, True]]


def test_rank_list_frames_matches_green_others_red_in_order(tmp_path):
    gallery = [flat((10 * i, 0, 0)) for i in range(4)]
    path = visualize.rank_list(
        tmp_path / "new" / "list.png",
        [flat((0, 0, 250))],
        gallery,
        [[2, 0, -1, 3]],
        [[True, False, False, True]],
        height=64,
    )
    find = colours(path)
    left, right = find((20, 0, 0))[:, 1], find((30, 0, 0))[:, 1]
    green, red, blue = (find(colour) for colour in (GREEN, RED, BLUE))
    assert len(find((10, 0, 0))) == 0  # index 1 is not in the list
    assert (
        len(find((0, 0, 250)))
        and find((0, 0, 250))[:, 1].max() < left.min() < find((0, 0, 0))[:, 1].min() < right.min()
    )
    around = [(columns.min() - 1, columns.max() + 1) for columns in (left, right)]
    assert all(edge in set(green[:, 1]) for pair in around for edge in pair)
    assert left.max() < red[:, 1].min() and red[:, 1].max() < right.min()
    assert blue[:, 1].max() < left.min()


def test_rank_list_opens_only_the_images_that_it_shows(tmp_path):
    Image.fromarray(flat(90)).save(tmp_path / "shown.jpg")
    gallery = [tmp_path / "missing.jpg", tmp_path / "shown.jpg"]
    visualize.rank_list(
        tmp_path / "list.jpg",
        [str(tmp_path / "shown.jpg")],
        gallery,
        [[1]],
        [[True]],
        [[0.25]],
        title="t",
        query_names=["pid 7"],
    )
    assert (tmp_path / "list.jpg").read_bytes().startswith(b"\xff\xd8")


def test_rank_list_refuses_lists_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="2 queries"):
        visualize.rank_list(tmp_path / "list.png", [flat(1), flat(2)], [flat(3)], [[0]], [[True]])


def test_grid_places_rows_and_columns_and_leaves_gaps(tmp_path):
    rows = [
        [flat((200, 0, 0)), flat((0, 200, 0))],
        [Cell(), flat((0, 0, 200)), Cell(flat((9, 9, 9)), caption="long caption")],
    ]
    path = visualize.grid(
        tmp_path / "sheet.png", rows, row_titles=["first", "second"], column_titles=["a", "b"], title="title", height=48
    )
    find = colours(path)
    red, green, blue, grey = (find(colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200), (9, 9, 9)))
    assert all(len(found) == 48 * 24 for found in (red, green, blue, grey))
    assert red[:, 0].min() == green[:, 0].min() < blue[:, 0].min() == grey[:, 0].min()
    assert red[:, 1].max() < green[:, 1].min() == blue[:, 1].min() and blue[:, 1].max() < grey[:, 1].min()


@pytest.mark.parametrize("image", ["path", "pil", "array", "uint8 tensor", "float tensor"])
def test_all_kinds_of_images_give_the_same_pixels(tmp_path, image):
    array = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "x.png")
    tensor = torch.tensor(array).permute(2, 0, 1)
    given = {
        "path": tmp_path / "x.png",
        "pil": Image.fromarray(array),
        "array": array,
        "uint8 tensor": tensor,
        "float tensor": tensor / 255,
    }
    assert np.array_equal(np.asarray(visualize.picture(given[image])), array)


@pytest.mark.parametrize(
    "image", [torch.randn(3, 4, 4) * 3, torch.zeros(4, 4, 3), np.zeros((4, 4, 3)), np.zeros((3, 4, 4), np.uint8)]
)
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ValueError, match="image"):
        visualize.picture(image)


def test_heat_map_is_hot_where_the_map_is_high():
    values = np.zeros((16, 8))
    values[12, 2] = 5
    shown = visualize.heat_map(flat(100, 128, 64), values, alpha=0.5).astype(int)
    assert shown.shape == (128, 64, 3)
    hot, cold = shown[12 * 8 + 4, 2 * 8 + 4], shown[8, 56]
    assert hot[0] > hot[2] and cold[2] > cold[0]
    blue = np.round(np.array(matplotlib.colormaps["jet"](0.0)[:3]) * 255 * 0.5 + 50)
    assert np.abs(cold - blue).max() <= 1


def test_heat_map_limits():
    image = flat(100, 4, 4)
    assert np.array_equal(
        visualize.heat_map(image, torch.full((2, 2), 3.0)), visualize.heat_map(image, np.zeros((2, 2)))
    )  # constant: cold
    assert not np.array_equal(
        visualize.heat_map(image, np.full((2, 2), 0.5), scale=False), visualize.heat_map(image, np.zeros((2, 2)))
    )
    for values, scale in ((np.full((2, 2), 1.5), False), (np.full((2, 2), np.nan), True), (np.zeros(4), True)):
        with pytest.raises(ValueError, match="heat map"):
            visualize.heat_map(image, values, scale=scale)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        return self.score(self.body(x))

    def score(self, maps):
        """Depends on every place of every channel, on each by another slope."""
        slopes = torch.linspace(0.2, 1, maps[0, 0].numel(), dtype=maps.dtype)
        return self.head((maps.flatten(2) ** 2 * slopes).sum(2))


def test_grad_cam_equals_its_definition_by_finite_differences():
    torch.manual_seed(0)
    net, images = Net().double().eval(), torch.rand(3, 3, 8, 6, dtype=torch.float64)
    classes = torch.tensor([2, 0, 3])
    maps = visualize.grad_cam(net, net.body, images, lambda logits: logits[torch.arange(3), classes])
    for b in range(3):
        activation = net.body(images[b : b + 1]).detach()[0]  # (C, h, w)

        def score(a, b=b):
            return net.score(a[None])[0, classes[b]].item()

        weights = torch.zeros(5, dtype=torch.float64)
        for c in range(5):
            for y in range(activation.shape[1]):
                for x in range(activation.shape[2]):
                    moved = activation.clone()
                    moved[c, y, x] += 1e-7
                    weights[c] += (score(moved) - score(activation)) / 1e-7 / activation[0].numel()
        cam = (weights[:, None, None] * activation).sum(0)
        assert cam.min() < 0 < cam.max()  # or the test would not see the ReLU
        cam = cam.clamp(min=0)
        cam = (cam - cam.min()) / (cam.max() - cam.min())
        assert torch.allclose(maps[b].double(), cam, atol=1e-4)


def test_grad_cam_leaves_no_trace():
    net, images = Net().eval(), torch.rand(2, 3, 8, 6)
    net.requires_grad_(False)
    with torch.no_grad():
        maps = visualize.grad_cam(net, net.body, images, lambda logits: logits[:, 0])
    assert maps.shape == (2, 4, 3) and maps.min() >= 0 and maps.max() <= 1 and not maps.requires_grad
    assert not net.body._forward_hooks and not images.requires_grad and all(p.grad is None for p in net.parameters())
    with pytest.raises(RuntimeError, match="boom"):
        visualize.grad_cam(net, net.body, images, lambda logits: (_ for _ in ()).throw(RuntimeError("boom")))
    assert not net.body._forward_hooks


def test_grad_cam_refuses_wrong_layers_and_targets():
    net, images = Net().eval(), torch.rand(2, 3, 8, 6)
    with pytest.raises(ValueError, match="must give"):
        visualize.grad_cam(net, net.head, images, lambda logits: logits[:, 0])
    with pytest.raises(ValueError, match="one score per image"):
        visualize.grad_cam(net, net.body, images, lambda logits: logits)


def test_plots_are_written_whole_and_without_global_state(tmp_path):
    pyplot = "matplotlib.pyplot" in sys.modules
    cmc = {"ours": 1 - 0.3 ** np.arange(1, 51), "short": [0.5, 0.6]}
    path = visualize.cmc_curve(tmp_path / "cmc.png", cmc, mAP={"ours": 0.788}, title="Market-1501")
    panels = {
        "mAP (%)": [Curve("a", [0.5, 0.6], [70, 75], [1, 2]), Curve("a", [0.6], [78], paper=True)],
        "Rank-1 (%)": [],
    }
    other = visualize.plot(tmp_path / "sweep.jpg", panels, x_label="eps")
    assert Image.open(path).size[0] > 400 and Image.open(other).size[0] > 800
    assert ("matplotlib.pyplot" in sys.modules) == pyplot
    assert not list(tmp_path.glob("*.tmp"))


def test_more_than_four_panels_go_into_rows(tmp_path):
    def size(number):
        panels = {f"y{i}": [Curve("a", [1, 2, 3], [1, 2, i])] for i in range(number)}
        return Image.open(visualize.plot(tmp_path / f"{number}.png", panels)).size

    (width, height), five, eight = size(4), size(5), size(8)
    assert eight == (width, 2 * height) and five[0] < width and five[1] == 2 * height


def test_a_long_title_stays_within_the_picture(tmp_path):
    title = "Pre-training on rendered people. Finding an image among all by a corrupted copy of it: synthetic medium"
    path = visualize.plot(tmp_path / "a.png", {"loss": [Curve("stage 1", [1, 2], [2.0, 1.0])]}, title=title)
    pixels = np.asarray(Image.open(path).convert("L"))
    assert (pixels[:, :4] == 255).all() and (pixels[:, -4:] == 255).all()


def test_nothing_to_draw_and_foreign_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no points"):
        visualize.plot(tmp_path / "x.png", {"mAP": []})
    with pytest.raises(ValueError, match="no images"):
        visualize.grid(tmp_path / "x.png", [[]])
    with pytest.raises(ValueError, match=".png or .jpg"):
        visualize.grid(tmp_path / "x.pdf", [[flat(1)]])
    assert list(tmp_path.iterdir()) == []
