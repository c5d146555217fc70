"""PRCC for synthetic people: cameras A and B on one day, camera C on another day in other clothes, with parsing masks.

Identity (build, hair, face, skin, shoes, bag) stays, the Outfit is drawn anew for camera C. Every image comes with its
six-part mask under mask/ and its 18 ATR labels under mask_atr18/, pixel-exact.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from common.datasets.prcc import ATR_TO_SIX
from common.synthetic import identity as people
from common.synthetic import render
from common.synthetic.camera import look
from common.synthetic.layouts import BURST, Item, generator, source, spread

ROOT = "prcc"
CODE = 8  # keeps people and cameras apart from those of other data sets
CAMERAS = "ABC"


class Count(NamedTuple):
    """People, and images of cameras A, B and C in train, val and test."""

    train_ids: int
    test_ids: int
    train: tuple[int, int, int]
    val: tuple[int, int, int]
    test: tuple[int, int, int]


COUNTS = {
    "small": Count(40, 30, (200, 200, 200), (40, 40, 40), (150, 150, 150)),
    "medium": Count(150, 60, (800, 800, 800), (150, 150, 150), (300, 300, 300)),
    "full": Count(150, 71, (5952, 5317, 6627), (1664, 1487, 1851), (3384, 3873, 3543)),
}


def plan(size: str, seed: int) -> tuple[list[Item], dict[str, str]]:
    """All images of rgb/train, rgb/val (more frames of the training people) and rgb/test, ascending by path."""
    count, rng = COUNTS[size], generator(seed, CODE, 0)
    order = rng.permutation(count.train_ids + count.test_ids) + 1
    train_pids, test_pids = np.sort(order[: count.train_ids]), np.sort(order[count.train_ids :])
    items = []
    for camid, camera in enumerate(CAMERAS):

        def numbers(total: int, ids: int) -> np.ndarray:
            return spread(rng, total, ids, 1, max(2, 3 * total // ids))

        train, val = numbers(count.train[camid], len(train_pids)), numbers(count.val[camid], len(train_pids))
        for pid, kept, more in zip(train_pids, train, val):
            held_out = set(rng.choice(kept + more, more, replace=False).tolist())
            for index in range(kept + more):
                part = "val" if index in held_out else "train"
                path = f"rgb/{part}/{pid:03d}/{camera}_cropped_rgb{index + 1:03d}.jpg"
                items.append(Item(path, int(pid), camid, index // BURST, index % BURST))
        for pid, kept in zip(test_pids, numbers(count.test[camid], len(test_pids))):
            for index in range(kept):
                path = f"rgb/test/{camera}/{pid:03d}/cropped_rgb{index + 1:03d}.jpg"
                items.append(Item(path, int(pid), camid, index // BURST, index % BURST))
    return sorted(items, key=lambda item: item.path), {}


@lru_cache(maxsize=256)
def somebody(seed: int, key: int, day: int) -> tuple[people.Identity, people.Outfit]:
    """Person `key` and what they wear on that day: 0 in cameras A and B, 1 in camera C."""
    identity = people.identity(generator(seed, CODE, 2, key))
    return identity, people.outfit(identity, generator(seed, CODE, 3, key, day))


def rendered(item: Item, seed: int) -> render.Rendered:
    """One planned image with its parsing."""
    eye, (identity, outfit) = source(seed, CODE, item.source), somebody(seed, item.person, int(item.source == 2))
    walk = (seed, CODE, 5, item.person, item.source, item.walk)
    track, frame = generator(*walk), generator(*walk, item.frame + 1)
    height = int(frame.integers(140, 240))
    view = look(eye, track, frame, item.frame, height, int(height * frame.uniform(0.38, 0.48)))
    return render.person(identity, outfit, view, eye, frame, companions=False)


def draw(item: Item, seed: int) -> dict[str, np.ndarray]:
    """The files of one planned image: path -> uint8 (H, W, 3) RGB, or (H, W) labels."""
    made, stem = rendered(item, seed), item.path.removeprefix("rgb/").removesuffix(".jpg")
    six = np.array(ATR_TO_SIX, np.uint8)[made.parsing]
    return {item.path: made.image, f"mask/{stem}.png": six, f"mask_atr18/{stem}.png": made.parsing}
