"""Joints and parts of a person by name, and torchvision's detector of joints."""

from pathlib import Path

COCO = tuple(
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow left_wrist "
    "right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle".split()
)
OPENPOSE = tuple(
    "nose neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist right_hip right_knee "
    "right_ankle left_hip left_knee left_ankle right_eye left_eye right_ear left_ear".split()
)
ATR = tuple(
    "background hat hair sunglasses upper-clothes skirt pants dress belt left-shoe right-shoe face left-leg right-leg "
    "left-arm right-arm bag scarf".split()
)  # labels of human parsing


def detector(weights: str | Path | None, flag: str, otherwise: str = "", **options):
    """torchvision's Keypoint R-CNN in eval mode, on the CPU.

    Args: weights: its state_dict file, or None for torchvision's own, downloaded and checked by it at the first use;
    flag: what names the file; otherwise: what can be done without one; options of the network.
    Raises: FileNotFoundError with the remedy if the weights cannot be had, ValueError if the file does not fit.
    """
    from torchvision.models import detection  # names of joints are asked for without torch

    from common import checkpoints

    published = detection.KeypointRCNN_ResNet50_FPN_Weights.COCO_V1
    if weights is None:
        try:
            state = published.get_state_dict(progress=False, check_hash=True)
        except OSError as error:
            raise FileNotFoundError(
                f"cannot fetch torchvision's Keypoint R-CNN ({error}); download {published.url} elsewhere and give it "
                f"by {flag} FILE{otherwise}"
            ) from error
    else:
        state = checkpoints.load(weights, flag, f"get {published.url}")
    model = detection.keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None, **options)
    try:
        model.load_state_dict(state)  # not checkpoints.fit: torchvision renames the tensors of its older files here
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{weights} does not fit torchvision's keypointrcnn_resnet50_fpn: {str(error).splitlines()[0]}"
        ) from error
    return model.eval()
