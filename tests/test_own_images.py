"""A trained network on folders of one's own: ranking.csv, pictures, features and exported programs of every project."""

import csv
import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dapg_trees import write_regdb
from PIL import Image
from torch import nn

from aff_scl import test as aff_test
from aff_scl import train as aff_train
from aff_scl.model import convert_dsbn
from common import datasets, images, log_folder, own_images, runtime, transforms
from common.datasets import files
from convnext_ap import test as convnext_test
from convnext_ap import train as convnext_train
from dapg import test as dapg_test
from dapg import train as dapg_train
from dapg.downstream import agw
from pixel_sampling import model as pixel_model
from pixel_sampling import test as pixel_test
from pixel_sampling import train as pixel_train
from prsnet import pretrain as prsnet_pretrain
from prsnet import test as prsnet_test
from prsnet import train as prsnet_train

MAE = "--model mae --size tiny --mask-block 4 2".split()
SIZE = "--height 64 --width 32 --weights none".split()
PROJECTS = {  # project -> its test script, the flags of a tiny training, the network of these flags
    "aff_scl": (
        aff_test,
        lambda: aff_train.parse_args([*SIZE, "--backbone", "resnet18"]),
        lambda args: aff_train.build_model(args, 0),
    ),
    "convnext_ap": (
        convnext_test,
        lambda: convnext_train.parse_args([*SIZE, "--trunk", "tiny", "--parts", "2"]),
        lambda args: convnext_train.build_model(args, 5),
    ),
    "pixel_sampling": (
        pixel_test,
        lambda: pixel_train.parse_args([*SIZE, "--backbone", "resnet18"]),
        lambda args: pixel_model.build(args.arch, 5, args.backbone),
    ),
    "prsnet": (
        prsnet_test,
        lambda: prsnet_train.parse_args([*SIZE, "--size", "tiny", "--mask-block", "4", "2"]),
        lambda args: prsnet_train.build_model(args, 5),
    ),
    "dapg": (
        dapg_test,
        lambda: dapg_train.parse_args([*SIZE, "--stage", "agw", "--dataset", "sysu", "--backbone", "resnet18"]),
        lambda args: agw.TwoStream(5, args.backbone),
    ),
}


def save(project, folder):
    """A checkpoint of a network with random weights and used statistics, written by the project's own code."""
    _, flags, build = PROJECTS[project]
    args = flags()
    run = runtime.start(args, project)
    run.log_dir = folder
    torch.manual_seed(1)
    model = build(args)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    log_folder.save(run, 1, model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1))
    return folder / "checkpoint_0001.pt"


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("weights"), {}

    def of(project):
        if project not in made:
            (folder / project).mkdir()
            made[project] = save(project, folder / project)
        return made[project]

    return of


def picture(path, number, size=(30, 70)):
    """A striped image that only `number` decides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stripes = np.random.default_rng(number).integers(0, 256, (7, 1, 3), dtype=np.uint8)
    Image.fromarray(stripes.repeat(10, 0).repeat(30, 1)).resize(size).save(path)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Queries 0 and 1; a gallery of five in which b.png is query 0 and deep/e.JPG is no copy of any."""
    folder = tmp_path_factory.mktemp("folders")
    for name, number in (("one.png", 0), ("two.png", 1)):
        picture(folder / "query" / name, number)
    for name, number in (("a.png", 5), ("b.png", 0), ("c.png", 6), ("deep/d.png", 1), ("deep/e.JPG", 8)):
        picture(folder / "gallery" / name, number)
    (folder / "gallery" / "notes.txt").write_text("no image")
    return folder


def go(project, *words):
    script = PROJECTS[project][0]
    context = torch.inference_mode() if project == "dapg" else torch.enable_grad()  # as the scripts do
    with context:
        script.main(script.parse_args([str(word) for word in words]))


def own(project, weights, folders, out, *more):
    same = ["--query-modality", "visible"] if project == "dapg" else []  # copies are equal in one stream only
    go(project, "--weights", weights(project), "--query", folders / "query", "--gallery", folders / "gallery",
       "--out", out, *same, *more)  # fmt: skip


