"""The objective (sec. II-B): identity, triplet and consistency losses, Eqs. (3)-(6), float32 (float64 stays) whatever
autocast says.

A batch is the 2B images [X, X'] with the labels twice; without pixel sampling it is X alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.losses import batch_hard_triplet, euclidean, wide
from common.processes import gather_rows
from pixel_sampling.settings import CONSISTENCY

MARGIN = 0.3  # m of Eq. (5)


def identity_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy, Eq. (4), mean over the batch. logits (2B, C), labels (2B,) in [0, C).

    Paper silent: label smoothing, 0.9 one-hot + 0.1 / C, as in the baseline that the paper names; 0 is Eq. (4).
    """
    return F.cross_entropy(wide(logits), labels, label_smoothing=smoothing)


def triplet_loss(feats: Tensor, labels: Tensor) -> Tensor:
    """Batch-hard triplet loss, Eq. (5), margin 0.3, Euclidean distances of the features (2B, D) as they are.

    Images and changed images are one pool: an identity's positives include its changed copies.
    """
    return batch_hard_triplet(feats, labels, MARGIN)


def consistency_loss(feats: Tensor, changed: Tensor, form: str = "l2") -> Tensor:
    """How far the features (B, D) of images lie from those of their changed copies (B, D), Eq. (3).

    "l2" mean distance, Eq. (3) as printed; "sq" mean squared distance; "mse" mean over batch and dimensions, as the
    name says; "sigmoid" mean of 1 / (1 + exp(-squared distance)), in [0.5, 1), what the authors' code runs. Gradients
    reach both sides; at distance zero that of "l2" is 0, not NaN. Raises: ValueError for another form or shape.
    """
    if feats.shape != changed.shape or feats.ndim != 2:
        raise ValueError(f"consistency needs two equal (B, D), got {tuple(feats.shape)} and {tuple(changed.shape)}")
    feats, changed = wide(feats), wide(changed)
    if form == "l2":
        return euclidean(feats, changed).mean()
    squared = (feats - changed).square()
    if form == "sq":
        return squared.sum(1).mean()
    if form == "mse":
        return squared.mean()
    if form == "sigmoid":
        return squared.sum(1).sigmoid().mean()
    raise ValueError(f"consistency {form!r} is none of {', '.join(CONSISTENCY)}")


def total_loss(
    output, labels: Tensor, reduction: str, consistency: str = "none", smoothing: float = 0.1
) -> tuple[Tensor, dict]:
    """Eq. (6), all weights 1, of a network's Output on [X, X']; returns the loss and its detached parts.

    reduction: how the network joins its branches, {"id": mean | sum, "triplet": mean | sum} (model.py). Under several
    processes the triplets are those of the global batch.
    """
    pool = gather_rows(labels)
    parts = {
        "id": torch.stack([identity_loss(logits, labels, smoothing) for logits in output.logits]),
        "triplet": torch.stack([triplet_loss(gather_rows(metric), pool) for metric in output.metrics]),
    }
    parts = {name: getattr(values, reduction[name])() for name, values in parts.items()}
    if consistency != "none":
        parts["consistency"] = consistency_loss(*output.metrics[0].chunk(2), consistency)
    return sum(parts.values()), {name: value.detach() for name, value in parts.items()}
