"""ConvNeXt-AP: person re-identification with an enhanced ConvNeXt (Sun et al., Eng. OA 2(2), 2024).

    python convnext_ap/train.py --dataset market                   # ConvNeXt-AP; Table 4 reports rank-1 95.2, mAP 86.5
    python convnext_ap/train.py -d market --simam none --parts 0   # its baseline; 92.9, 81.7
    python convnext_ap/train.py --row table4/cuhk03/p              # any row of experiments.yaml
    torchrun --nproc_per_node=2 convnext_ap/train.py -d duke --amp bf16 --compile     # the same on two GPUs
    python convnext_ap/train.py --row small/ap                     # one CPU, minutes, synthetic people

What to expect, and what our runs gave: convnext_ap/README.md.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from common import flags
from convnext_ap.flags import parse_args, variants

if __name__ == "__main__":
    arguments = flags.answer(parse_args)  # torch is loaded below

import numpy as np
import torch

from common import (
    batchnorm,
    checkpoints,
    datasets,
    histogram,
    images,
    inputs,
    log_folder,
    processes,
    runfiles,
    runtime,
    samplers,
    transforms,
)
from common.epoch import Epoch
from convnext_ap import losses, schedule
from convnext_ap.metrics import trapezoid_map
from convnext_ap.model import ConvNeXtAP, Embedding, check_variant, load_trunk


def load_data(run, args: Namespace) -> datasets.Dataset:
    """The data set of the flags, of CUHK03 with the boxes that --split names."""
    return inputs.dataset(run, args.dataset, **({"split": args.split} if args.split else {}))


def build_model(args: Namespace, num_classes: int) -> ConvNeXtAP:
    """The network of the flags, with random weights."""
    v = variants(args)
    return ConvNeXtAP(
        num_classes,
        args.trunk,
        args.simam,
        args.parts,
        head_relu=v["head_relu"] == "on",
        dropout=v["dropout"],
        drop_path=v["drop_path"],
        final_norm=v["final_norm"] == "on",
    )


def make_plan(args: Namespace) -> schedule.Plan:
    """The epochs of the three stages and their learning rates."""
    later = (args.rpp_epochs, args.joint_epochs) if args.parts else (0, 0)
    v = variants(args)
    return schedule.Plan(args.epochs, *later, args.warmup, args.lr, v["trunk_lr"], v["later_lr"])


def build(args, run, num_classes, plan):
    """Model on the device; SGD over trunk, heads and W with the rates of the plan; the gradient norm is clipped.

    Paper silent: optimiser, momentum, weight decay, the trunk's smaller rate (those of PCB), clipping at norm 5.
    """
    model = build_model(args, num_classes)
    processes.say(run, load_trunk(model, args.weights))
    model = model.to(run.device, memory_format=torch.channels_last)
    groups = {
        "trunk": [p for m in (model.trunk, model.final_norm) if m is not None for p in m.parameters()],
        "heads": list(model.heads.parameters()),
        "assign": list(model.assign.parameters()) if args.parts else [],
    }
    groups = {name: weights for name, weights in groups.items() if weights}
    v, parameters = variants(args), [{"params": weights, "lr": 1.0} for weights in groups.values()]
    kernels = {"fused" if run.device.type == "cuda" else "foreach": True}
    if v["optimizer"] == "adamw":
        optimizer = torch.optim.AdamW(parameters, weight_decay=args.weight_decay, **kernels)
    else:
        optimizer = torch.optim.SGD(parameters, momentum=0.9, nesterov=True, weight_decay=args.weight_decay, **kernels)
    everything = list(model.parameters())

    def clip(*_):
        torch.nn.utils.clip_grad_norm_(everything, v["clip"], foreach=True)

    optimizer.register_step_pre_hook(clip)
    rates = [lambda epoch, group=group: schedule.learning_rate(epoch, plan, group) for group in groups]
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rates)


@torch.no_grad()
def calibrate(run, model, store, batches=10, size=64):
    """Estimate the heads' BatchNorm statistics of an untrained network, so that its descriptors mean something.

    The first evaluation then measures the random trunk and not an offset that all images share.
    """
    norm = model.heads.norm
    momentum, norm.momentum = norm.momentum, None  # the plain average over all batches
    model.train()
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(run.seed))
    for indices in order.split(size)[:batches]:
        if len(indices) > 1:
            model.encode(transforms.normalize(store.gather(indices).to(run.device)))
    norm.momentum = momentum


def index_batches(args, run, labels, epoch):
    """Indices (iters, B / world size) of an epoch: P identities x K images, or with --loss id a plain shuffle.

    Raises: ValueError for too few images, or a batch without two images of one person where the loss needs them.
    """
    iters = args.iters or len(labels) // args.batch_size
    if iters < 1:
        raise ValueError(f"{len(labels)} training images do not fill a batch of {args.batch_size}; lower --batch-size")
    if args.loss == "id":
        if args.batch_size % run.world_size:
            raise ValueError(f"a batch of {args.batch_size} does not split over {run.world_size} processes")
        rng, n = np.random.default_rng([args.seed, epoch]), len(labels)
        order = np.concatenate([rng.permutation(n) for _ in range(-(-iters * args.batch_size // n))])
        batches = order[: iters * args.batch_size].reshape(iters, run.world_size, -1)[:, run.rank]
        return np.ascontiguousarray(batches)
    ids = args.batch_size // args.num_instances
    batches = samplers.identity_batches(
        labels.numpy(),
        ids,
        args.num_instances,
        iters=iters,
        seed=args.seed,
        epoch=epoch,
        rank=run.rank,
        world_size=run.world_size,
    )
    return need_positives(batches, labels.numpy(), args.loss)


def need_positives(batches, labels, loss):
    """The batches (iters, B), if each holds two images of one person; else ValueError that names the first without."""
    for i, row in enumerate(labels[batches]):
        if len(np.unique(row)) == len(row):
            raise ValueError(
                f"batch {i + 1} holds no two images of one person, so --loss {loss} has no positive pair; "
                f"raise --num-instances, or use --loss id"
            )
    return batches


def stream(run, store, labels, batches, augment, generator):
    """Augmented images (B, 3, H, W) and labels (B,) on the device, batch after batch, without waiting for it."""
    for batch, indices in images.batches(store, batches, run.device, workers=run.args["workers"]):
        yield augment(batch, generator), images.to_device(labels[indices], run.device)


def train_one_epoch(run, model, optimizer, grad_scaler, batches, steps, objective, epoch):
    """One pass over `batches`; objective(output, labels) -> losses.Parts. Returns the mean parts."""
    model.train()
    epoch = Epoch(run, epoch, batches, steps)
    for x, labels in epoch:
        with run.autocast():
            output = model(x)
        parts = objective(output, labels)
        runtime.step(run, parts.total, [optimizer], grad_scaler, epoch.where)
        epoch.add(len(x), loss=parts.total, id=parts.id, pair=parts.pair, accuracy=parts.accuracy)
    return epoch.means(model, log_folder.bare(model).stage)


def make_objective(args, stage):
    """The loss of a stage: the part heads' alone while W learns, the whole one otherwise."""
    v = variants(args)
    options = dict(
        loss=args.loss,
        only_parts=stage == "assign",
        part_reduce=v["part_reduce"],
        pair_on=v["circle_on"],
        mode=v["circle_mode"],
        m=v["m"],
        gamma=v["gamma"],
    )
    return lambda output, labels: losses.total_loss(output.logits, output.feats, labels, **options)


