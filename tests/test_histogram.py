"""The colour-histogram baseline counts what it says."""

import cv2
import numpy as np
import pytest
import torch

from common import histogram


class Images:
    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def gather(self, indices):
        return self.pixels[indices]


def solid(color):
    return torch.tensor(color, dtype=torch.uint8).reshape(3, 1, 1).expand(3, 24, 12).clone()


def test_one_colour_fills_one_bin_a_stripe_and_rows_are_unit():
    feats = histogram.color_histograms(Images(torch.stack([solid([200, 30, 30]), solid([30, 30, 200])])))
    assert feats.shape == (2, 6 * 128) and feats.dtype == torch.float32
    assert (feats > 0).sum(1).tolist() == [6, 6] and feats.norm(dim=1).tolist() == pytest.approx([1, 1])
    assert float(feats[0] @ feats[1]) == 0  # red and blue share no bin


def test_the_middle_counts_more_than_the_border():
    red, middle, border = solid([200, 30, 30]), solid([30, 30, 200]), solid([30, 30, 200])
    middle[:, :, 4:8] = red[:, :, 4:8]
    border[:, :, [0, 1, 10, 11]] = red[:, :, [0, 1, 10, 11]]
    feats = histogram.color_histograms(Images(torch.stack([red, middle, border])))
    assert feats[0] @ feats[1] > feats[0] @ feats[2] > 0


def test_bins_follow_the_counting_loop():
    draw = np.random.default_rng(0)
    image = torch.from_numpy(draw.integers(0, 256, (3, 13, 7), dtype=np.uint8))
    hsv = cv2.cvtColor(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), cv2.COLOR_RGB2HSV)
    counts = np.zeros((6, 8, 4, 4))
    for y in range(13):
        for x in range(7):
            h, s, v = (int(value) for value in hsv[y, x])
            weight = np.exp(-0.5 * (((x + 0.5) / 7 - 0.5) / 0.22) ** 2)
            counts[y * 6 // 13, min(h * 8 // 180, 7), s * 4 // 256, v * 4 // 256] += weight
    expected = np.sqrt(counts.ravel())
    found = histogram.color_histograms(Images(image[None]))[0].numpy()
    assert found == pytest.approx(expected / np.linalg.norm(expected), abs=1e-6)
