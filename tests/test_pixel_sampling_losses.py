"""Eqs. (3)-(6) against loops written from the paper, and the schedule against its stated values."""

import math

import pytest
import torch

from pixel_sampling import losses
from pixel_sampling.model import Output
from pixel_sampling.train import keep_best, schedule


def pairs(seed=0, n=5, d=7):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64), torch.randn(n, d, generator=g, dtype=torch.float64)


def distance(x, y):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(x.tolist(), y.tolist())))


@pytest.mark.parametrize(
    "form, value",
    [
        ("l2", lambda d, n: d),
        ("sq", lambda d, n: d * d),
        ("mse", lambda d, n: d * d / n),
        ("sigmoid", lambda d, n: 1 / (1 + math.exp(-d * d))),
    ],
)
def test_eq3_equals_loop_over_pairs(form, value):
    x, y = pairs()
    expected = sum(value(distance(a, b), x.shape[1]) for a, b in zip(x, y)) / len(x)
    assert losses.consistency_loss(x, y, form).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("form", [f for f in losses.CONSISTENCY if f != "none"])
def test_gradients_of_eq3_reach_both_sides_and_are_right(form):
    x, y = (0.3 * t.requires_grad_(True) for t in pairs(1))
    assert torch.autograd.gradcheck(
        lambda a, b: losses.consistency_loss(a, b, form),
        (x.detach().requires_grad_(True), y.detach().requires_grad_(True)),
    )
    grads = torch.autograd.grad(losses.consistency_loss(x, y, form), (x, y))
    assert torch.allclose(grads[0], -grads[1])


@pytest.mark.parametrize("form", [f for f in losses.CONSISTENCY if f != "none"])
def test_distance_zero_gives_finite_gradients(form):
    x, y = pairs(2)
    y = y.clone()
    y[1] = x[1]  # an image without clothes, or without a mask, is its own changed copy
    x, y = x.float().requires_grad_(True), y.float().requires_grad_(True)
    losses.consistency_loss(x, y, form).backward()
    for grad in (x.grad, y.grad):
        assert torch.isfinite(grad).all() and torch.equal(grad[1], torch.zeros_like(grad[1]))


@pytest.mark.parametrize("squared, slope", [(1, 0.20), (4, 1.8e-2), (9, 1.2e-4), (16, 1e-7)])
def test_the_authors_sigmoid_has_next_to_no_gradient_far_away(squared, slope):
    s = torch.tensor(float(squared), dtype=torch.float64, requires_grad=True)
    losses.consistency_loss(s.sqrt().view(1, 1), torch.zeros(1, 1, dtype=torch.float64), "sigmoid").backward()
    assert s.grad.item() == pytest.approx(slope, rel=0.15)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_eq4_equals_loop_over_images(smoothing):
    g = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(6, 4, generator=g), torch.tensor([0, 1, 2, 3, 1, 0])
    expected = 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist()):
        total = sum(math.exp(v) for v in row)
        for c, v in enumerate(row):
            expected -= ((1 - smoothing) * (c == label) + smoothing / 4) * math.log(math.exp(v) / total)
    assert losses.identity_loss(logits, labels, smoothing).item() == pytest.approx(expected / 6, rel=1e-5)


def test_eq5_equals_loop_over_anchors_of_one_pool_of_images_and_copies():
    g = torch.Generator().manual_seed(4)
    feats, labels = torch.randn(12, 5, generator=g), torch.tensor([0, 0, 1, 1, 2, 2]).repeat(2)
    expected = 0.0
    for i in range(12):
        d = [distance(feats[i].double(), feats[j].double()) for j in range(12)]
        farthest = max(d[j] for j in range(12) if labels[j] == labels[i])  # the anchor itself counts, at distance 0
        nearest = min(d[j] for j in range(12) if labels[j] != labels[i])
        expected += max(0.3 + farthest - nearest, 0)
    assert losses.triplet_loss(feats, labels).item() == pytest.approx(expected / 12, rel=1e-5)


def test_eq6_is_the_plain_sum_and_branches_are_joined_as_the_network_says():
    g = torch.Generator().manual_seed(5)
    labels = torch.tensor([0, 0, 1, 1]).repeat(2)
    output = Output(
        [torch.randn(8, 3, generator=g) for _ in range(2)], [torch.randn(8, 5, generator=g) for _ in range(2)]
    )
    ids, triplets = (
        [losses.identity_loss(x, labels) for x in output.logits],
        [losses.triplet_loss(x, labels) for x in output.metrics],
    )
    loss, parts = losses.total_loss(output, labels, {"id": "mean", "triplet": "sum"}, "l2")
    first = output.metrics[0]
    expected = sum(ids) / 2 + sum(triplets) + losses.consistency_loss(first[:4], first[4:])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and set(parts) == {"id", "triplet", "consistency"}
    loss, parts = losses.total_loss(output, labels, {"id": "sum", "triplet": "mean"})
    assert loss.item() == pytest.approx((sum(ids) + sum(triplets) / 2).item(), rel=1e-6) and set(parts) == {
        "id",
        "triplet",
    }


@pytest.mark.parametrize(
    "epoch, rate", [(0, 3.5e-5), (9, 3.1535e-3), (10, 3.5e-3), (39, 3.5e-3), (40, 3.5e-4), (59, 3.5e-4)]
)
def test_learning_rate_by_epoch(epoch, rate):
    assert 3.5e-3 * schedule(60)(epoch) == pytest.approx(rate, rel=1e-12)


def test_best_on_test_is_chosen_for_each_query_set_apart():
    best = {}
    for epoch, (cross, same) in enumerate([(0.2, 0.9), (0.5, 0.7), (0.4, 0.8)], 1):
        best = keep_best(
            best, {f"{n}.{k}": v for n, v in (("cross", cross), ("same", same)) for k in ("rank1", "mAP")}, epoch
        )
    assert (best["cross.rank1"], best["cross.epoch"], best["same.rank1"], best["same.epoch"]) == (0.5, 2, 0.9, 1)


@pytest.mark.parametrize(
    "x, y, form, message",
    [
        (torch.zeros(2, 3), torch.zeros(3, 3), "l2", "two equal"),
        (torch.zeros(2, 3), torch.zeros(2, 3), "l1", "none of"),
    ],
)
def test_wrong_arguments_are_named(x, y, form, message):
    with pytest.raises(ValueError, match=message):
        losses.consistency_loss(x, y, form)
