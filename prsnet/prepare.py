"""Cut people out of COCO2017 and Pascal VOC for pre-training (sec. IV).

    python -m prsnet.prepare --coco person_keypoints_train2017.json --voc VOCdevkit/VOC2007 VOCdevkit/VOC2012
    python -m prsnet.prepare --coco person_keypoints_train2017.json --kpt none     # every box, as the authors' code
    python -m prsnet.prepare --mix market duke --data-dir /data              # ReID training images, no labels
    python -m prsnet.prepare --synthetic small                                     # rendered street scenes

Writes <out>/prsnet_pretrain/{coco,voc,mix}/*.jpg, manifest.jsonl (kept) and dropped.jsonl (with the reason), and prints
the counts; the paper's 80,689 crops are COCO and VOC together. A crop is the annotated box clipped to the image.
Paper silent: which VOC years (give the folders you want), the size of a person, the threshold of a key point.
"""

import functools
import json
import os
import shutil
import sys
from argparse import Namespace
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

from common import flags
from prsnet.flags import prepare_args as parse_args
from prsnet.flags import voc_mode

if __name__ == "__main__":
    flags.answer(parse_args)  # torch is loaded below

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import datasets, devices, pixels, synthetic
from common.datasets import luperson
from common.datasets.base import zero_is_distractor
from common.datasets.files import MARKER, shown
from common.datasets.person_crops import PUBLISHED, TREES
from common.inputs import data_name
from common.keypoints import detector
from prsnet import annotations, keypoints, settings
from prsnet.annotations import Person
from prsnet.protocols import TEST_IMAGES

MIN_SIDE = 8  # pixels; smaller boxes are always dropped
LISTED = 60  # so many people are listed one by one


def prepare(args: Namespace) -> Path:
    """Cut everything that the flags name; returns the folder. See the module for what it holds.

    Raises: FileNotFoundError, ValueError for annotations that do not fit their images, nobody annotated, or no crop
    left; FileExistsError if the folder holds something else.
    """
    if args.synthetic:
        return synthetic_crops(args.data_dir, args.synthetic, args.workers)
    root = (Path(args.out or args.data_dir) / TREES[0]).resolve()  # where it lies: a link to it stays one
    if root.exists() and not (root / "manifest.jsonl").is_file():
        raise FileExistsError(
            f"{root} exists and holds no manifest.jsonl, so it is not ours to replace; choose another --out"
        )
    people = [p for path in lying_apart(args.coco) for p in annotations.coco(path, args.coco_images)]
    people += [p for folder in lying_apart(args.voc) for p in annotations.voc(folder, args.split)]
    people = each_once(people)
    draft = root.with_name(f".{root.name}.{os.getpid()}.tmp")
    try:
        rows = cut_all(people, draft, args) + mixed(args, draft)
        report(rows, whole=bool(args.coco and args.voc) and not (Path(args.voc[0]).parent / MARKER).is_file())
        finish(draft, rows)
        shutil.rmtree(root, ignore_errors=True)
        os.replace(draft, root)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"written: {shown(root)}")
    return root


def lying_apart(paths: list[str]) -> list[Path]:
    """The paths in order, each place once, by whatever links it is named."""
    places: dict[str, Path] = {}
    for path in paths:
        if places.setdefault(os.path.realpath(path), Path(path)) != Path(path):
            print(f"note: {path} is {places[os.path.realpath(path)]} and is read once", file=sys.stderr)
    return list(places.values())


def each_once(people: list[Person]) -> list[Person]:
    """Everybody once, in order, where the same annotations were given twice.

    Raises: ValueError for two people whose crops would have one name.
    """
    known: dict[tuple[str, str], Person] = {}
    for person in people:
        key = person.source, person.name
        first = known.setdefault(key, person)
        if first is person:
            continue
        if first.visibility is None:
            known[key] = person  # instances_*.json knows the same people without their key points
        if first.box != person.box or first.image.resolve() != person.image.resolve():
            raise ValueError(
                f"{person.file} and {first.file} both have a person {person.name}, at different places: give the "
                f"annotations of one of them ids of their own"
            )
    if len(known) < len(people):
        print(f"note: {len(people) - len(known)} people are annotated twice and cut once", file=sys.stderr)
    return list(known.values())


