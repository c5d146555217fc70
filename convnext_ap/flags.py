"""The flags of convnext_ap/train.py. Defaults are the paper's; where the paper gives none, help says so."""

from argparse import ArgumentParser, Namespace

from common import flags
from convnext_ap.settings import POSITIONS, TRUNKS, check_size

FIGURES = ("lr", "erasing", "compare", "ranks", "heat", "cmc", "parts")
VARIANTS = {  # the rare switches of the decisions in README.md: name -> allowed values or a number, default first
    "part_reduce": ("sum", "mean"),
    "circle_on": ("global", "concat"),
    "circle_mode": ("pool", "anchor"),
    "m": 0.25,
    "gamma": 32.0,
    "optimizer": ("sgd", "adamw"),
    "trunk_lr": 0.1,
    "later_lr": 0.1,
    "clip": 5.0,
    "erase": 0.5,
    "drop_path": 0.2,
    "dropout": 0.5,
    "head_relu": ("off", "on"),
    "final_norm": ("off", "on"),
}


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(
        prog="convnext_ap/train.py", description="Train ConvNeXt-AP; defaults are the paper's.", allow_abbrev=False
    )
    add = parser.add_argument_group("data").add_argument
    add("-d", "--dataset", type=flags.market_rule, default="market", help="market, duke, cuhk03, msmt17")
    add("--split", choices=["detected", "labeled"], help="boxes of cuhk03 (default: detected; silent)")
    flags.add_size(add)
    add = parser.add_argument_group("method").add_argument
    add("--trunk", choices=list(TRUNKS), default="base", help="ConvNeXt-B, or a small one for CPUs")
    add("--simam", choices=POSITIONS, default="dw", help="where SimAM stands in a block, or none")
    add("--parts", type=int, default=6, help="stripes p of PCB + RPP, sec. 3.3.2; 0: global head only")
    add("--loss", choices=["id", "id+circle", "id+triplet"], default="id+circle", help="sec. 3.4")
    flags.add_variant(add, VARIANTS)
    add = parser.add_argument_group("optimiser").add_argument
    flags.add_batch(add, 64, 4, "; paper silent", "; paper silent")
    add("--epochs", type=int, default=120, help="with stripes (sec. 5.1)")
    add("--rpp-epochs", type=int, default=5, help="then with W alone, --parts > 0; paper silent")
    add("--joint-epochs", type=int, default=10, help="then with everything; paper silent")
    add("--warmup", type=int, default=5, help="epochs of rising learning rate (sec. 5.1, Figure 2)")
    add("--iters", type=int, help="steps an epoch (default: training images / batch size)")
    add("--lr", type=float, default=0.1, help="lr_max of the heads; the trunk has a tenth of it")
    add("--weight-decay", type=float, default=5e-4, help="paper silent")
    flags.add_run_flags(parser)
    parser.set_defaults(weights=None)  # imagenet where there are such weights
    return flags.parse(parser, "convnext_ap", argv, complete)