def enter(run, model, optimizer, stage, fresh):
    """Switch the bare model to a stage and wrap it anew, its BatchNorm over the global batch; a stage that begins
    (fresh) starts without momentum.

    Paper silent: a stage of PCB's induced training is a training of its own, and the rates jump from one to the next.
    """
    model.set_stage(stage)
    if fresh:
        optimizer.state.clear()
    return processes.parallel(run, batchnorm.over_groups(model, run.world_size))


def features(run, model, store) -> dict:
    """Descriptors H (used in the tables) and G of a store, image and mirror image added (Paper silent: sec. 3.3.2
    says that the parts' features are concatenated)."""
    embedding = Embedding(log_folder.bare(model))
    return embedding.descriptors(inputs.extract(run, embedding, store, flip=True))


def evaluate(run, model, data, store, trapezoid=False) -> dict:
    """Metrics of H, and G.mAP, G.rank1 of the pooled vectors (sec. 4); with trapezoid also Market's original AP."""
    feats = features(run, model, store)
    found = {name: inputs.rank_metrics(data, x) for name, x in feats.items()}
    m = found["H"]
    out = {
        "mAP": m.mAP,
        "rank1": m.rank(1),
        "rank5": m.rank(5),
        "rank10": m.rank(10),
        "mINP": m.mINP,
        "G.mAP": found["G"].mAP,
        "G.rank1": found["G"].rank(1),
    }
    return out | ({"trapezoid.mAP": trapezoid_map(feats["H"], data)} if trapezoid else {})


def show(run, name, m):
    values = {"mAP": m["mAP"], "rank-1": m["rank1"], "rank-10": m["rank10"]}
    processes.say(run, f"{name:<24} " + "   ".join(f"{title} {100 * value:5.1f}" for title, value in values.items()))


def before_training(run, model, data, store) -> dict:
    """{"before": metrics of the untrained network, "histogram": those of colour histograms, for synthetic people}."""
    found = {"before": evaluate(run, model, data, store)}
    if data.kind == "synthetic":
        m = inputs.rank_metrics(data, histogram.color_histograms(store))
        found["histogram"] = {"mAP": m.mAP, "rank1": m.rank(1), "rank10": m.rank(10)}
    return found


