"""The self-supervised baselines of Tables I and II, SimCLR and BYOL, and MoCo, on the images of stage robust."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common import transforms
from common.processes import gather_rows
from dapg import losses
from dapg.pretrain.step import Step, spread

# LUPerson's augmentation. Paper silent.
LUP = {"pad": 0, "crop_scale": (0.2, 1.0), "grey": 0.2, "blur": 0.5, "erase": 0.5, "erase_area": (0.02, 0.6)}


class TwoViews(Step):
    def images(self, pixels: Tensor, indices: Tensor) -> Tensor:
        """Two augmented views, normalised (2, B, 3, H, W)."""
        augment = transforms.Augment(**LUP)
        return torch.stack([augment(pixels, self.generator) for _ in range(2)])


class MoCo(TwoViews):
    def loss(self, model, views: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        return self.one_positive(model, *views)


class SimCLR(TwoViews):
    def loss(self, model, views: Tensor) -> tuple[Tensor, dict[str, Tensor], None]:
        """Each view against all others of the global batch."""
        with self.run.autocast():
            z = model(views.flatten(0, 1)).unflatten(0, (2, -1))
        everyone = gather_rows(z.transpose(0, 1).contiguous()).transpose(0, 1)  # (2, W B, D)
        loss = losses.nt_xent(z, everyone, self.run.rank * z.shape[1], self.args.tau)
        return loss, {"spread": spread(z[0])}, None


class BYOL(TwoViews):
    def loss(self, model, views: Tensor) -> tuple[Tensor, dict[str, Tensor], None]:
        with self.run.autocast():
            predictions, projections = model(views)
        unit = F.normalize(predictions[0].float(), dim=1)
        return losses.byol(predictions, projections), {"spread": spread(unit)}, None
