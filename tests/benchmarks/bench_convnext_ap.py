"""ConvNeXt-AP: what a training step keeps and costs, with and without SimAM, and whether the data path keeps up.

    python tests/benchmarks/bench_convnext_ap.py --memory                     # MB that one image keeps, counted, no GPU
    python tests/benchmarks/bench_convnext_ap.py --device cuda --amp bf16 --compile      # ConvNeXt-B at 256x128
    python tests/benchmarks/bench_convnext_ap.py --trunk tiny --height 192 --width 96 -b 32      # one CPU

Prints images/s of the training step of all four variants (forward, loss, backward, clip, SGD; random images on the
device), the share of SimAM in the step of ConvNeXt-A and ConvNeXt-AP, and the loop's rate (store, augmentation, step)
over the step's rate. Medians over rounds.
"""

import argparse
import json
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the one allowed path line: repository root first

import numpy as np
import torch

from common import runtime
from common.images import ImageStore, batches
from convnext_ap import model as networks
from convnext_ap import train
from convnext_ap.model import TRUNKS, ConvNeXtAP
from convnext_ap.simam import simam_autograd

MB = 2**20
VARIANTS = {"ConvNeXt": ("none", 0), "ConvNeXt-A": ("dw", 0), "ConvNeXt-P": ("none", 6), "ConvNeXt-AP": ("dw", 6)}


def parse_args(argv=None) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--trunk", choices=list(TRUNKS), default="base")
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("--amp", choices=list(runtime.AMP_DTYPES), default="off")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=10, help="steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="only the memory that a forward pass keeps")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args(argv)


def saved_mb(attention: str, trunk="base", height=256, width=128, device="cpu") -> float:
    """MB (2^20) that the backward pass of one image keeps, weights apart: the distinct storages that autograd saves."""
    with torch.device(device):
        model = ConvNeXtAP(751, trunk, attention, drop_path=0.0).train()
        model.heads.norm.eval()  # one image has no batch statistics
        x = torch.randn(1, 3, height, width)
    weights = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.encode(x)
    return sum(storage.nbytes() for storage in kept.values()) / MB


def memory(device="cpu") -> dict:
    """saved_mb of ConvNeXt-B at 256x128 without SimAM, with ours, and with SimAM left to autograd."""
    ours = networks.simam
    found = {"none": saved_mb("none", device=device), "simam": saved_mb("dw", device=device)}
    try:
        networks.simam = simam_autograd
        found["simam_autograd"] = saved_mb("dw", device=device)
    finally:
        networks.simam = ours
    return found


class Setup:
    """A variant ready to be trained, as train.py builds it."""

    def __init__(self, args: Namespace, attention: str, parts: int):
        words = [
            "--trunk",
            args.trunk,
            "--simam",
            attention,
            "--parts",
            parts,
            "--height",
            args.height,
            "--width",
            args.width,
            "-b",
            args.batch_size,
            "--weights",
            "none",
            "--amp",
            args.amp,
        ]
        words += ["--compile"] if args.compile else []
        self.flags = train.parse_args([str(word) for word in words])
        self.device = torch.device(args.device)
        if self.device.type == "cuda":  # as runtime.start
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True
        here = Path(".")
        self.run = runtime.Run("convnext_ap", "bench", vars(self.flags), self.device, 0, 1, here, here, time.time())
        bare, self.optimizer, _ = train.build(self.flags, self.run, 751, train.make_plan(self.flags))
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4
        self.model = train.enter(self.run, bare, self.optimizer, "pcb", fresh=False).train()
        self.scaler, self.objective = runtime.scaler(self.run), train.make_objective(self.flags, "pcb")
        self.labels = torch.arange(args.batch_size, device=self.device) // 4

    def step(self, x, labels):
        with self.run.autocast():
            output = self.model(x)
        runtime.step(self.run, self.objective(output, labels).total, [self.optimizer], self.scaler, "bench")


def rate(setup: Setup, stream, images: int) -> float:
    """Images per second of steps over (x, labels)."""
    wait(setup.device)
    start = time.perf_counter()
    for x, labels in stream:
        setup.step(x, labels)
    wait(setup.device)
    return images / (time.perf_counter() - start)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def loop_stream(setup: Setup, args: Namespace, store):
    """The same steps from the decoded store, through train.py's augmentation."""
    order = np.random.default_rng(0).integers(0, len(store), (args.steps, args.batch_size))
    augment, generator = train.make_augment(setup.flags), torch.Generator(setup.device).manual_seed(0)
    for pixels, _ in batches(store, order, setup.device):
        yield augment(pixels, generator), setup.labels


def main(args: Namespace) -> None:
    found = {"args": {k: str(v) for k, v in vars(args).items()}}
    if args.memory:
        found["saved_mb"] = memory()
        print("kept for the backward pass, ConvNeXt-B, 256x128, one image, float32:")
        for name, value in found["saved_mb"].items():
            print(f"  {name:<16} {value:8.1f} MB  (+{value - found['saved_mb']['none']:.1f})")
    else:
        throughput(args, found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def throughput(args: Namespace, found: dict) -> None:
    for name, figures in variants(args):
        found[name] = figures
        print(
            f"{name:<12} step {figures['step']:8.1f} images/s, loop {figures['loop']:8.1f} images/s, "
            f"ratio {figures['loop_over_step']:.3f}",
            flush=True,
        )
    for name, share in simam_shares(
        {name: figures["step"] for name, figures in found.items() if name != "args"}
    ).items():
        found[f"simam_share_{name}"] = share
        print(f"SimAM is {100 * share:.1f} % of the step of {name}")


def variants(args: Namespace):
    """Name and {step, loop, loop_over_step} of Table 4's four, one after another; medians of images/s."""
    size = (3, args.height, args.width)
    images = args.steps * args.batch_size
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.lib.format.open_memmap(f"{folder}/pixels.npy", "w+", np.uint8, (2048, *size))
        pixels[:] = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        store = ImageStore([""] * len(pixels), size, "bicubic", "disk", torch.device(args.device), pixels)
        for name, (attention, parts) in VARIANTS.items():
            setup = Setup(args, attention, parts)
            x = torch.randn(args.batch_size, *size, device=setup.device).contiguous(memory_format=torch.channels_last)
            rate(setup, [(x, setup.labels)] * 3, 1)  # warm up, compile
            step, loop = [], []
            for _ in range(args.rounds):
                step.append(rate(setup, [(x, setup.labels)] * args.steps, images))
                loop.append(rate(setup, loop_stream(setup, args, store), images))
            yield name, {"step": median(step), "loop": median(loop), "loop_over_step": median(loop) / median(step)}


def simam_shares(step: dict[str, float]) -> dict[str, float]:
    """The share of SimAM in the step of the two variants that have it, from images/s."""
    pairs = {"ConvNeXt-A": "ConvNeXt", "ConvNeXt-AP": "ConvNeXt-P"}
    return {name: 1 - step[name] / step[plain] for name, plain in pairs.items()}


if __name__ == "__main__":
    main(parse_args())
