"""Street scenes with several people, in the layouts of COCO2017 and Pascal VOC2012, for whatever cuts people out.

`fill` draws the scenes of a data set and writes the annotations beside them: boxes, polygons, 17 key points (0 outside
the picture or hidden by somebody else, 1 hidden by the person, 2 seen), a crowd now and then, and bicycles as another
category. `full` has as many pictures with people as the real sets. Same seed, same bytes, for any number of processes.
"""

import json
from functools import partial
from math import exp
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import cv2
import numpy as np
from tqdm import tqdm

from common.keypoints import COCO
from common.synthetic import identity as people
from common.synthetic.body import Figure
from common.synthetic.camera import Camera, camera, expose, look
from common.synthetic.canvas import Canvas
from common.synthetic.layouts import generator
from common.synthetic.points import keypoints
from common.synthetic.scene import BASE, HEIGHT, WIDTH, bicycle, scene

ROOTS = {"coco": "coco", "voc": "VOCdevkit"}
CODES = {"coco": 21, "voc": 22}  # apart from those of layouts.CODES
SCENES = {
    ("coco", "small"): (240, 24),
    ("coco", "medium"): (1200, 60),
    ("coco", "full"): (64115, 2693),
    ("voc", "small"): (40, 0),
    ("voc", "medium"): (200, 0),
    ("voc", "full"): (11540, 0),
}
SHAPES = ((480, 640), (426, 640), (375, 500), (640, 480))
PLACES = 48  # streets; every one has its camera
SCALE = 2  # drawn this much larger than stored, for soft edges
PERSON, BICYCLE = 1, 2  # COCO's category ids


class Thing(NamedTuple):
    """What is annotated. mask (h, w) bool at the drawn size; keypoints (17, 3) float in stored pixels, or None."""

    category: int
    mask: np.ndarray
    keypoints: np.ndarray | None = None
    crowd: bool = False

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in stored pixels, the smallest that holds every visible pixel."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return columns[0] / SCALE, rows[0] / SCALE, (columns[-1] + 1) / SCALE, (rows[-1] + 1) / SCALE


class _Picture:
    """The picture while it grows, far to near: colours, and which thing (1, 2, ...) every pixel shows."""

    def __init__(self, place: int, height: int, width: int, rng: np.random.Generator):
        self.height, self.width = height * SCALE, width * SCALE
        high = int(rng.uniform(0.62, 0.95) * HEIGHT)
        wide = min(int(high * width / height), WIDTH)
        high = int(wide * height / width)
        x, y = int(rng.uniform(0, WIDTH - wide)), int(np.clip(BASE - rng.uniform(0.28, 0.42) * high, 0, HEIGHT - high))
        cut = scene(place).image[y : y + high, x : x + wide]
        self.colour = (
            cv2.resize(cut, (self.width, self.height), interpolation=cv2.INTER_LINEAR).astype(np.float32) / 255
        )
        self.horizon = (BASE - y) / high * self.height
        self.owner = np.zeros((self.height, self.width), np.uint8)

    def person(self, number: int, identity, outfit, view, foot: tuple[float, float], unit: float) -> np.ndarray:
        """Draws somebody in front of everything so far; returns the key points (17, 3) in drawn pixels."""
        wide, high, ground = int(1.1 * unit), int(1.35 * unit), 1.2 * unit
        left, top = int(foot[0] - wide / 2), int(foot[1] - ground)
        self._shadow(foot, unit)
        canvas = Canvas(high, wide, view.light)
        figure = Figure(canvas, identity, outfit, view, (foot[0] - left, foot[1] - top), unit)
        figure.draw()
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + wide, self.width), min(top + high, self.height)
        points = keypoints(figure)
        points[:, :2] += left, top
        if x0 < x1 and y0 < y1:
            part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
            mask = canvas.part.reshape(high, wide)[part] > 0
            pixels = (canvas.albedo * canvas.shade[:, None]).reshape(high, wide, 3)[part]
            self.colour[y0:y1, x0:x1][mask] = pixels[mask]
            self.owner[y0:y1, x0:x1][mask] = number
        return points

    def _shadow(self, foot: tuple[float, float], unit: float) -> None:
        rows = slice(max(int(foot[1] - 0.1 * unit), 0), max(min(int(foot[1] + 0.1 * unit), self.height), 0))
        if rows.start < rows.stop:
            xs = (np.arange(self.width, dtype=np.float32) - np.float32(foot[0])) / np.float32(0.17 * unit)
            ys = (np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - np.float32(foot[1])) / np.float32(
                0.04 * unit
            )
            self.colour[rows] *= (1 - 0.45 * np.exp(-(xs**2) - ys**2))[..., None]

    def bicycle(self, number: int, x: float, y: float, size: float, rng: np.random.Generator) -> None:
        """Draws a bicycle that stands on row y."""
        board = np.full((self.height, self.width, 3), -1, np.float32)
        bicycle(board, int(x), int(y), int(size), (0.07, 0.07, 0.08), tuple(float(v) for v in rng.uniform(0.1, 0.8, 3)))
        mask = board[..., 0] >= 0
        self.colour[mask], self.owner[mask] = board[mask], number

    def keypoints(self, number: int, points: np.ndarray) -> np.ndarray:
        """COCO's flags: points outside the picture or hidden by another thing become 0, 0, 0."""
        columns, rows = points[:, 0].astype(int), points[:, 1].astype(int)
        inside = (columns >= 0) & (columns < self.width) & (rows >= 0) & (rows < self.height)
        owner = np.where(inside, self.owner[rows.clip(0, self.height - 1), columns.clip(0, self.width - 1)], 0)
        lost = ~inside | (owner > number)
        return np.where(lost[:, None], 0, points / (SCALE, SCALE, 1))


