"""PRSNet: crops from COCO and VOC annotations, the key-point filter, and what is said about wrong files."""

import json

import numpy as np
import pytest
from conftest import write_market
from PIL import Image

from common import datasets
from common.synthetic import street
from prsnet import annotations, keypoints, prepare


def write_coco(root, people, size=(64, 48), file_size=None, flags=True):
    """One image and its COCO annotations; people: (box, visibility of all points) pairs."""
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    picture = np.random.default_rng(0).integers(
        0, 256, ((file_size or size)[1], (file_size or size)[0], 3), dtype=np.uint8
    )
    Image.fromarray(picture).save(root / "train2017" / "000000000007.jpg", quality=98)
    rows = [
        {
            "id": n,
            "image_id": 7,
            "category_id": 1,
            "iscrowd": 0,
            "bbox": box,
            **({"keypoints": [1, 1, v] * 17} if flags else {}),
        }
        for n, (box, v) in enumerate(people)
    ]
    content = {
        "images": [{"id": 7, "file_name": "000000000007.jpg", "width": size[0], "height": size[1]}],
        "annotations": rows,
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}],
    }
    path = root / "annotations" / "person_keypoints_train2017.json"
    path.write_text(json.dumps(content))
    return path, content


def cut(*words):
    return prepare.prepare(prepare.parse_args([str(word) for word in words]))


def kept(root):
    return [json.loads(line) for line in (root / "manifest.jsonl").read_text().splitlines()]


def test_whole_people_are_kept_and_the_others_have_a_reason(tmp_path, capsys):
    path, content = write_coco(
        tmp_path, [((10, 4, 20, 40), 2), ((30, 4, 12, 30), 0), ((5, 5, 7, 30), 2), ((50.5, 20, 40, 60), 1)]
    )
    content["annotations"] += [
        {**content["annotations"][0], "id": 90, "iscrowd": 1},
        {**content["annotations"][0], "id": 91, "category_id": 2},
    ]
    path.write_text(json.dumps(content))
    root = cut("--coco", path, "--out", tmp_path / "out")
    assert [(row["file"], row["box"]) for row in kept(root)] == [
        ("coco/coco_000000000007_0.jpg", [10, 4, 30, 44]),
        ("coco/coco_000000000007_3.jpg", [50, 20, 64, 48]),
    ]
    dropped = [json.loads(line)["reason"] for line in (root / "dropped.jsonl").read_text().splitlines()]
    assert dropped == ["no key point", "a side below 8 pixels"]
    assert "coco: 4 people, 2 kept" in capsys.readouterr().out
    original, crop = (
        np.asarray(Image.open(tmp_path / "train2017/000000000007.jpg")),
        np.asarray(Image.open(root / "coco/coco_000000000007_0.jpg")),
    )
    assert crop.shape == (40, 20, 3) and np.abs(crop.astype(int) - original[4:44, 10:30]).mean() < 8
    data = datasets.load("person_crops", tmp_path / "out")
    assert len(data.train) == 2 and data.query == data.gallery == [] and "2 crops" in data.statistics()


def test_scores_of_hrnet_decide_by_name_and_threshold(tmp_path):
    path, _ = write_coco(tmp_path, [((0, 0, 20, 40), 0), ((20, 0, 20, 40), 0), ((40, 0, 20, 40), 0)])
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"coco_000000000007_0": [0.9] * 17, "coco_000000000007_1.jpg": [0.9] * 16 + [0.2]}))
    root = cut("--coco", path, "--kpt", "json", "--kpt-json", scores, "--out", tmp_path / "a")
    assert [row["file"][-6:] for row in kept(root)] == ["_0.jpg"]
    root = cut("--coco", path, "--kpt", "json", "--kpt-json", scores, "--kpt-thr", 0.1, "--out", tmp_path / "b")
    assert len(kept(root)) == 2
    scores.write_text(json.dumps([{"image_id": "coco_000000000007_2", "keypoints": [3, 3, 0.8] * 17}]))
    assert (
        kept(cut("--coco", path, "--kpt", "json", "--kpt-json", scores, "--out", tmp_path / "c"))[0]["file"][-6:]
        == "_2.jpg"
    )
    scores.write_text(json.dumps({"x": [1] * 16}))
    with pytest.raises(ValueError, match="x has 16 scores, expected 17"):
        keypoints.load_scores(scores)


