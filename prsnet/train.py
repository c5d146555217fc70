"""PRSNet, fine-tuning for re-identification (paper sec. III-E, IV-B).

Table III reports mAP 97.6, rank-1 97.1 on Market-1501 under a protocol of its own (centroid-legacy, README); every
number here carries the name of its protocol.

    python prsnet/train.py --dataset market                       # Eq. (4), after prsnet/pretrain.py
    python prsnet/train.py --row table4/market-ctl                # any row of experiments.yaml
    torchrun --nproc_per_node=2 prsnet/train.py --dataset market  # the same batch on two GPUs
    python prsnet/train.py --row demo/pretrained                  # one CPU, minutes, after demo/pretrain
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from common import flags
from prsnet.flags import train_args as parse_args
from prsnet.flags import variants, weights_file

if __name__ == "__main__":
    arguments = flags.answer(parse_args)  # torch is loaded below

import numpy as np
import torch

from common import batchnorm, datasets, images, inputs, log_folder, processes, runtime, samplers, transforms
from common.epoch import Epoch
from prsnet import losses, masking, protocols, sampling
from prsnet.model import SIZES
from prsnet.reid import Output, ReID, build_encoder, load_pretrained

ERASE_FILL = {"zero": (0.0, 0.0, 0.0), "mean": transforms.IMAGENET_MEAN}  # in the normalised image


def build_model(args: Namespace, num_classes: int) -> ReID:
    """The network of the flags, without weights."""
    encoder = build_encoder(
        args.model,
        SIZES[args.size],
        args.block,
        args.bottleneck,
        args.height,
        args.width,
        tuple(args.mask_block),
        args.mae_head,
        args.mask_ratio,
    )
    return ReID(encoder, args.bottleneck, num_classes, polluted=variants(args)["neck"] == "polluted")


def same_network(args: Namespace) -> dict:
    """The flags in which a pre-training checkpoint must agree."""
    names = ["model", "size", "height", "width", "mask_block"] if args.model == "mae" else ["model", "size", "block"]
    return {name: getattr(args, name) for name in names}


def build(args, run, num_classes, data_name):
    """Model on the device, Adam over all but the centres, SGD 0.5 for those, and the schedule."""
    model = build_model(args, num_classes)
    if (path := weights_file(args, data_name)) is not None:
        processes.say(run, load_pretrained(model.encoder, path, same_network(args), variants(args)["norms"] == "drop"))
    model = batchnorm.over_groups(model, run.world_size).to(run.device, memory_format=torch.channels_last)
    parameters = [p for name, p in model.named_parameters() if name != "centres" and p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    centres = torch.optim.SGD([model.centres], lr=0.5, fused=run.device.type == "cuda")
    return (
        processes.parallel(run, model),
        optimizer,
        centres,
        torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_steps(args.epochs)),
    )


def warmup_steps(epochs: int):
    """Rate factor by epoch: (e + 1) / 10 for e < 10, x 0.1 at 40 and 70, of 120; in proportion for other lengths."""
    warm, first, second = epochs / 12, epochs / 3, epochs * 7 / 12
    return lambda epoch: min(1.0, (epoch + 1) / warm) * 0.1 ** ((epoch >= first) + (epoch >= second))


def objective(args, centres, output, real, labels):
    """Losses of the global batch in slots; real (P, K) bool, labels (P,) of the identities; returns sum and parts."""
    w_id, w_triplet, w_centre, w_centroid = args.loss_weights
    feats, logits, masked = output
    parts = {
        "id": w_id * losses.identity_loss(logits, labels, real),
        "triplet": w_triplet * losses.triplet(feats, real, args.margin, args.dist),  # Eq. (2)
        "centre": losses.centre_loss(feats, labels, real, centres, w_centre),
        "centroid": w_centroid
        * losses.centroid_loss(args.centroid, feats, masked, real, args.margin, args.dist),  # Eqs. (3), (4)
    }
    return sum(parts.values()), parts


def global_batch(run, output, real):
    """Output of this rank's R images -> that of all P x K slots of all ranks, (P, K, D) each, zeros where no image is.

    Every rank then mines, averages and weighs (lambda of Eq. (4)) over the same batch as one process would.
    """
    own = real.chunk(run.world_size)[run.rank]
    return Output(*(part if part is None else processes.gather_rows(spread(part, own)) for part in output))


def spread(feats, real):
    """Features (R, D) of the real slots -> (P, K, D), zeros elsewhere."""
    full = feats.new_zeros(real.numel(), feats.shape[1])
    places = real.flatten().to(torch.int64).argsort(descending=True, stable=True)[: len(feats)]  # no wait for the GPU
    return full.index_copy(0, places, feats).view(*real.shape, -1)


def train_one_epoch(run, args, model, optimizers, grad_scaler, store, labels, augment, number):
    """One pass over the identities; returns the means of the loss and its parts over steps and ranks."""
    model.train()
    ids = args.batch_size // args.num_instances
    plan = sampling.identity_plan(labels.numpy(), ids, args.num_instances, seed=args.seed, epoch=number)[: args.iters]
    own = samplers.own_share(plan, run.rank, run.world_size)
    real, classes = torch.from_numpy(plan >= 0).to(run.device), labels[plan[:, :, 0]].to(run.device)  # of all steps
    generator, mask_draw = (runtime.generator(run, number, stream) for stream in (0, 1))
    grid, with_holes = masking.grid_of(args.height, args.width, args.mask_block), args.centroid.startswith("mctl")
    stream = images.batches(store, [row[row >= 0] for row in own], run.device, workers=args.workers)
    epoch = Epoch(run, number, zip(stream, real, classes), len(plan))
    for (pixels, _), real_slots, batch_labels in epoch:
        x = augment(pixels, generator)
        masked = masking.random_mask(len(x), grid, args.mask_ratio, mask_draw) if with_holes else None
        with run.autocast():
            output = model(x, masked)
        output = global_batch(run, output, real_slots)
        loss, parts = objective(args, log_folder.bare(model).centres, output, real_slots, batch_labels)
        runtime.step(run, loss, optimizers, grad_scaler, epoch.where)
        epoch.add(len(x), loss=loss, **parts)
    return epoch.means(model)


def evaluate(run, args, model, data, store) -> dict:
    """Metrics of every protocol, flat: `image.mAP`, ... as fractions."""
    feats = inputs.extract(run, model, store)
    return protocols.flat(protocols.all_metrics(data, feats, args.protocol, args.centroid_distractors))


def show(run, name, metrics):
    for protocol in dict.fromkeys(key.rpartition(".")[0] for key in metrics):
        values = "   ".join(f"{key} {100 * metrics[f'{protocol}.{key}']:5.1f}" for key in ("mAP", "rank1", "rank10"))
        processes.say(
            run, f"{name:<16} protocol {protocol:<16} {values}{protocols.seen(run.args, run.args.get('data_name', ''))}"
        )


def main(args):
    run = runtime.start(args, "prsnet")
    samplers.check_shape(args.batch_size // args.num_instances, args.num_instances, run.rank, run.world_size)
    torch.backends.cudnn.benchmark = False  # batches differ in size: the autotuner would start over at each new one
    data = inputs.dataset(run, args.dataset)
    log_folder.open_log(run, inputs.data_name(data))
    size = (args.height, args.width)
    store = inputs.open_images(run, data.train, *size, name=f"{data.name} train", interpolation="bilinear")
    test_store = inputs.open_images(
        run, data.query + data.gallery, *size, name=f"{data.name} test", interpolation="bilinear"
    )
    labels = torch.from_numpy(np.ascontiguousarray(datasets.labels(data.train)))
    model, optimizer, centres, scheduler = build(args, run, int(labels.max()) + 1, inputs.data_name(data))
    if leaked := protocols.test_images_behind(weights_file(args, inputs.data_name(data))):
        run.args["test_images_of"] = leaked
    grad_scaler = runtime.scaler(run)
    augment = transforms.Augment(
        erase_law="uniform", erase_fill=ERASE_FILL[variants(args)["erase"]], channels_last=True
    )
    for epoch in range(log_folder.resume(run, model, optimizer, scheduler, grad_scaler), args.epochs):
        runtime.seed_epoch(run, epoch)
        stats = train_one_epoch(run, args, model, [optimizer, centres], grad_scaler, store, labels, augment, epoch)
        scheduler.step()
        if (epoch + 1) % max(1, args.epochs // 6) == 0 or epoch + 1 == args.epochs:
            run.extra["last"] = evaluate(run, args, model, data, test_store)
            show(run, f"epoch {epoch + 1}", run.extra["last"])
            stats |= run.extra["last"]
        log_folder.save(run, epoch + 1, model, optimizer, scheduler, grad_scaler, stats)
    protocol = {
        **inputs.MARKET_PROTOCOL,
        "protocols": ", ".join(args.protocol),
        "centroid_distractors": args.centroid_distractors,
        **({"pretrained_on_test_images": True} if protocols.seen(run.args, inputs.data_name(data)) else {}),
    }
    path = runtime.record(run, run.extra["last"], inputs.describe(data), protocol, epoch=args.epochs)
    processes.say(run, f"result in {path}")


if __name__ == "__main__":
    runtime.execute(main, arguments)
