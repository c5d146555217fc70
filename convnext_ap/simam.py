"""SimAM, attention without parameters (paper sec. 3.3.3): Eq. (3) minimised in closed form, then Eq. (6).

With M = H W neurons t of one channel, mean mu and variance s2 = sum (t - mu)^2 / (M - 1), the minimum of Eq. (3), the
`energy` below, is e = 4 (s2 + lam) / ((t - mu)^2 + 2 s2 + 2 lam), so that 1 / e = k (t - mu)^2 + 1/2 with
k = 1 / (4 (s2 + lam)), and Eq. (6) is x sigmoid(1 / e). The gate lies in [0.6225, 1): it shrinks, it never closes.

Deviation: the paper's mu and s2 leave the neuron t itself out; like the authors of SimAM we take one mean and one
variance a channel, over all M neurons. The gates of normal noise on the 8 x 4 maps of the last blocks then differ by
at most 0.045, by 0.006 on average; on the 64 x 32 maps of the first by 0.0007 and 0.0001.
"""

import torch
from torch import Tensor

from common.losses import wide

LAMBDA = 1e-4  # lam of Eq. (3); paper silent, SimAM's


def energy(t: Tensor, mu: Tensor, s2: Tensor, lam: float = LAMBDA) -> Tensor:
    """e, the least value of Eq. (3), of neurons t among others with mean mu and variance s2; shapes broadcast.

    The sum of Eq. (3) over the others, (-1 - (w x + b))^2 on average, is w^2 s2 + (1 + w mu + b)^2.
    """
    w = 2 * (t - mu) / ((t - mu).square() + 2 * s2 + 2 * lam)  # Eq. (4)
    b = -0.5 * (t + mu) * w  # Eq. (5)
    return w.square() * s2 + (1 + w * mu + b).square() + (1 - (w * t + b)).square() + lam * w.square()  # Eq. (3)


def simam_autograd(x: Tensor, lam: float = LAMBDA) -> Tensor:
    """Eq. (6) as SimAM's authors write it, differentiated by autograd: what `simam` is compared with."""
    squares = (x - x.mean((2, 3), keepdim=True)).square()
    variance = squares.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - 1)
    return x * torch.sigmoid(squares / (4 * (variance + lam)) + 0.5)


def simam(x: Tensor, lam: float = LAMBDA) -> Tensor:
    """x sigmoid(1 / e), Eq. (6), for maps x (B, C, H, W) of any float type and memory format; the same shape and type.

    Statistics and gate are computed in float32 (float64 for float64). The backward pass keeps x alone, and two
    numbers a channel, and computes the gate anew. Raises: ValueError for maps of a single position, which have no
    variance.
    """
    if x.ndim != 4 or x.shape[2] * x.shape[3] < 2:
        raise ValueError(
            f"SimAM takes the variance over the H x W positions of a map, and {tuple(x.shape)} has "
            f"{x.shape[2] * x.shape[3] if x.ndim == 4 else 'none'}; at least 2 are needed: use a larger "
            f"--height or --width, or --simam none"
        )
    return SimAM.apply(x, lam)


class SimAM(torch.autograd.Function):
    """The function behind `simam`, with its derivative by hand."""

    @staticmethod
    def forward(ctx, x, lam):
        variance, mean = torch.var_mean(wide(x), (2, 3), correction=1, keepdim=True)
        k = 0.25 / (variance + lam)
        ctx.save_for_backward(x, mean, k)
        return gate(wide(x) - mean, k).mul_(x).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        """grad a + 2 k (q d - mean(q d)) - 8 k^2 d sum(q d^2) / (M - 1), d = x - mu, a the gate, q = grad x a (1 - a).

        The second term is the way through d, the third the way through the variance.
        """
        x, mean, k = ctx.saved_tensors
        grad, d = wide(grad), wide(x) - mean
        a = gate(d, k)
        qd = (1 - a).mul_(a).mul_(grad).mul_(x).mul_(d)
        average = qd.mean((2, 3), keepdim=True)
        spread = (qd * d).sum((2, 3), keepdim=True) * (-8 * k * k / (x.shape[2] * x.shape[3] - 1))
        out = a.mul_(grad).add_(qd.sub_(average).mul_(2 * k)).add_(d.mul_(spread))
        return out.to(x.dtype), None


def gate(d: Tensor, k: Tensor) -> Tensor:
    """sigmoid(k d^2 + 1/2) of deviations d (B, C, H, W) and k (B, C, 1, 1)."""
    return d.square().mul_(k).add_(0.5).sigmoid_()
