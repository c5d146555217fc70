"""The ResNet trunk that all stages share, and reading pre-trained ones in the forms in which they are published."""

import math
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from common import checkpoints

# Prefixes of the trunk inside foreign checkpoints, the wanted encoder first: never a momentum copy by accident.
PRIORITY = ("encoder_q", "online", "student", "teacher", "visual.cnn", "encoder_k", "target")
WRAPPERS = ("state_dict", "model", "net", "backbone", "online_network")


def resnet(name: str = "resnet50") -> nn.Module:
    """A torchvision ResNet with random weights that ends in the pooled feature (B, D); `out_features` is D."""
    if name not in ("resnet18", "resnet34", "resnet50", "resnet101"):
        raise ValueError(f"backbone {name!r}: expected resnet18, resnet34, resnet50 or resnet101")
    trunk = getattr(torchvision.models, name)(weights=None)
    trunk.out_features = trunk.fc.in_features
    trunk.fc = nn.Identity()
    return trunk


def needed(trunk: nn.Module) -> list[str]:
    """The tensors without which a trunk is incomplete: all but BatchNorm's counters (265 for ResNet-50)."""
    return [key for key in trunk.state_dict() if not key.endswith("num_batches_tracked")]


def find_trunk(state: dict, trunk: nn.Module, source: Path | str) -> dict[str, Tensor]:
    """The trunk's tensors of a checkpoint's content, keys as in torchvision.

    Unwraps state_dict, model, net, backbone, online_network; finds the prefix before conv1.weight (64, 3, 7, 7), the
    encoder first where there are several; drops everything else.
    Raises: ValueError listing every missing tensor and every tensor of another shape.
    """
    while isinstance(state, dict) and not any(isinstance(value, Tensor) for value in state.values()):
        inner = [state[key] for key in WRAPPERS if isinstance(state.get(key), dict)]
        if not inner:
            raise ValueError(f"{source} holds no weights: no mapping from names to tensors under {', '.join(WRAPPERS)}")
        state = inner[0]
    state = checkpoints.strip_prefixes({k: v for k, v in state.items() if isinstance(v, Tensor)})
    first = "conv1.weight"
    stems = [k[: -len(first)] for k, v in state.items() if k.endswith(first) and v.shape == (64, 3, 7, 7)]
    if not stems:
        raise ValueError(f"{source} holds no ResNet trunk: no tensor *conv1.weight of shape (64, 3, 7, 7)")
    prefix = min(stems, key=precedence)
    own, wanted = trunk.state_dict(), needed(trunk)
    missing = [key for key in wanted if prefix + key not in state]
    wrong = [
        f"{key} {tuple(state[prefix + key].shape)} instead of {tuple(own[key].shape)}"
        for key in wanted
        if prefix + key in state and state[prefix + key].shape != own[key].shape
    ]
    if missing or wrong:
        parts = [f"{len(missing)} of {len(wanted)} tensors missing: {', '.join(missing)}"] if missing else []
        parts += [f"of another shape: {', '.join(wrong)}"] if wrong else []
        raise ValueError(f"{source} is no complete trunk under the prefix {prefix!r}; {'; '.join(parts)}")
    found = {key: state[prefix + key] for key in wanted}
    return {key: found.get(key, value) for key, value in own.items()}


def precedence(prefix: str) -> tuple[int, int]:
    """Sorting key of a prefix: flat keys and unknown names come between the wanted encoders and the momentum copies."""
    for place, word in enumerate(PRIORITY):
        if word in prefix:
            return place if place < PRIORITY.index("encoder_k") else place + 1, len(prefix)
    return PRIORITY.index("encoder_k"), len(prefix)


def read(path: Path | str):
    """The content of a checkpoint file; no code in it can run. Raises: FileNotFoundError, ValueError."""
    remedy = "give --weights PATH, row:NAME of a finished pre-training, imagenet or none (dapg/README.md, Weights, "
    return checkpoints.load(path, "weights", remedy + "says where public checkpoints come from)")


def load(weights: str, backbone: str, logs_dir: str, synthetic: str | None) -> dict[str, Tensor] | None:
    """The trunk that --weights names: None for "none"; "imagenet" (torchvision's V1, which it downloads and checks at
    first use); row:NAME, the trunk that this pre-training row exported on data of the same kind; or a file."""
    if weights == "none":
        return None
    trunk = resnet(backbone)
    if weights == "imagenet":
        choice = torchvision.models.get_model_weights(backbone)["IMAGENET1K_V1"]
        try:
            return find_trunk(choice.get_state_dict(progress=False, check_hash=True), trunk, choice.url)
        except OSError as error:
            raise OSError(
                f"ImageNet weights could not be downloaded from {choice.url} ({error}); download the file "
                "elsewhere and pass --weights PATH, or start from --weights none"
            ) from error
    path = row_file(weights[4:], "trunk.pt", logs_dir, synthetic) if weights.startswith("row:") else weights
    return find_trunk(read(path), trunk, path)


def row_file(row: str, name: str, logs_dir: str, synthetic: str | None, seed: int = 0) -> Path:
    """The file `name` that a finished row left in its log folder, on any data set of the same kind and size.

    Raises: FileNotFoundError naming the row to run first; ValueError if two data sets have one.
    """
    ending = f"-synthetic-{synthetic}" if synthetic else ""
    found = [
        path
        for path in sorted(Path(logs_dir).glob(f"dapg/*/{row}/seed{seed}/{name}"))
        if path.relative_to(logs_dir).parts[1].partition("-synthetic-")[2] == ending.rpartition("-")[2]
    ]
    if not found:
        size = f" --synthetic {synthetic}" if synthetic else ""
        raise FileNotFoundError(
            f"row {row} has left no {name} under {logs_dir}/dapg; run it first: python dapg/train.py --row {row}{size}"
        )
    if len(found) > 1:
        raise ValueError(f"row {row} has several {name}: {', '.join(map(str, found))}; give one as a path")
    return found[0]


def export(path: Path, trunk: nn.Module, meta: dict) -> None:
    """Write the trunk with torchvision's flat keys and a plain `meta` dict, in one atomic step."""
    state = {key: value.detach().cpu().clone() for key, value in trunk.state_dict().items()}
    checkpoints.replace(path, lambda file: torch.save({"state_dict": state, "meta": meta}, file))


def cosine(epoch: float, epochs: int, warmup: float) -> float:
    """Learning-rate factor: linear warm-up over `warmup` epochs, then half a cosine to 0."""
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1e-9)))
