"""Stages `gan` (PN-GAN on Market-1501) and `generate` (every image in the four canonical poses, to disk)."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common import checkpoints, images, inputs, log_folder, processes, runfiles, runtime, transforms, visualize
from common.epoch import Epoch
from dapg.poses import pngan, pose

FIXED_PAIRS = 64  # on which the L1 is measured before and after


def pairs(pids: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 2) indices of ordered pairs of different images of the same identity, uniform over all such pairs."""
    order = np.argsort(pids, kind="stable")
    _, starts, sizes = np.unique(pids[order], return_index=True, return_counts=True)
    ways = sizes * (sizes - 1.0)
    if ways.sum() == 0:
        raise ValueError("PN-GAN needs pairs: no identity has two images with a pose; use --variant gan_pairs=self")
    ids = rng.choice(len(sizes), count, p=ways / ways.sum())
    first = (rng.random(count) * sizes[ids]).astype(np.int64)
    second = (first + 1 + (rng.random(count) * (sizes[ids] - 1)).astype(np.int64)) % sizes[ids]
    return order[np.stack([starts[ids] + first, starts[ids] + second], 1)]


def spoiled(x: Tensor, generator: torch.Generator) -> Tensor:
    """Flipped, cropped and erased copies in [-1, 1]: the sources of --variant gan_pairs=self."""
    x = transforms.draw_geometry(x.shape, generator).apply(x + 1) - 1
    return transforms.erase(x, transforms.draw_erasing(len(x), *x.shape[2:], generator), (0.0, 0.0, 0.0))


