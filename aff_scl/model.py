"""AFF, the attention-guided fine-grained feature network (paper sec. 3.3, Figure 2 left), and its weights.

ResNet trunk -> CASAM on the whole map, added to the map (global branch, Eqs. (1)-(4)) -> the map cut in two channel
halves -> CAM on the halves (local branch, Eqs. (5)-(6)) -> normalisation, average pooling, BNNeck, unit rows.
"""

import copy
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import resnet, weights
from common.flags import BACKBONES
from common.losses import full_precision, wide

COPY = re.compile(r"\.copies\.(\d+)")  # of a DomainBatchNorm, in the names of its tensors


class Output(NamedTuple):
    """What a model with a classifier returns in train mode; all float32."""

    feat: Tensor  # (B, D) unit rows
    pooled: Tensor  # (B, D) before the neck, for the triplet loss
    logits: Tensor | None  # (B, num_classes); None only without a classifier


# ------------------------------------------------------------------------------------------------------------ attention
class GlobalAvgPool(nn.Module):
    """(B, C, H, W) -> (B, C, 1, 1), mean over the map in float32."""

    def forward(self, x):
        return wide(x).mean((2, 3), keepdim=True)


class GlobalMaxPool(nn.Module):
    """(B, C, H, W) -> (B, C, 1, 1), maximum over the map; unlike AdaptiveMaxPool2d, deterministic on CUDA."""

    def forward(self, x):
        return wide(x).amax((2, 3), keepdim=True)


class GeM(nn.Module):
    """Generalised-mean pooling, p learnable, (B, C, H, W) >= 0 -> (B, C, 1, 1), float32: fp16 has no 1e-6^3."""

    def __init__(self, p=3.0, eps=1e-6):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([p]))
        self.eps = eps

    def forward(self, x):
        return wide(x).clamp_min(self.eps).pow(self.p).mean((2, 3), keepdim=True).pow(1.0 / self.p)


def open_gate(layer):
    """Start a gate's last layer near zero, so that every gate is about 0.5. Paper silent: N(0, 0.001^2), bias 0."""
    nn.init.normal_(layer.weight, std=0.001)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class CASAM(nn.Module):
    """Hybrid attention: channel, then spatial (paper sec. 3.3.1, after CBAM), (B, C, H, W) -> (B, C, H, W).

    Paper silent: the reduction; 256 (hidden width 8 at 2048 channels) is the one that fits Table 8, and APNet's.
    Deviation: a ReLU between W0 and W1, which Eq. (1) does not print; CBAM has it, and without it W1 W0 is one matrix.
    """

    def __init__(self, channels, reduction=256):
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.max_pool = GlobalMaxPool()
        self.avg_pool = GlobalAvgPool()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.ReLU(), open_gate(nn.Conv2d(hidden, channels, 1, bias=False))
        )
        self.channel_gate = nn.Sigmoid()
        self.conv = open_gate(nn.Conv2d(2, 1, 7, padding=3, bias=False))
        self.spatial_gate = nn.Sigmoid()

    def forward(self, x):
        channel = self.channel_gate(self.mlp(self.max_pool(x)) + self.mlp(self.avg_pool(x)))  # Eq. (1), (B, C, 1, 1)
        x = x * channel  # Eq. (2)
        planes = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)  # (B, 2, H, W)
        spatial = self.spatial_gate(self.conv(planes))  # Eq. (3), (B, 1, H, W)
        return x * spatial  # Eq. (4)


class SE(nn.Module):
    """Squeeze-and-excitation, Eqs. (5)-(6) as printed, (B, C, H, W) -> (B, C, H, W).

    Paper silent: the reduction; 16 is SENet's.
    """

    def __init__(self, channels, reduction=16):
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.ReLU(), open_gate(nn.Conv2d(hidden, channels, 1, bias=False))
        )
        self.gate = nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(self.mlp(wide(x).mean((2, 3), keepdim=True)))  # Eqs. (5), (6)


class SplitAttention(nn.Module):
    """CAM on both halves from one shared squeeze (radix-2 split attention), (B, C, H, W) -> (B, C, H, W).

    Deviation: Eqs. (5)-(6) squeeze every half for itself (cam="se"). This form, from the second pyramid level of
    APNet that the paper cites as its inspiration, is the only one found that gives Table 8's three numbers without
    an invented layer.
    """

    def __init__(self, channels, gate="sigmoid"):
        super().__init__()
        half = channels // 2
        self.mlp = nn.Sequential(
            nn.Conv2d(half, half, 1), nn.BatchNorm2d(half), nn.ReLU(), open_gate(nn.Conv2d(half, channels, 1))
        )
        self.gate = nn.Sigmoid() if gate == "sigmoid" else None

    def forward(self, x):
        first, second = x.chunk(2, 1)  # two halves of C/2 channels, as in APNet
        logits = self.mlp(wide(first + second).mean((2, 3), keepdim=True))  # Eq. (5) before its sigmoid, (B, C, 1, 1)
        if self.gate is not None:
            return x * self.gate(logits)  # Eq. (6)
        return x * logits.unflatten(1, (2, -1)).softmax(1).flatten(1, 2)  # each pair of channels shares a weight of 1


