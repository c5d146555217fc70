"""Pre-training networks: encoder, the multi-positive contrast with momentum encoder and queue, SimCLR, BYOL."""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common.processes import GatherWithGradient
from common.transforms import normalize
from dapg.trunk import resnet


class Encoder(nn.Module):
    """Trunk, then an MLP head; (B, 3, H, W) uint8 or normalised float -> (B, out)."""

    def __init__(self, backbone: str = "resnet50", out: int = 128, hidden: int | None = None, norm: bool = False):
        super().__init__()
        self.trunk = resnet(backbone)
        self.head = mlp(self.trunk.out_features, hidden or self.trunk.out_features, out, norm)

    def forward(self, x: Tensor) -> Tensor:
        x = normalize(x) if x.dtype == torch.uint8 else x
        return self.head(self.trunk(x.contiguous(memory_format=torch.channels_last)))


def mlp(inputs: int, hidden: int, outputs: int, norm: bool) -> nn.Sequential:
    """Linear, (BatchNorm,) ReLU, linear."""
    middle = [nn.BatchNorm1d(hidden)] if norm else []
    return nn.Sequential(nn.Linear(inputs, hidden), *middle, nn.ReLU(inplace=True), nn.Linear(hidden, outputs))


def world() -> tuple[int, int]:
    """Rank and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_with_gradient(x: Tensor) -> Tensor:
    return x if world()[1] == 1 else GatherWithGradient.apply(x)


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """Rows of every rank in rank order, without gradient."""
    if world()[1] == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world()[1])]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


class Contrast(nn.Module):
    """Encoders q and k and the queue of keys: MoCo's machinery for groups of several positives.

    encoder_k follows encoder_q with momentum 0.999, parameters only; its BatchNorm statistics come from its own forward
    passes. Paper silent: the encoders and the negatives; q, k+, k- and x_q are MoCo's names.
    """

    def __init__(
        self, backbone: str = "resnet50", size: int = 65536, dim: int = 128, momentum: float = 0.999, bn_splits: int = 4
    ):
        super().__init__()
        self.encoder_q = Encoder(backbone, dim)
        self.encoder_k = copy.deepcopy(self.encoder_q)
        self.encoder_k.requires_grad_(False)
        self.momentum, self.bn_splits = momentum, bn_splits
        queue = torch.randn(size, dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("queue", F.normalize(queue))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def load_trunk(self, state: dict[str, Tensor]) -> None:
        for encoder in (self.encoder_q, self.encoder_k):
            encoder.trunk.load_state_dict(state)

    @property
    def trunk(self) -> nn.Module:
        return self.encoder_q.trunk

    def forward(self, queries: Tensor, keys: Tensor | None, order: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """queries (V, B, 3, H, W) -> z (V, B, D) with gradient; keys (P, B, 3, H, W) -> k (P, B, D) without.

        order: permutation of all processes' P B W key images (the same on every rank). keys=None: encoder_q alone.
        """
        z = F.normalize(self.encoder_q(queries.flatten(0, 1)).float(), dim=1).unflatten(0, queries.shape[:2])
        if keys is None:
            return z, None
        with torch.no_grad():
            self.follow()
            k = self.shuffled(keys.flatten(0, 1), order)
        return z, k.unflatten(0, keys.shape[:2])

    @torch.no_grad()
    def follow(self) -> None:
        """encoder_k = m encoder_k + (1 - m) encoder_q, parameters only."""
        for slow, fast in zip(self.encoder_k.parameters(), self.encoder_q.parameters()):
            slow.lerp_(fast, 1 - self.momentum)

    def shuffled(self, images: Tensor, order: Tensor) -> Tensor:
        """Unit keys of this rank's images, encoded among others: permuted over the ranks, in bn_splits chunks in all.

        On one process a permutation alone changes nothing for BatchNorm, so the batch is split.
        """
        rank, ranks = world()
        order = order.to(images.device)
        mine = gather(images)[order].chunk(ranks)[rank] if ranks > 1 else images[order]
        parts = mine.chunk(max(1, self.bn_splits // ranks))
        k = F.normalize(torch.cat([self.encoder_k(part) for part in parts]).float(), dim=1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return gather(k)[back].chunk(ranks)[rank]

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Put the keys (B, D) of all ranks into the queue, overwriting the oldest, wrapping around."""
        keys = gather(keys)[: len(self.queue)]
        place = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[place] = keys.to(self.queue.dtype)
        self.pointer.copy_((self.pointer + len(keys)) % len(self.queue))


class SimCLR(nn.Module):
    """Encoder of both views, (V, B, 3, H, W) -> unit z (V, B, 128)."""

    def __init__(self, backbone: str):
        super().__init__()
        self.encoder = Encoder(backbone)

    @property
    def trunk(self) -> nn.Module:
        return self.encoder.trunk

    def load_trunk(self, state: dict[str, Tensor]) -> None:
        self.trunk.load_state_dict(state)

    def forward(self, views: Tensor) -> Tensor:
        return F.normalize(self.encoder(views.flatten(0, 1)).float(), dim=1).unflatten(0, views.shape[:2])


class BYOL(nn.Module):
    """Online encoder and predictor, target encoder by momentum; projector 4096-BN-ReLU-256."""

    def __init__(self, backbone: str):
        super().__init__()
        self.online = Encoder(backbone, 256, 4096, norm=True)
        self.target = copy.deepcopy(self.online)
        self.target.requires_grad_(False)
        self.predictor = mlp(256, 4096, 256, norm=True)

    @property
    def trunk(self) -> nn.Module:
        return self.online.trunk

    def load_trunk(self, state: dict[str, Tensor]) -> None:
        for encoder in (self.online, self.target):
            encoder.trunk.load_state_dict(state)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """(2, B, 3, H, W) -> predictions (2, B, 256) and the target's projections, one pass a view as in BYOL."""
        predictions = torch.stack([self.predictor(self.online(view)) for view in views])
        with torch.no_grad():
            projections = torch.stack([self.target(view) for view in views])
        return predictions, projections

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
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
