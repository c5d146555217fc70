"""What the test of a row of stage agw or cil gives without any training: its network with random weights, oriented
gradients, and chance.

Colour says nothing across modalities, so there is no colour histogram.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import datasets, evaluation, inputs, log_folder
from common.datasets import sysu
from dapg.downstream import protocols, stage
from dapg.downstream.data import Data
from dapg.flags import variants


def measure(run, args) -> tuple[dict[str, dict], datasets.Dataset]:
    """Clean metrics of the untrained network and of `Gradients`, and the rank-1 of chance, clean and -C, as in the
    row's result; the data set. Opens the run's log. Raises: ValueError for a row of another stage.
    """
    if args.stage not in ("agw", "cil"):
        raise ValueError(f"row {args.row} is of stage {args.stage}: only agw and cil search people")
    args.settings, data = variants(args), Data(args, run)
    log_folder.open_log(run, inputs.data_name(data.data))
    data.open(args, run)
    network, *_ = stage.build(args, run, data)
    found = {
        kind: protocols.evaluate(run, each, data, args.stage)
        for kind, each in (("untrained", network), ("gradients", Gradients()))
    }
    return found | {"chance": chance(data)}, data.data


class Gradients(nn.Module):
    """Histograms of oriented gradients (Dalal and Triggs 2005) in the place of a TwoStream: nothing is learnt.

    Grey images at 128 x 64, cells of 8 pixels with nine unsigned directions, blocks of 2 x 2 cells of unit length.
    """

    neck = nn.Identity()

    def pooled(self, visible: Tensor | None, infrared: Tensor | None) -> Tensor:
        """The features (B, 3780) of images (B, 3, H, W) of one modality; the other is None."""
        images = infrared if visible is None else visible
        grey = F.interpolate(images.float().mean(1, keepdim=True), (128, 64), mode="bilinear", antialias=True)
        near = F.pad(grey, (1, 1, 1, 1), mode="replicate")[:, 0]
        dx, dy = near[:, 1:-1, 2:] - near[:, 1:-1, :-2], near[:, 2:, 1:-1] - near[:, :-2, 1:-1]
        direction = torch.atan2(dy, dx).remainder(torch.pi) * (9 / torch.pi)
        lower, share = direction.long(), direction.frac()
        votes = F.one_hot(lower % 9, 9) * (1 - share)[..., None] + F.one_hot((lower + 1) % 9, 9) * share[..., None]
        cells = F.avg_pool2d((votes * torch.hypot(dx, dy)[..., None]).permute(0, 3, 1, 2), 8)  # (B, 9, 16, 8)
        corners = [cells[:, :, y : y + 15, x : x + 7] for y in (0, 1) for x in (0, 1)]
        return F.normalize(torch.cat(corners, 1)).flatten(1)


def chance(data: Data) -> dict[str, float]:
    """`all.rank1`, `v2t.rank1`, ... of a random order; corruption changes neither queries nor galleries."""
    (v_pids, v_camids), (t_pids, t_camids) = (protocols.columns(data.parts[name]) for name in ("rgb", "ir"))
    found = {"v2t": evaluation.chance(v_pids, t_pids), "t2v": evaluation.chance(t_pids, v_pids)}
    if data.data.name == "sysu":
        found = {}
        for mode in sysu.MODES:
            draws = [sysu.gallery_trial(data.parts["rgb"], mode, trial) for trial in range(protocols.TRIALS)]
            shares = [
                evaluation.chance(t_pids, v_pids[drawn], sysu.same_room(t_camids, v_camids[drawn])) for drawn in draws
            ]
            found[mode] = float(np.mean(shares))
    return {f"{name}{ending}.rank1": value for name, value in found.items() for ending in ("", "_c")}
