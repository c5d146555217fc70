"""Images a second of every project's training on this machine: the step alone and the loop, and their ratio.

The step is the project's own epoch on a batch that lies on the device already; the loop is the same epoch as the script
runs it: sampler, decoded store on the disk, augmentation, step. Random images, random weights, the paper's network and
batch at the paper's size, in the precision of its rows (off is float32 with TF32 products) and where that is off in
bf16 as well. Medians of rounds, the two sides in turn.
"""

import contextlib
import functools
import statistics
import tempfile
from argparse import Namespace
from unittest import mock

import numpy as np
import torch

from common import images, inputs, runtime, samplers, transforms
from common.datasets import Sample
from tests.benchmarks.device.figures import fitting, peak_mib, seconds, timed

ROUND_S = 0.8  # about, of each side
STILL = "--lr 1e-6"  # random images on end must not end in a loss that is not finite
IMAGES, EACH = 2048, 8  # of the random data, and of one person


def measure(keep, title: str, batch: int, epoch, loop, most: int, small: bool) -> float:
    """Keep images/s of epoch(n) and loop(n), n steps each, their ratio and the peak of memory; returns the step's."""
    peak = peak_mib(lambda: epoch(2))
    loop(2)
    count = min(most, 2 if small else max(4, int(ROUND_S / (timed(lambda: epoch(2))[1] / 2))))
    times = [[timed(lambda side=side: side(count))[1] for side in (epoch, loop)] for _ in range(1 if small else 3)]
    step, whole = (batch * count / statistics.median(side) for side in zip(*times))
    keep(f"{title}: step", step, "images/s")
    keep(f"{title}: loop", whole, "images/s")
    keep(f"{title}: loop / step", whole / step, "")
    if peak is not None:
        keep(f"{title}: peak memory of a step", peak, "MiB")
    return step


@contextlib.contextmanager
def random_store(number: int, height: int, width: int):
    """A store on the disk, as open_images leaves it, of images of low noise."""
    with tempfile.TemporaryDirectory() as folder:
        shape = (number, 3, height, width)
        pixels = np.lib.format.open_memmap(f"{folder}/pixels.npy", "w+", np.uint8, shape)
        rng = np.random.default_rng(0)
        pixels[:] = rng.integers(0, 256, shape[1:], dtype=np.uint8)
        pixels[:, :, ::2] += rng.integers(0, 64, (number, 3, 1, 1), dtype=np.uint8)  # told apart
        yield images.ImageStore([""] * number, shape[1:], "bicubic", "disk", torch.device("cpu"), pixels)


def on_device(store: images.ImageStore, device: torch.device, number: int) -> images.ImageStore:
    """The first images of a store in the device's memory."""
    pixels = torch.from_numpy(np.array(store.pixels[:number])).to(device)
    return images.ImageStore(store.paths[:number], pixels.shape[1:], "bicubic", "device", device, pixels)


def people(number: int) -> torch.Tensor:
    """Labels (N,) of EACH images a person."""
    return torch.arange(number) // EACH


def named(args, network: str, batch: int) -> str:
    return f"{network}, {args.height} x {args.width}, batch {batch}, {args.amp if args.amp != 'off' else 'fp32'}"


def precisions(small: bool) -> tuple[str, ...]:
    return ("bf16",) if small else ("off", "bf16")


def flags(words: str, small: bool, tiny: str) -> list[str]:
    return f"{words} {tiny if small else ''}".split()


# --------------------------------------------------------------------------------------------------------- AFF_SCL
def aff_scl(keep, small: bool) -> None:
    """sec. 3.4 with clusters of EACH images: symmetric contrast against memories, Adam."""
    for amp in precisions(small):
        fitting(16 if small else 128, 16, lambda batch, amp=amp: contrast(keep, small, batch, amp))


