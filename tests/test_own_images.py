"""A network on folders of one's own: ranking.csv, pictures, features and exported programs, whatever the network."""

import csv
import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from aff_scl import test as aff_test
from aff_scl import train as aff_train
from aff_scl.model import convert_dsbn
from common import images, own_images, transforms
from common.datasets import files
from convnext_ap import test as convnext_test
from dapg import test as dapg_test
from pixel_sampling import model as pixel_model
from pixel_sampling import test as pixel_test
from prsnet import test as prsnet_test
from prsnet import train as prsnet_train

MAE = "--model mae --size tiny --mask-block 4 2".split()
SIZE = "--height 64 --width 32 --weights none".split()


def picture(path, number, size=(30, 70)):
    """A striped image that only `number` decides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stripes = np.random.default_rng(number).integers(0, 256, (7, 1, 3), dtype=np.uint8)
    Image.fromarray(stripes.repeat(10, 0).repeat(30, 1)).resize(size).save(path)


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
