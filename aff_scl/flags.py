"""The flags of aff_scl/train.py. Defaults are the paper's main setting; where the paper gives none, help says so."""

import math
from argparse import ArgumentParser, Namespace

from common import flags

VARIANTS = {  # rare switches of the decision table in README.md: allowed values, or a number; the default comes first
    "gate": ("sigmoid", "softmax"),
    "post": ("bn", "relu", "none"),
    "pool": ("avg", "gem"),
    "casam_reduction": 256,
    "cam_reduction": 16,
    "momentum": 0.1,
    "k2": 6,
    "min_samples": 4,
    "hard_ref": ("mean", "hard"),
    "hard_init": ("mean", "hardest"),
    "camera": ("on", "off"),
    "swap": ("off", "on"),  # CAM global and CASAM local, as the text at Table 7 has it
    "dsbn": ("on", "off"),
}
COUNTS = ("k2", "min_samples", "casam_reduction", "cam_reduction")  # variants that are at least 1
SUPERVISED = {"bn_groups": 1, "batch_size": 64, "num_instances": 4, "epochs": 120}  # Table 7
UNSUPERVISED = {"bn_groups": 2, "batch_size": 128, "num_instances": 8, "epochs": 60}  # sec. 4.2


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(
        prog="aff_scl/train.py", description="Train AFF_SCL; defaults are the paper's main setting.", allow_abbrev=False
    )
    add = parser.add_argument_group("data").add_argument
    add(
        "-d",
        "--dataset",
        type=flags.market_rule,
        default="market",
        help="the unlabelled target: market, duke, msmt17, cuhk03",
    )
    add("--source", type=flags.market_rule, help="labelled source data set of --mode uda")
    add("--source-synthetic", choices=flags.SYNTHETIC, help="rendered people as the source of a real target")
    flags.add_size(add)
    add = parser.add_argument_group("method").add_argument
    flags.choice(add, "--mode", "usl uda sup", "Table 2; Table 3; supervised, Table 7")
    add("--arch", choices=["base", "g", "l", "aff"], default="aff", help="ResNet; + global; + local branch; both")
    add("--backbone", choices=flags.BACKBONES, default="resnet50", help="torchvision's; resnet18 for small machines")
    flags.choice(add, "--cam", "split se", "split attention (fits Table 8), or Eqs. (5)-(6)")
    flags.choice(add, "--neck", "bn none", "BNNeck after pooling")
    flags.choice(add, "--loss", "scl mean hard ce_tri", "Table 4: total; one term; baseline")
    add("--lambda1", type=float, default=0.75, help="weight of the hard-sample loss, Eq. (8)")
    add("--lambda2", type=float, default=0.25, help="weight of the mean-feature loss, Eq. (8)")
    flags.choice(add, "--lb", "logits logits_pos memory none", "balance loss, Eq. (14)")
    add("--tau", type=float, default=0.05, help="temperature, Eqs. (7)-(11); paper silent")
    add("--eps", type=float, help="DBSCAN radius in (0, 1) (default: 0.70 for duke, else 0.65; Figure 4)")
    add("--k1", type=int, default=30, help="neighbours of the Jaccard distance, sec. 4.2")
    add("--bn-groups", type=int, help="parts of a batch with BN statistics of their own (default: 2 GPUs; sup: 1)")
    flags.add_variant(add, VARIANTS)
    add = parser.add_argument_group("optimiser").add_argument
    flags.add_batch(add, None, None, " (default: 128; sup: 64)", " (default: 8; sup: 4)")
    add("--epochs", type=int, help="default: 60; sup: 120")
    add("--iters", type=int, help="steps an epoch (default: 400, batch 256: 200; sup: one pass); paper silent")
    add("--lr", type=float, default=3.5e-4, help="Adam; x 0.1 at 1/3 and 2/3 of the epochs; sup: warm-up, 1/3, 7/12")
    add("--weight-decay", type=float, default=5e-4, help="L2, on all parameters")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-period", type=int, help="epochs between evaluations, also after the last (default: a sixth of all)")
    flags.add_run_flags(parser)
    return flags.parse(parser, "aff_scl", argv, complete)


