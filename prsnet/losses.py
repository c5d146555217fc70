"""Losses of fine-tuning: identity, triplet (Eq. 2), centre, and the centroid losses (Eqs. 3, 4) in all their forms.

A batch is P identities x K slots. feats (P, K, D) are features before the neck, masked (P, K, D) those of the same
images with hidden blocks, real (P, K) bool says which slots hold an image; the others change no value and no gradient.
Everything is float32 at least, whatever autocast says.
Deviation: distances are Euclidean, not squared as printed: the margin was tuned so, and squared distances are prone to
collapse (Hermans et al. 2017); dist="sq" is the printed form.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MARGIN = 0.5  # Paper silent: alpha and alpha_c
FORMS = ("mctl", "mctl-literal", "mctl-authors", "ctl", "ctl-authors", "none")
DISTANCES = ("l2", "sq")


def pair_distance(x: Tensor, y: Tensor, dist: str = "l2") -> Tensor:
    """Distances of matching rows (..., D) -> (...); the gradient of a zero distance is 0."""
    squares = (x - y).square().sum(-1)
    return squares if dist == "sq" else root(squares)


def cross_distance(x: Tensor, y: Tensor, dist: str = "l2") -> Tensor:
    """All distances (N, D), (M, D) -> (N, M), by differences: exact for duplicates, and batches are small."""
    return pair_distance(x[:, None], y[None], dist)


def fp32(x: Tensor) -> Tensor:
    """x in float32 at least; float64 stays, which gradient checks need."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def root(squares: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0."""
    return torch.where(squares > 0, squares.clamp_min(1e-24).sqrt(), 0.0)


