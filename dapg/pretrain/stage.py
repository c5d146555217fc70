"""Stages `robust` (sec. II-A) and `align` (sec. II-B): contrastive pre-training; baselines SimCLR, BYOL, MoCo."""

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common import evaluation, images, inputs, processes, runtime, transforms
from dapg import losses, trunk
from dapg.data import open_store, subset
from dapg.model import BYOL, Contrast, SimCLR, checksum, gather_with_gradient, queue_size, world
from dapg.noise import device_corruptions, groups

WINDOW, COLLAPSED = 200, 0.2  # steps over which the spread must stay below this bound before we warn
LUP = {"pad": 0, "crop_scale": (0.2, 1.0), "grey": 0.2, "blur": 0.5, "erase": 0.5, "erase_area": (0.02, 0.6)}
INSTANCES = 256  # images of the instance retrieval that is recorded


class Views:
    """Augmented copies of uint8 images as uint8: pad 10 and crop (or a resized crop), flip 0.5, grey 0.2."""

    def __init__(self, crop: str, grey: float = 0.2):
        self.crop, self.grey = crop, grey

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        scale = (0.2, 1.0) if self.crop == "rrc" else None
        geometry = transforms.draw_geometry(x.shape, generator, pad=0 if scale else 10, crop_scale=scale)
        x = geometry.apply(x, "bicubic" if scale else "bilinear")
        if not self.grey:
            return x
        grey = (transforms.to_grey(x.float()) + 0.5).to(torch.uint8)
        return torch.where((transforms.uniform(generator, (len(x),)) < self.grey).view(-1, 1, 1, 1), grey, x)


def channel_enhancement(x: Tensor, generator: torch.Generator) -> Tensor:
    """CAJ's rule on uint8 images: red, green or blue in all channels with probability 1/4 each, else grey or as is."""
    draw = torch.floor(transforms.uniform(generator, (len(x),)) * 4).long()
    grey = (transforms.to_grey(x.float()) + 0.5).to(torch.uint8).expand_as(x)
    other = torch.where((transforms.uniform(generator, (len(x),)) < 0.5).view(-1, 1, 1, 1), grey, x)
    single = x.gather(1, draw.clamp(max=2).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])).expand_as(x)
    return torch.where((draw < 3).view(-1, 1, 1, 1), single, other)


def spread(q: Tensor) -> Tensor:
    """sqrt(D) times the mean deviation of each dimension of unit rows q (B, D): 1 isotropic, 0 collapsed."""
    return q.detach().float().std(0).mean() * math.sqrt(q.shape[1])


# ---------------------------------------------------------------------------------------------------------------- steps
def group_images(args, pixels, views, rng, generator, types) -> tuple[Tensor, Tensor]:
    """Queries (4, B, 3, H, W) = x_q, x_1, x_2, x_mix and keys, the last three of them."""
    draw = groups.draw_noise(len(pixels), rng, args.severity_max, types)
    ops = args.settings["augmix_ops"] == "on"
    if args.noise_base == "views":
        group = groups.noise_group(tuple(views(pixels, generator) for _ in range(3)), draw, generator, ops)
        stack = torch.stack(group[:4])
    else:
        group = groups.noise_chain(pixels, draw, generator, ops)
        stack = torch.stack([views(x, generator) for x in group[:4]])
    return stack, stack[1:]


def objective(args, z: Tensor, k: Tensor | None, queue: Tensor | None, which: Tensor) -> tuple[Tensor, dict]:
    """The loss of --loss for z (V, B, D) of x_q (x_1, x_2, x_mix) and keys k (P, B, D); returns it and its parts."""
    q = z[0]
    if args.negatives == "batch":
        k = z[1:]
        rank, ranks = world()
        everything = gather_with_gradient(k.transpose(0, 1).contiguous())  # (W B, P, D)
        owner = torch.arange(len(q), device=q.device) + rank * len(q)
        own = owner[:, None] == torch.arange(len(everything), device=q.device).repeat_interleave(len(k))[None]
        negatives = everything.flatten(0, 1)  # (W B P, D)
    else:
        negatives, own = queue, None

    def against(x):
        sim = x @ negatives.T
        return sim if own is None else sim.masked_fill(own, -torch.inf)

    kind = args.loss if len(k) == 3 else "mc"  # alignment and MoCo have one positive and no constraint
    pos, neg = torch.einsum("bd,pbd->bp", q, k), against(q)
    spreads = {"spread": spread(q)}
    if kind == "infonce":
        loss = losses.info_nce(pos, neg, which, args.tau)
        return loss, {"mc": loss.detach(), **spreads}
    mc = losses.multi_contrastive(pos, neg, args.tau)  # Eq. (2)
    if kind == "mc":
        return mc, {"mc": mc.detach(), **spreads}
    if args.constraint == "sim":
        logits = torch.stack([against(x) for x in z[1:]]) / args.tau_js
    elif args.constraint == "feature":
        logits = z[1:] / args.tau_js
    else:
        logits = torch.stack([torch.cat([p[:, None], neg], 1) for p in pos.T]) / args.tau_js
    js = losses.constraint(logits)  # Eqs. (3)-(5)
    return losses.total(mc, js, args.delta), {"mc": mc.detach(), "js": js.detach(), **spreads}  # Eq. (1)


