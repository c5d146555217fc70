"""Parameters and FLOPs of the four variants (paper Tables 2-4); no weights, no data, no GPU.

    python convnext_ap/complexity.py                    # the paper: 10.04 G, 88.00 M and 10.04 G, 90.74 M
    python convnext_ap/complexity.py --json             # a list of {"name", "params", "flops", "exact_params", ...}
    python convnext_ap/complexity.py --row cost/ap      # one variant into a result file

Two conventions side by side, for one image. `params flops` follow thop, with which the paper's numbers come out to
the digit: weights and operations of convolutions, linear layers, BatchNorm and nn.LayerNorm, and of no other module:

    params     without the layer scales of the blocks and the four channels-first norms of stem and downsampling
    flops      multiply-adds, biases left out; norms 4 per output element; a mean 1 per input element and 1 per output

`exact_*` is what there is: `exact_params` all parameters; `exact_macs` multiply-adds of every convolution and matrix
product; `exact_flops` those, and one for every element that any other operation writes or a reduction reads, so that
SimAM, which thop does not see, is in it.

Deviation: thop counts the 6 x 1 pooling of stripes; ours counts the part classifier W that replaces it. Both print
as 10.04. The counts fix ConvNeXt-B, 256x128 and 751 classes; Duke (702) and CUHK03 (767) would give other digits.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from convnext_ap.flags import complexity_args

if __name__ == "__main__":
    arguments = complexity_args()  # torch is loaded below

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from common import log_folder, runtime
from convnext_ap.model import WIDTH, ConvNeXtAP, Heads
from convnext_ap.settings import TRUNKS, name_of

PAPER = {
    "ConvNeXt": (88.00, 10.04),
    "ConvNeXt-A": (88.00, 10.04),
    "ConvNeXt-P": (90.74, 10.04),
    "ConvNeXt-AP": (90.74, 10.04),
}  # params in M, FLOPs in G
MOVES = {
    "view",
    "_unsafe_view",
    "permute",
    "transpose",
    "t",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
    "expand",
    "clone",
    "copy_",
    "_to_copy",
    "cat",
    "split",
    "unbind",
}  # no arithmetic
PRODUCTS = {"convolution", "mm", "addmm", "bmm", "baddbmm"}


class Complexity(NamedTuple):
    """Counts of one image; `flops` of either convention adds multiply-adds and plain operations, each as one."""

    name: str
    params: int
    flops: int
    exact_params: int
    exact_flops: int
    exact_macs: int


class OtherOperations(TorchDispatchMode):
    """While active, adds up the elements that operations other than products and copies write, or reductions read."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        name = operation._schema.name.partition("::")[2]
        if name not in MOVES | PRODUCTS:
            read = [a for a in args if isinstance(a, torch.Tensor)]
            written = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, torch.Tensor)]
            self.total += max([t.numel() for t in [*read, *written]], default=0)
        return out


def thop_flops(module: nn.Module, x: torch.Tensor, y) -> int:
    """thop's count for one call of a module, x (1, ...) to y (1, ...)."""
    if isinstance(module, nn.Conv2d):
        return y.numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return y.numel() * module.in_features
    if type(module) is nn.LayerNorm:  # not LayerNorm2d, which thop does not know
        return 4 * y.numel()
    if isinstance(module, Heads):
        n, channels, _ = module.reduce.shape
        return n * (channels * WIDTH + WIDTH * module.classify.shape[2] + 4 * WIDTH)
    return 0


def thop_params(module: nn.Module) -> int:
    """The weights that thop counts of one module, without those inside it."""
    if isinstance(module, Heads):
        return sum(weight.numel() for weight in module.parameters())
    counted = isinstance(module, (nn.Conv2d, nn.Linear)) or type(module) is nn.LayerNorm
    return sum(weight.numel() for weight in module.parameters()) if counted else 0


def measure(height: int, width: int, num_classes: int, trunk: str, attention: str, parts: int) -> Complexity:
    """Complexity of a variant, counted on the meta device, without any memory; with parts, under refined pooling."""
    with torch.device("meta"):
        model, image = ConvNeXtAP(num_classes, trunk, attention, parts).eval(), torch.empty(1, 3, height, width)
    model.set_stage("joint" if parts else "pcb")
    calls = []
    hooks = [
        module.register_forward_hook(lambda m, inputs, out: calls.append(thop_flops(m, inputs[0], out)))
        for module in model.modules()
    ]
    other, multiply_adds = OtherOperations(), FlopCounterMode(display=False)
    with torch.no_grad(), other, multiply_adds:
        model.encode(image)
    for hook in hooks:
        hook.remove()
    channels = TRUNKS[trunk].channels[-1]
    pool = channels * ((height // 32) * (width // 32) + 1)  # the global mean: every input once, one division each
    macs = multiply_adds.get_total_flops() // 2  # the counter's unit is two per multiply-add
    return Complexity(
        name_of(attention, parts),
        sum(map(thop_params, model.modules())),
        sum(calls) + pool,
        sum(weight.numel() for weight in model.parameters()),
        macs + other.total,
        macs,
    )


def table(args) -> list[Complexity]:
    """The four variants in the order of Table 4; `--simam mlp` and `--parts 4` change those that have them."""
    attention, parts = (args.simam if args.simam != "none" else "dw"), args.parts or 6
    four = [("none", 0), (attention, 0), ("none", parts), (attention, parts)]
    return [measure(args.height, args.width, args.classes, args.trunk, *variant) for variant in four]


def show(rows: list[Complexity], args) -> None:
    print(f"{args.height}x{args.width}, {args.classes} classes, trunk {args.trunk}; params in M, FLOPs in G")
    print(f"{'':<12} | {'paper':>13} | {'its convention':>14} | {'exact params':>12} {'FLOPs':>8} {'MACs':>8}")
    for row in rows:
        paper = "{:6.2f} {:6.2f}".format(*PAPER[row.name])
        print(
            f"{row.name:<12} | {paper} | {row.params / 1e6:7.2f} {row.flops / 1e9:6.2f} | "
            f"{row.exact_params / 1e6:12.4f} {row.exact_flops / 1e9:8.4f} {row.exact_macs / 1e9:8.4f}"
        )


def save(args, row: Complexity) -> None:
    """The variant asked for as the result file of args.row; no data set is involved, so its fields are empty."""
    run = runtime.start(args, "convnext_ap")
    log_folder.open_log(run, "no-data")
    data = {"name": "no-data", "kind": "real", "images": 0, "ids": 0, "cams": 0, "digest": ""}
    metrics = {name: value for name, value in row._asdict().items() if name != "name"}
    protocol = {"counting": "thop's rules; exact_* in full", "height": args.height, "width": args.width}
    print(f"result: {runtime.record(run, metrics, data, protocol)}")


def main(args):
    rows = table(args)
    if args.json:
        print(json.dumps([row._asdict() for row in rows], indent=1))
        return
    show(rows, args)
    if any(word.split("=")[0] == "--row" for word in sys.argv[1:]):  # a plain call prints and writes nothing
        save(args, next(row for row in rows if row.name == name_of(args.simam, args.parts)))


if __name__ == "__main__":
    runtime.execute(main, arguments)
