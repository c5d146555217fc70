"""Which crops show a whole person: 17 key-point scores per crop from one of three sources (sec. IV)."""

from pathlib import Path

import numpy as np
import torch

from common.datasets import lists
from common.keypoints import COCO
from prsnet.annotations import POINTS, is_number

NAMES = [name.replace("_", " ") for name in COCO]


def load_scores(path: str | Path) -> dict[str, list[float]]:
    """Crop name without suffix -> 17 scores, from a JSON of an HRNet run over the crops of `--kpt none`.

    Two forms: {"coco_000000000785_442619": [17 scores], ...}, or COCO's result list, [{"image_id": name, "keypoints":
    [x, y, score, ...]}, ...], where the best entry of a name counts.
    Raises: FileNotFoundError, ValueError naming the entry that is not 17 numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--kpt-json: no file {path}")
    found = lists.read_json(path)
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        entries = [(str(entry.get("image_id", "")), (entry.get("keypoints") or [])[2::3]) for entry in found]
    elif isinstance(found, dict):
        entries = list(found.items())
    else:
        raise ValueError(f"{path}: expected a mapping from crop names to {POINTS} scores, or COCO's list of results")
    scores: dict[str, list[float]] = {}
    for name, values in entries:
        if not isinstance(values, list) or len(values) != POINTS or not all(map(is_number, values)):
            count = len(values) if isinstance(values, list) else "no list of"
            raise ValueError(f"{path}: {name or 'an entry'} has {count} scores, expected {POINTS} finite numbers")
        name = Path(name).stem
        if name not in scores or np.mean(values) > np.mean(scores[name]):
            scores[name] = [float(v) for v in values]
    return scores


@torch.inference_mode()
def detect(model: torch.nn.Module, crop: np.ndarray, device: torch.device) -> list[float] | None:
    """17 key-point scores (logits) of the most certain person in a crop (H, W, 3) uint8, or None if nobody is found."""
    image = torch.from_numpy(np.ascontiguousarray(crop)).to(device).permute(2, 0, 1).float() / 255
    (found,) = model([image])
    return found["keypoints_scores"][0].tolist() if len(found["scores"]) else None


def verdict(scores: list[float] | None, threshold: float) -> str:
    """ "" if all 17 scores lie above the threshold, else the reason to drop the crop."""
    if scores is None:
        return "nobody detected"
    lost = [name for name, score in zip(NAMES, scores) if not score > threshold]
    if len(lost) == POINTS:
        return "no key point"
    return f"{len(lost)} of {POINTS} key points missing: {', '.join(lost)}" if lost else ""
