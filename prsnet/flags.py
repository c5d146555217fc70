"""The flags of prsnet's scripts. Defaults are the paper's; --preset authors is their code's.

Flags left out take the preset's value; a flag that is given wins.
"""

import shlex
from argparse import ArgumentParser, Namespace
from pathlib import Path

from common import commandline, datasets, flags, records, runfiles
from common.datasets.person_crops import TREES
from prsnet import settings
from prsnet.settings import BLOCKS, SIZES

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {  # rare switches of the decision table in README.md; the paper's preset comes first
    "norms": ("load", "drop"),  # layer norms of the pre-trained encoder
    "neck": ("clean", "polluted"),  # whether BNNeck sees masked features
    "erase": ("zero", "mean"),  # fill of random erasing in the normalised image
}
PRESETS = {  # columns "here" and "authors' code" of that table
    "pretrain.py": {
        "paper": {"block": "rep", "bottleneck": None, "mask_loss": "masked", "crop_ratio": [0.375, 0.667]},
        "authors": {"block": "plain", "bottleneck": 768, "mask_loss": "authors", "crop_ratio": [0.75, 1.333]},
    },
    "train.py": {
        "paper": {"block": "rep", "centroid": "mctl", "mae_head": "linear", "variant": [], "batch_size": 64},
        "authors": {
            "block": "plain",
            "centroid": "mctl-authors",
            "mae_head": "authors24",
            "variant": ["erase=mean", "neck=polluted", "norms=drop"],
            "batch_size": 64,
        },
    },
}
AUTHORS_MAE = {  # the published transformer has no pass with hidden blocks, and its pre-training is not published
    "pretrain.py": {"mask_loss": "masked"},
    "train.py": {"centroid": "ctl-authors", "variant": ["erase=mean", "norms=drop"]},
}


def shared(parser: ArgumentParser, script: str) -> None:
    """Flags of both trainings, and those of every script."""
    add = parser.add_argument_group("network and mask").add_argument
    flags.choice(add, "--preset", "paper authors", "defaults of the other flags: the paper, or its code")
    flags.choice(add, "--model", "prsnet mae", "convolutional autoencoder, or MAE's transformer (Table III)")
    add("--size", choices=list(SIZES), default="full", help="widths and depths; small is for one CPU, tiny for tests")
    add(
        "--block",
        choices=list(BLOCKS),
        help="training branches that fold (default), plain, or the authors' second model",
    )
    add("--bottleneck", type=int, help="length of the feature (default: 2048)")
    add("--mask-block", type=int, nargs=2, default=[16, 8], metavar=("H", "W"), help="pixels of a block, sec. III-A")
    add("--mask-ratio", type=float, default=settings.RATIO, help="hidden share of the blocks, sec. III-A")
    flags.add_size(add)
    flags.add_run_flags(parser)
    text = {
        "pretrain.py": "none: pre-training starts from random weights",
        "train.py": "a file, none, or a row of pre-training, whose best.pt is in --logs-dir (default: the model's row)",
    }
    parser.add_argument("--weights", default="none" if script == "pretrain.py" else None, help=text[script])


def pretrain_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(
        prog="prsnet/pretrain.py",
        description="Masked pre-training; defaults are the paper's.",
        allow_abbrev=False,
        conflict_handler="resolve",
    )
    shared(parser, "pretrain.py")
    add = parser.add_argument_group("pre-training").add_argument
    add(
        "--mask-loss",
        choices=["masked", "authors", "all"],
        help="region of Eq. (1): hidden blocks (default), the authors' quarter, everything",
    )
    add(
        "--crop-scale",
        type=float,
        nargs=2,
        default=[0.2, 1.0],
        metavar=("LOW", "HIGH"),
        help="random resized crop, share of the area",
    )
    add("--crop-ratio", type=float, nargs=2, metavar=("LOW", "HIGH"), help="its width / height (default: 0.375 0.667)")
    add("-b", "--batch-size", type=int, default=128, help="images a step over all processes (8 GPUs x 16)")
    add("--epochs", type=int, default=400, help="paper silent; the authors' README has 400")
    add("--warmup", type=int, help="epochs of linear warm-up (default: 20, at most a tenth of --epochs)")
    add("--lr", type=float, default=3e-4, help="base rate, times batch size / 256")
    add("--weight-decay", type=float, default=0.05, help="AdamW, on matrices only")
    add("--clip", type=float, default=0.0, help="largest norm of the gradient (0: no limit)")
    add("--save-every", type=int, default=10, help="epochs between checkpoints")
    return flags.parse(parser, "prsnet", argv, lambda args: complete(args, "pretrain.py"))


