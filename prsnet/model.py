"""The autoencoder of PRSNet (sec. III-B, III-C, Figures 2-4): encoder with foldable branches, decoder, folding.

Encoder: four stages of Conv Blocks -> global average -> linear to B x 2048. Decoder: deconvolution from one vector
to the image. Images are ImageNet-normalised (B, 3, H, W), H and W multiples of 32.
"""

import contextlib
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.losses import wide
from prsnet import masking
from prsnet.settings import BLOCKS, SIZES, Size  # noqa: F401 re-exported


# --------------------------------------------------------------------------------------------------------------- layers
class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RepDepthwise(nn.Module):
    """The depthwise operator with training branches, (B, C, H, W) -> (B, C, H, W):

        D(x) = BN7(W7 * x) + BN3(W3 * x) + BN1(w1 . x) + BNid(x)

    All branches are linear in eval mode, so `folded` makes one 7 x 7 convolution of them, exactly.
    Deviation: the paper draws the branches around a whole block and says that they are left out at test; a block has a
    norm and a non-linearity, so they could only be deleted, not folded. Around its linear part they fold, as in RepVGG.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels, bias=False) for k in (7, 3, 1)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(4))

    def forward(self, x):
        return sum(norm(conv(x)) for norm, conv in zip(self.norms, self.convs)) + self.norms[3](x)

    @torch.no_grad()
    def folded(self) -> nn.Conv2d:
        """The same operator in eval mode as one depthwise 7 x 7 convolution with bias, computed in float64."""
        channels = len(self.norms[0].weight)
        identity = torch.ones(channels, 1, 1, 1, dtype=torch.float64, device=self.convs[0].weight.device)
        kernel, bias = torch.zeros_like(self.convs[0].weight, dtype=torch.float64), 0.0
        for norm, weight in zip(self.norms, [*(conv.weight.double() for conv in self.convs), identity]):
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            kernel += F.pad(weight * scale[:, None, None, None], [(7 - weight.shape[-1]) // 2] * 4)
            bias = bias + norm.bias.double() - norm.running_mean.double() * scale
        conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels).to(self.convs[0].weight)
        conv.weight.copy_(kernel)
        conv.bias.copy_(bias)
        return conv


class ConvBlock(nn.Module):
    """Conv Block, Figure 3 (2): depthwise 7 x 7 -> LN -> C to 4C -> activation -> 4C to C -> gamma, and the skip."""

    def __init__(self, channels: int, rep: bool = False, activation=nn.GELU, skip: bool = True):
        super().__init__()
        self.dwconv = RepDepthwise(channels) if rep else nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand, self.act, self.reduce = (
            nn.Linear(channels, 4 * channels),
            activation(),
            nn.Linear(4 * channels, channels),
        )
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))
        self.skip = skip

    def forward(self, x):
        y = self.dwconv(x).permute(0, 2, 3, 1)  # (B, H, W, C), no copy in channels_last
        y = self.gamma * self.reduce(self.act(self.expand(self.norm(y))))
        y = y.permute(0, 3, 1, 2)
        return x + y if self.skip else y


class DenseStage(nn.Module):
    """Stage of the authors' second model (block "v2"): x <- x + conv3x3(stage input) + F'(x) for every block."""

    def __init__(self, channels: int, depth: int):
        super().__init__()
        self.branch = nn.Conv2d(channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ConvBlock(channels, activation=nn.Mish, skip=False) for _ in range(depth))

    def forward(self, x):
        branch = self.branch(x)
        for block in self.blocks:
            x = x + branch + block(x)
        return x


def entry(channels_in: int, channels: int, block: str) -> nn.Module:
    """Downsampling by 2 between stages: LN + conv 2 x 2, or conv + BN + ReLU in "v2"."""
    conv = nn.Conv2d(channels_in, channels, 2, 2)
    if block == "v2":
        return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())
    return nn.Sequential(LayerNorm2d(channels_in), conv)


def initialise(module: nn.Module) -> None:
    """Weights of convolutions, deconvolutions and linear layers truncated normal 0.02, biases 0 (for Module.apply)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def in_fp32(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) in float32 at least, whatever autocast says, so that what leaves a network is not rounded to bf16."""
    with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
        return layer(wide(x))


# ------------------------------------------------------------------------------------------------------------- networks
class Encoder(nn.Module):
    """Figure 2: (B, 3, H, W) -> (B, bottleneck), float32 under autocast as well.

    bottleneck != dims[-1]: average pooling, then a linear map without bias (the paper's B x 2048); it commutes with the
    pooling, so it runs after it. bottleneck == dims[-1]: average pooling, then LN (the authors' pre-training).
    """

    def __init__(self, block: str = "rep", size: Size = SIZES["full"], bottleneck: int | None = None):
        super().__init__()
        if block not in BLOCKS:
            raise ValueError(f"block {block!r} is none of {', '.join(BLOCKS)}")
        dims, depths = size.dims, size.depths
        self.block, self.size, self.bottleneck = block, size, bottleneck or size.bottleneck
        stages = []
        for i, (channels, depth) in enumerate(zip(dims, depths)):
            first = (
                entry(dims[i - 1], channels, block)
                if i
                else nn.Sequential(nn.Conv2d(3, channels, 4, 4), LayerNorm2d(channels))
            )
            if block == "v2":
                stages.append(nn.Sequential(first, DenseStage(channels, depth)))
            else:
                stages.append(nn.Sequential(first, *(ConvBlock(channels, block == "rep") for _ in range(depth))))
        self.stages = nn.ModuleList(stages)
        self.proj = self.norm = None
        if self.bottleneck == dims[-1]:
            self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        else:
            self.proj = nn.Linear(dims[-1], self.bottleneck, bias=False)
        self.apply(initialise)

    def maps(self, x: Tensor, masked: Tensor | None = None) -> Tensor:
        """Stage-4 maps (B, C, H/32, W/32) of images, hidden blocks set to 0 first where a mask is given."""
        if masked is not None:
            x = masking.apply(x, masked)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward(self, x: Tensor, masked: Tensor | None = None) -> Tensor:
        pooled = self.maps(x, masked).mean((2, 3))
        return in_fp32(self.norm if self.proj is None else self.proj, pooled)


class Decoder(nn.Module):
    """Figure 4: (B, bottleneck) -> (B, 3, H, W), one deconvolution with a kernel of H/32 x W/32, then doublings."""

    def __init__(
        self, height: int, width: int, size: Size = SIZES["full"], bottleneck: int | None = None, activation=nn.GELU
    ):
        super().__init__()
        if height % 32 or width % 32:
            raise ValueError(
                f"images of {height} x {width}: the network halves them five times, so both must be multiples of 32"
            )
        dims, depths, bottleneck = size.dims, size.depths, bottleneck or size.bottleneck
        self.norm = nn.LayerNorm(bottleneck, eps=1e-6) if bottleneck != dims[-1] else None
        layers = [nn.ConvTranspose2d(bottleneck, dims[-1], (height // 32, width // 32))]
        for i in reversed(range(len(dims))):
            layers += [ConvBlock(dims[i], activation=activation) for _ in range(depths[::-1][len(dims) - 1 - i])]
            layers += [LayerNorm2d(dims[i]), nn.ConvTranspose2d(dims[i], dims[max(i - 1, 0)], 2, 2)]
        layers += [LayerNorm2d(dims[0]), nn.ConvTranspose2d(dims[0], 3, 2, 2)]
        self.layers = nn.Sequential(*layers)
        self.apply(initialise)

    def forward(self, z: Tensor) -> Tensor:
        z = z if self.norm is None else self.norm(z)
        return in_fp32(self.layers[-1], self.layers[:-1](z[:, :, None, None]))


class PRSNet(nn.Module):
    """The masked autoencoder: (images, masked (B, gh, gw) bool) -> reconstruction (B, 3, H, W) float32."""

    def __init__(
        self,
        height: int = 256,
        width: int = 128,
        block: str = "rep",
        size: Size = SIZES["full"],
        bottleneck: int | None = None,
    ):
        super().__init__()
        self.encoder = Encoder(block, size, bottleneck)
        self.decoder = Decoder(height, width, size, bottleneck, nn.Mish if block == "v2" else nn.GELU)

    def forward(self, images: Tensor, masked: Tensor) -> Tensor:
        return self.decoder(self.encoder(images, masked))


# -------------------------------------------------------------------------------------------------- folding, statistics
def fold(model: nn.Module) -> nn.Module:
    """A copy in eval mode with every RepDepthwise folded: the graph and the state_dict of block "plain".

    Raises: ValueError for a network without such branches, saying why.
    """
    if not any(isinstance(module, RepDepthwise) for module in model.modules()):
        raise ValueError(
            "nothing to fold: only --block rep has training branches that fold exactly (a v2 block adds a "
            "convolution beside a non-linearity; plain has no branches)"
        )
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, ConvBlock) and isinstance(module.dwconv, RepDepthwise):
            module.dwconv = module.dwconv.folded()
        if isinstance(module, Encoder):
            module.block = "plain"
    return model


@contextlib.contextmanager
def frozen_statistics(model: nn.Module):
    """BatchNorm layers normalise by the batch but leave their running statistics alone, to the bit."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
