"""ConvNeXt-AP (paper sec. 3.3, Figure 4): ConvNeXt trunk with SimAM in its blocks, a global head, six part heads.

    model = ConvNeXtAP(num_classes=751)                         # ConvNeXt-AP; simam="none", parts=0 is the baseline
    model.set_stage("joint")                                    # refined part pooling in place of stripes
    feats = model.eval()(images)                                # (B, 3, 256, 128) -> (B, 1792) unit rows

The trunk keeps torchvision's key names behind its own prefix; SimAM has no weights.
"""

import re
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlock, CNBlockConfig

from common import weights
from common.losses import wide
from convnext_ap.settings import POSITIONS, STRIDE, TRUNKS, check_size, name_of
from convnext_ap.simam import simam

WIDTH = 256  # length of a head's feature h, sec. 3.3.2 step 4
STAGES = ("pcb", "assign", "joint")


class Output(NamedTuple):
    """What the model returns in train mode, float32; heads: the global one, then the parts from top to bottom."""

    pooled: Tensor  # (B, n, D) g, the mean of the map or of a part
    feats: Tensor  # (B, n, 256) h after its normalisation
    logits: Tensor  # (B, n, num_classes)


# -------------------------------------------------------------------------------------------------------------- trunk
class Block(CNBlock):
    """ConvNeXt block with SimAM (Figure 5); position: after the depthwise convolution "dw", after the second linear
    layer "mlp", on the scaled branch "branch", or "none".

    Paper silent: Figure 5 cannot be read. "dw" is where SimAM's authors put it, after the spatial convolution and
    before the norm, which takes out the factor by which all gates shrink; so pretrained weights keep their meaning.
    """

    def __init__(self, *args, position="none", **options):
        super().__init__(*args, **options)
        self.position = position

    def forward(self, x):
        branch = x
        for i, layer in enumerate(self.block):
            branch = layer(branch)
            if i == 0 and self.position == "dw":
                branch = simam(branch)
        if self.position == "mlp":
            branch = simam(branch)
        branch = self.layer_scale * branch
        if self.position == "branch":
            branch = simam(branch)
        return self.stochastic_depth(branch) + x


def build_trunk(name: str, position: str, drop_path: float) -> nn.Sequential:
    """The `features` of a torchvision ConvNeXt: (B, 3, H, W) -> (B, D, H/32, W/32), random weights."""
    depths, channels, layer_scale = TRUNKS[name]
    setting = [CNBlockConfig(c, c_next, n) for c, c_next, n in zip(channels, (*channels[1:], None), depths)]
    block = partial(Block, position=position)
    return models.ConvNeXt(setting, drop_path, layer_scale, num_classes=1, block=block).features


# -------------------------------------------------------------------------------------------------------------- heads
class Heads(nn.Module):
    """n heads with weights of their own, (B, n, D) -> feats (B, n, 256) and logits (B, n, K), as batched products.

    Each is Linear(D, 256), BatchNorm(256), Dropout, Linear(256, K); the first linear layer is the 1x1 convolution of
    sec. 3.3.2 step 4 on a pooled vector.
    Paper silent: no ReLU after the normalisation (relu=True adds it), dropout 0.5, and how the weights start.
    """

    def __init__(self, n: int, channels: int, num_classes: int, relu: bool = False, dropout: float = 0.5):
        super().__init__()
        self.reduce = nn.Parameter(torch.randn(n, channels, WIDTH) * (2 / WIDTH) ** 0.5)  # He, fan out
        self.reduce_bias = nn.Parameter(torch.zeros(n, WIDTH))
        self.norm = nn.BatchNorm1d(n * WIDTH)  # the statistics of n BatchNorm1d(256)
        nn.init.normal_(self.norm.weight, 1.0, 0.02)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Parameter(torch.randn(n, WIDTH, num_classes) * 0.001)
        self.classify_bias = nn.Parameter(torch.zeros(n, num_classes))
        self.relu = relu

    def forward(self, pooled):
        h = torch.baddbmm(self.reduce_bias[:, None], pooled.transpose(0, 1), self.reduce).transpose(0, 1)
        h = self.norm(h.flatten(1)).view_as(h)
        h = F.relu(h) if self.relu else h
        logits = torch.baddbmm(self.classify_bias[:, None], self.dropout(h).transpose(0, 1), self.classify)
        return h, logits.transpose(0, 1)


