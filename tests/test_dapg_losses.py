"""Equations (1)-(5), SimCLR, BYOL, WRT and CIL's term against loops written from their definitions."""

import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

from dapg import losses
from dapg.pretrain.robust import batch_negatives, objective


def rows(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def constraint(logits):
    """Eqs. (3)-(5) of the softmax of logits (3, B, K)."""
    p = logits.float().softmax(2)
    return losses.js_divergence(p, losses.mixture(p))


def test_eq2_equals_loops():
    q, k, queue, tau = rows(5, 8), rows(3, 5, 8, seed=1), rows(11, 8, seed=2), 0.7
    want = 0.0
    for b in range(5):
        top = sum(math.exp(float(q[b] @ k[i, b]) / tau) for i in range(3))
        rest = sum(math.exp(float(q[b] @ queue[j]) / tau) for j in range(11))
        want -= math.log(top / (top + rest)) / 5
    found = losses.multi_contrastive(torch.einsum("bd,pbd->bp", q, k), q @ queue.T, tau)
    assert abs(float(found) - want) < 1e-6


def test_eq2_by_hand_and_infonce_for_one_positive():
    pos, neg = torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([[0.0, -1.0]])
    e = [math.exp(v) for v in (1, 0.5, 0, 0, -1)]
    assert abs(float(losses.multi_contrastive(pos, neg, 1.0)) + math.log(sum(e[:3]) / sum(e))) < 1e-6
    single = losses.info_nce(pos, neg, torch.tensor([1]), 1.0)
    want = F.cross_entropy(torch.tensor([[0.5, 0.0, -1.0]]), torch.tensor([0]))
    assert torch.allclose(single, want)


def test_eq2_equal_similarities_give_log_of_all_over_positives():
    assert abs(float(losses.multi_contrastive(torch.zeros(2, 3), torch.zeros(2, 29), 0.7)) - math.log(32 / 3)) < 1e-5


def test_eq4_and_eq5_equal_loops():
    p = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = p / p.sum(2, keepdim=True)
    want = 0.0
    for b in range(4):
        m = [sum(float(p[i, b, n]) for i in range(3)) / 3 for n in range(6)]  # Eq. (4): the mean
        want += sum(float(p[i, b, n]) * math.log(float(p[i, b, n]) / m[n]) for i in range(3) for n in range(6)) / 3 / 4
    assert abs(float(losses.js_divergence(p, losses.mixture(p))) - want) < 1e-6


def test_js_is_bounded_zero_for_equal_and_permutation_invariant():
    p = torch.eye(3)[:, None]
    assert abs(float(losses.js_divergence(p, losses.mixture(p))) - math.log(3)) < 1e-5
    logits = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(0))
    assert float(constraint(logits[:1].expand(3, -1, -1))) < 1e-6
    assert torch.allclose(constraint(logits), constraint(logits[[2, 0, 1]]))
    masked = logits.masked_fill(torch.rand(5, 20, generator=torch.Generator().manual_seed(1)) < 0.3, -torch.inf)
    assert torch.isfinite(constraint(masked)) and 0 <= float(constraint(masked)) <= math.log(3)


def test_masked_similarities_leave_finite_gradients():
    logits = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    masked = logits.masked_fill(torch.eye(5, 20).bool(), -torch.inf)
    (constraint(masked) + losses.multi_contrastive(masked[0], masked[1], 0.1)).backward()
    assert torch.isfinite(logits.grad).all()


def test_eq1_weighs_by_delta():
    assert float(losses.total(torch.tensor(2.0), torch.tensor(10.0), 0.25)) == 0.25 * 2 + 0.75 * 10


def test_gradients_are_those_of_finite_differences():
    pos, neg = rows(4, 3).requires_grad_(), rows(4, 7, seed=1).requires_grad_()

    def eq2(a, b):
        return torch.logsumexp(torch.cat([a, b], 1), 1).sub(torch.logsumexp(a, 1)).mean()

    assert torch.autograd.gradcheck(eq2, (pos, neg))
    small = losses.multi_contrastive(pos, neg, 1.0)
    assert torch.allclose(torch.autograd.grad(small, pos)[0], torch.autograd.grad(eq2(pos, neg), pos)[0], atol=1e-6)