@pytest.mark.parametrize("project", PROJECTS)
def test_a_project_ranks_folders_writes_features_and_exports_its_network(project, weights, folders, tmp_path, capsys):
    out = tmp_path / "out"
    own(project, weights, folders, out, "--export-features", tmp_path / "feats", "--export", tmp_path / "net.pt2")
    lines = list(csv.DictReader((out / "ranking.csv").open()))
    assert list(lines[0]) == ["query", "rank", "gallery", "distance"] and len(lines) == 2 * 5
    first = {Path(line["query"]).name: line for line in lines if line["rank"] == "1"}
    found = {name: Path(line["gallery"]).name for name, line in first.items()}
    assert found == {"one.png": "b.png", "two.png": "d.png"}
    assert all(float(line["distance"]) < 1e-2 for line in first.values())
    for name in ("one.png", "two.png"):
        row = [line for line in lines if line["query"].endswith(name)]
        values = [float(line["distance"]) for line in row]
        assert values == sorted(values) and [line["rank"] for line in row] == list("12345")
        assert len({line["gallery"] for line in row}) == 5
    with Image.open(out / "ranking.png") as sheet:
        assert sheet.width > 500
    feats = np.load(tmp_path / "feats" / "features.npy")
    rows = [json.loads(line) for line in (tmp_path / "feats" / "features.jsonl").read_text().splitlines()]
    assert feats.shape[0] == len(rows) == 7 and feats.dtype == np.float32
    assert [row["split"] for row in rows] == ["query"] * 2 + ["gallery"] * 5 and "pid" not in rows[0]
    distance = np.linalg.norm(feats[0] - feats[2:], axis=1)
    shown = {line["gallery"]: float(line["distance"]) for line in lines if line["query"].endswith("one.png")}
    assert np.allclose([shown[row["path"]] for row in rows[2:]], distance, atol=2e-3)
    size = (64, 32)
    filters = {"pixel_sampling": "bilinear", "prsnet": "bilinear", "dapg": "lanczos"}
    store = images.open_images([rows[4]["path"]], *size, interpolation=filters.get(project, "bicubic"), cache="off")
    program = torch.export.load(tmp_path / "net.pt2").module()
    assert np.allclose(program(store.gather(torch.arange(1))).detach(), feats[4:5], atol=1e-4)
    assert "max abs difference" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["ranking.csv", "ranking.png"]
    stream = ["--query-modality", "visible"] if project == "dapg" else []
    go(project, "--weights", weights(project), "--query", folders / "query", "--gallery-features", tmp_path / "feats",
       "--out", tmp_path / "again", *stream)  # fmt: skip
    assert (tmp_path / "again" / "ranking.csv").read_bytes() == (out / "ranking.csv").read_bytes()


def data_set(project, folder):
    """The flags that name a miniature data set of the project, written into folder, not of the network's size."""
    if project == "dapg":
        return ["-d", "regdb", "--data-dir", write_regdb(folder), "--draws", 1, "--corruption", "contrast"]
    if project == "pixel_sampling":
        for pid, part in ((1, "train"), (2, "test")):
            for camera in "ABC":
                place = f"train/001/{camera}_cropped_rgb1" if part == "train" else f"test/{camera}/002/cropped_rgb1"
                picture(folder / "prcc" / "rgb" / f"{place}.jpg", ord(camera) + pid)
        return ["--data-dir", folder]
    for place in ("bounding_box_train/0001_c1s1_000001_00", "query/0002_c1s1_000001_00", "query/0003_c2s1_000001_00",
                  "bounding_box_test/0002_c2s1_000002_00", "bounding_box_test/0003_c1s1_000002_00"):  # fmt: skip
        picture(folder / "market1501" / f"{place}.jpg", int(place.partition("/")[2][:4]), (41, 95))
    return ["-d", "market", "--data-dir", folder, *(["--protocol", "image"] if project == "prsnet" else [])]


