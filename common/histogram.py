"""The colour-histogram baseline: what retrieval by clothing colour alone achieves, printed beside trained networks."""

import cv2
import numpy as np
import torch

BINS = (8, 4, 4)  # hue, saturation, value


def color_histograms(images, stripes: int = 6, spread: float = 0.22) -> torch.Tensor:
    """HSV histograms of horizontal stripes, (N, stripes * 128) float32 unit rows; square roots, as Hellinger compares.

    Args: images an ImageStore (or anything with len() and gather(indices) -> uint8 (B, 3, H, W)); spread: pixels count
        by a Gaussian of their distance from the vertical middle line, `spread` widths wide, for people stand there.
    """
    rows = [_histogram(images.gather(torch.tensor([i]))[0], stripes, spread) for i in range(len(images))]
    return torch.nn.functional.normalize(torch.from_numpy(np.sqrt(np.stack(rows))).float())


def _histogram(image: torch.Tensor, stripes: int, spread: float) -> np.ndarray:
    hsv = cv2.cvtColor(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()), cv2.COLOR_RGB2HSV).astype(int)
    height, width = hsv.shape[:2]
    bins = np.minimum(hsv * BINS // np.array([180, 256, 256]), np.array(BINS) - 1)  # (H, W, 3)
    stripe = np.arange(height)[:, None] * stripes // height
    index = ((stripe * BINS[0] + bins[..., 0]) * BINS[1] + bins[..., 1]) * BINS[2] + bins[..., 2]
    weight = np.exp(-0.5 * (((np.arange(width) + 0.5) / width - 0.5) / spread) ** 2)
    return np.bincount(index.ravel(), np.broadcast_to(weight, index.shape).ravel(), stripes * int(np.prod(BINS)))
