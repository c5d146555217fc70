"""common.losses against loops over triplets."""

import math

import pytest
import torch

from common.losses import batch_hard_triplet


def slow_triplet(feats, labels, margin):
    """Hermans et al. 2017, anchor by anchor, with Python numbers; None where no anchor counts."""
    rows, labels = feats.tolist(), labels.tolist()
    losses = []
    for a in range(len(rows)):
        positive = [math.dist(rows[a], rows[p]) for p in range(len(rows)) if p != a and labels[p] == labels[a]]
        negative = [math.dist(rows[a], rows[n]) for n in range(len(rows)) if labels[n] != labels[a]]
        if positive and negative:
            gap = max(positive) - min(negative)
            losses.append(math.log1p(math.exp(gap)) if margin is None else max(0.0, gap + margin))
    return sum(losses) / len(losses) if losses else None


def batch(num_ids=4, num_instances=3, size=7, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_ids).repeat_interleave(num_instances)
    return torch.randn(len(labels), size, generator=generator, dtype=dtype), labels


@pytest.mark.parametrize("margin", [0.3, 0.0, 2.0, None])
def test_triplet_equals_loop_over_anchors(margin):
    feats, labels = batch()
    expected = slow_triplet(feats, labels, margin)
    assert batch_hard_triplet(feats, labels, margin).item() == pytest.approx(expected, rel=1e-5)


def test_anchors_without_positive_do_not_count():
    feats, labels = batch()
    labels[0] = 99  # a lone image: no positive, but a negative of others
    assert batch_hard_triplet(feats, labels).item() == pytest.approx(slow_triplet(feats, labels, 0.3), rel=1e-5)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [5, 5, 5, 5], [7], []])
def test_batch_without_a_triplet_is_refused(labels):
    with pytest.raises(ValueError, match="P x K"):
        batch_hard_triplet(torch.randn(len(labels), 3), torch.tensor(labels, dtype=torch.int64))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="expected feats"):
        batch_hard_triplet(torch.randn(4, 3), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected feats"):
        batch_hard_triplet(torch.randn(4), torch.zeros(4, dtype=torch.int64))


def test_triplet_does_not_depend_on_the_order_of_the_batch():
    feats, labels = batch()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    expected = batch_hard_triplet(feats, labels)
    assert torch.allclose(batch_hard_triplet(feats[order], labels[order]), expected, rtol=1e-6)


@pytest.mark.parametrize("margin", [2.0, None])
def test_triplet_gradient_is_right_in_float64(margin):
    feats, labels = batch(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: batch_hard_triplet(x, labels, margin), feats.requires_grad_())


def test_equal_images_give_no_nan_gradient():
    feats = torch.ones(6, 5, requires_grad=True)
    loss = batch_hard_triplet(feats, torch.tensor([0, 0, 0, 1, 1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(0.3) and torch.isfinite(feats.grad).all()


def test_far_from_the_origin_distances_stay_exact():
    feats, labels = batch()
    shifted = (feats + 4096.0).double()  # |x|^2 - 2xy + |y|^2 in float32 would lose everything here
    expected = slow_triplet(shifted, labels, 0.3)
    assert batch_hard_triplet(shifted.float(), labels).item() == pytest.approx(expected, rel=1e-3)


def test_triplet_under_autocast_is_float32():
    feats, labels = batch(size=64)
    expected = batch_hard_triplet(feats, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = batch_hard_triplet(feats, labels)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu_and_stays_deterministic():
    feats, labels = batch(16, 4, 256)
    on_gpu = feats.cuda().requires_grad_()
    loss = batch_hard_triplet(on_gpu, labels.cuda())
    first = torch.autograd.grad(loss, on_gpu, retain_graph=True)[0]
    assert loss.item() == pytest.approx(batch_hard_triplet(feats, labels).item(), rel=1e-5)
    assert batch_hard_triplet(feats[:4].cuda(), torch.arange(4).cuda()).isnan()
    assert torch.allclose(torch.autograd.grad(loss, on_gpu)[0], first)