def contrast(keep, small: bool, batch: int, amp: str) -> None:
    from aff_scl import train

    tiny = "--backbone resnet18 --height 64 --width 32 --bn-groups 2"
    args = train.parse_args(flags(f"{STILL} --weights none --amp {amp} --batch-size {batch}", small, tiny))
    run = runtime.start(args, "aff_scl")
    with random_store(64 if small else IMAGES, args.height, args.width) as store:
        labels = people(len(store))
        data = Namespace(train=[Sample("", int(label), i % 6) for i, label in enumerate(labels)])
        target = Namespace(data=data, store=store, labels=labels)
        model, optimizer, _ = train.optimised(args, run, train.build(args, run, 0))
        memory = train.new_memory(args, inputs.extract(run, model, store), labels)
        state = run, args, model, optimizer, runtime.scaler(run), 0, target, labels, memory
        args.iters = 1
        (pair,), _, k = train.identity_batches(run, args, target, labels, 0, args.seed)

        def loop(count: int) -> None:
            args.iters = count
            train.usl_epoch(*state)

        def epoch(count: int) -> None:
            with mock.patch.object(train, "identity_batches", lambda *_: ([pair] * count, count, k)):
                train.usl_epoch(*state)

        measure(keep, named(args, args.backbone, batch), batch, epoch, loop, 40, small)


# ----------------------------------------------------------------------------------------------------- ConvNeXt-AP
def convnext_ap(keep, small: bool) -> None:
    """All four variants of Table 4, and SimAM's share of the step of two."""
    for amp in precisions(small):
        fitting(8 if small else 64, 8, lambda batch, amp=amp: attention(keep, small, batch, amp))


def attention(keep, small: bool, batch: int, amp: str) -> None:
    from tests.benchmarks import bench_convnext_ap as bench

    tiny = "--trunk tiny --height 192 --width 64 --steps 2 --rounds 1"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    words = f"--device {device} --amp {amp} --batch-size {batch} --steps 8 --rounds 3"
    args = bench.parse_args(flags(words, small, tiny))
    step = {}
    for name, figures in bench.variants(args):
        title, step[name] = named(args, name, batch), figures["step"]
        keep(f"{title}: step", figures["step"], "images/s")
        keep(f"{title}: loop", figures["loop"], "images/s")
        keep(f"{title}: loop / step", figures["loop_over_step"], "")
    for name, share in bench.simam_shares(step).items():
        keep(f"{named(args, name, batch)}: SimAM's share of the step", 100 * share, "%")


# -------------------------------------------------------------------------------------------------- pixel sampling
def pixel_sampling(keep, small: bool) -> None:
    """Table II's last line without erasing: X and X' through ResNet-50; then what sampling costs of it."""
    from tests.benchmarks import bench_pixel_sampling as bench

    for amp in precisions(small):
        fitting(8 if small else 64, 8, lambda batch, amp=amp: doubled(keep, small, batch, amp))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, parts = bench.batch(device)
    if small:
        batch, parts = batch[:8, :, ::4, ::4].contiguous(), parts[:8, ::4, ::4].contiguous()
    cost = {}
    for form in (None, *bench.FORMS):
        draw = torch.Generator().manual_seed(1)
        work = functools.partial(bench.sample_pixels, batch, parts, draw, form=form)
        cost[form] = seconds(work, 1 if small else 5)
        keep(f"sampling {len(batch)} images, {form or 'as the training does'}", 1000 * cost[form], "ms")
    step = seconds(bench.training_step(batch, parts, device), 1 if small else 5)
    keep("sampling's share of the training step, bf16", 100 * cost[None] / step, "%")


