"""DukeMTMC-reID (Ristani et al., ECCVW 2016; Zheng et al., ICCV 2017).

Names: 0001_c2_f0046182.jpg is pid 1, camera 2. The gallery holds 408 ids without a query, which count against a
ranking.
"""

import re
from pathlib import Path

from common.datasets.base import BOXES, Dataset, assemble, find_root, scan_boxes

TREES = ("dukemtmcreid/DukeMTMC-reID", "DukeMTMC-reID", "dukemtmc-reid/DukeMTMC-reID", "dukemtmc-reid", "dukemtmcreid")
SOURCE = "DukeMTMC was withdrawn by its authors and has no official source any more, so bring a copy you may use"
PATTERN = re.compile(r"(-1|\d+)_c(\d+)_f\d")
PUBLISHED = {"train": (16522, 702, 8), "query": (2228, 702, 8), "gallery": (17661, 1110, 8)}


def load(data_dir: str | Path) -> Dataset:
    """DukeMTMC-reID."""
    root, _ = find_root("duke", data_dir, TREES, (BOXES,), SOURCE)
    return assemble("duke", root, scan_boxes(root, PATTERN), PUBLISHED)