def synthetic_crops(data_dir: str | Path, size: str, workers: int = 2, seed: int = 0) -> Path:
    """Crops of rendered street scenes below <data_dir>/synthetic-<size>, written on first use; returns the folder.

    COCO's key points filter COCO; rendered VOC has none, so its boxes are all kept.
    """
    data = Path(data_dir) / f"synthetic-{size}"
    coco = synthetic.write("coco", data, size, seed, workers)
    voc = synthetic.write("voc", data, size, seed, workers)
    root, stamp = data / TREES[0], (coco / MARKER).read_text()
    if (root / MARKER).is_file() and (root / MARKER).read_text() == stamp:
        return root
    words = [
        "--coco",
        coco / "annotations" / "person_keypoints_train2017.json",
        "--voc",
        voc / "VOC2012",
        "--voc-kpt",
        "none",
        "--out",
        data,
        "--workers",
        max(workers, 1),
    ]
    prepare(parse_args([str(word) for word in words]))
    (root / MARKER).write_text(stamp)
    return root


# -------------------------------------------------------------------------------------------------------------- cutting


def cut_all(people: list[Person], draft: Path, args: Namespace) -> list[dict]:
    """Cut and judge everybody; one plain row each, in the order of `people`."""
    modes = {"coco": args.kpt, "voc": voc_mode(args)}
    judges = {source: judge(modes[source], args) for source in sorted({p.source for p in people})}
    for source in judges:
        (draft / source).mkdir(parents=True, exist_ok=True)
    jobs = [list(group) for _, group in groupby(people, key=lambda p: p.image)]

    def job(group: list[Person]) -> list[dict]:
        return cut_image(group, draft, judges, args)

    with ThreadPoolExecutor(max(args.workers, 1)) as pool:
        return [
            row
            for rows in tqdm(pool.map(job, jobs), total=len(jobs), desc="cut", unit="image", disable=None)
            for row in rows
        ]


def judge(mode: str, args: Namespace):
    """A function (person, crop (H, W, 3) uint8) -> (scores or None, reason to drop it or "") for a key-point mode."""
    threshold = settings.THRESHOLDS[mode] if args.kpt_thr is None else args.kpt_thr
    if mode == "none":
        return lambda person, crop: (None, "")
    if mode == "coco-gt":
        return functools.partial(coco_judge, threshold=threshold)
    if mode == "json":
        if not args.kpt_json:
            raise ValueError("--kpt json needs --kpt-json FILE: 17 scores per crop, see prsnet/README.md")
        known = keypoints.load_scores(args.kpt_json)

        def look_up(person, crop):
            scores = known.get(person.name)
            return scores, keypoints.verdict(scores, threshold) if scores else f"no entry in {Path(args.kpt_json).name}"

        return look_up
    device = devices.choose()
    model = detector(args.kpt_weights, "--kpt-weights", ", or use --kpt coco-gt or --kpt none").to(device)

    def detect(person, crop):
        scores = keypoints.detect(model, crop, device)
        return scores, keypoints.verdict(scores, threshold)

    return detect


def coco_judge(person: Person, crop: np.ndarray, threshold: float):
    """COCO's annotation: all 17 visibility flags (0 not annotated, 1 hidden, 2 visible) above the threshold."""
    if person.visibility is None:
        raise ValueError(f"{person.file} has no key points; use person_keypoints_train2017.json, or another --kpt")
    return list(person.visibility), keypoints.verdict(list(person.visibility), threshold)


