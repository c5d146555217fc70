"""AFF_SCL: unsupervised person re-identification (Wu, Yang, Wang, Sensors 2022, 22(18), 6978).

    python aff_scl/train.py --dataset market                       # sec. 3, fully unsupervised; Table 2 reports mAP 78.8, rank-1 90.9
    python aff_scl/train.py --row table5/lambda1=0.25              # any row of experiments.yaml
    python aff_scl/train.py --mode uda --source duke -d market     # Table 3: labelled Duke added to unlabelled Market
    torchrun --nproc_per_node=2 aff_scl/train.py --dataset market  # the same run on two GPUs
    python aff_scl/train.py --row demo                             # one CPU, minutes, synthetic people, nothing to download

What to expect, and what our runs gave: aff_scl/README.md.
"""

import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

import torch
from tqdm import tqdm

from aff_scl import losses
from aff_scl.model import AFF, convert_dsbn, load_backbone
from common import datasets, histogram, images, inputs, jaccard, runtime, samplers, transforms

VARIANTS = {  # the rare switches of the decision table in README.md: name -> allowed values or the type of a number, default first
    "gate": ("sigmoid", "softmax"), "post": ("bn", "relu", "none"), "pool": ("avg", "gem"), "casam_reduction": 256, "cam_reduction": 16,
    "momentum": 0.1, "k2": 6, "min_samples": 4, "hard_ref": ("mean", "hard"), "hard_init": ("mean", "hardest"),
    "camera": ("on", "off"), "dsbn": ("on", "off"),
}
SOURCE, TARGET = 0, 1  # domains of --mode uda


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(prog="aff_scl/train.py", description="Train AFF_SCL; defaults are the paper's main setting.", allow_abbrev=False)
    data = parser.add_argument_group("data")
    data.add_argument("-d", "--dataset", default="market", help="the unlabelled target: market, duke, msmt17, cuhk03")
    data.add_argument("--source", help="labelled source data set of --mode uda")
    data.add_argument("--height", type=int, default=256)
    data.add_argument("--width", type=int, default=128)
    method = parser.add_argument_group("method")
    method.add_argument("--mode", choices=["usl", "uda", "sup"], default="usl", help="unsupervised, domain adaptation (Table 3), supervised (Table 7)")
    method.add_argument("--arch", choices=["base", "g", "l", "aff"], default="aff", help="ResNet, + global, + local, + both branches (Table 7)")
    method.add_argument("--backbone", default="resnet50", help="torchvision ResNet; resnet18 for small machines")
    method.add_argument("--cam", choices=["split", "se"], default="split", help="local channel attention: split attention (fits Table 8) or Eqs. (5)-(6) to the letter")
    method.add_argument("--swap", action="store_true", help="CAM for the global and CASAM for the local branch (text at Table 7)")
    method.add_argument("--neck", choices=["bn", "none"], default="bn", help="BNNeck after pooling")
    method.add_argument("--loss", choices=["scl", "mean", "hard", "ce_tri"], default="scl", help="rows of Table 4: total, mean only, hard only, baseline")
    method.add_argument("--lambda1", type=float, default=0.75, help="weight of the hard-sample loss, Eq. (8)")
    method.add_argument("--lambda2", type=float, default=0.25, help="weight of the mean-feature loss, Eq. (8)")
    method.add_argument("--lb", choices=["logits", "logits_pos", "memory", "none"], default="logits", help="form of the balance loss, Eq. (14)")
    method.add_argument("--tau", type=float, default=0.05, help="temperature, Eqs. (7)-(11); paper silent")
    method.add_argument("--eps", type=float, help="DBSCAN radius (default: 0.70 for duke, else 0.65; Figure 4)")
    method.add_argument("--k1", type=int, default=30, help="neighbours of the Jaccard distance, sec. 4.2")
    method.add_argument("--bn-groups", type=int, help="BatchNorm statistics over this many chunks of a batch (default: 2, the paper's two GPUs; 1 for sup)")
    method.add_argument("--variant", nargs="+", default=[], metavar="KEY=VALUE", help="rare switches: " + ", ".join(VARIANTS))
    optim = parser.add_argument_group("optimiser")
    optim.add_argument("-b", "--batch-size", type=int, help="images a step over all processes (default: 128; 64 for sup)")
    optim.add_argument("--num-instances", type=int, help="images of one identity in a batch, K (default: 8; 4 for sup)")
    optim.add_argument("--epochs", type=int, help="default: 60; 120 for sup")
    optim.add_argument("--iters", type=int, help="steps an epoch (default: 400, 200 for batch 256; sup: one pass); paper silent")
    optim.add_argument("--lr", type=float, default=3.5e-4, help="Adam, x 0.1 every third of the epochs; sup: warm-up, then x 0.1 at 1/3 and 7/12")
    optim.add_argument("--weight-decay", type=float, default=5e-4)
    runtime.add_run_flags(parser)
    return runtime.parse(parser, "aff_scl", argv, complete)


