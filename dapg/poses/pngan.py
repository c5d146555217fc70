"""PN-GAN (Qian et al. 2018), re-implemented from its description: image and pose in, the person in that pose out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def to_tanh(pixels: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(y: Tensor) -> Tensor:
    """[-1, 1] to uint8."""
    return ((y.float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)


def block(inputs: int, outputs: int, size: int, stride: int = 1, pad: int = 1) -> list[nn.Module]:
    """Convolution with bias, InstanceNorm without parameters, ReLU."""
    return [nn.Conv2d(inputs, outputs, size, stride, pad), nn.InstanceNorm2d(outputs), nn.ReLU(inplace=True)]


class Reflect(nn.ReflectionPad2d):
    """Reflection padding; under --deterministic of slices, since not every torch has such a kernel for it."""

    def forward(self, x: Tensor) -> Tensor:
        if not (x.is_cuda and torch.are_deterministic_algorithms_enabled()):
            return super().forward(x)
        return mirrored(mirrored(x, self.padding[0], 3), self.padding[2], 2)


def mirrored(x: Tensor, pad: int, dim: int) -> Tensor:
    """x with `pad` rows of itself, mirrored at its edges, before and after it along dim."""
    before, after = x.narrow(dim, 1, pad), x.narrow(dim, x.shape[dim] - 1 - pad, pad)
    return torch.cat([before.flip(dim), x, after.flip(dim)], dim)


class Residual(nn.Module):
    """3x3, IN, ReLU, 3x3, IN, add, ReLU after the addition."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            *block(channels, channels, 3), nn.Conv2d(channels, channels, 3, 1, 1), nn.InstanceNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Generator(nn.Module):
    """ResNet generator, 11,387,584 parameters by default; (B, 3, H, W) twice -> (B, 3, H, W) in [-1, 1]."""

    def __init__(self, width: int = 64, blocks: int = 9):
        super().__init__()
        w = width
        layers = [Reflect(3), *block(6, w, 7, pad=0), *block(w, 2 * w, 3, 2), *block(2 * w, 4 * w, 3, 2)]
        layers += [Residual(4 * w) for _ in range(blocks)]
        for inputs, outputs in ((4 * w, 2 * w), (2 * w, w)):
            layers += [
                nn.ConvTranspose2d(inputs, outputs, 3, 2, 1, output_padding=1),
                nn.InstanceNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
        layers += [Reflect(3), nn.Conv2d(w, 3, 7, bias=False), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, source: Tensor, pose: Tensor) -> Tensor:
        return self.layers(torch.cat([source, pose], 1))


class Discriminator(nn.Module):
    """Patch discriminator, 2,764,672 parameters at width 64; 256 x 128 -> 26 x 10 scores, no sigmoid."""

    def __init__(self, width: int = 64):
        super().__init__()
        w, leaky = width, lambda: nn.LeakyReLU(0.2, inplace=True)
        self.layers = nn.Sequential(
            nn.Conv2d(3, w, 4, 2, 1, bias=False),
            leaky(),
            nn.Conv2d(w, 2 * w, 4, 2, 1),
            nn.InstanceNorm2d(2 * w),
            leaky(),
            nn.Conv2d(2 * w, 4 * w, 4, 2, 1),
            nn.InstanceNorm2d(4 * w),
            leaky(),
            nn.Conv2d(4 * w, 8 * w, 4, 1, 0),
            nn.InstanceNorm2d(8 * w),
            leaky(),
            nn.Conv2d(8 * w, 1, 4, 1, 0, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class PNGAN(nn.Module):
    """Both networks, for one checkpoint."""

    def __init__(self, width: int = 64, blocks: int = 9):
        super().__init__()
        self.generator, self.discriminator = Generator(width, blocks), Discriminator(width)


def score(values: Tensor, goal: float) -> Tensor:
    """Least-squares loss of the discriminator's scores against 0 or 1."""
    return (values.float() - goal).square().mean()


def generator_loss(gan: PNGAN, fake: Tensor, target: Tensor, weight: float = 10.0) -> tuple[Tensor, Tensor]:
    """MSE(D(fake), 1) + 10 L1(fake, target), and the L1 alone."""
    l1 = (fake.float() - target).abs().mean()
    return score(gan.discriminator(fake), 1) + weight * l1, l1.detach()


def discriminator_loss(gan: PNGAN, fake: Tensor, source: Tensor) -> Tensor:
    """MSE(D(fake), 0) + MSE(D(source), 1), not halved; the real image is the source, as in PN-GAN's code."""
    return score(gan.discriminator(fake.detach()), 0) + score(gan.discriminator(source), 1)


class Optimizers:
    """The two Adams of a GAN behind the one interface of a checkpoint."""

    def __init__(self, gan: PNGAN, lr: float):
        self.parts = [
            torch.optim.Adam(part.parameters(), lr=lr, betas=(0.5, 0.999), fused=next(part.parameters()).is_cuda)
            for part in (gan.generator, gan.discriminator)
        ]

    def state_dict(self) -> dict:
        return {"generator": self.parts[0].state_dict(), "discriminator": self.parts[1].state_dict()}

    def load_state_dict(self, state: dict) -> None:
        for part, name in zip(self.parts, ("generator", "discriminator")):
            part.load_state_dict(state[name])


class Decay:
    """Learning rate constant for the first half of `steps`, then linearly to 0, which follows the last step."""

    def __init__(self, optimizers: Optimizers, lr: float, steps: int):
        self.optimizers, self.lr, self.steps, self.done = optimizers, lr, steps, 0

    def step(self) -> None:
        self.done += 1
        for part in self.optimizers.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * min(1.0, 2 * (1 - self.done / self.steps))

    def state_dict(self) -> dict:
        return {"done": self.done}

    def load_state_dict(self, state: dict) -> None:
        self.done = state["done"]
