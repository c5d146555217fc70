"""Losses of fine-tuning: identity, triplet (Eq. 2), centre, and the centroid losses (Eqs. 3, 4) in all their forms.

A batch is P identities x K slots, that of all processes together. feats (P, K, D) are features before the neck, masked
(P, K, D) those of the same images with hidden blocks, real (P, K) bool says which slots hold an image; the others
change no value and no gradient. Everything is float32 at least, whatever autocast says.
Deviation: distances are Euclidean, not squared as printed: the margin was tuned so, and squared distances are prone to
collapse (Hermans et al. 2017); dist="sq" is the printed form.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.losses import wide
from prsnet.settings import DISTANCES, FORMS, MARGIN


def pair_distance(x: Tensor, y: Tensor, dist: str = "l2") -> Tensor:
    """Distances of matching rows (..., D) -> (...); the gradient of a zero distance is 0."""
    squares = (x - y).square().sum(-1)
    return squares if dist == "sq" else root(squares)


def cross_distance(x: Tensor, y: Tensor, dist: str = "l2") -> Tensor:
    """All distances (N, D), (M, D) -> (N, M), by differences: exact for duplicates, and batches are small."""
    return pair_distance(x[:, None], y[None], dist)


def root(squares: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0."""
    return torch.where(squares > 0, squares.clamp_min(1e-24).sqrt(), 0.0)


