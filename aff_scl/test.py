"""Evaluate a trained AFF_SCL network and draw its rank lists, CMC curve and Grad-CAM heat maps (Figure 1).

python aff_scl/test.py --checkpoint logs/aff_scl/market/table2/market/seed0            # a folder (its newest) or a file
python aff_scl/test.py --checkpoint CHECKPOINT -d duke --data-dir /data                # another data set
python aff_scl/test.py --checkpoint CHECKPOINT --heat-maps 4 --against BASE_CHECKPOINT # Figure 1: ResNet-50 beside AFF
python aff_scl/test.py --weights CHECKPOINT --query DIR --gallery DIR --out DIR          # your own images: ranking.csv
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from aff_scl.flags import test_args as parse_args
from aff_scl.flags import variants
from common import flags

if __name__ == "__main__":
    arguments = flags.answer(parse_args)  # torch is loaded below

import numpy as np
import torch

from aff_scl.model import AFF, convert_dsbn
from aff_scl.train import build_model
from common import checkpoints, inputs, own_images, processes, runtime, transforms, visualize

FORM = "feature behind the neck"


def load_network(path: str) -> tuple[AFF, dict, Path]:
    """The network of a checkpoint file or log folder, the flags it was trained with, and the file.

    Raises: FileNotFoundError, ValueError as checkpoints.read and checkpoints.fit.
    """
    file, state = checkpoints.read_newest(path)
    trained = Namespace(**state["args"])
    if not hasattr(trained, "arch"):
        raise ValueError(f"{file} is no checkpoint of aff_scl (it was trained with other flags)")
    weights = checkpoints.strip_prefixes(state["state_dict"])
    model = build_model(trained, len(weights.get("classifier.weight", ())))
    if trained.mode == "uda" and variants(trained)["dsbn"] == "on":
        convert_dsbn(model)
    checkpoints.fit(model, weights, file)
    return model.eval(), state["args"], file


class PooledLength(torch.nn.Module):
    """Squared length (B,) of a network's pooled feature before BNNeck: the score that Grad-CAM differentiates.

    Deviation: Figure 1 does not say which score was taken, and an unsupervised network has no class scores.
    """

    def __init__(self, network: AFF):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network.encode(x).pooled.square().sum(1)


def network_maps(model: AFF, batch: torch.Tensor) -> torch.Tensor:
    """Grad-CAM maps (B, h, w) in [0, 1] of the output of the network's last branch for images (B, 3, H, W)."""
    layer = model.post or model.local_branch or model.global_branch or model.backbone
    return visualize.grad_cam(PooledLength(model).eval(), layer, batch, lambda score: score)


def main(args):
    model, trained, file = load_network(args.checkpoint)
    if own_images.wanted(args):
        origin = own_images.origin("aff_scl", model, trained)
        return own_images.run(args, own_images.Descriptor(model, FORM), origin, Path(args.out or file.parent))
    run = runtime.start(flags.of_test(args, trained), "aff_scl")
    data = inputs.dataset(run, run.args["dataset"])
    remark = check_unseen(run, data, trained)
    store = inputs.open_images(
        run, data.query + data.gallery, trained["height"], trained["width"], name=f"{data.name} test"
    )
    model = model.to(run.device, memory_format=torch.channels_last)
    feats = inputs.extract(run, model, store, batch_size=args.batch_size)
    metrics = inputs.rank_metrics(data, feats)
    out, name = Path(args.out or file.parent), f"{file.name} on {inputs.data_name(data)}{remark}"
    processes.say(run, f"{name}: {metrics}")
    if args.re_rank:
        processes.say(run, f"{name}, after re-ranking: {inputs.re_ranked(data, feats)}")
    if not run.main:
        return
    out.mkdir(parents=True, exist_ok=True)
    if args.export_features:
        own_images.export_data(args.export_features, feats, data, own_images.origin("aff_scl", model, trained), FORM)
    print("CMC curve:", visualize.cmc_curve(out / "cmc.png", {file.stem: metrics.cmc}, mAP={file.stem: metrics.mAP}))
    shown = np.random.default_rng(0).permutation(len(data.query))
    if args.rank_list:
        sheet, title = out / "rank_list.png", "query and its ten nearest images"
        print("rank list:", visualize.data_rank_list(sheet, data, feats, shown[: args.rank_list], title=title))
    if args.heat_maps:
        sheet, chosen = out / "heat_maps.png", shown[: args.heat_maps]
        print("heat maps:", draw_heat_maps(sheet, run, model, args.against, store, chosen))


def check_unseen(run, data, trained: dict) -> str:
    """What a number of this network on `data` must say of its training; ValueError if it saw people of the test."""
    inputs.trained_on(run, data, trained)
    rendered = {"synthetic": trained["source_synthetic"]} if trained["source_synthetic"] else {}
    source = {**trained, "dataset": trained["source"], "data_name": "", **rendered}
    if trained["source"] and inputs.trained_on(run, data, source):
        return ", whose labels were the source of the training"
    return ""


def draw_heat_maps(path, run, model, against, store, shown):
    """Rows of: image, the other network's map, this network's map (Figure 1); returns the path."""
    pixels = store.gather(torch.as_tensor(np.ascontiguousarray(shown))).to(run.device)
    networks = {
        "image": None,
        **({"other": load_network(against)[0].to(run.device)} if against else {}),
        "this network": model,
    }
    columns = []
    for network in networks.values():
        maps = network_maps(network, transforms.normalize(pixels)) if network is not None else None
        pictures = [image.permute(1, 2, 0).cpu().numpy() for image in pixels]
        columns.append(
            pictures if maps is None else [visualize.heat_map(p, m.cpu().numpy()) for p, m in zip(pictures, maps)]
        )
    return visualize.grid(path, list(zip(*columns)), column_titles=list(networks), title="Grad-CAM")


if __name__ == "__main__":
    runtime.execute(main, arguments)