def identity_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy with label smoothing of the real images: logits (R, C), labels (R,)."""
    return F.cross_entropy(fp32(logits), labels, label_smoothing=smoothing)


def triplet(feats: Tensor, real: Tensor, margin: float = MARGIN, dist: str = "l2") -> Tensor:
    """Batch-hard triplet loss, Eq. (2), mean over the real anchors that have a real positive and a real negative.

    Paper error: Eq. (2) prints ||f(N)||^2 for ||f(A) - f(N)||^2.
    """
    P, K, _ = feats.shape
    x, r = fp32(feats.flatten(0, 1)), real.flatten()
    same = torch.arange(P, device=x.device).repeat_interleave(K)
    same = same[:, None] == same[None]
    d = cross_distance(x, x, dist)
    positive = same & r[None] & ~torch.eye(P * K, dtype=torch.bool, device=x.device)
    negative = ~same & r[None]
    counted = r & positive.any(1) & negative.any(1)
    hardest = d.masked_fill(~positive, -torch.inf).amax(1)
    nearest = d.masked_fill(~negative, torch.inf).amin(1)
    gap = torch.where(counted, hardest - nearest, 0.0)  # no Inf reaches the sum, forwards or backwards
    return mean_over(F.relu(gap + margin), counted)


def centre_loss(feats: Tensor, labels: Tensor, centres: Tensor, weight: float = 5e-4) -> Tensor:
    """weight * mean squared distance of real features (R, D) to the centre of their class, centres (C, D).

    The centres' own gradient is that of weight 1, so that a small weight does not slow them: they have an optimiser of
    their own (SGD, 0.5).
    """
    f, c = fp32(feats), centres[labels]
    pull = (f - c.detach()).square().sum(1).mean()
    follow = (f.detach() - c).square().sum(1).mean()
    return weight * pull + follow - follow.detach()


def centroid_loss(
    form: str, feats: Tensor, masked: Tensor | None, real: Tensor, margin: float = MARGIN, dist: str = "l2"
) -> Tensor:
    """CTL, Eq. (3), or MCTL, Eq. (4), mean over the query slots i = 0 .. K-1 (leave-one-out centroids).

    Forms: "ctl" Eq. (3) with the hardest centroid of one negative identity; "mctl" Eq. (4) with the points
    (c + lambda m) / (1 + lambda); "mctl-literal" Eq. (4) as printed, squared; "ctl-authors" and "mctl-authors" as the
    published code mines them (authors_slot).
    Deviation: "mctl" normalises by 1 + lambda. As printed, f(A) - lambda2 m_N - c_N subtracts a point with nearly twice
    a centroid's norm, so the hinge is switched off by norm, not by identity.
    Raises: ValueError for an unknown form, or a masked form without masked features.
    """
    if form not in FORMS or dist not in DISTANCES:
        raise ValueError(
            f"centroid loss {form!r} with distance {dist!r}: choose from {', '.join(FORMS)} and {', '.join(DISTANCES)}"
        )
    if form.startswith("mctl") and masked is None:
        raise ValueError(f"--centroid {form} needs the features of the masked images")
    if form == "none":
        return feats.sum() * 0
    slots = []
    for i in range(feats.shape[1]):
        rest = real.clone()
        rest[:, i] = False
        q, c, valid = fp32(feats[:, i]), group_mean(feats, rest), real[:, i] & rest.any(1)  # (P, D), (P, D), (P,)
        m = group_mean(masked, rest) if form.startswith("mctl") else None
        if form.endswith("authors"):
            slots.append(authors_slot(q, c, m, valid, margin))
        else:
            slots.append(slot(form, q, c, m, valid, rest.sum(1), margin, dist))
    losses, counted = (torch.stack(part) for part in zip(*slots))
    return mean_over(losses, counted)


def slot(form: str, q: Tensor, c: Tensor, m: Tensor | None, valid: Tensor, counts: Tensor, margin: float, dist: str):
    """Eqs. (3) and (4) for one query a identity: (loss (), whether at least two identities take part (), bool).

    Args: q, c, m (P, D); valid (P,) bool; counts (P,) masked images usable for each identity's own anchor.
    """
    positive = negative = c
    if m is not None:
        lambda1, lambda2 = lambdas(counts, valid)  # (P,) each, of the anchor
        if form == "mctl-literal":
            dist = "sq"
            own = (q - lambda1[:, None] * m - c).square().sum(1)
            other = (q[:, None] - lambda2[:, None, None] * m[None] - c[None]).square().sum(2)
            return hinge(own, other, valid, margin)
        positive = (c + lambda1[:, None] * m) / (1 + lambda1[:, None])
        negative = (c[None] + lambda2[:, None, None] * m[None]) / (1 + lambda2[:, None, None])  # (anchor, identity, D)
    other = cross_distance(q, negative, dist) if negative.ndim == 2 else pair_distance(q[:, None], negative, dist)
    return hinge(pair_distance(q, positive, dist), other, valid, margin)


def lambdas(counts: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """lambda1, lambda2 (P,) of Eq. (4): shares of positive and negative images among the masked ones of an anchor."""
    counts = (counts * valid).to(torch.get_default_dtype())
    positive = counts.clamp_min(1)
    negative = counts.sum() - counts
    return positive / (positive + negative), negative / (positive + negative)


def hinge(own: Tensor, other: Tensor, valid: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Mean of relu(own - nearest other + margin) over the valid identities; own (P,), other (P, P)."""
    counted = valid & (valid.sum() > 1)
    blocked = ~valid[None] | torch.eye(len(valid), dtype=torch.bool, device=valid.device)
    nearest = other.masked_fill(blocked, torch.inf).amin(1)
    gap = torch.where(counted, own - nearest, 0.0)
    return mean_over(F.relu(gap + margin), counted), counted.any()


def authors_slot(q: Tensor, c: Tensor, m: Tensor | None, valid: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """As the published code: queries and centroids stacked, every row an anchor, mined among all rows.

    ap is the farthest row of the same identity (the anchor itself included), an the nearest of another; with masked
    centroids a second stack [q, m] is mined for itself and both are added in one hinge: relu((ap + ap') - (an + an') +
    margin). Mean over the 2P rows.
    """
    counted, both = valid & (valid.sum() > 1), valid.repeat(2)
    same = torch.eye(len(q), dtype=torch.bool, device=q.device).repeat(2, 2)
    gap = 0.0
    for second in (c,) if m is None else (c, m):
        rows = torch.cat([q, second])
        d = cross_distance(rows, rows)
        farthest = d.masked_fill(~same | ~both[None], -torch.inf).amax(1)
        nearest = d.masked_fill(same | ~both[None], torch.inf).amin(1)
        gap = gap + torch.where(counted.repeat(2), farthest - nearest, 0.0)
    return mean_over(F.relu(gap + margin), counted.repeat(2)), counted.any()


def group_mean(feats: Tensor, used: Tensor) -> Tensor:
    """Mean over the used slots, (P, K, D) with (P, K) bool -> (P, D); 0 where none is used."""
    kept = torch.where(used[..., None], fp32(feats), 0.0)
    return kept.sum(1) / used.sum(1, keepdim=True).clamp_min(1)


def mean_over(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of the counted values (N,), 0 if there is none."""
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp_min(1)
