"""aff_scl.losses: Eqs. (7)-(14) against loops written from the paper, and the memories' bookkeeping."""

import math

import pytest
import torch
import torch.nn.functional as F

from aff_scl import losses
from aff_scl.losses import Memory, balance_loss, hard_contrast, info_nce, mean_contrast, psi, symmetric_contrast
from aff_scl.model import Output
from common.losses import batch_hard_triplet

TAU = 0.05
FORMS = ("logits", "logits_pos", "memory")


def unit(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def setting(classes=6, present=(4, 1, 3), instances=4, size=8, momentum=0.1, hard_ref="mean", dtype=torch.float32):
    """A memory of `classes` rows and a batch q (P, K, D), labels (P, K) of some of them."""
    memory = Memory(unit(classes, size), unit(classes, size, seed=1), momentum, hard_ref)
    labels = torch.tensor(present)[:, None].repeat(1, instances)
    return memory, unit(len(present), instances, size, seed=2, dtype=dtype), labels


def pairs(q, labels):
    """Every image of a batch as (list of numbers, label)."""
    return list(zip(q.flatten(0, -2).tolist(), labels.flatten().tolist()))


def dot(x, y):
    return sum(a * b for a, b in zip(x, y))


def slow_info_nce(q, rows, labels, tau):
    """Eq. (7) image by image, class by class."""
    total = 0.0
    for query, label in pairs(q, labels):
        scores = [math.exp(dot(query, row) / tau) for row in rows.tolist()]
        total += -math.log(scores[label] / sum(scores))
    return total / labels.numel()


def slow_psi(x, alpha=0.9, gamma=1.5):
    """Eq. (14) without 1/4 for one number."""
    b = math.exp(gamma / alpha) - 1
    if abs(x) < 1:
        return alpha / b * (b * abs(x) + 1) * math.log(b * abs(x) + 1) - alpha * abs(x)
    return gamma * abs(x) + gamma / b - alpha


def normalised(row):
    length = math.sqrt(dot(row, row))
    return [value / length for value in row]


def slow_update(memory, q, labels):
    """Eqs. (10), (12), (13) identity by identity; returns means, hards as lists."""
    m, means, hards = memory.momentum, memory.means.tolist(), memory.hards.tolist()
    for i in sorted(set(labels.flatten().tolist())):
        members = [query for query, label in pairs(q, labels) if label == i]
        average = [sum(column) / len(members) for column in zip(*members)]
        reference = memory.means[i].tolist() if memory.hard_ref == "mean" else memory.hards[i].tolist()
        hardest = min(members, key=lambda query: dot(query, reference))
        means[i] = normalised([m * old + (1 - m) * new for old, new in zip(memory.means[i].tolist(), average)])
        hards[i] = normalised([m * old + (1 - m) * new for old, new in zip(memory.hards[i].tolist(), hardest)])
    return means, hards


# ------------------------------------------------------------------------------------------------- Eqs. (7), (9), (11)
@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_eq7_equals_loop_over_classes(tau):
    memory, q, labels = setting()
    assert info_nce(q, memory.means, labels, tau).item() == pytest.approx(
        slow_info_nce(q, memory.means, labels, tau), rel=1e-5
    )


def test_eq9_and_eq11_contrast_against_their_own_memory():
    memory, q, labels = setting()
    for loss, rows in ((mean_contrast, memory.means), (hard_contrast, memory.hards)):
        assert loss(q, rows, labels, TAU).item() == pytest.approx(slow_info_nce(q, rows, labels, TAU), rel=1e-5)


def test_eq7_gradient_is_right_in_float64_and_rows_get_none():
    memory, q, labels = setting(dtype=torch.float64)
    rows = memory.means.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: info_nce(x, rows, labels, 0.5), q.requires_grad_())
    info_nce(q, rows, labels, 0.5).backward()
    assert rows.grad is None


@pytest.mark.parametrize("label", [-1, 6])
def test_labels_outside_the_classes_are_refused_everywhere(label):
    memory, q, labels = setting()
    labels[1] = label
    calls = [lambda: mean_contrast(q, memory.means, labels, TAU), lambda: hard_contrast(q, memory.hards, labels, TAU),
             lambda: symmetric_contrast(q, labels, memory), lambda: memory.update(q, labels),
             lambda: losses.ce_tri(Output(q, q[0], torch.zeros(4, 6)), labels[1])]  # fmt: skip
    calls += [lambda form=form: balance_loss(q, labels, memory, TAU, form) for form in losses.BALANCE_FORMS]
    for call in calls:
        with pytest.raises(ValueError, match="outliers"):
            call()