class PerHalf(nn.Module):
    """One attention module of its own for every channel half: cut, attend, concatenate."""

    def __init__(self, first, second):
        super().__init__()
        self.halves = nn.ModuleList([first, second])

    def forward(self, x):
        return torch.cat([attention(half) for attention, half in zip(self.halves, x.chunk(2, 1))], 1)


# -------------------------------------------------------------------------------------------------------------- network
class AFF(nn.Module):
    """The network of Figure 2, and its parts for Table 7.

    Args:
        arch: "aff" both branches; "g" trunk and CASAM; "l" trunk and CAM; "base" trunk alone.
        backbone: a torchvision ResNet; 2048 channels for resnet50 and larger, 512 for resnet18 and resnet34.
        cam: "split" or "se", the form of CAM; cam_reduction belongs to "se", gate ("sigmoid" | "softmax") to "split".
        casam_reduction: channels // casam_reduction (at least 1) is the hidden width of CASAM.
        post: what follows the concatenated halves (arch "aff" and "l"): "bn" (shift frozen), "relu", "none".
        pool: "avg" or "gem"; GeM needs non-negative maps and so refuses post="bn".
        swap: SE on the whole map and one CASAM per half, as one sentence under Table 7 has it.
        neck: "bn" (BNNeck: scale 1, shift frozen at 0) or "none".
        num_classes: 0, or the rows of a linear classifier on the neck's output: without a bias and from N(0, 0.001^2)
            after BNNeck; with a bias and torch's start where neck is "none"; both as in reid-strong-baseline.
        pretrained: None, or a source for load_backbone.
    Batch statistics are over the batch that a layer sees; common.batchnorm.over_groups makes them those of G GPUs.
    Deviation: the trunk keeps the ReLU of ResNet's stem, with which the ImageNet weights were trained, and which
        reid-strong-baseline leaves out; Table 8 fits with it and without.
    Paper error: the text under Table 7 says CASAM for local, CAM for global; abstract, Figure 2, sec. 3.1 and 3.3
        say the reverse, which is the default here.
    """

    def __init__(
        self, arch="aff", backbone="resnet50", cam="split", cam_reduction=16, gate="sigmoid", casam_reduction=256,
        post="bn", pool="avg", swap=False, neck="bn", num_classes=0, pretrained=None,
    ):  # fmt: skip
        super().__init__()
        choices = dict(
            arch=(arch, ("aff", "g", "l", "base")), backbone=(backbone, BACKBONES), cam=(cam, ("split", "se")),
            gate=(gate, ("sigmoid", "softmax")), post=(post, ("bn", "relu", "none")), pool=(pool, ("avg", "gem")),
            neck=(neck, ("bn", "none")),
        )  # fmt: skip
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{name}: {value!r} is none of {', '.join(allowed)}")
        if pool == "gem" and post == "bn" and arch in ("aff", "l"):
            raise ValueError("pool=gem needs a non-negative map, and post=bn centres it: use post=relu or post=none")
        self.backbone_name = backbone
        network = resnet.build(backbone)
        self.backbone, channels = resnet.trunk(network), network.fc.in_features  # sec. 3.1: last stride 1
        self.feature_size = channels
        self.global_branch = self.local_branch = self.post = self.neck = None
        if arch in ("aff", "g"):
            self.global_branch = SE(channels, cam_reduction) if swap else CASAM(channels, casam_reduction)
        if arch in ("aff", "l"):
            self.local_branch = local_attention(channels, cam, cam_reduction, gate, casam_reduction, swap)
            self.post = {"bn": nn.BatchNorm2d(channels), "relu": nn.ReLU(), "none": None}[post]
        self.pool = GeM() if pool == "gem" else GlobalAvgPool()
        if neck == "bn":
            self.neck = nn.BatchNorm1d(channels)
        for norm in (self.post, self.neck):
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.bias.requires_grad_(False)  # the shift stays at 0
        self.classifier = None
        if num_classes and neck == "bn":
            self.set_classifier(0.001 * torch.randn(num_classes, channels))
        elif num_classes:
            self.classifier = nn.Linear(channels, num_classes)
        if pretrained is not None:
            load_backbone(self, pretrained)

    def set_classifier(self, weight):
        """Give the model a new bias-free linear classifier with these rows (K, D), or none at all for None.

        For Table 4's first row: one per epoch, its rows the unit cluster means. The optimiser must be told about it.
        """
        self.classifier = None
        if weight is not None:
            classifier = nn.Linear(self.feature_size, len(weight), bias=False)
            classifier.weight = nn.Parameter(weight.detach().clone().float())
            self.classifier = classifier.to(self.backbone.conv1.weight.device)

    def feature_map(self, x, domain=None):
        """The last map before pooling, (B, D, H/16, W/16), of images x (B, 3, H, W); what Grad-CAM looks at."""
        self.select_domain(domain)
        x = self.backbone(x)
        if self.global_branch is not None:
            x = x + self.global_branch(x)  # Paper silent: sec. 3.1's "fused", here CASAM's input added to its output
        if self.local_branch is not None:
            x = self.local_branch(x)
            x = self.post(x) if self.post is not None else x
        return x

    def encode(self, x, domain=None):
        """The Output of one domain's images; pooling and all after it in float32 whatever autocast says."""
        x = self.feature_map(x, domain)
        with full_precision(x):
            pooled = self.pool(x).flatten(1)  # (B, D)
            feat = self.neck(pooled) if self.neck is not None else pooled
            logits = self.classifier(feat) if self.classifier is not None else None
            return Output(F.normalize(feat), pooled, logits)

    def forward(self, x, domain=None):
        """Unit rows (B, D) float32 of images x (B, 3, H, W); in train mode with a classifier, an Output.

        domain (only after convert_dsbn; without it ignored): 0 source, 1 target; evaluation defaults to the last,
            the target. In train mode also a tuple, e.g. (0, 1): the batch is cut in that many equal contiguous
            parts, one per domain, so that DistributedDataParallel sees one forward pass and every parameter used.
        Raises: ValueError in train mode for a batch that is empty or does not divide by the number of domains.
        """
        if not self.training:
            return self.encode(x, domain).feat
        domains = domain if isinstance(domain, tuple) else (domain,)
        if len(x) == 0 or len(x) % len(domains):
            raise ValueError(f"a batch of {len(x)} does not divide into {len(domains)} domain(s)")
        outputs = [self.encode(part, one) for part, one in zip(x.chunk(len(domains)), domains)]
        if self.classifier is None:
            return torch.cat([output.feat for output in outputs])
        return Output(*(torch.cat(tensors) for tensors in zip(*outputs)))

    def select_domain(self, domain):
        """Switch every DomainBatchNorm to its copy `domain`; None: the last copy, in evaluation only."""
        for module in self.modules():
            if isinstance(module, DomainBatchNorm):
                module.domain = domain


