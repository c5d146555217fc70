"""The flags of train.py; defaults are the paper's main setting."""

from argparse import ArgumentParser, Namespace

from common import flags
from common.datasets.prcc import MASK_FORMATS
from pixel_sampling import settings
from pixel_sampling.settings import CLASSES


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(
        prog="pixel_sampling/train.py",
        description="Train with pixel sampling; defaults are the paper's main setting.",
        allow_abbrev=False,
    )
    data = parser.add_argument_group("data")
    data.add_argument("-d", "--dataset", type=str.lower, default="prcc", choices=["prcc"])
    data.add_argument(
        "--mask-format",
        choices=list(MASK_FORMATS),
        default="part6",
        help="parsing masks: six parts or ATR labels as PNG, or the authors' .npy scores",
    )
    data.add_argument(
        "--mask-align",
        choices=["crop", "none"],
        default="crop",
        help="crop: masks move with their images; none: resized only, as the authors' code",
    )
    data.add_argument("--height", type=int, default=256)
    data.add_argument("--width", type=int, default=128)
    method = parser.add_argument_group("method")
    method.add_argument("--arch", choices=settings.ARCHS, default="bot", help="network (Tables I, III, IV)")
    method.add_argument("--backbone", choices=flags.BACKBONES, default="resnet50")
    method.add_argument(
        "--ps-mode",
        choices=["off", *settings.MODES],
        default="vector",
        help="pixel sampling, Eqs. (1)-(2): pixels, single values (the authors' code), shuffled pixels",
    )
    method.add_argument("--ps-classes", choices=list(CLASSES), default="both", help="clothes that are re-drawn")
    method.add_argument("--consistency", choices=settings.CONSISTENCY, default="l2", help="form of Eq. (3)")
    method.add_argument("--label-smooth", type=float, default=0.1, help="of Eq. (4); paper silent, as its baseline")
    method.add_argument(
        "--aug",
        choices=["paper", "code"],
        default="paper",
        help="paper: flip and crop; code: crop and colour jitter 0.1, no flip",
    )
    method.add_argument("--re", action="store_true", help="random erasing before pixel sampling (Table II)")
    optim = parser.add_argument_group("optimiser")
    optim.add_argument(
        "-b",
        "--batch-size",
        type=int,
        default=64,
        help="initial images a step, B, over all processes; pixel sampling doubles them",
    )
    optim.add_argument("--num-instances", type=int, default=4, help="images of one identity in a batch")
    optim.add_argument("--epochs", type=int, default=60)
    optim.add_argument("--iters", type=int, help="at most this many steps an epoch (default: all)")
    optim.add_argument(
        "--lr", type=float, default=3.5e-3, help="SGD with momentum 0.9; warm-up over 1/6 of the epochs, x 0.1 at 2/3"
    )
    optim.add_argument("--weight-decay", type=float, default=5e-4)
    test = parser.add_argument_group("evaluation")
    test.add_argument("--eval-period", type=int, default=5, help="epochs between evaluations")
    test.add_argument(
        "--selection",
        choices=["last", "test-best"],
        default="last",
        help="what the result file reports; test-best is the authors' rule",
    )
    flags.add_run_flags(parser)
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


PARSERS = {"train.py": parse_args}  # of scripts in rows
