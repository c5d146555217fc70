"""Flags of dapg/train.py, and the defaults that depend on stage, method and preset."""

from argparse import ArgumentParser, Namespace

from common import runtime
from dapg.noise import corruptions

STAGES = ("robust", "gan", "generate", "align", "agw", "cil")
DOWNSTREAM = ("agw", "cil")
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
    "pairs_per_epoch": 160000,
    "ngf": 64,
    "blocks": 9,
    "detector": "",
    "nl_inter": 1,
    "cil_clean": ("erased", "raw"),
    "cil_weight": 12.0,
    "draws": 10,
    "select": ("last", "best_test"),
}


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(
        prog="dapg/train.py",
        allow_abbrev=False,
        description="Train DAPG stage by stage; defaults are the paper's setting of each stage.",
    )
    data = parser.add_argument_group("data")
    data.add_argument("-d", "--dataset", help="default: luperson (robust), sysu (agw, cil), market (else)")
    data.add_argument("--height", type=int, help="default: 256; 288 for agw and cil")
    data.add_argument("--width", type=int, help="default: 128; 144 for agw and cil")
    data.add_argument("--subset", type=int, default=0, help="train on this many of the unlabelled images, 0: all")
    data.add_argument("--split", type=int, help="RegDB's split 1..10 (default: seed + 1)")
    method = parser.add_argument_group("method")
    method.add_argument("--stage", choices=STAGES, default="robust")
    method.add_argument(
        "--method",
        choices=["dapg", "simclr", "byol", "moco"],
        default="dapg",
        help="of stage robust: ours or a baseline of Tables I-II",
    )
    method.add_argument(
        "--preset",
        choices=["paper", "stable"],
        default="paper",
        help="paper: every printed value; stable: lr 7.5e-4, tau 0.1, severity up to 3",
    )
    method.add_argument("--backbone", default="resnet50", help="torchvision ResNet; resnet18 for small machines")
    method.add_argument(
        "--noise-base",
        choices=["views", "chain"],
        default="views",
        help="noise on three own views (text) or along one image (Fig. 3)",
    )
    method.add_argument(
        "--noise-exclude",
        nargs="+",
        default=[],
        metavar="NAME",
        help="noise types left out of training, for a benchmark of unseen corruptions",
    )
    method.add_argument("--severity-max", type=int, help="severities are U{1..this} (default: 5); paper silent")
    method.add_argument(
        "--negatives",
        choices=["queue", "batch"],
        default="queue",
        help="momentum encoder and queue, or the m - 1 other images of the batch, Eq. (2)",
    )
    method.add_argument(
        "--loss",
        choices=["eq1", "mc", "infonce"],
        default="eq1",
        help="Eq. (1), Eq. (2) alone, or one positive (Table III, row 1)",
    )
    method.add_argument(
        "--constraint",
        choices=["sim", "feature", "row"],
        default="sim",
        help="what the softmax of Eq. (3) is of: similarities to the negatives, the embedding, "
        "similarities to the own keys and the negatives; paper silent",
    )
    method.add_argument("--delta", type=float, default=0.5, help="weight of Eq. (2) in Eq. (1)")
    method.add_argument("--tau", type=float, help="temperature of Eq. (2) (default: 0.7)")
    method.add_argument("--tau-js", type=float, default=0.1, help="temperature of Eq. (3); paper silent")
    method.add_argument("--source", help="generator (generate) or generated poses (align): row:NAME or a path")
    method.add_argument("--variant", nargs="+", default=[], metavar="KEY=VALUE", help="rare: " + ", ".join(VARIANTS))
    optim = parser.add_argument_group("optimiser")
    optim.add_argument("-b", "--batch-size", type=int, help="over all processes (default: 256; gan 32; agw, cil 64)")
    optim.add_argument("--epochs", type=int, help="default: 300 robust, 200 align, 20 gan, 81 agw and cil")
    optim.add_argument("--iters", type=int, help="at most this many steps an epoch")
    optim.add_argument("--lr", type=float, help="default: 0.0075 Adam; gan 2e-4; agw, cil 0.1 SGD; baselines SGD")
    optim.add_argument("--weight-decay", type=float, help="default: 0; baselines 1e-4; agw, cil 5e-4")
    runtime.add_run_flags(parser)
    parser.set_defaults(weights=None)
    return runtime.parse(parser, "dapg", argv, complete)