def complete(args: Namespace) -> Namespace:
    """Fill in the defaults that depend on the mode; raises ValueError for flags that do not fit together."""
    sup = args.mode == "sup"
    paper = {"eps": 0.70 if args.dataset.startswith("duke") else 0.65, "bn_groups": 1 if sup else 2, "batch_size": 64 if sup else 128,
             "num_instances": 4 if sup else 8, "epochs": 120 if sup else 60}
    for name, value in paper.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.iters is None and not sup:
        args.iters = 200 if args.batch_size >= 256 else 400
    args.variant = sorted(args.variant)
    variants(args)
    if (args.mode == "uda") != bool(args.source):
        raise ValueError("--mode uda needs --source NAME, and only it takes one")
    if args.mode == "uda" and args.loss == "ce_tri":
        raise ValueError("--loss ce_tri is the baseline of Table 4 and exists for --mode usl only")
    if args.mode != "usl" and args.neck == "none" and not sup:
        raise ValueError("--neck none is a row of Table 7 and goes with --mode sup")
    if args.batch_size % args.num_instances:
        near = args.batch_size // args.num_instances * args.num_instances or args.num_instances
        raise ValueError(f"--batch-size {args.batch_size} is not a multiple of --num-instances {args.num_instances}; nearest: {near}")
    ids = args.batch_size // args.num_instances
    if ids < 2 or ids % args.bn_groups:
        raise ValueError(f"a batch of {args.batch_size} holds {ids} identities x {args.num_instances}; it needs at least 2, a multiple of --bn-groups {args.bn_groups}")
    if args.epochs < 1 or (args.iters is not None and args.iters < 1):
        raise ValueError("--epochs and --iters must be at least 1, or nothing would be trained")
    return args


def variants(args: Namespace) -> dict:
    """--variant as a dictionary with defaults; raises ValueError for unknown keys and values."""
    chosen = {key: rule[0] if isinstance(rule, tuple) else rule for key, rule in VARIANTS.items()}
    for item in args.variant:
        key, _, value = item.partition("=")
        rule = VARIANTS.get(key)
        if rule is None or (isinstance(rule, tuple) and value not in rule):
            raise ValueError(f"--variant {item}: known are " + ", ".join(f"{k}={'|'.join(v) if isinstance(v, tuple) else v}" for k, v in VARIANTS.items()))
        chosen[key] = value if isinstance(rule, tuple) else type(rule)(value)
    return chosen


def build_model(args: Namespace, num_classes: int, bn_groups: int) -> AFF:
    """The network of the flags, without weights; `num_classes` > 0 adds the classifier of the supervised rows."""
    v = variants(args)
    return AFF(arch=args.arch, backbone=args.backbone, cam=args.cam, cam_reduction=v["cam_reduction"], gate=v["gate"], casam_reduction=v["casam_reduction"],
                post=v["post"], pool=v["pool"], swap=args.swap, neck=args.neck, num_classes=num_classes, bn_groups=bn_groups)


