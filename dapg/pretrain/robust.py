"""Stage robust (sec. II-A): groups of noise images, and the loss of Eqs. (1)-(5)."""

import torch
from torch import Tensor

from common import log_folder
from common.images import to_device
from common.processes import gather_rows
from dapg import losses
from dapg.noise import groups
from dapg.noise.names import allowed_types
from dapg.pretrain.step import Step, spread
from dapg.pretrain.views import Views


class Robust(Step):
    def __init__(self, args, run, number: int):
        super().__init__(args, run, number)
        self.types, self.view = allowed_types(args.noise_exclude), Views(args.settings["crop"])

    def images(self, pixels: Tensor, indices: Tensor) -> Tensor:
        """x_q, x_1, x_2, x_mix of each image: uint8 (4, B, 3, H, W)."""
        everyone = len(pixels) * self.run.world_size
        drawn = groups.draw_noise(everyone, self.rng, self.args.severity_max, self.types)
        draw, ops = groups.Draw(*map(self.own, drawn)), self.args.settings["augmix_ops"] == "on"
        if self.args.noise_base == "views":
            views = tuple(self.view(pixels, self.generator) for _ in range(3))
            return torch.stack(groups.noise_group(views, draw, self.generator, ops)[:4])
        chain = groups.noise_chain(pixels, draw, self.generator, ops)
        return torch.stack([self.view(x, self.generator) for x in chain[:4]])

    def loss(self, model, group: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """x_q is the query, x_1, x_2 and x_mix its positives. Into the queue goes one of the three keys an image."""
        args, everyone = self.args, group.shape[1] * self.run.world_size
        which = to_device(torch.from_numpy(self.own(self.rng.integers(0, 3, everyone))), group.device)
        if args.negatives == "batch":
            z, keys = self.encode(model, group)[0], None
            k = z[1:]
            negatives, own = batch_negatives(k, self.run.rank)
        else:
            z, k = self.encode(model, group if args.loss == "eq1" else group[:1], group[1:])
            negatives, own = log_folder.bare(model).queue, None
            keys = k[which, torch.arange(len(which), device=k.device)]
        loss, parts = objective(args, z, k, negatives, own, which)
        return loss, {**parts, "spread": spread(z[0])}, keys


def batch_negatives(k: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The keys of all ranks (W B P, D), with gradient, and which of them an image's own group holds (B, W B P) bool."""
    positives, batch = k.shape[:2]
    everything = gather_rows(k.transpose(0, 1).contiguous())  # (W B, P, D)
    images = torch.arange(len(everything), device=k.device)
    own = images[rank * batch : (rank + 1) * batch, None] == images.repeat_interleave(positives)[None]
    return everything.flatten(0, 1), own


def objective(
    args, z: Tensor, k: Tensor, negatives: Tensor, own: Tensor | None = None, which: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of --loss and its parts.

    Args: z (4, B, D) of x_q, x_1, x_2, x_mix (x_q alone unless Eq. (3) is asked for); k (3, B, D) of the last three;
    negatives (K, D), all unit rows; own (B, K) bool, negatives that do not count for an image; which (B,) int64, the
    positive of --loss infonce.
    """

    def similar(x: Tensor) -> Tensor:
        return x @ negatives.T if own is None else (x @ negatives.T).masked_fill(own, -torch.inf)

    pos, neg = torch.einsum("bd,pbd->bp", z[0], k), similar(z[0])
    if args.loss == "infonce":
        loss = losses.info_nce(pos, neg, which, args.tau)
        return loss, {"mc": loss}
    if args.loss == "mc":
        mc = losses.multi_contrastive(pos, neg, args.tau)
        return mc, {"mc": mc}
    if args.constraint == "sim":  # what the probabilities of Eq. (3) are of; paper silent
        values = torch.stack([similar(x) for x in z[1:]])
    elif args.constraint == "feature":
        values = z[1:]
    else:
        values = torch.stack([torch.cat([key, neg], 1) for key in pos.T[..., None]])
    mc = losses.multi_contrastive(pos, neg, args.tau)  # Eq. (2)
    p = (values / args.tau_js).softmax(2)  # of x_1, x_2, x_mix
    m = losses.mixture(p)  # Eq. (4)
    js = losses.js_divergence(p, m)  # Eqs. (3), (5)
    return losses.total(mc, js, args.delta), {"mc": mc, "js": js}  # Eq. (1)
