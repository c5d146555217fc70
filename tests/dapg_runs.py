"""DAPG's stages on miniature trees, run inside the calling process: whole, or five steps with their losses."""

import contextlib
import copy
import functools
import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from conftest import write_market
from dapg_trees import write_luperson, write_poses, write_regdb, write_sysu
from PIL import Image

from common import inputs, log_folder, runtime
from common.epoch import Epoch
from dapg import test, train
from dapg.data import open_store
from dapg.downstream import stage as downstream
from dapg.downstream.data import Data
from dapg.flags import parse_args, variants
from dapg.poses import gan, pngan
from dapg.pretrain import stage as pretrain

SIZE = ["--backbone", "resnet18", "--height", "64", "--width", "32", "--workers", "0"]


def write_all(root: Path) -> Path:
    """A --data-dir with all four data sets, key points, and stand-ins of generated poses (`poses`) of Market-1501."""
    write_luperson(write_regdb(write_sysu(write_market(root, train_ids=8, test_ids=2))))
    write_poses(root / "market1501")
    (root / "poses").mkdir()
    for file in sorted((root / "market1501/bounding_box_train").glob("*.jpg")):
        with Image.open(file) as image:
            picture = np.asarray(image).astype(int)
        for pose in range(4):  # told apart by brightness and a roll
            moved = np.roll(picture + 20 * (pose - 2), 5 * pose, 0).clip(0, 255).astype(np.uint8)
            Image.fromarray(moved).save(root / "poses" / f"{file.stem}_p{pose}.jpg", quality=95)
    return root


@functools.cache
def data_dir() -> Path:
    """The miniature trees, written once a process."""
    data_dir.folder = tempfile.TemporaryDirectory()  # removed with this process
    return write_all(Path(data_dir.folder.name))


def flags_of(data: Path, out: Path, *flags) -> list[str]:
    places = ["--data-dir", data, "--logs-dir", out / "logs", "--results-dir", out / "res"]
    return [str(word) for word in (*places, *SIZE, *flags)]


def run_main(data: Path, out: Path, *flags) -> str:
    """`python dapg/train.py FLAGS` in this process: what it prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train.main(parse_args(flags_of(data, out, *flags)))
    return said.getvalue()


def run_test(data: Path, *words) -> str:
    """`python dapg/test.py WORDS` in this process: what it prints."""
    said, words = io.StringIO(), [str(word) for word in (*words, "--data-dir", data, "--workers", 0)]
    with contextlib.redirect_stdout(said), torch.inference_mode():
        test.main(test.parse_args(words))
    return said.getvalue()


def started(data: Path, *flags):
    """(args, run) of a script that has begun."""
    args = parse_args(flags_of(data, data / "out", *flags))
    run = runtime.start(args, "dapg")
    args.settings = variants(args)
    return args, run


def pretraining(data: Path, *flags):
    """(args, run, model, optimizer, scheduler, store, generated) of stage robust or align before its first step."""
    args, run = started(data, *flags)
    samples = inputs.dataset(run, args.dataset).train
    store = open_store(run, samples, args.height, args.width, args.stage)
    generated = pretrain.open_generated(args, run, samples) if args.stage == "align" else None
    return (args, run, *pretrain.build(args, run, len(samples)), store, generated)


def finetuning(data: Path, *flags):
    """(args, run, model, optimizer, data) of stage agw or cil before its first step."""
    args, run = started(data, *flags)
    opened = Data(args, run).open(args, run)
    model, optimizer, _ = downstream.build(args, run, opened)
    with torch.no_grad():  # the versions of an image are classified differently from the beginning
        log_folder.bare(model).classifier.weight *= 100
    return args, run, model, optimizer, opened


@contextlib.contextmanager
def recorded():
    """The losses of all steps that are taken inside, as a list that grows."""
    losses, add = [], Epoch.add

    def spy(self, images, **values):
        loss = values["loss"] if "loss" in values else values["loss_g"] + values["loss_d"]
        losses.append(float(loss.detach()))
        add(self, images, **values)

    Epoch.add = spy
    try:
        yield losses
    finally:
        Epoch.add = add


def pretraining_losses(*flags) -> tuple[list[float], dict, list[torch.Tensor]]:
    """The losses of the first epoch, the initial state, and the images (V, B, 3, H, W) of each step."""
    args, run, model, optimizer, scheduler, store, generated = pretraining(data_dir(), *flags)
    step, initial, seen = pretrain.make_step(args, run, 0, generated), copy.deepcopy(model.state_dict()), []
    monitor, make = pretrain.Monitor(run, 0), step.images
    step.images = lambda *batch: seen.append(make(*batch)) or seen[-1]
    runtime.seed_epoch(run, 0)
    with recorded() as losses:
        pretrain.train_one_epoch(args, run, step, model, optimizer, scheduler, runtime.scaler(run), store, monitor)
    return losses, initial, seen


def finetuning_losses(*flags) -> list[float]:
    args, run, model, optimizer, data = finetuning(data_dir(), *flags)
    runtime.seed_epoch(run, 0)
    with recorded() as losses:
        downstream.train_one_epoch(args, run, model, optimizer, runtime.scaler(run), data, 0)
    return losses


def gan_losses(*flags) -> list[float]:
    args, run = started(data_dir(), *flags)
    data, network = gan.Data(args, run, inputs.dataset(run, args.dataset)), gan.build(args, run)
    optimizers = pngan.Optimizers(network, args.lr)
    decay = pngan.Decay(optimizers, args.lr, args.epochs * gan.steps_per_epoch(args, data))
    with recorded() as losses:
        gan.train_one_epoch(args, run, network, optimizers, decay, runtime.scaler(run), data, 0)
    return losses
