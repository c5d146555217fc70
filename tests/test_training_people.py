"""Numbers on people that a network was trained with are refused or say so, beside the number and in the file."""

import json
import warnings
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import TINY, write_market
from dapg_trees import write_regdb
from PIL import Image

from aff_scl import test as aff_scl_test
from aff_scl import train as aff_scl_train
from common import datasets, inputs, log_folder, runfiles, runtime
from convnext_ap import test as convnext_test
from dapg import test as dapg_test
from dapg import train as dapg_train
from dapg.downstream import agw
from prsnet import pretrain as prsnet_pretrain
from prsnet import protocols
from prsnet import test as prsnet_test
from prsnet import train as prsnet_train
from prsnet.prepare import parse_args as prepare_args
from prsnet.prepare import prepare

pytestmark = pytest.mark.filterwarnings("ignore:.*published:UserWarning")


def a_run(data_dir, **args):
    return Namespace(args={"data_dir": str(data_dir), "synthetic": None, **args}, main=True)


def loaded(name, data_dir, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return datasets.load(name, data_dir, **options)


# ------------------------------------------------------------------------------------------------- splits of a data set


@pytest.fixture(scope="module")
def regdb_dir(tmp_path_factory):
    return write_regdb(tmp_path_factory.mktemp("regdb"))


def regdb_network(folder, data_dir, *flags):
    """A log folder with an untrained network of RegDB, split 1."""
    words = "--stage agw --dataset regdb --height 64 --width 32 --backbone resnet18 --weights none --cache off -j 0"
    args = dapg_train.parse_args([*words.split(), "--data-dir", str(data_dir), *flags])
    run = runtime.start(args, "dapg")
    run.log_dir = folder
    model = agw.TwoStream(6, args.backbone)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    log_folder.save(run, 1, model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1))
    return folder


def measure_regdb(folder, *flags):
    words = ["--checkpoint", str(folder), "--corruption", "fog", "--draws", "1", "--cache", "off", "-j", "0", *flags]
    with torch.inference_mode():
        dapg_test.main(dapg_test.parse_args(words))


@pytest.mark.parametrize("flags", [["--split", "1"], ["--seed", "0"]])
def test_regdb_is_measured_on_the_split_of_the_training_alone(regdb_dir, tmp_path, capsys, flags):
    network = regdb_network(tmp_path, regdb_dir, *flags)
    folders = {n: loaded("regdb", regdb_dir, split=n) for n in (1, 2, 3)}

    def who(samples):
        return {s.path.split("/")[-2] for s in samples}

    for split in (2, 3):
        shared = len(who(folders[split].query) & who(folders[1].train))
        assert shared < 6  # the labels, counted anew in each split, are all shared
        with pytest.raises(ValueError, match=rf"{shared} of the 6 people .* trained with, .*--split 1; .*--split"):
            measure_regdb(network, "--split", str(split))
    measure_regdb(network)
    assert "on regdb split 1; -C" in capsys.readouterr().out


def test_a_network_of_another_data_set_may_be_measured_on_any_split(regdb_dir):
    data = loaded("regdb", regdb_dir, split=4)
    trained = {"dataset": "sysu", "synthetic": None}
    assert not inputs.trained_on(a_run(regdb_dir), data, trained, {"split": 4}, {"split": 1})


def write_cuhk03(root, box, train, test):
    draw = np.random.default_rng(0)
    for folder, pids in (("bounding_box_train", train), ("query", test), ("bounding_box_test", test)):
        for pid in pids:
            for view in (1, 2):
                path = root / "cuhk03-np" / box / folder / f"{pid:04d}_c{view}_1.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw.integers(0, 255, (8, 4, 3), np.uint8)).save(path)


def measured(root, here, there):
    """The remark of convnext_ap/test.py on CUHK03's boxes `here`, of a network of the boxes `there`."""
    run = a_run(root, split=here)
    trained = {"dataset": "cuhk03", "split": there, "synthetic": None, "data_name": "cuhk03"}
    return convnext_test.check_unseen(run, loaded("cuhk03", root, split=here), trained)


def test_other_boxes_of_the_same_test_people_are_named_and_training_people_refused(tmp_path):
    write_cuhk03(tmp_path, "detected", (1, 2), (3, 4))
    write_cuhk03(tmp_path, "labeled", (1, 2), (3, 4))
    assert measured(tmp_path, "labeled", "detected") == " (labeled boxes, trained with detected ones)"
    assert measured(tmp_path, "labeled", "labeled") == ""
    write_cuhk03(tmp_path / "other", "detected", (1, 4), (2, 3))
    write_cuhk03(tmp_path / "other", "labeled", (2, 3), (1, 4))
    with pytest.raises(ValueError, match=r"--split labeled: 2 of the 2 people .* from --split detected; measure with"):
        measured(tmp_path / "other", "labeled", "detected")


def test_boxes_that_are_not_on_this_disk_are_named_all_the_same(tmp_path):
    write_cuhk03(tmp_path, "labeled", (1, 2), (3, 4))
    assert "trained with detected ones" in measured(tmp_path, "labeled", "detected")


