"""Losses that several projects share."""

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: squares overflow fp16, and bf16 loses means. float64 stays, as gradient checks need."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x: Tensor):
    """A context in which autocast leaves operations on x's device alone."""
    return torch.autocast(x.device.type if x.device.type != "meta" else "cpu", enabled=False)


def batch_hard_triplet(feats: Tensor, labels: Tensor, margin: float | None = 0.3) -> Tensor:
    """Batch-hard triplet loss: the farthest positive and the nearest negative of every anchor, mean over the anchors.

    From Hermans et al., "In Defense of the Triplet Loss" (2017): max(0, d(a, p) - d(a, n) + margin), or with
    margin=None its soft form log(1 + exp(d(a, p) - d(a, n))). d is the Euclidean distance of the features as they
    are; ties go to the first index; anchors without a positive or without a negative in the batch do not count.

    Args: feats (B, D), any float type, computed in float32 (float64 stays); labels (B,) integers.
    Returns: () float32. Gradients reach only the chosen pairs; memory O(B^2 + B D).
    Raises: ValueError on wrong shapes; on the CPU also if no anchor has both a positive and a negative. On CUDA that
        question would stop the host at every step, so there the result is NaN, which a training loop must refuse.
    """
    if feats.ndim != 2 or labels.shape != feats.shape[:1]:
        raise ValueError(f"expected feats (B, D) and labels (B,), got {tuple(feats.shape)} and {tuple(labels.shape)}")
    with full_precision(feats):
        feats = wide(feats)
        same = labels[:, None] == labels[None, :]  # (B, B)
        positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        counted = positive.any(1) & ~same.all(1)  # (B,)
        if counted.device.type == "cpu" and not counted.any():
            raise ValueError("triplet loss: no anchor has a positive and a negative in the batch; use a P x K sampler")
        with torch.no_grad():  # choose by squared distances, in float64: exact enough for duplicates, and free of TF32
            x = feats.double()
            squares = x.square().sum(1)
            dist = squares[:, None] + squares[None, :] - 2.0 * x @ x.T
            farthest = dist.masked_fill(~positive, -torch.inf).argmax(1)
            nearest = dist.masked_fill(same, torch.inf).argmin(1)
        gap = euclidean(feats, feats[farthest]) - euclidean(feats, feats[nearest])  # (B,)
        losses = F.softplus(gap) if margin is None else F.relu(gap + margin)
        return losses.masked_fill(~counted, 0.0).sum() / counted.sum()


def euclidean(x: Tensor, y: Tensor) -> Tensor:
    """Distances of matching rows, (B, D) and (B, D) -> (B,); the gradient of a zero distance is 0, not NaN."""
    return (x - y).square().sum(1).clamp_min(1e-12).sqrt()
