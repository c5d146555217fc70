"""AFF_SCL: unsupervised person re-identification (Wu, Yang, Wang, Sensors 2022, 22(18), 6978).

    python aff_scl/train.py --dataset market                       # sec. 3; Table 2 reports mAP 78.8, rank-1 90.9
    python aff_scl/train.py --row table5/lambda1=0.25              # any row of experiments.yaml
    python aff_scl/train.py --mode uda --source duke -d market     # Table 3: labelled Duke added to unlabelled Market
    torchrun --nproc_per_node=4 aff_scl/train.py --dataset market  # the same batches and gradients on four GPUs
    python aff_scl/train.py --row demo                             # one CPU, minutes, synthetic people, no download

What to expect, and what our runs gave: aff_scl/README.md.
"""

import dataclasses
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from aff_scl.flags import check_processes, parse_args, variants
from common import flags

if __name__ == "__main__":
    arguments = flags.answer(parse_args)  # torch is loaded below

import numpy as np
import torch

from aff_scl import losses
from aff_scl.model import AFF, Output, convert_dsbn, load_backbone
from common import (
    batchnorm,
    datasets,
    histogram,
    images,
    inputs,
    jaccard,
    log_folder,
    processes,
    runtime,
    samplers,
    transforms,
)
from common.epoch import Epoch
from common.processes import gather_rows

SOURCE, TARGET = 0, 1  # domains of --mode uda


# ------------------------------------------------------------------------------------------------ network and optimiser
def build_model(args: Namespace, num_classes: int) -> AFF:
    """The network of the flags, without weights; `num_classes` > 0 adds the classifier of the supervised rows."""
    v = variants(args)
    return AFF(
        arch=args.arch, backbone=args.backbone, cam=args.cam, cam_reduction=v["cam_reduction"], gate=v["gate"],
        casam_reduction=v["casam_reduction"], post=v["post"], pool=v["pool"], swap=args.swap, neck=args.neck,
        num_classes=num_classes,
    )  # fmt: skip


def build(args, run, num_classes) -> AFF:
    """The network on the device, with its initial weights and one batch normalisation per domain in --mode uda."""
    network = build_model(args, num_classes)
    if args.mode == "uda" and variants(args)["dsbn"] == "on":
        convert_dsbn(network)
    load_backbone(network, args.weights)
    return network.to(run.device, memory_format=torch.channels_last)


