"""SCHP, the human parser behind the masks: augmented CE2P on ResNet-101 (Li et al., Self-Correction for Human Parsing).

    net = SCHP(num_labels=18)
    load_official(net, "exp-schp-201908301523-atr.pth")         # 603 tensors
    logits = net.eval()(x).fusion                               # (B, 3, 512, 512) -> (B, 18, 128, 128)

In-place ABN of the original becomes BatchNorm2d with |weight| + 1e-5 as its weight, and LeakyReLU(0.01) where the
original activates. x is BGR, see letterbox().
"""

from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import checkpoints
from pixel_sampling.settings import SCHP_SIZE as SIZE

MEAN, STD = (0.406, 0.456, 0.485), (0.225, 0.224, 0.229)  # blue, green, red
EPS = 1e-5  # of the normalisation, and added to |weight| by in-place ABN
SLOPE = 0.01


class Parsing(NamedTuple):
    """Logits at a quarter of the input size: (B, L, h, w), (B, L, h, w), (B, 2, h, w). `fusion` is the prediction."""

    parsing: Tensor
    fusion: Tensor
    edge: Tensor


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=EPS)


def conv(inputs: int, outputs: int, size: int = 1, bias: bool = False, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=options.pop("padding", size // 2), bias=bias, **options)


def block(*sizes: int, kernel: int = 1) -> nn.Sequential:
    """Convolution and activated norm for each step of `sizes`; as in the original, the two take one index each."""
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        layers += [conv(inputs, outputs, kernel), Activated(outputs)]
    return nn.Sequential(*layers)


class Activated(nn.BatchNorm2d):
    """Batch norm, then LeakyReLU(0.01): ABN with its weight folded by fold_weights()."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), SLOPE)


class Bottleneck(nn.Module):
    """ResNet bottleneck, stride and dilation on the 3x3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width), norm(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride=stride, dilation=dilation, padding=dilation), norm(width)
        self.conv3, self.bn3 = conv(width, 4 * width), norm(4 * width)
        self.downsample = None
        if stride != 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(conv(inputs, 4 * width, stride=stride), norm(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + (x if self.downsample is None else self.downsample(x)))


def resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)


class Context(nn.Module):
    """Pyramid pooling over 1, 2, 3 and 6 bins."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(s), conv(2048, 512), Activated(512)) for s in (1, 2, 3, 6)
        )
        self.bottleneck = block(4096, 512, kernel=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(torch.cat([*(resize(stage(x), x) for stage in self.stages), x], 1))


class Decoder(nn.Module):
    """Context joined with the early map x2; returns the parsing logits and their feature (256 channels)."""

    def __init__(self, num_labels: int):
        super().__init__()
        self.conv1, self.conv2 = block(512, 256), block(256, 48)
        self.conv3 = block(304, 256, 256)
        self.conv4 = conv(256, num_labels, bias=True)

    def forward(self, context: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.conv3(torch.cat([resize(self.conv1(context), x2), self.conv2(x2)], 1))
        return self.conv4(feature), feature


class Edge(nn.Module):
    """Edges from x2, x3 and x4; returns the edge logits and their feature (768 channels)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = block(256, 256), block(512, 256), block(1024, 256)
        self.conv4 = conv(256, 2, 3, bias=True)
        self.conv5 = conv(6, 2, bias=True)

    def forward(self, x2: Tensor, x3: Tensor, x4: Tensor) -> tuple[Tensor, Tensor]:
        features = [self.conv1(x2), self.conv2(x3), self.conv3(x4)]
        logits = [resize(self.conv4(feature), x2) for feature in features]
        return self.conv5(torch.cat(logits, 1)), torch.cat([resize(feature, x2) for feature in features], 1)


class SCHP(nn.Module):
    """The network; 18 labels for ATR. Parameter names are the official ones, `fushion` included."""

    def __init__(self, num_labels: int = 18):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 3, stride=2), norm(64)
        self.conv2, self.bn2 = conv(64, 64, 3), norm(64)
        self.conv3, self.bn3 = conv(64, 128, 3), norm(128)
        inputs = 128
        for number, (width, count, stride, dilation) in enumerate(
            ((64, 3, 1, 1), (128, 4, 2, 1), (256, 23, 2, 1), (512, 3, 1, 2)), 1
        ):
            blocks = [
                Bottleneck(inputs if i == 0 else 4 * width, width, stride if i == 0 else 1, dilation)
                for i in range(count)
            ]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
            inputs = 4 * width
        self.context_encoding = Context()
        self.decoder = Decoder(num_labels)
        self.edge = Edge()
        self.fushion = nn.Sequential(
            conv(1024, 256), Activated(256), nn.Dropout2d(0.1), conv(256, num_labels, bias=True)
        )

    def forward(self, x: Tensor) -> Parsing:
        for number in (1, 2, 3):
            x = F.relu(getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x)))
        x2 = self.layer1(F.max_pool2d(x, 3, 2, 1))
        x3 = self.layer2(x2)
        x4 = self.layer3(x3)
        x5 = self.layer4(x4)
        parsing, feature = self.decoder(self.context_encoding(x5), x2)
        edge, edge_feature = self.edge(x2, x3, x4)
        return Parsing(parsing, self.fushion(torch.cat([feature, edge_feature], 1)), edge)