def test_rendered_people_of_another_size_are_the_same_people(tmp_path):
    write_market(tmp_path / "synthetic-full")
    (tmp_path / "synthetic-full" / "market1501" / "SYNTHETIC").write_text(json.dumps({"size": "full", "seed": 0}))
    data = loaded("market", tmp_path / "synthetic-full")
    small = {"dataset": "market", "synthetic": "small", "data_name": "market-synthetic-small"}
    with pytest.raises(ValueError, match="same people.*--synthetic small"):
        inputs.trained_on(a_run(tmp_path), data, small)
    with pytest.raises(ValueError, match="same people"):  # by the name of its data, whatever the flags were
        inputs.trained_on(a_run(tmp_path), data, {**small, "synthetic": None})
    assert inputs.trained_on(a_run(tmp_path), data, {**small, "data_name": "market-synthetic-full"})
    assert not inputs.trained_on(a_run(tmp_path), data, {"dataset": "market", "synthetic": None, "data_name": "market"})


# ------------------------------------------------------------------------------------------------- source as the target


def test_the_target_is_no_source_of_its_own(capsys):
    for name in ("market", "Market1501"):
        with pytest.raises(SystemExit):
            aff_scl_train.parse_args(["--mode", "uda", "-d", "market", "--source", name])
        assert "--source market is the target itself" in capsys.readouterr().err
    rendered = ["--mode", "uda", "-d", "market", "--source", "market", "--source-synthetic", "small"]
    assert aff_scl_train.parse_args(rendered).source == "market"


def test_a_number_on_the_labelled_source_says_so_and_one_on_the_target_does_not(market_dir, tmp_path, capsys):
    words = [
        *TINY, "--data-dir", str(market_dir), "--mode", "uda", "-d", "duke", "--source", "market", "--cache", "off"
    ]  # fmt: skip
    args = aff_scl_train.parse_args(words)
    run = runtime.start(args, "aff_scl")
    run.log_dir = tmp_path
    model = aff_scl_train.build_model(args, 0)
    aff_scl_train.convert_dsbn(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    log_folder.save(run, 1, model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1))
    aff_scl_test.main(
        aff_scl_test.parse_args(["--checkpoint", str(tmp_path), "-d", "market", "--rank-list", "0", "--re-rank"])
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if "mAP" in line]
    assert len(lines) == 2 and all("on market, whose labels were the source of the training" in line for line in lines)
    data = loaded("market", market_dir)
    assert aff_scl_test.check_unseen(a_run(market_dir), data, {**run.args, "dataset": "market", "source": None}) == ""


# -------------------------------------------------------------------------------- pre-training that saw the test images

SMALL = "--size tiny --height 64 --width 32 --mask-block 4 2 --workers 1 --epochs 1".split()


@pytest.fixture(scope="module")
def leaked(market_dir, tmp_path_factory):
    """A pre-training with Market-1501's test images among its crops, then fine-tuned on it: (best.pt, folder, text)."""
    out = tmp_path_factory.mktemp("leaked")
    prepare(prepare_args(["--mix", "market", "--mix-include-test", "--data-dir", str(market_dir), "--out", str(out)]))
    places = ["--logs-dir", str(out / "logs"), "--results-dir", str(out / "results"), *SMALL]
    prsnet_pretrain.main(
        prsnet_pretrain.parse_args(["--data-dir", str(out), *places, "--batch-size", "8", "--warmup", "0"])
    )
    (best,) = out.rglob("best.pt")
    words = ["--data-dir", str(market_dir), *places, "--weights", str(best), "--batch-size", "8", "--iters", "1"]
    prsnet_train.main(prsnet_train.parse_args(words))
    return out


def test_numbers_after_a_pretraining_with_test_images_say_so_everywhere(leaked, market_dir, capsys):
    results = [json.loads(path.read_text()) for path in leaked.rglob("seed0.json")]
    crops, market = ([r for r in results if r["data"]["name"] == name][0] for name in ("person_crops", "market"))
    assert crops["args"]["test_images_of"] == market["args"]["test_images_of"] == ["market"]
    assert market["protocol"]["pretrained_on_test_images"] is True
    (network,) = leaked.glob("logs/prsnet/market/*/seed0")
    prsnet_test.main(prsnet_test.parse_args(["--checkpoint", str(network)]))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("protocol ")]
    assert len(lines) == 3 and all("pre-trained with test images of market" in line for line in lines)


def test_the_remark_stands_beside_that_data_set_alone():
    args = {"test_images_of": ["market", "duke-synthetic-small"]}
    said = [
        bool(protocols.seen(args, name)) for name in ("market", "duke", "duke-synthetic-full", "market-synthetic-small")
    ]
    assert said == [True, False, True, False] and protocols.seen({}, "market") == ""


def test_crops_and_weights_that_say_nothing_are_taken_for_clean(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(1)}}, tmp_path / "w.pth")
    runfiles.replace(tmp_path / "list.pth", lambda file: torch.save([1], file))
    for path in (None, tmp_path / "w.pth", tmp_path / "list.pth"):
        assert protocols.test_images_behind(path) == []
    assert protocols.test_images_among(tmp_path) == []
