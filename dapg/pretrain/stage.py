"""Stages `robust` (sec. II-A) and `align` (sec. II-B): contrastive pre-training; baselines SimCLR, BYOL, MoCo."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import batchnorm, evaluation, images, inputs, log_folder, processes, runtime
from common.epoch import Epoch
from dapg import trunk
from dapg.data import open_store, subset
from dapg.model import BYOL, Contrast, SimCLR, checksum, queue_size
from dapg.noise import device_corruptions, groups
from dapg.poses.gan import generated_files
from dapg.pretrain import baselines
from dapg.pretrain.align import Align
from dapg.pretrain.robust import Robust
from dapg.pretrain.step import Step

WINDOW, COLLAPSED, CHECK = (
    200,
    0.2,
    50,
)  # steps that the spread must stay below the bound before we warn; how often we look
INSTANCES = 256  # images of the instance retrieval that is recorded
STEPS = {"dapg": Robust, "simclr": baselines.SimCLR, "byol": baselines.BYOL, "moco": baselines.MoCo}  # of stage robust


def run_stage(args, run) -> None:
    """The whole of stage robust or align: data, training, exported trunk, result file."""
    data = inputs.dataset(run, args.dataset)
    samples = subset(data.train, args.subset, args.settings["subset_seed"])
    if args.stage == "align" and args.settings["market_split"] == "all":
        samples = samples + [s for s in data.gallery if s.pid >= 0]
    log_folder.open_log(run, inputs.data_name(data))
    processes.say(run, f"{len(samples)} images for --stage {args.stage}, no labels used")
    store = open_store(run, samples, args.height, args.width, f"{data.name} {args.stage}")
    generated = open_generated(args, run, samples) if args.stage == "align" else None
    model, optimizer, scheduler = build(args, run, len(samples))
    grad_scaler, monitor = runtime.scaler(run), Monitor(run, warmup_steps(args, len(samples)))
    first = log_folder.resume(run, model, optimizer, scheduler, grad_scaler)
    if "before" not in run.extra:
        run.extra["before"] = instance_metrics(run, model, store)
    say_negatives(args, run, log_folder.bare(model))
    for number in range(first, args.epochs):
        runtime.seed_epoch(run, number)
        step = make_step(args, run, number, generated)
        stats = train_one_epoch(args, run, step, model, optimizer, scheduler, grad_scaler, store, monitor)
        run.extra["last"] = stats
        log_folder.save(run, number + 1, model, optimizer, scheduler, grad_scaler, stats)
    record(args, run, model, data, len(samples), instance_metrics(run, model, store))


def make_step(args, run, number: int, generated: images.ImageStore | None) -> Step:
    """The training step of --stage and --method in epoch `number`."""
    return Align(args, run, number, generated) if args.stage == "align" else STEPS[args.method](args, run, number)


def open_generated(args, run, samples: list) -> images.ImageStore:
    """The generated poses of the samples, four an image."""
    files = generated_files(args, [s.path for s in samples])
    with processes.rank_zero_first(run):
        return images.open_images(
            files,
            args.height,
            args.width,
            cache=args.cache,
            cache_dir=args.cache_dir,
            device=run.device,
            workers=args.workers,
            name="generated poses",
        )


def build(args, run, count: int):
    """Model with its initial trunk (after a pre-training of this shape, also its head), optimiser, schedule in steps.

    BatchNorm has the statistics of the global batch; that of the key encoder those of bn_splits groups of the shuffled
    one (MoCo's shuffled BatchNorm, in which each of its processes is a group), for any number of processes.
    """
    if args.method in ("simclr", "byol"):
        model = batchnorm.over_groups({"simclr": SimCLR, "byol": BYOL}[args.method](args.backbone), run.world_size)
    else:
        size = queue_size(count, args.settings["queue"] or None)
        size = size if args.stage == "robust" else min(size, 4096)
        model = Contrast(args.backbone, size, momentum=args.settings["momentum"])
        batchnorm.over_groups(model.encoder_q, run.world_size)
        batchnorm.over_groups(model.encoder_k, run.world_size, args.settings["bn_splits"])
    own = model.learner.state_dict()
    state = trunk.load(args.weights, args.backbone, args.logs_dir, args.synthetic, own)
    if state is not None:
        model.load_encoder(state)
    model = model.to(run.device, memory_format=torch.channels_last)
    weights = [p for p in model.parameters() if p.requires_grad]
    if args.method == "dapg":
        optimizer = torch.optim.Adam(weights, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    else:
        optimizer = torch.optim.SGD(
            weights, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=run.device.type == "cuda"
        )
    steps, warmup = steps_per_epoch(args, count), min(args.settings["warmup"], args.epochs / 2)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: trunk.cosine((step + 1) / steps, args.epochs, warmup)
    )
    return processes.parallel(run, model), optimizer, rate


def steps_per_epoch(args, count: int) -> int:
    if count < args.batch_size:
        raise ValueError(f"{count} images cannot fill a batch of {args.batch_size}; use --batch-size {count} or less")
    return min(count // args.batch_size, args.iters or count)


def warmup_steps(args, count: int) -> int:
    return round(args.settings["warmup"] * steps_per_epoch(args, count))


def epoch_batches(args, run, count: int, number: int) -> np.ndarray:
    """This rank's indices (steps, B / world size): a part of each global batch of the epoch's permutation."""
    steps = steps_per_epoch(args, count)
    order = np.random.default_rng([args.seed, number]).permutation(count)[: steps * args.batch_size]
    return order.reshape(steps, run.world_size, -1)[:, run.rank]


def train_one_epoch(
    args, run, step: Step, model, optimizer, scheduler, grad_scaler, store, monitor
) -> dict[str, float]:
    """One pass over the images; returns the mean losses."""
    batches = epoch_batches(args, run, len(store), step.number)
    stream = images.batches(store, batches, run.device, workers=args.workers)
    epoch, before = Epoch(run, step.number, stream, len(batches)), step.number * len(batches)
    model.train()
    for pixels, indices in epoch:
        done = before + epoch.step - 1  # steps of the whole training
        loss, parts, keys = step(model, pixels, indices)
        if runtime.step(run, loss, [optimizer], grad_scaler, epoch.where):
            log_folder.bare(model).after_step(keys, done / (args.epochs * len(batches)))  # the queue, or BYOL's target
        scheduler.step()
        epoch.add(len(pixels), loss=loss, **parts)
        monitor.see(parts["spread"], done)
    check_queues(run, log_folder.bare(model))
    return epoch.means(model, digits=4)


class Monitor:
    """Warns once when the spread was below COLLAPSED for WINDOW steps on end after the warm-up.

    It counts on the device, and the host looks every CHECK steps.
    """

    def __init__(self, run, quiet_steps: int):
        self.run, self.quiet, self.low, self.warned = run, quiet_steps, 0, False

    def see(self, value: Tensor, step: int) -> None:
        if step < self.quiet or self.warned:
            return
        self.low = torch.where(value < COLLAPSED, self.low + 1, 0)
        if (step + 1) % CHECK == 0 and self.low >= WINDOW:
            self.warned = True
            processes.say(
                self.run,
                f"warning: the features have collapsed: their spread is {float(value):.3f} (1 is isotropic) and was "
                f"below {COLLAPSED} for {WINDOW} steps, at step {step}; lower --lr or use --preset stable",
            )


def check_queues(run, model) -> None:
    """Check that the queues of all ranks are equal to the bit."""
    if run.world_size > 1 and isinstance(model, Contrast):
        sums = processes.gather(run, torch.stack([checksum(model.queue), checksum(model.pointer)])[None])
        if bool((sums != sums[0]).any()):
            raise ValueError("the queues of the processes differ; this is a fault of the program, please report it")


def say_negatives(args, run, model) -> None:
    """How many negatives a query has, and what Eq. (2) is where all similarities are equal."""
    if isinstance(model, Contrast):
        positives = 3 if args.stage == "robust" and args.method == "dapg" and args.loss != "infonce" else 1
        negatives = len(model.queue) if args.negatives == "queue" else 3 * (args.batch_size - 1)
        equal = math.log((positives + negatives) / positives)
        processes.say(run, f"{negatives} negatives ({args.negatives}); L_MC of equal similarities is {equal:.3f}")


class Pixels:
    """Images in memory for evaluation.extract."""

    def __init__(self, pixels: Tensor):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def gather(self, indices):
        return self.pixels[indices]


def instance_metrics(run, model, store) -> dict:
    """Instance retrieval: the anchor noise images of up to 256 images as queries, their clean images as the gallery."""
    index = np.unique(np.linspace(0, len(store) - 1, INSTANCES).astype(np.int64))
    clean = store.gather(index).to(run.device)
    generator = torch.Generator(run.device).manual_seed(0)
    draw = groups.draw_noise(len(index), np.random.default_rng(0))
    noisy = device_corruptions.corrupt(clean, draw.types[:, 0], draw.severities[:, 0], generator)
    feats = [
        inputs.extract(run, log_folder.bare(model).learner.trunk, Pixels(x), batch_size=64) for x in (noisy, clean)
    ]
    feats = [F.normalize(f, dim=1) for f in feats]
    ids, camera = np.arange(len(index)), np.zeros(len(index), np.int64)
    m = evaluation.rank_metrics(*feats, ids, ids, camera, camera + 1)
    return {"instance.rank1": m.rank(1), "instance.mAP": m.mAP}


def record(args, run, model, data, count: int, after: dict) -> None:
    """Export the trunk and write the result file of a finished pre-training on `count` images."""
    if run.main:
        meta = {key: getattr(args, key) for key in ("stage", "method", "row", "backbone", "epochs")}
        meta |= {"data": inputs.data_name(data), "images": count}
        trunk.export(run.log_dir / "trunk.pt", log_folder.bare(model).learner, meta)
    metrics = {**after, **{f"before.{k}": v for k, v in run.extra["before"].items()}, **run.extra["last"]}
    protocol = {
        "dataset": inputs.data_name(data),
        "queries": "one corruption an image",
        "gallery": "the clean images",
        "images": min(INSTANCES, count),
        "labels": "none",
    }
    path = runtime.record(run, metrics, inputs.describe(data), protocol, epoch=args.epochs)
    processes.say(
        run,
        f"instance rank-1 {100 * run.extra['before']['instance.rank1']:.1f} -> "
        f"{100 * after['instance.rank1']:.1f}; trunk in {run.log_dir / 'trunk.pt'}; result in {path}",
    )
