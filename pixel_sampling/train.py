"""Semantic-guided pixel sampling for cloth-changing re-ID (Shu, Li, Wang, Ruan, Tian, IEEE SPL 2021).

    python pixel_sampling/train.py --data-dir /data                       # sec. III: rank-1 65.8, mAP 61.2 on C -> A
    python pixel_sampling/train.py --row T2-a --data-dir /data            # any row; T2-a is the baseline, 36.3 / 33.7
    torchrun --nproc_per_node=2 pixel_sampling/train.py --data-dir /data  # the same batch over two GPUs
    python pixel_sampling/train.py --row small/ps-l2                      # one CPU, minutes, synthetic people

What to expect, and what our runs gave: pixel_sampling/README.md.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from common import flags
from pixel_sampling.flags import CLASSES, PROTOCOLS, parse_args

if __name__ == "__main__":
    arguments = flags.answer(parse_args)  # torch is loaded below

import torch

from common import batchnorm, datasets, images, inputs, log_folder, processes, runfiles, runtime, samplers, transforms
from common.datasets import base
from common.epoch import Epoch
from pixel_sampling import losses, model, sampling
from pixel_sampling.evaluate import evaluate, keep_best, possible_protocols, show
from pixel_sampling.head import HeadStore, network_input
from pixel_sampling.masks import open_masks

WARM_UP, DROP = 10, 40  # epochs of 60


def needs_masks(args) -> bool:
    return args.ps_mode != "off" or args.arch in ("head", "head_body")


def initial_weights(args) -> str:
    """What --weights names, for row:NAME the last checkpoint of that row with seed 0 on data of the same kind.

    Raises: FileNotFoundError naming the row to run first.
    """
    if not args.weights.startswith("row:"):
        return args.weights
    row = args.weights[4:]
    last = runfiles.name_of(parse_args(["--row", row]).epochs)
    return str(runfiles.of_row("pixel_sampling", row, last, args.logs_dir, args.synthetic))


def build(args, run, num_classes):
    """Network on the device, with BatchNorm over the global batch; SGD over everything that is trained; the schedule
    of the epochs. Raises: ValueError for processes that do not divide the identities of a batch."""
    if (args.batch_size // args.num_instances) % run.world_size:
        raise ValueError(
            f"{run.world_size} processes must divide the {args.batch_size // args.num_instances} identities of a batch"
        )
    with processes.rank_zero_first(run):
        network = model.build(args.arch, num_classes, args.backbone, initial_weights(args))
    network = batchnorm.over_groups(network, run.world_size).to(run.device, memory_format=torch.channels_last)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        trained, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=run.device.type == "cuda"
    )
    return (
        processes.parallel(run, network),
        optimizer,
        torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(args.epochs)),
    )


def schedule(epochs: int):
    """Learning-rate factor by epoch: 0.01 + 0.099 e for e < 10, then 1, 0.1 from epoch 40 (of 60, else scaled).

    Paper silent: from the authors' code; its second milestone, 80, is never reached.
    """
    warm, drop = epochs * WARM_UP / 60, epochs * DROP / 60
    return lambda epoch: 0.01 + 0.99 * epoch / warm if epoch < warm else 0.1 if epoch >= drop else 1.0


def augmentation(args) -> transforms.Augment:
    """Flip and crop of the paper, or what its code does; erasing after normalisation and before pixel sampling."""
    code = args.aug == "code"
    return transforms.Augment(
        flip=0.0 if code else 0.5,
        jitter=(0.1,) * 4 if code else None,
        erase=0.5 if args.re else 0.0,
        erase_law="uniform",
    )


def stream(run, args, store, masks, labels, index_batches, augment, generator):
    """Augmented images (B, 3, H, W), parts (B, H, W) or None, and labels (B,), batch after batch on the device."""
    for pixels, indices in images.batches(store, index_batches, run.device, workers=args.workers):
        parts = images.to_device(masks.gather(indices), run.device) if masks is not None else None
        if parts is None or args.mask_align == "none":
            x = augment(pixels, generator)
        else:
            x, parts = augment(pixels, generator, parts)  # the same flip and crop
        yield x, parts if parts is None else parts[:, 0], images.to_device(labels[indices], run.device)


def shuffles(run, epoch: int) -> torch.Generator:
    """The generator of an epoch's image shuffles, on the CPU and the same on every rank."""
    first = dataclasses.replace(run, rank=0)
    return torch.Generator().manual_seed(runtime.generator(first, epoch, 1).initial_seed())


def doubled(run, args, x, parts, labels, draws):
    """The training batch [X, X'] with its labels (sec. II-A), or without pixel sampling what the network takes.

    The bank of Eq. (1) holds the pixels of the mini-batch, so under several processes those of all their images.
    """
    if args.ps_mode == "off":
        return network_input(args.arch, x, parts), labels
    batch = processes.gather(run, x), processes.gather(run, parts)
    changed = sampling.sample_pixels(*batch, draws, CLASSES[args.ps_classes], args.ps_mode)
    return torch.cat([x, changed[run.rank * len(x) :][: len(x)]]), labels.repeat(2)


