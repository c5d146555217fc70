"""What a run reads: the data set its flags name, written first if synthetic, and its decoded images."""

import json
import operator
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from common import datasets, evaluation, images, log_folder, processes, synthetic
from common.datasets import base
from common.runtime import Run

MARKET_PROTOCOL = {"ap_rule": "mean of precision at the hits", "gallery_draws": 1, "re_ranking": False}


def dataset(run: Run, name: str, **options) -> datasets.Dataset:
    """The data set under --data-dir; with --synthetic, under <data-dir>/synthetic-<size>, written there on first use.

    Its identity goes into run.data, so that no checkpoint of the run is continued with other images. Collective.
    Raises: FileNotFoundError or ValueError of datasets.load.
    """
    with processes.rank_zero_first(run):
        folder, size = _folder(run), run.args["synthetic"]
        if size:
            synthetic.write(name, folder, size=size, workers=run.args["workers"])
        data = datasets.load(name, str(folder), **options)
    run.data[data_name(data)] = processes.of_rank_zero(run, lambda: identity(data))
    run.own_data += [data.name] if published(data) is False else []
    processes.say(run, data.statistics())
    return data


def _folder(run: Run) -> Path:
    size = run.args["synthetic"]
    return Path(run.args["data_dir"]) / f"synthetic-{size}" if size else Path(run.args["data_dir"])


def trained_on(
    run: Run,
    data: datasets.Dataset,
    trained: dict,
    here: dict | None = None,
    there: dict | None = None,
    person: Callable[[datasets.Sample], object] = operator.attrgetter("pid"),
) -> bool:
    """Whether a network that is to be measured on `data` was trained, by the flags `trained`, on this data set.

    here, there: the options with which the test and the training load the data set, where it has several splits;
    person: what tells people apart in all of them.
    Raises: ValueError if people of query or gallery were trained with.
    """
    own, size = _size(data_name(data)), _size(trained.get("data_name", "")) or trained["synthetic"] or ""
    if datasets.canonical(trained["dataset"]) != data.name or bool(size) != bool(own):
        return False
    if size != own:
        raise ValueError(
            f"{data.root}: rendered sets of all sizes show the same people, so some of these were trained with; "
            f"measure with --synthetic {size}, as in the training"
        )
    if here != there:
        _check_people(run, data, here, there, person)
    return True


def _check_people(run: Run, data: datasets.Dataset, here: dict, there: dict, person: Callable) -> None:
    """Raises ValueError if people of query or gallery are training people of the same data set loaded with `there`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its counts were told in the training
        try:
            seen = {person(s) for s in datasets.load(data.name, str(_folder(run)), **there).train}
        except FileNotFoundError:  # the other split is not on this disk
            return
    test = {person(s) for s in data.query + data.gallery if s.pid != -1}
    if both := test & seen:
        now, then = (", ".join(f"--{key} {value}" for key, value in options.items()) for options in (here, there))
        raise ValueError(
            f"{data.name} {now}: {len(both)} of the {len(test)} people of query and gallery were trained with, as the "
            f"network comes from {then}; measure with that, or give a network of {now}"
        )


def _size(name: str) -> str:
    """The size of rendered people in a data set's name; "" for real ones."""
    return name.partition("-synthetic-")[2]


def data_name(data: datasets.Dataset) -> str:
    """`market`, or `market-synthetic-small` for synthetic people: the folder of this data's logs and results."""
    if data.kind == "real":
        return data.name
    return f"{data.name}-synthetic-{_stamp(data)['size']}"


def _stamp(data: datasets.Dataset) -> dict:
    """Size, seed and version of the renderer that wrote a synthetic data set."""
    return json.loads((Path(data.root) / "SYNTHETIC").read_text(encoding="utf-8"))


def identity(data: datasets.Dataset) -> dict:
    """What names the images wherever they lie: of rendered ones, whose bytes differ between machines, what the renderer
    was told; else a digest of their names and sizes.
    """
    named = _stamp(data) if data.kind == "synthetic" else {"names_and_sizes": data.digest()[:16]}
    return {"images": sum(len(part) for part in (data.train, data.query, data.gallery)), **named}


def published(data: datasets.Dataset) -> bool | None:
    """Whether a real data set has the published counts; None where none are published."""
    return not data.differences() if data.published else None


def describe(data: datasets.Dataset) -> dict:
    """The `data` entry of a result file."""
    samples = [*data.train, *data.query, *data.gallery]
    return {
        "name": data_name(data),
        "kind": data.kind,
        "images": len(samples),
        "ids": count_ids(data),
        "cams": len({s.camid for s in samples}),
        "digest": data.digest(),
        **({"rendered": _stamp(data)} if data.kind == "synthetic" else {"published": published(data)}),
    }


def count_ids(data: datasets.Dataset) -> int:
    """People of a data set, without junk and distractors.

    Those of training and test are other people, whether or not a data set (RegDB) numbers both from 0.
    """
    parts = (data.train, [*data.query, *data.gallery])
    return sum(len({s.pid for s in part if s.pid != -1}) for part in parts) - base.zero_is_distractor(data)


def open_images(
    run: Run, samples: list, height: int, width: int, name: str, interpolation: str = "bicubic"
) -> images.ImageStore:
    """The decoded images of the samples at (height, width), uint8; see images.open_images."""
    with processes.rank_zero_first(run):
        return images.open_images(
            [s.path for s in samples],
            height,
            width,
            interpolation=interpolation,
            cache=run.args["cache"],
            cache_dir=run.args["cache_dir"],
            device=run.device,
            workers=run.args["workers"],
            name=name,
        )


def extract(
    run: Run, model: torch.nn.Module, store: images.ImageStore, batch_size: int = 128, flip: bool = False
) -> torch.Tensor:
    """Eval-mode features (N, D) of a store on every rank; see evaluation.extract."""
    return evaluation.extract(
        log_folder.bare(model),
        store,
        device=run.device,
        batch_size=batch_size,
        flip=flip,
        amp=run.args["amp"],
        rank=run.rank,
        world_size=run.world_size,
        workers=run.args["workers"],
    )


def rank_metrics(data: datasets.Dataset, feats: torch.Tensor, metric: str = "euclidean") -> evaluation.RankMetrics:
    """Market-rule metrics of features (Q + G, D) in the order of data.query + data.gallery."""
    q = len(data.query)
    return evaluation.rank_metrics(feats[:q], feats[q:], *_ids(data), metric=metric)


def re_ranked(data: datasets.Dataset, feats: torch.Tensor) -> evaluation.RankMetrics:
    """`rank_metrics` after k-reciprocal re-ranking, which no paper here uses."""
    from common import jaccard  # with scipy, which trainings need not load

    q = len(data.query)
    return evaluation.rank_metrics_from_distances(jaccard.re_rank(feats[:q], feats[q:]), *_ids(data))


def _ids(data: datasets.Dataset) -> list[list[int]]:
    """pids of query and gallery, then their camids."""
    return [[getattr(s, key) for s in part] for key in ("pid", "camid") for part in (data.query, data.gallery)]
