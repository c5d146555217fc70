"""CUHK03 in the new protocol, 767 training and 700 test ids (Li et al., CVPR 2014; Zhong et al., CVPR 2017).

Two trees are read: cuhk03-np with {detected,labeled}/{bounding_box_train,query,bounding_box_test} and names
0001_c1_1.png; and the images extracted from cuhk-03.mat of cuhk03_release, images_{detected,labeled}/1_001_1_01.png
(camera pair, person, view, image), beside the lists cuhk03_new_protocol_config_{detected,labeled}.mat. Both give the
same pids, and the two views as cameras 0 and 1.
"""

import re
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from common.datasets.base import BOX_FOLDERS, BOXES, Dataset, Sample, assemble, find_root, refuse, scan_boxes

TREES = ("cuhk03-np", "cuhk03_np", "cuhk03", "CUHK03")
SOURCE = "get CUHK03-NP (new protocol) from the person-re-ranking repository of Zhong et al. and put it there"
PATTERN = re.compile(r"(-1|\d+)_c(\d+)(?!\d)")
ORIGINAL = re.compile(r"\d+_\d+_([12])_\d+\.")
PUBLISHED = {
    "detected": {"train": (7365, 767, 2), "query": (1400, 700, 2), "gallery": (5332, 700, 2)},
    "labeled": {"train": (7368, 767, 2), "query": (1400, 700, 2), "gallery": (5328, 700, 2)},
}


def load(data_dir: str | Path, split: str = "detected") -> Dataset:
    """CUHK03, boxes of the detector (split="detected") or drawn by hand (split="labeled").

    data_dir may also be the folder of the split itself.
    """
    if split not in PUBLISHED:
        raise ValueError(f"cuhk03: split {split!r} is not one of {', '.join(PUBLISHED)}")
    boxes = tuple(f"{split}/{folder}" for folder in BOXES)
    lists = tuple((list_name(split), f"{folder}images_{split}") for folder in ("", "cuhk03_release/"))
    root, layout = find_root("cuhk03", data_dir, TREES, (boxes, *lists, BOXES), SOURCE)
    if layout in lists:
        return assemble("cuhk03", root, read_lists(root / layout[0], root / layout[1]), PUBLISHED[split])
    other = root.resolve().name
    if layout == BOXES and other in PUBLISHED and other != split:
        raise ValueError(f"cuhk03: {root} holds the {other} boxes, not {split!r} as asked; give the folder above it")
    return assemble("cuhk03", root, scan_boxes(root / split if layout == boxes else root, PATTERN), PUBLISHED[split])


def list_name(split: str) -> str:
    """File name of the new protocol's list."""
    return f"cuhk03_new_protocol_config_{split}.mat"


def read_lists(file: Path, folder: Path) -> dict[str, list[Sample]]:
    """The three lists of the new protocol over the original images. The .mat file counts from 1 and holds plain
    arrays."""
    lists = loadmat(file, variable_names=["filelist", "labels", "train_idx", "query_idx", "gallery_idx"])
    names = [str(np.asarray(name).reshape(-1)[0]) for name in lists["filelist"].reshape(-1)]
    pids = lists["labels"].reshape(-1)
    refuse(file, [name for name in names if not ORIGINAL.match(name)], "not a name like 1_001_1_01.png")
    chosen = {part: lists[f"{part}_idx"].reshape(-1).astype(np.int64) - 1 for part in BOX_FOLDERS}
    present = {file.name for file in folder.iterdir()}
    missing = [names[i] for part in chosen.values() for i in part if names[i] not in present]
    refuse(folder, missing, f"listed in {file} but not there")
    return {
        part: [Sample(str(folder / names[i]), int(pids[i]), int(ORIGINAL.match(names[i])[1]) - 1) for i in indices]
        for part, indices in chosen.items()
    }