def complete(args: Namespace) -> Namespace:
    """Fill in the defaults that depend on the mode; raises ValueError for flags that do not fit together."""
    for name, value in (SUPERVISED if args.mode == "sup" else UNSUPERVISED).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.eps is None:
        args.eps = 0.70 if args.dataset == "duke" else 0.65
    if args.iters is None and args.mode != "sup":
        args.iters = 200 if args.batch_size >= 256 else 400
    if args.eval_period is None:
        args.eval_period = max(1, args.epochs // 6)
    args.swap = variants(args)["swap"] == "on"
    check_numbers(args)
    check_mode(args)
    check_batch(args)
    return args


def variants(args: Namespace) -> dict:
    """--variant as a dictionary with defaults; raises ValueError for unknown keys and values."""
    return flags.variants(args.variant, VARIANTS)


def check_numbers(args: Namespace) -> None:
    """Raises ValueError, one sentence, for a number outside its range."""
    v = variants(args)
    ranges = {
        "--tau": (args.tau, "finite and above 0", args.tau > 0),
        "--eps": (args.eps, "between 0 and 1, the ends excluded (Jaccard distances)", 0 < args.eps < 1),
        "--lr": (args.lr, "finite and above 0", args.lr > 0),
        "--weight-decay": (args.weight_decay, "finite and at least 0", args.weight_decay >= 0),
        "--lambda1": (args.lambda1, "finite and at least 0", args.lambda1 >= 0),
        "--lambda2": (args.lambda2, "finite and at least 0", args.lambda2 >= 0),
        "--variant momentum": (v["momentum"], "between 0 and 1", 0 <= v["momentum"] <= 1),
    }
    counts = {"--k1": args.k1, "--eval-period": args.eval_period, **{f"--variant {name}": v[name] for name in COUNTS}}
    ranges |= {name: (value, "at least 1", value >= 1) for name, value in counts.items()}
    for name in ("height", "width"):
        value = getattr(args, name)
        ranges[f"--{name}"] = (value, "at least 16, the network's stride", value >= 16)
    for name, (value, expected, fits) in ranges.items():
        if not fits or not math.isfinite(value):
            raise ValueError(f"{name} {value:g} is out of range; it must be {expected}")


def check_mode(args: Namespace) -> None:
    """Raises ValueError, one sentence, for flags that do not fit together."""
    if (args.mode == "uda") != bool(args.source):
        raise ValueError("--mode uda needs --source NAME, and only it takes one")
    if args.source_synthetic and (args.synthetic or not args.source):
        raise ValueError("--source-synthetic is for --mode uda with a real target, so without --synthetic")
    if args.source == args.dataset and not args.source_synthetic:
        raise ValueError(
            f"--source {args.source} is the target itself, whose labels must stay unknown; name another data set, or "
            "train with labels by --mode sup"
        )
    if args.loss != "scl" and args.mode == "sup":
        raise ValueError("--loss names a loss without labels (Table 4); --mode sup always takes that of Table 7")
    if args.loss == "ce_tri" and args.mode != "usl":
        raise ValueError("--loss ce_tri is the baseline of Table 4 and goes with --mode usl")
    if args.neck == "none" and args.mode != "sup":
        raise ValueError("--neck none is a row of Table 7 and goes with --mode sup")
    v = variants(args)
    if v["pool"] == "gem" and v["post"] == "bn" and args.arch in ("aff", "l"):
        raise ValueError(
            f"--variant pool=gem needs a map without negative values, and post=bn of --arch {args.arch} centres it; "
            "add post=relu or post=none"
        )


def check_batch(args: Namespace) -> None:
    """Raises ValueError, one sentence, for a batch that is not P x K or does not divide into --bn-groups."""
    if args.epochs < 1 or (args.iters is not None and args.iters < 1):
        raise ValueError("--epochs and --iters must be at least 1, or nothing would be trained")
    if args.batch_size < 1 or args.num_instances < 2 or args.batch_size % args.num_instances:
        near = max(1, args.batch_size // max(2, args.num_instances)) * max(2, args.num_instances)
        raise ValueError(
            f"--batch-size {args.batch_size} is no multiple of --num-instances {args.num_instances} >= 2; "
            f"nearest: {near}"
        )
    ids = args.batch_size // args.num_instances
    if ids < 2 or args.bn_groups < 1 or ids % args.bn_groups:
        raise ValueError(
            f"a batch of {args.batch_size} holds {ids} identities x {args.num_instances}; it needs two or more, "
            f"and --bn-groups {args.bn_groups} must divide them"
        )


def check_processes(args: Namespace, world_size: int) -> None:
    """Raises ValueError, one sentence, for a number of processes with which the training would be another one."""

    def fits(processes):
        whole = processes % args.bn_groups == 0 or args.bn_groups % processes == 0
        return whole and args.batch_size % processes == 0

    if not fits(world_size):
        others = ", ".join(str(n) for n in range(1, args.batch_size + 1) if fits(n))
        raise ValueError(
            f"{world_size} processes cannot share a batch of {args.batch_size} images in {args.bn_groups} group(s) of "
            f"batch statistics evenly; use one of {others} processes"
        )


def complexity_args(argv: list[str] | None = None) -> Namespace:
    """The flags of aff_scl/complexity.py."""
    parser = ArgumentParser(prog="aff_scl/complexity.py", description="Table 8: size and cost of AFF.",
                                     allow_abbrev=False)  # fmt: skip
    add = parser.add_argument_group("network").add_argument
    add("--arch", choices=["base", "g", "l", "aff"], default="aff", help="the parts of Table 7")
    add("--backbone", choices=flags.BACKBONES, default="resnet50")
    flags.choice(add, "--cam", "split se", "form of the local attention")
    add("--cam-reduction", type=int, default=16, help="channels / hidden width, with --cam se")
    flags.choice(add, "--gate", "sigmoid softmax", "with --cam split")
    add("--casam-reduction", type=int, default=256, help="channels / hidden width of CASAM")
    flags.choice(add, "--post", "bn relu none", "layer after the local branch")
    add("--swap", action="store_true", help="SE for global, CASAM for local")
    flags.add_size(add, 384, 192, "; paper silent, 384 x 192 gives Table 8")
    add("--json", action="store_true", help="print a JSON list of unrounded rows instead of the table")
    flags.add_run_flags(parser)
    return flags.parse(parser, "aff_scl", argv)


def test_args(argv: list[str] | None = None) -> Namespace:
    """The flags of aff_scl/test.py."""
    parser = flags.test_parser(
        "aff_scl/test.py", "Evaluate a checkpoint; data and size default to those it was trained with."
    )
    add = parser.add_argument
    add("-d", "--dataset", type=flags.market_rule, help="market, duke, msmt17, cuhk03")
    add("--re-rank", action="store_true", help="k-reciprocal re-ranking (not used in the paper)")
    add("--rank-list", type=int, default=6, metavar="N", help="draw the first ten matches of N queries (0: none)")
    add("--heat-maps", type=int, default=0, metavar="N", help="draw Grad-CAM maps of N queries, Figure 1")
    add("--against", help="second checkpoint for --heat-maps, e.g. of --arch base")
    add("--out", help="folder for the pictures (default: beside the checkpoint)")
    add("-b", "--batch-size", type=int, default=128)
    return flags.parse_test(parser, argv)


PARSERS = {"train.py": parse_args, "test.py": test_args, "complexity.py": complexity_args}
