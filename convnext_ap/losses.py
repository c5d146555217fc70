"""Losses of sec. 3.4: ID loss per head, circle loss Eqs. (7)-(8) with its margins, triplet loss as the alternative."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.losses import batch_hard_triplet, wide
from common.processes import gather_rows

MARGIN, GAMMA = 0.25, 32.0  # m and gamma of the circle loss; paper silent, from the code base that the paper builds on


class Parts(NamedTuple):
    """A loss and what it consists of, all () float32; `total` alone carries the gradient."""

    total: Tensor
    id: Tensor
    pair: Tensor
    accuracy: Tensor  # of the first head, on the batch as augmented


def id_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax loss of every head, (n,), of logits (B, n, K) and labels (B,): step 5 of sec. 3.3.2."""
    heads = logits.shape[1]
    every = F.cross_entropy(logits.flatten(0, 1).float(), labels.repeat_interleave(heads), reduction="none")
    return every.view(-1, heads).mean(0)


def pair_terms(feats: Tensor, labels: Tensor, m: float, gamma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gamma alpha_n (s_n - Delta_n) and -gamma alpha_p (s_p - Delta_p) of all ordered pairs, with their masks.

    alpha_p = [1 + m - s_p]_+ and alpha_n = [s_n + m]_+ carry no gradient; Delta_p = 1 - m, Delta_n = m.
    Returns: negative (B, B), positive (B, B), and where each counts (B, B) bool; the diagonal never does.
    """
    with torch.autocast(feats.device.type, enabled=False):
        unit = F.normalize(wide(feats))
        sim = unit @ unit.T
        positive = -gamma * (1 + m - sim.detach()).clamp_min(0) * (sim - (1 - m))
        negative = gamma * (sim.detach() + m).clamp_min(0) * (sim - m)
    same = labels[:, None] == labels[None, :]
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return negative, positive, ~same, same & ~itself


def circle_loss(feats: Tensor, labels: Tensor, m: float = MARGIN, gamma: float = GAMMA, mode: str = "pool") -> Tensor:
    """log(1 + sum_n exp(gamma a_n (s_n - m)) sum_p exp(-gamma a_p (s_p - 1 + m))), Eqs. (7) and (8), () float32.

    mode "pool": K and L are all pairs of the batch, each once. "anchor": the pairs of each row, mean over the rows
    that have a positive and a negative.
    Args: feats (B, D) of any length, compared by their cosine; labels (B,) integers.
    A batch without a positive or without a negative pair gives exactly 0 and a zero gradient.
    Paper error: Eq. (7) lacks the margins, without which it is not the circle loss; Eq. (8) prints a difference of
    sums over swapped indices. With a product of sums it equals Eq. (7).
    """
    if feats.ndim != 2 or labels.shape != feats.shape[:1]:
        raise ValueError(f"expected feats (B, D) and labels (B,), got {tuple(feats.shape)} and {tuple(labels.shape)}")
    negative, positive, different, same = pair_terms(feats, labels, m, gamma)
    if mode == "pool":
        upper = torch.ones_like(same).triu(1)
        sums = [log_sum_exp(x, mask & upper, (0, 1)) for x, mask in ((negative, different), (positive, same))]
        return F.softplus(sum(sums))
    sums = [log_sum_exp(x, mask, (1,)) for x, mask in ((negative, different), (positive, same))]
    counted = different.any(1) & same.any(1)
    return (F.softplus(sum(sums)) * counted).sum() / counted.sum().clamp_min(1)


def log_sum_exp(x: Tensor, mask: Tensor, dims: tuple) -> Tensor:
    """log of the sum of exp(x) where mask is set; about -1e9, and no NaN in the gradient, where it nowhere is."""
    return x.masked_fill(~mask, -1e9).logsumexp(dims)


def total_loss(
    logits: Tensor,
    feats: Tensor,
    labels: Tensor,
    *,
    loss: str = "id+circle",
    only_parts: bool = False,
    part_reduce: str = "sum",
    pair_on: str = "global",
    mode: str = "pool",
    m: float = MARGIN,
    gamma: float = GAMMA,
) -> Parts:
    """L_id + L_circle / B, or what `loss` says: id | id+circle | id+triplet (sec. 3.4).

    Args: logits (B, n, K), feats (B, n, d) of the heads, the global one first; labels (B,).
        only_parts: the part heads' ID losses alone, for the stage that trains the part classifier W.
        part_reduce: "sum" as in PCB, or "mean", over the part heads; pair_on: the circle or triplet loss looks at
        the "global" head or at "concat", all heads' features one after another.
    Under several processes the pairs are those of the global batch, B the global batch size.
    Paper silent: which losses make up which row. All rows use the default; with parts it sums 1 + p ID losses.
    """
    ids = id_losses(logits, labels)
    parts = ids[1:].sum() if part_reduce == "sum" else ids[1:].mean() if len(ids) > 1 else ids.new_zeros(())
    total = parts if only_parts else ids[0] + parts
    id_part, pair = total.detach(), total.new_zeros(())
    if loss != "id" and not only_parts:
        rows = gather_rows(feats[:, 0] if pair_on == "global" else feats.flatten(1))
        classes = gather_rows(labels)
        if loss == "id+triplet":
            pair = batch_hard_triplet(rows, classes, 0.3)
        else:
            pair = circle_loss(rows, classes, m, gamma, mode) / (len(classes) if mode == "pool" else 1)
        total = total + pair
    accuracy = (logits.detach()[:, 0].argmax(1) == labels).float().mean()
    return Parts(total, id_part, pair.detach(), accuracy)
