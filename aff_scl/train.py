"""AFF_SCL: unsupervised person re-identification (Wu, Yang, Wang, Sensors 2022, 22(18), 6978).

    python aff_scl/train.py --dataset market                       # sec. 3; Table 2 reports mAP 78.8, rank-1 90.9
    python aff_scl/train.py --row table5/lambda1=0.25              # any row of experiments.yaml
    python aff_scl/train.py --mode uda --source duke -d market     # Table 3: labelled Duke added to unlabelled Market
    torchrun --nproc_per_node=2 aff_scl/train.py --dataset market  # the same run on two GPUs
    python aff_scl/train.py --row demo                             # one CPU, minutes, synthetic people, no download

What to expect, and what our runs gave: aff_scl/README.md.
"""

import dataclasses
import sys
import time
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

import torch
from tqdm import tqdm

from aff_scl import losses
from aff_scl.flags import parse_args, variants
from aff_scl.model import AFF, convert_dsbn, load_backbone
from common import datasets, histogram, images, inputs, jaccard, processes, runtime, samplers, transforms

SOURCE, TARGET = 0, 1  # domains of --mode uda


def build_model(args: Namespace, num_classes: int, bn_groups: int) -> AFF:
    """The network of the flags, without weights; `num_classes` > 0 adds the classifier of the supervised rows."""
    v = variants(args)
    return AFF(
        arch=args.arch, backbone=args.backbone, cam=args.cam, cam_reduction=v["cam_reduction"], gate=v["gate"],
        casam_reduction=v["casam_reduction"], post=v["post"], pool=v["pool"], swap=args.swap, neck=args.neck,
        num_classes=num_classes, bn_groups=bn_groups,
    )  # fmt: skip


