"""The ResNet trunk that all stages share, and reading pre-trained ones in the forms in which they are published."""

import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from common import resnet as resnets
from common import runfiles, weights

REMEDY = (
    "give --weights PATH, row:NAME of a finished pre-training, imagenet or none (dapg/README.md, Weights, says where "
    "public checkpoints come from)"
)


def resnet(name: str = "resnet50") -> nn.Sequential:
    """A ResNet with random weights that ends in the pooled feature (B, D); `out_features` is D."""
    network = resnets.build(name)
    trunk = resnets.trunk(network, last_stride=2)
    trunk.add_module("avgpool", network.avgpool)
    trunk.add_module("flatten", nn.Flatten())
    trunk.out_features = network.fc.in_features
    return trunk


def load(
    source: str, backbone: str, logs_dir: str, synthetic: str | None, encoder: dict[str, Tensor] | None = None
) -> dict[str, Tensor] | None:
    """The trunk that --weights names, and the line printed that says what was taken: what common.weights.read takes,
    or row:NAME, the trunk that this pre-training row exported on data of the same kind. None for "none".

    encoder: the state of a model.Encoder, which is returned with the file's trunk in it and, where the file has one of
    this shape, its head.
    """
    path = source
    if source.startswith("row:"):
        path = runfiles.of_row("dapg", source[4:], "trunk.pt", logs_dir, synthetic)
    found = weights.read(path, backbone, REMEDY, rename=of_two_streams)
    if found is None:
        return None
    own = encoder or resnet(backbone).state_dict()
    names = {key: key.removeprefix("trunk.") for key in own if not key.startswith("head.")}
    taken, line = weights.fit(found, own, names)
    weights.tell(line)
    return own | taken


def of_two_streams(name: str) -> str:
    """Names of AGW's visible stem and shared layers as in a ResNet; others as they are."""
    name = re.sub(r"(^|\.)visible\.([01])\.", lambda found: f"{found[1]}{('conv1', 'bn1')[int(found[2])]}.", name)
    return re.sub(r"(^|\.)layers\.([0-3])\.", lambda found: f"{found[1]}layer{int(found[2]) + 1}.", name)


def export(path: Path, encoder: nn.Module, meta: dict) -> None:
    """Write an encoder's trunk with torchvision's flat keys, beside it its head for a further pre-training, and a plain
    `meta` dict, in one atomic step."""
    parts = {"state_dict": encoder.trunk, "head": encoder.head}
    content = {
        name: {key: value.detach().cpu().clone() for key, value in part.state_dict().items()}
        for name, part in parts.items()
    }
    runfiles.replace(path, lambda file: torch.save({**content, "meta": meta}, file))


def cosine(epoch: float, epochs: int, warmup: float) -> float:
    """Learning-rate factor: linear warm-up over `warmup` epochs, then half a cosine to 0."""
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1e-9)))