def train_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(
        prog="prsnet/train.py",
        description="Fine-tuning for re-identification; defaults are the paper's.",
        allow_abbrev=False,
        conflict_handler="resolve",
    )
    parser.add_argument(
        "-d", "--dataset", type=flags.market_rule, default="market", help="market, cuhk03, duke, msmt17"
    )
    shared(parser, "train.py")
    add = parser.add_argument_group("fine-tuning").add_argument
    add(
        "--centroid",
        choices=list(settings.FORMS),
        help="mctl Eq. (4) (default), ctl Eq. (3); -literal as printed, -authors as the authors' code; or none",
    )
    add(
        "--dist",
        choices=list(settings.DISTANCES),
        default="l2",
        help="distance in Eqs. (2)-(4): Euclidean, or squared as printed",
    )
    add("--margin", type=float, default=settings.MARGIN, help="alpha and alpha_c of Eqs. (2)-(4); paper silent")
    add(
        "--loss-weights",
        type=float,
        nargs=4,
        default=[1.0, 1.0, 5e-4, 1.0],
        metavar=("ID", "TRIPLET", "CENTRE", "CENTROID"),
    )
    add(
        "--mae-head",
        choices=["linear", "authors24"],
        help="feature of the transformer: a linear map, or the authors' rank 24",
    )
    flags.add_variant(add, VARIANTS)
    flags.add_batch(add, None, 4, " (default: 64, 16 identities x 4)")
    add("--epochs", type=int, default=120, help="warm-up and drops of the rate scale with it")
    add("--iters", type=int, help="at most so many steps an epoch (default: all)")
    add("--lr", type=float, default=3.5e-4, help="Adam; linear warm-up over 1/12 of the epochs, x 0.1 at 1/3 and 7/12")
    add("--weight-decay", type=float, default=5e-4, help="L2, on all parameters")
    add(
        "--protocol",
        nargs="+",
        choices=list(settings.PROTOCOLS),
        default=list(settings.PROTOCOLS),
        help="how to measure",
    )
    flags.choice(add, "--centroid-distractors", "drop keep", "people without a query in the centroid protocols")
    return flags.parse(parser, "prsnet", argv, lambda args: complete(args, "train.py"))


def complete(args: Namespace, script: str) -> Namespace:
    """Fill in what depends on the preset and on other flags; raises ValueError for flags that do not fit together."""
    for name, value in preset(args, script).items():
        if name == "variant":
            args.variant = flags.merged(value, args.variant)
        elif getattr(args, name) is None:
            setattr(args, name, value)
    if args.bottleneck is None:
        args.bottleneck = SIZES[args.size].bottleneck
    grid = settings.grid_of(args.height, args.width, tuple(args.mask_block))
    settings.num_masked(grid, args.mask_ratio)
    if args.model == "prsnet" and (args.height % 32 or args.width % 32):
        raise ValueError(
            f"images of {args.height} x {args.width}: the network halves them five times; use multiples of 32"
        )
    if args.epochs < 1 or args.batch_size < 1:
        raise ValueError("--epochs and --batch-size must be at least 1, or nothing would be trained")
    return (complete_pretrain if script == "pretrain.py" else complete_train)(args)


def preset(args: Namespace, script: str) -> dict:
    """Defaults of the flags that depend on --preset, and for the authors' transformer on the data set."""
    chosen = dict(PRESETS[script][args.preset])
    if (args.preset, args.model) == ("authors", "mae"):
        chosen |= AUTHORS_MAE[script]
        if script == "train.py":
            chosen["batch_size"] = (4 if args.dataset == "market" else 8) * args.num_instances
    return chosen


