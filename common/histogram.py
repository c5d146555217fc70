"""The colour-histogram baseline: what retrieval by clothing colour alone achieves, printed beside trained networks."""

import cv2
import numpy as np
import torch

BINS = (8, 4, 4)  # hue, saturation, value


def color_histograms(images, stripes: int = 6) -> torch.Tensor:
    """HSV histograms of horizontal stripes, (N, stripes * 128) float32 unit rows; square roots, as Hellinger compares.

    Args: images an ImageStore (or anything with len() and gather(indices) -> uint8 (B, 3, H, W)).
    """
    return torch.stack([_histogram(images.gather(torch.tensor([i]))[0], stripes) for i in range(len(images))])


def _histogram(image: torch.Tensor, stripes: int) -> torch.Tensor:
    hsv = cv2.cvtColor(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()), cv2.COLOR_RGB2HSV)
    ranges = [0, 180, 0, 256, 0, 256]
    parts = [cv2.calcHist([part], [0, 1, 2], None, BINS, ranges).ravel() for part in np.array_split(hsv, stripes)]
    return torch.nn.functional.normalize(torch.from_numpy(np.sqrt(np.concatenate(parts))), dim=0)
