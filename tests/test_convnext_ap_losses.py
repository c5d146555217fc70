"""Losses of ConvNeXt-AP against sums written from the paper, and the schedule of Figure 2."""

import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

from common.losses import batch_hard_triplet
from convnext_ap import schedule
from convnext_ap.losses import circle_loss, id_losses, total_loss
from convnext_ap.metrics import trapezoid_ap, trapezoid_map
from convnext_ap.schedule import Plan, learning_rate, stage_of, warmup_cosine

LABELS = torch.tensor([0, 0, 1, 1, 1, 2])


def feats(n=6, d=5, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double_sum(x, labels, m, gamma, anchor=None):
    """Eq. (7) with margins: log(1 + sum_i sum_j exp(gamma (a_n (s_n - m) - a_p (s_p - (1 - m))))), by loops."""
    unit = [row / row.norm() for row in x]
    n = len(labels)
    if anchor is None:
        pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    else:
        pairs = [(anchor, j) for j in range(n) if j != anchor]
    total = 0.0
    for i, j in pairs:
        for k, l in pairs:
            if labels[i] == labels[j] and labels[k] != labels[l]:
                s_p, s_n = float(unit[i] @ unit[j]), float(unit[k] @ unit[l])
                a_p, a_n = max(0.0, 1 + m - s_p), max(0.0, s_n + m)
                total += math.exp(gamma * (a_n * (s_n - m) - a_p * (s_p - (1 - m))))
    return math.log1p(total)


@pytest.mark.parametrize("m, gamma", [(0.25, 32.0), (0.4, 4.0), (0.0, 1.0)])
def test_circle_loss_equals_the_double_sum_of_eq7_with_margins(m, gamma):
    x = feats()
    assert circle_loss(x, LABELS, m, gamma).item() == pytest.approx(double_sum(x, LABELS, m, gamma), rel=1e-12)


def test_circle_loss_by_anchors_is_the_mean_of_the_double_sums_of_rows_with_a_positive():
    x = feats()
    rows = [double_sum(x, LABELS, 0.25, 8.0, anchor) for anchor in range(5)]  # the last image has no positive
    assert circle_loss(x, LABELS, 0.25, 8.0, "anchor").item() == pytest.approx(sum(rows) / 5, rel=1e-12)


@pytest.mark.parametrize("mode", ["pool", "anchor"])
@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4, 5], [0] * 6], ids=["no positives", "no negatives"])
def test_without_positives_or_negatives_it_is_exactly_zero(mode, labels):
    x = feats().float().requires_grad_()
    loss = circle_loss(x, torch.tensor(labels), mode=mode)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(x.grad, torch.zeros_like(x))


def test_no_gradient_flows_through_the_weights_alpha():
    x = feats().requires_grad_()
    (grad,) = torch.autograd.grad(circle_loss(x, LABELS, 0.25, 8.0), x)
    unit = F.normalize(x.detach())
    sim = unit @ unit.T
    alpha_p, alpha_n = (1.25 - sim).clamp_min(0), (sim + 0.25).clamp_min(0)  # held fixed

    def fixed(y):
        u = F.normalize(y)
        s = u @ u.T
        same, upper = LABELS[:, None] == LABELS, torch.ones(6, 6, dtype=torch.bool).triu(1)
        negative = (8 * alpha_n * (s - 0.25))[upper & ~same]
        positive = (-8 * alpha_p * (s - 0.75))[upper & same]
        return torch.log1p(negative.exp().sum() * positive.exp().sum())

    step, numeric = 1e-6, torch.zeros_like(grad)
    for i in range(6):
        for j in range(5):
            move = torch.zeros_like(grad)
            move[i, j] = step
            numeric[i, j] = (fixed(x.detach() + move) - fixed(x.detach() - move)) / (2 * step)
    assert torch.allclose(grad, numeric, atol=1e-7)


def test_circle_loss_does_not_change_with_the_order_of_the_batch():
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    x = feats()
    assert circle_loss(x[order], LABELS[order]).item() == pytest.approx(circle_loss(x, LABELS).item(), rel=1e-12)


def test_id_loss_is_one_softmax_loss_a_head():
    logits = feats(6 * 3, 4).view(6, 3, 4)
    for head in range(3):
        shares = [math.exp(logits[i, head, LABELS[i]]) / logits[i, head].exp().sum() for i in range(6)]
        expected = sum(-math.log(share) for share in shares) / 6
        assert id_losses(logits, LABELS)[head].item() == pytest.approx(expected, rel=1e-6)


def parts_of(**options):
    logits, h = feats(6 * 3, 4).view(6, 3, 4), feats(6 * 3, 5, seed=2).view(6, 3, 5)
    return logits, h, total_loss(logits, h, LABELS, **options)


