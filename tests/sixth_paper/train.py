"""The smallest sixth paper: a ResNet-18 with cross-entropy and batch-hard triplet loss. A folder like this one, beside
the other projects, is all it takes; a real one has flags.py, model.py, losses.py, test.py and tables.yaml too.

    python tests/sixth_paper/train.py --dataset market --synthetic small --weights none --height 64 --width 32
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the one allowed path line: repository root first

import torch
import torch.nn.functional as F
from torchvision.models import resnet18

from common import batchnorm, datasets, flags, images, inputs, log_folder, processes, runtime, samplers, transforms
from common.epoch import Epoch
from common.losses import batch_hard_triplet


class Network(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.trunk, self.classifier = resnet18(), torch.nn.Linear(512, num_classes, bias=False)
        self.trunk.fc = torch.nn.Identity()

    def forward(self, x):
        feats = self.trunk(x)  # (B, 512)
        return (feats, self.classifier(feats)) if self.training else F.normalize(feats)


def parse_args(argv=None):
    parser = ArgumentParser(prog="tests/sixth_paper/train.py", allow_abbrev=False)
    parser.add_argument("-d", "--dataset", default="market")
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3.5e-4)
    flags.add_run_flags(parser)
    return flags.parse(parser, "tests/sixth_paper", argv)


def train_one_epoch(run, args, model, optimizer, scaler, store, labels, augment, number):
    batches = samplers.identity_epoch(
        labels.numpy(), args.batch_size // 4, 4, seed=args.seed, epoch=number, rank=run.rank, world_size=run.world_size
    )
    epoch = Epoch(run, number, images.batches(store, batches, run.device, workers=args.workers), len(batches))
    generator = runtime.generator(run, number)
    model.train()
    for pixels, indices in epoch:
        x, y = augment(pixels, generator), labels[indices].to(run.device)
        with run.autocast():
            feats, logits = model(x)
        identity = F.cross_entropy(logits.float(), y)
        triplet = batch_hard_triplet(processes.gather_rows(feats.float()), processes.gather(run, y))
        runtime.step(run, identity + triplet, [optimizer], scaler, epoch.where)
        epoch.add(len(x), loss=identity + triplet)
    return epoch.means(model)


def main(args):
    run = runtime.start(args, "sixth_paper")
    data = inputs.dataset(run, args.dataset)
    log_folder.open_log(run, inputs.data_name(data))
    size = args.height, args.width
    store = inputs.open_images(run, data.train, *size, name=f"{data.name} train")
    test_store = inputs.open_images(run, data.query + data.gallery, *size, name=f"{data.name} test")
    labels = torch.from_numpy(datasets.labels(data.train))
    bare = batchnorm.over_groups(Network(int(labels.max()) + 1), run.world_size).to(run.device)
    model, scaler = processes.parallel(run, bare), runtime.scaler(run)
    optimizer = torch.optim.Adam(bare.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for number in range(log_folder.resume(run, model, optimizer, scheduler, scaler), args.epochs):
        runtime.seed_epoch(run, number)
        augment = transforms.Augment()
        stats = train_one_epoch(run, args, model, optimizer, scaler, store, labels, augment, number)
        scheduler.step()
        log_folder.save(run, number + 1, model, optimizer, scheduler, scaler, stats)
    m = inputs.rank_metrics(data, inputs.extract(run, bare, test_store))
    path = runtime.record(run, {"mAP": m.mAP, "rank1": m.rank(1)}, inputs.describe(data), inputs.MARKET_PROTOCOL)
    processes.say(run, f"mAP {100 * m.mAP:.1f}, rank-1 {100 * m.rank(1):.1f}; result in {path}")


if __name__ == "__main__":
    arguments = parse_args()
    runtime.execute(main, arguments)