def check_resumed(run):
    """Raises ValueError for a --resume from another variant, which says more than that flags differ."""
    wanted = run.args["resume"]
    source = runfiles.newest(run.log_dir) if wanted == "auto" else wanted
    if source is not None:
        check_variant(source, checkpoints.read(source)["args"], run.args["simam"], run.args["parts"])


def main(args):
    run = runtime.start(args, "convnext_ap")
    data = load_data(run, args)
    log_folder.open_log(run, inputs.data_name(data))
    size, plan = (args.height, args.width), make_plan(args)
    store = inputs.open_images(run, data.train, *size, name=f"{data.name} train")
    test_store = inputs.open_images(run, data.query + data.gallery, *size, name=f"{data.name} test")
    labels = torch.from_numpy(datasets.labels(data.train))
    model, optimizer, scheduler = build(args, run, int(labels.max()) + 1, plan)
    grad_scaler, augment = runtime.scaler(run), make_augment(args)
    if args.weights == "none":
        calibrate(run, model, store)
    check_resumed(run)
    first = log_folder.resume(run, model, optimizer, scheduler, grad_scaler, epochs=plan.total)
    if "before" not in run.extra:
        run.extra.update(before_training(run, model, data, test_store))
    for name in ("histogram", "before"):
        if name in run.extra:
            show(run, {"histogram": "colour histogram", "before": "before training"}[name], run.extra[name])
    stage = network = None
    for epoch in range(first, plan.total):
        runtime.seed_epoch(run, epoch)
        if schedule.stage_of(epoch, plan) != stage:
            stage, fresh = schedule.stage_of(epoch, plan), epoch > 0 and schedule.ends_stage(epoch - 1, plan)
            if fresh:  # here and not behind `save`: also after a resume, if the process ended between the two
                keep(run, schedule.stage_of(epoch - 1, plan), epoch, resumed=epoch == first)
            network = enter(run, model, optimizer, stage, fresh)
        batches = index_batches(args, run, labels, epoch)
        shown = stream(run, store, labels, batches, augment, runtime.generator(run, epoch))
        objective = make_objective(args, stage)
        stats = train_one_epoch(run, network, optimizer, grad_scaler, shown, len(batches), objective, epoch)
        scheduler.step()
        last, ends = epoch + 1 == plan.total, schedule.ends_stage(epoch, plan)
        if ends or (epoch + 1) % -(-plan.epochs // 3) == 0:
            found = evaluate(run, model, data, test_store, trapezoid=last)
            show(run, f"after epoch {epoch + 1} ({stage})", found)
            stats.update(found)
            run.extra.update({stage: found} if ends else {})
        log_folder.save(run, epoch + 1, network, optimizer, scheduler, grad_scaler, stats)
    metrics = {**run.extra[schedule.stage_of(plan.total - 1, plan)], **earlier(run.extra, plan)}
    protocol = {**inputs.MARKET_PROTOCOL, "descriptor": "H", "flip": True, "split": args.split}
    path = runtime.record(run, metrics, inputs.describe(data), protocol, epoch=plan.total)
    processes.say(run, f"result in {path}")


def make_augment(args):
    """Flip, normalise, erase with noise in half of the images (sec. 3.1.2, 3.2, 5.1).

    Paper silent: the area, the order, and the law of the aspect ratio; log-uniform as in torchvision's RandomErasing,
    whose argument p the paper names, where the first ReID code draws uniformly.
    """
    return transforms.Augment(
        flip=0.5,
        pad=0,
        erase=variants(args)["erase"],
        erase_area=(0.02, 0.4),
        erase_ratio=(0.3, 3.33),
        erase_fill="random",
        channels_last=True,
    )


def keep(run, stage, epoch, resumed):
    """Copy the checkpoint after `epoch` epochs, with which a stage ended, to <stage>.pt, which no later epoch replaces.

    resumed: this process did not write it but began with it, from wherever --resume found it.
    """
    if run.main:
        named = resumed and run.args["resume"] != "auto"
        source = Path(run.args["resume"]) if named else run.log_dir / runfiles.name_of(epoch)
        content = source.read_bytes()
        runfiles.replace(run.log_dir / f"{stage}.pt", lambda file: file.write(content))


def earlier(extra, plan) -> dict:
    """Metrics of what came before the last stage, each under the name of its stage."""
    last = schedule.stage_of(plan.total - 1, plan)
    kept = {part: extra[part] for part in ("before", "histogram", "pcb", "assign") if part in extra and part != last}
    names = ("mAP", "rank1", "rank10")
    return {f"{part}.{name}": found[name] for part, found in kept.items() for name in names}


if __name__ == "__main__":
    runtime.execute(main, arguments)
