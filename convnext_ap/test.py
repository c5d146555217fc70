"""Evaluate a trained network of convnext_ap: metrics with both descriptors, CMC curve, rank lists.

    python convnext_ap/test.py --checkpoint logs/convnext_ap/market/table4/market/ap/seed0     # a folder or a file
    python convnext_ap/test.py --checkpoint CHECKPOINT -d duke --data-dir /data                # another data set
    python convnext_ap/test.py --checkpoint CHECKPOINT --export-features feats                 # features.npy, .jsonl
    python convnext_ap/test.py --weights CHECKPOINT --query DIR --gallery DIR --out DIR        # your own images

A folder's pcb.pt is the network before refined part pooling. The paper's figures: convnext_ap/figures.py.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from common import flags
from convnext_ap.flags import test_args as parse_args

if __name__ == "__main__":
    arguments = flags.answer(parse_args)  # torch is loaded below

import numpy as np
import torch

from common import checkpoints, inputs, own_images, processes, runtime, visualize
from convnext_ap import schedule
from convnext_ap.metrics import trapezoid_map
from convnext_ap.model import ConvNeXtAP, Embedding, check_variant
from convnext_ap.train import build_model, features, load_data, make_plan

FORM = "descriptor H, image and mirror image"


def load_network(path: str) -> tuple[ConvNeXtAP, dict, Path]:
    """The network of a checkpoint file or log folder in its stage, the flags it was trained with, and the file.

    Raises: FileNotFoundError, ValueError as checkpoints.read and checkpoints.fit, or for another project's file.
    """
    file, state = checkpoints.read_newest(path)
    trained = Namespace(**state["args"])
    if not hasattr(trained, "simam"):
        check_variant(file, state["args"], "", 0)
    weights = checkpoints.strip_prefixes(state["state_dict"])
    model = build_model(trained, weights["heads.classify"].shape[2] if "heads.classify" in weights else 1)
    checkpoints.fit(model, weights, file)
    model.set_stage(schedule.stage_of(max(0, state["epoch"] - 1), make_plan(trained)))
    return model.eval(), state["args"], file


def of_test(args: Namespace, trained: dict) -> Namespace:
    """What to measure on, as the flags say, or the training where they are silent."""
    settings = flags.of_test(args, trained, "split")
    if args.split is None and args.dataset not in (None, trained["dataset"]):  # another data set: its usual boxes
        settings.split = "detected" if args.dataset == "cuhk03" else None
    return settings


def open_test(settings: Namespace) -> tuple:
    """Run, data set and store of query + gallery of what `of_test` says."""
    run = runtime.start(settings, "convnext_ap")
    data, size = load_data(run, settings), (settings.height, settings.width)
    return run, data, inputs.open_images(run, data.query + data.gallery, *size, name=f"{data.name} test")


def check_unseen(run, data, trained: dict) -> str:
    """What a number on `data` must say of the network's training; ValueError if it saw people of the test."""
    here, there = ({"split": split} if split else {} for split in (run.args["split"], trained["split"]))
    if inputs.trained_on(run, data, trained, here, there) and here != there:
        return f" ({run.args['split']} boxes, trained with {trained['split']} ones)"
    return ""


def main(args):
    model, trained, file = load_network(args.checkpoint)
    wanted = {"simam": trained["simam"], "parts": trained["parts"]}
    wanted.update({key: getattr(args, key) for key in wanted if getattr(args, key) is not None})
    check_variant(file, trained, wanted["simam"], wanted["parts"])
    if own_images.wanted(args):
        embedding = Embedding(model)
        after = lambda raw: embedding.descriptors(raw)["H"]
        descriptor = own_images.Descriptor(embedding, FORM, flip=True, after=after)
        return own_images.run(
            args, descriptor, own_images.origin("convnext_ap", model, trained), Path(args.out or file.parent)
        )
    run, data, store = open_test(of_test(args, trained))
    remark = check_unseen(run, data, trained)
    model = model.to(run.device, memory_format=torch.channels_last)
    feats = features(run, model, store)
    found = {name: inputs.rank_metrics(data, x) for name, x in feats.items()}
    name = f"{model.name} ({file.name}, {model.stage}) on {inputs.data_name(data)}{remark}"
    for descriptor, metrics in found.items():
        processes.say(run, f"{name}, descriptor {descriptor} ({feats[descriptor].shape[1]}): {metrics}")
    processes.say(run, f"{name}, descriptor H: trapezoidal mAP {100 * trapezoid_map(feats['H'], data):.1f}")
    if args.re_rank:
        processes.say(run, f"{name}, after re-ranking: {inputs.re_ranked(data, feats['H'])}")
    if not run.main:
        return
    out = Path(args.out or file.parent)
    out.mkdir(parents=True, exist_ok=True)
    if args.export_features:
        own_images.export_data(
            args.export_features, feats["H"], data, own_images.origin("convnext_ap", model, trained), FORM
        )
    m = found["H"]
    print("CMC curve:", visualize.cmc_curve(out / "cmc.png", {model.name: m.cmc}, mAP={model.name: m.mAP}))
    if args.rank_list:
        shown = np.random.default_rng(0).permutation(len(data.query))[: args.rank_list]
        print("rank list:", visualize.data_rank_list(out / "rank_list.png", data, feats["H"], shown))


if __name__ == "__main__":
    runtime.execute(main, arguments)
