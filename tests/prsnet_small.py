"""PRSNet at its smallest, for tests of training steps: images in memory that know their number, masks and augmentation
that depend on nothing but the image, so that any two ways to walk the same batch can be compared.
"""

from pathlib import Path

import numpy as np
import torch
from conftest import write_market
from PIL import Image

from common import images, transforms
from prsnet import flags, masking

WORDS = "--size tiny --height 64 --width 32 --mask-block 4 2 --workers 1".split()
GRID = (16, 16)
SIZES = (3, 3, 2, 3, 1, 3)  # images of the people: with K = 3 some leave slots empty


def people(root: Path, number: int) -> Path:
    """A --data-dir with striped crops to pre-train on and a miniature Market-1501."""
    folder, draw = write_market(root) / "prsnet_pretrain" / "coco", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for n in range(number):
        picture = np.repeat(np.repeat(draw.integers(0, 256, (4, 1, 3)), 16, 0), 32, 1)
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{n:03d}.jpg")
    (root / "prsnet_pretrain" / "manifest.jsonl").write_text("{}\n" * number)
    return root


def store(number: int) -> images.ImageStore:
    """Striped images, uint8; the first value of each is its number."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (number, 3, 16, 1)).repeat(4, 2).repeat(32, 3).astype(np.uint8)
    pixels[:, 0, 0, 0] = np.arange(number)
    return images.ImageStore([str(n) for n in range(number)], (3, 64, 32), "bilinear", "device", "cpu", pixels)


class Fixed:
    """Stands in for the augmentation (none) and for masking.draw (noise by the number of the image); keeps the batches.

    With two or more ranks every rank sees its images under the noise that one process would have given them.
    """

    def __init__(self, number: int):
        noise = torch.rand(number, GRID[0] * GRID[1], generator=torch.Generator().manual_seed(0))
        self.noise, self.numbers, self.batches = noise, None, []

    def augment(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        self.numbers = pixels[:, 0, 0, 0].long()
        self.batches.append((self.numbers, transforms.normalize(pixels).clone()))
        return self.batches[-1][1].contiguous(memory_format=torch.channels_last)

    def draw(self, batch: int, grid: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
        assert batch == len(self.numbers) and tuple(grid) == GRID
        return self.noise[self.numbers]

    def hidden(self, numbers: torch.Tensor) -> torch.Tensor:
        """The hidden blocks of images by number, (B, 16, 16) bool: the 192 of smallest noise."""
        return masking.from_noise(self.noise[numbers], GRID, 192)


def finetune_args(*more):
    words = (
        "--batch-size 12 --num-instances 3 --iters 1 --epochs 5 --lr 0.01 --weight-decay 0.05 --weights none".split()
    )
    return flags.train_args([*WORDS, *words, *more])


def pretrain_args(*more):
    words = "--batch-size 8 --epochs 5 --warmup 1 --lr 0.32 --weight-decay 1".split()
    return flags.pretrain_args([*WORDS, *words, *more])


def labels() -> torch.Tensor:
    """Label of every image of store(15): people of SIZES images."""
    return torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
