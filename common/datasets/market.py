"""Market-1501 (Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015).

Names: 0002_c1s1_000451_03.jpg is pid 2, camera 1. In bounding_box_test pid 0 is a distractor and -1 is junk; both
stay in the gallery (19,732 images, 15,913 without junk), since the evaluation knows what they mean.
"""

import re
from pathlib import Path

from common.datasets.base import BOXES, Dataset, assemble, find_root, scan_boxes

TREES = ("market1501/Market-1501-v15.09.15", "Market-1501-v15.09.15", "market1501")
SOURCE = "get Market-1501-v15.09.15 from the project page of its authors (Liang Zheng, ICCV 2015) and put it there"
PATTERN = re.compile(r"(-1|\d+)_c(\d+)s\d")
PUBLISHED = {"train": (12936, 751, 6), "query": (3368, 750, 6), "gallery": (15913, 750, 6)}


def load(data_dir: str | Path) -> Dataset:
    """Market-1501 with all gallery images, distractors and junk included."""
    root, _ = find_root("market", data_dir, TREES, (BOXES,), SOURCE)
    return assemble("market", root, scan_boxes(root, PATTERN), PUBLISHED)
