"""Networks: BoT (sec. III), PCB, MGN and HPM (Table III) as the authors run them, head and head + body (Table IV).

    model = build("bot", num_classes=150, weights="imagenet")
    output = model(x)                        # in train mode an Output; in eval mode features (B, D), float32

x (B, 3, H, W) is ImageNet-normalised. For "head" it is the head crop (see head.py); for "head_body" the image with its
head crop below it, (B, 3, H + W, W), so that one tensor goes through data loading, processes and evaluation.
"""

import copy
import re
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import resnet as resnets
from common import weights as files
from common.flags import BACKBONES
from common.losses import full_precision, wide
from common.resnet import STEM, unstride
from pixel_sampling.settings import ARCHS


class Output(NamedTuple):
    """What a network returns in train mode; float32."""

    logits: list[Tensor]  # (B, C) each
    metrics: list[Tensor]  # (B, D) each, for the triplet loss; the first also for Eq. (3)


def normal_linear(size: int, classes: int, std: float, bias: bool = False) -> nn.Linear:
    """A classifier with weights N(0, std^2) and bias 0."""
    layer = nn.Linear(size, classes, bias=bias)
    nn.init.normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def reduction(size: int, out: int = 256) -> nn.Sequential:
    """1x1 convolution without bias from N(0, 2 / out), as the authors start it, BN, ReLU."""
    layers = nn.Sequential(nn.Conv2d(size, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
    nn.init.kaiming_normal_(layers[0].weight, mode="fan_out")
    return layers


def stripes(x: Tensor, number: int, pool=torch.mean) -> list[Tensor]:
    """(B, D) of each of `number` stripes of the map x (B, D, H, W), top first; they overlap if H does not divide.

    Those of adaptive pooling, by torch.mean or torch.amax of slices: on a GPU it has no deterministic gradient itself.
    """
    x, ends = wide(x), [(i * x.shape[2] // number, -(-(i + 1) * x.shape[2] // number)) for i in range(number)]
    return [pool(x[:, :, top:bottom], (2, 3)) for top, bottom in ends]


class BoT(nn.Module):
    """Bag of tricks (Luo et al. 2019): pooled feature t, BNNeck with frozen shift, linear classifier (sec. III-A)."""

    reduction = {"id": "mean", "triplet": "mean"}

    def __init__(self, resnet: nn.Module, num_classes: int):
        super().__init__()
        size = resnet.fc.in_features
        self.backbone = copy.deepcopy(resnets.trunk(resnet))
        self.neck = nn.BatchNorm1d(size)
        self.neck.bias.requires_grad_(False)
        self.classifier = normal_linear(size, num_classes, 0.001)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """t and b (B, D): before and after the neck."""
        x = self.backbone(x)
        with full_precision(x):
            t = wide(x).mean((2, 3))
            return t, self.neck(t)

    def scores(self, x: Tensor) -> Tensor:
        """Class scores (B, C), also in eval mode; for heat maps."""
        return self.classifier(self.embed(x)[1])

    def forward(self, x: Tensor):
        t, b = self.embed(x)
        if not self.training:
            return b
        with full_precision(x):
            return Output([self.classifier(b)], [t])


class HeadBody(nn.Module):
    """Two unshared BoT networks, for the image and for its head; one triplet on both t, together of unit length."""

    reduction = {"id": "sum", "triplet": "mean"}

    def __init__(self, resnet: nn.Module, num_classes: int):
        super().__init__()
        self.body, self.head = BoT(resnet, num_classes), BoT(resnet, num_classes)

    def forward(self, x: Tensor):
        width = x.shape[3]
        halves = [
            net.embed(part.contiguous())
            for net, part in zip((self.body, self.head), (x[:, :, :-width], x[:, :, -width:]))
        ]
        if not self.training:
            return torch.cat([b for _, b in halves], 1)
        with full_precision(x):
            return Output(
                [net.classifier(b) for net, (_, b) in zip((self.body, self.head), halves)],
                [F.normalize(torch.cat([t for t, _ in halves], 1))],
            )


class PCB(nn.Module):
    """Part-based baseline (Sun et al. 2018): six stripes, one shared reduction, a classifier each.

    Deviation from PCB's paper, as the authors run it: 256 x 128 input, and a triplet on the six unit-length stripes.
    """

    reduction = {"id": "mean", "triplet": "mean"}

    def __init__(self, resnet: nn.Module, num_classes: int, parts: int = 6):
        super().__init__()
        size = resnet.fc.in_features
        self.backbone = copy.deepcopy(resnets.trunk(resnet))
        self.dropout = nn.Dropout(0.5)
        self.reduce = reduction(size)
        self.classifiers = nn.ModuleList(normal_linear(256, num_classes, 0.01, bias=True) for _ in range(parts))

    def pooled(self, x: Tensor) -> Tensor:
        """The means of the stripes of the last map, (B, D, 6, 1)."""
        return torch.stack(stripes(x, len(self.classifiers)), 2)[..., None]

    def scores(self, x: Tensor) -> Tensor:
        """Class scores (B, C), summed over branches, also in eval mode; for heat maps."""
        reduced = self.reduce(self.pooled(self.backbone(x))).squeeze(3)
        return sum(layer(part) for layer, part in zip(self.classifiers, reduced.unbind(2)))

    def forward(self, x: Tensor):
        x = self.backbone(x)
        with full_precision(x):
            pooled = self.dropout(self.pooled(x))
            metric = F.normalize(pooled).transpose(1, 2).flatten(1)  # (B, 6 D), every stripe of unit length
            if not self.training:
                return metric
            reduced = self.reduce(pooled).squeeze(3)
            return Output([layer(part) for layer, part in zip(self.classifiers, reduced.unbind(2))], [metric])


class Branches(nn.Module):
    """Many 256-d features, each with a classifier: reduced(x) gives them, the first TRIPLETS carry a triplet loss."""

    TRIPLETS: int

    def scores(self, x: Tensor) -> Tensor:
        """Class scores (B, C), summed over branches, also in eval mode; for heat maps."""
        return sum(layer(part) for layer, part in zip(self.classifiers, self.reduced(x)))

    def forward(self, x: Tensor):
        reduced = self.reduced(x)
        if not self.training:
            return torch.cat(reduced, 1)
        with full_precision(x):
            return Output([layer(part) for layer, part in zip(self.classifiers, reduced)], reduced[: self.TRIPLETS])


class MGN(Branches):
    """Multiple granularity network (Wang et al. 2018): three branches from layer3[1] on, global, 2 and 3 stripes.

    Deviation from MGN's paper, as the authors run it: average pooling, all classifiers on 256-d, margin 0.3.
    """

    reduction, TRIPLETS = {"id": "mean", "triplet": "mean"}, 3

    def __init__(self, resnet: nn.Module, num_classes: int):
        super().__init__()
        self.stem = copy.deepcopy(
            nn.Sequential(
                OrderedDict(
                    [*((p, getattr(resnet, p)) for p in (*STEM, "layer1", "layer2")), ("layer3_0", resnet.layer3[0])]
                )
            )
        )
        self.branches = nn.ModuleList(copy.deepcopy(nn.Sequential(resnet.layer3[1:], resnet.layer4)) for _ in range(3))
        for branch in self.branches[1:]:
            unstride(branch[1])
        first = reduction(resnet.fc.in_features)
        nn.init.kaiming_normal_(first[0].weight, mode="fan_in")
        nn.init.normal_(first[1].weight, 1.0, 0.02)
        self.reductions = nn.ModuleList(copy.deepcopy(first) for _ in range(8))  # all from the same start
        self.classifiers = nn.ModuleList(nn.Linear(256, num_classes) for _ in range(8))
        for layer in self.classifiers:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
            nn.init.zeros_(layer.bias)

    def reduced(self, x: Tensor) -> list[Tensor]:
        """The eight 256-d features."""
        x = self.stem(x)
        maps = [branch(x) for branch in self.branches]
        with full_precision(x):
            pooled = [stripes(m, 1)[0] for m in maps]  # three global ones, then 2 and 3 stripes
            pooled += stripes(maps[1], 2) + stripes(maps[2], 3)
            return [layer(p[:, :, None, None]).flatten(1) for layer, p in zip(self.reductions, pooled)]


class HPM(Branches):
    """Horizontal pyramid matching (Fu et al. 2019): 1, 2, 4 and 8 stripes, each with its own losses.

    Deviation from HPM's paper, as the authors run it: maximum pooling alone, a triplet for every stripe, 256 x 128.
    """

    reduction, TRIPLETS = {"id": "sum", "triplet": "sum"}, 15
    LEVELS = (1, 2, 4, 8)

    def __init__(self, resnet: nn.Module, num_classes: int):
        super().__init__()
        self.backbone = copy.deepcopy(resnets.trunk(resnet))
        self.reductions = nn.ModuleList(reduction(resnet.fc.in_features) for _ in range(sum(self.LEVELS)))
        self.classifiers = nn.ModuleList(normal_linear(256, num_classes, 0.001) for _ in range(sum(self.LEVELS)))

    def reduced(self, x: Tensor) -> list[Tensor]:
        """The fifteen 256-d features."""
        x = self.backbone(x)
        with full_precision(x):
            pooled = [part for level in self.LEVELS for part in stripes(x, level, torch.amax)]
            return [layer(p[:, :, None, None]).flatten(1) for layer, p in zip(self.reductions, pooled)]


NETWORKS = {"bot": BoT, "pcb": PCB, "mgn": MGN, "hpm": HPM, "head": BoT, "head_body": HeadBody}


# -------------------------------------------------------------------------------------------------------------- weights
AUTHORS = {  # names in the authors' networks -> ours
    "bottleneck": lambda: "neck",  # BoT
    r"conv5\.layers": lambda: "reduce",  # PCB
    r"classifier\.(\d)": lambda part: f"classifiers.{part}",
    r"global_(conv|bn|fc)": lambda kind: hpm_name(0, kind),  # HPM: the whole, then 2, 4 and 8 stripes
    r"pcb([248])_(conv|batchnorm|fc)_list\.(\d)": lambda level, kind, part: hpm_name(int(level) - 1 + int(part), kind),
    r"backone\.([01456])": lambda place: f"stem.{MGN_STEM[place]}",  # MGN; their spelling
    r"p([123])\.0\.(\d+)": lambda branch, block: f"branches.{int(branch) - 1}.0.{int(block) + 1}",
    r"p([123])\.1": lambda branch: f"branches.{int(branch) - 1}.1",
    r"reduction_(\d)": lambda part: f"reductions.{part}",
    r"fc_id_2048_(\d)": lambda part: f"classifiers.{part}",  # one global feature a branch, then 2 and 3 stripes
    r"fc_id_256_([12])_(\d)": lambda branch, part: f"classifiers.{2 * int(branch) + 1 + int(part)}",
}
MGN_STEM = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3_0"}


def hpm_name(part: int, kind: str) -> str:
    return f"classifiers.{part}" if kind == "fc" else f"reductions.{part}.{0 if kind == 'conv' else 1}"


def build(arch: str, num_classes: int, backbone: str = "resnet50", weights: str = "none") -> nn.Module:
    """A network. weights: what common.weights.read takes; the authors' networks as well.

    Raises: ValueError for unknown names and weights that do not fit, FileNotFoundError without the file.
    """
    if arch not in ARCHS or backbone not in BACKBONES:
        raise ValueError(f"no network {arch} on {backbone}: known are {', '.join(ARCHS)} on {', '.join(BACKBONES)}")
    network = NETWORKS[arch](resnets.build(backbone), num_classes)
    found = read_weights(weights, backbone)
    if found is not None:
        load_weights(network, found)
    return network


def read_weights(source: str, backbone: str) -> files.Found | None:
    """The tensors of what --weights names, the authors' by our names."""
    return files.read(source, backbone, rename=our_name)


def load_weights(network: nn.Module, found: files.Found) -> bool:
    """Load all of a file of the same network, or the trunk of any other, and print which; whether it was all."""
    own = network.state_dict()
    trunk = {key: name for key in own if (name := resnet_name(key)) is not None}
    taken, line = files.fit(found, own, trunk)
    network.load_state_dict(taken, strict=False)
    files.tell(line)
    return all(key in taken or key.endswith("num_batches_tracked") for key in own)


def resnet_name(key: str) -> str | None:
    """The name in a ResNet of a tensor of a network's trunk; None for a tensor of its heads."""
    key = re.sub(r"^branches\.\d\.0\.", "stem.layer3.", key)
    key = re.sub(r"^branches\.\d\.1\.", "stem.layer4.", key).replace("stem.layer3_0.", "stem.layer3.0.")
    found = re.search(r"^(body\.|head\.)?(backbone|stem)\.(.*)", key)
    return found and found[3]


def our_name(name: str) -> str:
    """The authors' name of a tensor of BoT, PCB, MGN or HPM as ours; other names, and a trunk's, as they are."""
    for pattern, ours in AUTHORS.items():
        name = re.sub(rf"(^|\.){pattern}\.", lambda found: f"{found[1]}{ours(*found.groups()[1:])}.", name)
    return name
