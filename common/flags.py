"""Flags that mean the same in every script, and the rows of experiments.yaml that set their defaults."""

import functools
import hashlib
import shlex
import sys
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path

from common import commandline, datasets, records, runfiles
from common.datasets import base

ROOT = Path(__file__).resolve().parents[1]
RUNS = "runs"  # folder of the repository for the result files of a user, beside the recorded ones in results
AMP = ("off", "bf16", "fp16")
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")  # torchvision's
SYNTHETIC = ("small", "medium", "full")  # sizes of rendered data sets


def market_rule(name: str) -> str:
    """The type of a flag that names a data set measured by the rule of Market-1501; its canonical name."""
    try:
        return datasets.of_market_rule(name)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def seed(text: str) -> int:
    """The type of --seed: a whole number from 0."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text} is no whole number from 0")
    return int(text)


def add_run_flags(parser: ArgumentParser, row_weights: bool = False) -> None:
    """Add the flags that mean the same in every script: where data, logs and results are, and how to execute.

    row_weights: this script's --weights takes row:NAME too.
    """
    data = parser.add_argument_group("data location")
    data.add_argument("--data-dir", default="data", help="folder that holds the data sets (README, Datasets)")
    data.add_argument("--synthetic", choices=SYNTHETIC, help="write and use synthetic people instead of real data")
    data.add_argument(
        "--cache",
        choices=["disk", "device", "off"],
        default="disk",
        help="decoded images: memory-mapped, on the device, or decoded per batch",
    )
    data.add_argument("--cache-dir", help="where decoded images are kept (default: .reid_cache beside the data)")
    data.add_argument("-j", "--workers", type=int, default=2, help="processes that decode images")
    run = parser.add_argument_group("run")
    run.add_argument("--row", help="row of experiments.yaml that sets the defaults; explicit flags win")
    run.add_argument("--seed", type=seed, default=0)
    run.add_argument("--logs-dir", default=str(ROOT / "logs"), help="checkpoints and logs")
    run.add_argument("--results-dir", default=str(ROOT / RUNS), help="result files; results: to record")
    run.add_argument(
        "--resume", nargs="?", const="auto", help="continue: the newest checkpoint of this run, or the one given"
    )
    rows = "; or row:NAME, what seed 0 of that finished row left" if row_weights else ""
    text = f"imagenet (downloaded by torchvision), none, a file or a log folder{rows}"
    run.add_argument("--weights", default="imagenet", help=text)
    run.add_argument("--amp", choices=AMP, default="off", help="autocast precision of the network")
    run.add_argument("--compile", action="store_true", help="torch.compile the network")
    run.add_argument(
        "--deterministic", action="store_true", help="deterministic CUDA kernels (the CPU is deterministic anyway)"
    )


def add_test_flags(parser: ArgumentParser) -> None:
    """Add the flags that mean the same in every test.py; data that they do not name are those of the training."""
    data = parser.add_argument_group("data location and execution")
    data.add_argument("--data-dir", help="folder that holds the data sets (default: that of the training)")
    data.add_argument("--synthetic", choices=SYNTHETIC, help="use synthetic people")
    data.add_argument("--real", action="store_true", help="use real data where training used synthetic people")
    data.add_argument("--cache", choices=["disk", "device", "off"], default="disk", help="decoded images: see train.py")
    data.add_argument("--cache-dir", help="where decoded images are kept (default: .reid_cache beside the data)")
    data.add_argument("-j", "--workers", type=int, default=2, help="processes that decode images")
    data.add_argument("--amp", choices=AMP, default="off", help="autocast precision of the network")


def choice(add: Callable, name: str, words: str, text: str | None = None) -> None:
    """A flag that takes one of the words, the first where it is left out, by a group's add_argument."""
    add(name, choices=words.split(), default=words.split()[0], help=text)


def add_size(add: Callable, height: int | None = 256, width: int | None = 128, note: str = "") -> None:
    """--height and --width of the network's images, by a group's add_argument; `note` goes behind their help."""
    for name, value in (("height", height), ("width", width)):
        add(f"--{name}", type=int, default=value, help=f"pixels{note}")


def add_batch(add: Callable, size: int | None, instances: int | None, note: str = "", instances_note: str = "") -> None:
    """--batch-size and --num-instances of a P x K batch, by a group's add_argument; the notes go behind their help."""
    add("-b", "--batch-size", type=int, default=size, help=f"images a step over all processes{note}")
    add("--num-instances", type=int, default=instances, help=f"images of an identity in a batch, K{instances_note}")


