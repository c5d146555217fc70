"""Data sets of person re-identification, read from their authors' own trees.

    data = datasets.load("market", "data")        # Dataset(name, root, kind, train, query, gallery)
    python -m common.datasets market --data-dir data          # print its statistics
    python -m common.datasets check market --data-dir data    # open every image

A data set is one module here with load(data_dir, **options) -> Dataset; adding its name to NAMES is all it takes.
"""

import contextlib
import importlib
import inspect
import warnings
from pathlib import Path

from common.datasets.base import Dataset, Sample, labels

__all__ = ["Dataset", "Sample", "canonical", "expect", "labels", "load", "of_market_rule"]

NAMES = {  # canonical name -> other names
    "market": ("market1501", "market-1501"),
    "duke": ("dukemtmc", "dukemtmcreid", "dukemtmc-reid"),
    "cuhk03": ("cuhk03-np", "cuhk03_np"),
    "msmt17": ("msmt", "msmt17_v1", "msmt17_v2"),
    "prcc": (),
    "person_crops": ("prsnet_pretrain",),
    "sysu": ("sysu-mm01", "sysu_mm01"),
    "regdb": (),
    "luperson": (),
}
OWN_RULES = {  # not measured by the rule of Market-1501
    "prcc": "its queries in the same clothes and in others are measured apart",
    "sysu": "its queries are infrared and its galleries drawn",
    "regdb": "its queries are of one modality and its gallery of the other",
    "person_crops": "nobody is named in it",
    "luperson": "nobody is named in it",
}


def canonical(name: str) -> str:
    """The name of the module that reads the data set called name (any case). Raises ValueError listing the known
    names."""
    wanted = name.lower()
    for known, others in NAMES.items():
        if wanted == known or wanted in others:
            return known
    raise ValueError(f"unknown data set {name!r}; known: {', '.join(NAMES)}")


def of_market_rule(name: str) -> str:
    """The canonical name of a data set that is measured by the rule of Market-1501. Raises: ValueError for others."""
    known = canonical(name)
    if known in OWN_RULES:
        others = ", ".join(other for other in NAMES if other not in OWN_RULES)
        raise ValueError(f"{known} has another protocol than Market-1501 ({OWN_RULES[known]}); choose from {others}")
    return known


def load(name: str, data_dir: str | Path = "data", **options) -> Dataset:
    """The data set called name, found under data_dir; options as the keyword arguments of its module's load().

    Raises: ValueError for unknown names, options, file names and for empty splits; FileNotFoundError with the trees
    tried.
    """
    name = canonical(name)
    module = importlib.import_module(f"common.datasets.{name}")
    known = list(inspect.signature(module.load).parameters)[1:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{name}: unknown option {', '.join(unknown)}; known: {', '.join(known) or 'none'}")
    return module.load(data_dir, **options)


def expect(name: str, data_dir: str | Path) -> None:
    """Raises what `load` would where none of the data set's folders lies under data_dir; else looks no further."""
    module = importlib.import_module(f"common.datasets.{canonical(name)}")
    if not any((Path(data_dir) / tree).exists() for tree in module.TREES):
        with contextlib.suppress(ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of data_dir itself as the data set; said, as errors, when it is loaded
            module.load(data_dir)