# -------------------------------------------------------------------------------------------------------------- weights
def expected_keys(net: SCHP) -> dict[str, Tensor]:
    """The tensors of an official checkpoint, by name: ours without the batch counters, which it does not hold."""
    return {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}


def fold_weights(net: nn.Module) -> None:
    """Replace every normalisation weight w by |w| + 1e-5, as in-place ABN uses it (mutates net)."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.abs_().add_(EPS)


def load_official(net: SCHP, path: str | Path) -> int:
    """Load an official SCHP checkpoint and fold its normalisation weights; returns the number of tensors.

    Raises: FileNotFoundError; ValueError for a file that is unreadable, needs to run code, or does not fit.
    """
    remedy = "get exp-schp-201908301523-atr.pth from the page of Self-Correction-Human-Parsing"
    state = checkpoints.load(path, "parser", remedy)
    state = state.get("state_dict") if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"parser: {path} has no `state_dict`; the official ATR checkpoint has one")
    state = OrderedDict(
        (k, v) for k, v in checkpoints.strip_prefixes(state).items() if not k.endswith("num_batches_tracked")
    )
    labels = state.get("fushion.3.weight")
    own = net.fushion[3].out_channels
    if labels is not None and len(labels) != own:
        raise ValueError(
            f"parser: {path} has {len(labels)} labels, ATR has {own}; LIP (20) and Pascal (7) checkpoints do not serve"
        )
    counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
    checkpoints.fit(net, {**counters, **state}, path)
    fold_weights(net)
    return len(state)


# ------------------------------------------------------------------------------------------------------------- geometry
def letterbox_grid(height: int, width: int, size: int = SIZE, inverse: bool = False) -> Tensor:
    """Sampling grid (1, h, w, 2) for grid_sample with aligned corners.

    Forward: size x size output of an image (height, width), pixel (x, y) at size/2 - 0.5 + s (x - (width - 1) / 2) with
    s = (size - 1) / max(width - 1, height - 1). Inverse: (height, width) output of a size x size map.
    """
    scale = (size - 1) / max(width - 1, height - 1, 1)
    axes = []
    for length in (width, height):
        middle = (length - 1) / 2
        if inverse:
            at, span = (torch.arange(length) - middle) * scale + (size - 1) / 2, size
        else:
            at, span = (torch.arange(size) - (size - 1) / 2) / scale + middle, length
        axes.append(2 * at / max(span - 1, 1) - 1)
    rows, columns = torch.meshgrid(axes[1].float(), axes[0].float(), indexing="ij")
    return torch.stack([columns, rows], 2)[None]


def letterbox(image: Tensor, size: int = SIZE) -> Tensor:
    """Network input (3, size, size) of an RGB image uint8 (3, H, W): BGR, normalised, centred; 0 outside the image."""
    bgr = image.flip(0).float().div(255)[None]
    grid = letterbox_grid(*image.shape[1:], size).to(image.device)
    bgr = F.grid_sample(bgr, grid, mode="bilinear", padding_mode="zeros", align_corners=True)[0]
    mean, std = (torch.tensor(v, device=image.device)[:, None, None] for v in (MEAN, STD))
    return (bgr - mean) / std


def labels_at(logits: Tensor, height: int, width: int, size: int = SIZE) -> Tensor:
    """Labels (height, width) uint8 of one image from its fusion logits (L, h, w): to size x size, back, argmax."""
    full = F.interpolate(logits[None].float(), (size, size), mode="bilinear", align_corners=True)
    grid = letterbox_grid(height, width, size, inverse=True).to(logits.device)
    return (
        F.grid_sample(full, grid, mode="bilinear", align_corners=True, padding_mode="border")[0]
        .argmax(0)
        .to(torch.uint8)
    )
