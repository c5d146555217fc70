"""What the training steps of all pre-trainings share: their draws, and the pass through the network."""

import math

import numpy as np
import torch
from torch import Tensor

from common import log_folder, runtime, transforms
from common.images import to_device
from common.processes import gather_rows
from dapg import losses
from dapg.model import shuffled


def spread(q: Tensor) -> Tensor:
    """sqrt(D) times the mean deviation of each dimension of all ranks' unit rows q (B, D): 1 isotropic, 0 collapsed."""
    return gather_rows(q.detach().float()).std(0).mean() * math.sqrt(q.shape[1])


class Step:
    """The steps of epoch `number`: images(pixels, indices) makes a batch's views, loss(model, views) the rest.

    Draws on the host are those of the global batch, the same on every rank, which takes its own rows; the device's
    generator is the rank's own. BatchNorm runs over the global batch, so that neither loss nor gradient depends on how
    many processes share it.
    """

    def __init__(self, args, run, number: int):
        self.args, self.run, self.number = args, run, number
        self.rng = np.random.default_rng([args.seed, number + 1, 0])
        self.order = torch.Generator().manual_seed(args.seed * 100003 + number)
        self.generator = runtime.generator(run, number)

    def __call__(self, model, pixels: Tensor, indices: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """The loss, its parts for the log, and the keys (B, D) for the queue, if there is one."""
        return self.loss(model, self.images(pixels, indices))

    def own(self, draw: np.ndarray) -> np.ndarray:
        """This rank's rows of a draw for the global batch."""
        return np.array_split(draw, self.run.world_size)[self.run.rank]

    def encode(self, model, queries: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """queries (V, B, 3, H, W) -> unit z (V, B, D) with gradient; keys (P, B, 3, H, W) -> unit k (P, B, D) without.

        Shuffled BatchNorm: the key images of all ranks are encoded in a random order, in groups of the global batch
        (bn_splits of them, however many processes hold them), so that a query and its key share no statistics.
        """
        inputs = [normalized(queries.flatten(0, 1))]
        if keys is not None:
            order = torch.randperm(self.run.world_size * keys.shape[0] * keys.shape[1], generator=self.order)
            there, back = (to_device(x, keys.device) for x in (order, order.argsort()))
            inputs.append(normalized(shuffled(keys.transpose(0, 1).flatten(0, 1), there)))  # image after image
        with self.run.autocast():
            z, k = model(*inputs)
        k = None if keys is None else shuffled(k, back).unflatten(0, (-1, len(keys))).transpose(0, 1)
        return z.unflatten(0, (len(queries), -1)), k

    def one_positive(self, model, anchors: Tensor, positives: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Eq. (2) with one positive, and the queue as negatives, for images (B, 3, H, W): result as of a step."""
        z, k = self.encode(model, anchors[None], positives[None])
        positive, negative = (z[0] * k[0]).sum(1, keepdim=True), z[0] @ log_folder.bare(model).queue.T
        mc = losses.multi_contrastive(positive, negative, self.args.tau)  # Eq. (2)
        return mc, {"mc": mc, "spread": spread(z[0])}, k[0]


def normalized(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) as networks take them: uint8 normalised, floats are so already."""
    return transforms.normalize(images) if images.dtype == torch.uint8 else images
