"""The flags of train.py and the other scripts; defaults are the paper's main setting."""

from argparse import ArgumentParser, Namespace

from common import commandline, flags
from common.datasets.prcc import MASK_FORMATS
from pixel_sampling import settings
from pixel_sampling.settings import CLASSES, PROTOCOLS, QUERIES

PLAIN = ("--ps-mode", "off", "--consistency", "none")  # flags of a network without pixel sampling


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(
        prog="pixel_sampling/train.py",
        description="Train with pixel sampling; defaults are the paper's main setting.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("data").add_argument
    add("-d", "--dataset", type=str.lower, default="prcc", choices=["prcc"])
    add(
        "--mask-format",
        choices=list(MASK_FORMATS),
        default="part6",
        help="parsing masks: six parts or ATR labels as PNG, or the authors' .npy scores",
    )
    flags.choice(
        add, "--mask-align", "crop none", "masks move with their images, or are resized only (the authors' code)"
    )
    flags.add_size(add)
    add = parser.add_argument_group("method").add_argument
    add("--arch", choices=settings.ARCHS, default="bot", help="network (Tables I, III, IV)")
    add("--backbone", choices=flags.BACKBONES, default="resnet50")
    add(
        "--ps-mode",
        choices=["off", *settings.MODES],
        default="vector",
        help="pixel sampling, Eqs. (1)-(2): pixels, single values (the authors' code), shuffled pixels",
    )
    add("--ps-classes", choices=list(CLASSES), default="both", help="clothes that are re-drawn")
    add("--consistency", choices=settings.CONSISTENCY, default="l2", help="form of Eq. (3)")
    add("--label-smooth", type=float, default=0.1, help="of Eq. (4); paper silent, as its baseline")
    flags.choice(add, "--aug", "paper code", "paper: flip and crop; code: crop and colour jitter 0.1, no flip")
    add("--re", action="store_true", help="random erasing before pixel sampling (Table II)")
    add = parser.add_argument_group("optimiser").add_argument
    flags.add_batch(add, 64, 4, ", initial ones, B; pixel sampling doubles them")
    add("--epochs", type=int, default=60)
    add("--iters", type=int, help="at most this many steps an epoch (default: all)")
    add("--lr", type=float, default=3.5e-3, help="SGD with momentum 0.9; warm-up over 1/6 of the epochs, x 0.1 at 2/3")
    add("--weight-decay", type=float, default=5e-4)
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-period", type=int, default=5, help="epochs between evaluations")
    flags.choice(add, "--selection", "last test-best", "what the result file reports; test-best is the authors' rule")
    flags.add_run_flags(parser, row_weights=True)
    return flags.parse(parser, "pixel_sampling", argv, complete)


def complete(args: Namespace) -> Namespace:
    """Check what must fit together. Raises: ValueError."""
    if args.consistency != "none" and (args.ps_mode == "off" or args.arch != "bot"):
        raise ValueError(
            "--consistency compares images with their changed copies: it needs --arch bot and a --ps-mode but off; "
            "else add --consistency none"
        )
    if args.arch in ("head", "head_body") and args.ps_mode != "off":
        raise ValueError(f"--arch {args.arch} is trained without pixel sampling: add --ps-mode off --consistency none")
    if args.mask_align == "none" and args.aug == "paper":
        raise ValueError("--mask-align none leaves masks unflipped: it goes with --aug code, which does not flip")
    ids, rest = divmod(args.batch_size, args.num_instances)
    if rest or ids < 2 or args.num_instances < 2:
        near = max(2, ids) * args.num_instances
        raise ValueError(
            f"--batch-size {args.batch_size} is not at least twice, and a multiple of, --num-instances "
            f"{args.num_instances} (at least 2); nearest: {near}"
        )
    if args.epochs < 1 or args.eval_period < 1 or (args.iters is not None and args.iters < 1):
        raise ValueError("--epochs, --iters and --eval-period must be at least 1")
    if not 0 <= args.label_smooth < 1:
        raise ValueError(f"--label-smooth {args.label_smooth} is outside [0, 1)")
    return args


def add_data_flags(parser: ArgumentParser) -> None:
    """How the data are read; what is not given is as in the training of the checkpoint."""
    parser.add_argument(
        "--mask-format", choices=list(MASK_FORMATS), help="for the head networks, which look at masks in the test too"
    )
    parser.add_argument("-b", "--batch-size", type=int, default=128)


def test_args(argv: list[str] | None = None) -> Namespace:
    """The flags of test.py."""
    parser = flags.test_parser(
        "pixel_sampling/test.py",
        "Evaluate a checkpoint on PRCC.",
        query="cross: camera C, other clothes; same: camera B; both (default); with a gallery a folder or an image",
    )
    parser.set_defaults(query="both")
    add_data_flags(parser)
    add = parser.add_argument
    add(
        "--arch", choices=settings.ARCHS, help="the file holds bare weights of this network on ResNet-50, no checkpoint"
    )
    add("--protocol", choices=[*PROTOCOLS, "both"], default="both")
    add("--csv", help="write the numbers here too")
    add("--out", help="folder for the ranking of your own images (default: beside the checkpoint)")
    return flags.parse_test(parser, argv, own_query)


def own_query(args: Namespace) -> str | None:
    """The folder that --query of test.py names; None where it names a query set. Raises: ValueError for neither."""
    if (args.gallery or args.gallery_features) and args.query != "both":
        return args.query
    if args.query not in (*QUERIES, "both"):
        raise ValueError(f"--query {args.query}: choose cross, same or both, or give a folder together with --gallery")
    return None


def figures_args(argv: list[str] | None = None) -> Namespace:
    """The flags of visualize.py."""
    parser = ArgumentParser(
        prog="pixel_sampling/visualize.py", description="Draw a figure of the paper.", allow_abbrev=False
    )
    add = parser.add_argument
    add("figure", type=int, choices=[1, 3, 4, 5])
    add("--checkpoint", help="figures 4 and 5: our network, a checkpoint or a log folder")
    add("--against", nargs="+", default=[], help="figures 4 and 5: the networks to compare with")
    add("--number", type=int, default=6, help="people of figure 1 and rows of figures 4 and 5")
    add("--query", choices=list(QUERIES), default="cross", help="figure 5: which query set")
    add(
        "--split",
        choices=["train", "query"],
        default="query",
        help="figure 4: images of known people (their class) or test images (the predicted class)",
    )
    flags.choice(add, "--cam", "neck raw", "figure 4: class score with the neck at every place, or the classifier row")
    add("--seed", type=flags.seed, default=0, help="which images are drawn")
    add("--out", default="figures", help="folder for the pictures")
    add_data_flags(parser)
    flags.add_test_flags(parser)
    args = flags.parse_test(parser, argv)
    least, most = (4, 26) if args.figure == 1 else (1, 1000)
    if not least <= args.number <= most:
        parser.error(f"figure {args.figure} takes --number {least} to {most}")
    if args.figure in (4, 5) and not args.checkpoint:
        parser.error(f"figure {args.figure} needs --checkpoint")
    return args


def parsing_args(argv: list[str] | None = None) -> Namespace:
    """The flags of parse.py."""
    parser = ArgumentParser(
        prog="python -m pixel_sampling.parse", description="Write parsing masks.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--root", required=True, help="a folder of images (any depth), or one that holds prcc/rgb")
    add("--ckpt", required=True, help="the official ATR checkpoint, or none for random weights")
    add("--out", help="folder for the masks (default for PRCC: mask, or mask_atr18, beside rgb)")
    flags.choice(add, "--labels", "part6 atr18", "six parts, or the 18 ATR labels")
    add("--overlays", type=int, default=0, metavar="N", help="draw N masks over their images into OUT/overlays.png")
    add("-b", "--batch-size", type=int, default=16)
    add("-j", "--workers", type=int, default=4, help="threads that read and write images, at least one")
    add(
        "--size",
        type=int,
        default=settings.SCHP_SIZE,
        help="input side of the network; 512 is what it was trained with",
    )
    flags.choice(add, "--amp", "off bf16")
    return parser.parse_args(commandline.words(argv))


PARSERS = {"train.py": parse_args, "test.py": test_args, "visualize.py": figures_args, "parse.py": parsing_args}
