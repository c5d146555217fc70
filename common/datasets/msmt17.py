"""MSMT17 (Wei et al., Person Transfer GAN to Bridge Domain Gap for Person Re-Identification, CVPR 2018).

Two trees are read: the authors' V1 (train, test) or V2 (mask_train_v2, mask_test_v2, blurred faces) with list_*.txt, whose lines
are "0000/0000_000_01_0303morning_0008_0.jpg 0": pid from the list, camera 01 from the name's third field; and the re-layout
bounding_box_{train,test}, query with names 0000_c1_0000.jpg that other repositories use. Training and test pids both start at 0
and are different people; pid 0 is a person here, not a distractor.
"""

import re
from pathlib import Path

from common.datasets.base import BOX_FOLDERS, Dataset, Sample, assemble, find_root, refuse, scan_boxes

TREES = ("msmt17/MSMT17_V1", "msmt17/MSMT17_V2", "MSMT17_V1", "MSMT17_V2", "msmt17", "MSMT17")
SOURCE = "request MSMT17 from its authors (PKU, Wei et al., CVPR 2018) and put it there"
LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
IMAGES = (("train", "test"), ("mask_train_v2", "mask_test_v2"))  # V1, V2
PATTERN = re.compile(r"(-1|\d+)_c(\d+)(?!\d)")
NAME = re.compile(r"\d+_\d+_(\d+)_")
PUBLISHED = {"train": (32621, 1041, 15), "query": (11659, 3060, 15), "gallery": (82161, 3060, 15)}
PUBLISHED_WITHOUT_VAL = {**PUBLISHED, "train": (30248, 1041, 15)}


def load(data_dir: str | Path, combine: bool = True) -> Dataset:
    """MSMT17; combine joins the 2,373 validation images to the training images, as the published tables do.

    Raises: ValueError for combine=False on the re-layout, which does not say what was validation.
    """
    folders = tuple(BOX_FOLDERS.values())
    listed = [root for root in candidates(data_dir) if (root / LISTS[0]).exists()]
    boxed = [root for root in candidates(data_dir) if all((root / folder).exists() for folder in folders)]
    if not listed and not boxed:
        raise missing(data_dir)
    if listed:
        published = PUBLISHED if combine else PUBLISHED_WITHOUT_VAL
        return assemble("msmt17", listed[0], read_lists(listed[0], combine), published)
    if not combine:
        raise ValueError(f"msmt17: {boxed[0]} has no list_val.txt, so validation cannot be left out; use the authors' own tree")
    return assemble("msmt17", boxed[0], scan_boxes(boxed[0], PATTERN), PUBLISHED)