class Step:
    """What one step does for --stage and --method: images to network inputs, loss, and what follows the update."""

    def __init__(self, args, run, model, epoch, total_steps, generated=None):
        self.args, self.run, self.model, self.bare = args, run, model, runtime.bare(model)
        self.epoch, self.total_steps, self.generated = epoch, total_steps, generated
        self.rng = np.random.default_rng([args.seed, epoch + 1, run.rank])
        self.shared = torch.Generator().manual_seed(args.seed * 100003 + epoch)  # the same on all ranks
        self.generator = runtime.generator(run, epoch)
        self.types = groups.allowed_types(args.noise_exclude)
        self.views = Views(args.settings["crop"], 0.2 if args.stage == "robust" else 0.0)
        self.lup = transforms.Augment(**LUP)

    def __call__(self, pixels: Tensor, indices: Tensor, number: int) -> tuple[Tensor, dict]:
        if self.args.stage == "align":
            return self.contrast(*self.pair(pixels, indices))
        if self.args.method == "dapg":
            return self.contrast(*group_images(self.args, pixels, self.views, self.rng, self.generator, self.types))
        views = torch.stack([self.lup(pixels, self.generator) for _ in range(2)])
        if self.args.method == "moco":
            return self.contrast(views[:1], views[1:])
        with self.run.autocast():
            out = self.model(views)
        if self.args.method == "simclr":
            others = gather_with_gradient(out.transpose(0, 1).contiguous()).transpose(0, 1)
            loss = losses.nt_xent(out, others, world()[0] * out.shape[1], self.args.tau)
            return loss, {"spread": spread(out[0])}
        self.progress = number / self.total_steps
        return losses.byol(*out), {"spread": spread(F.normalize(out[0][0].float(), dim=1))}

    def pair(self, pixels, indices):
        """Stage align: the anchor, and one of its generated poses with channel enhancement."""
        chosen = indices.numpy() * 4 + self.rng.integers(0, 4, len(indices))
        positive = self.generated.gather(chosen).to(pixels.device, non_blocking=True)
        positive = channel_enhancement(positive, self.generator)
        if share := self.args.settings["stage2_noise"]:
            kinds = np.where(self.rng.random(len(chosen)) < share, self.rng.choice(self.types, len(chosen)), -1)
            levels = self.rng.integers(1, self.args.severity_max + 1, len(chosen))
            positive = device_corruptions.corrupt(positive.contiguous(), kinds, levels, self.generator)
        return self.views(pixels, self.generator)[None], self.views(positive, self.generator)[None]

    def contrast(self, queries, keys):
        """Forward pass of Contrast and its loss; the keys wait for `after`."""
        batch = self.args.negatives == "batch" and self.args.stage == "robust" and self.args.method == "dapg"
        if self.args.loss != "eq1" and not batch:
            queries = queries[:1]
        order = torch.randperm(keys.shape[0] * keys.shape[1] * self.run.world_size, generator=self.shared)
        with self.run.autocast():
            z, k = self.model(queries, None if batch else keys, None if batch else order)
        which = torch.from_numpy(self.rng.integers(0, keys.shape[0], keys.shape[1])).to(z.device)
        self.keys = None if batch else k[which, torch.arange(k.shape[1], device=k.device)]
        return objective(self.args, z, k, self.bare.queue, which)

    def after(self) -> None:
        """After the optimiser's step: one key an image into the queue, or BYOL's target moves."""
        if isinstance(self.bare, Contrast) and self.keys is not None:
            self.bare.enqueue(self.keys)
        elif isinstance(self.bare, BYOL):
            self.bare.follow(1 - (1 - 0.996) * (math.cos(math.pi * self.progress) + 1) / 2)