def complete(args: Namespace) -> Namespace:
    """Fill in defaults that depend on other flags; raises ValueError for flags that do not fit together."""
    variants(args)
    check_size(args.height, args.width, args.simam, args.parts)
    if args.weights is None:
        args.weights = "imagenet" if args.trunk == "base" else "none"
    if args.weights == "imagenet" and args.trunk != "base":
        raise ValueError(f"there are no ImageNet weights for --trunk {args.trunk}; leave --weights out, or give a file")
    if args.dataset == "cuhk03":
        args.split = args.split or "detected"
    elif args.split:
        raise ValueError(f"--split is about the boxes of cuhk03, and the data set is {args.dataset}")
    if args.parts < 0 or args.epochs < 1 or min(args.rpp_epochs, args.joint_epochs, args.warmup) < 0:
        raise ValueError("--parts and the epochs must not be negative, and --epochs at least 1")
    if args.iters is not None and args.iters < 1:
        raise ValueError("--iters must be at least 1, or nothing would be trained")
    if args.loss != "id" and args.num_instances < 2:
        raise ValueError(
            f"--loss {args.loss} compares images of one person, and --num-instances {args.num_instances} "
            f"leaves no positive pair in a batch; use 2 or more, or --loss id"
        )
    if args.batch_size % args.num_instances or args.batch_size < 2 * args.num_instances:
        near = max(2, args.batch_size // args.num_instances) * args.num_instances
        raise ValueError(
            f"--batch-size {args.batch_size} is no multiple of --num-instances {args.num_instances} with"
            f" at least two identities; nearest: {near}"
        )
    return args


def variants(args: Namespace) -> dict:
    """--variant as a dictionary with defaults; raises ValueError for unknown keys and values."""
    return flags.variants(args.variant, VARIANTS)


def complexity_args(argv: list[str] | None = None) -> Namespace:
    """The flags of convnext_ap/complexity.py."""
    parser = ArgumentParser(
        prog="convnext_ap/complexity.py",
        allow_abbrev=False,
        description="Parameters and FLOPs of the four variants, Tables 2-4.",
    )
    add = parser.add_argument_group("network").add_argument
    add("--trunk", choices=list(TRUNKS), default="base")
    add("--simam", choices=POSITIONS, default="dw")
    add("--parts", type=int, default=6)
    add("--classes", type=int, default=751, help="training identities; 751 is Market-1501")
    flags.add_size(add)
    add("--json", action="store_true", help="print the unrounded counts of all four as JSON")
    flags.add_run_flags(parser)
    return flags.parse(parser, "convnext_ap", argv, fits)


def fits(args: Namespace) -> Namespace:
    check_size(args.height, args.width, args.simam, args.parts)
    return args


def add_data_flags(parser: ArgumentParser) -> None:
    """Which data to look at; what is not given comes from the checkpoint."""
    parser.add_argument("-d", "--dataset", type=flags.market_rule, help="market, duke, cuhk03, msmt17")
    parser.add_argument("--split", choices=["detected", "labeled"], help="boxes of cuhk03")


def test_args(argv: list[str] | None = None) -> Namespace:
    """The flags of convnext_ap/test.py."""
    parser = flags.test_parser(
        "convnext_ap/test.py", "Evaluate a checkpoint; data and size default to those it was trained with."
    )
    add_data_flags(parser)
    add = parser.add_argument
    add("--simam", help="refuse a checkpoint whose SimAM stands elsewhere (none, dw, mlp, branch)")
    add("--parts", type=int, help="refuse a checkpoint with another number of parts")
    add("--re-rank", action="store_true", help="k-reciprocal re-ranking (not used in the paper)")
    add("--rank-list", type=int, default=6, metavar="N", help="draw the first matches of N queries")
    add("--out", help="folder for the pictures (default: beside the checkpoint)")
    return flags.parse_test(parser, argv)


def figures_args(argv: list[str] | None = None) -> Namespace:
    """The flags of convnext_ap/figures.py."""
    parser = ArgumentParser(prog="convnext_ap/figures.py", allow_abbrev=False, description="Draw the paper's figures.")
    add = parser.add_argument
    add("figure", choices=FIGURES, help="what to draw")
    add("--checkpoint", nargs="+", default=[], help="checkpoint files or log folders")
    add("--out", default="logs/convnext_ap/figures", help="folder for the pictures")
    add("-n", type=int, default=4, help="number of images or queries")
    add("--epochs", type=int, nargs="+", default=[50, 120], help="lr: lengths of training")
    flags.add_size(add, note=", of erasing")
    add("--seed", type=flags.seed, default=0, help="which images or queries")
    add_data_flags(parser)
    flags.add_test_flags(parser)
    args = flags.parse_test(parser, argv)
    if args.figure in ("ranks", "heat", "cmc", "parts") and not args.checkpoint:
        parser.error(f"{args.figure} needs --checkpoint")
    return args


PARSERS = {"train.py": parse_args, "test.py": test_args, "figures.py": figures_args, "complexity.py": complexity_args}