class Data:
    """Training images with poses: store, pids, poses; which images train, and on which the L1 is measured.

    Those are the same, as in PN-GAN, unless --variant gan_held_out keeps a share of the identities from training.
    """

    def __init__(self, args, run, data):
        poses = pose.load(data.root, [s.path for s in data.train], data.kind, args.settings["detector"], run.device)
        kept = [s for s in data.train if Path(s.path).name in poses]
        if not kept:
            raise ValueError(f"no training image of {data.root} has a pose with {pose.ENOUGH} joints")
        processes.say(run, f"{len(kept)} of {len(data.train)} training images have a pose")
        self.store = inputs.open_images(run, kept, args.height, args.width, f"{data.name} gan")
        self.pids = np.array([s.pid for s in kept])
        self.poses = np.stack([poses[Path(s.path).name] for s in kept])
        ids, share = np.unique(self.pids), args.settings["gan_held_out"]
        held = np.isin(self.pids, ids[: max(1, round(share * len(ids))) if share else 0])
        self.training = np.flatnonzero(~held)
        self.measured = np.flatnonzero(held) if share else self.training
        self.metric = "held_out_l1" if share else "fixed_l1"

    def batch(self, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Source, the target's pose as a picture, target, in [-1, 1] on the device, for pairs (B, 2)."""
        source, target = (self.store.gather(column) for column in index.T)
        drawn = images.to_device(pose.pictures(self.poses[index[:, 1]], *source.shape[2:]), source.device)
        return tuple(pngan.to_tanh(x) for x in (source, drawn, target))

    def fixed(self, count: int, seed: int) -> np.ndarray:
        """The same pairs (count, 2) at every call."""
        return self.measured[pairs(self.pids[self.measured], count, np.random.default_rng(seed))]


def build(args, run) -> pngan.PNGAN:
    return pngan.PNGAN(args.settings["ngf"], args.settings["blocks"]).to(run.device)


@torch.no_grad()
def fixed_l1(args, gan, data: Data) -> float:
    """Mean L1 of the generator on fixed pairs, in [-1, 1] units."""
    index, total = data.fixed(FIXED_PAIRS, 0), 0.0
    for part in np.array_split(index, max(1, len(index) // args.batch_size)):
        source, drawn, target = data.batch(part)
        total += float((gan.generator(source, drawn) - target).abs().mean()) * len(part)
    return total / len(index)


def steps_per_epoch(args, data: Data) -> int:
    count = len(data.training)
    if args.settings["gan_pairs"] == "identity":
        sizes = np.unique(data.pids[data.training], return_counts=True)[1].astype(np.int64)
        count = min(int((sizes * (sizes - 1)).sum()), args.settings["pairs_per_epoch"])
    return min(max(1, count // args.batch_size), args.iters or count)


def train_one_epoch(args, run, gan, optimizers, decay, grad_scaler, data: Data, number: int) -> dict[str, float]:
    """One G step, then one D step a batch; returns mean losses."""
    steps, itself = steps_per_epoch(args, data), args.settings["gan_pairs"] == "self"
    rng, generator = np.random.default_rng([args.seed, number + 1]), runtime.generator(run, number)
    if itself:
        index = data.training[rng.integers(0, len(data.training), (steps * args.batch_size, 1))].repeat(2, 1)
    else:
        index = data.training[pairs(data.pids[data.training], steps * args.batch_size, rng)]
    epoch = Epoch(run, number, np.split(index, steps), steps)
    for part in epoch:
        source, drawn, target = data.batch(part)
        source = spoiled(source, generator) if itself else source
        with run.autocast():
            fake = gan.generator(source, drawn)
            loss_g, l1 = pngan.generator_loss(gan, fake, target)
        runtime.step(run, loss_g, optimizers.parts[:1], grad_scaler, epoch.where)
        with run.autocast():
            loss_d = pngan.discriminator_loss(gan, fake, source)
        runtime.step(run, loss_d, optimizers.parts[1:], grad_scaler, epoch.where)
        decay.step()
        epoch.add(len(part), loss_g=loss_g, loss_d=loss_d, l1=l1)
    return epoch.means(gan)


def run_gan(args, run) -> None:
    """The whole of stage gan: data, training, generator with canonical poses, picture, result file."""
    market = inputs.dataset(run, args.dataset)
    log_folder.open_log(run, inputs.data_name(market))
    data, gan = Data(args, run, market), build(args, run)
    optimizers, grad_scaler = pngan.Optimizers(gan, args.lr), runtime.scaler(run)
    decay = pngan.Decay(optimizers, args.lr, args.epochs * steps_per_epoch(args, data))
    first = log_folder.resume(run, gan, optimizers, decay, grad_scaler)
    if "before" not in run.extra:
        run.extra["before"] = fixed_l1(args, gan, data)
    for number in range(first, args.epochs):
        runtime.seed_epoch(run, number)
        run.extra["last"] = train_one_epoch(args, run, gan, optimizers, decay, grad_scaler, data, number)
        log_folder.save(run, number + 1, gan, optimizers, decay, grad_scaler, run.extra["last"])
    save_generator(args, run, gan, data)
    draw_grid(gan, data, run.log_dir / "pairs.png")
    before, after = run.extra["before"], fixed_l1(args, gan, data)
    metrics = {data.metric: after, f"before.{data.metric}": before, **run.extra["last"]}
    protocol = {
        "dataset": inputs.data_name(market),
        "pairs": args.settings["gan_pairs"],
        "held_out_ids": args.settings["gan_held_out"],
    }
    path = runtime.record(run, metrics, inputs.describe(market), protocol, epoch=args.epochs)
    processes.say(
        run,
        f"L1 of {FIXED_PAIRS} fixed pairs {before:.3f} -> {after:.3f}; generator in "
        f"{run.log_dir / 'generator.pt'}; result in {path}",
    )


def save_generator(args, run, gan, data: Data) -> None:
    """generator.pt with the canonical poses and what rebuilds the network; the poses also as canonical_poses.json."""
    canon = pose.canonical(dict(enumerate(data.poses)))
    settings = {k: args.settings[k] for k in ("ngf", "blocks")} | {"height": args.height, "width": args.width}
    state = {"state_dict": gan.generator.state_dict(), "poses": canon.tolist(), "settings": settings}
    runfiles.replace(run.log_dir / "generator.pt", lambda file: torch.save(state, file))
    pose.write(run.log_dir / "canonical_poses.json", {f"pose{i}": p for i, p in enumerate(canon)})


@torch.no_grad()
def draw_grid(gan, data: Data, path: Path) -> Path:
    """Rows of source, pose, target, generated image."""
    source, drawn, target = data.batch(data.fixed(6, 1))
    columns = [
        pngan.to_pixels(x).permute(0, 2, 3, 1).cpu().numpy()
        for x in (source, drawn, target, gan.generator(source, drawn))
    ]
    return visualize.grid(path, list(zip(*columns)), column_titles=["source", "pose", "target", "generated"])


# ------------------------------------------------------------------------------------------------------------- generate
def load_generator(args) -> tuple[pngan.Generator, np.ndarray, str, dict]:
    """Generator, canonical poses (4, 18, 3), a digest of the checkpoint, and its settings."""
    source = args.source
    path = Path(
        runfiles.of_row("dapg", source[4:], "generator.pt", args.logs_dir, args.synthetic)
        if source.startswith("row:")
        else source
    )
    state = checkpoints.load(path, "generator", "run --stage gan first, or give row:NAME of a finished one")
    if not isinstance(state, dict) or not {"state_dict", "poses", "settings"} <= state.keys():
        raise ValueError(f"{path} is no generator.pt of --stage gan")
    settings = state["settings"]
    network = pngan.Generator(settings["ngf"], settings["blocks"])
    checkpoints.fit(network, state["state_dict"], path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return network.eval(), np.array(state["poses"], np.float32), digest, settings


def run_generate(args, run) -> None:
    """Stage generate: <log folder>/generated/<digest>/<stem>_p<0-3>.jpg for every image; finished ones are kept.

    The images of --variant market_split=all include the gallery's. Ranks share the work.
    """
    market = inputs.dataset(run, args.dataset)
    log_folder.open_log(run, inputs.data_name(market))
    network, poses, digest, settings = load_generator(args)
    more = market.gallery if args.settings["market_split"] == "all" else []
    samples = market.train + [s for s in more if s.pid >= 0]
    log_folder.claim(run)
    folder = run.log_dir / "generated" / digest
    folder.mkdir(parents=True, exist_ok=True)
    height, width = settings["height"], settings["width"]
    store = inputs.open_images(run, samples, height, width, f"{market.name} {args.settings['market_split']}")
    network = network.to(run.device)
    drawn = pngan.to_tanh(pose.pictures(poses, height, width).to(run.device))
    todo = [i for i, s in enumerate(samples) if not all(name.is_file() for name in outputs(folder, s.path))]
    blocks = [todo[i : i + args.batch_size] for i in range(0, len(todo), args.batch_size)][run.rank :: run.world_size]
    for part in tqdm(blocks, desc="generate", disable=None if run.main else True):
        source = pngan.to_tanh(store.gather(np.array(part)))
        for p in range(pose.POSES):
            with torch.inference_mode(), run.autocast():
                fake = pngan.to_pixels(network(source, drawn[p : p + 1].expand_as(source)))
            for i, image in zip(part, fake.permute(0, 2, 3, 1).cpu().numpy()):
                picture = Image.fromarray(image)
                file = outputs(folder, samples[i].path)[p]
                runfiles.replace(file, lambda stream: picture.save(stream, "JPEG", quality=95))
    processes.barrier(run)
    if run.main:
        text = json.dumps({"folder": f"generated/{digest}", "images": len(samples), "poses": pose.POSES})
        runfiles.replace(run.log_dir / "generated.json", lambda file: file.write(text.encode()))
    path = runtime.record(
        run,
        {"files": len(samples) * pose.POSES},
        inputs.describe(market),
        {"dataset": inputs.data_name(market), "generator": digest},
    )
    processes.say(run, f"{len(samples)} images in {pose.POSES} poses in {folder}; result in {path}")


def outputs(folder: Path, path: str) -> list[Path]:
    """The four generated files of an image."""
    return [folder / f"{Path(path).stem}_p{i}.jpg" for i in range(pose.POSES)]


def generated_files(args, paths: list[str]) -> list[str]:
    """The generated files of --source, four an image in the order of paths.

    Raises: FileNotFoundError for a missing folder, ValueError counting images without their four files.
    """
    source = args.source
    if source.startswith("row:"):
        note = runfiles.of_row("dapg", source[4:], "generated.json", args.logs_dir, args.synthetic)
        folder = note.parent / json.loads(note.read_text())["folder"]
    else:
        folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} of generated poses; run --stage generate first, or give --source")
    files = [outputs(folder, path) for path in paths]
    missing = [four for four in files if not all(file.is_file() for file in four)]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(paths)} images have no four generated poses, first "
            f"{missing[0][0].name}; run --stage generate again"
        )
    return [str(file) for four in files for file in four]