def test_parser(
    script: str,
    description: str,
    needs_checkpoint: bool = True,
    query: str = "folder of images, or one image, to look for in the gallery",
) -> ArgumentParser:
    """The parser of a test.py with its --checkpoint, also called --weights, the flags of every test.py and those for
    one's own images (`own_images`); a project adds its own and calls `parse_test`. `query` is the help of --query.
    """
    parser = ArgumentParser(prog=script, description=description, allow_abbrev=False)
    parser.add_argument(
        "--checkpoint", "--weights", required=needs_checkpoint, help="a file, or a log folder (its newest checkpoint)"
    )
    add_test_flags(parser)
    group = parser.add_argument_group("your own images", "folders of images, searched in depth; no data set is needed")
    group.add_argument("--query", metavar="PATH", help=query)
    group.add_argument("--gallery", metavar="PATH", help="folder of images to rank for each query")
    group.add_argument("--gallery-features", metavar="PATH", help="a gallery that --export-features described before")
    group.add_argument("--top", type=int, default=100, metavar="N", help="ranks a query in ranking.csv; 0: all")
    group.add_argument(
        "--export-features", metavar="PATH", help="write PATH/features.npy, .jsonl, .json, or PATH if it ends in .npy"
    )
    group.add_argument("--export", metavar="FILE.pt2", help="write the network as a program for torch.export.load")
    return parser


def parse_test(parser: ArgumentParser, argv: list[str] | None = None, folder: Callable | None = None) -> Namespace:
    """Parse argv of a test.py or of a script that draws figures; a data set has its canonical name from here on.

    folder(args): the folder that --query names, where the flag has other meanings too.
    """
    args = parser.parse_args(commandline.words(argv))
    try:
        if getattr(args, "dataset", None):
            args.dataset = datasets.canonical(args.dataset)
        own = vars(args) | ({"query": folder(args)} if folder else {})
    except ValueError as error:
        parser.error(str(error))
    if "gallery" in own:
        check_own_images(parser, Namespace(**own))
    return args


def of_test(args: Namespace, trained: dict, *more: str) -> Namespace:
    """The flags `trained` of a checkpoint's training, with the data and the execution that those of a test.py name
    instead; `more`: further flags that win where they are given.
    """
    given = {key: getattr(args, key, None) for key in ("dataset", "data_dir", "synthetic", *more)}
    given = {key: value for key, value in given.items() if value is not None}
    here = {key: getattr(args, key) for key in ("workers", "cache", "cache_dir", "amp")}
    return Namespace(**{**trained, **given, **here, **({"synthetic": None} if args.real else {}), "compile": False})


def check_own_images(parser: ArgumentParser, args: Namespace) -> None:
    """End the process with one sentence for flags for one's own images that do not fit together."""
    described = args.gallery_features
    wrong = {
        "--gallery and --gallery-features name two galleries; give one": args.gallery and described,
        "--query PATH needs --gallery PATH or --gallery-features PATH": args.query and not (args.gallery or described),
        "--gallery-features PATH needs --query PATH": described and not args.query,
        "--export-features describes --gallery, and that of --gallery-features is described; leave one out": (
            described and args.export_features
        ),
        "--gallery PATH needs --query PATH, or --export-features PATH to describe one folder": (
            args.gallery and not (args.query or args.export_features)
        ),
        f"--export {args.export}: the name must end in .pt2": args.export and not args.export.endswith(".pt2"),
        f"--top must be at least 0, not {args.top}": args.top < 0,
    }
    for message in (message for message, holds in wrong.items() if holds):
        parser.error(message)


# These may differ between the lives of one run; every other flag is part of the method.
RUN_FLAGS = set(
    "data_dir cache cache_dir workers eval_period row logs_dir results_dir resume compile deterministic".split()
)


PLACES = {"data_dir", "cache_dir", "logs_dir", "results_dir"}  # of one machine: not in result files
WORDS = {"none", "imagenet", "download"}  # values of --weights and its like that are no paths


def add_variant(add: Callable, rules: dict) -> None:
    """--variant KEY=VALUE ..., also repeated or after --row: a key given again takes the later value, others stay."""
    known = ", ".join(f"{key}={'|'.join(rule)}" if isinstance(rule, tuple) else key for key, rule in rules.items())
    add("--variant", action=_Merge, nargs="+", default=[], metavar="KEY=VALUE", help=f"rare switches: {known}")


class _Merge(Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, merged(getattr(namespace, self.dest), values))


def merged(items: list[str], later: list[str]) -> list[str]:
    """KEY=VALUE items of both, sorted, one a key: the last."""
    return sorted({item.partition("=")[0]: item for item in [*items, *later]}.values())


def variants(items: list[str], rules: dict) -> dict:
    """What `--variant KEY=VALUE ...` chooses, by key, with defaults for the rest.

    A rule is a tuple of words, the default first, or a default of the type that values are turned into.
    Raises: ValueError for an unknown key or value, with all that are known.
    """
    chosen = {key: rule[0] if isinstance(rule, tuple) else rule for key, rule in rules.items()}
    for item in items:
        key, _, value = item.partition("=")
        rule = rules.get(key)
        try:
            chosen[key] = rule[rule.index(value)] if isinstance(rule, tuple) else type(rule)(value)
        except (ValueError, TypeError) as error:
            known = ", ".join(f"{k}={'|'.join(v) if isinstance(v, tuple) else v}" for k, v in rules.items())
            raise ValueError(f"--variant {item} is unknown; known are {known}") from error
    return chosen


