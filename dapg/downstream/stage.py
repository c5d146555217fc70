"""Stages `agw` and `cil`: fine-tuning on SYSU-MM01 or RegDB, clean and corrupted evaluation, result file."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import batchnorm, images, inputs, log_folder, processes, runtime, transforms
from common.epoch import Epoch
from dapg import losses, trunk
from dapg.channels import channel_enhancement
from dapg.downstream import agw, cil, protocols
from dapg.downstream.data import INSTANCES, Data, cross_batches


def run_stage(args, run) -> None:
    """The whole of stage agw or cil: data, fine-tuning, clean and corrupted evaluation, result file."""
    data = Data(args, run)
    log_folder.open_log(run, inputs.data_name(data.data))
    data.open(args, run)
    model, optimizer, scheduler = build(args, run, data)
    network, grad_scaler = log_folder.bare(model), runtime.scaler(run)
    first = log_folder.resume(run, model, optimizer, scheduler, grad_scaler)
    best = args.settings["select"] == "best_test"
    for number in range(first, args.epochs):
        runtime.seed_epoch(run, number)
        stats = train_one_epoch(args, run, model, optimizer, grad_scaler, data, number)
        scheduler.step()
        if best:
            stats |= keep_best(args, run, network, data)
        log_folder.save(run, number + 1, model, optimizer, scheduler, grad_scaler, stats)
    if best:
        network.load_state_dict(run.extra["best"]["state"])
    corruption = protocols.Corruption(draws=args.settings["draws"])
    metrics = protocols.evaluate(run, network, data, args.stage, corruption=corruption)
    protocols.show(run, metrics)
    protocol = {
        "dataset": inputs.data_name(data.data),
        "trials": protocols.TRIALS,
        "split": data.split,
        "features": "bn (clean AGW), pool (else)",
        "corruptions": "20 types, severity 1..5, visible images only",
        "corruption_draws": corruption.draws,
        "re_ranking": False,
    }
    selection, described = "best_on_test" if best else "last", inputs.describe(data.data)
    path = runtime.record(run, metrics, described, protocol, epoch=args.epochs, selection=selection)
    processes.say(run, f"result in {path}")


def build(args, run, data: Data):
    """Network with its initial trunk and BatchNorm over the global batch, optimiser, AGW's schedule."""
    network = agw.TwoStream(data.num_classes, args.backbone, args.settings["nl_inter"])
    state = trunk.load(args.weights, args.backbone, args.logs_dir, args.synthetic)
    if state is not None:
        network.load_trunk(state)
    network = batchnorm.over_groups(network, run.world_size).to(run.device, memory_format=torch.channels_last)
    processes.say(
        run,
        f"{sum(p.numel() for p in network.parameters()):,} parameters, {data.num_classes} identities, "
        f"trunk from {args.weights}" + (f", split {data.split}" if data.split else ""),
    )
    groups = agw.parameter_groups(network, args.lr, args.settings["trunk_lr"])
    optimizer = torch.optim.SGD(
        groups, momentum=0.9, nesterov=True, weight_decay=args.weight_decay, fused=run.device.type == "cuda"
    )
    span = args.epochs / 81  # AGW's 81 epochs, stretched to --epochs
    form = args.settings["rates"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: agw.schedule(int(epoch / span), form))
    return processes.parallel(run, network), optimizer, scheduler


def epoch_batches(args, run, data: Data, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """This rank's identities of each global batch: visible and infrared indices, and labels, (steps, P * 4 / W) each.

    AGW's epoch: floor(max(Nv, Nt) / 32) + 1 batches of 8 identities x (4 visible + 4 infrared).
    """
    num_ids = args.batch_size // (2 * INSTANCES)
    most = max(len(data.parts["train_rgb"]), len(data.parts["train_ir"]))
    steps = min(most // (args.batch_size // 2) + 1, args.iters or most)
    rng = np.random.default_rng([args.seed, number + 1, 0])  # the same on every rank
    batches = cross_batches(data.labels["train_rgb"], data.labels["train_ir"], num_ids, steps, rng)
    return tuple(np.split(part, run.world_size, axis=1)[run.rank] for part in batches)


def train_one_epoch(args, run, model, optimizer, grad_scaler, data: Data, number: int) -> dict[str, float]:
    """One epoch of `epoch_batches`; returns the mean losses."""
    *indices, labels = epoch_batches(args, run, data, number)
    streams = [
        images.batches(data.stores[name], index, run.device, workers=args.workers)
        for name, index in zip(("train_rgb", "train_ir"), indices)
    ]
    generator, epoch = runtime.generator(run, number), Epoch(run, number, zip(*streams, labels), len(labels))
    model.train()
    for (visible, _), (infrared, _), chosen in epoch:
        chosen = images.to_device(torch.from_numpy(chosen), run.device)
        loss, parts = objective(args, run, model, *views(args, visible, infrared, generator), chosen)
        runtime.step(run, loss, [optimizer], grad_scaler, epoch.where)
        epoch.add(2 * len(visible), loss=loss, **parts)
    return epoch.means(model)


def views(args, visible: Tensor, infrared: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """uint8 images of both modalities, augmented and normalised: (B, 3, H, W) each for AGW; for CIL (3 B, 3, H, W),
    clean and two versions of the visible ones, and three times the infrared ones. With --variant visible=channels the
    visible ones come in one of their channels or in grey, by CAJ's rule."""
    visible, infrared = (transforms.draw_geometry(x.shape, generator).apply(x) for x in (visible, infrared))
    if args.settings["visible"] == "channels":
        visible = channel_enhancement(visible, generator)
    if args.stage == "agw":
        return transforms.normalize(visible), transforms.normalize(infrared)
    return cil.versions(visible, args.settings, generator), transforms.normalize(infrared).repeat(3, 1, 1, 1)


def objective(args, run, model, visible: Tensor, infrared: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """CE on the logits + WRT on the pooled features of the clean images of all ranks; for CIL + 12 JS of the versions.

    labels (B,) int64 of the images of one modality. Returns the loss and its parts.
    """
    with run.autocast():
        out = model(visible, infrared)
    count = len(visible) // len(labels)  # versions of an image: 1, or 3 for CIL
    pooled, logits = (torch.cat(x.unflatten(0, (2, count, -1)).unbind(0), 1).float() for x in out)  # (count, 2 B, ...)
    both = labels.repeat(2)
    ce = F.cross_entropy(logits[0], both)
    wrt = losses.weighted_triplet(processes.gather_rows(pooled[0]), processes.gather_rows(both))
    if args.stage == "agw":
        return ce + wrt, {"ce": ce, "wrt": wrt}
    js = losses.consistency(logits)
    return ce + wrt + args.settings["cil_weight"] * js, {"ce": ce, "wrt": wrt, "js": js}


def keep_best(args, run, network, data: Data) -> dict[str, float]:
    """Remember the network with the best clean rank-1 on the test set, as AGW's code does; labelled in the result."""
    metrics = protocols.evaluate(run, network, data, args.stage)
    value = metrics["all.rank1" if args.dataset == "sysu" else "v2t.rank1"]
    if value > run.extra.get("best", {}).get("rank1", -1.0):
        run.extra["best"] = {"rank1": value, "state": {k: v.cpu().clone() for k, v in network.state_dict().items()}}
    return {"test_rank1": value}