def build(args, run, num_classes):
    """Model on the device, wrapped for several processes; Adam over all its parameters; the schedule of the mode."""
    ids = args.batch_size // args.num_instances
    if ids % run.world_size or (args.bn_groups > 1 and args.bn_groups % run.world_size):
        raise ValueError(
            f"{run.world_size} processes must divide the {ids} identities of a batch and --bn-groups {args.bn_groups}; "
            f"use another number of processes, or --bn-groups {run.world_size}"
        )
    model = build_model(args, num_classes, max(1, args.bn_groups // run.world_size))
    load_backbone(model, args.weights)
    if args.mode == "uda" and variants(args)["dsbn"] == "on":
        convert_dsbn(model)
    model = model.to(run.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    factor = warmup_steps(args.epochs) if args.mode == "sup" else lambda epoch: 0.1 ** (epoch // 20)  # sec. 4.2
    return processes.parallel(run, model), optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def warmup_steps(epochs):
    """Rate factor of Table 7: linear warm-up from 0.01 over 1/12 of the epochs, x 0.1 at 1/3 and at 7/12."""
    warm, first, second = epochs / 12, epochs / 3, epochs * 7 / 12
    return lambda epoch: 0.01 + 0.99 * epoch / warm if epoch < warm else 0.1 ** ((epoch >= first) + (epoch >= second))


@torch.no_grad()
def calibrate(run, model, store, batches=20, size=64):
    """Estimate the BatchNorm statistics of an untrained network, so that its evaluation-mode features mean something.

    Deviation: for --weights none only. The paper starts from ImageNet weights, whose statistics are there already.
    """
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    momenta, draw = [m.momentum for m in norms], torch.Generator().manual_seed(run.seed)
    size = min(size, len(store))
    for norm in norms:
        norm.momentum = None  # the plain average over all batches
    model.train()
    for indices in torch.randperm(len(store), generator=draw).split(size)[:batches]:
        if len(indices) == size:
            x = transforms.normalize(store.gather(indices).to(run.device))
            for domain in (SOURCE, TARGET):  # without domain-specific BN the same statistics twice
                model.encode(x.contiguous(memory_format=torch.channels_last), domain)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def cluster(feats, args, run):
    """Pseudo labels (N,) int64, -1 = outlier, from rank 0 (sec. 3.2); ValueError when there is nothing to contrast."""
    labels, v = torch.empty(len(feats), dtype=torch.int64), variants(args)
    if run.main:
        dist = jaccard.jaccard_distance(feats, k1=min(args.k1, len(feats) - 1), k2=v["k2"])
        labels.copy_(torch.as_tensor(jaccard.cluster(dist, args.eps, v["min_samples"])))
    processes.broadcast(run, labels)
    clusters, outliers = int(labels.max()) + 1, int((labels < 0).sum())
    if clusters < 2:
        raise ValueError(
            f"DBSCAN found {clusters} cluster(s) and {outliers} outliers in {len(labels)} images with --eps {args.eps} "
            f"--k1 {args.k1}; contrast needs two: {'lower' if clusters else 'raise'} --eps or use better --weights"
        )
    return labels, {"clusters": clusters, "outliers": outliers}


def contrast(q, labels, memory, args):
    """The loss that --loss names: Eq. (8), or one of its two contrasts alone (Table 4); loss and its detached parts."""
    if args.loss == "scl":
        return losses.symmetric_contrast(q, labels, memory, args.tau, args.lambda1, args.lambda2, args.lb)
    if args.loss == "mean":
        loss = losses.mean_contrast(q, memory.means, labels, args.tau)
    else:
        loss = losses.hard_contrast(q, memory.hards, labels, args.tau)
    return loss, {args.loss: loss.detach()}


def stream(run, store, labels, index_batches, augment, generator, shift=0):
    """Augmented images (B, 3, H, W) and labels (B,) + shift on the device, batch after batch."""
    labels = labels.to(run.device) + shift
    for batch, indices in images.batches(store, index_batches, run.device, workers=run.args["workers"]):
        yield augment(batch, generator), labels[indices.to(run.device)]


def train_one_epoch(run, model, optimizers, grad_scaler, batches, steps, epoch, objective, update=None, domain=None):
    """One pass over `batches`: objective(output, labels) -> loss, parts; update(output, labels) after each step.

    Returns the epoch's mean of the loss and of its parts. Ends with equal BatchNorm statistics on all ranks.
    """
    model.train()
    totals, seen, began = {}, 0, time.time()
    bar = tqdm(batches, total=steps, desc=f"epoch {epoch + 1}", leave=False, disable=None if run.main else True)
    for i, (x, labels) in enumerate(bar):
        with run.autocast():
            output = model(x.contiguous(memory_format=torch.channels_last), domain)
        loss, parts = objective(output, labels)
        runtime.step(run, loss, optimizers, grad_scaler, f"epoch {epoch + 1}, step {i + 1}")
        if update is not None:
            update(output, labels)
        for name, value in {"loss": loss.detach(), **parts}.items():
            totals[name] = totals.get(name, 0) + value
        seen += len(x) * run.world_size
    processes.sync_buffers(run, runtime.bare(model))
    means = {name: value.item() / (i + 1) for name, value in totals.items()}
    text = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
    runtime.say(run, f"epoch {epoch + 1}: {text}; {seen / (time.time() - began):.0f} images/s")
    return means


def sampled(run, args, labels, data, seed, epoch):
    """P x K index batches of an epoch; groups prefer different cameras unless --variant camera=off."""
    camids = [s.camid for s in data.train] if variants(args)["camera"] == "on" else None
    return samplers.identity_batches(
        labels.numpy(), args.batch_size // args.num_instances, args.num_instances, camids=camids, iters=args.iters,
        seed=seed, epoch=epoch, rank=run.rank, world_size=run.world_size,
    )  # fmt: skip


def unsupervised_epoch(run, model, optimizer, grad_scaler, epoch, args, target, augment, source=None):
    """Sec. 3.2-3.4: extract, cluster, build both memories, train against them; with a source, Table 3."""
    v, bare, generator = variants(args), runtime.bare(model), runtime.generator(run, epoch)
    feats = inputs.extract(run, bare, target.store)  # (N, D) unit rows, in the order of the training images
    labels, found = cluster(feats, args, run)  # (N,), -1 = outlier
    runtime.say(run, f"epoch {epoch + 1}: {found['clusters']} clusters, {found['outliers']} outliers of {len(labels)}")
    index_batches = sampled(run, args, labels, target.data, args.seed, epoch)
    steps, parts, domain = len(index_batches), 1, None
    if args.loss == "ce_tri":
        batches = stream(run, target.store, labels, index_batches, augment, generator)
        weights = losses.class_means(feats, labels)
        return {**baseline_epoch(run, bare, optimizer, grad_scaler, epoch, args, weights, batches, steps), **found}
    memory = losses.Memory.from_features(feats, labels, v["momentum"], v["hard_init"], v["hard_ref"])
    known = source_memory(run, bare, source, v) if source else ()
    batches = stream(run, target.store, labels, index_batches, augment, generator, shift=len(known))
    if source:  # joint classes, source first; each domain has its own forward pass and BN statistics
        memory, parts, domain = losses.Memory.join(known, memory), 2, (SOURCE, TARGET)
        source_batches = sampled(run, args, source.labels, source.data, args.seed + 1, epoch)
        other = stream(run, source.store, source.labels, source_batches, augment, runtime.generator(run, epoch, 1))
        batches = (tuple(map(torch.cat, zip(*pair))) for pair in zip(other, batches))

    def objective(q, y):  # the sum over domains
        terms = [contrast(q_part, y_part, memory, args) for q_part, y_part in zip(q.chunk(parts), y.chunk(parts))]
        return sum(loss for loss, _ in terms), {name: sum(t[name] for _, t in terms) for name in terms[0][1]}

    def update(q, y):  # features of all ranks, so that every rank holds the same memory; Eqs. (10), (12), (13)
        memory.update(processes.gather(run, q), processes.gather(run, y))

    stats = train_one_epoch(run, model, [optimizer], grad_scaler, batches, steps, epoch, objective, update, domain)
    if source:
        run.extra["source_memory"] = memory[: len(known)].state_dict()
    return {**stats, **found}


def source_memory(run, model, source, v):
    """Rows of the source classes: class means of the first network, then what the last epoch left (paper silent)."""
    if "source_memory" not in run.extra:
        feats = inputs.extract(run, model, source.store)
        run.extra["source_memory"] = losses.Memory.from_features(feats, source.labels).state_dict()
    state = {k: t.to(run.device) for k, t in run.extra["source_memory"].items()}
    return losses.Memory(**state, momentum=v["momentum"], hard_ref=v["hard_ref"])


def baseline_epoch(run, bare, optimizer, grad_scaler, epoch, args, weights, batches, steps):
    """Table 4, first row: cross-entropy on a fresh classifier, its rows the unit cluster means (C, D), and triplet."""
    bare.set_classifier(weights)
    rate = optimizer.param_groups[0]["lr"]
    fresh = torch.optim.Adam(bare.classifier.parameters(), lr=rate, weight_decay=args.weight_decay)
    model = processes.parallel(run, bare)
    stats = train_one_epoch(run, model, [optimizer, fresh], grad_scaler, batches, steps, epoch, losses.ce_tri)
    bare.set_classifier(None)
    return stats


def supervised_epoch(run, model, optimizer, grad_scaler, epoch, args, target, augment):
    """Table 7: cross-entropy with label smoothing 0.1 and batch-hard triplet, as reid-strong-baseline."""
    index_batches = samplers.identity_epoch(
        target.labels.numpy(), args.batch_size // args.num_instances, args.num_instances, seed=args.seed, epoch=epoch,
        rank=run.rank, world_size=run.world_size,
    )[: args.iters]  # fmt: skip
    batches = stream(run, target.store, target.labels, index_batches, augment, runtime.generator(run, epoch))
    return train_one_epoch(
        run, model, [optimizer], grad_scaler, batches, len(index_batches), epoch,
        lambda output, y: losses.ce_tri(output, y, label_smoothing=0.1),
    )  # fmt: skip


def evaluate(run, model, data, store) -> dict:
    """mAP, rank1, rank5, rank10, mINP of the network on query against gallery (sec. 4.1), as fractions."""
    return named(inputs.rank_metrics(data, inputs.extract(run, model, store)))


def named(m) -> dict:
    return {"mAP": m.mAP, "rank1": m.rank(1), "rank5": m.rank(5), "rank10": m.rank(10), "mINP": m.mINP}


def show(run, name, metrics):
    values = "   ".join(f"{key} {100 * metrics[key]:5.1f}" for key in ("mAP", "rank1", "rank10"))
    runtime.say(run, f"{name:<18} {values}")


def training_set(run, args, name, synthetic):
    """Data set, decoded training images and class labels (N,), which only --mode sup and the source of uda look at."""
    data = inputs.dataset(dataclasses.replace(run, args={**run.args, "synthetic": synthetic}), name)
    store = inputs.open_images(run, data.train, args.height, args.width, name=f"{data.name} train")
    return Namespace(data=data, store=store, labels=torch.from_numpy(datasets.labels(data.train)))


def main(args):
    run = runtime.start(args, "aff_scl")
    target = training_set(run, args, args.dataset, args.synthetic)
    source = training_set(run, args, args.source, args.source_synthetic or args.synthetic) if args.source else None
    data = target.data
    if source and source.data.kind != data.kind and not args.source_synthetic:
        raise ValueError(
            f"{data.root} is {data.kind}, its source {source.data.root} is {source.data.kind}; rendered "
            "people beside a real target are asked for with --source-synthetic"
        )
    runtime.open_log(run, inputs.data_name(data))
    test_store = inputs.open_images(run, data.query + data.gallery, args.height, args.width, name=f"{data.name} test")
    model, optimizer, scheduler = build(args, run, int(target.labels.max()) + 1 if args.mode == "sup" else 0)
    grad_scaler = runtime.scaler(run)
    augment = transforms.Augment(erase_law="uniform")  # the ratio law of reid-strong-baseline and its descendants
    if args.weights == "none":
        calibrate(run, runtime.bare(model), target.store)
    first = runtime.resume(run, model, optimizer, scheduler, grad_scaler)
    if "before" not in run.extra:
        run.extra["before"] = evaluate(run, model, data, test_store)
        if data.kind == "synthetic":
            run.extra["histogram"] = named(inputs.rank_metrics(data, histogram.color_histograms(test_store)))
    for name, text in (("histogram", "colour histogram"), ("before", "before training")):
        if name in run.extra:
            show(run, text, run.extra[name])
    for epoch in range(first, args.epochs):
        runtime.seed_epoch(run, epoch)
        if args.mode == "sup":
            stats = supervised_epoch(run, model, optimizer, grad_scaler, epoch, args, target, augment)
        else:
            stats = unsupervised_epoch(run, model, optimizer, grad_scaler, epoch, args, target, augment, source)
        scheduler.step()
        if (epoch + 1) % max(1, args.epochs // 6) == 0 or epoch + 1 == args.epochs:  # every 10 of 60 epochs
            run.extra["last"] = evaluate(run, model, data, test_store)
            run.extra["best_mAP"] = max(run.extra["last"]["mAP"], run.extra.get("best_mAP", 0.0))
            show(run, f"after epoch {epoch + 1}", run.extra["last"])
            stats.update(run.extra["last"])
        runtime.save(run, epoch + 1, model, optimizer, scheduler, grad_scaler, stats)
    metrics = dict(run.extra["last"])
    for part in ("before", "histogram"):
        metrics.update({f"{part}.{name}": value for name, value in run.extra.get(part, {}).items()})
    path = runtime.record(run, metrics, inputs.describe(data), inputs.MARKET_PROTOCOL, epoch=args.epochs)
    runtime.say(run, f"best mAP on the way {100 * run.extra['best_mAP']:.1f} (not reported); result in {path}")


if __name__ == "__main__":
    arguments = parse_args()
    runtime.execute(main, arguments)
