"""The re-identification network (Figure 1): encoder, BNNeck, classifier; and how pre-trained weights enter it."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import weights
from prsnet.mae import MAEFeature, ViTEncoder
from prsnet.model import Encoder, Size, frozen_statistics, in_fp32


class Output(NamedTuple):
    """What ReID returns in train mode, for the R real images of a batch, float32 under autocast as well."""

    feats: Tensor  # (R, D) before the neck
    logits: Tensor  # (R, C)
    masked: Tensor | None  # (R, D) features of the images with hidden blocks


class ReID(nn.Module):
    """Eval mode: images (B, 3, H, W) -> BN(f) (B, D), to be compared by angle. Train mode: Output.

    polluted: the neck also sees the features of the masked images in training, as in the authors' code, which spoils
    the statistics it normalises by at test.
    """

    def __init__(self, encoder: nn.Module, feature: int, num_classes: int, polluted: bool = False):
        super().__init__()
        self.encoder, self.polluted = encoder, polluted
        self.neck = nn.BatchNorm1d(feature)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(feature, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)
        self.centres = nn.Parameter(torch.randn(num_classes, feature))  # of the centre loss, trained on their own

    def forward(self, x: Tensor, masked: Tensor | None = None):
        if not self.training:
            return self.neck(self.encoder(x))
        f = self.encoder(x)
        logits, fm = in_fp32(self.classifier, self.neck(f)), None
        if masked is not None:
            with frozen_statistics(self.encoder):  # a second pass of its own, which leaves the statistics of the first
                fm = self.encoder(x, masked)
            if self.polluted:
                self.neck(fm)
        return Output(f, logits, fm)


def build_encoder(
    model: str,
    size: Size,
    block: str,
    feature: int,
    height: int,
    width: int,
    mask_block: tuple[int, int],
    mae_head: str,
    mask_ratio: float,
) -> nn.Module:
    """Images -> (B, feature), without weights."""
    if model == "mae":
        return MAEFeature(ViTEncoder(height, width, mask_block, size, mask_ratio), feature, mae_head)
    return Encoder(block, size, feature)


def load_pretrained(encoder: nn.Module, path: Path, flags: dict, drop_norms: bool = False) -> str:
    """Load the encoder of a pre-training, or of another fine-tuning; returns the line that says what was loaded
    (mutates encoder). The linear map to the feature is not loaded from a pre-training.

    Args: path: what common.weights.read takes. flags: those of this run that must agree with the file's, where it holds
    some; drop_norms: as the authors' code, whose loader skips every key with "norm" in it.
    Raises: ValueError for a checkpoint of another network, naming the flags that differ and the remedy.
    """
    remedy = "give --weights best.pt of prsnet/pretrain.py with the same flags, or none"
    found = weights.read(path, "prsnet encoder", remedy)
    if "mask_block" in found.args:
        check_same(found.source, found.args, flags)
    target = encoder.encoder if isinstance(encoder, MAEFeature) else encoder
    own = target.state_dict()
    pre_trained = any("decoder." in name for name in found.tensors)  # reads the map through a layer norm: any scale
    if pre_trained or not any(name.endswith("proj.weight") for name in found.tensors):
        own.pop("proj.weight", None)
    taken, line = weights.fit(found, own, {key: key for key in own})
    if drop_norms:
        line += f"; dropped: {weights.compact([key for key in taken if 'norm' in key], own)}"
        taken = {key: value for key, value in taken.items() if "norm" not in key}
    target.load_state_dict(taken, strict=False)
    return line


def check_same(path: Path, stored: dict, flags: dict) -> None:
    """ValueError naming the flags in which a checkpoint's network differs from this run's."""
    wrong = {name: (stored.get(name), value) for name, value in flags.items() if stored.get(name) != value}
    if not wrong:
        return
    told = ", ".join(f"--{name.replace('_', '-')} {there} there, {here} here" for name, (there, here) in wrong.items())
    remedy = "use the same flags"
    if wrong.get("block") == ("rep", "plain"):
        remedy += f", or fold it first: python prsnet/deploy.py --checkpoint {path} --out FOLDED.pt"
    raise ValueError(f"{path} was trained for another network: {told}; {remedy}")
