"""Symmetric contrast learning (sec. 3.4, Figure 2 right): both memories, Eqs. (7)-(14), and the baseline's losses.

Two unit rows a class: its running mean and its running hard sample. Images are pulled to both rows of their class
and pushed from those of all other classes; a balance loss keeps the two predictions together. A batch is P identities
x K images, features (P, K, D) and labels (P, K); the losses also take (B, D) and (B,). Losses and memories are float32
whatever autocast says. Everything is deterministic, on CUDA too.
"""

import math

import torch
import torch.nn.functional as F

from common.losses import batch_hard_triplet, wide

ALPHA, GAMMA = 0.9, 1.5  # below Eq. (14)
B = math.exp(GAMMA / ALPHA) - 1  # from gamma = alpha ln(b + 1): 4.294490
BALANCE_FORMS = ("logits", "logits_pos", "memory", "none")


# --------------------------------------------------------------------------------------------------------------- losses
def similarity(q, rows, tau):
    """q (..., D) . rows (C, D) / tau -> (..., C) in float32 (float64 stays), no TF32, no gradient into the rows."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(q.device.type, enabled=False):
            return q.to(dtype) @ rows.detach().to(dtype).T / tau
    finally:
        torch.set_float32_matmul_precision(precision)


def info_nce(q, rows, labels, tau):
    """InfoNCE of a batch against one row per class, Eq. (7).

    Args: q (..., D) unit rows; rows (C, D) unit rows, held constant; labels (...) int64 in [0, C); tau > 0.
    Returns: () float32, nats, mean over the batch.
    Raises: ValueError if a label is outside [0, C), so outliers (-1) never train; on CUDA, where looking would stop
        the host at every step, cross_entropy's device-side assertion raises instead.
    Paper error: Eqs. (7), (9), (11) print tau outside exp, where it cancels, and sum over i = 0..K of K classes; we
        divide inside, as InfoNCE does, and sum over the classes there are.
    Paper silent: the reduction; we take the mean over the batch.
    """
    check_batch(q, labels, len(rows))
    if tau <= 0:
        raise ValueError(f"tau: {tau} is not positive")
    return F.cross_entropy(similarity(q, rows, tau).flatten(0, -2), labels.flatten())


def mean_contrast(q, means, labels, tau):
    """Mean-feature contrast loss of a batch, Eq. (9): info_nce against the class means (C, D)."""
    return info_nce(q, means, labels, tau)


def hard_contrast(q, hards, labels, tau):
    """Hard-sample contrast loss of a batch, Eq. (11): info_nce against the classes' hard samples (C, D)."""
    return info_nce(q, hards, labels, tau)


def psi(x):
    """The curve of Eq. (14) without its 1/4, elementwise: balanced L1 of Libra R-CNN with alpha 0.9, gamma 1.5.

    About 1.93 x^2 near 0, slope 1.5 from |x| = 1 on; continuous with its first derivative.
    """
    size = x.abs()
    inner = ALPHA / B * (B * size + 1) * torch.log1p(B * size) - ALPHA * size
    return torch.where(size < 1, inner, GAMMA * size + GAMMA / B - ALPHA)


def balance_loss(q, labels, memory, tau=0.05, form="logits"):
    """Balance loss between mean and hard predictions of a batch, Eq. (14).

    Args: q (..., D) unit rows; labels (...) int64 in [0, C); memory: a Memory of C classes, not changed; form, what x
        is:
        "logits": x[n, j] = (q_n . c_j - stopgrad(q_n . hard_j)) / tau, mean of psi over n and j;
        "logits_pos": the same with j = label of n only, mean over n;
        "memory": x = c_i - hard_i after this batch's update, differentiable, sum over D, mean over identities i; for
            a batch (P, K, D) only;
        "none": 0.
    Returns: () float32.
    Deviation: read literally, x is the difference of two memory rows, constants without a gradient, and the term
        would do nothing. The text speaks of two features "generated in the storage unit prediction" and of a
        consistency loss; "logits" is the consistency term of Dual Cluster Contrastive, which the paper cites,
        weighted 1/4 in an early revision there.
    """
    if form not in BALANCE_FORMS:
        raise ValueError(f"balance loss: {form!r} is none of {', '.join(BALANCE_FORMS)}")
    check_batch(q, labels, len(memory))
    if form == "none":
        return torch.zeros((), device=q.device)
    if form == "memory":
        means, hards = memory.updated_rows(q, labels)
        return 0.25 * psi(means - hards).sum(1).mean()
    x = similarity(q, memory.means, tau) - similarity(q.detach(), memory.hards, tau)  # (..., C)
    if form == "logits_pos":
        x = x.gather(-1, labels[..., None])  # (..., 1)
    return 0.25 * psi(x).mean()


