"""MSMT17 (Wei et al., Person Transfer GAN to Bridge Domain Gap for Person Re-Identification, CVPR 2018).

Two trees are read: the authors' V1 (train, test) or V2 (mask_train_v2, mask_test_v2, blurred faces) with list_*.txt,
whose lines are "0000/0000_000_01_0303morning_0008_0.jpg 0": pid from the list, camera 01 from the name's third field;
and the re-layout bounding_box_{train,test}, query with names 0000_c1_0000.jpg that other repositories use. Training
and test pids both start at 0 and are different people; pid 0 is a person here, not a distractor.
"""

import re
from pathlib import Path

from common.datasets import lists
from common.datasets.base import BOXES, Dataset, Sample, assemble, find_root, refuse, scan_boxes

TREES = ("msmt17/MSMT17_V1", "msmt17/MSMT17_V2", "MSMT17_V1", "MSMT17_V2", "msmt17", "MSMT17")
SOURCE = "request MSMT17 from its authors (PKU, Wei et al., CVPR 2018) and put it there"
LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
LISTED = (("train", "test", *LISTS), ("mask_train_v2", "mask_test_v2", *LISTS))  # V1, V2
PATTERN = re.compile(r"(-1|\d+)_c(\d+)(?!\d)")
NAME = re.compile(r"(?:.*/)?[^/_]+_[^/_]+_(\d+)_[^/]*")  # of a listed image, with its camera
PUBLISHED = {"train": (32621, 1041, 15), "query": (11659, 3060, 15), "gallery": (82161, 3060, 15)}
PUBLISHED_WITHOUT_VAL = {**PUBLISHED, "train": (30248, 1041, 15)}


def load(data_dir: str | Path, combine: bool = True) -> Dataset:
    """MSMT17; combine joins the 2,373 validation images to the training images, as the published tables do.

    Raises: ValueError for combine=False on the re-layout, which does not say what was validation.
    """
    root, layout = find_root("msmt17", data_dir, TREES, (*LISTED, BOXES), SOURCE)
    if layout != BOXES:
        published = PUBLISHED if combine else PUBLISHED_WITHOUT_VAL
        return assemble("msmt17", root, read_lists(root, *layout[:2], combine), published)
    if not combine:
        raise ValueError(f"msmt17: {root} has no list_val.txt, so validation stays in; use the authors' own tree")
    return assemble("msmt17", root, scan_boxes(root, PATTERN), PUBLISHED)


def read_lists(root: Path, train: str, test: str, combine: bool) -> dict[str, list[Sample]]:
    """The three lists of Sample from the authors' list files."""
    training = read_list(root / "list_train.txt", root / train)
    if combine:
        training += read_list(root / "list_val.txt", root / train)
    return {
        "train": training,
        "query": read_list(root / "list_query.txt", root / test),
        "gallery": read_list(root / "list_gallery.txt", root / test),
    }


def read_list(file: Path, folder: Path) -> list[Sample]:
    """Samples of one list file. Raises ValueError naming lines that are not 'path pid' with a camera in the path's
    name."""
    samples, wrong = [], []
    for _, line in lists.lines(file):
        name, pid = lists.path_and_label(line) or ("", 0)
        match = NAME.fullmatch(name)
        if match:
            samples.append(Sample(str(lists.place(folder, name)), pid, int(match[1]) - 1))
        else:
            wrong.append(line[:80])
    refuse(file, wrong, "not a line like '0000/0000_000_01_x.jpg 0'", "get the list again")
    return samples
