"""People in the annotation files of COCO (JSON) and Pascal VOC (XML), checked against their images."""

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

from common.datasets import lists

POINTS = 17
ENTRIES = {  # the lists of a COCO file and what each of their entries must have
    "images": {"id": int, "file_name": str},
    "annotations": {"id": int, "image_id": int, "category_id": int},
    "categories": {"id": int, "name": str},
}
WORDS = {int: "a whole number", str: "text"}


class Person(NamedTuple):
    """One annotated person. box x0, y0, x1, y1 in pixels, not yet clipped; visibility: COCO's 17 flags or None."""

    source: str  # coco | voc
    image: Path
    name: str  # of the crop, without suffix
    box: tuple[float, float, float, float]
    size: tuple[int, int] | None  # width, height that the annotation states
    visibility: tuple[int, ...] | None
    file: Path  # the annotation


def coco(annotation: Path, images: Path | None = None) -> list[Person]:
    """People (category `person`, iscrowd 0) of a COCO JSON, ascending by image and annotation id.

    images: their folder; by default the one beside the JSON, or ../train2017 or ../val2017 by the JSON's name.
    Raises: FileNotFoundError; ValueError for a file that is no COCO annotation, or holds nobody.
    """
    annotation = Path(annotation)
    content = read_json(annotation)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ENTRIES):
        raise ValueError(f"{annotation} is no COCO annotation file: it needs the lists {', '.join(ENTRIES)}")
    for key, fields in ENTRIES.items():
        check_entries(annotation, key, content[key], fields)
    person = {c["id"] for c in content["categories"] if c["name"] == "person"}
    by_id = {image["id"]: image for image in content["images"]}
    rows = [a for a in content["annotations"] if a["category_id"] in person and not a.get("iscrowd", 0)]
    if not rows:
        raise ValueError(f"{annotation}: nobody is annotated (no object of category person with iscrowd 0)")
    unknown = sorted({a["image_id"] for a in rows} - by_id.keys())
    if unknown:
        raise ValueError(f"{annotation}: annotations of image {unknown[0]}, which its list of images does not have")
    folder = Path(images) if images else image_folder(annotation, by_id[rows[0]["image_id"]]["file_name"])
    rows.sort(key=lambda a: (a["image_id"], a["id"]))
    return [coco_person(annotation, a, by_id[a["image_id"]], folder) for a in rows]


def check_entries(annotation: Path, key: str, entries: list, fields: dict[str, type]) -> None:
    """ValueError naming the first entry of a COCO list that lacks a field, or has one of another type."""
    for number, entry in enumerate(entries):
        for field, kind in fields.items():
            value = entry.get(field) if isinstance(entry, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(
                    f"{annotation}: entry {number} of {key} has the {field} {value!r}, expected {WORDS[kind]}; "
                    "add it, or leave the entry out"
                )


def coco_person(annotation: Path, row: dict, image: dict, folder: Path) -> Person:
    """The person of one annotation. Raises: ValueError naming it for a box or key points of another form."""
    name = f"{annotation}: annotation {row['id']}, a person,"
    box, points = row.get("bbox"), row.get("keypoints")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise ValueError(f"{name} has no bbox of four numbers")
    if points and (not isinstance(points, list) or len(points) != 3 * POINTS or not all(map(is_number, points))):
        raise ValueError(f"{name} has other key points than {POINTS} times x, y, visibility")
    stated = image.get("width"), image.get("height")
    x, y, w, h = box
    return Person(
        "coco",
        folder / image["file_name"],
        f"coco_{row['image_id']:012d}_{row['id']}",
        (x, y, x + w, y + h),
        stated if all(map(is_number, stated)) and all(stated) else None,
        tuple(points[2::3]) if points else None,
        annotation,
    )


def is_number(value) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def image_folder(annotation: Path, name: str) -> Path:
    """The folder of a COCO file's images: where the file named `name` lies."""
    split = "val2017" if "val" in annotation.stem else "train2017"
    tried = [annotation.parent, annotation.parent / split, annotation.parent.parent / split, annotation.parent.parent]
    for folder in tried:
        if (folder / name).is_file():
            return folder
    raise FileNotFoundError(
        f"{annotation}: no image {name} in {', '.join(map(str, tried))}; these annotations belong to other "
        f"images, or give the folder with --coco-images"
    )


def voc(root: Path, split: str = "trainval") -> list[Person]:
    """People of a Pascal VOC tree (VOC2007 or VOC2012, with Annotations, JPEGImages and ImageSets/Main/<split>.txt).

    Without the list all annotations are read. Raises: FileNotFoundError; ValueError for unreadable XML, or nobody.
    """
    root = Path(root)
    folder = root / "Annotations"
    if not folder.is_dir():
        raise FileNotFoundError(f"--voc: no folder {folder}; give the VOC2007 or VOC2012 folder of VOCdevkit")
    listed = root / "ImageSets" / "Main" / f"{split}.txt"
    names = (
        sorted(line.split()[0] for _, line in lists.lines(listed))
        if listed.is_file()
        else sorted(path.stem for path in folder.glob("*.xml"))
    )
    found = [
        person
        for name in names
        for person in voc_file(folder / f"{name}.xml", root / "JPEGImages", root.absolute().name)
    ]
    if not found:
        raise ValueError(f"{root}: nobody is annotated (no object named person in {len(names)} files)")
    return found


def voc_file(path: Path, images: Path, year: str) -> list[Person]:
    """The people of one XML file, in its order."""
    try:
        tree = ElementTree.fromstring(lists.text(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such annotation, but the list of images names it") from None
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is not readable as XML ({error})") from error
    image = images / (tree.findtext("filename") or f"{path.stem}.jpg")
    width, height = (tree.findtext(f"size/{key}", "").strip() for key in ("width", "height"))
    stated = (int(width), int(height)) if width.isdecimal() and height.isdecimal() and int(width) else None
    found = []
    for number, thing in enumerate(tree.iter("object")):
        if thing.findtext("name") == "person":
            try:
                x0, y0, x1, y1 = (float(thing.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
                if not all(map(math.isfinite, (x0, y0, x1, y1))):
                    raise ValueError
            except (TypeError, ValueError):
                raise ValueError(f"{path}: object {number}, a person, has no bndbox of four numbers") from None
            found.append(
                Person(
                    "voc",
                    image,
                    f"voc_{year.removeprefix('VOC')}{path.stem.replace('_', '')}_{number}",
                    (x0 - 1, y0 - 1, x1, y1),
                    stated,
                    None,
                    path,
                )
            )  # VOC counts pixels from 1, ends included
    return found


def clip(person: Person, width: int, height: int) -> tuple[int, int, int, int]:
    """The box within the image, whole pixels, no padding; without area where nothing of it lies within.

    Raises: ValueError if the annotation states another size of the image.
    """
    if person.size is not None and person.size != (width, height):
        raise ValueError(
            f"{person.file} describes {person.image.name} as {person.size[0]} x {person.size[1]} pixels, the file has "
            f"{width} x {height}: these annotations belong to other images"
        )
    x0, y0, x1, y1 = person.box
    left, top = (min(max(math.floor(v), 0), side) for v, side in ((x0, width), (y0, height)))
    return left, top, max(min(math.ceil(x1), width), left), max(min(math.ceil(y1), height), top)


def read_json(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"no annotation file {path}")
    return lists.read_json(path)
