"""AGW's two-stream network (Ye et al. 2022), the downstream model of both fine-tunings: AGW itself and CIL."""

import math

import torch
from torch import Tensor, nn

from common.resnet import unstride
from dapg.trunk import resnet

NON_LOCAL = {2: 2, 3: 3}  # after the last two blocks of layer2 and the last three of layer3
STEM = ("conv1", "bn1")


class NonLocal(nn.Module):
    """x + BN(W((theta^T phi / N) g)), no softmax; the zero-initialised BatchNorm makes it the identity at first.

    Paper silent: the inner width. AGW's code divides the reduction by itself, so it is 1; 0 here is half the channels.
    """

    def __init__(self, channels: int, inner: int = 1):
        super().__init__()
        inner = inner or channels // 2
        self.g, self.theta, self.phi = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.w = nn.Conv2d(inner, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        g, theta, phi = (layer(x).flatten(2) for layer in (self.g, self.theta, self.phi))  # (B, inner, N)
        phi = phi / x[0, 0].numel()  # before the sum over the N places, which would leave the range of float16
        y = (g @ phi.transpose(1, 2)) @ theta  # = g (phi^T theta / N), without the N x N map
        return x + self.norm(self.w(y.view(*y.shape[:2], *x.shape[2:])))


class TwoStream(nn.Module):
    """Own stems for visible and infrared, shared layers, GeM p = 3, BNNeck, classifier.

    Only the live part of the authors' network: 24,359,311 parameters for ResNet-50 and 395 identities. Both stems start
    alike, with random weights too: AGW's code starts them from one ImageNet file, `load_trunk` from one trunk.
    """

    def __init__(self, num_classes: int, backbone: str = "resnet50", inner: int = 1):
        super().__init__()
        trunk = resnet(backbone)
        self.visible = nn.Sequential(*(getattr(trunk, name) for name in (*STEM, "relu", "maxpool")))
        other = resnet(backbone)  # its random weights are drawn, and what is drawn after them stays the same
        self.infrared = nn.Sequential(*(getattr(other, name) for name in (*STEM, "relu", "maxpool")))
        self.infrared.load_state_dict(self.visible.state_dict())
        unstride(trunk.layer4)
        self.layers = nn.ModuleList([getattr(trunk, f"layer{i}") for i in range(1, 5)])
        self.non_local = nn.ModuleDict()
        for number, count in NON_LOCAL.items():
            blocks = self.layers[number - 1]
            channels = [m for m in blocks[-1].modules() if isinstance(m, nn.Conv2d)][-1].out_channels
            for place in range(max(0, len(blocks) - count), len(blocks)):
                self.non_local[f"{number}_{place}"] = NonLocal(channels, inner)
        self.features = trunk.out_features
        self.neck = nn.BatchNorm1d(self.features)
        self.neck.bias.requires_grad_(False)
        nn.init.normal_(self.neck.weight, 1.0, 0.01)
        self.classifier = nn.Linear(self.features, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, 0, 0.001)

    def load_trunk(self, state: dict[str, Tensor]) -> None:
        """Start both stems and the shared layers from the same pre-trained trunk."""
        for stem in (self.visible, self.infrared):
            for place, name in enumerate(STEM):
                stem[place].load_state_dict(part(state, name))
        for number, layer in enumerate(self.layers, start=1):
            layer.load_state_dict(part(state, f"layer{number}"))

    def pooled(self, visible: Tensor | None, infrared: Tensor | None) -> Tensor:
        """GeM features (Bv + Bi, D), visible rows first; either may be None."""
        parts = [stem(x) for stem, x in ((self.visible, visible), (self.infrared, infrared)) if x is not None]
        x = torch.cat(parts)
        for number, blocks in enumerate(self.layers, start=1):
            for place, block in enumerate(blocks):
                x = block(x)
                if f"{number}_{place}" in self.non_local:
                    x = self.non_local[f"{number}_{place}"](x)
        return (x.float().clamp_min(0).pow(3).flatten(2).mean(2) + 1e-12).pow(1 / 3)

    def forward(self, visible: Tensor, infrared: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (Bv + Bi, D), un-normalised, and class logits of the neck's output."""
        pooled = self.pooled(visible, infrared)
        return pooled, self.classifier(self.neck(pooled))


def part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one module of a trunk."""
    return {key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(f"{name}.")}


class Extractor(nn.Module):
    """One stream of a TwoStream as a feature extractor: (B, 3, H, W) -> (B, 2 D), unit pool and unit bn feature."""

    def __init__(self, network: TwoStream, modality: str):
        super().__init__()
        self.network, self.modality = network, modality

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        pooled = self.network.pooled(x, None) if self.modality == "rgb" else self.network.pooled(None, x)
        normal = nn.functional.normalize
        return torch.cat([normal(pooled, dim=1), normal(self.network.neck(pooled), dim=1)], 1)


def parameter_groups(network: TwoStream, lr: float, share: float = 0.1) -> list[dict]:
    """Neck and classifier at the full rate, everything else at a share of it: a tenth, for a pre-trained trunk."""
    head = {id(p) for part in (network.neck, network.classifier) for p in part.parameters()}
    rest = [p for p in network.parameters() if id(p) not in head and p.requires_grad]
    full = [p for p in network.parameters() if id(p) in head and p.requires_grad]
    return [{"params": rest, "lr": share * lr}, {"params": full, "lr": lr}]


def schedule(epoch: int, form: str = "agw") -> float:
    """Learning-rate factor of an epoch of 81: ten of warm-up, then AGW's 1, 0.1 from 20 and 0.01 from 50, or a cosine
    to 0, which leaves a trunk with random weights more time.
    """
    if epoch < 10:
        return (epoch + 1) / 10
    if form == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * (epoch - 10) / 71)
    return 1.0 if epoch < 20 else 0.1 if epoch < 50 else 0.01
