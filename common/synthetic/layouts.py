"""What to render for each data set, and under which names: the native layouts and, for `full`, the real counts.

`plan` decides everything (paths, people, cameras, walks) without drawing a pixel; `draw` renders one planned image.
Both depend on the seed alone, never on the order or the number of processes.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from common.synthetic import identity as people
from common.synthetic import render
from common.synthetic.camera import Camera, camera, look

ROOTS = {
    "market": "market1501/Market-1501-v15.09.15",
    "duke": "dukemtmcreid/DukeMTMC-reID",
    "cuhk03": "cuhk03-np",
    "msmt17": "msmt17/MSMT17_V1",
}
CODES = {"market": 1, "duke": 2, "cuhk03": 3, "msmt17": 4}  # keep people and cameras of the data sets apart
SIZES = ("small", "medium", "full")  # minutes, an hour, days of training on one core; the real counts
BURST = 5  # frames of one walk past a camera, before the next walk begins


class Item(NamedTuple):
    """One image to render. `walk` and `frame` say which frame of which walk of `person` past `source` it shows."""

    path: str  # relative to the data set's root
    person: int  # key of the identity; equal keys are the same person
    source: int  # key of the camera
    walk: int
    frame: int
    kind: str = "box"  # box | tight | stray (badly cut) | empty (background only)


class Count(NamedTuple):
    """Sizes of a data set: people, (person, camera) pairs and images of each part."""

    train_ids: int
    test_ids: int
    train_pairs: int
    query: int  # = pairs of the test people: one query for each
    train: int
    gallery: int  # images of test people, without the queries
    distractors: int = 0
    junk: int = 0


COUNTS = {
    ("market", "small"): Count(48, 32, 190, 120, 660, 390, 80, 40),
    ("market", "medium"): Count(200, 60, 800, 220, 2800, 900, 160, 80),
    ("market", "full"): Count(751, 750, 3330, 3368, 12936, 13115, 2798, 3819),  # 13,115 + 2,798 + 3,819 = 19,732 files
    ("duke", "small"): Count(40, 28, 130, 88, 560, 400, 40),
    ("duke", "medium"): Count(200, 60, 700, 200, 2800, 900, 120),
    ("duke", "full"): Count(702, 702, 2210, 2228, 16522, 16110, 1551),  # 16,110 + 1,551 = 17,661 files, 1,110 people
    ("msmt17", "small"): Count(48, 40, 200, 150, 720, 480),
    ("msmt17", "medium"): Count(200, 80, 900, 320, 3200, 1100),
    ("msmt17", "full"): Count(1041, 3060, 4300, 11659, 32621, 82161),
    ("cuhk03", "small"): Count(40, 30, 80, 60, 384, 228),
    ("cuhk03", "medium"): Count(200, 60, 400, 120, 1900, 456),
    ("cuhk03", "full"): Count(767, 700, 1534, 1400, 7368, 5328),
}
CAMERAS = {"market": 6, "duke": 8, "msmt17": 15, "cuhk03": 2}


def generator(seed: int, *key: int) -> np.random.Generator:
    """A generator that depends on nothing but its arguments (non-negative integers)."""
    return np.random.default_rng(np.random.SeedSequence([seed, *key]))


def spread(rng: np.random.Generator, total: int, bins: int, low: int, high: int) -> np.ndarray:
    """(bins,) int64 counts between `low` and `high` that sum to `total`, drawn at random."""
    if not low * bins <= total <= high * bins:
        raise ValueError(f"cannot spread {total} over {bins} bins of {low} to {high}")
    counts = np.full(bins, low, np.int64)
    while (rest := total - int(counts.sum())) > 0:
        free = np.flatnonzero(counts < high)
        counts = np.minimum(counts + np.bincount(rng.choice(free, rest), minlength=bins), high)
    return counts


def _pairs(
    rng: np.random.Generator, pids: np.ndarray, cameras: int, pairs: int, images: int, low: int, high: int
) -> list[tuple[int, int, int]]:
    """(pid, camid, images) for each pair of a person and a camera that saw them: at least two cameras a person."""
    seen = spread(rng, pairs, len(pids), 2, cameras)
    counts, rows = iter(spread(rng, images, pairs, low, high)), []
    for pid, number in zip(pids, seen):
        for camid in np.sort(rng.choice(cameras, number, replace=False)):
            rows.append((int(pid), int(camid), int(next(counts))))
    return rows


def _split(rng: np.random.Generator, count: Count, first: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Ascending pids of the training and of the test people, mixed as in the real sets."""
    order = rng.permutation(count.train_ids + count.test_ids) + first
    return np.sort(order[: count.train_ids]), np.sort(order[count.train_ids :])


