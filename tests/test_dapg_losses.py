"""Equations (1)-(5), SimCLR, BYOL, WRT and CIL's term against loops written from their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F

from dapg import losses


def rows(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


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
    assert abs(float(losses.js_divergence(p)) - want) < 1e-6


def test_js_is_bounded_zero_for_equal_and_permutation_invariant():
    p = torch.eye(3)[:, None]
    assert abs(float(losses.js_divergence(p)) - math.log(3)) < 1e-5
    logits = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(0))
    assert float(losses.constraint(logits[:1].expand(3, -1, -1))) < 1e-6
    assert torch.allclose(losses.constraint(logits), losses.constraint(logits[[2, 0, 1]]))
    masked = logits.masked_fill(torch.rand(5, 20, generator=torch.Generator().manual_seed(1)) < 0.3, -torch.inf)
    assert torch.isfinite(losses.constraint(masked)) and 0 <= float(losses.constraint(masked)) <= math.log(3)


def test_masked_similarities_leave_finite_gradients():
    logits = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    masked = logits.masked_fill(torch.eye(5, 20).bool(), -torch.inf)
    (losses.constraint(masked) + losses.multi_contrastive(masked[0], masked[1], 0.1)).backward()
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


def test_weighted_triplet_equals_loops():
    x, labels = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    want = 0.0
    for a in range(8):
        d = [float((x[a] - x[j]).norm()) for j in range(8)]
        p = [j for j in range(8) if labels[j] == labels[a]]
        n = [j for j in range(8) if labels[j] != labels[a]]
        wp, wn = ([math.exp(s * d[j]) for j in part] for part, s in ((p, 1), (n, -1)))
        far = sum(w * d[j] for w, j in zip(wp, p)) / sum(wp)
        near = sum(w * d[j] for w, j in zip(wn, n)) / sum(wn)
        want += math.log1p(math.exp(far - near)) / 8
    assert abs(float(losses.weighted_triplet(x, labels)) - want) < 1e-5


@pytest.mark.parametrize("versions", [3])
def test_cils_term_is_zero_for_repeated_images_and_halves_the_visible_one(versions):
    visible, infrared = torch.randn(versions, 4, 7), torch.randn(1, 4, 7).expand(versions, -1, -1)
    both = losses.consistency(torch.cat([visible, infrared], 1))
    assert torch.allclose(both, losses.consistency(visible) / 2, atol=1e-6)
