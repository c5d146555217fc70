"""The re-identification network (Figure 1): encoder, BNNeck, classifier; and how pre-trained weights enter it."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import checkpoints
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
    """Load the encoder of a pre-training checkpoint; returns one sentence that says what was loaded (mutates encoder).

    Args: flags: those of this run that must agree with the pre-training's; drop_norms: as the authors' code, whose
    loader skips every key with "norm" in it.
    Raises: ValueError for a checkpoint of another network, naming the flags that differ and the remedy.
    """
    state = checkpoints.read(path)
    stored = state["args"]
    if "mask_loss" not in stored:
        raise ValueError(
            f"{path} is no pre-training checkpoint of prsnet; give --weights best.pt of prsnet/pretrain.py, or none"
        )
    check_same(path, stored, flags)
    weights = {
        k.removeprefix("encoder."): v
        for k, v in checkpoints.strip_prefixes(state["state_dict"]).items()
        if k.startswith("encoder.")
    }
    target = encoder.encoder if isinstance(encoder, MAEFeature) else encoder
    fresh = []
    if (
        isinstance(encoder, Encoder) and "proj.weight" not in weights
    ):  # pre-trained with GAP -> LN: the projection is new
        weights = {k: v for k, v in weights.items() if not k.startswith("norm.")}
        weights["proj.weight"] = target.proj.weight.detach().clone()
        fresh.append("proj.weight")
    if drop_norms:
        own = target.state_dict()
        fresh += [k for k in weights if "norm" in k]
        weights = {k: own[k] if "norm" in k else v for k, v in weights.items()}
    checkpoints.fit(target, weights, path)
    left = sum(not k.startswith("encoder.") for k in checkpoints.strip_prefixes(state["state_dict"]))
    return (
        f"weights: {len(weights) - len(fresh)} tensors from {path} (epoch {state['epoch']}), {len(fresh)} start fresh, "
        f"{left} of the decoder left out"
    )


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
