"""People in the annotation files of COCO (JSON) and Pascal VOC (XML), checked against their images."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".jpg", ".jpeg", ".png")


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
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
        raise ValueError(
            f"{annotation} is no COCO annotation file: it needs the keys images, annotations and categories"
        )
    person = {c["id"] for c in content["categories"] if c["name"] == "person"}
    by_id = {image["id"]: image for image in content["images"]}
    rows = [a for a in content["annotations"] if a["category_id"] in person and not a.get("iscrowd", 0)]
    if not rows:
        raise ValueError(f"{annotation}: nobody is annotated (no object of category person with iscrowd 0)")
    unknown = sorted({a["image_id"] for a in rows} - by_id.keys())
    if unknown:
        raise ValueError(f"{annotation}: annotations of image {unknown[0]}, which its list of images does not have")
    folder = Path(images) if images else image_folder(annotation, by_id[rows[0]["image_id"]]["file_name"])
    found = []
    for a in sorted(rows, key=lambda a: (a["image_id"], a["id"])):
        image, flags = by_id[a["image_id"]], a.get("keypoints")
        if len(a.get("bbox") or ()) != 4:
            raise ValueError(f"{annotation}: annotation {a['id']}, a person, has no bbox of four numbers")
        x, y, w, h = a["bbox"]
        found.append(
            Person(
                "coco",
                folder / image["file_name"],
                f"coco_{a['image_id']:012d}_{a['id']}",
                (x, y, x + w, y + h),
                (image["width"], image["height"]),
                tuple(flags[2::3]) if flags else None,
                annotation,
            )
        )
    return found


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
        sorted(line.split()[0] for line in listed.read_text().splitlines() if line.strip())
        if listed.is_file()
        else sorted(path.stem for path in folder.glob("*.xml"))
    )
    found = [person for name in names for person in voc_file(folder / f"{name}.xml", root / "JPEGImages", root.name)]
    if not found:
        raise ValueError(f"{root}: nobody is annotated (no object named person in {len(names)} files)")
    return found


def voc_file(path: Path, images: Path, year: str) -> list[Person]:
    """The people of one XML file, in its order."""
    try:
        tree = ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such annotation, but the list of images names it") from None
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is not readable as XML ({error})") from error
    image, size = images / (tree.findtext("filename") or f"{path.stem}.jpg"), tree.find("size")
    stated = (int(size.findtext("width")), int(size.findtext("height"))) if size is not None else None
    found = []
    for number, thing in enumerate(tree.iter("object")):
        if thing.findtext("name") == "person":
            try:
                x0, y0, x1, y1 = (float(thing.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
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
    """The box within the image, whole pixels, no padding. Raises: ValueError if it does not fit the image."""
    if person.size is not None and person.size != (width, height):
        raise ValueError(
            f"{person.file} describes {person.image.name} as {person.size[0]} x {person.size[1]} pixels, the file has "
            f"{width} x {height}: these annotations belong to other images"
        )
    x0, y0, x1, y1 = person.box
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        raise ValueError(
            f"{person.file}: {person.name} has the box {[round(v, 1) for v in person.box]} outside its image of "
            f"{width} x {height}: these annotations belong to other images"
        )
    return max(int(x0), 0), max(int(y0), 0), min(-int(-x1 // 1), width), min(-int(-y1 // 1), height)


def read_json(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"no annotation file {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as JSON ({error})") from error