def symmetric_contrast(q, labels, memory, tau=0.05, lambda1=0.75, lambda2=0.25, lb="logits"):
    """Total loss of a batch, Eq. (8): lambda1 L_hard + lambda2 L_ave + L_b.

    Args: q (..., D) unit rows; labels (...) int64 in [0, C); memory of C classes, not changed, memory.update follows
        the step; lb: the form of balance_loss. Paper silent: tau; 0.05 is its lineage's value.
    Returns: () float32 and the detached parts {"hard", "mean", "balance"}, unweighted.
    """
    hard = hard_contrast(q, memory.hards, labels, tau)
    mean = mean_contrast(q, memory.means, labels, tau)
    balance = balance_loss(q, labels, memory, tau, lb)
    parts = {"hard": hard.detach(), "mean": mean.detach(), "balance": balance.detach()}
    return lambda1 * hard + lambda2 * mean + balance, parts


def ce_tri(output, labels, label_smoothing=0.0, margin=0.3):
    """Cross-entropy plus batch-hard triplet, 1:1: the "baseline loss" of Table 4; smoothed by 0.1, the loss of Table 7.

    Args: output: model.Output, logits (B, C) of the BN feature and the pooled feature (B, D) before it, un-normalised.
    Returns: () float32 and the detached parts {"ce", "triplet"}.
    """
    check_batch(output.pooled, labels, output.logits.shape[1])
    ce = F.cross_entropy(output.logits, labels, label_smoothing=label_smoothing)
    triplet = batch_hard_triplet(output.pooled, labels, margin)
    return ce + triplet, {"ce": ce.detach(), "triplet": triplet.detach()}


def check_batch(q, labels, num_classes):
    """ValueError unless q is (..., D), labels (...), not empty, and on the CPU every label lies in [0, num_classes)."""
    if q.ndim < 2 or labels.shape != q.shape[:-1] or labels.numel() == 0:
        raise ValueError(f"expected q (.., D), labels (..), not empty, got {tuple(q.shape)} and {tuple(labels.shape)}")
    if labels.device.type == "cpu" and (labels.min() < 0 or labels.max() >= num_classes):
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(f"labels from {low} to {high}, not all in [0, {num_classes}); outliers (-1) never train")


# --------------------------------------------------------------------------------------------------------------- memory
def class_means(feats, labels, num_classes=None):
    """Unit means of the classes of feats (N, D); labels (N,), -1 ignored; (C, D) float32, C by default max label + 1.

    Raises: ValueError if a class has no feature, a label is below -1 or above C - 1, or a feature is not finite.
    """
    return F.normalize(torch.stack([group.mean(0) for group in class_groups(feats, labels, num_classes)]))


def class_groups(feats, labels, num_classes=None):
    """The features of class 0, 1, ... C - 1 as C float32 tensors (n_i, D), in their order in feats."""
    labels = torch.as_tensor(labels).cpu()
    if feats.ndim != 2 or labels.shape != feats.shape[:1]:
        raise ValueError(f"expected feats (N, D) and labels (N,), got {tuple(feats.shape)} and {tuple(labels.shape)}")
    if not torch.isfinite(feats).all():
        raise ValueError("features hold NaN or Inf")
    kept = labels[labels != -1]
    num_classes = int(kept.max()) + 1 if num_classes is None and len(kept) else num_classes or 0
    if len(kept) == 0 or kept.min() < 0 or kept.max() >= num_classes:
        raise ValueError(f"no labels in [0, {num_classes}), or labels outside it besides the outliers' -1")
    counts = torch.bincount(kept, minlength=num_classes)
    if (counts == 0).any():
        raise ValueError(f"classes without a feature: {(counts == 0).nonzero().flatten().tolist()}")
    order = labels.argsort(stable=True)[len(labels) - len(kept) :]  # outliers come first, and go
    return feats.float()[order.to(feats.device)].split(counts.tolist())