def build(args, run, num_classes):
    """Model on the device, wrapped for several processes; Adam over all its parameters; the schedule of the mode."""
    if (args.batch_size // args.num_instances) % run.world_size or args.bn_groups % run.world_size and args.bn_groups != 1:
        raise ValueError(f"{run.world_size} processes must divide the {args.batch_size // args.num_instances} identities of a batch and --bn-groups "
                         f"{args.bn_groups}; use a number of processes that does, or --bn-groups {run.world_size}")
    model = build_model(args, num_classes, max(1, args.bn_groups // run.world_size))
    load_backbone(model, args.weights)
    if args.mode == "uda" and variants(args)["dsbn"] == "on":
        convert_dsbn(model)  # after loading: each domain's copy starts from the same statistics
    model = model.to(run.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    factor = warmup_steps(args.epochs) if args.mode == "sup" else lambda epoch: 0.1 ** (epoch // max(1, args.epochs // 3))
    return runtime.parallel(run, model), optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def calibrate(run, model, store, batches=20, size=64):
    """Estimate the BatchNorm statistics of an untrained network from training images, so that its evaluation-mode features mean something.

    Deviation: for --weights none only. The paper starts from ImageNet weights, whose statistics are there already.
    """
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    momenta, order = [m.momentum for m in norms], torch.randperm(len(store), generator=torch.Generator().manual_seed(run.seed))
    for norm in norms:
        norm.momentum = None  # the plain average over all batches
    model.train()
    for indices in order.split(size)[:batches]:
        if len(indices) == min(size, len(store)):
            model.encode(transforms.normalize(store.gather(indices).to(run.device)).contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def warmup_steps(epochs):
    """Learning-rate factor of Table 7's baseline: linear warm-up from 0.01 over 1/12, x 0.1 at 1/3 and at 7/12 of the epochs."""
    warm, first, second = epochs / 12, epochs / 3, epochs * 7 / 12
    return lambda epoch: (0.01 + 0.99 * epoch / warm) if epoch < warm else 0.1 ** ((epoch >= first) + (epoch >= second))


def cluster(feats, args, run):
    """Pseudo labels (N,) int64, -1 = outlier, from rank 0 (sec. 3.2); raises ValueError when there is nothing to contrast."""
    labels = torch.empty(len(feats), dtype=torch.int64)
    if run.main:
        v = variants(args)
        dist = jaccard.jaccard_distance(feats, k1=min(args.k1, len(feats) - 1), k2=v["k2"])
        labels.copy_(torch.as_tensor(jaccard.cluster(dist, args.eps, v["min_samples"])))
    runtime.broadcast(run, labels)
    clusters, outliers = int(labels.max()) + 1, int((labels < 0).sum())
    if clusters < 2:
        raise ValueError(f"DBSCAN found {clusters} cluster(s) and {outliers} outliers in {len(feats)} images with --eps {args.eps} --k1 {args.k1}; contrast needs "
                         f"two: {'lower' if clusters else 'raise'} --eps, or start from better --weights")
    return labels


def contrast(q, labels, memory, args):
    """The loss that --loss names: Eq. (8), or one of its two contrasts alone (Table 4); returns loss and its detached parts."""
    if args.loss == "scl":
        return losses.symmetric_contrast(q, labels, memory, args.tau, args.lambda1, args.lambda2, args.lb)
    loss = losses.mean_contrast(q, memory.means, labels, args.tau) if args.loss == "mean" else losses.hard_contrast(q, memory.hards, labels, args.tau)
    return loss, {args.loss: loss.detach()}


def stream(run, store, labels, index_batches, augment, generator, shift=0):
    """Augmented images (B, 3, H, W) and labels (B,) + shift on the device, batch after batch."""
    labels = labels.to(run.device) + shift
    for batch, indices in images.batches(store, index_batches, run.device, workers=run.args["workers"]):
        yield augment(batch, generator), labels[indices.to(run.device)]


def joined(source, target):
    """Batches of both domains, source first."""
    for (xs, ys), (xt, yt) in zip(source, target):
        yield torch.cat([xs, xt]), torch.cat([ys, yt])


def train_one_epoch(run, model, optimizers, grad_scaler, batches, steps, objective, update, epoch, domain=None):
    """One pass over `batches`; objective(output, labels) -> loss, parts; update(output, labels) after each step. Returns mean parts."""
    model.train()
    totals, seen, began = {}, 0, time.time()
    for i, (x, labels) in enumerate(tqdm(batches, total=steps, desc=f"epoch {epoch + 1}", leave=False, disable=None if run.main else True)):
        with run.autocast():
            output = model(x.contiguous(memory_format=torch.channels_last), domain)
        loss, parts = objective(output, labels)
        runtime.step(run, loss, optimizers, grad_scaler, f"epoch {epoch + 1}, step {i + 1}")
        update(output, labels)
        for name, value in {"loss": loss.detach(), **parts}.items():
            totals[name] = totals.get(name, 0) + value
        seen += len(x) * run.world_size
    runtime.sync_buffers(run, runtime.bare(model))
    means = {name: value.item() / (i + 1) for name, value in totals.items()}
    runtime.say(run, f"epoch {epoch + 1}: " + ", ".join(f"{k} {v:.3f}" for k, v in means.items()) + f"; {seen / (time.time() - began):.0f} images/s")
    return means


def unsupervised_epoch(run, model, optimizer, grad_scaler, epoch, args, data, store, augment, source=None):
    """Sec. 3.2-3.4: extract, cluster, build both memories, train against them; with a source also its labelled classes (Table 3)."""
    v, bare = variants(args), runtime.bare(model)
    feats = inputs.extract(run, bare, store)  # (N, D) unit rows, in the order of data.train
    labels = cluster(feats, args, run)  # (N,), -1 = outlier
    clusters, outliers = int(labels.max()) + 1, int((labels < 0).sum())
    runtime.say(run, f"epoch {epoch + 1}: {clusters} clusters, {outliers} outliers of {len(labels)}")
    sample = dict(num_ids=args.batch_size // args.num_instances, num_instances=args.num_instances, iters=args.iters, epoch=epoch, rank=run.rank, world_size=run.world_size)
    camids = [s.camid for s in data.train] if v["camera"] == "on" else None
    index_batches = samplers.identity_batches(labels.numpy(), camids=camids, seed=args.seed, **sample)
    parts, optimizers, domain, generator = 1, [optimizer], None, runtime.generator(run, epoch)
    if args.loss == "ce_tri":  # Table 4, first row: a fresh classifier of unit cluster means every epoch
        bare.set_classifier(losses.class_means(feats, labels))
        model = runtime.parallel(run, bare)
        optimizers.append(torch.optim.Adam(bare.classifier.parameters(), lr=optimizer.param_groups[0]["lr"], weight_decay=args.weight_decay))
        batches = stream(run, store, labels, index_batches, augment, generator)
        stats = train_one_epoch(run, model, optimizers, grad_scaler, batches, len(index_batches), losses.ce_tri, lambda *_: None, epoch)
        bare.set_classifier(None)
        return {**stats, "clusters": clusters, "outliers": outliers}
    memory = losses.Memory.from_features(feats, labels, v["momentum"], v["hard_init"], v["hard_ref"])  # Eqs. (10), (12), (13)
    if source is None:
        batches = stream(run, store, labels, index_batches, augment, generator)
    else:
        known = source_memory(run, bare, source, v)
        memory, parts, domain = losses.Memory.join(known, memory), 2, (SOURCE, TARGET)
        source_camids = [s.camid for s in source.data.train] if v["camera"] == "on" else None
        source_batches = samplers.identity_batches(source.labels.numpy(), camids=source_camids, seed=args.seed + 1, **sample)
        batches = joined(stream(run, source.store, source.labels, source_batches, augment, runtime.generator(run, epoch, 1)),
                         stream(run, store, labels, index_batches, augment, generator, shift=len(known)))

    def objective(q, y):  # with a source, the sum of both domains' losses over the joint classes
        halves = [contrast(half, half_y, memory, args) for half, half_y in zip(q.chunk(parts), y.chunk(parts))]
        return sum(loss for loss, _ in halves), {k: sum(p[k] for _, p in halves) for k in halves[0][1]}

    def update(q, y):  # features of all ranks, so that every rank holds the same memory
        memory.update(runtime.gather(run, q), runtime.gather(run, y))

    stats = train_one_epoch(run, model, optimizers, grad_scaler, batches, len(index_batches), objective, update, epoch, domain)
    if source is not None:
        run.extra["source_memory"] = memory[: len(known)].state_dict()
    return {**stats, "clusters": clusters, "outliers": outliers}


def source_memory(run, model, source, v):
    """Rows of the source classes: class means of the first network, then whatever the last epoch left (Paper silent; as SpCL)."""
    if "source_memory" not in run.extra:
        feats = inputs.extract(run, model, source.store)
        run.extra["source_memory"] = losses.Memory.from_features(feats, source.labels).state_dict()
    state = {k: t.to(run.device) for k, t in run.extra["source_memory"].items()}
    return losses.Memory(**state, momentum=v["momentum"], hard_ref=v["hard_ref"])


def supervised_epoch(run, model, optimizer, grad_scaler, epoch, args, labels, store, augment):
    """Table 7: cross-entropy with label smoothing 0.1 and batch-hard triplet, as reid-strong-baseline."""
    ids = args.batch_size // args.num_instances
    index_batches = samplers.identity_epoch(labels.numpy(), ids, args.num_instances, seed=args.seed, epoch=epoch, rank=run.rank, world_size=run.world_size)[: args.iters]
    batches = stream(run, store, labels, index_batches, augment, runtime.generator(run, epoch))
    return train_one_epoch(run, model, [optimizer], grad_scaler, batches, len(index_batches), lambda out, y: losses.ce_tri(out, y, label_smoothing=0.1),
                           lambda *_: None, epoch)


def evaluate(run, model, data, store) -> dict:
    """mAP, rank1, rank5, rank10, mINP of the network on query against gallery (sec. 4.1), as fractions."""
    m = inputs.rank_metrics(data, inputs.extract(run, model, store))
    return {"mAP": m.mAP, "rank1": m.rank(1), "rank5": m.rank(5), "rank10": m.rank(10), "mINP": m.mINP}


def show(run, name, metrics):
    runtime.say(run, f"{name:<24} mAP {100 * metrics['mAP']:5.1f}   rank-1 {100 * metrics['rank1']:5.1f}   rank-10 {100 * metrics['rank10']:5.1f}")


def main(args):
    run = runtime.start(args, "aff_scl")
    data = inputs.dataset(run, args.dataset)
    runtime.open_log(run, inputs.data_name(data))
    size = (args.height, args.width)
    store = inputs.open_images(run, data.train, *size, name=f"{data.name} train")
    test_store = inputs.open_images(run, data.query + data.gallery, *size, name=f"{data.name} test")
    labels = torch.from_numpy(datasets.labels(data.train))  # used by --mode sup only
    source = None
    if args.mode == "uda":
        other = inputs.dataset(run, args.source)
        source = Namespace(data=other, store=inputs.open_images(run, other.train, *size, name=f"{other.name} train"), labels=torch.from_numpy(datasets.labels(other.train)))
    model, optimizer, scheduler = build(args, run, int(labels.max()) + 1 if args.mode == "sup" else 0)
    grad_scaler, augment = runtime.scaler(run), transforms.Augment()
    if args.weights == "none":
        calibrate(run, runtime.bare(model), store)
    first = runtime.resume(run, model, optimizer, scheduler, grad_scaler)
    if "before" not in run.extra:
        run.extra["before"] = evaluate(run, model, data, test_store)
        if data.kind == "synthetic":
            run.extra["histogram"] = baseline(data, test_store)
    for name in ("histogram", "before"):
        if name in run.extra:
            show(run, {"histogram": "colour histogram", "before": "before training"}[name], run.extra[name])
    for epoch in range(first, args.epochs):
        runtime.seed_epoch(run, epoch)
        if args.mode == "sup":
            stats = supervised_epoch(run, model, optimizer, grad_scaler, epoch, args, labels, store, augment)
        else:
            stats = unsupervised_epoch(run, model, optimizer, grad_scaler, epoch, args, data, store, augment, source)
        scheduler.step()
        if (epoch + 1) % max(1, args.epochs // 6) == 0 or epoch + 1 == args.epochs:
            stats.update(evaluate(run, model, data, test_store))
            run.extra["last"], run.extra["best_mAP"] = {k: stats[k] for k in run.extra["before"]}, max(stats["mAP"], run.extra.get("best_mAP", 0.0))
            show(run, f"after epoch {epoch + 1}", stats)
        runtime.save(run, epoch + 1, model, optimizer, scheduler, grad_scaler, stats)
    metrics = {**run.extra["last"], **{f"{part}.{k}": x for part in ("before", "histogram") for k, x in run.extra.get(part, {}).items()}}
    protocol = {"dataset": inputs.data_name(data), "ap_rule": "mean of precision at the hits", "gallery_draws": 1, "re_ranking": False}
    path = runtime.record(run, metrics, inputs.describe(data), protocol, epoch=args.epochs)
    runtime.say(run, f"best mAP on the way {100 * run.extra['best_mAP']:.1f} (not reported); result in {path}")


def baseline(data, store) -> dict:
    """Metrics of the colour histograms of data.query + data.gallery."""
    m = inputs.rank_metrics(data, histogram.color_histograms(store))
    return {"mAP": m.mAP, "rank1": m.rank(1), "rank10": m.rank(10)}


if __name__ == "__main__":
    arguments = parse_args()
    runtime.execute(main, arguments)