class PartClassifier(nn.Module):
    """Refined part pooling, Eqs. (1) and (2): (B, D, H, W) -> (B, p, D).

    Eq. (1) gives every position f a probability for every part, softmax(W f); Eq. (2) pools f with it. Paper silent:
    the scale; p / (H W) makes W = 0 the mean of the map and equal shares of it stripe means, which the heads know. And
    how W starts: without a bias, as Eq. (1) has none, from N(0, 0.001^2), so that all parts start near that mean.
    """

    def __init__(self, channels: int, parts: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, parts, 1, bias=False)
        nn.init.normal_(self.conv.weight, std=0.001)

    def probabilities(self, fmap):
        """P(P_i | f), Eq. (1): (B, p, H, W), summing to 1 over the parts."""
        return self.conv(fmap).softmax(1)

    def forward(self, fmap):
        share = self.probabilities(fmap).flatten(2)  # (B, p, H W)
        pooled = share @ fmap.flatten(2).transpose(1, 2)  # Eq. (2), (B, p, D)
        return pooled * (share.shape[1] / share.shape[2])


def stripes(fmap: Tensor, parts: int) -> Tensor:
    """Means of `parts` horizontal stripes, (B, D, H, W) -> (B, p, D): step 3 of sec. 3.3.2.

    Stripe i spans the rows floor(i H / p) .. ceil((i + 1) H / p) - 1, adaptive average pooling's rule: at 8 rows and
    6 parts each has two, and rows 1, 2, 5 and 6 belong to two stripes. Cut by slices, since on a GPU that operation
    has no deterministic gradient.
    """
    ends = [(i * fmap.shape[2] // parts, -(-(i + 1) * fmap.shape[2] // parts)) for i in range(parts)]
    return torch.stack([fmap[:, :, top:bottom].mean((2, 3)) for top, bottom in ends], 1)


def unit(pieces: Tensor) -> Tensor:
    """Test descriptor (N, n d), unit rows, of pieces (N, n, d): each piece at length 1, one after another, / sqrt(n).

    Paper silent: it says that the parts' features are concatenated. Each part then has the same say in the cosine.
    """
    return F.normalize(pieces, dim=2).flatten(1) / pieces.shape[1] ** 0.5


# -------------------------------------------------------------------------------------------------------------- model
class ConvNeXtAP(nn.Module):
    """The network of Figure 4 and its three reductions.

    Args: num_classes, K of the classifiers; trunk "base" or "tiny"; attention, where SimAM stands in a block (Block);
        parts p, 0 for none; head_relu, dropout, see Heads; drop_path, probability of leaving out the last block;
        final_norm, a LayerNorm on the last map (torchvision's classifier has it; the paper drops that module).
    """

    def __init__(
        self,
        num_classes: int,
        trunk: str = "base",
        attention: str = "dw",
        parts: int = 6,
        *,
        head_relu: bool = False,
        dropout: float = 0.5,
        drop_path: float = 0.2,
        final_norm: bool = False,
    ):
        super().__init__()
        if trunk not in TRUNKS or attention not in POSITIONS or parts < 0 or num_classes < 1:
            raise ValueError(
                f"trunk {trunk!r}, attention {attention!r}, {parts} parts, {num_classes} classes: expected"
                f" one of {', '.join(TRUNKS)}; one of {', '.join(POSITIONS)}; at least 0 and 1"
            )
        self.trunk_name, self.attention, self.parts = trunk, attention, parts
        self.trunk = build_trunk(trunk, attention, drop_path)
        channels = TRUNKS[trunk].channels[-1]
        self.final_norm = nn.LayerNorm(channels, eps=1e-6) if final_norm else None
        self.heads = Heads(1 + parts, channels, num_classes, head_relu, dropout)
        self.assign = PartClassifier(channels, parts) if parts else None
        self.set_stage("pcb")

    @property
    def name(self) -> str:
        return name_of(self.attention, self.parts)

    def set_stage(self, stage: str) -> None:
        """pcb: stripes, W at rest. assign: refined pooling, only W learns and the rest stays in eval mode. joint: all
        learn. Raises: ValueError for another stage, or one that needs parts."""
        if stage not in STAGES or (stage != "pcb" and not self.parts):
            raise ValueError(f"stage {stage!r} of {self.name}: expected pcb, or with parts {' or '.join(STAGES[1:])}")
        self.stage = stage
        for module in (self.trunk, self.final_norm, self.heads):
            if module is not None:
                module.requires_grad_(stage != "assign")
        if self.assign is not None:
            self.assign.requires_grad_(stage != "pcb")
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.stage == "assign":
            self.trunk.eval()
            self.heads.eval()
        return self

    def feature_map(self, x):
        """T, the last map (B, D, H/32, W/32); what heat maps show."""
        if x.shape[2] // STRIDE < self.parts:
            check_size(*x.shape[2:], self.attention, self.parts)
        x = self.trunk(x)
        return x if self.final_norm is None else self.final_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def encode(self, x) -> Output:
        """All heads of images x; from the last map on in float32, whatever autocast says."""
        fmap = self.feature_map(x)
        with torch.autocast(fmap.device.type if fmap.device.type != "meta" else "cpu", enabled=False):
            fmap = wide(fmap)
            pooled = fmap.mean((2, 3))[:, None]
            if self.parts:
                parts = stripes(fmap, self.parts) if self.stage == "pcb" else self.assign(fmap)
                pooled = torch.cat([pooled, parts], 1)
            return Output(pooled, *self.heads(pooled))

    def forward(self, x):
        """Train mode: an Output. Eval mode: descriptors H (B, n 256), unit rows; their product is the cosine."""
        output = self.encode(x)
        return output if self.training else unit(output.feats)


class Embedding(nn.Module):
    """Raw pieces of a network for evaluation, so that image and mirror image can be added before normalisation."""

    def __init__(self, network: ConvNeXtAP):
        super().__init__()
        self.network = network

    def forward(self, x):
        """(B, n 256 + n D): feats and pooled vectors of all heads."""
        output = self.network.encode(x)
        return torch.cat([output.feats.flatten(1), output.pooled.flatten(1)], 1)

    def descriptors(self, raw: Tensor) -> dict[str, Tensor]:
        """{"H": (N, n 256), "G": (N, n D)} unit rows of raw pieces (N, n 256 + n D)."""
        n = 1 + self.network.parts
        h, g = (raw[:, part].unflatten(1, (n, -1)) for part in (slice(n * WIDTH), slice(n * WIDTH, None)))
        return {"H": unit(h), "G": unit(g)}


# ------------------------------------------------------------------------------------------------------------ weights
def load_trunk(model: ConvNeXtAP, source: str) -> str:
    """Load weights into the trunk (and final norm) of a model and return the line that says which.

    Args: source: what common.weights.read takes, with the names of torchvision, of ConvNeXt's authors or of timm.
    Raises: FileNotFoundError; ValueError for a foreign file, or a checkpoint of a variant with other blocks.
    """
    if source == "imagenet" and model.trunk_name != "base":
        raise ValueError(f"there are no ImageNet weights for --trunk {model.trunk_name}; use --weights none, or a file")
    found = weights.read(source, f"convnext_{model.trunk_name}", rename=our_name)
    if found is None:
        return f"weights: random, {sum(p.numel() for p in model.parameters()):,} parameters"
    if "simam" in found.args:
        check_variant(found.source, found.args, model.attention, model.parts, blocks_only=True)
    own = {key: value for key, value in model.state_dict().items() if key.startswith(("trunk.", "final_norm."))}
    taken, line = weights.fit(found, own, {key: key for key in own if key.startswith("trunk.")})
    model.load_state_dict(taken, strict=False)
    return line


def our_name(name: str) -> str:
    """A tensor's name in torchvision's, the authors' or timm's ConvNeXt as ours; other names as they are."""
    for pattern, ours in NAMES.items():
        if found := re.search(rf"(?:^|\.){pattern}", name):
            start = name[: found.start()] + "." * (found.start() > 0)
            return start + ours(*found.groups()) + name[found.end() :]
    return name


LAYERS = {  # of a block: authors, timm -> torchvision
    "dwconv": "block.0", "norm": "block.2", "pwconv1": "block.3", "pwconv2": "block.5",
    "conv_dw": "block.0", "mlp.fc1": "block.3", "mlp.fc2": "block.5", "gamma": "layer_scale",
}  # fmt: skip
NAMES = {
    r"features\.(?=\d)": lambda: "trunk.",  # torchvision
    r"classifier\.0\.": lambda: "final_norm.",
    r"downsample_layers\.(\d)\.": lambda stage: f"trunk.{2 * int(stage)}.",  # authors; the first is the stem
    r"stem\.(?=[01])": lambda: "trunk.0.",  # timm
    r"stages\.(\d)\.downsample\.": lambda stage: f"trunk.{2 * int(stage)}.",
    rf"stages\.(\d)\.(?:blocks\.)?(\d+)\.({'|'.join(LAYERS)})(?=\.|$)": (
        lambda stage, block, layer: f"trunk.{2 * int(stage) + 1}.{block}.{LAYERS[layer]}"
    ),
    r"head\.norm\.": lambda: "final_norm.",  # timm
    r"^((?:model\.|state_dict\.)*)norm\.": lambda outer: f"{outer}final_norm.",  # authors
}


def check_variant(path, trained: dict | None, attention: str, parts: int, blocks_only: bool = False) -> None:
    """Raises ValueError when the checkpoint at `path`, trained with the flags `trained`, is of another variant."""
    if not isinstance(trained, dict) or "simam" not in trained:
        raise ValueError(f"{path} is no checkpoint of convnext_ap (it was written with other flags)")
    if trained["simam"] == attention and (blocks_only or trained["parts"] == parts):
        return
    raise ValueError(
        f"{path} is a checkpoint of {name_of(trained['simam'], trained['parts'])} (--simam "
        f"{trained['simam']} --parts {trained['parts']}), not of {name_of(attention, parts)} (--simam "
        f"{attention} --parts {parts}); use its flags, or another file"
    )