def cut_image(group: list[Person], draft: Path, judges: dict, args: Namespace) -> list[dict]:
    """Cut the people of one image, save those that are kept; one row each."""
    path = group[0].image
    try:
        image = np.asarray(pixels.read(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image, but {group[0].file} annotates it") from None
    rows = []
    for person in group:
        x0, y0, x1, y1 = annotations.clip(person, image.shape[1], image.shape[0])
        width, height = x1 - x0, y1 - y0
        scores, reason = None, size_verdict(width, height, args)
        if not reason:
            crop = image[y0:y1, x0:x1]
            scores, reason = judges[person.source](person, crop)
        if not reason:
            Image.fromarray(crop).save(draft / person.source / f"{person.name}.jpg", quality=95)
        rows.append(
            {
                "file": f"{person.source}/{person.name}.jpg",
                "source": person.source,
                "image": path.name,
                "box": [x0, y0, x1, y1],
                "kpt": scores,
                "reason": reason,
            }
        )
    return rows


def size_verdict(width: int, height: int, args: Namespace) -> str:
    if width < MIN_SIDE or height < MIN_SIDE:
        return f"a side below {MIN_SIDE} pixels"
    if width < args.min_w or height < args.min_h:
        return f"smaller than {args.min_w} x {args.min_h}"
    return ""


def mixed(args: Namespace, draft: Path) -> list[dict]:
    """Training images of ReID data sets, copied without their labels (the authors' mixReID)."""
    rows = []
    for name in args.mix:
        data = datasets.load(name, args.data_dir)
        samples = [s for s in data.train if s.pid >= 0]
        if args.mix_include_test:
            print(
                f"warning: --mix-include-test puts the test images of {data.name} into pre-training; its results "
                "are then no test any more",
                file=sys.stderr,
            )
            distractor = 0 if zero_is_distractor(data) else -1  # MSMT17's test person 0 is a person
            samples += [s for s in data.query + data.gallery if s.pid > distractor]
        (draft / "mix").mkdir(parents=True, exist_ok=True)
        if args.mix_include_test:
            with open(draft / TEST_IMAGES, "a", encoding="utf-8") as note:
                note.write(f"{data_name(data)}\n")
        for number, sample in enumerate(samples):
            content = luperson.content(sample.path)
            suffix = Path(sample.path).suffix.lower() if content is None else ".jpg"
            file = f"mix/{data.name}_{number:06d}{suffix}"
            (draft / file).write_bytes(Path(sample.path).read_bytes() if content is None else content)
            rows.append(
                {"file": file, "source": "mix", "image": Path(sample.path).name, "box": None, "kpt": None, "reason": ""}
            )
    return rows


# ------------------------------------------------------------------------------------------------------------ reporting


def report(rows: list[dict], whole: bool) -> None:
    """Print counts by source and reason, and everybody if there are few; `whole`: compare with the paper's count.

    Raises: ValueError if nothing is kept.
    """
    if len(rows) <= LISTED:
        for row in rows:
            size = f"{row['box'][2] - row['box'][0]} x {row['box'][3] - row['box'][1]}" if row["box"] else ""
            print(f"{'dropped' if row['reason'] else 'kept   '}  {row['file']:<36} {size:>10}  {row['reason']}")
    for source in sorted({row["source"] for row in rows}):
        own = [row for row in rows if row["source"] == source]
        print(f"{source}: {len(own)} people, {sum(not row['reason'] for row in own)} kept")
    reasons = Counter(row["reason"].split(":")[0] for row in rows if row["reason"])
    for reason, count in reasons.most_common():
        print(f"  dropped {count}: {reason}")
    kept = sum(not row["reason"] for row in rows)
    if not kept:
        told = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
        raise ValueError(
            f"no crop is left of {len(rows)} people ({told}); use --kpt none or smaller --min-w and --min-h"
        )
    if whole and abs(kept - PUBLISHED) > 0.05 * PUBLISHED:
        print(f"note: {kept} crops, the paper has {PUBLISHED}; --kpt and --kpt-thr move the number", file=sys.stderr)


def finish(draft: Path, rows: list[dict]) -> None:
    """Write manifest.jsonl and dropped.jsonl."""
    for name, part in (
        ("manifest.jsonl", [r for r in rows if not r["reason"]]),
        ("dropped.jsonl", [r for r in rows if r["reason"]]),
    ):
        lines = [json.dumps({k: v for k, v in row.items() if v not in (None, "")}) + "\n" for row in part]
        (draft / name).write_text("".join(lines), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    try:
        prepare(parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"error: {shown(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