def test_nt_xent_equals_loops():
    z, tau = rows(2, 4, 6), 0.1
    flat, want = z.flatten(0, 1), 0.0
    for i in range(8):
        partner = (i + 4) % 8
        down = sum(math.exp(float(flat[i] @ flat[j]) / tau) for j in range(8) if j != i)
        want -= math.log(math.exp(float(flat[i] @ flat[partner]) / tau) / down) / 8
    assert abs(float(losses.nt_xent(z, z, 0, tau)) - want) < 1e-4


def test_byol_is_two_minus_two_cosines_of_crossed_views():
    p, z = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    cos = F.cosine_similarity
    want = (2 - 2 * cos(p[0], z[1])).mean() + (2 - 2 * cos(p[1], z[0])).mean()
    assert torch.allclose(losses.byol(p, z), want, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["near", "beyond distance 13"])
def test_weighted_triplet_equals_loops_with_the_denominators_of_agws_code(scale):
    x = scale * torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    labels, want = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1]), 0.0
    for a in range(8):
        d = [float((x[a] - x[j]).norm()) for j in range(8)]
        p = [j for j in range(8) if labels[j] == labels[a]]
        n = [j for j in range(8) if labels[j] != labels[a]]
        top = max(d[j] for j in p)
        wp, wn = [math.exp(d[j] - top) for j in p], [math.exp(-d[j]) for j in n]
        far = sum(w * d[j] for w, j in zip(wp, p)) / (sum(wp) + 1e-6)
        near = sum(w * d[j] for w, j in zip(wn, n)) / (sum(wn) + 1e-6)
        want += math.log1p(math.exp(far - near)) / 8
    assert abs(float(losses.weighted_triplet(x, labels)) - want) < 1e-4 * want


def test_far_negatives_have_a_finite_gradient():
    x = (1000 * torch.randn(8, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()
    losses.weighted_triplet(x, torch.arange(8) // 4).backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("versions", [3])
def test_cils_term_is_zero_for_repeated_images_and_halves_the_visible_one(versions):
    visible, infrared = torch.randn(versions, 4, 7), torch.randn(1, 4, 7).expand(versions, -1, -1)
    both = losses.consistency(torch.cat([visible, infrared], 1))
    assert torch.allclose(both, losses.consistency(visible) / 2, atol=1e-6)


def settings(**changes):
    return Namespace(
        **{"negatives": "queue", "loss": "eq1", "constraint": "sim", "delta": 0.5, "tau": 0.7, "tau_js": 0.1, **changes}
    )


def test_negatives_of_the_batch_are_the_groups_of_the_other_images():
    """Eq. (1) with the m - 1 other images: loops, and finite gradients although an image's own group is masked."""
    z, tau, tau_js = rows(4, 5, 8).requires_grad_(), 0.7, 0.1
    loss, parts = objective(settings(negatives="batch"), z, z[1:], *batch_negatives(z[1:], 0))
    mc, js, z0 = 0.0, 0.0, z.detach()
    for b in range(5):
        others = [z0[i, c] for c in range(5) if c != b for i in (1, 2, 3)]
        top = sum(math.exp(float(z0[0, b] @ z0[i, b]) / tau) for i in (1, 2, 3))
        mc -= math.log(top / (top + sum(math.exp(float(z0[0, b] @ k) / tau) for k in others))) / 5
        p = [torch.stack([z0[i, b] @ k for k in others]).div(tau_js).softmax(0) for i in (1, 2, 3)]
        middle = sum(p) / 3
        js += sum(float((one * (one / middle).log()).sum()) for one in p) / 3 / 5
    assert abs(float(parts["mc"]) - mc) < 1e-5 and abs(float(parts["js"]) - js) < 1e-5
    assert abs(float(loss) - (mc + js) / 2) < 1e-5
    loss.backward()
    assert torch.isfinite(z.grad).all() and (z.grad.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"constraint": "row"},
        {"constraint": "feature"},
        {"loss": "mc"},
        {"loss": "infonce"},
        {"constraint": "row", "negatives": "batch"},
    ],
    ids=str,
)
def test_every_reading_of_the_objective_has_a_finite_gradient(changes):
    z, k, which = rows(4, 5, 8).float().requires_grad_(), rows(3, 5, 8, seed=1).float(), torch.arange(5) % 3
    k, negatives = (z[1:], batch_negatives(z[1:], 0)) if "negatives" in changes else (k, [rows(16, 8, seed=2).float()])
    loss, parts = objective(settings(**changes), z, k, *negatives, which=which)
    loss.backward()
    assert torch.isfinite(z.grad).all() and z.grad[0].norm() > 0 and "mc" in parts