def draw(name: str, index: int, seed: int) -> tuple[np.ndarray, list[Thing]]:
    """Scene `index`: image uint8 (h, w, 3) and its things, far to near; those of which nothing is seen are left out."""
    rng = generator(seed, CODES[name], 1, index)
    place = int(rng.integers(PLACES))
    eye = _eye(seed, name, place)
    height, width = SHAPES[int(rng.integers(len(SHAPES)))]
    picture = _Picture(eye.scenes[0], height, width, rng)
    made: list[tuple[int, bool, np.ndarray | None, list[int]]] = []  # category, crowd, key points, numbers in `owner`
    units = np.sort(np.exp(rng.uniform(np.log(0.26), np.log(0.92), 1 + min(int(rng.poisson(2.2)), 6)))) * picture.height
    spots = rng.permutation(np.linspace(0.08, 0.92, len(units))) + rng.normal(0, 0.05, len(units))
    number = 0
    if rng.random() < 0.15:  # a group far away, annotated as one crowd
        centre, numbers = rng.uniform(0.1, 0.9) * picture.width, list(range(1, 6))
        for number in numbers:
            unit = rng.uniform(0.13, 0.17) * picture.height
            _somebody(picture, number, eye, rng, centre + (number - 3) * 0.3 * unit, unit)
        made.append((PERSON, True, None, numbers))
    for unit, spot in zip(units, spots):
        number += 1
        made.append((PERSON, False, _somebody(picture, number, eye, rng, spot * picture.width, unit), [number]))
        if rng.random() < 0.06:
            number += 1
            picture.bicycle(number, (spot - 0.1) * picture.width, picture.horizon + 0.95 * unit, 0.34 * unit, rng)
            made.append((BICYCLE, False, None, [number]))
    things = []
    for category, crowd, points, numbers in made:
        mask = np.isin(picture.owner, numbers)
        if mask.sum() >= 64 * SCALE**2:
            things.append(
                Thing(category, mask, None if points is None else picture.keypoints(numbers[0], points), crowd)
            )
    image = expose(picture.colour, eye, exp(rng.normal(0, 0.03)), (width, height), rng)
    return image, things


def _eye(seed: int, name: str, place: int) -> Camera:
    eye = camera(generator(seed, CODES[name], 2, place))
    return eye._replace(blur=0.25 * eye.blur, pitch=0.5 * eye.pitch, resolution=1.0)


def _somebody(
    picture: _Picture, number: int, eye: Camera, rng: np.random.Generator, x: float, unit: float
) -> np.ndarray:
    """Draws a new person of `unit` pixels a stature, the head about at the horizon; returns the key points."""
    key = int(rng.integers(2**31))
    identity = people.identity(generator(key, 0))
    outfit = people.outfit(identity, generator(key, 1))
    view = look(eye, generator(key, 2), generator(key, 3), 0, 128, 64)
    view = view._replace(yaw=float(rng.uniform(-np.pi, np.pi)))
    return picture.person(number, identity, outfit, view, (x, picture.horizon + rng.uniform(0.90, 1.0) * unit), unit)


# -------------------------------------------------------------------------------------------------------------- writing


def fill(draft: Path, name: str, size: str, seed: int, workers: int | None) -> None:
    """Draws and writes every scene of the data set below `draft`, then its annotations."""
    train, val = SCENES[name, size]
    paths = [_path(name, index, train) for index in range(train + val)]
    for folder in sorted({Path(path).parent for path in paths}):
        (draft / folder).mkdir(parents=True, exist_ok=True)
    job, indices = partial(_save, draft, name, seed, train), range(train + val)
    with tqdm(total=len(paths), desc=f"synthetic {name} ({size})", unit="image", disable=None) as bar:
        if workers == 1:
            found = [(bar.update(), job(index))[1] for index in indices]
        else:
            with get_context("spawn").Pool(workers, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
                found = [(bar.update(), rows)[1] for rows in pool.imap(job, indices, chunksize=4)]
    (_write_coco if name == "coco" else _write_voc)(draft, paths, found, train)


def _path(name: str, index: int, train: int) -> str:
    if name == "voc":
        return f"VOC2012/JPEGImages/2012_{index + 1:06d}.jpg"
    return f"{'train2017' if index < train else 'val2017'}/{index + 1:012d}.jpg"


def _save(draft: Path, name: str, seed: int, train: int, index: int) -> dict:
    """Writes one image; returns its height, width and things as plain values."""
    image, things = draw(name, index, seed)
    path = draft / _path(name, index, train)
    if not cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92]):
        raise OSError(f"could not write {path}; is the disk full?")
    return {"size": image.shape[:2], "things": [_plain(thing) for thing in things]}


