"""Visible-infrared layouts and unlabelled people: SYSU-MM01, RegDB and LUPerson, as `layouts` does the others.

Infrared images show a person's near-infrared rendering, thermal ones the warmth: see `infrared`.
"""

from pathlib import PurePosixPath

import numpy as np

from common.synthetic import layouts, render
from common.synthetic.camera import Camera, look
from common.synthetic.layouts import Item, generator, spread

ROOTS = {"sysu": "SYSU-MM01", "regdb": "RegDB", "luperson": "LUPerson"}
CODES = {"sysu": 11, "regdb": 12, "luperson": 13}
# ids: train, val, test; images: train visible, train infrared, test visible, query; gallery pairs: indoor, outdoor
SYSU = {
    "small": ((24, 6, 16), (400, 200, 160, 96), (26, 30)),
    "medium": ((160, 40, 60), (4800, 3600, 720, 480), (70, 118)),
    "full": ((296, 99, 96), (22258, 11909, 6775, 3803), (112, 189)),
}
REGDB = {"small": (32, 5), "medium": (360, 10), "full": (412, 10)}  # people, images of each in each modality
LUPERSON = {
    "small": (250, 3, 40),
    "medium": (1500, 4, 150),
    "full": (25000, 4, 2000),
}  # people, images of each, cameras
CITIES = ("us/nyc", "uk/ldn", "jp/tyo", "br/rio", "in/del", "fr/par")
SPLITS = 10
BURST = layouts.BURST
PARALLAX, LATER = 0.5, 2.5  # RegDB's thermal camera: radians beside the visible one, frames behind it


def register() -> None:
    """Make these data sets known to `layouts`."""
    for name in ROOTS:
        layouts.add(name, ROOTS[name], CODES[name], plan, draw)


def two_cameras(rng: np.random.Generator, pids: np.ndarray, cameras: tuple[int, int], pairs: int) -> list:
    """(pid, camera) so that `pairs - len(pids)` people are seen by both cameras and the others by one."""
    both = set(rng.permutation(pids)[: pairs - len(pids)].tolist())
    rows = []
    for pid in pids.tolist():
        rows += [(pid, camera) for camera in (cameras if pid in both else (int(rng.choice(cameras)),))]
    return rows


