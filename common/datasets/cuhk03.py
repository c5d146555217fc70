"""CUHK03 in the new protocol, 767 training and 700 test ids (Li et al., CVPR 2014; Zhong et al., CVPR 2017).

Two trees are read: cuhk03-np with {detected,labeled}/{bounding_box_train,query,bounding_box_test} and names
0001_c1_1.png; and the images extracted from cuhk-03.mat of cuhk03_release, images_{detected,labeled}/1_001_1_01.png
(camera pair, person, view, image), with the lists cuhk03_new_protocol_config_{detected,labeled}.mat, both in
cuhk03_release or beside it. Both trees give the same pids, and the two views as cameras 0 and 1.
"""

import re
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from common.datasets.base import BOX_FOLDERS, BOXES, Dataset, Sample, assemble, find_root, refuse, scan_boxes
from common.datasets.lists import HEAD, foreign

RELEASE = ("", "cuhk03_release/")  # where the lists, and where the images of the original archive may lie
ARCHIVE = "cuhk-03.mat"
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
    lists = tuple((f"{a}{list_name(split)}", f"{b}images_{split}") for b in RELEASE for a in RELEASE)
    try:
        root, layout = find_root("cuhk03", data_dir, TREES, (boxes, *lists, BOXES), SOURCE)
    except FileNotFoundError as error:
        archive = original_archive(data_dir)
        raise FileNotFoundError(f"{archive}{error}") from error
    if layout in lists:
        return assemble("cuhk03", root, read_lists(root / layout[0], root / layout[1]), PUBLISHED[split])
    other = root.resolve().name
    if layout == BOXES and other in PUBLISHED and other != split:
        raise ValueError(f"cuhk03: {root} holds the {other} boxes, not {split!r} as asked; give the folder above it")
    return assemble("cuhk03", root, scan_boxes(root / split if layout == boxes else root, PATTERN), PUBLISHED[split])


def original_archive(data_dir: str | Path) -> str:
    """What to do with the authors' cuhk-03.mat where only that lies there, as the start of an error message."""
    for root in [Path(data_dir) / tree for tree in TREES] + [Path(data_dir)]:
        for folder in RELEASE:
            if (root / folder / ARCHIVE).is_file():
                return (
                    f"cuhk03: {root / folder / ARCHIVE} is HDF5, which needs a package that is not among ours (h5py); "
                    f"unpack its images beside it as README, Datasets, says, or take CUHK03-NP. "
                )
    return ""


def list_name(split: str) -> str:
    """File name of the new protocol's list."""
    return f"cuhk03_new_protocol_config_{split}.mat"


def read_lists(file: Path, folder: Path) -> dict[str, list[Sample]]:
    """The three lists of the new protocol over the original images. The .mat file counts from 1 and holds plain
    arrays. Raises: ValueError naming the file for another format, other variables or numbers that do not fit."""
    lists = matlab(file, ["filelist", "labels", *(f"{part}_idx" for part in BOX_FOLDERS)])
    names = [str(np.asarray(name).reshape(-1)[0]) if np.size(name) else "" for name in lists["filelist"].reshape(-1)]
    refuse(file, [name for name in names if not ORIGINAL.match(name)], "not a name like 1_001_1_01.png", "get it again")
    pids = whole_numbers(file, "labels", lists, len(names))
    if len(pids) != len(names):
        raise ValueError(f"{file}: {len(pids)} labels for {len(names)} images; get it again")
    chosen = {part: whole_numbers(file, f"{part}_idx", lists, len(names)) - 1 for part in BOX_FOLDERS}
    present = {file.name for file in folder.iterdir()}
    missing = [names[i] for part in chosen.values() for i in part if names[i] not in present]
    refuse(folder, missing, f"listed in {file} but not there", "the copy is incomplete")
    return {
        part: [Sample(str(folder / names[i]), int(pids[i]), int(ORIGINAL.match(names[i])[1]) - 1) for i in indices]
        for part, indices in chosen.items()
    }


def whole_numbers(file: Path, name: str, lists: dict[str, np.ndarray], most: int) -> np.ndarray:
    """A variable of the lists as int64 (n,), all in 1..most. Raises: ValueError naming file and variable."""
    values = lists[name].reshape(-1)
    if values.dtype.kind not in "uif" or not ((values >= 1) & (values <= most) & (values % 1 == 0)).all():
        raise ValueError(f"{file}: {name} does not number its {most} images; get it again")
    return values.astype(np.int64)


def matlab(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """The named variables of a .mat file of MATLAB 5 to 7. Raises: ValueError naming the file and what is wrong."""
    with open(path, "rb") as file:
        kind = foreign(file.read(HEAD))
    if "HDF5" in kind:
        raise ValueError(
            f"{path} is {kind} and needs a package that is not among ours (h5py); save it anew from MATLAB with "
            f"save(..., '-v7'), or get the original file"
        )
    if kind and kind != "a MATLAB file":
        raise ValueError(f"{path} is {kind}, expected a MATLAB file; get it again")
    try:
        found = loadmat(path, variable_names=names)
    except Exception as error:  # loadmat raises whatever its parsing of broken bytes runs into
        raise ValueError(f"{path} is not readable as a MATLAB file ({error}); get it again") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{path} has no variable {', '.join(missing)}; it is another file than its name says")
    return {name: found[name] for name in names}