@pytest.mark.filterwarnings("ignore:.*instead of the published")
@pytest.mark.parametrize("project", PROJECTS)
def test_features_of_a_data_set_carry_its_identities_and_equal_those_of_its_folder(project, weights, tmp_path):
    words = data_set(project, tmp_path / "data")
    place = [] if project == "pixel_sampling" else ["--out", tmp_path / ("a.png" if project == "prsnet" else "out")]
    go(project, "--weights", weights(project), "--export-features", tmp_path, "-j", 1, "--cache-dir", tmp_path, *words,
       *place)  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "features.jsonl").read_text().splitlines()]
    feats = np.load(tmp_path / "features.npy")
    assert len(feats) == len(rows) and np.isfinite(feats).all()
    name = {"dapg": "regdb", "pixel_sampling": "prcc"}.get(project, "market")
    data = datasets.load(name, tmp_path / "data", **({"split": 1} if project == "dapg" else {}))
    wanted = [(s.path, s.pid, s.camid) for s in data.query + data.gallery]
    assert [(row["path"], row["pid"], row["camid"]) for row in rows] == wanted
    assert [row["split"] for row in rows] == ["query"] * len(data.query) + ["gallery"] * len(data.gallery)
    folder = Path(data.root) / {"dapg": "Visible", "pixel_sampling": "rgb"}.get(project, "")  # visible is the default
    go(project, "--weights", weights(project), "--gallery", folder, "--export-features", tmp_path / "own")
    own_rows = [json.loads(line) for line in (tmp_path / "own" / "features.jsonl").read_text().splitlines()]
    described = dict(zip((row["path"] for row in own_rows), unit(np.load(tmp_path / "own" / "features.npy"))))
    both = [(described[row["path"]], x) for row, x in zip(rows, unit(feats)) if row["path"] in described]
    assert len(both) >= len(data.query) and all(np.allclose(a, b, atol=1e-5) for a, b in both)
    search = ["--weights", weights(project), "--query", data.query[0].path, "--gallery-features", tmp_path]
    if project == "dapg":  # RegDB's gallery is infrared, and the flag's default another stream
        with pytest.raises(ValueError, match="form bn of the infrared stream instead of bn of the visible stream"):
            go(project, *search, "--out", tmp_path / "found")
        search += ["--gallery-modality", "infrared"]
    go(project, *search, "--out", tmp_path / "found")
    found = [line["gallery"] for line in csv.DictReader((tmp_path / "found" / "ranking.csv").open())]
    assert sorted(found) == sorted(s.path for s in data.gallery)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("project", PROJECTS)
def test_weights_that_do_not_fit_are_one_clear_sentence(project, weights, folders, tmp_path):
    other = next(name for name in PROJECTS if name != project)
    state = torch.load(weights(project), weights_only=True)
    name = next(iter(state["state_dict"]))
    state["state_dict"]["gone"] = state["state_dict"].pop(name)
    torch.save(state, tmp_path / "cut.pt")
    (tmp_path / "text.pt").write_text("hello")
    for file, said in (
        (weights(other), "no checkpoint of"),
        (tmp_path / "cut.pt", "does not fit the model: 1 missing"),
        (tmp_path / "text.pt", "not a readable checkpoint"),
        (tmp_path / "nowhere.pt", "no checkpoint"),
    ):
        words = ["--query", folders / "query", "--gallery", folders / "gallery", "--out", tmp_path / "out"]
        with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
            go(project, "--weights", file, *words)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_two_streams_of_dapg_describe_differently(weights, folders, tmp_path):
    for name, more in (("mixed", []), ("visible", ["--query-modality", "visible"])):
        go("dapg", "--weights", weights("dapg"), "--query", folders / "query", "--gallery", folders / "gallery",
           "--out", tmp_path / name, "--export-features", tmp_path / name, *more)  # fmt: skip
    mixed, visible = (np.load(tmp_path / name / "features.npy") for name in ("mixed", "visible"))
    assert np.allclose(mixed[2:], visible[2:], atol=1e-5) and not np.allclose(mixed[:2], visible[:2], atol=1e-2)


def test_networks_that_need_more_than_images_say_so(folders, tmp_path):
    args = prsnet_pretrain.parse_args(["--size", "tiny", "--height", "64", "--width", "32", "--mask-block", "4", "2"])
    run = runtime.start(args, "prsnet")
    run.log_dir = tmp_path
    model = prsnet_pretrain.build_model(args)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    log_folder.save(run, 1, model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1))
    words = ["--query", folders / "query", "--gallery", folders / "gallery"]
    with pytest.raises(ValueError, match="pre-training checkpoint"):
        go("prsnet", "--weights", tmp_path / "checkpoint_0001.pt", *words)
    trained = {"arch": "head", "height": 64, "width": 32}
    with pytest.raises(ValueError, match="parsing masks"):
        args = pixel_test.parse_args([str(word) for word in ["--weights", "w", *words]])
        pixel_test.run_own_images(args, nn.Identity(), trained, tmp_path / "w")