def test_voc_boxes_count_from_one_and_only_people_are_cut(tmp_path):
    root = tmp_path / "VOC2012"
    (root / "Annotations").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    Image.fromarray(np.zeros((50, 40, 3), np.uint8)).save(root / "JPEGImages" / "2008_000001.jpg")
    box = "<bndbox><xmin>1</xmin><ymin>3</ymin><xmax>20</xmax><ymax>50</ymax></bndbox>"
    (root / "Annotations" / "2008_000001.xml").write_text(
        "<annotation><filename>2008_000001.jpg</filename><size><width>40</width><height>50</height></size>"
        f"<object><name>dog</name>{box}</object><object><name>person</name>{box}</object></annotation>"
    )
    rows = kept(cut("--voc", root, "--kpt", "none", "--out", tmp_path / "out"))
    assert [(row["file"], row["box"]) for row in rows] == [("voc/voc_20122008000001_1.jpg", [0, 2, 20, 50])]


@pytest.mark.parametrize(
    "people, options, words, message",
    [
        (
            [((0, 0, 20, 40), 2)],
            {"file_size": (32, 24)},
            [],
            "as 64 x 48 pixels, the file has 32 x 24: these annotations belong to other images",
        ),
        ([((70, 0, 20, 40), 2)], {}, [], "no crop is left of 1 people .1 a side below 8 pixels"),
        ([], {}, [], "nobody is annotated"),
        ([((0, 0, 20, 40), 0)], {}, [], r"no crop is left of 1 people \(1 no key point\)"),
        ([((0, 0, 0, 0), 2)], {}, ["--kpt", "none"], "a side below 8"),
        ([((4, 4, 2, 0), 2)], {}, ["--kpt", "none"], "no crop is left of 1 people .1 a side below 8 pixels"),
        ([((0, 0, 20, 40), 2)], {"flags": False}, [], "has no key points; use person_keypoints_train2017.json"),
        ([((0, 0, 20, 40), 2)], {}, ["--kpt", "json"], "needs --kpt-json FILE"),
        (
            [((0, 0, 20, 40), 2)],
            {},
            ["--kpt", "keypointrcnn", "--kpt-weights", "gone.pth"],
            "--kpt-weights: no file gone.pth",
        ),
        ([((0, 0, 20, 40), 2)], {}, ["--min-h", "160"], "smaller than 0 x 160"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence_and_nothing_is_left(tmp_path, people, options, words, message):
    path, _ = write_coco(tmp_path, people, **options)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        cut("--coco", path, "--out", tmp_path / "out", *words)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_missing_and_broken_files_are_named(tmp_path):
    path, content = write_coco(tmp_path, [((0, 0, 20, 40), 2)])
    (tmp_path / "train2017" / "000000000007.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match="no image 000000000007.jpg in .*these annotations belong to other images"
    ):
        cut("--coco", path, "--out", tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        cut("--coco", path, "--out", tmp_path)
    path.write_text(json.dumps({"images": []}))
    with pytest.raises(ValueError, match="no COCO annotation file"):
        annotations.coco(path)
    path.write_text(json.dumps({**content, "annotations": [{**content["annotations"][0], "bbox": []}]}))
    with pytest.raises(ValueError, match="annotation 0, a person, has no bbox of four numbers"):
        cut("--coco", path, "--coco-images", tmp_path, "--out", tmp_path)
    content["annotations"][0]["image_id"] = 8
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="annotations of image 8, which its list of images does not have"):
        annotations.coco(path)
    with pytest.raises(FileNotFoundError, match="give the VOC2007 or VOC2012 folder"):
        annotations.voc(tmp_path)
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "1.xml").write_text("<annotation><object><name>person</name></object></annotation>")
    with pytest.raises(ValueError, match="1.xml: object 0, a person, has no bndbox of four numbers"):
        annotations.voc(tmp_path)
    (tmp_path / "prsnet_pretrain").mkdir()
    with pytest.raises(FileExistsError, match="not ours to replace"):
        cut("--coco", path, "--out", tmp_path)


def test_mixed_training_images_lose_their_labels_and_test_images_are_warned_about(tmp_path, capsys):
    write_market(tmp_path, train_ids=3, test_ids=2)
    root = cut("--mix", "market", "--data-dir", tmp_path, "--out", tmp_path / "a")
    assert (
        len(kept(root)) == 18
        and kept(root)[0]["file"] == "mix/market_000000.jpg"
        and "warning" not in capsys.readouterr().err
    )
    root = cut("--mix", "market", "--mix-include-test", "--data-dir", tmp_path, "--out", tmp_path / "b")
    assert len(kept(root)) == 30 and "no test any more" in capsys.readouterr().err


def test_street_scenes_hold_what_their_annotations_say(tmp_path, monkeypatch):
    monkeypatch.setitem(street.SCENES, ("coco", "small"), (2, 1))
    monkeypatch.setitem(street.SCENES, ("voc", "small"), (2, 0))
    root = prepare.synthetic_crops(tmp_path, "small", workers=1)
    coco = tmp_path / "synthetic-small" / "coco" / "annotations"
    content = json.loads((coco / "person_keypoints_train2017.json").read_text())
    assert len(content["images"]) == 2 and len(json.loads((coco / "instances_val2017.json").read_text())["images"]) == 1
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for row in content["annotations"]:
        x, y, w, h = row["bbox"]
        width, height = sizes[row["image_id"]]
        assert 0 <= x < x + w <= width and 0 <= y < y + h <= height and 0 < row["area"] <= w * h
        points = np.array(row["keypoints"]).reshape(17, 3)
        seen = points[points[:, 2] == 2]
        assert (
            (seen[:, 0] >= x - 1).all()
            and (seen[:, 0] <= x + w + 1).all()
            and (seen[:, 1] >= y - 1).all()
            and (seen[:, 1] <= y + h + 1).all()
        )
        assert row["num_keypoints"] == (points[:, 2] > 0).sum()
    whole = [r for r in content["annotations"] if not r["iscrowd"] and r["num_keypoints"] == 17]
    rows = kept(root)
    assert len([row for row in rows if row["source"] == "coco"]) == len(whole) > 0
    assert any(row["source"] == "voc" for row in rows)
    assert datasets.load("person_crops", tmp_path / "synthetic-small").kind == "synthetic"
    assert prepare.synthetic_crops(tmp_path, "small", workers=1) == root  # at once, nothing drawn


def test_a_scene_is_the_same_whenever_it_is_drawn():
    (a, things), (b, _) = street.draw("voc", 3, 0), street.draw("voc", 3, 0)
    assert np.array_equal(a, b) and things and not np.array_equal(a, street.draw("voc", 3, 1)[0])


def test_command_line_ends_with_one_sentence(tmp_path, capsys):
    assert prepare.main(["--coco", str(tmp_path / "gone.json")]) == 1
    assert capsys.readouterr().err.strip() == f"error: no annotation file {tmp_path / 'gone.json'}"


# -------------------------------------------------------------------------------------- annotations as they are outside


def test_a_box_without_area_or_outside_is_dropped_with_its_reason_and_the_others_are_cut(tmp_path):
    good = ((0, 0, 20, 40), 2)
    path, _ = write_coco(
        tmp_path, [good, ((64, 0, 0, 40), 2), ((70, 0, 20, 40), 2), ((-30, 0, 20, 40), 2), ((20, 30, -9, 40), 2)]
    )
    root = cut("--coco", path, "--out", tmp_path / "out")
    assert [row["box"] for row in kept(root)] == [[0, 0, 20, 40]]
    dropped = [json.loads(line) for line in (root / "dropped.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in dropped} == {"a side below 8 pixels"} and len(dropped) == 4
    assert all(0 <= row["box"][0] <= row["box"][2] <= 64 and 0 <= row["box"][1] <= row["box"][3] for row in dropped)


def test_the_same_annotations_twice_give_everybody_once(tmp_path, capsys):
    path, content = write_coco(tmp_path, [((0, 0, 20, 40), 2), ((20, 0, 20, 40), 2)])
    link, copy = tmp_path / "annotations/link.json", tmp_path / "annotations/copy.json"
    link.symlink_to(path)
    copy.write_text(path.read_text())
    root = cut("--coco", path, link, copy, "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert f"{link} is {path} and is read once" in said and "2 people are annotated twice and cut once" in said
    assert len(datasets.load("person_crops", tmp_path / "out").train) == len(kept(root)) == 2
    without = {**content, "annotations": [{**a, "keypoints": None} for a in content["annotations"]]}
    copy.write_text(json.dumps(without))  # instances_*.json: the same people without key points
    assert len(kept(cut("--coco", copy, path, "--out", tmp_path / "out"))) == 2
    content["annotations"][1]["bbox"] = [30, 0, 20, 40]
    copy.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="copy.json and .*_train2017.json both have a person coco_000000000007_1"):
        cut("--coco", path, copy, "--out", tmp_path / "out")
    assert len(kept(root)) == 2  # what was there before stays


def test_mixed_data_sets_are_taken_once_under_any_name(tmp_path):
    write_market(tmp_path, train_ids=3, test_ids=2)
    root = cut("--mix", "market", "market1501", "--data-dir", tmp_path, "--out", tmp_path / "a")
    assert len(kept(root)) == 18 == len(datasets.load("person_crops", tmp_path / "a").train)


@pytest.mark.parametrize("threshold, number", [("0", 2), ("1", 1)])
def test_the_threshold_counts_for_cocos_own_flags(tmp_path, threshold, number):
    path, _ = write_coco(tmp_path, [((0, 0, 20, 40), 2), ((20, 0, 20, 40), 1), ((40, 0, 20, 40), 0)])
    assert len(kept(cut("--coco", path, "--kpt-thr", threshold, "--out", tmp_path / "out"))) == number


@pytest.mark.parametrize(
    "words, said",
    [
        ("--coco a.json --kpt-thr 2", "COCO's flags are 0, 1 and 2"),
        ("--coco a.json --kpt-thr -1", "COCO's flags are 0, 1 and 2"),
        ("--coco a.json --kpt none --kpt-thr 1", "has no key points to count"),
        ("--voc a --kpt none --kpt-thr 1", "has no key points to count"),
        ("--mix markt", "--mix: unknown data set 'markt'"),
    ],
)
def test_flags_without_effect_are_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        prepare.parse_args(words.split())
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "place, field, value, said",
    [
        ("annotations", "keypoints", [1, 1, 2], "annotation 0, a person, has other key points than 17 times"),
        ("annotations", "keypoints", [1, 1, None] * 17, "annotation 0, a person, has other key points"),
        ("annotations", "bbox", ["0", "0", "20", "40"], "annotation 0, a person, has no bbox of four numbers"),
        ("annotations", "bbox", "0,0,", "has no bbox of four numbers"),
        ("annotations", "bbox", [0, 0, float("nan"), 4], "has no bbox of four numbers"),
        ("annotations", "id", None, "entry 0 of annotations has the id None, expected a whole number"),
        ("annotations", "category_id", None, "entry 0 of annotations has the category_id None"),
        ("annotations", "image_id", "7", "entry 0 of annotations has the image_id '7'"),
        ("images", "id", None, "entry 0 of images has the id None"),
        ("images", "file_name", None, "entry 0 of images has the file_name None, expected text"),
        ("categories", "name", None, "entry 0 of categories has the name None"),
    ],
)
def test_an_entry_that_lacks_something_is_named(tmp_path, place, field, value, said):
    path, content = write_coco(tmp_path, [((0, 0, 20, 40), 2)])
    content[place][0][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said) as caught:
        cut("--coco", path, "--out", tmp_path / "out")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_image_whose_size_is_not_stated_is_cut(tmp_path):
    path, content = write_coco(tmp_path, [((0, 0, 20, 40), 2)])
    del content["images"][0]["width"]
    path.write_bytes(json.dumps(content).encode("utf-8-sig"))
    assert len(kept(cut("--coco", path, "--out", tmp_path / "out"))) == 1


@pytest.mark.parametrize("scores", [{"x": ["1"] * 17}, {"x": 3}, [{"image_id": "x", "keypoints": None}], [3], "x"])
def test_scores_of_another_form_are_named(tmp_path, scores):
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    with pytest.raises(ValueError, match="scores.json: .*expected"):
        keypoints.load_scores(tmp_path / "scores.json")


def write_msmt(root):
    """MSMT17 with the test people 0 and 1, and one training person."""
    train, query, test = ["0000_c1_0.jpg", "0000_c2_1.jpg"], ["0000_c1_0.jpg", "0001_c1_0.jpg"], ["0000_c2_1.jpg"]
    for folder, names in {"bounding_box_train": train, "query": query, "bounding_box_test": test}.items():
        (root / "msmt17" / folder).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (8, 16)).save(root / "msmt17" / folder / name)


def test_person_0_of_msmt17_is_a_person(tmp_path):
    write_msmt(tmp_path)
    words = ["--mix", "msmt17", "--mix-include-test", "--data-dir", tmp_path]
    assert len(kept(cut(*words, "--out", tmp_path / "out"))) == 5


def test_folders_that_are_links_are_read_and_written_through(tmp_path):
    path, _ = write_coco(tmp_path / "disk", [((0, 0, 20, 40), 2)])
    (tmp_path / "coco").symlink_to(tmp_path / "disk")
    (tmp_path / "big" / "crops").mkdir(parents=True)
    (tmp_path / "big" / "crops" / "manifest.jsonl").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "prsnet_pretrain").symlink_to(tmp_path / "big" / "crops")
    annotation = tmp_path / "coco" / path.relative_to(tmp_path / "disk")
    for _ in range(2):
        assert len(kept(cut("--coco", annotation, "--out", tmp_path / "out"))) == 1
    assert (tmp_path / "out" / "prsnet_pretrain").is_symlink()
    assert [p.name for p in (tmp_path / "big").iterdir()] == ["crops"]
    assert len(datasets.load("person_crops", tmp_path / "out").train) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "gbk", "utf-16"])
@pytest.mark.parametrize("size", ["<size><width>40</width><height>50</height></size>", "<size/>", ""])
def test_voc_files_of_other_programs_are_read(tmp_path, encoding, size):
    root = tmp_path / "VOC2012"
    (root / "Annotations").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    Image.fromarray(np.zeros((50, 40, 3), np.uint8)).save(root / "JPEGImages" / "\u4eba.jpg")
    box = "<bndbox><xmin>1</xmin><ymin>3</ymin><xmax>20</xmax><ymax>50</ymax></bndbox>"
    text = (
        f'<?xml version="1.0" encoding="{encoding}"?><annotation><filename>\u4eba.jpg</filename>{size}'
        f"<object><name>person</name>{box}</object></annotation>"
    )
    (root / "Annotations" / "1.xml").write_bytes(text.encode(encoding))
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "trainval.txt").write_bytes("1\r\n".encode("utf-8-sig"))
    assert [row["box"] for row in kept(cut("--voc", root, "--kpt", "none", "--out", tmp_path / "out"))] == [
        [0, 2, 20, 50]
    ]
