"""Fold the training branches of an encoder into plain convolutions (sec. III-B), and measure what that brings.

    python prsnet/deploy.py --checkpoint best.pt --out folded.pt  # then: --block plain --weights folded.pt
    python prsnet/deploy.py                                      # random weights: equal outputs, latency
    python prsnet/deploy.py --row extra/fold                     # the same, written as a result file

A checkpoint of prsnet/pretrain.py or prsnet/train.py keeps its kind; only the encoder changes.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from prsnet.flags import deploy_args

if __name__ == "__main__":
    arguments = deploy_args()  # torch is loaded below

import torch

from common import checkpoints, log_folder, runfiles, runtime
from prsnet.model import SIZES, Encoder, fold
from prsnet.test import load_network


def random_encoder(size: str, seed: int = 0) -> Encoder:
    """An encoder in eval mode whose norms have seen statistics other than 0 and 1, and whose blocks act (gamma 0.1)."""
    torch.manual_seed(seed)
    encoder = Encoder("rep", SIZES[size])
    for name, tensor in encoder.state_dict().items():
        if "norms" in name and tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5) if "var" in name or "weight" in name else tensor.uniform_(-0.5, 0.5)
        elif name.endswith("gamma"):
            tensor.fill_(0.1)
    return encoder.eval()


@torch.inference_mode()
def compare(before: torch.nn.Module, after: torch.nn.Module, x: torch.Tensor, passes: int) -> dict:
    """Largest deviation of the outputs, the largest output, parameters, and median time of a pass, taken in turns."""
    a, b = before(x), after(x)
    times: dict[str, list[float]] = {"train": [], "folded": []}
    for _ in range(passes):
        for name, model in (("train", before), ("folded", after)):
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            model(x)
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    train_s, folded_s = (statistics.median(values) for values in times.values())
    count = [sum(p.numel() for p in model.parameters()) for model in (before, after)]
    return {
        "deviation": (a - b).abs().max().item(),
        "largest_output": a.abs().max().item(),
        "params": count[1],
        "train_params": count[0],
        "train_latency_ms": 1e3 * train_s,
        "latency_ms": 1e3 * folded_s,
        "speedup": train_s / folded_s,
    }


def main(args):
    run = runtime.start(args, "prsnet")
    if args.checkpoint:
        model, trained, file = load_network(args.checkpoint)
        encoder, size = model.encoder, (trained["height"], trained["width"])
    else:
        encoder, size = random_encoder(args.size, args.seed), (args.height, args.width)
    encoder = encoder.to(run.device, memory_format=torch.channels_last)
    folded = fold(encoder)
    x = torch.randn(args.batch_size, 3, *size, generator=torch.Generator().manual_seed(0)).to(
        run.device, memory_format=torch.channels_last
    )
    found = compare(encoder, folded, x, args.passes)
    print(
        f"folded: largest deviation {found['deviation']:.1e} of outputs up to {found['largest_output']:.2f}; "
        f"{found['train_params']} -> {found['params']} parameters; "
        f"{found['train_latency_ms']:.1f} -> {found['latency_ms']:.1f} ms "
        f"for {args.batch_size} images on {run.device.type}, {found['speedup']:.2f} times as fast"
    )
    if args.out:
        if not args.checkpoint:
            raise ValueError("--out needs --checkpoint: random weights are not worth keeping")
        state = checkpoints.read(file)
        weights = {
            k: v for k, v in checkpoints.strip_prefixes(state["state_dict"]).items() if not k.startswith("encoder.")
        }
        state["state_dict"] = {**{f"encoder.{k}": v.cpu() for k, v in folded.state_dict().items()}, **weights}
        state |= {"optimizer": {}, "scheduler": {}, "scaler": {}, "args": {**state["args"], "block": "plain"}}
        runfiles.replace(Path(args.out), lambda out: torch.save(state, out))
        print(f"written: {args.out}")
    if args.row == "extra/fold" and not args.checkpoint and any(word.split("=")[0] == "--row" for word in sys.argv[1:]):
        log_folder.open_log(run, "no-data")
        data = {"name": "no-data", "kind": "real", "images": 0, "ids": 0, "cams": 0, "digest": ""}
        print(f"result: {runtime.record(run, found, data, {'network': 'encoder in eval mode, random weights'})}")


if __name__ == "__main__":
    runtime.execute(main, arguments)
