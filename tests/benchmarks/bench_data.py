"""Images per second of the data path: decoded store and batched augmentation against a classic per-image loader.

    python tests/benchmarks/bench_data.py                         # temporary JPEGs of Market-1501's size, 64x128
    python tests/benchmarks/bench_data.py --data-dir data         # the images of a real Market-1501
    python tests/benchmarks/bench_data.py --device cuda --json bench_data.json

Both sides read the same files in the same order to 256x128 float32 batches on the device, with the list: resize
(bicubic), flip, pad 10, random crop, to tensor, normalise, random erasing. The store is filled before the clock
starts, and the time that took is printed apart. The sides take turns, round by round; each figure is a median over
the rounds:

  images/s      by the wall clock, from the end of the first batch to the end of the last (start of workers excluded);
                it says what a training run sees, and falls when other programs use the cores;
  images/CPU-s  images of all batches over user + system time of this process and of its ended loader processes
                (start of workers included); it says what the work costs, and hardly depends on other programs. It is
                steadiest with OMP_NUM_THREADS=1, where no thread spins while it waits for another.

Each is followed by its ratio to the classic loader.
"""

import argparse
import functools
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the one allowed path line: repository root first

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms as classic

from common import datasets
from common.images import batches, open_images
from common.samplers import identity_batches
from common.transforms import IMAGENET_MEAN, IMAGENET_STD, Augment


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder of a Market-1501; default: temporary JPEGs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("-j", "--workers", type=int, default=2, help="processes of the classic loader")
    parser.add_argument("-b", "--batch-size", type=int, default=128, help="images a batch, 8 of an identity")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each side, taken in turn")
    parser.add_argument("--small", action="store_true", help="few images and two rounds, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def write_jpegs(folder: Path, number: int) -> list[str]:
    """JPEGs of 64x128 with the spectrum of photographs, roughly: blurred noise of four sizes, quality 90."""
    rng = np.random.default_rng(0)
    paths = []
    for index in range(number):
        layers = [
            Image.fromarray(rng.integers(0, 256, (16 * 2**k, 8 * 2**k, 3), dtype=np.uint8)).resize((64, 128))
            for k in range(4)
        ]
        image = Image.blend(Image.blend(layers[0], layers[1], 0.4), Image.blend(layers[2], layers[3], 0.4), 0.3)
        paths.append(str(folder / f"{index:05d}.jpg"))
        image.filter(ImageFilter.GaussianBlur(0.6)).save(paths[-1], quality=90)
    return paths


class Classic(torch.utils.data.Dataset):
    """One image decoded and augmented at a time by PIL and torchvision."""

    def __init__(self, paths: list[str]):
        self.paths = paths
        self.transform = classic.Compose(
            [
                classic.Resize((256, 128), classic.InterpolationMode.BICUBIC),
                classic.RandomHorizontalFlip(),
                classic.Pad(10),
                classic.RandomCrop((256, 128)),
                classic.ToTensor(),
                classic.Normalize(IMAGENET_MEAN, IMAGENET_STD),
                classic.RandomErasing(0.5, (0.02, 0.4), (0.3, 10 / 3), IMAGENET_MEAN),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), index


def wait(device: torch.device) -> None:
    """Let the device finish, so that the clock is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def cpu_seconds() -> float:
    """User and system time so far of this process and of the children it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in usage)


def rates(stream, number: int, device: torch.device) -> tuple[float, float]:
    """Images per second and per CPU-second of a generator of batches on the device, number images in all."""
    wait(device)
    used = cpu_seconds()
    first = len(next(stream))
    wait(device)
    start = time.perf_counter()
    for batch in stream:
        del batch  # a training step would be done with it
    wait(device)
    wall_s = time.perf_counter() - start
    stream.close()  # the stream has ended, and its processes with it: their time is known
    return (number - first) / wall_s, number / (cpu_seconds() - used)


def classic_stream(paths: list[str], order: np.ndarray, workers: int, device: torch.device):
    """Batches of the per-image loader."""
    loader = torch.utils.data.DataLoader(
        Classic(paths), batch_sampler=order.tolist(), num_workers=workers, pin_memory=device.type == "cuda"
    )
    for images, _ in loader:
        yield images.to(device, non_blocking=True)


def store_stream(images, order: np.ndarray, device: torch.device):
    """Batches of the store, augmented on the device."""
    augment = Augment()
    generator = torch.Generator(device).manual_seed(0)
    for pixels, _ in batches(images, order, device):
        yield augment(pixels, generator)


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        if args.data_dir:
            paths = [sample.path for sample in datasets.load("market", args.data_dir).train]
        else:
            paths = write_jpegs(Path(folder), 256 if args.small else 4096)
        labels = np.arange(len(paths)) // 8
        iters = (3 if args.small else 16) + 1
        order = identity_batches(labels, args.batch_size // 8, 8, iters=iters, seed=0, epoch=0)
        start = time.perf_counter()
        stores = {"store (disk)": open_images(paths, 256, 128, cache_dir=folder, workers=args.workers)}
        fill_s = time.perf_counter() - start
        stores["store (device)"] = open_images(paths, 256, 128, cache="device", cache_dir=folder, device=device)
        streams = {"classic": lambda: classic_stream(paths, order, args.workers, device)}
        for name, images in stores.items():
            streams[name] = functools.partial(store_stream, images, order, device)
        rounds = [
            {name: rates(make(), order.size, device) for name, make in streams.items()}
            for _ in range(2 if args.small else args.rounds)
        ]
    report(args, len(paths), fill_s, rounds)


def report(args: argparse.Namespace, number: int, fill_s: float, rounds: list[dict[str, tuple[float, float]]]) -> None:
    """Print the medians and their ratios; write them and all rounds to the JSON file if one is asked for."""
    figures = {}
    for column, key in enumerate(("images_per_s", "images_per_cpu_s")):
        medians = {name: median(one[name][column] for one in rounds) for name in rounds[0]}
        figures[key] = medians
        figures[f"{key}_ratio"] = {name: value / medians["classic"] for name, value in medians.items()}
    print(
        f"{number} images, batch {args.batch_size}, {args.device}, classic loader with {args.workers} processes, "
        f"{torch.get_num_threads()} threads; store filled in {fill_s:.1f} s; medians of {len(rounds)} rounds"
    )
    print(f"{'':<16} {'images/s':>10} {'ratio':>8} {'images/CPU-s':>14} {'ratio':>8}")
    for name in rounds[0]:
        wall, wall_ratio, cpu, cpu_ratio = (values[name] for values in figures.values())
        print(f"{name:<16} {wall:>10,.0f} {wall_ratio:>6.1f} x {cpu:>14,.0f} {cpu_ratio:>6.1f} x")
    if args.json:
        result = {
            "images": number,
            "batch_size": args.batch_size,
            "device": args.device,
            "workers": args.workers,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "fill_s": fill_s,
            "rounds": rounds,
            "medians": figures,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
