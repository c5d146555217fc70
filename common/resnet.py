"""The ResNet trunk of torchvision that three papers build on, its names kept, so that published weights fit."""

from collections import OrderedDict

from torch import nn
from torchvision import models

from common.flags import BACKBONES

STEM = ("conv1", "bn1", "relu", "maxpool")
LAYERS = ("layer1", "layer2", "layer3", "layer4")


def build(name: str) -> models.ResNet:
    """A ResNet with random weights; `fc.in_features` is the number of channels of its last map.

    Raises: ValueError for another name.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone {name!r}: expected one of {', '.join(BACKBONES)}")
    return models.get_model(name, weights=None)


def trunk(resnet: models.ResNet, last_stride: int = 1) -> nn.Sequential:
    """The convolutional part of a ResNet (shared with it): (B, 3, H, W) -> (B, C, H / 16, W / 16) or, with
    last_stride 2, (B, C, H / 32, W / 32)."""
    if last_stride == 1:
        unstride(resnet.layer4)
    return nn.Sequential(OrderedDict((part, getattr(resnet, part)) for part in (*STEM, *LAYERS)))


def unstride(layer: nn.Sequential) -> nn.Sequential:
    """Set the stride of a ResNet layer (mutated, returned) to 1."""
    for module in layer[0].modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.stride = (1, 1)
    return layer
