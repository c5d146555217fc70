"""aff_scl/train.py and test.py end to end on a miniature Market-1501: every mode, one clear sentence for bad input."""

import json
import shutil
from argparse import Namespace

import prsnet_small
import pytest
import torch
from conftest import ROOT, TINY, script, write_market_and_duke
from PIL import Image
from torch._dynamo.testing import CompileCounter

from aff_scl import test as aff_test
from aff_scl import train
from common import inputs, runtime

MODES = {  # the others are trained in test_aff_scl_golden.py
    "usl": [],
    "mean": ["--loss", "mean"],
    "uda_shared_bn": ["--mode", "uda", "--source", "duke", "--variant", "dsbn=off"],
    "bf16": ["--amp", "bf16", "--cache", "off", "--lb", "memory"],
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The miniature Market-1501 and DukeMTMC-reID."""
    return write_market_and_duke(tmp_path_factory.mktemp("two"))


def run(data_dir, out, *flags, epochs=2):
    """One training in this process; returns result file and log lines."""
    places = ["--data-dir", str(data_dir), "--logs-dir", str(out / "logs"), "--results-dir", str(out / "results")]
    train.main(train.parse_args([*TINY, "--epochs", str(epochs), *places, *map(str, flags)]))
    (result,) = (out / "results").rglob("seed0.json")
    log = result.with_suffix(".log.jsonl").read_text().splitlines()
    return json.loads(result.read_text()), [json.loads(line) for line in log]


@pytest.mark.filterwarnings("ignore:market|duke")
def test_rendered_people_beside_a_real_target_are_asked_for_by_name(data_dir, tmp_path, monkeypatch):
    mixed = tmp_path / "data"
    shutil.copytree(data_dir / "market1501", mixed / "market1501")

    def write(name, folder, **_):
        shutil.copytree(data_dir / "DukeMTMC-reID", folder / "DukeMTMC-reID")
        (folder / "DukeMTMC-reID" / "SYNTHETIC").write_text('{"size": "small", "seed": 0}')

    monkeypatch.setattr(inputs.synthetic, "write", write)
    flags = ["--mode", "uda", "--source", "duke"]
    result, _ = run(mixed, tmp_path / "asked", *flags, "--source-synthetic", "small", epochs=1)
    assert result["args"]["source_synthetic"] == "small" and result["args"]["synthetic"] is None
    assert result["data"]["kind"] == "real" and result["row"].startswith("custom-")  # in no table of the paper
    (mixed / "synthetic-small" / "DukeMTMC-reID").rename(mixed / "DukeMTMC-reID")
    with pytest.raises(ValueError, match="is real, its source .*DukeMTMC-reID is synthetic; .*--source-synthetic"):
        run(mixed, tmp_path / "hidden", *flags, epochs=1)


@pytest.mark.filterwarnings("ignore:market|duke")
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_evaluates_and_records(data_dir, tmp_path, mode):
    result, log = run(data_dir, tmp_path, *MODES[mode])
    assert [line["epoch"] for line in log] == [1, 2] and all(line["loss"] > 0 for line in log)
    assert 0 <= result["metrics"]["mAP"] <= 1 and result["epoch"] == 2 and result["selection"] == "last"
    assert result["data"]["kind"] == "real" and result["data"]["images"] == 72 and result["data"]["ids"] == 12
    assert not any(str(tmp_path) in str(value) for value in result["args"].values())


@pytest.mark.filterwarnings("ignore:market")
def test_the_period_of_evaluations_changes_no_number_of_the_training(data_dir, tmp_path):
    """The first network and the last are evaluated whatever the period."""
    often, log = run(data_dir, tmp_path / "often", "--eval-period", 1, epochs=3)
    seldom, short = run(data_dir, tmp_path / "seldom", "--eval-period", 5, epochs=3)
    assert seldom["metrics"] == often["metrics"] and {"mAP", "before.mAP"} <= seldom["metrics"].keys()
    assert [line["loss"] for line in short] == [line["loss"] for line in log] and seldom["row"] == often["row"]
    assert ["mAP" in line for line in log] == [True] * 3 and ["mAP" in line for line in short] == [False, False, True]


@pytest.mark.filterwarnings("ignore:market")
def test_unsupervised_training_never_looks_at_pids(data_dir, tmp_path):
    """The same images under other training pids give the same weights."""
    other = tmp_path / "data" / "market1501"
    shutil.copytree(data_dir / "market1501", other)
    for number, file in enumerate(sorted((other / "bounding_box_train").iterdir())):  # a pid an image, same order
        file.rename(file.with_name(f"{900 + number:04d}_{file.name.split('_', 1)[1]}"))
    _, log = run(data_dir, tmp_path / "a", epochs=1)
    _, renamed = run(tmp_path / "data", tmp_path / "b", epochs=1)
    assert log == renamed


@pytest.mark.filterwarnings("ignore:market")
def test_checkpoint_evaluates_to_the_recorded_metrics_and_draws(data_dir, tmp_path, capsys):
    result, _ = run(data_dir, tmp_path, epochs=1)
    (checkpoint,) = (tmp_path / "logs").rglob("checkpoint_0001.pt")
    flags = ["--checkpoint", str(checkpoint.parent), "--out", str(tmp_path / "pictures"), "--heat-maps", "2", "-j", "1"]
    arguments = aff_test.parse_args([*flags, "--re-rank", "--against", str(checkpoint)])
    capsys.readouterr()
    aff_test.main(arguments)
    printed = capsys.readouterr().out
    assert f"mAP {100 * result['metrics']['mAP']:.1f}, rank-1 {100 * result['metrics']['rank1']:.1f}" in printed
    for name in ("cmc.png", "rank_list.png", "heat_maps.png"):
        assert Image.open(tmp_path / "pictures" / name).size[0] > 100


def test_parts_of_the_schedule():
    args = train.parse_args(["--mode", "sup", "--epochs", "120"])
    factor = train.warmup_steps(args.epochs)
    assert factor(0) == pytest.approx(0.01) and factor(10) == 1 and factor(39) == 1
    assert factor(40) == pytest.approx(0.1) and factor(70) == pytest.approx(0.01)


def test_clusters_that_cannot_be_contrasted_are_an_error_with_the_remedy():
    run_ = train.Namespace(main=True, world_size=1)
    args = train.parse_args(["--k1", "5", "--eps", "0.05"])
    feats = torch.nn.functional.normalize(torch.randn(40, 64, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match=r"0 cluster\(s\) and 40 outliers in 40 .* --eps 0.05 --k1 5.*raise --eps"):
        train.cluster(feats, args, run_)
    same = torch.nn.functional.normalize(torch.ones(40, 8))
    with pytest.raises(ValueError, match=r"1 cluster\(s\).*lower --eps"):
        train.cluster(same, args, run_)
    with pytest.raises(ValueError, match="NaN"):
        train.cluster(torch.full((40, 8), torch.nan), args, run_)


BAD_FLAGS = {
    "unknown row": (
        ["--row", "table5/lambda1=0.3"],
        "no row table5/lambda1=0.3 in aff_scl/experiments.yaml; close: table5",
    ),
    "unknown flag": (["--lambda3", "1"], "unrecognized arguments: --lambda3"),
    "batch": (["--batch-size", "100"], "no multiple of --num-instances 8 >= 2; nearest: 96"),
    "chunks": (["--bn-groups", "3"], "--bn-groups 3 must divide"),
    "no steps": (["--iters", "0"], "at least 1, or nothing would be trained"),
    "variant": (["--variant", "gate=relu"], "--variant gate=relu is unknown; known are gate=sigmoid|softmax"),
    "source": (["--mode", "uda"], "--mode uda needs --source NAME"),
    "source of another name": (
        ["--mode", "uda", "--source", "mraket"],
        "unknown data set 'mraket'; known: market, duke",
    ),
    "target as source": (
        ["--mode", "uda", "--source", "DukeMTMC-reID", "-d", "duke"],
        "--source duke is the target itself, whose labels must stay unknown; name another data set, or",
    ),
    "eps": (["--eps", "1.5"], "--eps 1.5 is out of range; it must be between 0 and 1, the ends excluded"),
    "eps 1": (["--eps", "1"], "--eps 1 is out of range"),
    "tau": (["--tau", "0"], "--tau 0 is out of range; it must be finite and above 0"),
    "k1": (["--k1", "0"], "--k1 0 is out of range; it must be at least 1"),
    "k2": (["--variant", "k2=0"], "--variant k2 0 is out of range; it must be at least 1"),
    "period": (["--eval-period", "0"], "--eval-period 0 is out of range; it must be at least 1"),
    "momentum": (["--variant", "momentum=2"], "--variant momentum 2 is out of range; it must be between 0 and 1"),
    "not a number": (["--lr", "nan"], "--lr nan is out of range; it must be finite and above 0"),
    "infinite": (["--lambda1", "inf"], "--lambda1 inf is out of range; it must be finite and at least 0"),
    "size": (["--height", "8"], "--height 8 is out of range; it must be at least 16, the network's stride"),
    "pool": (["--variant", "pool=gem"], "add post=relu or post=none"),
    "loss of sup": (["--mode", "sup", "--loss", "mean"], "--mode sup always takes that of Table 7"),
    "backbone": (["--backbone", "vgg16"], "invalid choice: 'vgg16'"),
    "source of usl": (["--source-synthetic", "small"], "--source-synthetic is for --mode uda with a real target"),
    "both rendered": (
        ["--mode", "uda", "--source", "duke", "--source-synthetic", "small", "--synthetic", "small"],
        "--source-synthetic is for --mode uda with a real target, so without --synthetic",
    ),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_refused_before_anything_is_read(case, capsys):
    flags, sentence = BAD_FLAGS[case]
    with pytest.raises(SystemExit) as stop:
        train.parse_args(flags)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:market")
def test_bad_data_and_weights_are_one_sentence_and_leave_nothing(data_dir, tmp_path):
    places = ["--logs-dir", tmp_path / "logs", "--results-dir", tmp_path / "results"]
    script_path = ROOT / "aff_scl" / "train.py"
    missing = script(script_path, "--data-dir", tmp_path / "none", *places, cwd=tmp_path)
    assert missing.returncode == 1 and missing.stderr.count("\n") == 1
    assert "bounding_box_train" in missing.stderr and "python -m common.synthetic market" in missing.stderr
    broken = tmp_path / "data" / "market1501"
    shutil.copytree(data_dir / "market1501", broken)
    file = sorted((broken / "bounding_box_train").iterdir())[3]
    file.write_bytes(file.read_bytes()[:200])
    cut = script(script_path, "--data-dir", tmp_path / "data", *TINY, *places)
    assert cut.returncode == 1 and file.name in cut.stderr
    weights = tmp_path / "weights.pt"
    torch.save({"layer1.0.conv1.weight": torch.zeros(2)}, weights)
    unfit = script(script_path, "--data-dir", data_dir, *TINY, "--weights", weights, *places)
    assert unfit.returncode == 1 and "missing" in unfit.stderr and str(weights) in unfit.stderr
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("*.tmp"))


def test_the_baselines_classifier_is_new_every_epoch_and_nothing_is_compiled_for_it(tmp_path, monkeypatch):
    """The trunk was compiled anew for each number of classes, and after eight of them no more at all."""
    counter, compiled, counts = CompileCounter(), torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend=counter))
    args = train.parse_args([*TINY, "--loss", "ce_tri", "--compile", "--iters", "1", "--logs-dir", str(tmp_path)])
    run, store = runtime.start(args, "aff_scl"), prsnet_small.store(48)
    people = [Namespace(camid=n % 2) for n in range(48)]
    target = Namespace(store=store, data=Namespace(train=people))
    model, optimizer, _ = train.optimised(args, run, train.build(args, run, 0))
    for number, classes in enumerate((4, 5, 6)):
        labels, means = torch.arange(48) % classes, torch.eye(classes, 512)
        train.baseline_epoch(run, args, model, optimizer, runtime.scaler(run), number, target, labels, means)
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts[1] == counts[2]