def _plain(thing: Thing) -> dict:
    """A thing as COCO annotates it, without its ids."""
    x0, y0, x1, y1 = thing.box
    row = {
        "category_id": thing.category,
        "iscrowd": int(thing.crowd),
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": float(thing.mask.sum() / SCALE**2),
    }
    if thing.crowd:
        row["segmentation"] = _run_lengths(thing.mask[::SCALE, ::SCALE])
    else:
        contours, _ = cv2.findContours(thing.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_TC89_L1)
        row["segmentation"] = [[round(float(v), 2) for v in (c.reshape(-1) / SCALE)] for c in contours if len(c) >= 3]
    if thing.category == PERSON:
        points = np.zeros((17, 3)) if thing.keypoints is None else thing.keypoints
        row["keypoints"] = [value for x, y, v in points for value in (round(float(x), 1), round(float(y), 1), int(v))]
        row["num_keypoints"] = int((points[:, 2] > 0).sum())
    return row


def _run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths, column by column, beginning with a run of 0."""
    flat = mask.T.reshape(-1)
    ends = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    counts = np.diff(np.concatenate([[0], ends, [len(flat)]])).tolist()
    return {"counts": ([0] if flat[0] else []) + counts, "size": list(mask.shape)}


def _write_coco(draft: Path, paths: list[str], found: list[dict], train: int) -> None:
    """annotations/{person_keypoints,instances}_{train,val}2017.json."""
    (draft / "annotations").mkdir()
    categories = [
        {"id": PERSON, "name": "person", "supercategory": "person", "keypoints": list(COCO), "skeleton": []},
        {"id": BICYCLE, "name": "bicycle", "supercategory": "vehicle"},
    ]
    for split, part in (("train2017", range(train)), ("val2017", range(train, len(paths)))):
        images, rows = [], []
        for index in part:
            height, width = found[index]["size"]
            images.append({"id": index + 1, "file_name": Path(paths[index]).name, "height": height, "width": width})
            rows += [
                {"id": 100 * (index + 1) + n, "image_id": index + 1, **row}
                for n, row in enumerate(found[index]["things"])
            ]
        for kind in ("person_keypoints", "instances"):
            kept = (
                [row for row in rows if row["category_id"] == PERSON]
                if kind == "person_keypoints"
                else [{k: v for k, v in row.items() if "keypoints" not in k} for row in rows]
            )
            content = {
                "info": {"description": "rendered people"},
                "licenses": [],
                "images": images,
                "annotations": kept,
                "categories": categories[:1] if kind == "person_keypoints" else categories,
            }
            (draft / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(content))


def _write_voc(draft: Path, paths: list[str], found: list[dict], train: int) -> None:
    """VOC2012/Annotations/*.xml and ImageSets/Main/trainval.txt; pixels count from 1, as VOC's do."""
    root = draft / "VOC2012"
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("".join(f"{Path(path).stem}\n" for path in paths))
    for path, content in zip(paths, found):
        height, width = content["size"]
        things = [_voc_object(row) for row in content["things"] if not row["iscrowd"]]
        (root / "Annotations" / f"{Path(path).stem}.xml").write_text(
            f"<annotation>\n\t<folder>VOC2012</folder>\n\t<filename>{escape(Path(path).name)}</filename>\n"
            f"\t<size><width>{width}</width><height>{height}</height><depth>3</depth></size>\n"
            f"\t<segmented>0</segmented>\n{''.join(things)}</annotation>\n"
        )


def _voc_object(row: dict) -> str:
    x, y, w, h = row["bbox"]
    kind = "person" if row["category_id"] == PERSON else "bicycle"
    cut = int(kind == "person" and row["num_keypoints"] < 17)
    return (
        f"\t<object>\n\t\t<name>{kind}</name><pose>Unspecified</pose><truncated>{cut}</truncated>"
        "<difficult>0</difficult>\n"
        f"\t\t<bndbox><xmin>{int(x) + 1}</xmin><ymin>{int(y) + 1}</ymin><xmax>{-int(-(x + w) // 1)}</xmax>"
        f"<ymax>{-int(-(y + h) // 1)}</ymax></bndbox>\n\t</object>\n"
    )