def test_total_is_the_sum_of_id_losses_and_circle_over_the_batch_size():
    logits, h, parts = parts_of()
    expected = id_losses(logits, LABELS).sum() + circle_loss(h[:, 0], LABELS) / 6
    assert parts.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert parts.total.item() == pytest.approx((parts.id + parts.pair).item(), rel=1e-6)


def test_the_options_of_the_loss():
    logits, h, parts = parts_of(loss="id", part_reduce="mean")
    ids = id_losses(logits, LABELS)
    assert parts.total.item() == pytest.approx((ids[0] + ids[1:].mean()).item()) and parts.pair == 0
    logits, h, parts = parts_of(loss="id+triplet", pair_on="concat")
    assert parts.pair.item() == pytest.approx(batch_hard_triplet(h.flatten(1), LABELS, 0.3).item())
    logits, h, parts = parts_of(only_parts=True)
    assert parts.total.item() == pytest.approx(ids[1:].sum().item()) and parts.pair == 0


# ------------------------------------------------------------------------------------------------------------ schedule


FIGURE2 = {
    120: {0: 0.02, 1: 0.04, 2: 0.06, 3: 0.08, 4: 0.1, 5: 0.1, 60: 0.05341, 119: 1.866e-5},
    50: {27: 0.05174, 49: 1.218e-4},
}


@pytest.mark.parametrize("epochs, values", FIGURE2.items())
def test_figure2_warm_up_and_cosine_have_the_printed_values(epochs, values):
    for epoch, value in values.items():
        assert warmup_cosine(epoch, epochs) == pytest.approx(value, rel=1e-3)
    assert warmup_cosine(0, 120) == pytest.approx(0.02) and warmup_cosine(4, 120) == pytest.approx(0.1)


def test_the_trunk_learns_at_a_tenth_and_stages_have_their_rates():
    plan = Plan(120, 5, 10)
    assert plan.total == 135
    stages = [stage_of(e, plan) for e in (0, 119, 120, 124, 125, 134)]
    assert stages == ["pcb", "pcb", "assign", "assign", "joint", "joint"]
    groups = ("trunk", "heads", "assign")
    assert [learning_rate(60, plan, g) for g in groups] == pytest.approx([0.005341, 0.05341, 0], rel=1e-3)
    assert [learning_rate(122, plan, g) for g in groups] == pytest.approx([0, 0, 0.01])
    assert [learning_rate(130, plan, g) for g in groups] == pytest.approx([0.001, 0.01, 0.01])
    assert [e for e in range(135) if schedule.ends_stage(e, plan)] == [119, 124, 134]


def test_fewer_epochs_than_warm_up_still_have_a_rate():
    assert [warmup_cosine(e, 2, 5) for e in range(2)] == pytest.approx([0.02, 0.04])
    assert warmup_cosine(0, 3, 0) == pytest.approx(0.1)


# ------------------------------------------------------------------------------------------------------ trapezoidal AP


def test_trapezoidal_ap_on_lists_worked_by_hand():
    assert trapezoid_ap([1, 2, 3]) == pytest.approx(1)
    assert trapezoid_ap([2]) == pytest.approx((0 + 1 / 2) / 2)
    assert trapezoid_ap([4, 1]) == pytest.approx(((1 + 1) / 2 + (1 / 3 + 2 / 4) / 2) / 2)


def test_trapezoidal_map_leaves_out_junk_and_is_never_above_the_other_rule():
    from common import evaluation
    from common.datasets import Sample

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=draw)
    ids, cams = torch.randint(-1, 4, (60,), generator=draw), torch.randint(0, 3, (60,), generator=draw)
    ids[:12] = ids[:12].abs()
    samples = [Sample("", int(p), int(c)) for p, c in zip(ids, cams)]
    data = Namespace(query=samples[:12], gallery=samples[12:])
    other = evaluation.rank_metrics(x[:12], x[12:], ids[:12], ids[12:], cams[:12], cams[12:])
    assert other.mAP - 0.2 < trapezoid_map(x, data, chunk=5) < other.mAP
    one = evaluation.rank_metrics(x[:1], x[12:], ids[:1], ids[12:], cams[:1], cams[12:])
    ranks = rank_loop(x[0], x[12:], samples[0], samples[12:])
    assert one.mAP == pytest.approx(sum((i + 1) / r for i, r in enumerate(ranks)) / len(ranks))
    data = Namespace(query=samples[:1], gallery=samples[12:])
    assert trapezoid_map(torch.cat([x[:1], x[12:]]), data) == pytest.approx(trapezoid_ap(ranks))


def rank_loop(query, gallery, sample, samples):
    """Ranks of a query's matches from 1, by sorting."""
    kept = [
        (float((query - g).norm()), s)
        for g, s in zip(gallery, samples)
        if s.pid != -1 and not (s.pid == sample.pid and s.camid == sample.camid)
    ]
    return [place + 1 for place, (_, s) in enumerate(sorted(kept, key=lambda item: item[0])) if s.pid == sample.pid]
