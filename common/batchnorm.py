"""Batch normalisation over the images of a group, wherever they are: one process with several groups, or one group over
several processes. The same batch then gives the same network, loss and gradient for any number of processes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.losses import wide
from common.processes import gather_rows


def over_groups(model: nn.Module, world_size: int, groups: int = 1) -> nn.Module:
    """Give every BatchNorm of the model (mutated, returned) train-mode statistics over 1/groups of the global batch.

    The global batch is the batches of all ranks in rank order, cut into `groups` contiguous parts of equal size, as on
    that many GPUs. Names of parameters and buffers stay. Evaluation mode, and one group in one process, are PyTorch's
    own. Running statistics move once a step, by the mean over the groups; after processes.sync_buffers they do not
    depend on world_size. Call it before DistributedDataParallel; every rank must run every layer equally often.
    Raises: ValueError unless groups is a multiple or a divisor of world_size.
    """
    if groups < 1 or (groups % world_size and world_size % groups):
        near = [n for n in range(1, 4 * groups + 1) if n % groups == 0 or groups % n == 0]
        raise ValueError(
            f"{world_size} processes cannot hold {groups} group(s) of batch statistics: one number must divide the "
            f"other; use {', '.join(map(str, near[:6]))} ... processes"
        )
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            kind = GroupBatchNorm1d if isinstance(module, nn.BatchNorm1d) else GroupBatchNorm2d
            module.__class__ = kind  # a layer keeps its parameters, buffers, hooks and place
            module.chunks, module.ranks = max(1, groups // world_size), max(1, world_size // groups)
    return model


class _GroupBatchNorm(_BatchNorm):
    chunks: int  # groups in this process's batch
    ranks: int  # processes that share a group; above 1 only with one chunk

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or (self.chunks == 1 and self.ranks == 1):
            return super().forward(x)
        if len(x) % self.chunks:
            raise ValueError(f"a batch of {len(x)} does not divide into {self.chunks} groups of batch statistics")
        if self.ranks > 1:
            out, mean, variance = self.across_ranks(x)
        else:
            parts = [self.within(part) for part in x.chunk(self.chunks)]
            out = torch.cat([part[0] for part in parts])
            mean, variance = (torch.stack([part[i] for part in parts]).mean(0) for i in (1, 2))
        if self.track_running_stats and self.running_mean is not None:
            self.move(mean, variance)
        return out

    def within(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x normalised by itself, its mean and unbiased variance (C,) without gradient."""
        mean, variance = (torch.zeros(self.num_features, device=x.device, dtype=self.weight.dtype) for _ in range(2))
        out = F.batch_norm(x, mean, variance, self.weight, self.bias, True, 1.0, self.eps)  # momentum 1: x's own
        return out, mean, variance

    def across_ranks(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `within`, by the images of the whole group; one collective call, also in the backward pass.

        Statistics in float32 at least, combined from each rank's count, mean and variance, so that nothing cancels.
        """
        x32 = wide(x)
        own_variance, own_mean = torch.var_mean(x32, [d for d in range(x.ndim) if d != 1], correction=0)
        count = own_mean.new_full((1,), x.numel() // x.shape[1])
        table = gather_rows(torch.cat([count, own_mean, own_variance])[None])  # (W, 1 + 2 C)
        first = torch.distributed.get_rank() // self.ranks * self.ranks
        counts, means, variances = table[first : first + self.ranks].split([1, self.num_features, self.num_features], 1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean).square())).sum(0) / total
        scale = self.weight * (variance + self.eps).rsqrt()
        shape = [1, -1] + [1] * (x.ndim - 2)
        out = (x32 - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)
        return out.to(x.dtype), mean.detach(), variance.detach() * total / (total - 1)

    @torch.no_grad()
    def move(self, mean: Tensor, variance: Tensor) -> None:
        """Running statistics towards this step's; momentum None is the plain average over all steps."""
        self.num_batches_tracked += 1
        weight = 1.0 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(variance.to(self.running_var.dtype), weight)


class GroupBatchNorm1d(_GroupBatchNorm, nn.BatchNorm1d):
    """BatchNorm1d of `over_groups`."""


class GroupBatchNorm2d(_GroupBatchNorm, nn.BatchNorm2d):
    """BatchNorm2d of `over_groups`."""
