"""Images a second of 4-image noise groups: the CPU oracle on one core against the batched version on the device.

python tests/benchmarks/bench_dapg.py --batch 16 --repeats 3
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the one allowed path line: repository root first

import cv2
import numpy as np
import torch

from dapg.noise import groups


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="tests/benchmarks/bench_dapg.py", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256, help="images of a device batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--oracle", type=int, default=32, help="groups that the CPU oracle makes")
    return parser.parse_args(argv)


def rates(args) -> tuple[float, float]:
    """Images a second of the oracle on one core and of the batched version on the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    picture = cv2.resize(rng.integers(0, 256, (16, 8, 3)).astype(np.uint8), (128, 256), interpolation=cv2.INTER_CUBIC)
    draw = groups.draw_noise(args.oracle, rng)
    groups.noise_group_cpu((picture,) * 3, draw, 0, rng)  # textures are made once
    began = time.process_time()
    for row in range(args.oracle):
        groups.noise_group_cpu((picture,) * 3, draw, row, rng)
    core = 4 * args.oracle / (time.process_time() - began)
    views = (torch.from_numpy(picture).permute(2, 0, 1).expand(args.batch, -1, -1, -1).contiguous().to(device),) * 3
    generator, times = torch.Generator(device).manual_seed(0), []
    for _ in range(args.repeats + 1):
        draw = groups.draw_noise(args.batch, rng)
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter() if device.type == "cuda" else time.process_time()
        groups.noise_group(views, draw, generator)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() if device.type == "cuda" else time.process_time()) - began)
    return core, 4 * args.batch / float(np.median(times[1:]))


def main(args):
    core, rate = rates(args)
    print(
        f"CPU oracle, one core: {core:.1f} images/s; batched on {'cuda' if torch.cuda.is_available() else 'cpu'}: "
        f"{rate:.1f} images/s, {rate / core:.1f} x (256 x 128, four images a group, processor time on the CPU)"
    )


if __name__ == "__main__":
    main(parse_args())
