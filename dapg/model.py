"""Pre-training networks: encoder, the multi-positive contrast with momentum encoder and queue, SimCLR, BYOL.

All take normalised images, float32. `learner` is the encoder that gradients move, `load_encoder` sets it and its slow
copy, `after_step(keys, progress)` is what follows an optimiser's step.
"""

import copy
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common.processes import gather_rows
from dapg.trunk import resnet


class Encoder(nn.Module):
    """Trunk, then an MLP head; (N, 3, H, W) -> (N, out)."""

    def __init__(self, backbone: str = "resnet50", out: int = 128, hidden: int | None = None, norm: bool = False):
        super().__init__()
        self.trunk = resnet(backbone)
        self.head = mlp(self.trunk.out_features, hidden or self.trunk.out_features, out, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x.contiguous(memory_format=torch.channels_last)))


def mlp(inputs: int, hidden: int, outputs: int, norm: bool) -> nn.Sequential:
    """Linear, (BatchNorm,) ReLU, linear."""
    middle = [nn.BatchNorm1d(hidden)] if norm else []
    return nn.Sequential(nn.Linear(inputs, hidden), *middle, nn.ReLU(inplace=True), nn.Linear(hidden, outputs))


def shuffled(rows: Tensor, order: Tensor) -> Tensor:
    """This rank's share (N, ...) of the rows of all ranks, (N, ...) each, in another order; without gradient.

    order (W N,), the same on every rank: place i takes row order[i] of all rows in rank order.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with torch.no_grad():
        return gather_rows(rows)[order].chunk(world)[rank]


class Contrast(nn.Module):
    """Encoders q and k and the queue of keys: MoCo's machinery for groups of several positives.

    encoder_k follows encoder_q with momentum 0.999, parameters only; its BatchNorm statistics come from its own forward
    passes. Paper silent: the encoders and the negatives; q, k+, k- and x_q are MoCo's names.
    """

    def __init__(self, backbone: str = "resnet50", size: int = 65536, dim: int = 128, momentum: float = 0.999):
        super().__init__()
        self.encoder_q = Encoder(backbone, dim)
        self.encoder_k = copy.deepcopy(self.encoder_q)
        self.encoder_k.requires_grad_(False)
        self.momentum = momentum
        queue = torch.randn(size, dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("queue", F.normalize(queue))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def load_encoder(self, state: dict[str, Tensor]) -> None:
        for encoder in (self.encoder_q, self.encoder_k):
            encoder.load_state_dict(state)

    @property
    def learner(self) -> Encoder:
        return self.encoder_q

    def forward(self, queries: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Unit q (N, D) with gradient, and unit k (M, D) of the keys without, after encoder_k's move; None without."""
        q = F.normalize(self.encoder_q(queries).float(), dim=1)
        if keys is None:
            return q, None
        with torch.no_grad():
            self.follow()
            return q, F.normalize(self.encoder_k(keys).float(), dim=1)

    @torch.no_grad()
    def follow(self) -> None:
        """encoder_k = m encoder_k + (1 - m) encoder_q, parameters only."""
        for slow, fast in zip(self.encoder_k.parameters(), self.encoder_q.parameters()):
            slow.lerp_(fast, 1 - self.momentum)

    @torch.no_grad()
    def after_step(self, keys: Tensor | None, progress: float = 0.0) -> None:
        """Put the keys (B, D) of all ranks into the queue, overwriting the oldest, wrapping around."""
        if keys is None:  # negatives of the batch
            return
        keys = gather_rows(keys)[: len(self.queue)]
        place = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[place] = keys.to(self.queue.dtype)
        self.pointer.copy_((self.pointer + len(keys)) % len(self.queue))


class SimCLR(nn.Module):
    """One encoder of both views, (N, 3, H, W) -> unit z (N, 128)."""

    def __init__(self, backbone: str):
        super().__init__()
        self.encoder = Encoder(backbone)

    @property
    def learner(self) -> Encoder:
        return self.encoder

    def load_encoder(self, state: dict[str, Tensor]) -> None:
        self.encoder.load_state_dict(state)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.encoder(images).float(), dim=1)

    def after_step(self, keys: None, progress: float) -> None:
        """Nothing moves but by gradient."""


class BYOL(nn.Module):
    """Online encoder and predictor, target encoder by momentum 0.996 to 1; projector 4096-BN-ReLU-256."""

    MOMENTUM = 0.996

    def __init__(self, backbone: str):
        super().__init__()
        self.online = Encoder(backbone, 256, 4096, norm=True)
        self.target = copy.deepcopy(self.online)
        self.target.requires_grad_(False)
        self.predictor = mlp(256, 4096, 256, norm=True)

    @property
    def learner(self) -> Encoder:
        return self.online

    def load_encoder(self, state: dict[str, Tensor]) -> None:
        for encoder in (self.online, self.target):
            encoder.load_state_dict(state)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """(2, B, 3, H, W) -> predictions (2, B, 256) and the target's projections, one pass a view as in BYOL."""
        predictions = torch.stack([self.predictor(self.online(view)) for view in views])
        with torch.no_grad():
            projections = torch.stack([self.target(view) for view in views])
        return predictions, projections

    @torch.no_grad()
    def after_step(self, keys: None, progress: float) -> None:
        """target = m target + (1 - m) online, m from 0.996 to 1 by half a cosine over progress in [0, 1]."""
        momentum = 1 - (1 - self.MOMENTUM) * (math.cos(math.pi * progress) + 1) / 2
        for slow, fast in zip(self.target.parameters(), self.online.parameters()):
            slow.lerp_(fast, 1 - momentum)


def queue_size(images: int, wanted: int | None) -> int:
    """Length of the queue: `wanted`, else 65,536 or the largest power of two not above a quarter of the images.

    Beyond that an image meets old keys of itself as negatives.
    """
    if wanted is not None:
        return wanted
    return min(65536, 1 << max(2, (images // 4).bit_length() - 1))


def checksum(tensor: Tensor) -> Tensor:
    """A number that differs when ranks hold different values: the exact sum of the bytes, weighted by place."""
    flat = tensor.detach().flatten().contiguous().view(torch.uint8).to(torch.int64)
    return (flat * (torch.arange(len(flat), device=flat.device) % 65521 + 1)).sum()