# ----------------------------------------------------------------------------------------------------- the shared part


class Mean(nn.Module):
    """Three colours of an image (B, 3)."""

    form = "mean colour"

    def forward(self, x):
        return x.mean((2, 3))


ORIGIN = own_images.origin("tests", Mean(), {"height": 8, "width": 4})


def flags(**changes):
    given = dict.fromkeys(("query", "gallery", "gallery_features", "export_features", "export"))
    return SimpleNamespace(**{**given, "top": 100, **changes})


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda folder: (folder / "gallery").mkdir(), "--gallery .*gallery: no image"),
        (lambda folder: None, "--gallery .*gallery: no such folder"),
        (lambda folder: picture(folder / "gallery" / "a.png", 1) or cut(folder / "gallery" / "b.png"), "b.png"),
    ],
    ids=["empty", "missing", "broken"],
)
def test_a_bad_folder_is_named_and_nothing_is_written(tmp_path, spoil, said):
    picture(tmp_path / "query" / "q.png", 0)
    spoil(tmp_path)
    given = {"query": str(tmp_path / "query"), "gallery": str(tmp_path / "gallery")}
    with pytest.raises((FileNotFoundError, ValueError), match=said):
        own_images.run(flags(**given, export_features=str(tmp_path / "f")), Mean(), ORIGIN, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "f").exists()


def cut(path):
    picture(path, 3)
    path.write_bytes(path.read_bytes()[:80])


@pytest.mark.parametrize(
    "words, said",
    [
        ("--query a", "--query PATH needs --gallery"),
        ("--gallery a", "--gallery PATH needs --query"),
        ("--export a.onnx", "must end in .pt2"),
        ("--query a --gallery b --top -1", "at least 0"),
    ],
)
def test_flags_that_do_not_fit_together_end_with_one_sentence(words, said, capsys):
    for script in (aff_test, convnext_test, prsnet_test, dapg_test):
        with pytest.raises(SystemExit):
            script.parse_args(["--weights", "w", *words.split()])
        assert said in capsys.readouterr().err


def test_the_query_flag_of_pixel_sampling_keeps_its_meaning_without_a_gallery(capsys):
    assert pixel_test.parse_args(["--checkpoint", "w", "--query", "cross"]).query == "cross"
    with pytest.raises(SystemExit):
        pixel_test.parse_args(["--checkpoint", "w", "--query", "folder"])
    assert "choose cross, same or both" in capsys.readouterr().err
    assert pixel_test.parse_args(["--weights", "w", "--query", "folder", "--gallery", "g"]).query == "folder"