def _frames(number: int) -> list[tuple[int, int]]:
    """(walk, frame) of the images of a pair."""
    return [(index // BURST, index % BURST) for index in range(number)]


def _folders(name, rng: np.random.Generator, count: Count, cameras: int, high: int) -> tuple[list[Item], np.ndarray]:
    """Items of bounding_box_train, query and bounding_box_test, and the test pids; name(pid, camid, walk, frame)."""
    train_pids, test_pids = _split(rng, count)
    train = _pairs(rng, train_pids, cameras, count.train_pairs, count.train, 1, high)
    test = _pairs(rng, test_pids, cameras, count.query, count.gallery + count.query, 2, high)
    items = []
    for rows, folder in ((train, "bounding_box_train"), (test, "bounding_box_test")):
        for pid, camid, number in rows:
            chosen = int(rng.integers(number)) if rows is test else -1
            for index, (walk, frame) in enumerate(_frames(number)):
                path = f"{'query' if index == chosen else folder}/{name(pid, camid, walk, frame)}"
                items.append(Item(path, pid, camid, walk, frame))
    return items, test_pids


def market(count: Count, rng: np.random.Generator) -> list[Item]:
    """Market-1501: `0002_c1s1_000451_03.jpg` = pid, camera, sequence, frame, box; pid 0000 distractor, -1 junk."""

    def name(pid: int, camid: int, walk: int, frame: int) -> str:
        start = (pid * 7919 + walk * 4523 + camid * 977) % 90000
        return f"{pid:04d}_c{camid + 1}s{1 + (pid + walk) % 6}_{start + 25 * frame:06d}_{1 + frame % 4:02d}.jpg"

    items, test_pids = _folders(name, rng, count, 6, 16)
    top = count.train_ids + count.test_ids + 1
    for index in range(count.distractors):
        camid, kind = int(rng.integers(6)), "empty" if rng.random() < 0.4 else "stray"
        path = f"bounding_box_test/0000_c{camid + 1}s{1 + index % 6}_{index * 11 + 151:06d}_{1 + index % 5:02d}.jpg"
        items.append(Item(path, top + index, camid, 0, 0, kind))
    for index in range(count.junk):
        camid, pid = int(rng.integers(6)), int(rng.choice(test_pids))
        path = f"bounding_box_test/-1_c{camid + 1}s{1 + index % 6}_{index * 13 + 76:06d}_{1 + index % 5:02d}.jpg"
        items.append(Item(path, pid, camid, 90 + index, 0, "stray"))
    return items


def duke(count: Count, rng: np.random.Generator) -> list[Item]:
    """DukeMTMC-reID: `0005_c2_f0046985.jpg` = pid, camera, frame; distractors are 408 more people, one camera each."""

    def name(pid: int, camid: int, walk: int, frame: int) -> str:
        return f"{pid:04d}_c{camid + 1}_f{(pid * 7919 + walk * 4523 + camid * 977) % 400000 + 60 * frame:07d}.jpg"

    items, _ = _folders(name, rng, count, 8, 24)
    others = 408 if count.test_ids == 702 else 10
    first = count.train_ids + count.test_ids + 1
    for index, number in enumerate(spread(rng, count.distractors, others, 1, 24)):
        pid, camid = first + index, int(rng.integers(8))
        for walk, frame in _frames(int(number)):
            items.append(Item(f"bounding_box_test/{name(pid, camid, walk, frame)}", pid, camid, walk, frame))
    return items


def msmt17(count: Count, rng: np.random.Generator) -> list[Item]:
    """MSMT17 V1: `train/0000/0000_000_01_0303morning_0008_1.jpg` = pid, image, camera, time, frame, box."""

    def name(part: str, pid: int, camid: int, image: int, walk: int, frame: int) -> str:
        clock = f"{(101, 303, 505, 707)[(pid + walk) % 4]:04d}{('morning', 'noon', 'afternoon')[walk % 3]}"
        stamp = (pid * 31 + walk * 457) % 9000 + frame
        return f"{part}/{pid:04d}/{pid:04d}_{image:03d}_{camid + 1:02d}_{clock}_{stamp:04d}_{frame % 3}.jpg"

    items = []
    for part, ids, pairs, images, low in (
        ("train", count.train_ids, count.train_pairs, count.train, 1),
        ("test", count.test_ids, count.query, count.gallery + count.query, 2),
    ):
        first, image, last = 0 if part == "train" else count.train_ids, 0, -1
        for pid, camid, number in _pairs(rng, np.arange(ids), 15, pairs, images, low, 40):
            image = image if pid == last else 0
            for w, f in _frames(number):
                items.append(Item(name(part, pid, camid, image, w, f), first + pid, camid, w, f))
                image, last = image + 1, pid
    return items


def msmt17_lists(items: list[Item], rng: np.random.Generator) -> dict[str, str]:
    """The four list files of MSMT17, file name -> text: `path label` lines; one query per person and camera."""
    train = [item for item in items if item.path.startswith("train/")]
    test = [item for item in items if item.path.startswith("test/")]
    held_out = set(rng.permutation(len(train))[: round(len(train) * 2373 / 32621)].tolist())
    pairs: dict[tuple[int, int], list[int]] = {}
    for index, item in enumerate(test):
        pairs.setdefault((item.person, item.source), []).append(index)
    queries = {int(rng.choice(indices)) for indices in pairs.values()}

    def lines(part: list[Item], keep) -> str:
        names = [item.path.split("/", 1)[1] for index, item in enumerate(part) if keep(index)]
        return "".join(f"{name} {int(name[:4])}\n" for name in names)

    return {
        "list_train.txt": lines(train, lambda index: index not in held_out),
        "list_val.txt": lines(train, lambda index: index in held_out),
        "list_query.txt": lines(test, lambda index: index in queries),
        "list_gallery.txt": lines(test, lambda index: index not in queries),
    }


def cuhk03(count: Count, rng: np.random.Generator) -> list[Item]:
    """CUHK03, new protocol: `labeled` (tight boxes) and `detected` (jittered), `0001_c1_1.png` = pid, camera, image.

    Images 1 to 5 of a person come from the first camera of a pair, 6 to 10 from the second; there are five such pairs.
    """
    train_pids, test_pids = _split(rng, count)
    full, items = count.train_ids == 767, []
    pair_of = {int(pid): int(rng.integers(5)) for pid in np.concatenate([train_pids, test_pids])}
    for folder, kind, drop, extra in (("labeled", "tight", 0, 0), ("detected", "box", 3 * full, 4 * full)):
        train = _pairs(rng, train_pids, 2, count.train_pairs, count.train - drop, 1, 5)
        test = _pairs(rng, test_pids, 2, count.query, count.gallery + extra + count.query, 2, 5)
        for part, rows in (("bounding_box_train", train), ("bounding_box_test", test)):
            for pid, camid, number in rows:
                chosen = int(rng.integers(number)) if part == "bounding_box_test" else -1
                for frame in range(number):
                    place = "query" if frame == chosen else part
                    path = f"{folder}/{place}/{pid:04d}_c{camid + 1}_{5 * camid + frame + 1}.png"
                    items.append(Item(path, pid, 2 * pair_of[pid] + camid, 0, frame, kind))
    return items


PLANS = {"market": market, "duke": duke, "msmt17": msmt17, "cuhk03": cuhk03}
OTHERS = {}  # data sets of further modules: name -> (plan, draw)


def add(name: str, root: str, code: int, plan_others, draw_others) -> None:
    """Make a further data set known; its functions have the signatures of `plan` and `draw`."""
    ROOTS[name], CODES[name] = root, code
    PLANS[name] = OTHERS[name] = (plan_others, draw_others)


def plan(name: str, size: str = "small", seed: int = 0) -> tuple[list[Item], dict[str, str]]:
    """Everything to render for a data set, ascending by path, and its text files (relative path -> text)."""
    if name in OTHERS:
        items, texts = OTHERS[name][0](name, size, seed)
    else:
        items, texts = PLANS[name](COUNTS[name, size], generator(seed, CODES[name], 0)), {}
    items.sort(key=lambda item: item.path)
    if len({item.path for item in items}) != len(items):
        raise ValueError(f"{name}: two images of the plan have the same name; use another seed than {seed}")
    if name == "msmt17":
        texts = msmt17_lists(items, generator(seed, CODES[name], 1))
    return items, texts


@lru_cache(maxsize=256)
def somebody(seed: int, code: int, key: int) -> tuple[people.Identity, people.Outfit]:
    """Person `key` of data set `code` and what they wear that day."""
    identity = people.identity(generator(seed, code, 2, key))
    return identity, people.outfit(identity, generator(seed, code, 3, key, 0))


@lru_cache(maxsize=64)
def source(seed: int, code: int, key: int) -> Camera:
    """Camera `key` of data set `code`."""
    return camera(generator(seed, code, 4, key))


def _size(name: str, rng: np.random.Generator) -> tuple[int, int]:
    """Height and width of a box as the real set has them."""
    if name == "market":
        return 128, 64
    low, high = {"duke": (150, 290), "msmt17": (130, 300), "cuhk03": (160, 260)}[name]
    height = int(rng.integers(low, high))
    return height, int(height * rng.uniform(0.36, 0.48))


def draw(name: str, item: Item, seed: int) -> render.Rendered:
    """Renders one planned image."""
    if name in OTHERS:
        return OTHERS[name][1](name, item, seed)
    code = CODES[name]
    eye, (identity, outfit) = source(seed, code, item.source), somebody(seed, code, item.person)
    walk = (seed, code, 5, item.person, item.source, item.walk)
    track, frame = generator(*walk), generator(*walk, item.frame + 1, int(item.kind == "tight"))
    height, width = _size(name, frame)
    view = look(eye, track, frame, item.frame, height, width, jitter=0.25 if item.kind == "tight" else 1.0)
    if item.kind == "stray":
        view = view._replace(
            centre=float(frame.choice([-1, 1]) * frame.uniform(0.15, 0.6)),
            top=float(frame.uniform(-0.6, 0.3)),
            bottom=float(frame.uniform(-0.6, 0.3)),
        )
    elif item.kind == "empty":
        view = view._replace(centre=9.0, companion=False)
    return render.person(identity, outfit, view, eye, frame, companions=False)