class Monitor:
    """Warns when the spread stays below COLLAPSED for WINDOW steps after the warm-up."""

    def __init__(self, run, quiet_steps: int):
        self.run, self.quiet, self.low, self.warned = run, quiet_steps, 0, False

    def see(self, value: float, step: int) -> None:
        self.low = self.low + 1 if value < COLLAPSED and step >= self.quiet else 0
        if self.low >= WINDOW and not self.warned:
            self.warned = True
            runtime.say(
                self.run,
                f"warning: the features have collapsed: their spread is {value:.3f} (1 is isotropic) "
                f"and was below {COLLAPSED} for {WINDOW} steps, at step {step}; lower --lr or use "
                "--preset stable",
            )


# ------------------------------------------------------------------------------------------------------------- training
def build(args, run, count: int):
    """Model with its initial trunk, optimiser, and schedule in steps."""
    if args.method == "simclr":
        model = SimCLR(args.backbone)
    elif args.method == "byol":
        model = BYOL(args.backbone)
    else:
        size = queue_size(count, args.settings["queue"] or None)
        model = Contrast(
            args.backbone,
            size if args.stage == "robust" else min(size, 4096),
            momentum=args.settings["momentum"],
            bn_splits=args.settings["bn_splits"],
        )
        if args.negatives == "batch":
            model.encoder_k.requires_grad_(False)
    state = trunk.load(args.weights, args.backbone, args.logs_dir, args.synthetic)
    if state is not None:
        model.load_trunk(state)
    model = model.to(run.device, memory_format=torch.channels_last)
    weights = [p for p in model.parameters() if p.requires_grad]
    if args.method == "dapg":
        optimizer = torch.optim.Adam(weights, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    else:
        optimizer = torch.optim.SGD(weights, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    steps = steps_per_epoch(args, count)
    warmup = min(args.settings["warmup"], args.epochs / 2)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: trunk.cosine((step + 1) / steps, args.epochs, warmup)
    )
    return processes.parallel(run, model), optimizer, rate


def steps_per_epoch(args, count: int) -> int:
    if count < args.batch_size:
        raise ValueError(f"{count} images cannot fill a batch of {args.batch_size}; use --batch-size {count} or less")
    return min(count // args.batch_size, args.iters or count)


def epoch_batches(args, run, count: int, epoch: int) -> np.ndarray:
    """This rank's indices (steps, B / world size): a part of each global batch of the epoch's permutation."""
    if args.batch_size % run.world_size:
        near = args.batch_size // run.world_size * run.world_size
        raise ValueError(f"--batch-size {args.batch_size} does not split over {run.world_size} processes; use {near}")
    steps = steps_per_epoch(args, count)
    order = np.random.default_rng([args.seed, epoch]).permutation(count)[: steps * args.batch_size]
    return order.reshape(steps, run.world_size, -1)[:, run.rank]


def train_one_epoch(run, args, step: Step, optimizer, scheduler, grad_scaler, store, monitor, count: int) -> dict:
    """One pass; returns mean parts of the loss."""
    model, batches = step.model.train(), epoch_batches(args, run, count, step.epoch)
    totals, began, before = {}, time.time(), step.epoch * len(batches)
    stream = images.batches(store, batches, run.device, workers=args.workers)
    title = f"epoch {step.epoch + 1}"
    bar = tqdm(stream, total=len(batches), desc=title, leave=False, disable=None if run.main else True)
    for i, (pixels, indices) in enumerate(bar):
        loss, parts = step(pixels, indices, before + i)
        runtime.step(run, loss, [optimizer], grad_scaler, f"{title}, step {i + 1}")
        scheduler.step()
        step.after()
        for name, value in {"loss": loss.detach(), **parts}.items():
            totals[name] = totals.get(name, 0) + value
        monitor.see(float(parts["spread"]), before + i)  # the step has waited for the loss already
    agree(run, runtime.bare(model))
    means = {name: float(value) / len(batches) for name, value in totals.items()}
    rate = len(batches) * args.batch_size / (time.time() - began)
    runtime.say(
        run,
        f"epoch {step.epoch + 1}: "
        + ", ".join(f"{k} {v:.4f}" for k, v in means.items())
        + f"; {rate:.1f} images/s (noise groups and step)",
    )
    return means


def agree(run, model) -> None:
    """Check that the queues of all ranks are equal to the bit, and give all of them rank 0's BatchNorm statistics."""
    if run.world_size > 1 and isinstance(model, Contrast):
        sums = processes.gather(run, torch.stack([checksum(model.queue), checksum(model.pointer)])[None])
        if bool((sums != sums[0]).any()):
            raise ValueError("the queues of the processes differ; this is a fault of the program, please report it")
    processes.sync_buffers(run, model)


class Pixels:
    """Images in memory for evaluation.extract."""

    def __init__(self, pixels: Tensor):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def gather(self, indices):
        return self.pixels[indices]


def instance_metrics(args, run, model, store) -> dict:
    """Instance retrieval: the anchor noise images of up to 256 images as queries, their clean images as the gallery."""
    index = np.unique(np.linspace(0, len(store) - 1, INSTANCES).astype(np.int64))
    clean = store.gather(index).to(run.device)
    generator = torch.Generator(run.device).manual_seed(0)
    draw = groups.draw_noise(len(index), np.random.default_rng(0))
    noisy = device_corruptions.corrupt(clean, draw.types[:, 0], draw.severities[:, 0], generator)
    feats = [inputs.extract(run, runtime.bare(model).trunk, Pixels(x), batch_size=64) for x in (noisy, clean)]
    feats = [F.normalize(f, dim=1) for f in feats]
    ids, camera = np.arange(len(index)), np.zeros(len(index), np.int64)
    m = evaluation.rank_metrics(*feats, ids, ids, camera, camera + 1)
    return {"instance.rank1": m.rank(1), "instance.mAP": m.mAP}


def run_stage(args, run) -> None:
    """The whole of stage robust or align: data, training, exported trunk, result file."""
    data = inputs.dataset(run, args.dataset)
    samples = subset(data.train, args.subset, args.settings["subset_seed"])
    if args.stage == "align" and args.settings["market_split"] == "all":
        samples = samples + [s for s in data.gallery if s.pid >= 0]
    runtime.open_log(run, inputs.data_name(data))
    runtime.say(run, f"{len(samples)} images for --stage {args.stage}, no labels used")
    store = open_store(run, samples, args.height, args.width, f"{data.name} {args.stage}")
    generated = None
    if args.stage == "align":
        from dapg.poses.gan import generated_files

        files = generated_files(args, [s.path for s in samples])
        with processes.rank_zero_first(run):
            generated = images.open_images(
                files,
                args.height,
                args.width,
                cache=args.cache,
                cache_dir=args.cache_dir,
                device=run.device,
                workers=args.workers,
                name="generated poses",
            )
    model, optimizer, scheduler = build(args, run, len(samples))
    grad_scaler, steps = runtime.scaler(run), steps_per_epoch(args, len(samples))
    first = runtime.resume(run, model, optimizer, scheduler, grad_scaler)
    if "before" not in run.extra:
        run.extra["before"] = instance_metrics(args, run, model, store)
    if isinstance(runtime.bare(model), Contrast):
        positives = 3 if args.stage == "robust" and args.method == "dapg" and args.loss != "infonce" else 1
        negatives = len(runtime.bare(model).queue) if args.negatives == "queue" else 3 * (args.batch_size - 1)
        runtime.say(
            run,
            f"{negatives} negatives ({args.negatives}); L_MC of equal similarities is "
            f"{math.log((positives + negatives) / positives):.3f}",
        )
    monitor = Monitor(run, round(args.settings["warmup"] * steps))
    for epoch in range(first, args.epochs):
        runtime.seed_epoch(run, epoch)
        step = Step(args, run, model, epoch, args.epochs * steps, generated)
        stats = train_one_epoch(run, args, step, optimizer, scheduler, grad_scaler, store, monitor, len(samples))
        run.extra["last"] = stats
        runtime.save(run, epoch + 1, model, optimizer, scheduler, grad_scaler, stats)
    after = instance_metrics(args, run, model, store)
    if run.main:
        meta = {
            "stage": args.stage,
            "method": args.method,
            "row": args.row,
            "backbone": args.backbone,
            "data": inputs.data_name(data),
            "images": len(samples),
            "epochs": args.epochs,
        }
        trunk.export(run.log_dir / "trunk.pt", runtime.bare(model).trunk, meta)
    metrics = {**after, **{f"before.{k}": v for k, v in run.extra["before"].items()}, **run.extra["last"]}
    protocol = {
        "dataset": inputs.data_name(data),
        "queries": "one corruption an image",
        "gallery": "the clean images",
        "images": min(INSTANCES, len(samples)),
        "labels": "none",
    }
    path = runtime.record(run, metrics, inputs.describe(data), protocol, epoch=args.epochs)
    runtime.say(
        run,
        f"instance rank-1 {100 * run.extra['before']['instance.rank1']:.1f} -> "
        f"{100 * after['instance.rank1']:.1f}; trunk in {run.log_dir / 'trunk.pt'}; result in {path}",
    )
