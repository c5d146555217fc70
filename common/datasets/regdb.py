"""RegDB (Nguyen et al., Person Recognition System Based on a Combination of Body Images, Sensors 2017).

Tree: Visible/<id>/*.bmp, Thermal/<id>/*.bmp and idx/{train,test}_{visible,thermal}_{1..10}.txt with lines
`relative/path label`. 412 people with ten images in each modality; each of the ten splits holds 206 + 206 of them.
camid 0 is visible, 1 thermal.
"""

from pathlib import Path

import numpy as np

from common.datasets import files, lists
from common.datasets.base import Dataset, Sample, find_root, kind_of

TREES = ("RegDB", "regdb")
LAYOUT = ("Visible", "Thermal", "idx")
SOURCE = "ask its authors for RegDB (Dongguk University, DBPerson-Recog-DB1) and put it there with its idx folder"
SPLITS = tuple(range(1, 11))
MODALITIES = {"visible": "rgb", "thermal": "ir"}
PUBLISHED = {"train": (4120, 206, 2), "query": (2060, 206, 1), "gallery": (2060, 206, 1)}


def load(data_dir: str | Path, split: int = 1) -> Dataset:
    """One split of RegDB: train holds both modalities, query the visible and gallery the thermal test images.

    A model belongs to its split: another split's test people are among its training people.
    Raises: FileNotFoundError for missing folders; ValueError for a wrong split or index file.
    """
    if split not in SPLITS:
        raise ValueError(f"regdb: split {split} is not one of 1..10")
    root, _ = find_root("regdb", data_dir, TREES, (LAYOUT,), SOURCE)
    parts = {(part, word): index_file(root, part, word, split) for part in ("train", "test") for word in MODALITIES}
    for part in ("train", "test"):
        visible, thermal = ({s.pid for s in parts[part, word]} for word in MODALITIES)
        if visible != thermal:
            lonely = sorted(visible ^ thermal)
            raise ValueError(
                f"regdb: split {split}, {part}: {len(lonely)} ids have images in one modality only: "
                f"{lonely[:8]}; the index files do not belong together"
            )
    files = [{s.path for word in MODALITIES for s in parts[part, word]} for part in ("train", "test")]
    if files[0] & files[1]:
        raise ValueError(
            f"regdb: split {split}: {len(files[0] & files[1])} images are in train and in test, first "
            f"{min(files[0] & files[1])}; the index files do not belong together"
        )
    data = Dataset(
        "regdb",
        root,
        kind_of(root),
        parts["train", "visible"] + parts["train", "thermal"],
        parts["test", "visible"],
        parts["test", "thermal"],
        PUBLISHED,
    )
    data.train.sort(key=lambda s: Path(s.path).relative_to(root).as_posix())
    data.check()
    return data


def index_file(root: Path, part: str, word: str, split: int) -> list[Sample]:
    """Samples of one index file, sorted by path. Raises: FileNotFoundError, ValueError naming file and line."""
    path = root / "idx" / f"{part}_{word}_{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"regdb: no {path}; the ten splits are idx/{part}_{word}_1.txt to _10.txt")
    samples, camid = [], int(word == "thermal")
    for number, line in lists.lines(path):
        found = lists.path_and_label(line)
        if found is None or not files.is_image(found[0]):
            raise ValueError(f"regdb: {path} line {number} is {line[:80]!r}, expected `relative/path.bmp label`")
        name, label = found
        if name.split("/")[0].lower() != word:
            raise ValueError(f"regdb: {path} line {number} names {name}, expected an image under {word.title()}/")
        image = lists.place(root, name)
        if not image.is_file():
            raise ValueError(f"regdb: {path} line {number} names {name}, which is not under {root}")
        samples.append(Sample(str(image), label, camid, MODALITIES[word]))
    if not samples:
        raise ValueError(f"regdb: {path} is empty")
    return sorted(samples, key=lambda s: Path(s.path).relative_to(root).as_posix())


def metrics(query, gallery, query_pids, gallery_pids):
    """RankMetrics without a camera rule, cosine similarity; either modality may be the query."""
    from common import (
        evaluation,  # protocols import torch when they run, so that a missing data set is said before it loads
    )

    cameras = np.zeros(len(query_pids), np.int64), np.ones(len(gallery_pids), np.int64)
    return evaluation.rank_metrics(
        query, gallery, np.asarray(query_pids), np.asarray(gallery_pids), *cameras, metric="cosine"
    )
