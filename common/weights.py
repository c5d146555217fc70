"""What --weights names: none, imagenet, a file or log folder; and how its tensors find their places in a network.

    found = weights.read("lup_r50.pth", "resnet50")                # None for "none"
    taken, line = weights.fit(found, network.state_dict(), trunk)  # trunk: the network's name of a tensor -> ResNet's
    network.load_state_dict(taken, strict=False)

The forms that a file may have are in README.md, section Weights.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor

from common import checkpoints, runfiles

REMEDY = "give --weights a file in a form of README.md, Weights; or imagenet or none"
WRAPPERS = ("module", "_orig_mod")  # names that DistributedDataParallel and torch.compile add
HEAD = "classifier"  # part of the name of what belongs to the training people
MOMENTUM = re.compile(r"(^|[._])(ema|key|momentum|slow|target|teacher)[._]|_[km]\.")  # encoder_k., target_network., ...
PREFERRED = ("encoder_q", "online", "student", "visual")  # where a file has several complete trunks


class Found(NamedTuple):
    """The content of what --weights names."""

    source: str  # "imagenet" or the path of the file
    architecture: str  # of the wanted trunk, for messages
    tensors: dict[str, Tensor]  # by dotted names, which begin with outer keys such as state_dict
    args: dict  # the flags of the training, if it was one of ours
    remedy: str


class Place(NamedTuple):
    """Where a file has tensors of wanted names, and what it lacks there."""

    prefix: str
    wanted: list[str]
    missing: list[str]
    wrong: list[str]  # of another shape
    extra: list[str]  # beside the wanted ones: a deeper network

    def complete(self) -> bool:
        return bool(self.wanted) and not (self.missing or self.wrong or self.extra)


# ------------------------------------------------------------------------------------------------------------- reading
def read(
    source: Path | str, architecture: str, remedy: str = REMEDY, rename: Callable[[str], str] = str
) -> Found | None:
    """Found for "imagenet" (torchvision's IMAGENET1K_V1 of `architecture`), a file, or a log folder, which stands for
    its newest checkpoint; None for "none". `rename` turns the names of other people's files into ours.

    Raises: FileNotFoundError without the file or a network; ValueError for what is no file of tensors.
    """
    if str(source) == "none":
        return None
    if str(source) == "imagenet":
        content, path = imagenet(architecture), "imagenet"
    else:
        path = Path(source).expanduser()
        if path.is_dir():
            path = runfiles.newest(path) or path / "checkpoint_*.pt"
        content = checkpoints.load(path, "weights", remedy)
    tensors = {rename(name): value for name, value in flat(content)}
    if not tensors:
        raise ValueError(f"weights: {path} holds no state_dict (a mapping from names to tensors); {remedy}")
    args = content.get("args")
    return Found(str(path), architecture, tensors, args if isinstance(args, dict) else {}, remedy)


def flat(content, outer: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Dotted name and tensor of all tensors in nested mappings, without wrappers' names and optimisers' states."""
    for key, value in content.items() if isinstance(content, dict) else ():
        names = (*outer, *(name for name in str(key).split(".") if name not in WRAPPERS))
        if isinstance(value, Tensor):
            yield ".".join(names), value
        elif not str(key).startswith("optim"):
            yield from flat(value, names)


def imagenet(architecture: str) -> dict[str, Tensor]:
    """torchvision's IMAGENET1K_V1 state_dict, from its cache or from its server and checked against its hash.

    Raises: FileNotFoundError with the remedy.
    """
    choice = torchvision.models.get_model_weights(architecture)["IMAGENET1K_V1"]
    try:
        return choice.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # URLError, a wrong hash, or for a cut file in the cache one of a dozen others
        cached = Path(torch.hub.get_dir()) / "checkpoints" / choice.url.rpartition("/")[2]
        raise FileNotFoundError(
            f"cannot get torchvision's ImageNet weights of {architecture} ({checkpoints.reason(error)}); "
            + f"delete {cached}, which is damaged, and try again; or " * cached.exists()
            + f"download {choice.url} elsewhere and put it at {cached}, where torchvision looks; or pass it as "
            "--weights PATH, which makes the run a custom one that fills no cell of a table; or start from random "
            "weights: --weights none"
        ) from error


# ------------------------------------------------------------------------------------------------------------- fitting
def fit(found: Found, own: dict[str, Tensor], trunk: dict[str, str]) -> tuple[dict[str, Tensor], str]:
    """Tensors of a file by the names of a network, and the line that says what was taken and what was left.

    own: the network's state_dict; trunk: those of its names that belong to the trunk -> their names in a bare trunk.
    The trunk must be complete, BatchNorm's counters apart, under any prefix but a momentum copy's. The rest of the
    network is taken too where all of it is there; a classifier where it fits. Half precision becomes the network's.
    Raises: ValueError listing all that the trunk lacks.
    """
    rest = {key: key for key in own if key not in trunk}
    for parts in ([{key: key for key in own}], [trunk, rest], [trunk]):
        places = [locate(found.tensors, own, names) for names in parts]
        if all(place.complete() for place in places):
            break
    else:
        raise ValueError(complaint(found, own, trunk))
    taken, used = {}, {}
    for place, names in zip(places, parts):
        for key, name in names.items():
            value = found.tensors.get(place.prefix + name)
            if value is not None and fits(value, own[key]):
                taken[key], used[place.prefix + name] = value.reshape(own[key].shape).to(own[key].dtype), value.dtype
    what = "trunk" if parts[-1] is trunk or not rest else "network"
    halves = sorted({str(kind)[6:] for kind in used.values()} & {"float16", "bfloat16"})
    names = short(found.tensors)
    left = [name for full, name in names.items() if full not in used]
    fresh = [key for key in own if key not in taken and not is_counter(key)]
    return taken, (
        f"weights: {len(used)} tensors into the {what} from {found.source}"
        + f" under {places[0].prefix[:-1]}" * bool(places[0].prefix)
        + f", {' and '.join(halves)} widened" * bool(halves)
        + f"; {len(left)} left out: {compact(left, names.values(), 5)}" * bool(left)
        + f"; new: {compact(fresh, [key for key in own if not is_counter(key)], 8)}" * bool(fresh)
    )


def is_counter(name: str) -> bool:
    """Whether a tensor is BatchNorm's count of batches, which old files lack and no evaluation uses."""
    return name.endswith("num_batches_tracked")


def fits(value: Tensor, like: Tensor) -> bool:
    """Equal shapes, but for dimensions of 1: elsewhere (C,) may be (C, 1, 1), and a matrix a 1 x 1 convolution."""
    return value.numel() == like.numel() and value.squeeze().shape == like.squeeze().shape


def locate(tensors: dict[str, Tensor], own: dict[str, Tensor], names: dict[str, str], momentum: bool = False) -> Place:
    """Where the names of `names` (tensor of a network -> name) are most complete, momentum copies apart or alone."""
    like = {name: own[key] for key, name in names.items()}
    wanted = [name for name in like if HEAD not in name and not is_counter(name)]
    right = Counter()
    for full, value in tensors.items():
        words = full.split(".")
        for name in (".".join(words[place:]) for place in range(len(words))):
            prefix = full[: len(full) - len(name)]
            if name in like and bool(MOMENTUM.search(prefix)) == momentum:
                right[prefix] += fits(value, like[name]) and name in wanted

    def order(prefix: str):
        rank = [place for place, word in enumerate(PREFERRED) if word in prefix]
        return -right[prefix], rank or [len(PREFERRED)], len(prefix), prefix

    best = min(right, key=order, default="")
    there = {name: tensors.get(best + name) for name in wanted}
    missing = [name for name, value in there.items() if value is None]
    wrong = [name for name, value in there.items() if value is not None and not fits(value, like[name])]
    first = {name.partition(".")[0] for name in wanted}
    below = [full[len(best) :] for full in tensors if full.startswith(best)]
    extra = [n for n in below if n not in like and n.partition(".")[0] in first and HEAD not in n and not is_counter(n)]
    return Place(best, wanted, missing, wrong, extra)


def complaint(found: Found, own: dict[str, Tensor], trunk: dict[str, str]) -> str:
    """The sentence that says why a file has no complete trunk, and what to do."""
    copy, place = (locate(found.tensors, own, trunk, momentum) for momentum in (True, False))
    what = f"weights: {found.source} holds"
    if copy.complete():
        return f"{what} a {found.architecture} only as a momentum copy ({copy.prefix[:-1]}); {found.remedy}"
    if len(place.missing) == len(place.wanted):
        names = short(found.tensors).values()
        return f"{what} no {found.architecture}, but {compact(names, names, 8)}; {found.remedy}"
    text = f"{what} no complete {found.architecture}" + f" under {place.prefix[:-1]}" * bool(place.prefix)
    if place.missing:
        listed = compact(place.missing, place.wanted)
        text += f"; {len(place.missing)} of {len(place.wanted)} tensors missing: {listed}"
    if place.wrong:
        one = place.wrong[0]
        there, here = found.tensors[place.prefix + one], next(own[key] for key, name in trunk.items() if name == one)
        text += f"; {len(place.wrong)} of another shape: {compact(place.wrong, place.wanted)} "
        text += f"({one} is {tuple(there.shape)} instead of {tuple(here.shape)})"
    if place.extra:
        text += f"; {len(place.extra)} belong to a larger network: {compact(place.extra, place.wanted + place.extra)}"
    return f"{text}; {found.remedy}"


def short(names: Iterable[str]) -> dict[str, str]:
    """Names -> the same without the outer keys that all of them have."""
    names = list(names)
    cut = os.path.commonprefix(names).rfind(".") + 1
    return {name: name[cut:] for name in names}


def compact(names: Iterable[str], among: Iterable[str], limit: int | None = None) -> str:
    """All of `names` in few words, the first `limit` given: layer2.{0,1}.bn1.* is all that `among` has below those."""
    parts = grouped(names, among)
    return ", ".join(parts[:limit]) + " ..." * (len(parts) > (limit or len(parts)))


def grouped(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """See `compact`; first words with the same names below them are one part."""
    groups, everything = {}, branches(among)
    for word, below in branches(names).items():
        if below == [""]:
            text = ""
        elif len(below) == len(everything[word]) > 1:
            text = ".*"
        else:
            text = "." + braced(grouped(below, everything[word]))
        groups.setdefault(text, []).append(word)
    return [braced(words) + text for text, words in groups.items()]


def branches(names: Iterable[str]) -> dict[str, list[str]]:
    """First word -> what follows it, of dotted names."""
    found = {}
    for name in names:
        word, _, below = name.partition(".")
        found.setdefault(word, []).append(below)
    return found


def braced(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{{{','.join(words)}}}"


def tell(line: str) -> None:
    """Print on the first process."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(line, flush=True)
