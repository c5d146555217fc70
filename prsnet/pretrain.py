"""PRSNet, masked self-supervised pre-training (paper sec. III-A to III-D, IV-A) of the encoder for prsnet/train.py.

    bash prsnet/run_pretrain.sh                              # all GPUs, resumes by itself
    python prsnet/pretrain.py --row pretrain/prsnet          # one GPU; --row pretrain/mae for the baseline of Table III
    python prsnet/pretrain.py --row demo/pretrain            # one CPU, rendered people, nothing to download

The loss starts near 1 (normalised images have about unit variance) and must fall well below the value of drawing every
image's mean colour, which is printed beside it. best.pt in the log folder has the lowest loss (sec. IV-A).
"""

import dataclasses
import math
import sys
import time
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from common import flags
from prsnet.flags import fine_tuning
from prsnet.flags import pretrain_args as parse_args

if __name__ == "__main__":
    arguments = flags.answer(parse_args)  # torch is loaded below

import torch

from common import batchnorm, checkpoints, images, inputs, log_folder, processes, records, runfiles, runtime, transforms
from common.epoch import Epoch
from prsnet import masking, protocols, sampling
from prsnet.mae import MAE
from prsnet.model import SIZES, PRSNet
from prsnet.prepare import synthetic_crops

PROBES = 256  # images, un-augmented and with fixed masks, on which a run is measured


def build_model(args: Namespace) -> torch.nn.Module:
    """The autoencoder of the flags, without weights: (images, masked) -> reconstruction."""
    size = SIZES[args.size]
    if args.model == "mae":
        return MAE(args.height, args.width, tuple(args.mask_block), size, args.mask_ratio)
    return PRSNet(args.height, args.width, args.block, size, args.bottleneck)


def build(args, run, steps_per_epoch):
    """Autoencoder on the device, AdamW without decay on vectors, warm-up and half cosine per iteration."""
    model = batchnorm.over_groups(build_model(args), run.world_size)
    model = model.to(run.device, memory_format=torch.channels_last)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr * args.batch_size / 256, betas=(0.9, 0.95), fused=True)
    if args.clip:

        def clip(*_):
            torch.nn.utils.clip_grad_norm_(matrices + vectors, args.clip)

        optimizer.register_step_pre_hook(clip)
    factor = cosine(args.warmup * steps_per_epoch, args.epochs * steps_per_epoch)
    return processes.parallel(run, model), optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def cosine(warmup: int, total: int):
    """Rate factor by iteration: linear from 0 over `warmup`, then half a cosine down to 0 at `total`."""
    return lambda step: (
        step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    )


def objective(args, model, x, generator, run):
    """Eq. (1) of a batch of normalised images, () float32: mask, rebuild, compare over the region of --mask-loss."""
    grid = masking.grid_of(args.height, args.width, args.mask_block)
    count = masking.num_masked(grid, args.mask_ratio)
    noise = masking.draw(len(x), grid, generator)
    masked = masking.from_noise(noise, grid, count)
    with run.autocast():
        rebuilt = model(x, masked)
    region = {"masked": masked, "authors": masking.authors_region(noise, grid, count), "all": None}[args.mask_loss]
    return masking.reconstruction_loss(x, rebuilt, region)


def train_one_epoch(run, args, model, optimizer, scheduler, grad_scaler, store, augment, number):
    """One pass over the crops in random order; returns the means over steps and ranks, `loss` above all."""
    model.train()
    generator = runtime.generator(run, number)
    order = sampling.shuffled_batches(
        len(store), args.batch_size, seed=args.seed, epoch=number, rank=run.rank, world_size=run.world_size
    )
    epoch = Epoch(run, number, images.batches(store, order, run.device, workers=args.workers), len(order))
    for pixels, _ in epoch:
        loss = objective(args, model, augment(pixels, generator), generator, run)
        runtime.step(run, loss, [optimizer], grad_scaler, epoch.where)
        scheduler.step()
        epoch.add(len(pixels), loss=loss)
    return epoch.means(model, f"lr {scheduler.get_last_lr()[0]:.2e}", digits=4)