def test_wrong_shapes_and_temperatures_are_refused():
    memory, q, labels = setting()
    with pytest.raises(ValueError, match="expected q"):
        mean_contrast(q, memory.means, labels[:-1], TAU)
    with pytest.raises(ValueError, match="expected q"):
        mean_contrast(q[:0], memory.means, labels[:0], TAU)
    with pytest.raises(ValueError, match="tau"):
        mean_contrast(q, memory.means, labels, 0.0)


# ------------------------------------------------------------------------------------------------------------- Eq. (14)
def test_psi_is_the_balanced_l1_of_eq14():
    assert losses.B == pytest.approx(4.29449, abs=5e-6)
    assert losses.ALPHA * math.log(losses.B + 1) == pytest.approx(1.5)
    points = [-7.0, -1.0, -0.999, -0.3, -1e-3, 0.0, 1e-3, 0.5, 0.999, 1.0, 1.001, 20.0]
    expected = [slow_psi(x) for x in points]
    assert psi(torch.tensor(points, dtype=torch.float64)).tolist() == pytest.approx(expected, abs=1e-12)


def test_psi_is_continuous_with_slope_one_and_a_half_at_one():
    below, above = (torch.tensor(1 + side, dtype=torch.float64, requires_grad=True) for side in (-1e-9, 1e-9))
    assert psi(below).item() == pytest.approx(psi(above).item(), abs=1e-8) == pytest.approx(0.94928, abs=1e-5)
    for x in (below, above):
        assert torch.autograd.grad(psi(x), x)[0].item() == pytest.approx(1.5, abs=1e-8)
    small = torch.tensor(1e-4, dtype=torch.float64)
    assert psi(small).item() == pytest.approx(1.9325e-8, rel=1e-3)


