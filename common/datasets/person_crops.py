"""Person crops without labels for pre-training, as `python -m prsnet.prepare` writes them.

Layout: prsnet_pretrain/{coco,voc,mix}/*.jpg and manifest.jsonl, one object a crop. Only `train` is filled; pid is -1
(nobody knows who it is) and camid the number of the source folder, in alphabetical order.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from common.datasets import files
from common.datasets.base import Dataset, Sample, kind_of

TREES = ("prsnet_pretrain", "person_crops")
PUBLISHED = 80689  # crops of COCO2017 and Pascal VOC in the paper


@dataclass
class Crops(Dataset):
    """A Dataset whose query and gallery are empty."""

    def statistics(self) -> str:
        """Number of crops of each source."""
        counts: dict[str, int] = {}
        for sample in self.train:
            source = Path(sample.path).relative_to(self.root).parts[0]
            counts[source] = counts.get(source, 0) + 1
        lines = [
            f"{self.name} ({self.kind}) {self.root}",
            *(f"{source:<8} {n:>8} crops" for source, n in counts.items()),
        ]
        return "\n".join([*lines, f"{'all':<8} {len(self.train):>8} crops"])


def load(data_dir: str | Path) -> Dataset:
    """All crops below the first of the trees. Raises: FileNotFoundError, ValueError if a crop is missing."""
    tried = [Path(data_dir) / tree for tree in TREES]
    root = next((path for path in [*tried, Path(data_dir)] if (path / "manifest.jsonl").is_file()), None)
    if root is None:
        raise FileNotFoundError(
            f"person_crops: no manifest.jsonl in {' or '.join(map(str, tried))}; cut the crops with "
            f"python -m prsnet.prepare, or use --synthetic small"
        )
    paths = sorted(Path(path).relative_to(root).as_posix() for path in files.images(files.folders(root)))
    with open(root / "manifest.jsonl", encoding="utf-8") as manifest:
        listed = sum(1 for line in manifest if line.strip())
    if not paths or listed != len(paths):
        raise ValueError(
            f"person_crops: {root} has {len(paths)} images but its manifest lists {listed}; run prsnet.prepare again"
        )
    sources = sorted({path.split("/")[0] for path in paths})
    samples = [Sample(os.path.join(root, path), -1, sources.index(path.split("/")[0])) for path in paths]
    return Crops("person_crops", root, kind_of(root), samples, [], [])
