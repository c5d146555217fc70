"""Cost of pixel sampling a step at 64 x 3 x 256 x 128: both vectorisations, a naive loop over images, a training step.

python tests/benchmarks/bench_pixel_sampling.py              # CPU, and the GPU where there is one
python tests/benchmarks/bench_pixel_sampling.py --no-step    # without the training step, which takes a CPU a minute
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the one allowed path line: repository root first

import torch

from pixel_sampling import losses, model
from pixel_sampling.sampling import FORMS, sample_pixels

SHAPE = (64, 3, 256, 128)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-step", action="store_true", help="leave the training step out")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(argv)


def batch(device):
    """Normal noise, and parts as a parser gives them: a head, a shirt, trousers and shoes of random sizes."""
    draw = torch.Generator().manual_seed(0)
    parts = torch.zeros(SHAPE[0], *SHAPE[2:], dtype=torch.uint8)
    for one in parts:
        left, width, hip = (int(torch.randint(*r, (1,), generator=draw)) for r in ((20, 40), (45, 65), (110, 140)))
        for part, rows in ((1, (10, 45)), (2, (45, hip)), (3, (hip, 225)), (5, (225, 245))):
            one[rows[0] : rows[1], left : left + width] = part
    images = torch.randn(SHAPE, generator=draw).to(device, memory_format=torch.channels_last)
    return images, parts.to(device)


def naive(images, parts, draw, classes=(2, 3)):
    """The same operation image by image: collect the bank of the shuffled batch, then fill each image from it."""
    out = images.clone()
    for part in classes:
        order = torch.randperm(len(images), generator=draw).tolist()
        bank, used = torch.cat([images[i][:, parts[i] == part] for i in order], 1), 0
        for i in range(len(images)):
            mask = parts[i] == part
            number = int(mask.sum())
            out[i][:, mask] = bank[:, used : used + number]
            used += number
    return out


def pixelwise(images, parts, draw, classes=(2, 3)):
    """The loop over images and pixels, as Eqs. (1)-(2) read."""
    out, (rows, columns) = images.clone(), SHAPE[2:]
    for part in classes:
        order, bank = torch.randperm(len(images), generator=draw).tolist(), []
        for i in order:
            bank += [images[i, :, y, x] for y in range(rows) for x in range(columns) if parts[i, y, x] == part]
        taken = iter(bank)
        for i in range(len(images)):
            for y in range(rows):
                for x in range(columns):
                    if parts[i, y, x] == part:
                        out[i, :, y, x] = next(taken)
    return out


def seconds(work, device, rounds):
    """The shortest wall time of one call; with more than one round after a warm-up."""
    if rounds > 1:
        work()
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def training_step(images, parts, device):
    """A whole training step of T2-c without sampling: 128 images through ResNet-50, losses, backward, SGD."""
    network = model.build("bot", 150).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    labels = torch.arange(len(images) // 4, device=device).repeat_interleave(4).repeat(2)
    x = torch.cat([images, sample_pixels(images, parts, torch.Generator().manual_seed(0))])

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = network(x)
        loss, _ = losses.total_loss(output, labels, network.reduction, "l2")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main(argv=None):
    args = parse_args(argv)
    for device in [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]:
        images, parts = batch(device)
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
        print(f"{name}: {tuple(SHAPE)}, {100 * ((parts == 2) | (parts == 3)).float().mean():.0f} % of pixels change")
        expected = naive(images, parts, torch.Generator().manual_seed(1))
        cost = {
            "loop over images": seconds(
                lambda: naive(images, parts, torch.Generator().manual_seed(1)), device, args.rounds
            )
        }
        for form in FORMS:

            def work(form=form):
                return sample_pixels(images, parts, torch.Generator().manual_seed(1), form=form)

            if not torch.equal(work(), expected):
                raise SystemExit(f"{form} differs from the loop")
            cost[form] = seconds(work, device, args.rounds)
        few = slice(0, 2)
        cost["loop over pixels"] = (
            seconds(
                lambda: pixelwise(images[few].cpu(), parts[few].cpu(), torch.Generator().manual_seed(1)),
                torch.device("cpu"),
                1,
            )
            * SHAPE[0]
            / 2
        )
        best = min(cost[form] for form in FORMS)
        for what, time_s in cost.items():
            print(f"  {what:<18} {1000 * time_s:10.2f} ms   {time_s / best:8.1f} x")
        if not args.no_step:
            step = seconds(training_step(images, parts, device), device, 1 if device.type == "cpu" else args.rounds)
            print(f"  training step      {1000 * step:10.2f} ms   sampling is {100 * best / step:.2f} % of it")


if __name__ == "__main__":
    main()