def test_psi_gradient_is_right_and_zero_at_zero():
    x = torch.tensor([-3.0, -0.5, 0.2, 0.9, 1.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(psi, x)
    zero = torch.zeros(1, requires_grad=True)
    psi(zero).sum().backward()
    assert zero.grad.item() == 0.0


def slow_balance(q, labels, memory, tau, form):
    total, terms = 0.0, 0
    if form == "memory":
        means, hards = slow_update(memory, q, labels)
        present = sorted(set(labels.flatten().tolist()))
        return sum(slow_psi(c - h) for i in present for c, h in zip(means[i], hards[i])) / len(present) / 4
    for query, label in pairs(q, labels):
        for j in range(len(memory)) if form == "logits" else [label]:
            x = (dot(query, memory.means[j].tolist()) - dot(query, memory.hards[j].tolist())) / tau
            total, terms = total + slow_psi(x), terms + 1
    return total / terms / 4


@pytest.mark.parametrize("form", FORMS)
def test_eq14_equals_loops(form):
    memory, q, labels = setting()
    loss = balance_loss(q, labels, memory, TAU, form)
    assert loss.item() == pytest.approx(slow_balance(q, labels, memory, TAU, form), rel=1e-4)


def test_eq14_read_literally_has_no_gradient_and_the_default_has():
    memory, q, labels = setting()
    literal = psi(memory.means - memory.hards).sum() / 4
    assert not literal.requires_grad
    for form in FORMS:
        leaf = q.clone().requires_grad_()
        balance_loss(leaf, labels, memory, TAU, form).backward()
        assert leaf.grad.abs().max() > 0
    assert not balance_loss(q.clone().requires_grad_(), labels, memory, TAU, "none").requires_grad


def test_logits_form_moves_the_mean_side_only():
    memory, q, labels = setting()
    leaf = q.clone().requires_grad_()
    balance_loss(leaf, labels, memory, TAU).backward()
    other = q.clone().requires_grad_()
    fixed = (q @ memory.hards.T).detach()
    (0.25 * psi((other @ memory.means.T - fixed) / TAU).mean()).backward()
    assert torch.allclose(leaf.grad, other.grad, rtol=1e-4, atol=1e-7)


def test_memory_form_gradient_is_right_in_float64():
    memory, q, labels = setting(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: balance_loss(x, labels, memory, TAU, "memory"), q.requires_grad_())


def test_balance_is_zero_while_both_memories_are_equal():
    memory, q, labels = setting()
    memory.hards = memory.means.clone()
    assert [balance_loss(q, labels, memory, TAU, form).item() for form in ("logits", "logits_pos")] == [0.0, 0.0]


def test_unknown_form_is_refused():
    memory, q, labels = setting()
    with pytest.raises(ValueError, match="logits_pos"):
        balance_loss(q, labels, memory, TAU, "cosine")


# -------------------------------------------------------------------------------------------------------------- Eq. (8)
@pytest.mark.parametrize("lambda1, lambda2", [(0.75, 0.25), (0.0, 1.0), (1.0, 0.0)])
def test_eq8_weighs_hard_by_lambda1_and_mean_by_lambda2(lambda1, lambda2):
    memory, q, labels = setting()
    loss, parts = symmetric_contrast(q, labels, memory, TAU, lambda1, lambda2)
    hard, mean = slow_info_nce(q, memory.hards, labels, TAU), slow_info_nce(q, memory.means, labels, TAU)
    balance = slow_balance(q, labels, memory, TAU, "logits")
    assert loss.item() == pytest.approx(lambda1 * hard + lambda2 * mean + balance, rel=1e-5)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(
        {"hard": hard, "mean": mean, "balance": balance}, rel=1e-4
    )
    assert not any(part.requires_grad for part in parts.values())


def test_defaults_are_the_papers():
    memory, q, labels = setting()
    expected = symmetric_contrast(q, labels, memory, 0.05, 0.75, 0.25, "logits")[0]
    assert torch.equal(symmetric_contrast(q, labels, memory)[0], expected)
    assert memory.momentum == Memory(memory.means, memory.hards).momentum == 0.1


def test_autocast_changes_nothing():
    memory, q, labels = setting()
    expected = symmetric_contrast(q, labels, memory)[0]
    means = memory.updated_rows(q, labels)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(symmetric_contrast(q, labels, memory)[0], expected)
        assert torch.equal(memory.updated_rows(q, labels)[0], means)
        memory.update(q, labels)
    assert memory.means.dtype == memory.hards.dtype == torch.float32


def test_losses_leave_the_matmul_precision_as_it_was():
    memory, q, labels = setting()
    torch.set_float32_matmul_precision("high")
    try:
        symmetric_contrast(q, labels, memory)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# --------------------------------------------------------------------------------------------------------- the baseline
def test_baseline_loss_is_cross_entropy_plus_triplet_on_the_pooled_feature():
    pooled, labels = 3 * unit(12, 8), torch.arange(4).repeat_interleave(3)
    logits = unit(12, 4, seed=5)
    loss, parts = losses.ce_tri(Output(unit(12, 8, seed=6), pooled, logits), labels, label_smoothing=0.1)
    ce = 0.0
    for row, label in zip(logits.tolist(), labels.tolist()):
        total = sum(math.exp(value) for value in row)
        for j, value in enumerate(row):
            ce -= (0.9 * (j == label) + 0.1 / 4) * math.log(math.exp(value) / total) / 12
    assert parts["ce"].item() == pytest.approx(ce, rel=1e-5)
    assert torch.equal(parts["triplet"], batch_hard_triplet(pooled, labels, 0.3))
    assert loss.item() == pytest.approx((parts["ce"] + parts["triplet"]).item())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu_with_tf32_on():
    memory, q, labels = setting(classes=700, present=tuple(range(0, 700, 50)), instances=8, size=2048)
    on_gpu = Memory(memory.means.cuda(), memory.hards.cuda())
    torch.set_float32_matmul_precision("high")
    try:
        loss = symmetric_contrast(q.cuda(), labels.cuda(), on_gpu)[0]
        on_gpu.update(q.cuda(), labels.cuda())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert loss.item() == pytest.approx(symmetric_contrast(q, labels, memory)[0].item(), rel=1e-5)
    memory.update(q, labels)
    assert torch.allclose(on_gpu.means.cpu(), memory.means, atol=1e-6)
    assert torch.allclose(on_gpu.hards.cpu(), memory.hards, atol=1e-6)