def identity_loss(logits: Tensor, labels: Tensor, real: Tensor, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy with label smoothing of the real images: logits (P, K, C), labels (P,) of the identities."""
    targets = labels[:, None].expand(real.shape)
    losses = F.cross_entropy(wide(logits).flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing)
    return mean_over(losses, real.flatten())


def triplet(feats: Tensor, real: Tensor, margin: float = MARGIN, dist: str = "l2") -> Tensor:
    """Batch-hard triplet loss, Eq. (2), mean over the real anchors that have a real positive and a real negative.

    Paper error: Eq. (2) prints ||f(N)||^2 for ||f(A) - f(N)||^2.
    """
    P, K, _ = feats.shape
    x, r = wide(feats.flatten(0, 1)), real.flatten()
    same = torch.arange(P, device=x.device).repeat_interleave(K)
    same = same[:, None] == same[None]
    d = cross_distance(x, x, dist)
    positive = same & r[None] & ~torch.eye(P * K, dtype=torch.bool, device=x.device)
    negative = ~same & r[None]
    counted = r & positive.any(1) & negative.any(1)
    farthest = d.masked_fill(~positive, -torch.inf).amax(1)
    closest = d.masked_fill(~negative, torch.inf).amin(1)
    return hinge(farthest, closest, counted, margin)


def centre_loss(feats: Tensor, labels: Tensor, real: Tensor, centres: Tensor, weight: float = 5e-4) -> Tensor:
    """weight * mean squared distance of the real images to the centre of their class, centres (C, D), labels (P,).

    The centres' own gradient is that of weight 1, so that a small weight does not slow them: they have an optimiser of
    their own (SGD, 0.5).
    """
    f, c = wide(feats), centres[labels][:, None]  # (P, 1, D)
    pull = mean_over((f - c.detach()).square().sum(2), real)
    follow = mean_over((f.detach() - c).square().sum(2), real)
    return weight * pull + (follow - follow.detach())


# ------------------------------------------------------------------------------------------ centroids, Eqs. (3) and (4)
class Slot(NamedTuple):
    """The batch as query slot i sees it: each of P identities has its image i as the query, the others in its means."""

    q: Tensor  # (P, D) f(A)
    c: Tensor  # (P, D) centroids, leave-one-out: without the query's own image
    m: Tensor | None  # (P, D) centroids of the same images with hidden blocks
    n: Tensor  # (P,) images in c and m; 0 where the query or all others are missing: the identity takes no part


def centroid_loss(
    form: str, feats: Tensor, masked: Tensor | None, real: Tensor, margin: float = MARGIN, dist: str = "l2"
) -> Tensor:
    """CTL, Eq. (3), or MCTL, Eq. (4), in one of FORMS; mean over the query slots i = 0 .. K-1.

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
        m = group_mean(masked, rest) if form.startswith("mctl") else None
        slot = Slot(wide(feats[:, i]), group_mean(feats, rest), m, rest.sum(1) * real[:, i])
        own, other = EQUATIONS[form](slot, dist)
        counted = (slot.n > 0) & ((slot.n > 0).sum() > 1)  # a hinge needs two identities
        slots.append((hinge(own, other, counted.repeat(len(own) // len(counted)), margin), counted.any()))
    losses, counted = (torch.stack(part) for part in zip(*slots))
    return mean_over(losses, counted)


def ctl(s: Slot, dist: str) -> tuple[Tensor, Tensor]:
    """Eq. (3): ||f(A) - c_P|| and ||f(A) - c_N||, (P,) each, c_N the nearest centroid of one other identity.

    Deviation: the paper calls c_N the centroid of all negatives (ctl_literal). The mean of fifteen people lies near the
    middle of everything, so that hinge says little about the people who are confused. The paper that Eq. (3) is taken
    from (Wieczorek et al. 2021) has centroids of single classes, and its code and this paper's mine the hardest.
    """
    return pair_distance(s.q, s.c, dist), nearest(cross_distance(s.q, s.c, dist), s.n)


def ctl_literal(s: Slot, dist: str) -> tuple[Tensor, Tensor]:
    """Eq. (3) as printed, squared whatever dist says: c_N is the mean of the images of all other identities."""
    return pair_distance(s.q, s.c, "sq"), pair_distance(s.q, mean_of_others(s.c, s.n), "sq")


def mctl(s: Slot, dist: str) -> tuple[Tensor, Tensor]:
    """Eq. (4) with the points (c + lambda m) / (1 + lambda), c_N and m_N of the one other identity that violates most.

    Deviation: normalised by 1 + lambda. As printed, f(A) - lambda2 m_N - c_N subtracts a point with nearly twice a
    centroid's norm, so the hinge is switched off by norm, not by identity. And lambda1, lambda2 are the shares of the
    images in this m_P and m_N, 1/2 each in a full batch. Shares of all negatives (1/16 and 15/16) go with an m_N of all
    of them: with one identity's, moving all masked features away from the clean ones satisfies every hinge.
    """
    lambda1, lambda2 = (x[..., None] for x in pair_lambdas(s.n))  # (anchor, identity, 1)
    positive = (s.c[:, None] + lambda1 * s.m[:, None]) / (1 + lambda1)
    negative = (s.c[None] + lambda2 * s.m[None]) / (1 + lambda2)
    own, other = (pair_distance(s.q[:, None], points, dist) for points in (positive, negative))
    worst = (own - other).masked_fill(~others_taking(s.n), -torch.inf).argmax(1, keepdim=True)
    return own.gather(1, worst)[:, 0], other.gather(1, worst)[:, 0]


def mctl_literal(s: Slot, dist: str) -> tuple[Tensor, Tensor]:
    """Eq. (4) as printed, squared whatever dist says: c_N, m_N and lambda2 are of all other identities."""
    lambda1, lambda2 = (x[:, None] for x in lambdas(s.n))
    c_N, m_N = mean_of_others(s.c, s.n), mean_of_others(s.m, s.n)
    return pair_distance(s.q - lambda1 * s.m, s.c, "sq"), pair_distance(s.q - lambda2 * m_N, c_N, "sq")


def ctl_authors(s: Slot, dist: str) -> tuple[Tensor, Tensor]:
    """As the published code: queries and centroids stacked, (2P,) each, every row an anchor mined among all rows.

    The first is the farthest row of the same identity (the anchor itself included), the second the nearest of another.
    """
    rows, there = torch.cat([s.q, s.c]), (s.n > 0).repeat(2)
    same = torch.eye(len(s.q), dtype=torch.bool, device=s.q.device).repeat(2, 2)
    d = cross_distance(rows, rows, dist)
    return (d.masked_fill(~same | ~there, -torch.inf).amax(1), d.masked_fill(same | ~there, torch.inf).amin(1))


def mctl_authors(s: Slot, dist: str) -> tuple[Tensor, Tensor]:
    """As the published code: a second stack of queries and masked centroids, mined for itself, and added."""
    clean, masked = ctl_authors(s, dist), ctl_authors(s._replace(c=s.m), dist)
    return clean[0] + masked[0], clean[1] + masked[1]


EQUATIONS = {
    "mctl": mctl,
    "mctl-literal": mctl_literal,
    "mctl-authors": mctl_authors,
    "ctl": ctl,
    "ctl-literal": ctl_literal,
    "ctl-authors": ctl_authors,
}


def lambdas(n: Tensor) -> tuple[Tensor, Tensor]:
    """lambda1, lambda2 (P,) of Eq. (4): shares of the positive and of all negative ones among the masked images."""
    n = n.to(torch.get_default_dtype())
    positive, negative = n.clamp_min(1), n.sum() - n
    return positive / (positive + negative), negative / (positive + negative)


def pair_lambdas(n: Tensor) -> tuple[Tensor, Tensor]:
    """lambda1, lambda2 (P, P) of Eq. (4): shares of the anchor's and of one other identity's masked images."""
    n = n.to(torch.get_default_dtype())
    both = (n[:, None] + n[None]).clamp_min(1)
    return n[:, None] / both, n[None] / both


def hinge(own: Tensor, other: Tensor, counted: Tensor, margin: float) -> Tensor:
    """Mean of [own - other + margin]_+ over the counted anchors, all (N,) -> (); 0 if there is none."""
    gap = torch.where(counted, own - other, 0.0)  # no Inf reaches the sum, forwards or backwards
    return mean_over(F.relu(gap + margin), counted)


def nearest(d: Tensor, n: Tensor) -> Tensor:
    """The smallest distance of every anchor to another identity that takes part, (P, P) and (P,) -> (P,)."""
    return d.masked_fill(~others_taking(n), torch.inf).amin(1)


def others_taking(n: Tensor) -> Tensor:
    """(P, P) bool: the identities that take part in the hinge of each anchor, all with images but its own."""
    return ~torch.eye(len(n), dtype=torch.bool, device=n.device) & (n > 0)


def group_mean(feats: Tensor, used: Tensor) -> Tensor:
    """Mean over the used slots, (P, K, D) with (P, K) bool -> (P, D); 0 where none is used."""
    kept = torch.where(used[..., None], wide(feats), 0.0)
    return kept.sum(1) / used.sum(1, keepdim=True).clamp_min(1)


def mean_of_others(means: Tensor, n: Tensor) -> Tensor:
    """Mean of the images of all identities but one's own, from means (P, D) of n (P,) images each -> (P, D)."""
    sums = n[:, None] * means
    return (sums.sum(0) - sums) / (n.sum() - n).clamp_min(1)[:, None]


def mean_over(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of the counted values of any shape, (); 0 if there is none."""
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp_min(1)
