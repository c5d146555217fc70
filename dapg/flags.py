"""Flags of dapg/train.py, and the defaults that depend on stage, method and preset."""

import os
from argparse import ArgumentParser, Namespace

from common import flags
from dapg.noise.names import BENCH20, allowed_types

MODALITIES = {"visible": "rgb", "infrared": "ir"}  # streams: their flag, their name in the code

# What a flag is that the user leaves out, by stage: the paper's settings (sec. III-B), else those of what the stage
# builds on (README, Decisions). "baseline" is --stage robust with another --method; its lr is 0.06 * batch / 256.
DEFAULTS = {
    "robust": dict(dataset="luperson", height=256, width=128, epochs=300, batch_size=256, lr=0.0075, weight_decay=0.0),
    "baseline": dict(dataset="luperson", height=256, width=128, epochs=300, batch_size=256, weight_decay=1e-4, tau=0.1),
    "gan": dict(dataset="market", height=256, width=128, epochs=20, batch_size=32, lr=2e-4, weight_decay=0.0),
    "generate": dict(dataset="market", height=256, width=128, epochs=1, batch_size=64, lr=0.0, weight_decay=0.0),
    "align": dict(dataset="market", height=256, width=128, epochs=200, batch_size=256, lr=0.0075, weight_decay=0.0),
    "agw": dict(dataset="sysu", height=288, width=144, epochs=81, batch_size=64, lr=0.1, weight_decay=5e-4),
    "cil": dict(dataset="sysu", height=288, width=144, epochs=81, batch_size=64, lr=0.1, weight_decay=5e-4),
}
WEIGHTS = {"align": "row:robust/dapg", "agw": "imagenet", "cil": "imagenet"}  # else none
SOURCES = {"generate": "row:gan/market", "align": "row:generate/market"}
STABLE = {"lr": 7.5e-4, "tau": 0.1, "severity_max": 3}  # of --preset stable
STAGES = tuple(stage for stage in DEFAULTS if stage != "baseline")
CONTRAST, DOWNSTREAM = ("robust", "align"), ("agw", "cil")
# The rare switches of the decision table in README.md: name -> allowed values, or a number's default; first = default.
VARIANTS = {
    "subset_seed": 0,
    "crop": ("pad", "rrc"),
    "augmix_ops": ("off", "on"),
    "bn_splits": 4,
    "momentum": 0.999,
    "queue": 0,
    "warmup": 10,
    "stage2_noise": 0.0,
    "market_split": ("train", "all"),
    "gan_pairs": ("identity", "self"),
    "gan_held_out": 0.0,
    "pairs_per_epoch": 160000,
    "ngf": 64,
    "blocks": 9,
    "detector": "",
    "nl_inter": 1,
    "cil_clean": ("erased", "raw"),
    "cil_weight": 12.0,
    "visible": ("colour", "channels"),
    "trunk_lr": 0.1,
    "rates": ("agw", "cosine"),
    "draws": 10,
    "select": ("last", "best_test"),
}


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(
        prog="dapg/train.py",
        allow_abbrev=False,
        description="Train DAPG stage by stage; defaults are the paper's setting of each stage.",
    )
    add = parser.add_argument_group("data").add_argument
    add("-d", "--dataset", help="default: luperson (robust), sysu (agw, cil), market (else)")
    flags.add_size(add, None, None, " (default: 256 x 128; agw and cil 288 x 144)")
    add("--subset", type=int, default=0, help="train on this many of the unlabelled images, 0: all")
    add("--split", type=int, help="RegDB's split 1..10 (default: seed + 1)")
    add = parser.add_argument_group("method").add_argument
    add("--stage", choices=STAGES, default="robust")
    flags.choice(add, "--method", "dapg simclr byol moco", "of stage robust: ours or a baseline of Tables I-II")
    flags.choice(add, "--preset", "paper stable", "paper: printed values; stable: lr 7.5e-4, tau 0.1, severity up to 3")
    add("--backbone", choices=flags.BACKBONES, default="resnet50", help="resnet18 for small machines")
    flags.choice(add, "--noise-base", "views chain", "noise on three own views (text) or along one image (Fig. 3)")
    add(
        "--noise-exclude",
        nargs="+",
        default=[],
        metavar="NAME",
        help="training noises left out, for a benchmark of unseen corruptions",
    )
    add("--severity-max", type=int, help="severities are U{1..this} (default: 5); paper silent")
    flags.choice(
        add, "--negatives", "queue batch", "momentum encoder and queue, or the m - 1 others of the batch, Eq. (2)"
    )
    flags.choice(add, "--loss", "eq1 mc infonce", "Eq. (1), Eq. (2) alone, or one positive (Table III, row 1)")
    flags.choice(
        add,
        "--constraint",
        "sim feature row",
        "what the softmax of Eq. (3) is of: similarities to the negatives, the embedding, "
        "similarities to the own keys and the negatives; paper silent",
    )
    add("--delta", type=float, default=0.5, help="weight of Eq. (2) in Eq. (1)")
    add("--tau", type=float, help="temperature of Eq. (2) (default: 0.7)")
    add("--tau-js", type=float, default=0.1, help="temperature of Eq. (3); paper silent")
    add("--source", help="generator (generate) or generated poses (align): row:NAME or a path")
    flags.add_variant(add, VARIANTS)
    add = parser.add_argument_group("optimiser").add_argument
    add("-b", "--batch-size", type=int, help="over all processes (default: 256; gan 32; agw, cil 64)")
    add("--epochs", type=int, help="default: 300 robust, 200 align, 20 gan, 81 agw and cil")
    add("--iters", type=int, help="at most this many steps an epoch")
    add("--lr", type=float, help="default: 0.0075 Adam; gan 2e-4; agw, cil 0.1 SGD; baselines SGD")
    add("--weight-decay", type=float, help="default: 0; baselines 1e-4; agw, cil 5e-4")
    flags.add_run_flags(parser, row_weights=True)
    parser.set_defaults(weights=None, cache=None)
    args = flags.parse(parser, "dapg", argv, complete, files=("weights", "source", "variant"))
    try:
        check_processes(args, int(os.environ.get("WORLD_SIZE", 1)))
    except ValueError as error:
        parser.error(str(error))
    return args