def complete_pretrain(args: Namespace) -> Namespace:
    if args.warmup is None:
        args.warmup = min(20, args.epochs // 10)
    if not 0 <= args.warmup < args.epochs or args.save_every < 1:
        raise ValueError(f"--warmup {args.warmup} must be below --epochs {args.epochs}, and --save-every at least 1")
    if args.weights != "none":
        raise ValueError("pre-training starts from random weights; to continue a run use --resume")
    return args


def complete_train(args: Namespace) -> Namespace:
    variants(args)
    if args.weights is None:
        args.weights = (
            "authors/pretrain" if (args.preset, args.model) == ("authors", "prsnet") else f"pretrain/{args.model}"
        )
    if args.num_instances < 2 or args.batch_size % args.num_instances or args.batch_size // args.num_instances < 2:
        near = max(2, args.batch_size // max(2, args.num_instances)) * max(2, args.num_instances)
        raise ValueError(
            f"--batch-size {args.batch_size} is not at least 2 identities x --num-instances {args.num_instances} >= 2 "
            f"images; nearest: {near}"
        )
    if args.iters is not None and args.iters < 1:
        raise ValueError("--iters must be at least 1, or nothing would be trained")
    return args


def variants(args: Namespace) -> dict:
    """--variant as a dictionary with defaults; raises ValueError for unknown keys and values."""
    return flags.variants(args.variant, VARIANTS)


def weights_file(args: Namespace, data_name: str) -> Path | None:
    """The file that --weights names: None for "none", a file, best.pt or else the newest checkpoint of a log folder, or
    best.pt of a row of pre-training that has come to its end, seed 0.

    `data_name` is the fine-tuning data's; pre-training on rendered people of the same size is taken for rendered data.
    Raises: FileNotFoundError with the command that makes it.
    """
    if args.weights == "none":
        return None
    rows = {name for name, row in records.load_rows(ROOT / "prsnet").items() if row.get("script") == "pretrain.py"}
    if args.weights not in rows:
        path = Path(args.weights).expanduser()
        if not path.exists():
            raise FileNotFoundError(
                f"--weights {args.weights}: neither a file nor a row of pre-training ({', '.join(sorted(rows))})"
            )
        best = path / "best.pt"
        return best if best.is_file() else runfiles.checkpoint(path)
    last = runfiles.name_of(pretrain_args(["--row", args.weights]).epochs)
    size = data_name.partition("-synthetic-")[2]
    return runfiles.of_row("prsnet", args.weights, last, args.logs_dir, size, "pretrain.py").with_name("best.pt")


def fine_tuning(args: Namespace, best: Path) -> str:
    """The command that fine-tunes from a pre-training with these flags, whose lowest loss is in the file `best`."""
    usual = vars(train_args(["--size", args.size])) | {"size": "full", "synthetic": None}
    names = ["model", "size", "height", "width", "mask_block", "synthetic"]
    if args.model == "prsnet":
        names += ["block"] if args.bottleneck == SIZES[args.size].dims[-1] else ["block", "bottleneck"]
    words = ["python", "prsnet/train.py", "--dataset", "market", "--weights", str(best)]
    for name in names:
        if (value := getattr(args, name)) != usual[name]:
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def deploy_args(argv: list[str] | None = None) -> Namespace:
    """The flags of prsnet/deploy.py."""
    parser = ArgumentParser(
        prog="prsnet/deploy.py", description="Fold the training branches, sec. III-B.", allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoint", help="checkpoint of --block rep, a file or a log folder (default: random weights)"
    )
    parser.add_argument("--out", help="file for the folded checkpoint")
    parser.add_argument("--size", choices=list(SIZES), default="full", help="of the random network")
    flags.add_size(parser.add_argument)
    parser.add_argument("-b", "--batch-size", type=int, default=8, help="images of a timed pass")
    parser.add_argument("--passes", type=int, default=7, help="timed passes; the median counts")
    flags.add_run_flags(parser)
    return flags.parse(parser, "prsnet", argv, files=("checkpoint",))


def test_args(argv: list[str] | None = None) -> Namespace:
    """The flags of prsnet/test.py."""
    parser = flags.test_parser("prsnet/test.py", "Evaluate a checkpoint and draw Figures 5-7.")
    add = parser.add_argument
    add("--viz", choices=["recon", "heat", "rank"], help="draw instead of measuring")
    add("--images", help="folder of person images for --viz recon and heat (default: the queries)")
    add("--number", type=int, default=9, help="images or queries in a picture")
    add("--out", help="file to draw to, or folder for a ranking (default: beside the checkpoint)")
    add("--protocol", nargs="+", choices=list(settings.PROTOCOLS), default=list(settings.PROTOCOLS))
    flags.choice(add, "--centroid-distractors", "drop keep", "people without a query")
    add(
        "-d",
        "--dataset",
        type=flags.market_rule,
        help="market, cuhk03, duke, msmt17 (default: that of the training; market)",
    )
    add("--seed", type=flags.seed, default=0, help="of the masks and the choice of queries")
    add("-b", "--batch-size", type=int, default=128)
    return flags.parse_test(parser, argv)


def prepare_args(argv: list[str] | None = None) -> Namespace:
    """The flags of prsnet/prepare.py."""
    parser = ArgumentParser(
        prog="python -m prsnet.prepare", description="Cut person crops for pre-training.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--coco", nargs="+", default=[], metavar="JSON", help="COCO annotations, e.g. person_keypoints_train2017.json")
    add("--coco-images", help="folder of COCO's images (default: train2017 or val2017 beside the annotations)")
    add("--voc", nargs="+", default=[], metavar="DIR", help="VOC2007 and VOC2012 folders")
    add("--split", default="trainval", help="list of VOC images")
    add(
        "--mix", nargs="+", default=[], metavar="NAME", help="ReID data sets whose training images join, without labels"
    )
    add("--mix-include-test", action="store_true", help="their query and gallery images too: leaks the test set")
    add("--synthetic", choices=flags.SYNTHETIC, help="draw street scenes with people and cut those")
    add("--data-dir", default="data", help="where ReID data sets are and rendered ones are written")
    add("--out", help=f"folder that gets {TREES[0]} (default: --data-dir)")
    add(
        "--kpt",
        choices=list(settings.THRESHOLDS),
        default="coco-gt",
        help="what tells whether all 17 key points are there: COCO's annotation, torchvision, HRNet's scores, nothing",
    )
    add(
        "--voc-kpt", choices=["keypointrcnn", "json", "none"], help="the same for VOC (default: --kpt, or keypointrcnn)"
    )
    add("--kpt-json", metavar="FILE", help="17 scores per crop of an HRNet run over the crops of --kpt none")
    add("--kpt-weights", metavar="FILE", help="state_dict of torchvision's keypointrcnn_resnet50_fpn")
    add(
        "--kpt-thr",
        type=float,
        help="a key point counts above this (default: json 0.3, others 0; coco-gt: 0 annotated, 1 visible)",
    )
    add("--min-w", type=int, default=0, help="drop narrower boxes, pixels (the authors' code has 80, commented out)")
    add("--min-h", type=int, default=0, help="drop lower boxes, pixels (160 there)")
    add("-j", "--workers", type=int, default=4, help="threads")
    args = parser.parse_args(commandline.words(argv))
    if not (args.coco or args.voc or args.mix or args.synthetic):
        parser.error("nothing to cut: give --coco, --voc, --mix or --synthetic")
    if args.mix_include_test and not args.mix:
        parser.error("--mix-include-test goes with --mix")
    try:
        args.mix = list(dict.fromkeys(datasets.canonical(name) for name in args.mix))  # each once
    except ValueError as error:
        parser.error(f"--mix: {error}")
    used = {args.kpt} if args.coco else set()
    used |= {voc_mode(args)} if args.voc else set()
    if args.kpt_thr is not None and "coco-gt" in used and not 0 <= args.kpt_thr < 2:
        parser.error(f"--kpt-thr {args.kpt_thr}: COCO's flags are 0, 1 and 2, so --kpt coco-gt takes 0 or 1")
    if args.kpt_thr is not None and used <= {"none"}:
        parser.error("--kpt-thr has no key points to count; give --kpt a source of them")
    return args


def voc_mode(args: Namespace) -> str:
    """Where VOC's key points come from: it has none of its own."""
    return args.voc_kpt or ("keypointrcnn" if args.kpt == "coco-gt" else args.kpt)


PARSERS = {
    "train.py": train_args,
    "test.py": test_args,
    "prepare.py": prepare_args,
    "pretrain.py": pretrain_args,
    "deploy.py": deploy_args,
}
