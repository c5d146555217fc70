"""Stages `agw` and `cil`: fine-tuning on SYSU-MM01 or RegDB, and both protocols, clean and corrupted (-C)."""

import time
from argparse import Namespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import datasets, evaluation, images, inputs, processes, runtime, transforms
from common.datasets import regdb, sysu
from dapg import losses, trunk
from dapg.data import CorruptedStore
from dapg.downstream import agw
from dapg.noise import corruptions, groups

INSTANCES = 4  # images of an identity and modality in a batch
TRIALS = 10
FEATURES = ("pool", "bn")


class Data:
    """A data set by modality: stores, labels and samples of training, query and gallery."""

    def __init__(self, args, run):
        options = {"split": args.split or run.seed % 10 + 1} if args.dataset == "regdb" else {}
        self.data = inputs.dataset(run, args.dataset, **options)
        self.split = options.get("split", 0)
        self.parts = {
            "train_rgb": [s for s in self.data.train if s.modality == "rgb"],
            "train_ir": [s for s in self.data.train if s.modality == "ir"],
        }
        all_labels = dict(zip((s.path for s in self.data.train), datasets.labels(self.data.train)))
        self.labels = {name: np.array([all_labels[s.path] for s in part]) for name, part in self.parts.items()}
        self.num_classes = 1 + max(int(labels.max()) for labels in self.labels.values())
        self.parts["rgb"] = self.data.gallery if args.dataset == "sysu" else self.data.query
        self.parts["ir"] = self.data.query if args.dataset == "sysu" else self.data.gallery

    def open(self, args, run) -> "Data":
        def opened(name):
            title, size = f"{self.data.name} {name}", (args.height, args.width)
            return inputs.open_images(run, self.parts[name], *size, title, "lanczos")

        self.stores = {name: opened(name) for name in self.parts}
        return self


def cross_batches(visible: np.ndarray, infrared: np.ndarray, num_ids: int, iters: int, rng) -> tuple:
    """Indices (iters, ids * 4) into both modalities: ids without repetition, images with replacement.

    Row i holds the same identities at the same places of both. Raises: ValueError for too few identities.
    """
    ids = np.intersect1d(visible, infrared)
    if len(ids) < num_ids:
        raise ValueError(f"{len(ids)} identities have images in both modalities, a batch needs {num_ids}")
    chosen = ids[rng.random((iters, len(ids))).argsort(1)[:, :num_ids]].repeat(INSTANCES, 1)
    picked = []
    for labels in (visible, infrared):
        order = np.argsort(labels, kind="stable")
        start, end = (np.searchsorted(labels[order], chosen, side) for side in ("left", "right"))
        picked.append(order[start + (rng.random(chosen.shape) * (end - start)).astype(np.int64)])
    return (*picked, chosen)