def complete(args: Namespace) -> Namespace:
    """Fill in the defaults of stage, method and preset; raises ValueError for flags that do not fit together."""
    for name, value in defaults(args).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.noise_exclude = sorted(args.noise_exclude)
    check(args)
    return args


def defaults(args: Namespace) -> dict:
    """What the flags are that the user left out."""
    stage = "baseline" if args.stage == "robust" and args.method != "dapg" else args.stage
    whole = (args.dataset or DEFAULTS[stage]["dataset"]) == "luperson" and not (args.subset or args.synthetic)
    table = {
        "tau": 0.7,
        "severity_max": 5,
        "weights": WEIGHTS.get(args.stage, "none"),
        "source": SOURCES.get(args.stage),
        "cache": "off" if whole else "disk",  # 4.18 million decoded images take 411 GB
        **DEFAULTS[stage],
    }
    if stage == "baseline":
        return {**table, "lr": 0.06 * (args.batch_size or table["batch_size"]) / 256}
    return {**table, **(STABLE if args.preset == "stable" else {})}


def check(args: Namespace) -> None:
    """Raises: ValueError for the first flag that does not fit the others."""
    settings = variants(args)
    allowed_types(args.noise_exclude)
    contrast = args.stage in CONTRAST and args.method in ("dapg", "moco") and args.negatives == "queue"
    rules = {
        f"--method {args.method} is a baseline of --stage robust": args.method == "dapg" or args.stage == "robust",
        "--negatives batch is of --stage robust with --method dapg; the others bring their negatives": (
            args.negatives == "queue" or (args.stage == "robust" and args.method == "dapg")
        ),
        "--preset stable is of --stage robust and align with --method dapg": (
            args.preset == "paper" or (args.stage in CONTRAST and args.method == "dapg")
        ),
        f"--severity-max {args.severity_max} is not one of 1..5": 1 <= args.severity_max <= 5,
        "--epochs and --iters must be at least 1, or nothing would be trained": (
            args.epochs >= 1 and (args.iters is None or args.iters >= 1)
        ),
        "--tau and --tau-js must be positive and --delta in 0..1": (
            args.tau > 0 and args.tau_js > 0 and 0 <= args.delta <= 1
        ),
        f"--lr {args.lr:g} must be positive": args.lr > 0 or args.stage == "generate",
        f"--batch-size {args.batch_size} must be at least 1": args.batch_size >= 1,
        f"--stage {args.stage} needs --dataset sysu or regdb and a batch of identities x 8 images": (
            args.stage not in DOWNSTREAM or (args.dataset in ("sysu", "regdb") and args.batch_size % 8 == 0)
        ),
        "--split is one of 1..10 and goes with --dataset regdb": (
            args.split is None or (args.dataset == "regdb" and 1 <= args.split <= 10)
        ),
        f"--stage gan needs sides of at least 56, multiples of 4, got {args.height} x {args.width}": (
            args.stage != "gan" or (min(args.height, args.width) >= 56 and args.height % 4 == args.width % 4 == 0)
        ),
        f"--batch-size {args.batch_size} does not divide into the bn_splits={settings['bn_splits']} groups of the key "
        f"encoder's BatchNorm; use a multiple, or --variant bn_splits=1 (no shuffled BatchNorm)": (
            not contrast or (settings["bn_splits"] >= 1 and args.batch_size % settings["bn_splits"] == 0)
        ),
        "--variant momentum and gan_held_out lie in 0 <= x < 1, stage2_noise in 0..1, draws are at least 1": (
            0 <= settings["momentum"] < 1
            and 0 <= settings["gan_held_out"] < 1
            and 0 <= settings["stage2_noise"] <= 1
            and settings["draws"] >= 1
        ),
    }
    wrong = [message for message, right in rules.items() if not right]
    if wrong:
        raise ValueError(wrong[0])