def local_attention(channels, cam, cam_reduction, gate, casam_reduction, swap):
    """The module of the local branch: attention on two equal channel halves, concatenated again."""
    half = channels // 2
    if swap:
        return PerHalf(CASAM(half, casam_reduction), CASAM(half, casam_reduction))
    if cam == "se":
        return PerHalf(SE(half, cam_reduction), SE(half, cam_reduction))
    return SplitAttention(channels, gate)


# -------------------------------------------------------------------------------------- batch normalisation per domain
class DomainBatchNorm(nn.Module):
    """One batch normalisation per domain; `domain` says which runs. Paper silent: as in SpCL, which the paper cites."""

    def __init__(self, norm, num_domains):
        super().__init__()
        self.copies = nn.ModuleList([copy.deepcopy(norm) for _ in range(num_domains)])
        self.domain = None

    def forward(self, x):
        if self.domain is None and self.training:
            raise ValueError("domain-specific BN in train mode: call model(x, domain), 0 source, 1 target or (0, 1)")
        return self.copies[-1 if self.domain is None else self.domain](x)


def convert_dsbn(model, num_domains=2):
    """Give every batch normalisation of the model (mutated, and returned) one copy per domain, equal to the old one.

    Call it before the optimiser or DistributedDataParallel see the model.
    """
    for name, child in model.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(model, name, DomainBatchNorm(child, num_domains))
        elif not isinstance(child, DomainBatchNorm):
            convert_dsbn(child, num_domains)
    return model


# -------------------------------------------------------------------------------------------------------------- weights
def load_backbone(model, source):
    """Load weights into an AFF and print the line that says which.

    Args: source: what common.weights.read takes: "none", "imagenet" (the 2022 paper's), a file or a log folder. Of a
        network of the same form all is taken, of any other its trunk. Weights of one domain fill every domain's copy;
        of those of several a model without copies takes the last, the target.
    Raises: FileNotFoundError, ValueError as common.weights; the model is then as it was.
    """
    found = weights.read(source, model.backbone_name)
    if found is None:
        return
    own, loaded = model.state_dict(), {}
    for domain in sorted(domains(own)) or [None]:
        plain = of_domain(own, domain)
        trunk = {key: key.removeprefix("backbone.") for key in plain if key.startswith("backbone.")}
        one = found._replace(tensors=of_domain(found.tensors, domain))
        taken, line = weights.fit(one, plain, trunk)
        here = of_domain({key: key for key in own}, domain)
        loaded |= {here[name]: value for name, value in taken.items()}
    model.load_state_dict(loaded, strict=False)
    weights.tell(line)


def of_domain(state, domain):
    """What one domain uses of a state_dict, by the names of a model without copies; of a domain it lacks, the last."""
    domain = domain if domain in domains(state) else max(domains(state), default=None)
    return {COPY.sub("", key): value for key, value in state.items() if domains([key]) <= {domain}}


def domains(names):
    """Numbers of the domains that names of tensors speak of."""
    return {int(found[1]) for found in map(COPY.search, names) if found}