def method_flags(args: dict) -> dict:
    """The flags that define a training, files by content, without seed and without the choice of synthetic data."""
    left_out = RUN_FLAGS | {"seed", "synthetic", "script", "contents"}
    return {k: v for k, v in {**args, **args.get("contents", {})}.items() if k not in left_out}


def compared(stored: dict, now: dict) -> tuple[dict, dict]:
    """The flags of two runs for comparison: files by content where it is known of both, else as they were given."""
    both = stored.get("contents", {}).keys() & now.get("contents", {}).keys()
    first, second = ({**args, **{key: args["contents"][key] for key in both}} for args in (stored, now))
    return {k: v for k, v in first.items() if k != "contents"}, {k: v for k, v in second.items() if k != "contents"}


def contents(args: dict, files: tuple[str, ...], words: set[str]) -> dict:
    """Those of the flags `files` that name something on this disk, with its `content` in the place of its path.

    This is the one rule for paths in a method: what a file holds is part of it, where it lies is not. A value is a
    path, KEY=path, or a list of such; `words` are values that only look like paths.
    """

    def known(value):
        if isinstance(value, list):
            return [known(item) for item in value]
        key, _, path = str(value).partition("=")
        if str(value) in words | WORDS:
            return value
        if whole := content(Path(str(value))):
            return whole
        part = content(Path(path)) if path else None
        return f"{key}={part}" if part else value

    given = {name: args[name] for name in files if args.get(name)}
    return {name: known(value) for name, value in given.items() if known(value) != value}


def content(path: Path) -> str | None:
    """A digest of a file's bytes, of a log folder's newest checkpoint, or of the names and sizes in another folder.

    None for what cannot be read.
    """
    try:
        if path.is_dir() and (checkpoint := runfiles.newest(path)):
            path = checkpoint
        if path.is_dir():
            return f"folder:{base.digest({str(f) for f in path.rglob('*') if f.is_file()}, path)[:16]}"
        status = path.stat()
        return f"file:{_digest(path.resolve(), status.st_size, status.st_mtime_ns)}"
    except OSError:
        return None


@functools.lru_cache
def _digest(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]


def parse(
    parser: ArgumentParser,
    project: str,
    argv: list[str] | None = None,
    complete=None,
    files: tuple[str, ...] = ("weights",),
) -> Namespace:
    """Parse argv with the defaults of `--row`; `complete(args)` fills in defaults that depend on other flags.

    A data set has its canonical name from here on, so that `-d Market1501` is `-d market`. A run whose method flags
    equal a row's takes that row's name, any other, also a row with changed flags, is `custom-<hash>`; the flags `files`
    count by what lies at their paths (args.contents, see `contents`).
    Exits with status 2 and one sentence for unknown rows and flags.
    """
    argv, rows = commandline.words(argv), records.load_rows(ROOT / project)
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--row")
    name = finder.parse_known_args(argv)[0].row
    if name is not None and name not in rows:
        parser.error(records.unknown_row(project, name, rows))
    script = Path(parser.prog).name

    def of_row(name: str) -> list[str]:
        return commandline.words(shlex.split(rows[name].get("args", "")))

    def completed(words: list[str]) -> Namespace:
        args = parser.parse_args(words)
        if getattr(args, "dataset", None):
            args.dataset = datasets.canonical(args.dataset)
        args = complete(args) if complete else args
        if found := contents(vars(args), files, set(rows)):
            args.contents = found
        return args

    try:
        args = completed((of_row(name) if name else []) + argv)
    except ValueError as error:
        parser.error(str(error))
    own = [key for key, row in rows.items() if row.get("script", "train.py") == script]
    args.row = _row_of(args, own, lambda name: completed(of_row(name)))
    return args


def answer(parse_args: Callable[[], Namespace]) -> Namespace:
    """The flags of this command, before torch is loaded: help, wrong flags and missing data are said at once.

    Exits with status 1 and one sentence where a checkpoint that the flags name is not there, or a real data set does
    not lie under --data-dir.
    """
    args = parse_args()
    try:
        checkpoints = getattr(args, "checkpoint", None) or []
        for path in [checkpoints] if isinstance(checkpoints, str) else checkpoints:
            runfiles.checkpoint(path)
        if (gallery := getattr(args, "gallery", None)) and not Path(gallery).exists():
            raise FileNotFoundError(f"--gallery {gallery}: no such folder or image")
        for name, size in (("dataset", "synthetic"), ("source", "source_synthetic")):
            given = getattr(args, name, None)
            rendered = getattr(args, size, None) or getattr(args, "synthetic", None) or not getattr(args, "real", True)
            if given in datasets.NAMES and args.data_dir and not rendered:
                datasets.expect(given, args.data_dir)
    except (FileNotFoundError, OSError) as error:
        sys.exit(f"error: {error}")
    return args


def _row_of(args: Namespace, rows: list[str], args_of: Callable[[str], Namespace]) -> str:
    """The row whose method flags are those of args, --row's first, so that no row's result comes from other flags."""
    wanted = method_flags(vars(args))
    for name in sorted(rows, key=lambda name: name != args.row):
        if method_flags(vars(args_of(name))) == wanted:
            return name
    return f"custom-{records.digest(wanted)}"
