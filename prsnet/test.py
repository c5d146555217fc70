"""Measure a fine-tuned network under the three protocols and draw Figures 5, 6 and 7.

python prsnet/test.py --checkpoint logs/prsnet/market/table3/market/seed0                    # a folder or a file
python prsnet/test.py --checkpoint CHECKPOINT --protocol image -d duke --data-dir /data      # another data set
python prsnet/test.py --checkpoint best.pt --viz recon --images FOLDER                       # Figure 5, of pre-training
python prsnet/test.py --checkpoint CHECKPOINT --viz heat --images FOLDER                     # Figure 6
python prsnet/test.py --checkpoint CHECKPOINT --viz rank                                     # Figure 7
python prsnet/test.py --weights CHECKPOINT --query DIR --gallery DIR --out DIR               # your own images
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from common import flags
from prsnet.flags import test_args as parse_args

if __name__ == "__main__":
    arguments = flags.answer(parse_args)  # torch is loaded below

import numpy as np
import torch
import torch.nn.functional as F

from common import checkpoints, images, inputs, log_folder, own_images, processes, runtime, transforms, visualize
from prsnet import masking, pretrain, protocols, train

FORM = "unit length"  # of protocol image


def load_network(path: str) -> tuple[torch.nn.Module, dict, Path]:
    """The network of a checkpoint, the flags it was trained with, and the file: an autoencoder or a ReID network.

    Raises: FileNotFoundError, ValueError as checkpoints.read and checkpoints.fit.
    """
    file, state = checkpoints.read_newest(path)
    trained, weights = Namespace(**state["args"]), checkpoints.strip_prefixes(state["state_dict"])
    if not hasattr(trained, "mask_block"):
        raise ValueError(f"{file} is no checkpoint of prsnet (it was trained with other flags)")
    if hasattr(trained, "mask_loss"):
        model = pretrain.build_model(trained)
    else:
        model = train.build_model(trained, len(weights["classifier.weight"]))
    checkpoints.fit(model, weights, file)
    return model.eval(), state["args"], file


def main(args):
    model, trained, file = load_network(args.checkpoint)
    if own_images.wanted(args):
        if "mask_loss" in trained:
            raise ValueError(f"{file} is a pre-training checkpoint; ranking and export need one of prsnet/train.py")
        descriptor = own_images.Descriptor(model, FORM, after=F.normalize)
        origin = own_images.origin("prsnet", model, trained, "bilinear")
        return own_images.run(args, descriptor, origin, Path(args.out or file.parent))
    run = runtime.start(flags.of_test(args, {"dataset": "market", **trained, "logs_dir": "logs"}), "prsnet")
    model = model.to(run.device, memory_format=torch.channels_last)
    size, pretrained = (trained["height"], trained["width"]), "mask_loss" in trained
    if pretrained and args.viz not in ("recon", "heat"):
        raise ValueError(
            f"{file} is a pre-training checkpoint: it draws (--viz recon, --viz heat); "
            "retrieval needs one of prsnet/train.py"
        )
    if not pretrained and args.viz == "recon":
        raise ValueError(f"{file} has no decoder any more; --viz recon needs best.pt of prsnet/pretrain.py")
    out = Path(args.out or file.parent / f"{args.viz}.png")
    if args.viz in ("recon", "heat"):
        pixels = pictures(run, args, size)
        draw = draw_reconstructions if args.viz == "recon" else draw_heat_maps
        processes.say(run, draw(out, run, model, pixels, trained, args.seed))
        return
    data = inputs.dataset(run, run.args["dataset"])
    inputs.trained_on(run, data, trained)
    store = inputs.open_images(
        run, data.query + data.gallery, *size, name=f"{data.name} test", interpolation="bilinear"
    )
    feats = inputs.extract(run, model, store, batch_size=args.batch_size)
    if args.export_features and run.main:
        origin = own_images.origin("prsnet", log_folder.bare(model), trained, "bilinear")
        own_images.export_data(args.export_features, F.normalize(feats), data, origin, FORM)
    if args.viz == "rank":
        processes.say(run, draw_rank_list(out, data, feats, args.number, args.seed))
        return
    remark = protocols.seen(trained, inputs.data_name(data))
    for name, m in protocols.all_metrics(data, feats, args.protocol, args.centroid_distractors).items():
        processes.say(run, f"protocol {name}: {m}{remark}")


def pictures(run, args, size) -> torch.Tensor:
    """uint8 (N, 3, H, W) on the device: the first images of a folder by name, or random queries of the data set."""
    if args.images:
        paths = own_images.listed("--images", args.images)
    else:
        paths = [s.path for s in inputs.dataset(run, run.args["dataset"]).query]
        paths = [paths[i] for i in np.random.default_rng(args.seed).permutation(len(paths))]
    store = images.open_images(paths[: args.number], *size, cache="off")
    return store.gather(torch.arange(len(store))).to(run.device)


def masks(pixels, trained, seed) -> torch.Tensor:
    """The masks (N, gh, gw) that are fed and shown."""
    grid = masking.grid_of(trained["height"], trained["width"], trained["mask_block"])
    return masking.random_mask(
        len(pixels), grid, trained["mask_ratio"], torch.Generator(pixels.device).manual_seed(seed)
    )


def shown(x: torch.Tensor) -> list[torch.Tensor]:
    """Normalised images (N, 3, H, W) as pictures in [0, 1]."""
    return list(transforms.pictures(x).cpu())


@torch.no_grad()
def draw_reconstructions(path, run, model, pixels, trained, seed) -> str:
    """Figure 5: image, the masked image that is fed, the output, and the output with the visible blocks put back."""
    x, masked = transforms.normalize(pixels), masks(pixels, trained, seed)
    with run.autocast():
        rebuilt = model(x, masked)
    loss, mean = (masking.reconstruction_loss(x, y, masked).item() for y in (rebuilt, masking.mean_colour(x)))
    black = x.masked_fill(masking.to_pixels(masked, *x.shape[-2:]), -10)  # the figure's black, the network gets 0
    columns = [shown(x), shown(black), shown(rebuilt), shown(masking.paste_visible(x, rebuilt, masked))]
    file = visualize.grid(path, list(zip(*columns)), column_titles=["image", "fed", "rebuilt", "with visible"])
    return f"reconstructions: {file}; Eq. (1) on these images {loss:.3f}, the image's mean colour {mean:.3f}"


@torch.no_grad()
def draw_heat_maps(path, run, model, pixels, trained, seed) -> str:
    """Figure 6: the masked image and, over the image, the channel mean of |stage-4 map| of the masked image.

    Paper silent: how its heat maps were made.
    """
    if trained["model"] != "prsnet":
        raise ValueError("--viz heat draws the last feature map of the convolutional encoder; --model mae has none")
    x, masked = transforms.normalize(pixels), masks(pixels, trained, seed)
    maps = masking.enlarge(model.encoder.maps(x, masked).abs().mean(1), *x.shape[-2:]).cpu()
    fed = shown(masking.apply(x, masked))
    plain = [p.permute(1, 2, 0).cpu().numpy() for p in pixels]
    rows = [[a, b, visualize.heat_map(a, m)] for a, b, m in zip(plain, fed, maps)]
    return f"heat maps: {visualize.grid(path, rows, column_titles=['image', 'fed', 'heat'])}"


def draw_rank_list(path, data, feats, number, seed) -> str:
    """Figure 7: queries and their ten nearest valid gallery images, protocol image; up to three views of a person."""
    order = np.random.default_rng(seed).permutation(np.unique([s.pid for s in data.query]))
    chosen = [i for pid in order for i in [i for i, s in enumerate(data.query) if s.pid == pid][:3]][:number]
    title = "protocol image: query and its ten nearest images"
    file = visualize.data_rank_list(path, data, F.normalize(feats), chosen, title=title)
    return f"rank list: {file}"


if __name__ == "__main__":
    runtime.execute(main, arguments)
