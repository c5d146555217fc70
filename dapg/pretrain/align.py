"""Stage align (sec. II-B): an image and its person in a generated pose are a positive pair."""

import numpy as np
import torch
from torch import Tensor

from common.images import ImageStore
from dapg.channels import channel_enhancement
from dapg.noise import device_corruptions
from dapg.noise.names import allowed_types
from dapg.poses.pose import POSES
from dapg.pretrain.step import Step
from dapg.pretrain.views import Views


class Align(Step):
    """generated: the images of `gan.generated_files`, four an image, on the run's device when gathered."""

    def __init__(self, args, run, number: int, generated: ImageStore):
        super().__init__(args, run, number)
        self.generated, self.view = generated, Views(args.settings["crop"])

    def images(self, pixels: Tensor, indices: Tensor) -> Tensor:
        """uint8 (2, B, 3, H, W): the anchor x_ori, and one of its four x_pose_changed with channel enhancement.

        Paper error: it names x_target_pose, a skeleton, as the positive. Paper silent: noise; none, or on a share
        stage2_noise of the positives.
        """
        everyone = len(pixels) * self.run.world_size
        chosen = indices.numpy() * POSES + self.own(self.rng.integers(0, POSES, everyone))
        positive = channel_enhancement(self.generated.gather(chosen), self.generator)
        if share := self.args.settings["stage2_noise"]:
            kinds = self.rng.choice(allowed_types(self.args.noise_exclude), everyone)
            kinds = np.where(self.rng.random(everyone) < share, kinds, -1)
            levels = self.rng.integers(1, self.args.severity_max + 1, everyone)
            positive = device_corruptions.corrupt(positive, self.own(kinds), self.own(levels), self.generator)
        return torch.stack([self.view(x, self.generator) for x in (pixels, positive)])

    def loss(self, model, pair: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Eq. (2) with one positive, no constraint: Eq. (3) needs noise images."""
        return self.one_positive(model, *pair)