def check_processes(args: Namespace, world: int) -> None:
    """Raises: ValueError where `world` processes cannot share a batch evenly, with the numbers that can."""
    batch, splits, ids = args.batch_size, variants(args)["bn_splits"], args.batch_size // 8
    if args.stage == "gan" and world > 1:
        raise ValueError("--stage gan trains on one process; start it with python instead of torchrun")
    if args.stage in CONTRAST and batch % world:
        near = " or ".join(str(n) for n in (batch // world * world, (batch // world + 1) * world) if n)
        raise ValueError(f"--batch-size {batch} does not split over {world} processes; use {near}")
    if args.stage in CONTRAST and args.method in ("dapg", "moco") and args.negatives == "queue":
        if splits % world and world % splits:
            able = ", ".join(str(n) for n in range(1, 4 * splits + 1) if splits % n == 0 or n % splits == 0)
            raise ValueError(
                f"{world} processes cannot hold the {splits} groups of the key encoder's BatchNorm (--variant "
                f"bn_splits), as one number must divide the other; use {able} ... processes"
            )
    if args.stage in DOWNSTREAM and ids % world:
        able = ", ".join(str(n) for n in range(1, ids + 1) if ids % n == 0)
        raise ValueError(f"{world} processes cannot share the {ids} identities of a batch evenly; use {able} processes")


def variants(args: Namespace) -> dict:
    """--variant as a dictionary with defaults; raises ValueError for unknown keys and values."""
    return flags.variants(args.variant, VARIANTS)


def test_args(argv: list[str] | None = None) -> Namespace:
    """The flags of dapg/test.py."""
    parser = flags.test_parser("dapg/test.py", "Evaluate a checkpoint, draw figures.", needs_checkpoint=False)
    add = parser.add_argument
    add("--figure", type=int, choices=[1, 3, 4], help="draw this figure instead")
    add("-d", "--dataset", help="default: the checkpoint's; figures: luperson, market")
    add("--split", type=int, help="RegDB's split; default: the checkpoint's own")
    add("--corruption", choices=BENCH20, help="this type alone instead of all 20")
    add("--severity", type=int, choices=range(1, 6), help="this severity instead of U{1..5}")
    add("--noise-exclude", nargs="+", default=[], metavar="NAME", choices=BENCH20)
    add("--draws", type=int, default=10, help="repetitions of the corrupted benchmark")
    add("--source", default="row:generate/market", help="generated poses of figure 4: row:NAME or path")
    add("--out", default=".", help="folder for the pictures")
    add("--logs-dir", default=str(flags.ROOT / "logs"))
    for part, default, more in (("query", "infrared", ""), ("gallery", "visible", "; --export writes this one")):
        text = f"your own images: which stream describes --{part}{more}"
        add(f"--{part}-modality", choices=list(MODALITIES), default=default, help=text)
    args = flags.parse_test(parser, argv)
    if (args.checkpoint is None) == (args.figure is None):
        parser.error("give --checkpoint to evaluate, or --figure 1, 3 or 4 to draw")
    return args


PARSERS = {"train.py": parse_args, "test.py": test_args}