class Memory:
    """The two memories of an epoch (Figure 2): class means c and hard samples q_hard, plain tensors, no parameters.

    Args: means, hards (C, D) unit rows, kept as they are in float32; momentum m in [0, 1], the weight of the OLD row
        in Eqs. (10), (13); hard_ref: "mean", the hard sample of an identity is the one least similar to its mean,
        Eq. (12), or "hard", to its hard row (as HHCL's code).
    Paper silent: m; 0.1 is the lineage's value, so a step replaces nine tenths of a row.
    """

    def __init__(self, means, hards, momentum=0.1, hard_ref="mean"):
        if means.ndim != 2 or means.shape != hards.shape or len(means) == 0:
            raise ValueError(f"expected means, hards (C, D), C > 0, got {tuple(means.shape)} and {tuple(hards.shape)}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: {momentum} is outside [0, 1]")
        if hard_ref not in ("mean", "hard"):
            raise ValueError(f"hard_ref: {hard_ref!r} is neither mean nor hard")
        self.means, self.hards = means.detach().float(), hards.detach().float()
        self.momentum = momentum
        self.hard_ref = hard_ref

    @classmethod
    def from_features(cls, feats, labels, momentum=0.1, hard_init="mean", hard_ref="mean", num_classes=None):
        """Memory of the classes of extracted features; feats (N, D), labels (N,), -1 ignored; raises as class_means.

        hard_init: "mean", both memories start at the class means (Deviation: as in HHCL); "hardest", q_hard
        starts at the member least similar to the mean, the first of equals (sec. 3.4.2 read literally).
        """
        if hard_init not in ("mean", "hardest"):
            raise ValueError(f"hard_init: {hard_init!r} is neither mean nor hardest")
        means = class_means(feats, labels, num_classes)
        if hard_init == "mean":
            return cls(means, means, momentum, hard_ref)
        groups = class_groups(feats, labels, num_classes)
        hards = torch.stack([group[(group @ mean).argmin()] for group, mean in zip(groups, means)])
        return cls(means, F.normalize(hards), momentum, hard_ref)

    def __len__(self):
        return len(self.means)

    def __getitem__(self, rows):
        """The memory of a slice of classes, memory[:751]; a copy."""
        return Memory(self.means[rows].clone(), self.hards[rows].clone(), self.momentum, self.hard_ref)

    @classmethod
    def join(cls, source, target):
        """One memory of both domains' classes for UDA: source rows first, target labels shift by len(source).

        Source rows live through all epochs, memory = join(memory[:num_source], new_target), and target rows for one.
        """
        means, hards = torch.cat([source.means, target.means]), torch.cat([source.hards, target.hards])
        return cls(means, hards, target.momentum, target.hard_ref)

    def state_dict(self):
        """The two tensors, for a checkpoint; Memory(**state, momentum=..., hard_ref=...) reads them back."""
        return {"means": self.means, "hards": self.hards}

    def updated_rows(self, q, labels):
        """New rows of the P identities of a batch, Eqs. (10), (12), (13), differentiable in q; nothing is changed.

        Args: q (P, K, D) unit rows, K images of each of P different identities; labels (P, K) in [0, C).
        Returns: means, hards (P, D), unit rows. The mean is taken in float64, out of reach of autocast.
        Raises: ValueError for other shapes, and on the CPU for an identity with two labels or in two places.
        """
        check_batch(q, labels, len(self))
        if q.ndim != 3:
            raise ValueError(f"expected q (P, K, D), identity after identity, got {tuple(q.shape)}")
        ids, m = labels[:, 0], self.momentum  # (P,)
        if labels.device.type == "cpu" and ((labels != ids[:, None]).any() or len(ids.unique()) < len(ids)):
            raise ValueError("every row of labels (P, K) must hold one identity, and no two rows the same")
        q = wide(q)
        reference = self.means if self.hard_ref == "mean" else self.hards
        hardest = (q.detach() * reference[ids, None]).sum(2).argmin(1)  # Eq. (12), (P,); the first of equals
        hard = q[torch.arange(len(q), device=q.device), hardest]
        means = m * self.means[ids] + (1 - m) * q.double().mean(1).to(q.dtype)  # Eq. (10)
        hards = m * self.hards[ids] + (1 - m) * hard  # Eq. (13)
        return F.normalize(means), F.normalize(hards)

    @torch.no_grad()
    def update(self, q, labels):
        """Move the rows of the batch's identities, Eqs. (10), (12), (13); call it once a step, after the losses.

        q (P, K, D), labels (P, K) as for updated_rows, of all ranks together, so that every rank holds the same memory.
        Rows are replaced in new tensors, so a loss computed from the old ones can still be differentiated.
        Paper silent: rows return to unit length, as in the lineage; Eq. (12) looks at the means from before the step.
        """
        means, hards = self.updated_rows(q.detach(), labels)
        self.means = self.means.index_put((labels[:, 0],), means.float())
        self.hards = self.hards.index_put((labels[:, 0],), hards.float())