@torch.no_grad()
def probe(run, args, model, store) -> dict:
    """Eq. (1) on un-augmented images under fixed masks, of the network and of drawing the image's mean colour."""
    model, grid, sums, seen = (
        log_folder.bare(model).eval(),
        masking.grid_of(args.height, args.width, args.mask_block),
        [0.0, 0.0],
        0,
    )
    generator = torch.Generator(run.device).manual_seed(0)
    for indices in torch.arange(min(PROBES, len(store))).split(32):
        x = transforms.normalize(store.gather(indices).to(run.device))
        masked = masking.random_mask(len(x), grid, args.mask_ratio, generator)
        for i, rebuilt in enumerate((model(x, masked), masking.mean_colour(x))):
            sums[i] += masking.reconstruction_loss(x, rebuilt, masked).item() * len(x)
        seen += len(x)
    return {"masked_mse": sums[0] / seen, "mean_colour_mse": sums[1] / seen}


def keep_best(run, model, epoch, loss):
    """Write best.pt if this epoch's mean loss is the lowest so far (rank 0)."""
    if loss >= run.extra.get("best_loss", math.inf):
        return
    run.extra |= {"best_loss": loss, "best_epoch": epoch}
    if run.main:
        state = {
            "schema": checkpoints.SCHEMA,
            "state_dict": log_folder.bare(model).state_dict(),
            "optimizer": {},
            "scheduler": {},
            "scaler": {},
            "epoch": epoch,
            "args": run.args,
            "extra": {"loss": loss},
            "wall_s": run.spent + time.time() - run.started,
        }
        runfiles.replace(run.log_dir / "best.pt", lambda file: torch.save(state, file))


def crops(run, args):
    """The data set person_crops, drawn and cut first if synthetic."""
    with processes.rank_zero_first(run):
        if args.synthetic:
            synthetic_crops(args.data_dir, args.synthetic, args.workers)
    folder = Path(args.data_dir) / f"synthetic-{args.synthetic}" if args.synthetic else Path(args.data_dir)
    return inputs.dataset(
        dataclasses.replace(run, args={**run.args, "synthetic": None, "data_dir": str(folder)}), "person_crops"
    )


def main(args):
    run = runtime.start(args, "prsnet")
    sampling.images_each(args.batch_size, run.world_size)
    data = crops(run, args)
    if leaked := protocols.test_images_among(data.root):
        run.args["test_images_of"] = leaked
    log_folder.open_log(run, inputs.data_name(data))
    store = inputs.open_images(run, data.train, args.height, args.width, name="person crops")
    steps = len(sampling.shuffled_batches(len(store), args.batch_size, seed=0, epoch=0, world_size=run.world_size))
    model, optimizer, scheduler = build(args, run, steps)
    grad_scaler = runtime.scaler(run)
    augment = transforms.Augment(
        flip=0.5,
        pad=0,
        crop_scale=tuple(args.crop_scale),
        crop_ratio=tuple(args.crop_ratio),
        interpolation="bicubic",
        erase=0.0,
        channels_last=True,
    )
    first = log_folder.resume(run, model, optimizer, scheduler, grad_scaler)
    for epoch in range(first, args.epochs):
        runtime.seed_epoch(run, epoch)
        stats = train_one_epoch(run, args, model, optimizer, scheduler, grad_scaler, store, augment, epoch)
        loss = stats.get("loss", math.inf)  # none if all steps overflowed in fp16
        keep_best(run, model, epoch + 1, loss)
        stats |= {"lr": scheduler.get_last_lr()[0]}
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            log_folder.save(run, epoch + 1, model, optimizer, scheduler, grad_scaler, stats)
        elif run.main:
            records.append_log(run.log_dir / "log.jsonl", {"epoch": epoch + 1, **stats})
    metrics = probe(run, args, model, store) | {
        "loss": loss if first < args.epochs else run.extra["best_loss"],
        "best_loss": run.extra["best_loss"],
    }
    processes.say(
        run,
        f"hidden blocks: {metrics['masked_mse']:.4f}; the image's mean colour there: {metrics['mean_colour_mse']:.4f}",
    )
    path = runtime.record(
        run, metrics, inputs.describe(data), {"mask": "fixed, un-augmented images"}, epoch=args.epochs
    )
    best, told = run.log_dir / "best.pt", f"{run.extra['best_loss']:.4f} in epoch {run.extra['best_epoch']}"
    processes.say(run, f"lowest loss {told}: {best}; result in {path}")
    processes.say(run, f"fine-tune from it: {fine_tuning(args, best)}")


if __name__ == "__main__":
    runtime.execute(main, arguments)
