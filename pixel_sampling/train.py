"""Semantic-guided pixel sampling for cloth-changing re-ID (Shu, Li, Wang, Ruan, Tian, IEEE SPL 2021).

    python pixel_sampling/train.py --data-dir /data                       # sec. III: rank-1 65.8, mAP 61.2 on C -> A
    python pixel_sampling/train.py --row T2-a --data-dir /data            # any row; T2-a is the baseline, 36.3 / 33.7
    torchrun --nproc_per_node=2 pixel_sampling/train.py --data-dir /data  # the same batch over two GPUs
    python pixel_sampling/train.py --row small/ps-l2                      # one CPU, minutes, synthetic people

What to expect, and what our runs gave: pixel_sampling/README.md.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

import torch
from tqdm import tqdm

from common import datasets, images, inputs, processes, runtime, samplers, transforms
from pixel_sampling import losses, model, sampling
from pixel_sampling.evaluate import evaluate, keep_best, show
from pixel_sampling.flags import CLASSES, parse_args
from pixel_sampling.head import HeadStore, network_input
from pixel_sampling.masks import open_masks

WARM_UP, DROP = 10, 40  # epochs, of sec. 4.4 of the authors' settings


def needs_masks(args) -> bool:
    return args.ps_mode != "off" or args.arch in ("head", "head_body")


def build(args, run, num_classes):
    """Network on the device, SGD over everything that is trained, and the schedule of the epochs."""
    if (args.batch_size // args.num_instances) % run.world_size:
        raise ValueError(
            f"{run.world_size} processes must divide the {args.batch_size // args.num_instances} identities of a batch"
        )
    with processes.rank_zero_first(run):
        network = model.build(args.arch, num_classes, args.backbone, args.weights)
    network = network.to(run.device, memory_format=torch.channels_last)
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
        pad=10 * args.height // 256,
        jitter=(0.1,) * 4 if code else None,
        erase=0.5 if args.re else 0.0,
        erase_law="uniform",
    )


def stream(run, args, store, masks, labels, index_batches, augment, generator):
    """Augmented images (B, 3, H, W), parts (B, H, W) or None, and labels (B,), batch after batch on the device."""
    labels = labels.to(run.device)
    for pixels, indices in images.batches(store, index_batches, run.device, workers=args.workers):
        parts = masks.gather(indices).to(run.device, non_blocking=True) if masks is not None else None
        if parts is None or args.mask_align == "none":
            x = augment(pixels, generator)
        else:
            x, parts = augment(pixels, generator, parts)  # the same flip and crop
        yield x, parts if parts is None else parts[:, 0], labels[indices.to(run.device)]


def doubled(args, x, parts, labels, draws):
    """The training batch [X, X'] with its labels (sec. II-A), or without pixel sampling what the network takes."""
    if args.ps_mode == "off":
        return network_input(args.arch, x, parts), labels
    changed = sampling.sample_pixels(x, parts, draws, CLASSES[args.ps_classes], args.ps_mode)
    return torch.cat([x, changed]), labels.repeat(2)


def train_one_epoch(run, args, network, optimizer, grad_scaler, batches, steps, epoch) -> dict:
    """One pass; one forward pass of [X, X'] a step, so that both share batch statistics. Returns mean loss parts."""
    network.train()
    draws = torch.Generator().manual_seed(runtime.generator(run, epoch, 1).initial_seed())  # image shuffles, on the CPU
    totals, seen, began = {}, 0, time.time()
    reduction = runtime.bare(network).reduction
    for i, (x, parts, labels) in enumerate(
        tqdm(batches, total=steps, desc=f"epoch {epoch + 1}", leave=False, disable=None if run.main else True)
    ):
        x, labels = doubled(args, x, parts, labels, draws)
        with run.autocast():
            output = network(x.contiguous(memory_format=torch.channels_last))
        loss, terms = losses.total_loss(output, labels, reduction, args.consistency, args.label_smooth)
        runtime.step(run, loss, [optimizer], grad_scaler, f"epoch {epoch + 1}, step {i + 1}")
        for name, value in {"loss": loss.detach(), **terms}.items():
            totals[name] = totals.get(name, 0) + value
        seen += len(x) * run.world_size
    processes.sync_buffers(run, runtime.bare(network))
    means = {name: value.item() / (i + 1) for name, value in totals.items()}
    runtime.say(
        run,
        f"epoch {epoch + 1}: "
        + ", ".join(f"{k} {v:.3f}" for k, v in means.items())
        + f"; {seen / (time.time() - began):.0f} images/s",
    )
    return means


def open_data(run, args, device_cache: str):
    """The data set with its training and test stores and, where needed, masks; see README, Masks."""
    masks = needs_masks(args)
    data = inputs.dataset(run, args.dataset, **({"mask_format": args.mask_format} if masks else {}))
    runtime.open_log(run, inputs.data_name(data))
    stores, size = {}, (args.height, args.width)
    for name, samples, wanted in (
        ("train", data.train, masks),
        ("test", data.query + data.gallery, args.arch.startswith("head")),
    ):
        title = f"{data.name} {name}"
        stores[name] = inputs.open_images(run, samples, *size, name=title, interpolation="bilinear"), None
        if wanted:
            with processes.rank_zero_first(run):
                maps = open_masks(
                    samples,
                    *size,
                    args.mask_format,
                    cache=device_cache,
                    cache_dir=args.cache_dir,
                    device=run.device,
                    workers=args.workers,
                    name=f"{title} masks",
                )
            runtime.say(run, maps.statistics())
            stores[name] = stores[name][0], maps
    test = stores["test"]
    return data, *stores["train"], HeadStore(args.arch, *test) if args.arch.startswith("head") else test[0]


def main(args):
    run = runtime.start(args, "pixel_sampling")
    data, store, masks, test_store = open_data(run, args, args.cache)
    labels, ids = torch.from_numpy(datasets.labels(data.train)), args.batch_size // args.num_instances
    network, optimizer, scheduler = build(args, run, int(labels.max()) + 1)
    runtime.say(
        run, f"{ids // run.world_size} identities x {args.num_instances} images a process; pixel banks are per process"
    )
    grad_scaler, augment, flip = runtime.scaler(run), augmentation(args), not args.arch.startswith("head")
    for epoch in range(runtime.resume(run, network, optimizer, scheduler, grad_scaler), args.epochs):
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
            metrics = evaluate(run, network, data, test_store, flip)
            stats.update(metrics)
            run.extra["last"], run.extra["best"] = metrics, keep_best(run.extra.get("best", {}), metrics, epoch + 1)
            show(run, f"after epoch {epoch + 1}", metrics)
        runtime.save(run, epoch + 1, network, optimizer, scheduler, grad_scaler, stats)
    show(run, "best on test", run.extra["best"])  # the authors' selection rule, query sets apart
    head, other = ("best", "last") if args.selection == "test-best" else ("last", "best")
    metrics = {**run.extra[head], **{f"{other}.{k}": v for k, v in run.extra[other].items()}}
    protocol = {
        "dataset": inputs.data_name(data),
        "ap_rule": "mean of precision at the hits",
        "gallery_draws": {"multi": 1, "single10": 10},
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
    runtime.say(run, f"result in {path}")


if __name__ == "__main__":
    arguments = parse_args()
    runtime.execute(main, arguments)