def train_one_epoch(run, args, network, optimizer, grad_scaler, batches, steps, epoch) -> dict:
    """One pass; one forward pass of [X, X'] a step, so that both share batch statistics. Returns mean loss parts."""
    network.train()
    draws, reduction = shuffles(run, epoch), log_folder.bare(network).reduction
    epoch = Epoch(run, epoch, batches, steps)
    for x, parts, labels in epoch:
        x, labels = doubled(run, args, x, parts, labels, draws)
        with run.autocast():
            output = network(x.contiguous(memory_format=torch.channels_last))
        loss, terms = losses.total_loss(output, labels, reduction, args.consistency, args.label_smooth)
        runtime.step(run, loss, [optimizer], grad_scaler, epoch.where)
        epoch.add(len(x), loss=loss, **terms)
    return epoch.means(network)


def open_data(run, args):
    """The data set; its training images, their masks or None; and what the test gathers from (README, Masks)."""
    size = args.height, args.width
    data = inputs.dataset(run, args.dataset, **({"mask_format": args.mask_format} if needs_masks(args) else {}))
    log_folder.open_log(run, inputs.data_name(data))
    store = inputs.open_images(run, data.train, *size, name=f"{data.name} train", interpolation="bilinear")
    masks = masks_of(run, args, data, data.train, f"{data.name} train masks") if needs_masks(args) else None
    test = data.query + data.gallery
    test_store = inputs.open_images(run, test, *size, name=f"{data.name} test", interpolation="bilinear")
    if args.arch.startswith("head"):
        test_store = HeadStore(args.arch, test_store, masks_of(run, args, data, test, f"{data.name} test masks"))
    return data, store, masks, test_store


def masks_of(run, args, data, samples, name: str):
    """The masks of the samples, decoded once, and a line that says what they hold.

    Their identity goes into run.data as that of the images does; rendered ones go with their images. Collective.
    """
    where = {"cache": args.cache, "cache_dir": args.cache_dir, "device": run.device, "workers": args.workers}
    with processes.rank_zero_first(run):
        masks = open_masks(samples, args.height, args.width, args.mask_format, name=name, **where)
    if data.kind == "real":
        paths = {sample.mask for sample in samples if sample.mask is not None}
        run.data[name] = processes.of_rank_zero(run, lambda: {"names_and_sizes": base.digest(paths, data.root)[:16]})
    processes.say(run, masks.statistics())
    return masks


def main(args):
    run = runtime.start(args, "pixel_sampling")
    data, store, masks, test_store = open_data(run, args)
    protocols = possible_protocols(run, data)
    labels, ids = torch.from_numpy(datasets.labels(data.train)), args.batch_size // args.num_instances
    network, optimizer, scheduler = build(args, run, int(labels.max()) + 1)
    processes.say(
        run,
        f"{ids // run.world_size} identities x {args.num_instances} images a process; pixel banks, batch statistics "
        "and triplets are those of the whole batch",
    )
    grad_scaler, augment, flip = runtime.scaler(run), augmentation(args), not args.arch.startswith("head")
    for epoch in range(log_folder.resume(run, network, optimizer, scheduler, grad_scaler), args.epochs):
        runtime.seed_epoch(run, epoch)
        index_batches = samplers.identity_epoch(
            labels.numpy(),
            ids,
            args.num_instances,
            seed=args.seed,
            epoch=epoch,
            rank=run.rank,
            world_size=run.world_size,
        )[: args.iters]
        batches = stream(run, args, store, masks, labels, index_batches, augment, runtime.generator(run, epoch))
        stats = train_one_epoch(run, args, network, optimizer, grad_scaler, batches, len(index_batches), epoch)
        scheduler.step()
        period = 1 if args.selection == "test-best" else args.eval_period
        if (epoch + 1) % period == 0 or epoch + 1 == args.epochs:
            metrics = evaluate(run, network, data, test_store, flip, protocols)
            stats.update(metrics)
            run.extra["last"], run.extra["best"] = metrics, keep_best(run.extra.get("best", {}), metrics, epoch + 1)
            show(run, f"after epoch {epoch + 1}", metrics)
        log_folder.save(run, epoch + 1, network, optimizer, scheduler, grad_scaler, stats)
    show(run, "best on test", run.extra["best"])  # the authors' selection rule, query sets apart
    head, other = ("best", "last") if args.selection == "test-best" else ("last", "best")
    metrics = {**run.extra[head], **{f"{other}.{k}": v for k, v in run.extra[other].items()}}
    protocol = {
        "dataset": inputs.data_name(data),
        "ap_rule": "mean of precision at the hits",
        "gallery_draws": {protocol: PROTOCOLS[protocol] for protocol in protocols},
        "re_ranking": False,
    }
    path = runtime.record(
        run,
        metrics,
        inputs.describe(data),
        protocol,
        epoch=args.epochs,
        selection="best_on_test" if head == "best" else "last",
    )
    processes.say(run, f"result in {path}")


if __name__ == "__main__":
    runtime.execute(main, arguments)
