"""Size and cost of AFF (paper Table 8): parameters, FLOPs, activation memory of one image; no weights, no data, no GPU.

    python aff_scl/complexity.py                        # Table 8; the paper: 26.70 M, 9.17 G, 186.26 MB
    python aff_scl/complexity.py --height 256 --width 128 --json
    python aff_scl/complexity.py --row table8/ours      # the numbers of Table 8 into a result file

Two conventions side by side. `params flops memory_mb` follow torchstat, with which Table 8 was made: leaf modules
only, the last call of a module counts, batch axis dropped, and

    FLOPs      Conv2d multiply-adds (+ 1 per output with a bias), Linear in x out, BatchNorm2d 2 x numel, ReLU numel,
               MaxPool2d and AvgPool2d input numel; the rest (adaptive pools, sigmoid, BatchNorm1d, functions) 0
    memory_mb  outputs of leaf modules x 4 bytes / 2^20: activations, not weights; a ReLU used three times counts once
    params     parameters of the leaf modules that were called

`exact_*` is what happens: all parameters; multiply-adds of every convolution and matrix product, each call counted;
and the bytes of every tensor that one forward pass in evaluation mode allocates, in MB of 2^20 bytes.

Deviation: the paper prints no input size. 384x192, the default of APNet, is where its three numbers come out; the
accuracy tables use 256x128, and the row of that size is the honest one. Its competitors were measured each at the
default size of their own code (MGN 384x128, MHN 336x168), so the rows of Table 8 do not compare with each other.
"""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from aff_scl.flags import complexity_args

if __name__ == "__main__":
    arguments = complexity_args()  # torch is loaded below

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from aff_scl.model import AFF
from common import log_folder, processes, runtime

CITED = (("MHN-6 (PCB), cited", 30.36, 24.55, 186.18), ("MGN, cited", 74.38, 11.94, 179.55))  # Table 8, M, G, MB
PAPER = (26.70, 9.17, 186.26)
MIB = 2**20


class Complexity(NamedTuple):
    """Counts of one image; units: numbers, multiply-adds and the like, 2^20 bytes."""

    name: str
    params: int
    flops: int
    memory_mb: float
    exact_params: int
    exact_flops: int
    exact_memory_mb: float
    height: int
    width: int


class AllocatedBytes(TorchDispatchMode):
    """While active, adds up the bytes of all tensors that operations return, views and in-place results apart."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        outputs = operation(*args, **(kwargs or {}))
        for declared, output in zip(operation._schema.returns, outputs if isinstance(outputs, tuple) else (outputs,)):
            if isinstance(output, torch.Tensor) and declared.alias_info is None:
                self.total += output.numel() * output.element_size()
        return outputs


def torchstat_flops(module, x, y):
    """torchstat's count for one call of a leaf module, x (1, ...) to y (1, ...)."""
    if isinstance(module, nn.Conv2d):
        return y.numel() * (module.weight[0].numel() + (module.bias is not None))
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    if isinstance(module, nn.BatchNorm2d):
        return 2 * x.numel()
    if isinstance(module, nn.ReLU):
        return x.numel()
    if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
        return x.numel()
    return 0


def measure(name, build, height, width):
    """Complexity of the network that build() returns, for one image; all on the meta device, without any memory."""
    with torch.device("meta"):
        model, image = build().eval(), torch.empty(1, 3, height, width)
    calls = {}  # leaf module -> (FLOPs, output numel), of its last call

    def note(module, inputs, output):
        calls[module] = (torchstat_flops(module, inputs[0], output), output.numel())

    hooks = [module.register_forward_hook(note) for module in model.modules() if not list(module.children())]
    allocated, multiply_adds = AllocatedBytes(), FlopCounterMode(display=False)
    with torch.no_grad(), allocated, multiply_adds:
        model(image)
    for hook in hooks:
        hook.remove()
    return Complexity(
        name=name,
        params=sum(weight.numel() for module in calls for weight in module.parameters()),
        flops=sum(flops for flops, _ in calls.values()),
        memory_mb=sum(numel for _, numel in calls.values()) * 4 / MIB,
        exact_params=sum(weight.numel() for weight in model.parameters()),
        exact_flops=multiply_adds.get_total_flops() // 2,  # the counter's unit is two per multiply-add
        exact_memory_mb=allocated.total / MIB,
        height=height,
        width=width,
    )


def table(args):
    """Our rows: the network asked for at the size asked for and at that of the accuracy tables, its parts, a check."""
    options = dict(backbone=args.backbone, cam=args.cam, cam_reduction=args.cam_reduction, gate=args.gate,
                   casam_reduction=args.casam_reduction, post=args.post, swap=args.swap)  # fmt: skip

    def network(name, arch, height, width):
        return measure(name, lambda: AFF(arch, **options), height, width)

    rows = [network("ours", args.arch, args.height, args.width)]
    if (args.height, args.width) != (256, 128):
        rows.append(network("ours, accuracy tables' size", args.arch, 256, 128))
    rows += [network(f"arch {arch}", arch, args.height, args.width) for arch in ("base", "g", "l") if arch != args.arch]
    rows.append(measure("torchvision ResNet-50 (check)", models.resnet50, 224, 224))
    return rows


def show(rows):
    """Print the rows with the paper's three, in its units."""
    print("Table 8. Params in M, FLOPs in G, memory in MB (2^20 bytes); torchstat's rules | counted in full")
    print(f"{'':<32}{'input':>8} | {'params':>7} {'FLOPs':>7} {'memory':>8} | {'params':>7} {'MACs':>7} {'memory':>8}")
    for name, params, flops, memory in (*CITED, ("Ours, paper", *PAPER)):
        print(f"{name:<32}{'':>8} | {params:7.2f} {flops:7.2f} {memory:8.2f} |")
    for row in rows:
        size = f"{row.height}x{row.width}"
        print(f"{row.name:<32}{size:>8} | {row.params / 1e6:7.2f} {row.flops / 1e9:7.2f} {row.memory_mb:8.2f} | "
              f"{row.exact_params / 1e6:7.2f} {row.exact_flops / 1e9:7.2f} {row.exact_memory_mb:8.2f}")  # fmt: skip


def save(args, row):
    """The first row as the result file of args.row; no data set is involved, so its fields are empty."""
    run = runtime.start(args, "aff_scl")
    log_folder.open_log(run, "no-data")
    data = {"name": "no-data", "kind": "real", "images": 0, "ids": 0, "cams": 0, "digest": ""}
    metrics = {name: value for name, value in row._asdict().items() if name not in ("name", "height", "width")}
    protocol = {"counting": "torchstat's rules; exact_* in full", "height": row.height, "width": row.width}
    processes.say(run, f"result: {runtime.record(run, metrics, data, protocol)}")


def main(args):
    rows = table(args)
    if os.environ.get("RANK", "0") == "0":  # of several processes one prints
        print(json.dumps([row._asdict() for row in rows], indent=1)) if args.json else show(rows)
    asked = any(word.split("=")[0] == "--row" for word in sys.argv[1:])  # a plain call prints and writes nothing
    if asked and not args.json:
        save(args, rows[0])


if __name__ == "__main__":
    runtime.execute(main, arguments)
