"""Losses of the pre-training, Eqs. (1)-(5), of SimCLR and BYOL, and of the downstream AGW and CIL; in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 1e-7  # bound of M inside the logarithm, as in AugMix


def multi_contrastive(pos: Tensor, neg: Tensor, tau: float) -> Tensor:
    """Multi-positive contrastive loss, Eq. (2), mean over the batch.

    Args: pos (B, P) similarities q . k_i+; neg (B, K) similarities q . k_j-, -inf where there is none; tau > 0.
    Returns: () float32, nats: logsumexp over all minus logsumexp over the positives, of similarities / tau.
    The sum over positives is inside the logarithm: the easiest positive can carry it, which Eq. (3) balances.
    """
    pos, neg = pos.float() / tau, neg.float() / tau
    return (torch.logsumexp(torch.cat([pos, neg], 1), 1) - torch.logsumexp(pos, 1)).mean()


def info_nce(pos: Tensor, neg: Tensor, which: Tensor, tau: float) -> Tensor:
    """Eq. (2) with one positive: the one that `which` (B,) int64 names; row 1 of Table III."""
    return multi_contrastive(pos.gather(1, which[:, None]), neg, tau)


def mixture(p: Tensor) -> Tensor:
    """M of P distributions p (P, B, K), Eq. (4): their mean. Paper error: it prints a tuple, the sum is meant."""
    return p.mean(0)


def js_divergence(p: Tensor, m: Tensor) -> Tensor:
    """Jensen-Shannon divergence of P distributions p (P, B, K), rows sum to 1, with their mean m, Eqs. (3) and (5).

    Mean over the batch, in [0, log P].
    """
    p, log_m = p.float(), m.float().clamp(SMALL, 1).log()
    return (p * (p.clamp_min(1e-12).log() - log_m)).sum(2).mean()  # a probability of 0 adds 0, its gradient is finite


def total(mc: Tensor, js: Tensor, delta: float) -> Tensor:
    """Eq. (1): delta L_MultiContrastive + (1 - delta) Constraint. Paper error: delta is printed as a partial sign."""
    return delta * mc + (1 - delta) * js


# ----------------------------------------------------------------------------------------------------------- baselines
def nt_xent(z: Tensor, others: Tensor, first: int, tau: float) -> Tensor:
    """NT-Xent of SimCLR. z (2, B, D) unit rows of both views of this process's images; others (2, W B, D) of all
    processes, with gradient; first: where this process's rows begin in them. Every view against all others."""
    both, everything = z.flatten(0, 1).float(), others.flatten(0, 1).float()
    batch, all_images = z.shape[1], others.shape[1]
    rows = torch.arange(batch, device=z.device) + first
    own = torch.cat([rows, rows + all_images])
    partner = torch.cat([rows + all_images, rows])
    sim = both @ everything.T / tau
    sim = sim.masked_fill(F.one_hot(own, 2 * all_images).bool(), -torch.inf)
    return F.cross_entropy(sim, partner)


def byol(p: Tensor, z: Tensor) -> Tensor:
    """2 - 2 cos of predictions p (2, B, D) and the target's projections z (2, B, D) of the other view, symmetrised."""
    p, z = F.normalize(p.float(), dim=2), F.normalize(z.detach().float(), dim=2)
    return (2 - 2 * (p * z.flip(0)).sum(2)).mean(1).sum()


# ---------------------------------------------------------------------------------------------------------- downstream
def weighted_triplet(feats: Tensor, labels: Tensor) -> Tensor:
    """AGW's weighted regularised triplet on un-normalised features (B, D) of both modalities, mean over the anchors.

    softplus(sum_p w_p d_p - sum_n w_n d_n); w_p is the softmax of distances over the positives, the anchor itself at
    distance 0 among them, w_n that of the negated distances over the negatives. As in AGW's code, which defines the
    published numbers, both have 1e-6 added to their denominators and w_n is not shifted by its largest exponent: where
    all negatives are farther than about 13, as features from ImageNet's trunk may be, w_n and its pull fade away.
    """
    x = feats.float()
    gap = x[:, None] - x[None, :]
    dist = gap.square().sum(2).clamp_min(1e-12).sqrt()
    same = labels[:, None] == labels[None, :]
    own = same * dist
    weights = same * torch.exp(own - own.amax(1, keepdim=True)), ~same * torch.exp(-dist)
    positive, negative = ((w / (w.sum(1, keepdim=True) + 1e-6) * dist).sum(1) for w in weights)
    return F.softplus(positive - negative).mean()


def consistency(logits: Tensor) -> Tensor:
    """CIL's JS loss of the classifications of the clean and two augmented versions, logits (3, B, C)."""
    p = logits.float().softmax(2)
    return js_divergence(p, mixture(p))