def optimised(args, run, network):
    """The network (mutated) with batch statistics over --bn-groups parts of the batch of all ranks, wrapped for them;
    Adam over all its parameters; the schedule of the mode.
    """
    batchnorm.over_groups(network, run.world_size, args.bn_groups)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    factor = warmup_steps(args.epochs) if args.mode == "sup" else thirds(args.epochs)
    return processes.parallel(run, network), optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def thirds(epochs):
    """Rate factor of sec. 4.2: x 0.1 every 20 epochs of 60, so at 1/3 and 2/3 of the epochs."""
    return lambda epoch: 0.1 ** (3 * epoch // epochs)


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


# --------------------------------------------------------------------------------------------------- clusters, memories
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


def new_memory(args, feats, labels):
    """Both memories of extracted features (N, D) with labels (N,), -1 left out, as an epoch starts with them."""
    v = variants(args)
    return losses.Memory.from_features(feats, labels, v["momentum"], v["hard_init"], v["hard_ref"])


def source_memory(run, args, model, source):
    """Rows of the source classes: those of the first network, then what the last epoch left (paper silent)."""
    if "source_memory" not in run.extra:
        start = new_memory(args, inputs.extract(run, model, source.store), source.labels)
        run.extra["source_memory"] = start.state_dict()
    state, v = {k: t.to(run.device) for k, t in run.extra["source_memory"].items()}, variants(args)
    return losses.Memory(**state, momentum=v["momentum"], hard_ref=v["hard_ref"])


# -------------------------------------------------------------------------------------------------------------- batches
def identity_batches(run, args, domain, labels, number, seed, stream=0):
    """Batches of epoch `number`, P identities x K images of a domain: an iterator over this rank's share of each,
    augmented images (B / W, 3, H, W) and labels (B / W,); the number of batches; and K.

    Groups prefer different cameras unless --variant camera=off. With fewer than P clusters K grows.
    """
    ids, k = args.batch_size // args.num_instances, args.num_instances
    ids, k = samplers.fit(ids, k, int(labels.max()) + 1, world_size=1)
    camids = [s.camid for s in domain.data.train] if variants(args)["camera"] == "on" else None
    drawn = samplers.identity_batches(
        labels.numpy(), ids, k, camids=camids, iters=args.iters, seed=seed, epoch=number
    )  # (steps, B), the same for any number of ranks
    return augmented(run, domain.store, labels, drawn, runtime.generator(run, number, stream)), len(drawn), k


def augmented(run, store, labels, drawn, generator):
    """This rank's share of the index batches `drawn` (steps, B), in equal parts in rank order: (images, labels)."""
    augment = transforms.Augment(erase_law="uniform")  # the ratio law of reid-strong-baseline and its descendants
    own = np.split(drawn, run.world_size, axis=1)[run.rank]
    for batch, indices in images.batches(store, own, run.device, workers=run.args["workers"]):
        yield augment(batch, generator), images.to_device(labels[indices], run.device)


def forward(run, model, x, domain=None):
    with run.autocast():
        return model(x.contiguous(memory_format=torch.channels_last), domain)


def grid(rows, k):
    """This rank's rows (B / W, ...) of a batch -> those of all ranks, identity after identity, (P, K, ...).

    Every rank computes the losses of the whole batch and moves its memories by it, so neither depends on W.
    """
    return gather_rows(rows).unflatten(0, (-1, k))


# --------------------------------------------------------------------------------------------------------------- epochs
def contrast(q, labels, memory, args):
    """The loss that --loss names: Eq. (8), or one of its two contrasts alone (Table 4); loss and its detached parts."""
    if args.loss == "scl":
        return losses.symmetric_contrast(q, labels, memory, args.tau, args.lambda1, args.lambda2, args.lb)
    if args.loss == "mean":
        loss = losses.mean_contrast(q, memory.means, labels, args.tau)
    else:
        loss = losses.hard_contrast(q, memory.hards, labels, args.tau)
    return loss, {args.loss: loss.detach()}


def usl_epoch(run, args, model, optimizer, grad_scaler, number, target, labels, memory):
    """Train against the memories of the clusters and move them after each step (sec. 3.4); Table 2."""
    batches, steps, k = identity_batches(run, args, target, labels, number, args.seed)
    epoch = Epoch(run, number, batches, steps)
    model.train()
    for x, y in epoch:
        q, y = grid(forward(run, model, x), k), grid(y, k)  # (P, K, D), (P, K)
        loss, parts = contrast(q, y, memory, args)  # Eq. (8)
        if runtime.step(run, loss, [optimizer], grad_scaler, epoch.where):
            memory.update(q, y)  # Eqs. (10), (12), (13)
        epoch.add(len(x), loss=loss, **parts)
    return epoch.means(model)


def uda_epoch(run, args, model, optimizer, grad_scaler, number, source, target, labels, memory):
    """The same with a labelled batch beside each: one memory of both domains' classes, source first; Table 3."""
    num_source = len(memory) - int(labels.max()) - 1
    source_batches, steps, k_s = identity_batches(run, args, source, source.labels, number, args.seed + 1, stream=1)
    target_batches, steps, k_t = identity_batches(run, args, target, labels, number, args.seed)
    epoch = Epoch(run, number, zip(source_batches, target_batches), steps)
    model.train()
    for (x_s, y_s), (x_t, y_t) in epoch:  # one forward pass, in it each domain with batch statistics of its own
        q_s, q_t = forward(run, model, torch.cat([x_s, x_t]), (SOURCE, TARGET)).chunk(2)
        q_s, y_s, q_t, y_t = grid(q_s, k_s), grid(y_s, k_s), grid(q_t, k_t), grid(y_t, k_t) + num_source
        loss_s, parts_s = contrast(q_s, y_s, memory, args)
        loss_t, parts_t = contrast(q_t, y_t, memory, args)
        if runtime.step(run, loss_s + loss_t, [optimizer], grad_scaler, epoch.where):
            memory.update(q_s, y_s)
            memory.update(q_t, y_t)
        epoch.add(2 * len(x_s), loss=loss_s + loss_t, **{name: parts_s[name] + parts_t[name] for name in parts_s})
    run.extra["source_memory"] = memory[:num_source].state_dict()
    return epoch.means(model)


def labelled_epoch(run, model, optimizers, grad_scaler, epoch, label_smoothing=0.0):
    """Cross-entropy and batch-hard triplet over the batch of all ranks, for each batch of an Epoch."""
    model.train()
    for x, y in epoch:
        output = Output(*map(gather_rows, forward(run, model, x)))
        loss, parts = losses.ce_tri(output, gather_rows(y), label_smoothing)
        runtime.step(run, loss, optimizers, grad_scaler, epoch.where)
        epoch.add(len(x), loss=loss, **parts)
    return epoch.means(model)


def baseline_epoch(run, args, model, optimizer, grad_scaler, number, target, labels, means):
    """Table 4, first row: cross-entropy on a fresh classifier, its rows the unit cluster means (C, D), and triplet."""
    batches, steps, _ = identity_batches(run, args, target, labels, number, args.seed)
    network, rate = log_folder.bare(model), optimizer.param_groups[0]["lr"]
    network.set_classifier(means)
    forward = network.classifier.forward  # the classes differ from epoch to epoch: a compiled one would be made anew
    network.classifier.forward = torch.compiler.disable(forward)
    fused = run.device.type == "cuda"
    fresh = torch.optim.Adam(network.classifier.parameters(), lr=rate, weight_decay=args.weight_decay, fused=fused)
    epoch = Epoch(run, number, batches, steps)
    stats = labelled_epoch(run, processes.parallel(run, network), [optimizer, fresh], grad_scaler, epoch)
    network.set_classifier(None)
    return stats


def supervised_epoch(run, args, model, optimizer, grad_scaler, number, target):
    """Table 7: cross-entropy with label smoothing 0.1 and batch-hard triplet, as reid-strong-baseline."""
    ids, labels = args.batch_size // args.num_instances, target.labels
    drawn = samplers.identity_epoch(labels.numpy(), ids, args.num_instances, seed=args.seed, epoch=number)[: args.iters]
    batches = augmented(run, target.store, labels, drawn, runtime.generator(run, number))
    epoch = Epoch(run, number, batches, len(drawn))
    return labelled_epoch(run, model, [optimizer], grad_scaler, epoch, label_smoothing=0.1)


# ----------------------------------------------------------------------------------------------------------------- main
def evaluate(run, model, data, store) -> dict:
    """mAP, rank1, rank5, rank10, mINP of the network on query against gallery (sec. 4.1), as fractions."""
    return named(inputs.rank_metrics(data, inputs.extract(run, model, store)))


def named(m) -> dict:
    return {"mAP": m.mAP, "rank1": m.rank(1), "rank5": m.rank(5), "rank10": m.rank(10), "mINP": m.mINP}


def show(run, name, metrics):
    values = "   ".join(f"{key} {100 * metrics[key]:5.1f}" for key in ("mAP", "rank1", "rank10"))
    processes.say(run, f"{name:<18} {values}")


def training_set(run, args, name, synthetic):
    """Data set, decoded training images and class labels (N,), which only --mode sup and the source of uda look at."""
    data = inputs.dataset(dataclasses.replace(run, args={**run.args, "synthetic": synthetic}), name)
    store = inputs.open_images(run, data.train, args.height, args.width, name=f"{data.name} train")
    return Namespace(data=data, store=store, labels=torch.from_numpy(datasets.labels(data.train)))


def main(args):
    run = runtime.start(args, "aff_scl")
    check_processes(args, run.world_size)
    target = training_set(run, args, args.dataset, args.synthetic)
    source = training_set(run, args, args.source, args.source_synthetic or args.synthetic) if args.source else None
    data = target.data
    if source and source.data.kind != data.kind and not args.source_synthetic:
        raise ValueError(
            f"{data.root} is {data.kind}, its source {source.data.root} is {source.data.kind}; rendered "
            "people beside a real target are asked for with --source-synthetic"
        )
    log_folder.open_log(run, inputs.data_name(data))
    test_store = inputs.open_images(run, data.query + data.gallery, args.height, args.width, name=f"{data.name} test")
    network = build(args, run, int(target.labels.max()) + 1 if args.mode == "sup" else 0)
    if args.weights == "none":
        calibrate(run, network, target.store)
    model, optimizer, scheduler = optimised(args, run, network)
    grad_scaler = runtime.scaler(run)
    first = log_folder.resume(run, model, optimizer, scheduler, grad_scaler)
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
            stats = supervised_epoch(run, args, model, optimizer, grad_scaler, epoch, target)
        else:
            feats = inputs.extract(run, model, target.store)  # (N, D) unit rows, in the order of the images
            labels, found = cluster(feats, args, run)  # (N,) pseudo labels, -1 = outlier; sec. 3.2
            text = f"{found['clusters']} clusters, {found['outliers']} outliers of {len(labels)}"
            processes.say(run, f"epoch {epoch + 1}: {text}")
            memory = new_memory(args, feats, labels)  # means and hard samples of the clusters; Figure 2 right
            training = run, args, model, optimizer, grad_scaler, epoch
            if args.loss == "ce_tri":
                stats = baseline_epoch(*training, target, labels, memory.means)
            elif args.mode == "usl":
                stats = usl_epoch(*training, target, labels, memory)
            else:
                memory = losses.Memory.join(source_memory(run, args, model, source), memory)
                stats = uda_epoch(*training, source, target, labels, memory)
            stats.update(found)
        scheduler.step()
        if (epoch + 1) % args.eval_period == 0 or epoch + 1 == args.epochs:
            run.extra["last"] = evaluate(run, model, data, test_store)
            run.extra["best_mAP"] = max(run.extra["last"]["mAP"], run.extra.get("best_mAP", 0.0))
            show(run, f"after epoch {epoch + 1}", run.extra["last"])
            stats.update(run.extra["last"])
        log_folder.save(run, epoch + 1, model, optimizer, scheduler, grad_scaler, stats)
    metrics = dict(run.extra["last"])
    for part in ("before", "histogram"):
        metrics.update({f"{part}.{name}": value for name, value in run.extra.get(part, {}).items()})
    path = runtime.record(run, metrics, inputs.describe(data), inputs.MARKET_PROTOCOL, epoch=args.epochs)
    processes.say(run, f"best mAP on the way {100 * run.extra['best_mAP']:.1f} (not reported); result in {path}")


if __name__ == "__main__":
    runtime.execute(main, arguments)