def sysu(size: str, rng: np.random.Generator) -> tuple[list[Item], dict[str, str]]:
    """SYSU-MM01: cam1/0001/0001.jpg and exp/*.txt; cameras 1, 2, 4, 5 visible, 3 and 6 infrared."""
    (train, val, test), images, gallery_pairs = SYSU[size]
    order = rng.permutation(train + val + test) + 1
    groups = {"train_id": order[:train], "val_id": order[train : train + val], "test_id": order[train + val :]}
    learners, tested = np.sort(order[: train + val]), np.sort(groups["test_id"])
    visible = [(pid, camera) for pid in learners.tolist() for camera in (1, 2, 4, 5)]
    parts = [
        (visible, images[0]),
        ([(pid, camera) for pid in learners.tolist() for camera in (3, 6)], images[1]),
        (
            two_cameras(rng, tested, (1, 2), gallery_pairs[0]) + two_cameras(rng, tested, (4, 5), gallery_pairs[1]),
            images[2],
        ),
        ([(pid, camera) for pid in tested.tolist() for camera in (3, 6)], images[3]),
    ]
    items = []
    for pairs, total in parts:
        mean = total / len(pairs)
        counts = spread(rng, total, len(pairs), max(1, int(mean / 2)), int(2 * mean) + 2)
        for (pid, camera), count in zip(pairs, counts):
            items += [
                Item(f"cam{camera}/{pid:04d}/{i + 1:04d}.jpg", pid, camera - 1, i // BURST, i % BURST)
                for i in range(int(count))
            ]
    texts = {f"exp/{name}.txt": ",".join(map(str, np.sort(pids).tolist())) + "\n" for name, pids in groups.items()}
    texts["exp/available_id.txt"] = ",".join(map(str, sorted(order.tolist()))) + "\n"
    return items, texts


def regdb(size: str, rng: np.random.Generator) -> tuple[list[Item], dict[str, str]]:
    """RegDB: Visible/1/v_00001_1.bmp, Thermal/1/t_00001_1.bmp and ten splits into halves under idx/.

    As in the real set, both cameras film the same walks, so that a pair shares posture and side. They stand PARALLAX
    apart and keep moments of a walk that lie LATER frames apart, each before a background of its own, so that unlearnt
    histograms of oriented gradients find about as many as they are known to find in the real set (13 of 100 among 206
    people, visible to thermal). Had both stood in one place and filmed at once, they would find nearly all.
    """
    people, count = REGDB[size]
    names = {
        (word, pid): [f"{word}/{pid}/{word[0].lower()}_{pid:05d}_{i + 1}.bmp" for i in range(count)]
        for word in ("Visible", "Thermal")
        for pid in range(1, people + 1)
    }
    items = [
        Item(path, pid, int(word == "Thermal"), i // BURST, i % BURST)
        for (word, pid), paths in names.items()
        for i, path in enumerate(paths)
    ]
    texts = {}
    for split in range(1, SPLITS + 1):
        order = rng.permutation(people) + 1
        for part, pids in (("train", order[: people // 2]), ("test", order[people // 2 :])):
            for word in ("Visible", "Thermal"):
                lines = [
                    f"{path} {label}\n" for label, pid in enumerate(np.sort(pids).tolist()) for path in names[word, pid]
                ]
                texts[f"idx/{part}_{word.lower()}_{split}.txt"] = "".join(lines)
    return items, texts


def luperson(size: str, rng: np.random.Generator) -> tuple[list[Item], dict[str, str]]:
    """LUPerson: us/nyc/us_nyc_0001_00000001.jpg = country, city, video, image; nobody knows who is who."""
    people, count, cameras = LUPERSON[size]
    items = []
    for person in range(people):
        camera = int(rng.integers(cameras))
        city = CITIES[camera % len(CITIES)]
        for i in range(count):
            name = f"{city}/{city.replace('/', '_')}_{camera:04d}_{person * count + i:08d}.jpg"
            items.append(Item(name, person, camera, i // BURST, i % BURST))
    return items, {}


def plan(name: str, size: str, seed: int) -> tuple[list[Item], dict[str, str]]:
    """Everything to render and the text files, as layouts.plan."""
    return {"sysu": sysu, "regdb": regdb, "luperson": luperson}[name](size, generator(seed, CODES[name], 0))


def eye(name: str, key: int, seed: int) -> Camera:
    """Camera `key`; SYSU's infrared camera 3 stands in the room of camera 2, RegDB's two stand side by side."""
    camera = layouts.source(seed, CODES[name], key)
    if name == "sysu" and key == 2:
        return camera._replace(scenes=layouts.source(seed, CODES[name], 1).scenes)
    if name == "regdb" and key == 1:
        visible = layouts.source(seed, CODES[name], 0)
        directions = tuple(yaw + PARALLAX for yaw in visible.directions)
        return camera._replace(directions=directions, pitch=visible.pitch)
    return camera


def draw(name: str, item: Item, seed: int) -> render.Rendered:
    """Renders one planned image; near-infrared and thermal pictures come in three equal channels."""
    code, camera = CODES[name], eye(name, item.source, seed)
    identity, outfit = layouts.somebody(seed, code, item.person)
    walk = (seed, code, 5, item.person, item.source, item.walk)
    frame, moment = generator(*walk, item.frame + 1), item.frame
    if (name, item.source) == ("regdb", 1):
        walk, moment = (seed, code, 5, item.person, 0, item.walk), item.frame + LATER
    track = generator(*walk)
    height = int(frame.integers(150, 300)) if name != "regdb" else 128
    width = int(height * frame.uniform(0.38, 0.48)) if name != "regdb" else 64
    view = look(camera, track, frame, moment, height, width)
    folder = PurePosixPath(item.path).parts[0]
    infrared = folder in ("cam3", "cam6", "Thermal")
    picture = render.person(identity, outfit, view, camera, frame, companions=infrared)
    if not infrared:
        return picture
    grey = picture.thermal if name == "regdb" else picture.infrared
    return picture._replace(image=np.repeat(grey[..., None], 3, 2))