# ------------------------------------------------------------------------------------------------------------- training
def soft_erasing(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """CIL's soft random erasing, then self patch mixing, each with probability 0.5, of images in [0, 1].

    A rectangle becomes (1 - m) patch + m noise, N(0, 1), m ~ Beta(0.5, 1); then one becomes a mixture with a patch of
    the same size from elsewhere in the image. Deviation: values outside [0, 1] are clipped; CIL's code wraps them.
    """
    height, width = x.shape[2:]
    for source in ("noise", "patch"):
        boxes = transforms.draw_erasing(len(x), height, width, generator)
        m = transforms.uniform(generator, (len(x),)).square().view(-1, 1, 1, 1)  # u^(1/0.5) is Beta(0.5, 1)
        if source == "noise":
            other = torch.randn(x.shape, device=x.device, generator=generator)
        else:
            place = transforms.uniform(generator, (2, len(x)))
            top, left = (torch.floor(place[i] * ((height, width)[i] - boxes[:, 2 + i] + 1)).long() for i in (0, 1))
            rows = (torch.arange(height, device=x.device) + (top - boxes[:, 0])[:, None]).clamp(0, height - 1)
            columns = (torch.arange(width, device=x.device) + (left - boxes[:, 1])[:, None]).clamp(0, width - 1)
            other = transforms.take(x, rows, columns)
        mask = transforms.erase(torch.zeros_like(x), boxes, (1.0, 1.0, 1.0))
        x = x + mask * m * (other - x)
    return x.clamp(0, 1)


def cil_images(x: torch.Tensor, settings: dict, generator: torch.Generator) -> torch.Tensor:
    """Clean and two AugMix versions (3 B, 3, H, W), normalised, of augmented visible uint8 images.

    Paper silent: CIL's code erases in place, so its clean image is erased too; cil_clean=raw keeps it whole.
    """
    erased = (soft_erasing(x.float() / 255, generator) * 255 + 0.5).to(torch.uint8)
    clean = erased if settings["cil_clean"] == "erased" else x
    versions = [groups.augmix(erased, generator) for _ in range(2)]
    return transforms.normalize(torch.cat([clean, *versions]))


def batch_loss(args, model, visible, infrared, labels, generator) -> tuple[torch.Tensor, dict]:
    """CE on the logits + WRT on the pooled features; for CIL also 12 JS of three versions, infrared three times."""
    views = [move(x, generator) for x in (visible, infrared)]
    if args.stage == "agw":
        pooled, logits = model(*(transforms.normalize(x) for x in views))
        clean = pooled, logits
    else:
        infra = transforms.normalize(views[1]).repeat(3, 1, 1, 1)
        pooled, logits = model(cil_images(views[0], args.settings, generator), infra)
        pooled, logits = (torch.cat(x.unflatten(0, (2, 3, -1)).unbind(0), 1) for x in (pooled, logits))  # (3, 2 B, ...)
        clean = pooled[0], logits[0]
    both = labels.repeat(2)
    ce, wrt = F.cross_entropy(clean[1].float(), both), losses.weighted_triplet(clean[0], both)
    parts = {"ce": ce.detach(), "wrt": wrt.detach()}
    if args.stage == "agw":
        return ce + wrt, parts
    js = losses.consistency(logits)
    return ce + wrt + args.settings["cil_weight"] * js, {**parts, "js": js.detach()}


def move(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pad 10, crop, flip, uint8."""
    return transforms.draw_geometry(x.shape, generator).apply(x)


def train_one_epoch(args, run, model, optimizer, grad_scaler, data: Data, epoch: int) -> dict:
    """AGW's epoch: floor(max(Nv, Nt) / 32) + 1 batches of 8 ids x (4 visible + 4 infrared); returns mean losses.

    With several processes each draws its share of the ids from its own seed.
    """
    num_ids = args.batch_size // (2 * INSTANCES) // run.world_size
    if num_ids < 1:
        raise ValueError(f"a batch of {args.batch_size} holds too few identities for {run.world_size} processes")
    most = max(len(data.parts["train_rgb"]), len(data.parts["train_ir"]))
    steps = min(most // (args.batch_size // 2) + 1, args.iters or most)
    rng, generator = np.random.default_rng([args.seed, epoch + 1, run.rank]), runtime.generator(run, epoch)
    visible, infrared, chosen = cross_batches(data.labels["train_rgb"], data.labels["train_ir"], num_ids, steps, rng)
    streams = [
        images.batches(data.stores[name], index, run.device, workers=args.workers)
        for name, index in (("train_rgb", visible), ("train_ir", infrared))
    ]
    model.train()
    totals, began = {}, time.time()
    bar = tqdm(zip(*streams), total=steps, desc=f"epoch {epoch + 1}", leave=False, disable=None if run.main else True)
    for i, ((rgb, _), (ir, _)) in enumerate(bar):
        labels = torch.from_numpy(chosen[i]).to(run.device, non_blocking=True)
        with run.autocast():
            loss, parts = batch_loss(args, model, rgb, ir, labels, generator)
        runtime.step(run, loss, [optimizer], grad_scaler, f"epoch {epoch + 1}, step {i + 1}")
        for name, value in {"loss": loss.detach(), **parts}.items():
            totals[name] = totals.get(name, 0) + value
    processes.sync_buffers(run, runtime.bare(model))
    means = {name: float(value) / steps for name, value in totals.items()}
    rate = steps * args.batch_size / (time.time() - began)
    text = ", ".join(f"{k} {v:.3f}" for k, v in means.items())
    runtime.say(run, f"epoch {epoch + 1}: {text}; {rate:.1f} images/s")
    return means


# ----------------------------------------------------------------------------------------------------------- evaluation
def features(run, network, store, modality: str) -> dict[str, torch.Tensor]:
    """Unit pool and bn features (N, D) of a store, on the CPU."""
    both = inputs.extract(run, agw.Extractor(network, modality), store, batch_size=64).cpu()
    return dict(zip(FEATURES, both.chunk(2, 1)))


def summary(results: list[evaluation.RankMetrics], prefix: str) -> dict[str, float]:
    """Means over trials, and the deviations of rank-1 and mAP."""
    out = {
        f"{prefix}{name}": float(np.mean([m.rank(k) for m in results]))
        for name, k in (("rank1", 1), ("rank10", 10), ("rank20", 20))
    }
    out |= {
        f"{prefix}mAP": float(np.mean([m.mAP for m in results])),
        f"{prefix}mINP": float(np.mean([m.mINP for m in results])),
    }
    if len(results) > 1:
        out |= {
            f"{prefix}std_rank1": float(np.std([m.rank(1) for m in results])),
            f"{prefix}std_mAP": float(np.std([m.mAP for m in results])),
        }
    return out


def columns(samples: list, index=None) -> tuple[np.ndarray, np.ndarray]:
    index = range(len(samples)) if index is None else index
    return np.array([samples[i].pid for i in index]), np.array([samples[i].camid for i in index])


def corrupted(store, repetition: int, chosen: Namespace, index=None) -> CorruptedStore:
    """The -C copy of visible test images; its seed is fixed, so that all models see the same images."""
    return CorruptedStore(store, repetition, 0, chosen.types, chosen.severity, index)


def evaluate_sysu(run, network, data: Data, clean: bool, chosen: Namespace | None) -> dict[str, float]:
    """All and indoor search, single-shot, ten trials; on -C (`chosen`) repetition r pairs trial r with seed r."""
    query, gallery = data.parts["ir"], data.parts["rgb"]
    pids, camids = columns(query)
    q, metrics = features(run, network, data.stores["ir"], "ir"), {}
    g = features(run, network, data.stores["rgb"], "rgb") if clean else None
    draws = {mode: [sysu.gallery_trial(gallery, mode, trial) for trial in range(TRIALS)] for mode in sysu.MODES}
    noisy = []
    for repetition in range(chosen.draws if chosen else 0):  # only drawn images are corrupted and described
        index = np.unique(np.concatenate([draws[mode][repetition % TRIALS] for mode in sysu.MODES]))
        store = corrupted(data.stores["rgb"], repetition, chosen, index)
        noisy.append((index, features(run, network, store, "rgb")))
    for kind in FEATURES:
        for mode, trials in draws.items():
            if clean:
                found = [
                    sysu.metrics(q[kind], g[kind][t], pids, columns(gallery, t)[0], camids, columns(gallery, t)[1])
                    for t in trials
                ]
                metrics |= summary(found, f"{kind}.{mode}.")
            found = []
            for repetition, (index, feats) in enumerate(noisy):
                t = trials[repetition % TRIALS]
                rows = feats[kind][np.searchsorted(index, t)]
                found.append(sysu.metrics(q[kind], rows, pids, columns(gallery, t)[0], camids, columns(gallery, t)[1]))
            metrics |= summary(found, f"{kind}.{mode}_c.") if found else {}
    return metrics


def evaluate_regdb(run, network, data: Data, clean: bool, chosen: Namespace | None) -> dict[str, float]:
    """Visible to thermal and back; on -C the visible images are corrupted, query of the one and gallery of the other.

    Split s is paired with corruption seed s; further draws follow with s + 10, s + 20, ...
    """
    thermal, metrics = features(run, network, data.stores["ir"], "ir"), {}
    pids = {name: columns(data.parts[name])[0] for name in ("rgb", "ir")}
    copies = [("", features(run, network, data.stores["rgb"], "rgb"))] if clean else []
    for draw in range(chosen.draws if chosen else 0):
        store = corrupted(data.stores["rgb"], data.split + 10 * draw, chosen)
        copies.append(("_c", features(run, network, store, "rgb")))
    for kind in FEATURES:
        for ending in ("", "_c"):
            visible = [feats[kind] for end, feats in copies if end == ending]
            if visible:
                there = [regdb.metrics(x, thermal[kind], pids["rgb"], pids["ir"]) for x in visible]
                back = [regdb.metrics(thermal[kind], x, pids["ir"], pids["rgb"]) for x in visible]
                metrics |= summary(there, f"{kind}.v2t{ending}.") | summary(back, f"{kind}.t2v{ending}.")
    return metrics


def choose(types: tuple = corruptions.BENCH20, severity: int = 0, draws: int = 10) -> Namespace:
    """What -C means: corruption types, severity (0: uniform 1..5), repetitions."""
    return Namespace(types=tuple(types), severity=severity, draws=draws)


def evaluate(run, network, data: Data, stage: str, clean: bool = True, chosen: Namespace | None = None) -> dict:
    """All metrics of a network: pool.* and bn.*, and without a prefix the feature of the published numbers.

    AGW's published clean numbers are of the bn feature; CIL's, and all -C numbers, of the pool feature.
    """
    protocol = evaluate_sysu if data.data.name == "sysu" else evaluate_regdb
    metrics = protocol(run, network, data, clean, chosen)
    for name in [n for n in metrics if n.startswith("pool.")]:
        part = name[len("pool.") :]
        kind = "bn" if stage == "agw" and "_c." not in part else "pool"
        metrics[part] = metrics[f"{kind}.{part}"]
    return metrics


def show(run, metrics: dict) -> None:
    for name in sorted(
        n[: -len(".rank1")] for n in metrics if n.endswith(".rank1") and n.split(".")[0] not in FEATURES
    ):
        m = {k: 100 * metrics[f"{name}.{k}"] for k in ("rank1", "mAP", "mINP")}
        runtime.say(run, f"{name:<10} rank-1 {m['rank1']:5.1f}   mAP {m['mAP']:5.1f}   mINP {m['mINP']:5.1f}")


def run_stage(args, run) -> None:
    """The whole of stage agw or cil: data, fine-tuning, clean and corrupted evaluation, result file."""
    data = Data(args, run)
    runtime.open_log(run, inputs.data_name(data.data))
    data.open(args, run)
    network = agw.TwoStream(data.num_classes, args.backbone, args.settings["nl_inter"])
    state = trunk.load(args.weights, args.backbone, args.logs_dir, args.synthetic)
    if state is not None:
        network.load_trunk(state)
    network = network.to(run.device, memory_format=torch.channels_last)
    runtime.say(
        run,
        f"{sum(p.numel() for p in network.parameters()):,} parameters, {data.num_classes} identities, "
        f"trunk from {args.weights}" + (f", split {data.split}" if data.split else ""),
    )
    optimizer = torch.optim.SGD(
        agw.parameter_groups(network, args.lr), momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    span = args.epochs / 81  # AGW's 81 epochs, stretched to --epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: agw.schedule(int(epoch / span)))
    model, grad_scaler = processes.parallel(run, network), runtime.scaler(run)
    first, best = runtime.resume(run, model, optimizer, scheduler, grad_scaler), args.settings["select"] == "best_test"
    for epoch in range(first, args.epochs):
        runtime.seed_epoch(run, epoch)
        stats = train_one_epoch(args, run, model, optimizer, grad_scaler, data, epoch)
        scheduler.step()
        if best:
            stats |= keep_best(args, run, network, data)
        runtime.save(run, epoch + 1, model, optimizer, scheduler, grad_scaler, stats)
    if best:
        network.load_state_dict(run.extra["best"]["state"])
    metrics = evaluate(run, network, data, args.stage, True, choose(draws=args.settings["draws"]))
    show(run, metrics)
    protocol = {
        "dataset": inputs.data_name(data.data),
        "trials": TRIALS,
        "split": data.split,
        "features": "bn (clean AGW), pool (else)",
        "corruptions": "20 types, severity 1..5, visible images only",
        "corruption_draws": args.settings["draws"],
        "re_ranking": False,
    }
    path = runtime.record(
        run,
        metrics,
        inputs.describe(data.data),
        protocol,
        epoch=args.epochs,
        selection="best_on_test" if best else "last",
    )
    runtime.say(run, f"result in {path}")


def keep_best(args, run, network, data: Data) -> dict:
    """Remember the network with the best clean rank-1 on the test set, as AGW's code does; labelled in the result."""
    metrics = evaluate(run, network, data, args.stage)
    value = metrics["all.rank1" if args.dataset == "sysu" else "v2t.rank1"]
    if value > run.extra.get("best", {}).get("rank1", -1.0):
        run.extra["best"] = {"rank1": value, "state": {k: v.cpu().clone() for k, v in network.state_dict().items()}}
    return {"test_rank1": value}
