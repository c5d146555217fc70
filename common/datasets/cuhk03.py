"""CUHK03 in the new protocol, 767 training and 700 test ids (Li et al., CVPR 2014; Zhong et al., CVPR 2017).

Two trees are read: cuhk03-np with {detected,labeled}/{bounding_box_train,query,bounding_box_test} and names 0001_c1_1.png;
and the images extracted from cuhk03_release, images_{detected,labeled}/1_001_1_01.png (camera pair, person, view, image), beside
the lists cuhk03_new_protocol_config_{detected,labeled}.mat. Both give the same pids, and the two views as cameras 0 and 1.
"""

import re
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from common.datasets.base import BOX_FOLDERS, Dataset, Sample, assemble, find_root, refuse, remedy, scan_boxes

TREES = ("cuhk03-np", "cuhk03_np", "cuhk03")
SOURCE = "get CUHK03-NP (new protocol) from the person-re-ranking repository of Zhong et al. and put it there"
PATTERN = re.compile(r"(-1|\d+)_c(\d+)(?!\d)")
ORIGINAL = re.compile(r"\d+_\d+_([12])_\d+\.")
PUBLISHED = {"detected": {"train": (7365, 767, 2), "query": (1400, 700, 2), "gallery": (5332, 700, 2)},
             "labeled": {"train": (7368, 767, 2), "query": (1400, 700, 2), "gallery": (5328, 700, 2)}}


def load(data_dir: str | Path, split: str = "detected") -> Dataset:
    """CUHK03, boxes of the detector (split="detected") or drawn by hand (split="labeled")."""
    if split not in PUBLISHED:
        raise ValueError(f"cuhk03: split {split!r} is not one of {', '.join(PUBLISHED)}")
    original = [root for root in original_roots(data_dir) if list_file(root, split).exists()]
    folders = tuple(f"{split}/{folder}" for folder in BOX_FOLDERS.values())
    bare = Path(data_dir)  # may also be the folder of one split
    if all((bare / folder).exists() for folder in BOX_FOLDERS.values()):
        if bare.resolve().name in PUBLISHED and bare.resolve().name != split:
            raise ValueError(f"cuhk03: {bare} holds the {bare.resolve().name} boxes, asked for split {split!r}; give its parent")
        return assemble("cuhk03", bare, scan_boxes(bare, PATTERN), PUBLISHED[split])
    complete = any((Path(data_dir) / tree / folders[0]).exists() for tree in (*TREES, "."))
    if original and not complete:
        return assemble("cuhk03", original[0], read_lists(original[0], split), PUBLISHED[split])
    root = find_root("cuhk03", data_dir, TREES, folders, SOURCE)
    return assemble("cuhk03", root, scan_boxes(root / split, PATTERN), PUBLISHED[split])


def original_roots(data_dir: str | Path) -> list[Path]:
    """Folders that may hold the lists of the new protocol for the original images."""
    bases = [Path(data_dir) / tree for tree in ("cuhk03", "CUHK03")] + [Path(data_dir)]
    return [folder for base in bases for folder in (base, base / "cuhk03_release")]


def list_file(root: Path, split: str) -> Path:
    """Path of the new protocol's list."""
    return root / f"cuhk03_new_protocol_config_{split}.mat"


def read_lists(root: Path, split: str) -> dict[str, list[Sample]]:
    """The three lists of the new protocol over the original images. The .mat file counts from 1 and holds plain arrays."""
    folders = [base / f"images_{split}" for base in (root, root / "cuhk03_release")]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"cuhk03: {list_file(root, split)} is there but no images_{split} beside it (cuhk-03.mat itself is not "
                                f"read: extract its images to names like 1_001_1_01.png); {remedy('cuhk03', SOURCE)}")
    lists = loadmat(list_file(root, split), variable_names=["filelist", "labels", "train_idx", "query_idx", "gallery_idx"])
    names = [str(np.asarray(name).reshape(-1)[0]) for name in lists["filelist"].reshape(-1)]
    pids = lists["labels"].reshape(-1)
    refuse(list_file(root, split), [name for name in names if not ORIGINAL.match(name)], "not a name like 1_001_1_01.png")
    chosen = {part: lists[f"{part}_idx"].reshape(-1).astype(np.int64) - 1 for part in BOX_FOLDERS}
    missing = [names[i] for part in chosen.values() for i in part if not (folder / names[i]).exists()]
    refuse(folder, missing, f"listed in {list_file(root, split).name} but not there")
    return {part: [Sample(str(folder / names[i]), int(pids[i]), int(ORIGINAL.match(names[i])[1]) - 1) for i in indices]
            for part, indices in chosen.items()}
