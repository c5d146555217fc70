"""PRSNet: the losses against loops written from the equations, and images that are not there."""

import numpy as np
import pytest
import torch

from common.losses import batch_hard_triplet
from prsnet import losses

P, K, D = 5, 4, 7


def batch(seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    feats, masked = (torch.randn(P, K, D, generator=draw, dtype=dtype) for _ in range(2))
    real = torch.ones(P, K, dtype=torch.bool)
    return feats, masked, real


def holed(real):
    real = real.clone()
    real[1, 3] = real[3, 2] = real[3, 3] = False  # ids with three and two images
    real[4, 1:] = False  # an id with one image has no leave-one-out centroid
    return real


def distance(a, b, dist):
    squares = ((a - b) ** 2).sum()
    return squares if dist == "sq" else squares**0.5


def loop(form, feats, masked, real, margin=0.5, dist="l2"):
    """Eqs. (3) and (4) slot by slot, identity by identity, in NumPy."""
    feats, masked, real = feats.double().numpy(), masked.double().numpy(), real.numpy()
    slots = []
    for i in range(K):
        taking = {}
        for p in range(P):
            rest = [j for j in range(K) if j != i and real[p, j]]
            if real[p, i] and rest:
                taking[p] = (feats[p, i], feats[p, rest].mean(0), masked[p, rest].mean(0), len(rest))
        if len(taking) < 2:
            continue
        images = sum(n for *_, n in taking.values())
        terms = []
        for p, (q, c, m, n) in taking.items():
            others = [taking[o] for o in taking if o != p]
            if form == "ctl":
                gaps = [distance(q, c, dist) - distance(q, c_n, dist) for _, c_n, _, _ in others]
            elif form == "mctl":  # lambda1, lambda2: shares of the images of the two identities
                gaps = [
                    distance(q, (c + n / (n + k) * m) / (1 + n / (n + k)), dist)
                    - distance(q, (c_n + k / (n + k) * m_n) / (1 + k / (n + k)), dist)
                    for _, c_n, m_n, k in others
                ]
            else:  # as printed: squared, c_N and m_N over the images of all other identities
                c_n, m_n = (np.average([o[k] for o in others], 0, [o[3] for o in others]) for k in (1, 2))
                l1, l2 = (n / images, (images - n) / images) if form == "mctl-literal" else (0, 0)
                gaps = [((q - l1 * m - c) ** 2).sum() - ((q - l2 * m_n - c_n) ** 2).sum()]
            terms.append(max(0.0, max(gaps) + margin))
        slots.append(np.mean(terms))
    return np.mean(slots)


@pytest.mark.parametrize("dist", losses.DISTANCES)
@pytest.mark.parametrize("form", ["ctl", "ctl-literal", "mctl", "mctl-literal"])
@pytest.mark.parametrize("change", [lambda real: real, holed], ids=["full", "holes"])
def test_eq3_and_eq4_equal_a_loop(form, dist, change):
    feats, masked, real = batch()
    real = change(real)
    assert losses.centroid_loss(form, feats, masked, real, dist=dist).item() == pytest.approx(
        loop(form, feats, masked, real, dist=dist), rel=1e-4
    )


def test_lambdas_are_shares_of_the_images_in_the_masked_means():
    """Of a full batch: a half each where m_N is one identity's, 1/16 and 15/16 where it is that of all negatives."""
    full = torch.full((16,), 3)
    for found, expected in ((losses.pair_lambdas(full), (0.5, 0.5)), (losses.lambdas(full), (1 / 16, 15 / 16))):
        assert all(torch.allclose(lam, torch.tensor(share)) for lam, share in zip(found, expected))
    lambda1, lambda2 = losses.pair_lambdas(torch.tensor([3, 1]))
    assert lambda1[0, 1] == 0.75 and lambda2[0, 1] == 0.25 and lambda1[1, 0] == 0.25


def test_moving_all_masked_features_away_from_the_clean_ones_satisfies_no_hinge_of_eq4():
    """A shift says nothing about identities and must not lower the loss; lambdas of all negatives let it, down to 0."""
    draw = torch.Generator().manual_seed(0)
    people = torch.randn(16, 1, 32, generator=draw)
    feats, masked = (people + 0.5 * torch.randn(16, 4, 32, generator=draw) for _ in range(2))
    real, away = torch.ones(16, 4, dtype=torch.bool), torch.randn(32, generator=draw)
    found = [losses.centroid_loss("mctl", feats, masked + shift * away, real, margin=4.0) for shift in (0, 1, 4)]
    assert found[0] < found[1] < found[2]


@pytest.mark.parametrize("ending", ["", "-literal"])
def test_mctl_with_lambdas_zero_is_ctl(monkeypatch, ending):
    feats, masked, real = batch()
    monkeypatch.setattr(losses, "lambdas", lambda n: (torch.zeros(P), torch.zeros(P)))
    monkeypatch.setattr(losses, "pair_lambdas", lambda n: (torch.zeros(P, P), torch.zeros(P, P)))
    a, b = (losses.centroid_loss(form + ending, feats, masked, holed(real)) for form in ("mctl", "ctl"))
    assert a.item() == pytest.approx(b.item(), rel=1e-6)


def authors_loop(form, feats, masked, real, margin=0.5, dist="l2"):
    """Every row of [queries, centroids] is an anchor, mined among all rows; a second stack has masked centroids."""
    feats, masked, real, slots = feats.double().numpy(), masked.double().numpy(), real.numpy(), []
    for i in range(K):
        rest = {p: [j for j in range(K) if j != i and real[p, j]] for p in range(P) if real[p, i]}
        ids = [p for p in rest if rest[p]]
        stacks = [([feats[p, i] for p in ids], [feats[p, rest[p]].mean(0) for p in ids])]
        if form == "mctl-authors":
            stacks.append((stacks[0][0], [masked[p, rest[p]].mean(0) for p in ids]))
        terms, n = [], len(ids)
        for row in range(2 * n):
            total = 0.0
            for stack in stacks:
                rows = np.concatenate(stack)
                d = [distance(rows[row], other, dist) for other in rows]
                total += max(d[k] for k in range(2 * n) if k % n == row % n) - min(
                    d[k] for k in range(2 * n) if k % n != row % n
                )
            terms.append(max(0.0, total + margin))
        if n > 1:
            slots.append(np.mean(terms))
    return np.mean(slots)


@pytest.mark.parametrize("dist", losses.DISTANCES)
@pytest.mark.parametrize("form", ["ctl-authors", "mctl-authors"])
@pytest.mark.parametrize("change", [lambda real: real, holed], ids=["full", "holes"])
def test_authors_forms_equal_a_loop_over_their_stacks_in_either_distance(form, dist, change):
    feats, masked, real = batch()
    real = change(real)
    assert losses.centroid_loss(form, feats, masked, real, dist=dist).item() == pytest.approx(
        authors_loop(form, feats, masked, real, dist=dist), rel=1e-4
    )


def test_authors_form_without_holes_doubles_both_distances():
    feats, _, real = batch()
    slots = []
    for i in range(K):
        rest = [j for j in range(K) if j != i]
        rows = torch.cat([feats[:, i], feats[:, rest].mean(1)])
        d, same = torch.cdist(rows, rows), torch.eye(P, dtype=torch.bool).repeat(2, 2)
        ap, an = (d * same).amax(1), d.masked_fill(same, torch.inf).amin(1)
        slots.append((2 * ap - 2 * an + 0.5).relu().mean())
    assert losses.centroid_loss("mctl-authors", feats, feats, real).item() == pytest.approx(
        torch.stack(slots).mean().item(), rel=1e-4
    )


@pytest.mark.parametrize("form", [form for form in losses.FORMS if form != "none"])
def test_slots_without_an_image_change_no_value_and_no_gradient(form):
    feats, masked, real = batch()
    real, found, labels = holed(real), [], torch.arange(P)
    for fill in (0.0, 1000.0):
        f, m = (torch.where(real[..., None], part, fill).requires_grad_(True) for part in (feats, masked))
        loss = losses.centroid_loss(form, f, m, real) + losses.triplet(f, real)
        loss = loss + losses.identity_loss(f, labels, real) + losses.centre_loss(f, labels, real, torch.eye(P, D))
        loss.backward()
        assert (f.grad[~real] == 0).all() and (m.grad is None or (m.grad[~real] == 0).all())
        found.append((loss.item(), f.grad))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_triplet_of_a_full_batch_is_the_shared_batch_hard_triplet():
    feats, _, real = batch()
    labels = torch.arange(P).repeat_interleave(K)
    assert losses.triplet(feats, real).item() == pytest.approx(
        batch_hard_triplet(feats.flatten(0, 1), labels, 0.5).item(), rel=1e-5
    )


def test_gradients_of_all_forms_are_those_of_finite_differences():
    feats, masked, real = batch(dtype=torch.float64)
    feats, masked, real = feats[:4, :3, :3].clone().requires_grad_(True), masked[:4, :3, :3], holed(real)[:4, :3]
    for form in losses.FORMS:
        assert torch.autograd.gradcheck(lambda f, form=form: losses.centroid_loss(form, f, masked, real), (feats,))


def test_duplicates_and_batches_of_one_person_give_finite_gradients():
    feats = torch.ones(P, K, D, requires_grad=True)
    real = torch.ones(P, K, dtype=torch.bool)
    (losses.centroid_loss("mctl", feats, feats, real) + losses.triplet(feats, real)).backward()
    assert torch.isfinite(feats.grad).all()
    lonely = torch.zeros(P, K, dtype=torch.bool)
    lonely[0] = True
    assert losses.centroid_loss("mctl", feats, feats, lonely).item() == 0 and losses.triplet(feats, lonely).item() == 0


def test_identity_loss_is_the_smoothed_cross_entropy_of_the_images_that_are_there():
    feats, _, real = batch()
    real, labels, terms = holed(real), torch.tensor([6, 2, 0, 5, 1]), []
    for p, k in real.nonzero().tolist():
        log_p = feats[p, k].double().log_softmax(0)
        terms.append(-0.9 * log_p[labels[p]].item() - 0.1 * log_p.mean().item())
    assert losses.identity_loss(feats, labels, real).item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_centre_loss_pulls_features_by_its_weight_and_centres_by_one():
    feats, _, real = batch()
    real, labels, centres = holed(real), torch.tensor([2, 0, 1, 5, 3]), torch.randn(6, D, requires_grad=True)
    feats.requires_grad_(True)
    loss = losses.centre_loss(feats, labels, real, centres)
    plain = torch.stack([(feats[p, k] - centres[labels[p]]).square().sum() for p, k in real.nonzero()]).mean()
    assert loss.item() == pytest.approx(5e-4 * plain.item(), rel=1e-3)
    loss.backward()
    by_feats, by_centres = torch.autograd.grad(plain, (feats, centres))
    torch.testing.assert_close(feats.grad, 5e-4 * by_feats, atol=1e-8, rtol=1e-5)
    torch.testing.assert_close(centres.grad, by_centres, atol=1e-6, rtol=1e-5)


def test_unknown_forms_and_missing_masked_features_are_named():
    feats, _, real = batch()
    with pytest.raises(ValueError, match="choose from mctl"):
        losses.centroid_loss("mtcl", feats, feats, real)
    with pytest.raises(ValueError, match="needs the features of the masked images"):
        losses.centroid_loss("mctl", feats, None, real)