def test_names_in_the_form_of_market_give_ids_and_top_cuts_the_list(tmp_path):
    for name, number in (("query/0002_c1s1_1.png", 0), ("gallery/0002_c3s1_2.png", 0), ("gallery/-1_c2s1_3.png", 2)):
        picture(tmp_path / name, number)
    given = {"query": str(tmp_path / "query"), "gallery": str(tmp_path / "gallery"), "top": 1}
    own_images.run(flags(**given, export_features=str(tmp_path / "f.npy")), Mean(), ORIGIN, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert [(row["pid"], row["camid"]) for row in rows] == [(2, 0), (-1, 1), (2, 2)]
    lines = (tmp_path / "ranking.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[1].split(",")[1:3] == ["1", str(tmp_path / "gallery/0002_c3s1_2.png")]
    feats = np.load(tmp_path / "f.npy")
    store = images.open_images([row["path"] for row in rows], 8, 4, cache="off")
    assert np.allclose(feats, transforms.normalize(store.gather(torch.arange(3))).mean((2, 3)), atol=1e-5)


def test_a_query_may_be_one_image(tmp_path):
    for name, number in (("q.png", 1), ("gallery/a.png", 0), ("gallery/b.png", 1)):
        picture(tmp_path / name, number)
    given = {"query": str(tmp_path / "q.png"), "gallery": str(tmp_path / "gallery")}
    own_images.run(flags(**given), Mean(), ORIGIN, tmp_path / "out")
    lines = list(csv.DictReader((tmp_path / "out" / "ranking.csv").open()))
    assert [line["query"] for line in lines] == [str(tmp_path / "q.png")] * 2
    assert Path(lines[0]["gallery"]).name == "b.png"
    with pytest.raises(FileNotFoundError, match="--query .*c.png: no such folder or image"):
        own_images.run(flags(**{**given, "query": str(tmp_path / "c.png")}), Mean(), ORIGIN, tmp_path)


@pytest.mark.parametrize("out", ["", "found", "deep/found"])
def test_results_written_into_the_gallery_are_never_ranked(tmp_path, out):
    for number in range(3):
        picture(tmp_path / f"{number}.png", number)
    picture(tmp_path / "deep" / "ranking.png", 7)  # no list lies beside it: a picture of the user's
    given = {"query": str(tmp_path), "gallery": str(tmp_path)}
    texts = []
    for other in (out, out, "elsewhere", out):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own_images.run(flags(**given), Mean(), ORIGIN, tmp_path / other)
        texts.append((tmp_path / other / "ranking.csv").read_text())
    assert len(set(texts)) == 1 and len(texts[0].splitlines()) == 1 + 4 * 4
    with pytest.warns(files.LeftOut, match="pictures of earlier results: 2 .ranking.png, ranking.png"):
        own_images.listed("--gallery", str(tmp_path))


def test_names_that_are_no_utf8_reach_every_output_byte_for_byte(tmp_path, capsys):
    raw = os.fsencode(tmp_path) + "/\u4eba".encode("gbk")
    os.mkdir(raw)
    for number in range(2):
        picture(tmp_path / "a.png", number)
        os.rename(tmp_path / "a.png", raw + "/\u4eba".encode("gbk") + b"%d.png" % number)
    folder = os.fsdecode(raw)
    given = {"query": folder, "gallery": folder, "export_features": os.path.join(folder, "feats")}
    own_images.run(flags(**given), Mean(), ORIGIN, Path(folder))
    wanted = [raw + b"/" + "\u4eba".encode("gbk") + b"%d.png" % number for number in range(2)]
    text = (Path(folder) / "ranking.csv").read_bytes()
    assert all(text.count(name) == 4 for name in wanted)
    rows = [json.loads(line) for line in (Path(folder) / "feats" / "features.jsonl").read_text().splitlines()]
    assert [os.fsencode(row["path"]) for row in rows] == wanted * 2
    said = capsys.readouterr().out
    assert "\u4eba" in said.encode().decode() and (Path(folder) / "ranking.png").is_file()


def test_a_descriptor_means_over_the_mirror_image_before_what_comes_after():
    x = torch.randn(2, 3, 4, 4)
    corner = nn.Flatten()
    found = own_images.Descriptor(corner, "", flip=True, after=lambda out: out * 2)(x)
    assert torch.allclose(found, corner(x) + corner(x.flip(3)), atol=1e-6)


class OfOneSize(nn.Module):
    """A network that cannot take any number of images."""

    def forward(self, x):
        return x.mean((2, 3)) + torch.ones(len(x), 3)


@pytest.mark.parametrize("build", [
    lambda: prsnet_train.build_model(prsnet_train.parse_args([*SIZE, *MAE]), 5),
    *[lambda arch=arch: pixel_model.build(arch, 5, "resnet18") for arch in ("pcb", "hpm")],
    lambda: convert_dsbn(aff_train.build_model(aff_train.parse_args([*SIZE, "--backbone", "resnet18"]), 0)),
], ids=["prsnet mae", "pixel_sampling pcb", "pixel_sampling hpm", "aff_scl with a BN a domain"])  # fmt: skip
def test_other_networks_of_the_projects_are_exported_too(build, tmp_path, capsys):
    own_images.export(own_images.Descriptor(build(), ""), (64, 32), tmp_path / "net.pt2")
    assert "max abs difference" in capsys.readouterr().out


def test_a_network_that_cannot_be_exported_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="torch.export cannot follow the network") as caught:
        own_images.export(OfOneSize(), (8, 4), tmp_path / "net.pt2")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Drifting(nn.Module):
    """A network whose program differs from it: the trace keeps the first call's number."""

    calls = 0

    def forward(self, x):
        Drifting.calls += 1
        return x.mean((2, 3)) + Drifting.calls


def test_a_program_that_differs_is_refused_and_the_older_file_stays(tmp_path):
    path = tmp_path / "net.pt2"
    own_images.export(Mean(), (8, 4), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="nothing written"):
        own_images.export(Drifting(), (8, 4), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
