"""A miniature PRCC with its masks."""

from pathlib import Path

import numpy as np
from PIL import Image

from pixel_sampling.masks import LUT, write_labels


def write_prcc(base: Path, train: int = 5, test: int = 3, images: int = 2) -> Path:
    """Noisy pictures of people with a head, a shirt, trousers and shoes; other clothes in camera C; `images` a camera.
    Masks as part6 and as atr18. Returns base, the --data-dir.
    """
    root, rng = base / "prcc", np.random.default_rng(0)
    for pid in range(1, train + test + 1):
        head, shoes = rng.integers(0, 256, (2, 3))
        days = rng.integers(0, 256, (2, 2, 3))
        for camid, camera in enumerate("ABC"):
            shirt, trousers = days[int(camid == 2)]
            for n in range(images):
                labels = np.zeros((48, 24), np.uint8)
                picture = np.full((48, 24, 3), 90.0 + 20 * camid)
                for part, (top, bottom), colour in (
                    (11, (2, 10), head),
                    (4, (10, 26), shirt),
                    (6, (26, 42), trousers),
                    (9, (42, 47), shoes),
                ):
                    labels[top:bottom, 6 + n : 18 + n] = part
                    picture[labels == part] = colour
                picture += rng.normal(0, 10, picture.shape)
                name = f"{camera}/{pid:03d}/" if pid > train else f"{pid:03d}/{camera}_"
                name = f"{'test' if pid > train else 'train'}/{name}cropped_rgb{n + 1:03d}"
                image = root / "rgb" / f"{name}.jpg"
                image.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(image, quality=95)
                write_labels(root / "mask_atr18" / f"{name}.png", labels)
                write_labels(root / "mask" / f"{name}.png", LUT[labels])
    return base