def complete(args: Namespace) -> Namespace:
    """Fill in the defaults of stage, method and preset; raises ValueError for flags that do not fit together."""
    stable, baseline = args.preset == "stable", args.method != "dapg"
    if baseline and args.stage != "robust":
        raise ValueError(f"--method {args.method} is a baseline of --stage robust")
    if args.negatives == "batch" and (baseline or args.stage != "robust"):
        raise ValueError("--negatives batch is of --stage robust with --method dapg; the others bring their negatives")
    down = args.stage in DOWNSTREAM
    contrast = {
        "batch_size": 256,
        "lr": 7.5e-4 if stable else 0.0075,
        "weight_decay": 0.0,
        "tau": 0.1 if stable else 0.7,
    }
    if baseline:
        contrast.update(lr=0.06 * (args.batch_size or 256) / 256, weight_decay=1e-4, tau=0.1)
    paper = {
        "robust": {"dataset": "luperson", "epochs": 300, "weights": "none", **contrast},
        "align": {
            "dataset": "market",
            "epochs": 200,
            "weights": "row:robust/dapg",
            "source": "row:generate/market",
            **contrast,
        },
        "gan": {
            "dataset": "market",
            "epochs": 20,
            "weights": "none",
            "batch_size": 32,
            "lr": 2e-4,
            "weight_decay": 0.0,
        },
        "generate": {
            "dataset": "market",
            "epochs": 1,
            "weights": "none",
            "batch_size": 64,
            "lr": 0.0,
            "source": "row:gan/market",
            "weight_decay": 0.0,
        },
        "agw": {
            "dataset": "sysu",
            "epochs": 81,
            "weights": "imagenet",
            "batch_size": 64,
            "lr": 0.1,
            "weight_decay": 5e-4,
        },
    }
    paper["cil"] = paper["agw"]
    common = {
        "height": 288 if down else 256,
        "width": 144 if down else 128,
        "severity_max": 3 if stable else 5,
        "tau": 0.7,
        "source": None,
    }
    for name, value in {**common, **paper[args.stage]}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.variant, args.noise_exclude = sorted(args.variant), sorted(args.noise_exclude)
    variants(args)
    if not 1 <= args.severity_max <= 5:
        raise ValueError(f"--severity-max {args.severity_max} is not one of 1..5")
    unknown = sorted(set(args.noise_exclude) - set(corruptions.BENCH20))
    if unknown:
        raise ValueError(f"--noise-exclude {', '.join(unknown)}: known are {', '.join(corruptions.BENCH20)}")
    if args.epochs < 1 or (args.iters is not None and args.iters < 1):
        raise ValueError("--epochs and --iters must be at least 1, or nothing would be trained")
    if args.tau <= 0 or args.tau_js <= 0 or not 0 <= args.delta <= 1:
        raise ValueError("--tau and --tau-js must be positive and --delta in 0..1")
    if down and (args.dataset not in ("sysu", "regdb") or args.batch_size % 8):
        raise ValueError(f"--stage {args.stage} needs --dataset sysu or regdb and a batch of identities x 8 images")
    if args.split is not None and not (args.dataset == "regdb" and 1 <= args.split <= 10):
        raise ValueError("--split is one of 1..10 and goes with --dataset regdb")
    return args


def variants(args: Namespace) -> dict:
    """--variant as a dictionary with defaults; raises ValueError for unknown keys and values."""
    return runtime.variants(args.variant, VARIANTS)
