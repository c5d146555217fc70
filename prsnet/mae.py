"""The baseline of Table III: a masked autoencoder on a vision transformer (He et al. 2022) for images of any shape.

Hidden tokens are dropped before the encoder; the decoder sees them as one learnt token. Attention is PyTorch's
scaled_dot_product_attention. Own code; position codes are rectangular-safe.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prsnet import masking
from prsnet.model import SIZES, Size, in_fp32


def position_code(dim: int, rows: int, columns: int) -> Tensor:
    """Fixed 2-D sine-cosine code (1, 1 + rows * columns, dim); the class token's is 0. Half of dim codes the row."""
    if dim % 4:
        raise ValueError(f"width {dim} of the transformer is not a multiple of 4")
    rate = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    parts = [wave(place.reshape(-1, 1).double() * rate) for place in (y, x) for wave in (torch.sin, torch.cos)]
    code = torch.cat(parts, 1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), code])[None].float()


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (
            self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # each (B, heads, L, dim / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention, x + MLP (4 x width)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def initialise(module: nn.Module) -> None:
    """Xavier uniform for linear layers, as MAE (for Module.apply)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ViTEncoder(nn.Module):
    """Images (B, 3, H, W) -> tokens (B, 1 + L, D), class token first; with a mask L counts the visible blocks only."""

    def __init__(
        self,
        height: int,
        width: int,
        patch: tuple[int, int] = (16, 8),
        size: Size = SIZES["full"],
        ratio: float = masking.RATIO,
    ):
        super().__init__()
        dim, depth, heads = size.vit
        self.patch, self.grid, self.size = patch, masking.grid_of(height, width, patch), size
        self.hidden = masking.num_masked(self.grid, ratio)  # known here, so that no step waits for the GPU to count
        self.embed = nn.Linear(3 * patch[0] * patch[1], dim)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", position_code(dim, *self.grid))
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(initialise)
        nn.init.normal_(self.cls, std=0.02)

    def tokens(self, x: Tensor, masked: Tensor | None = None) -> Tensor:
        """See the class. masked (B, gh, gw) bool with equally many hidden blocks in every row."""
        x = self.embed(patches(x, self.patch)) + self.positions[:, 1:]
        if masked is not None:
            x = x.gather(1, visible(masked, self.hidden)[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([(self.cls + self.positions[:, :1]).expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def patches(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, gh * gw, C * ph * pw), blocks row by row."""
    x = x.unflatten(3, (-1, patch[1])).unflatten(2, (-1, patch[0]))  # (B, C, gh, ph, gw, pw)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatch(x: Tensor, patch: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of patches: (B, gh * gw, C * ph * pw) -> (B, C, H, W)."""
    x = x.unflatten(2, (-1, *patch)).unflatten(1, grid)  # (B, gh, gw, C, ph, pw)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def visible(masked: Tensor, hidden: int) -> Tensor:
    """Indices (B, L) of the blocks that are not hidden, ascending, where `hidden` blocks are hidden in every image.

    Raises: ValueError on the CPU if the mask hides another number; on CUDA looking would stop the host at every step.
    """
    flat = masked.flatten(1)
    if flat.device.type == "cpu" and bool((flat.sum(1) != hidden).any()):
        raise ValueError(f"the mask hides {int(flat[0].sum())} blocks; this transformer was built for {hidden}")
    return flat.to(torch.uint8).argsort(dim=1, stable=True)[:, : flat.shape[1] - hidden]


class MAE(nn.Module):
    """The autoencoder: (images, masked (B, gh, gw) bool) -> reconstruction (B, 3, H, W) float32."""

    def __init__(
        self,
        height: int = 256,
        width: int = 128,
        patch: tuple[int, int] = (16, 8),
        size: Size = SIZES["full"],
        ratio: float = masking.RATIO,
    ):
        super().__init__()
        dim, depth, heads = size.vit_decoder
        self.encoder = ViTEncoder(height, width, patch, size, ratio)
        self.embed = nn.Linear(size.vit[0], dim)
        self.unseen = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", position_code(dim, *self.encoder.grid))
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 3 * patch[0] * patch[1])
        for module in (self.embed, self.blocks, self.head):
            module.apply(initialise)
        nn.init.normal_(self.unseen, std=0.02)

    def forward(self, images: Tensor, masked: Tensor) -> Tensor:
        x = self.embed(self.encoder.tokens(images, masked))
        full = self.unseen.to(x.dtype).expand(len(x), math.prod(self.encoder.grid), -1)
        places = visible(masked, self.encoder.hidden)[..., None].expand(-1, -1, x.shape[2])
        x = torch.cat([x[:, :1], full.scatter(1, places, x[:, 1:])], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return unpatch(in_fp32(self.head, self.norm(x))[:, 1:], self.encoder.patch, self.encoder.grid)


class MAEFeature(nn.Module):
    """The encoder with a head for re-identification: (B, 3, H, W) -> (B, feature), float32 under autocast as well.

    head "linear": the class token through a linear map without bias. "authors24": as the authors' code, the class token
    cut into 24 runs of channels, a 1 x 1 convolution over the 24, average pooling: a linear map of rank at most 24.
    """

    def __init__(self, encoder: ViTEncoder, feature: int = 2048, head: str = "linear"):
        super().__init__()
        if head not in ("linear", "authors24"):
            raise ValueError(f"MAE head {head!r} is none of linear, authors24")
        dim = encoder.size.vit[0]
        self.encoder, self.runs = encoder, 24 if head == "authors24" else dim
        if dim % self.runs:
            raise ValueError(
                f"--mae-head authors24 cuts the class token into 24 runs; its {dim} channels do not allow that"
            )
        self.head = nn.Linear(self.runs, feature, bias=False)
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def forward(self, x: Tensor, masked: Tensor | None = None) -> Tensor:
        cls = self.encoder.tokens(x, masked)[:, 0]
        return in_fp32(self.head, cls.unflatten(1, (self.runs, -1)).mean(2))
