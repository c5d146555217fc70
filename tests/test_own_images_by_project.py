"""A trained network of every project on folders of one's own: ranking, features, exported program."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dapg_trees import write_regdb
from PIL import Image
from test_own_images import SIZE, picture
from torch import nn

from aff_scl import test as aff_test
from aff_scl import train as aff_train
from common import datasets, images, log_folder, runtime
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
