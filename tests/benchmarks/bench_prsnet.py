"""Pre-training images a second: PRSNet against MAE at equal batch, the loop against the bare step, the card's peak.

    python tests/benchmarks/bench_prsnet.py                                                   # CPU, a network for tests
    python tests/benchmarks/bench_prsnet.py --size full --batch-size 256 --amp bf16 --compile # on a GPU

step: forward, backward and AdamW on a batch that lies on the device; loop: the same behind the decoded store, the
random resized crop and the mask, as prsnet/pretrain.py runs it; loop / step is the share that the data path leaves. The
peak is that of a large matrix product in the same precision, measured here; a step counts as three forward passes.
Each figure is the median over rounds, the sides in turn.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the one allowed path line: repository root first

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from common import evaluation, images, transforms
from prsnet import flags, masking, pretrain, sampling
from prsnet.model import SIZES


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("-b", "--batch-size", type=int, default=16)
    parser.add_argument("--amp", choices=["off", "bf16"], default="off")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=10, help="steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args(argv)


def clock(work, device: torch.device) -> float:
    """Seconds of work(), with the GPU's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_flops(device: torch.device, dtype: torch.dtype, n: int = 0) -> float:
    """Floating-point operations a second of an n x n matrix product (0: 8192, 1024 on the CPU), the best of ten."""
    n = n or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(clock(lambda: a @ b, device) for _ in range(10))


def forward_flops(model: torch.nn.Module, x: torch.Tensor, args: argparse.Namespace) -> float:
    """Floating-point operations of a forward pass of one image, counted on the images x."""
    grid = masking.grid_of(*x.shape[2:], args.mask_block)
    masked = masking.random_mask(len(x), grid, args.mask_ratio, torch.Generator(x.device).manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, masked)
    return counter.get_total_flops() / len(x)


class Side:
    """One autoencoder with its optimiser: step() on a resident batch, loop() through the data path."""

    def __init__(self, model: str, args, store, device):
        words = ["--model", model, "--size", args.size, "--batch-size", str(args.batch_size)]
        self.args, self.bench, self.store, self.device = flags.pretrain_args(words), args, store, device
        self.model = pretrain.build_model(self.args).to(device, memory_format=torch.channels_last).train()
        self.augment = transforms.Augment(
            pad=0,
            crop_scale=(0.2, 1.0),
            crop_ratio=(0.375, 0.667),
            interpolation="bicubic",
            erase=0.0,
            channels_last=True,
        )
        self.generator = torch.Generator(device).manual_seed(0)
        self.x = self.augment(store.gather(torch.arange(args.batch_size)).to(device), self.generator)
        grid = masking.grid_of(256, 128, (16, 8))
        self.masked = masking.random_mask(args.batch_size, grid, 0.75, self.generator)
        self.flops = forward_flops(self.model, self.x[:2], self.args)
        self.run = torch.compile(self.model) if args.compile else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def update(self, x, masked):
        dtype = evaluation.AMP_DTYPES[self.bench.amp]
        with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            rebuilt = self.run(x, masked)
        self.optimizer.zero_grad(set_to_none=True)
        masking.reconstruction_loss(x, rebuilt, masked).backward()
        self.optimizer.step()

    def step(self):
        for _ in range(self.bench.steps):
            self.update(self.x, self.masked)

    def loop(self):
        order = sampling.shuffled_batches(len(self.store), self.bench.batch_size, seed=0, epoch=0)
        for pixels, _ in images.batches(self.store, order[: self.bench.steps], self.device):
            masked = masking.random_mask(len(pixels), self.masked.shape[1:], 0.75, self.generator)
            self.update(self.augment(pixels, self.generator), masked)


def main(args) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / f"{n:05d}.jpg") for n in range(args.batch_size * args.steps)]
        for path in paths:
            Image.fromarray(rng.integers(0, 256, (64, 32, 3), dtype=np.uint8)).save(path)
        store = images.open_images(paths, 256, 128, name="bench")
        sides = {name: Side(name, args, store, device) for name in ("prsnet", "mae")}
        times = {(name, kind): [] for name in sides for kind in ("step", "loop")}
        for number in range(args.rounds + 1):  # the first round warms up and is not counted
            for name, kind in times:
                seconds = clock(getattr(sides[name], kind), device)
                if number:
                    times[name, kind].append(seconds)
    peak = peak_flops(device, evaluation.AMP_DTYPES[args.amp] or torch.float32)
    found = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "peak_tflops": peak / 1e12}
    for name, side in sides.items():
        step, loop = (args.batch_size * args.steps / median(times[name, kind]) for kind in ("step", "loop"))
        share = step * 3 * side.flops / peak
        figures = {"step_images_s": step, "loop_images_s": loop, "loop_over_step": loop / step, "share_of_peak": share}
        found[name] = figures
        print(
            f"{name:<8} step {step:8.1f} images/s, loop {loop:8.1f} images/s, loop / step {loop / step:.3f}, "
            f"{100 * share:.1f} % of {peak / 1e12:.2f} TFLOP/s measured here"
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main(parse_args())