def doubled(keep, small: bool, batch: int, amp: str) -> None:
    from pixel_sampling import train
    from pixel_sampling.masks import MaskStore

    tiny = "--backbone resnet18 --height 64 --width 32"
    args = train.parse_args(flags(f"{STILL} --weights none --amp {amp} --batch-size {batch}", small, tiny))
    run = runtime.start(args, "pixel_sampling")
    with random_store(64 if small else IMAGES, args.height, args.width) as store:
        labels, ids = people(len(store)), batch // args.num_instances
        maps = np.zeros((len(store), args.height, args.width), np.uint8)
        maps[:, args.height // 5 : args.height // 2] = 2
        maps[:, args.height // 2 :] = 3
        masks = MaskStore([Sample("", 1, 0, mask="there")] * len(store), *maps.shape[1:], "part6", run.device, maps)
        network, optimizer, _ = train.build(args, run, int(labels.max()) + 1)
        state = run, args, network, optimizer, runtime.scaler(run)
        generator, augment = runtime.generator(run, 0), train.augmentation(args)

        def batches(count: int):
            order = samplers.identity_epoch(labels.numpy(), ids, args.num_instances, seed=0, epoch=0)[:count]
            return train.stream(run, args, store, masks, labels, order, augment, generator)

        def loop(count: int) -> None:
            train.train_one_epoch(*state, batches(count), count, 0)

        (resident,) = batches(1)

        def epoch(count: int) -> None:
            train.train_one_epoch(*state, [resident] * count, count, 0)

        most = len(store) // EACH // ids  # steps of the sampler's epoch
        measure(keep, named(args, f"{args.backbone}, X and X'", batch), batch, epoch, loop, most, small)


# ---------------------------------------------------------------------------------------------------------- PRSNet
def prsnet(keep, small: bool) -> None:
    """Pre-training of PRSNet and of MAE, with the share of the peak of a matrix product that the step reaches."""
    from tests.benchmarks import bench_prsnet as bench

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 256 if small else 8192
    peak = bench.peak_flops(device, torch.bfloat16, size)
    keep(f"peak of this device, bf16 matrix product of {size}", peak / 1e12, "TFLOP/s")
    for model in ("prsnet", "mae"):
        fitting(8 if small else 256, 8, lambda batch, model=model: rebuilt(keep, small, batch, model, peak))
        fitting(8 if small else 64, 8, lambda batch, model=model: centroids(keep, small, batch, model))


def rebuilt(keep, small: bool, batch: int, model: str, peak: float) -> None:
    from prsnet import pretrain
    from tests.benchmarks import bench_prsnet as bench

    words = f"{STILL} --amp bf16 --model {model} --batch-size {batch}"
    args = pretrain.parse_args(flags(words, small, "--size tiny --height 64 --width 32 --mask-block 4 4"))
    run = runtime.start(args, "prsnet")
    steps = 2 if small else IMAGES // batch
    with random_store(steps * batch, args.height, args.width) as store:
        network, optimizer, scheduler = pretrain.build(args, run, steps)
        state = run, args, network, optimizer, scheduler, runtime.scaler(run)
        augment = transforms.Augment(
            flip=0.5, pad=0, crop_scale=tuple(args.crop_scale), crop_ratio=tuple(args.crop_ratio),
            interpolation="bicubic", erase=0.0, channels_last=True,
        )  # fmt: skip

        def part(count: int, whole: images.ImageStore) -> images.ImageStore:
            number, kind = count * batch, (whole.cache, whole.device)
            return images.ImageStore(
                whole.paths[:number], whole.pixels.shape[1:], "bicubic", *kind, whole.pixels[:number]
            )

        def loop(count: int) -> None:
            pretrain.train_one_epoch(*state, part(count, store), augment, 0)

        there = on_device(store, run.device, len(store))
        x = augment(there.pixels[:batch], runtime.generator(run, 0))

        def epoch(count: int) -> None:
            pretrain.train_one_epoch(*state, part(count, there), lambda pixels, generator: x, 0)

        title = named(args, f"pre-training {model}", batch)
        rate = measure(keep, title, batch, epoch, loop, steps, small)
        flops = bench.forward_flops(pretrain.build_model(args).to(run.device), x[:2], args)
        keep(f"{title}: share of the peak (a step is three forward passes)", 100 * rate * 3 * flops / peak, "%")


def centroids(keep, small: bool, batch: int, model: str) -> None:
    from prsnet import train

    words = f"{STILL} --model {model} --weights none --batch-size {batch}"
    args = train.parse_args(flags(words, small, "--size tiny --height 64 --width 32 --mask-block 4 4"))
    run = runtime.start(args, "prsnet")
    torch.backends.cudnn.benchmark = False  # as train.py does
    with random_store(64 if small else IMAGES, args.height, args.width) as store:
        labels = people(len(store))
        network, optimizer, centres, _ = train.build(args, run, int(labels.max()) + 1, "market")
        state = run, args, network, [optimizer, centres], runtime.scaler(run)
        augment = transforms.Augment(pad=10 * args.height // 256, erase_law="uniform", channels_last=True)
        there = on_device(store, run.device, len(store))
        x = augment(there.pixels[:batch], runtime.generator(run, 0))

        def loop(count: int) -> None:
            args.iters = count
            train.train_one_epoch(*state, store, labels, augment, 0)

        def epoch(count: int) -> None:
            args.iters = count
            train.train_one_epoch(*state, there, labels, lambda pixels, generator: x[: len(pixels)], 0)

        most = len(store) // EACH // (batch // args.num_instances)
        measure(keep, named(args, f"fine-tuning {model}", batch), batch, epoch, loop, most, small)


# ------------------------------------------------------------------------------------------------------------ DAPG
def dapg(keep, small: bool) -> None:
    """Noise groups against one core, then stage robust and AGW's fine-tuning."""
    from tests.benchmarks import bench_dapg as bench

    words = "--batch 8 --repeats 1 --oracle 2" if small else "--batch 256 --repeats 5 --oracle 24"
    threads = torch.get_num_threads()
    core, rate = bench.rates(bench.parse_args(words.split()))  # with one thread
    torch.set_num_threads(threads)
    keep("noise groups of four images, one core", core, "images/s")
    keep("noise groups of four images, this device", rate, "images/s")
    keep("noise groups, device / core", rate / core, "x")
    fitting(8 if small else 256, 8, lambda batch: robust(keep, small, batch))
    fitting(16 if small else 64, 16, lambda batch: agw(keep, small, batch))


def started(small: bool, words: str):
    """(args, run) of dapg/train.py with these flags."""
    from dapg.flags import parse_args, variants

    args = parse_args(flags(f"{STILL} --weights none {words}", small, "--backbone resnet18 --height 64 --width 32"))
    run = runtime.start(args, "dapg")
    args.settings = variants(args)
    return args, run


def robust(keep, small: bool, batch: int) -> None:
    from dapg.pretrain import stage

    args, run = started(
        small, f"--stage robust --amp bf16 --batch-size {batch} --variant queue={64 if small else 65536}"
    )
    with random_store(32 if small else IMAGES, args.height, args.width) as store:
        model, optimizer, scheduler = stage.build(args, run, len(store))
        state, monitor = (model, optimizer, scheduler, runtime.scaler(run)), stage.Monitor(run, 10**9)
        there, step = on_device(store, run.device, len(store)), stage.make_step(args, run, 0, None)
        views = step.images(there.pixels[:batch], torch.arange(batch))
        resident = stage.make_step(args, run, 0, None)
        resident.images = lambda pixels, indices: views

        def loop(count: int) -> None:
            args.iters = count
            stage.train_one_epoch(args, run, step, *state, store, monitor)

        def epoch(count: int) -> None:
            args.iters = count
            stage.train_one_epoch(args, run, resident, *state, there, monitor)

        title = named(args, f"stage robust, {args.backbone}", batch)
        measure(keep, title, batch, epoch, loop, len(store) // batch, small)


def agw(keep, small: bool, batch: int) -> None:
    from dapg.downstream import stage

    args, run = started(small, f"--stage agw --batch-size {batch}")
    with random_store(64 if small else IMAGES, args.height, args.width) as store:
        labels = people(len(store)).numpy()
        data = Namespace(
            parts=dict.fromkeys(("train_rgb", "train_ir"), [None] * len(store)),
            labels=dict.fromkeys(("train_rgb", "train_ir"), labels),
            stores=dict.fromkeys(("train_rgb", "train_ir"), store),
            num_classes=int(labels.max()) + 1,
            split=0,
        )
        model, optimizer, _ = stage.build(args, run, data)
        there = on_device(store, run.device, len(store))
        resident = Namespace(**{**vars(data), "stores": dict.fromkeys(("train_rgb", "train_ir"), there)})
        half = there.pixels[: batch // 2]
        shown = stage.views(args, half, half, runtime.generator(run, 0))

        def loop(count: int) -> None:
            args.iters = count
            stage.train_one_epoch(args, run, model, optimizer, runtime.scaler(run), data, 0)

        def epoch(count: int) -> None:
            args.iters = count
            with mock.patch.object(stage, "views", lambda *_: shown):
                stage.train_one_epoch(args, run, model, optimizer, runtime.scaler(run), resident, 0)

        title = named(args, f"stage agw, {args.backbone}", batch)
        measure(keep, title, batch, epoch, loop, len(store) // (batch // 2), small)
