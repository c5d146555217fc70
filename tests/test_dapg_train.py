"""The stages as scripts on miniature trees: they finish, resume to the bit, feed each other, and name bad input."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, script, write_market
from dapg_trees import write_luperson, write_poses, write_regdb, write_sysu
from PIL import Image

from common import checkpoints, evaluation
from dapg import train
from dapg.downstream import stage as downstream
from dapg.flags import parse_args
from dapg.poses import pose
from dapg.pretrain import stage as pretrain
from results import schema

TRAIN = ROOT / "dapg" / "train.py"
SIZE = ["--backbone", "resnet18", "--height", 64, "--width", 32, "--workers", 0]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("dapg")
    write_luperson(write_regdb(write_sysu(write_market(root / "data", train_ids=6, test_ids=2))))
    write_poses(root / "data" / "market1501")
    return root


def run(home, *flags, out="out", fails=False, **options):
    places = ["--data-dir", home / "data", "--logs-dir", home / out / "logs", "--results-dir", home / out / "res"]
    done = script(TRAIN, *places, *SIZE, *flags, **options)
    assert (done.returncode != 0) == fails, done.stderr + done.stdout
    return done.stderr if fails else done.stdout


def log_dir(home, dataset, out="out"):
    return sorted((home / out / "logs/dapg" / dataset).rglob("seed0"), key=lambda p: p.stat().st_mtime)[-1]


def metrics(home, dataset, out="out"):
    files = sorted((home / out / "res/dapg" / dataset).rglob("seed0.json"), key=lambda p: p.stat().st_mtime)
    return json.loads(files[-1].read_text())["metrics"]


ROBUST = ["--stage", "robust", "--batch-size", 8, "--epochs", 2, "--iters", 2, "--variant", "warmup=1", "queue=16"]


@pytest.fixture(scope="module")
def trunk(home):
    run(home, *ROBUST)
    return log_dir(home, "luperson") / "trunk.pt"


def test_stage_one_leaves_a_trunk_of_flat_keys_and_a_result(home, trunk):
    state = torch.load(trunk, weights_only=True)
    assert "conv1.weight" in state["state_dict"] and state["meta"]["images"] == 40
    found = metrics(home, "luperson")
    assert {"mc", "js", "spread", "instance.rank1", "before.instance.rank1"} <= found.keys()


@pytest.mark.slow
def test_stage_one_continues_to_the_bit(home, trunk):
    """Two epochs in one go and in two lives: the second starts from the checkpoint of epoch 1."""
    first = log_dir(home, "luperson")
    second = home / "again" / first.relative_to(home / "out")
    second.mkdir(parents=True)
    shutil.copy(first / "checkpoint_0001.pt", second)
    (second / "log.jsonl").write_text((first / "log.jsonl").read_text().splitlines(True)[0])
    said = run(home, *ROBUST, "--resume", out="again")
    assert "continuing after epoch 1" in said
    one, two = (checkpoints.read(folder / "checkpoint_0002.pt") for folder in (first, second))
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key
    assert (first / "log.jsonl").read_text() == (second / "log.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "simclr"],
        ["--method", "byol"],
        ["--method", "moco"],
        ["--negatives", "batch"],
        ["--noise-base", "chain", "--constraint", "row"],
        ["--loss", "infonce"],
        ["--constraint", "feature", "--crop"],
    ],
    ids=str,
)
def test_every_pretraining_variant_takes_a_step(home, flags):
    variant = ["--variant", "warmup=1", "queue=16", "augmix_ops=on"]
    if flags[-1] == "--crop":
        flags, variant = flags[:-1], [*variant, "crop=rrc"]
    few = ["--stage", "robust", "--batch-size", 8, "--epochs", 1, "--iters", 2]  # a second step: new weights are finite
    run(home, *few, *variant, *flags, out="variants")


@pytest.fixture(scope="module")
def generated(home):
    small = ["--batch-size", 4, "--epochs", 1, "--iters", 2, "--variant", "ngf=4", "blocks=1"]
    assert "at least 56" in run(home, "--stage", "gan", *small, out="bad", fails=True)
    run(home, "--stage", "gan", "--height", 128, "--width", 64, *small)
    gan = log_dir(home, "market")
    run(home, "--stage", "generate", "--source", gan / "generator.pt")
    return gan


def test_gan_generate_and_align_feed_each_other(home, trunk, generated):
    assert (generated / "pairs.png").is_file() and len(pose.read(generated / "canonical_poses.json")) == 4
    notes = list((home / "out/logs/dapg/market").rglob("generated.json"))
    folder = notes[0].parent / json.loads(notes[0].read_text())["folder"]
    assert len(list(folder.glob("*_p3.jpg"))) == 36  # 6 people x 6 images
    flags = [
        "--stage",
        "align",
        "--weights",
        trunk,
        "--source",
        folder,
        "--batch-size",
        8,
        "--epochs",
        1,
        "--iters",
        2,
        "--variant",
        "queue=16",
        "stage2_noise=0.5",
    ]
    run(home, *flags)
    assert "mc" in metrics(home, "market")
    next(folder.glob("*_p3.jpg")).unlink()
    assert "1 of 36 images have no four generated poses" in run(home, *flags, out="other", fails=True)


@pytest.mark.slow
def test_figures_are_drawn_by_command(home, trunk, generated, tmp_path):
    folder = next((home / "out/logs/dapg/market").rglob("*_p0.jpg")).parent
    for number, flags in ((1, []), (3, ["--dataset", "luperson"]), (4, ["--dataset", "market", "--source", folder])):
        done = script(
            ROOT / "dapg/test.py",
            "--figure",
            number,
            *flags,
            "--data-dir",
            home / "data",
            "--out",
            tmp_path,
            "--workers",
            0,
        )
        assert done.returncode == 0 and f"figure{number}." in done.stdout, done.stderr
    with Image.open(tmp_path / "figure3.jpg") as three, Image.open(tmp_path / "figure4.jpg") as four:
        assert min(*three.size, *four.size) > 400
        assert len(np.unique(np.asarray(three).reshape(-1, 3), axis=0)) > 1000  # noise, not blank paper
    with Image.open(tmp_path / "figure1.png") as one:
        assert one.size == (960, 480)


@pytest.mark.parametrize(
    "stage, dataset, keys",
    [("agw", "sysu", ("all", "indoor", "all_c", "indoor_c")), ("cil", "regdb", ("v2t", "t2v", "v2t_c", "t2v_c"))],
)
def test_finetuning_reports_both_protocols_clean_and_corrupted(home, trunk, stage, dataset, keys):
    said = run(
        home,
        "--stage",
        stage,
        "--dataset",
        dataset,
        "--weights",
        trunk,
        "--batch-size",
        32,
        "--epochs",
        1,
        "--iters",
        1,
        "--variant",
        "draws=1",
    )
    found = metrics(home, dataset)
    for key in keys:
        for kind in ("", "pool.", "bn."):
            assert 0 <= found[f"{kind}{key}.rank1"] <= 1 and 0 <= found[f"{kind}{key}.mAP"] <= 1
    headline = "bn" if stage == "agw" else "pool"
    assert found[f"{keys[0]}.mAP"] == found[f"{headline}.{keys[0]}.mAP"]
    assert found[f"{keys[2]}.mAP"] == found[f"pool.{keys[2]}.mAP"] and "rank-1" in said
    done = script(
        ROOT / "dapg/test.py",
        "--checkpoint",
        log_dir(home, dataset),
        "--data-dir",
        home / "data",
        "--corruption",
        "contrast",
        "--severity",
        5,
        "--draws",
        1,
        "--workers",
        0,
    )
    assert done.returncode == 0 and f"{keys[2]}" in done.stdout, done.stderr


def test_bad_input_is_one_sentence(home, trunk, tmp_path):
    state = torch.load(trunk, weights_only=True)
    for key in ("layer2.0.bn1.weight", "layer4.1.conv2.weight"):
        del state["state_dict"][key]
    torch.save(state, tmp_path / "broken.pt")
    agw = ["--stage", "agw", "--batch-size", 32, "--epochs", 1]
    said = run(home, *agw, "--weights", tmp_path / "broken.pt", out="bad", fails=True)
    assert "2 of 100 tensors missing: layer2.0.bn1.weight, layer4.1.conv2.weight" in said and "Traceback" not in said
    said = run(home, *agw, "--weights", "weights/vtbr.pth", out="bad", fails=True)
    assert "no file weights/vtbr.pth" in said and "README" in said
    said = run(home, "--stage", "align", out="bad", fails=True)
    assert "run it first: python dapg/train.py --row generate/market" in said
    said = run(home, "--stage", "align", "--negatives", "batch", out="bad", fails=True)
    assert "--negatives batch is of --stage robust" in said
    said = run(home, *agw, "--variant", "sleet=1", out="bad", fails=True)
    assert "--variant sleet=1 is unknown; known are" in said


def test_collapse_is_warned_about_once(capsys):
    class Run:
        main = True

    monitor = pretrain.Monitor(Run(), quiet_steps=10)
    for step in range(1000):
        monitor.see(0.05, step)
    said = capsys.readouterr().out
    assert said.count("collapsed") == 1 and "at step 209" in said and "--preset stable" in said
    healthy = pretrain.Monitor(Run(), 0)
    for step in range(1000):
        healthy.see(0.05 if step % 150 else 0.9, step)
    assert capsys.readouterr().out == ""


def test_spread_is_one_for_isotropic_and_zero_for_equal_features():
    x = torch.nn.functional.normalize(torch.randn(4000, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    assert abs(float(pretrain.spread(x)) - 1) < 0.05 and float(pretrain.spread(x[:1].expand(9, -1))) < 1e-6


def test_presets_and_stages_have_the_papers_values():
    paper, stable = parse_args(["--stage", "robust"]), parse_args(["--stage", "robust", "--preset", "stable"])
    assert (paper.lr, paper.tau, paper.delta, paper.epochs) == (0.0075, 0.7, 0.5, 300)
    assert (paper.severity_max, paper.weights, paper.dataset) == (5, "none", "luperson")
    assert (stable.lr, stable.tau, stable.severity_max) == (7.5e-4, 0.1, 3)
    align, agw = parse_args(["--stage", "align"]), parse_args(["--stage", "agw"])
    assert (align.epochs, align.dataset, align.lr) == (200, "market", 0.0075)
    assert (agw.height, agw.width, agw.epochs, agw.batch_size, agw.lr) == (288, 144, 81, 64, 0.1)


def test_channel_enhancement_is_cajs_rule():
    x = torch.randint(0, 256, (4000, 3, 2, 2), generator=torch.Generator().manual_seed(0)).byte()
    out = pretrain.channel_enhancement(x, torch.Generator().manual_seed(1))
    flat = x.flatten(1)
    single = [(out == x[:, c : c + 1]).flatten(1).all(1).float().mean().item() for c in range(3)]
    same = (out.flatten(1) == flat).all(1).float().mean().item()
    assert all(abs(share - 0.25) < 0.03 for share in single) and abs(same - 0.125) < 0.03
    grey = ((out[:, 0] == out[:, 1]) & (out[:, 1] == out[:, 2])).flatten(1).all(1).float().mean().item()
    assert abs(grey - 0.875) < 0.03


def test_cross_modality_batches_hold_the_same_people_in_both(home):
    rng = np.random.default_rng(0)
    visible, infrared = np.repeat(np.arange(10), 7), np.repeat(np.arange(1, 12), 2)
    v, i, chosen = downstream.cross_batches(visible, infrared, 8, 20, rng)
    assert v.shape == i.shape == (20, 32) and (visible[v] == infrared[i]).all() and (visible[v] == chosen).all()
    assert all(len(set(row)) == 8 for row in chosen.tolist())
    with pytest.raises(ValueError, match="9 identities"):
        downstream.cross_batches(visible, infrared, 10, 1, rng)


def test_soft_erasing_keeps_the_range_and_half_of_the_images():
    x = torch.full((400, 3, 32, 16), 0.5)
    out = downstream.soft_erasing(x, torch.Generator().manual_seed(0))
    changed = (out != x).flatten(1).any(1).float().mean()
    assert 0.4 < changed < 0.6 and out.min() >= 0 and out.max() <= 1  # a patch of a flat image changes nothing


def test_metrics_over_trials_are_means_with_deviations():
    trials = [evaluation.RankMetrics(a, np.full(20, a), a, np.array([a]), 1) for a in (0.2, 0.4)]
    found = downstream.summary(trials, "x.")
    assert abs(found["x.mAP"] - 0.3) < 1e-9 and abs(found["x.std_mAP"] - 0.1) < 1e-9


@pytest.mark.parametrize(
    "name, arguments, rows",
    [
        ("run_stage1.sh", ["/data", "4"], ["robust/dapg"]),
        ("run_stage2.sh", ["/data"], ["gan/market", "generate/market", "align/dapg"]),
        ("run_agw.sh", ["/data", "pnl"], ["agw/pnl/sysu", *["agw/pnl/regdb"] * 10]),
        ("run_cil.sh", ["/data"], ["cil/ours/sysu", *["cil/ours/regdb"] * 10]),
        (
            "run_chain.sh",
            ["--data-dir", "data"],
            [row for row in schema.load_rows(ROOT, "dapg") if "chain/" in row[:6]],
        ),
    ],
)
def test_run_scripts_train_the_rows_that_others_look_for(tmp_path, name, arguments, rows):
    """A flag of a script that changed the method would give a row another name, and the next stage would miss it."""
    for program in ("python", "torchrun"):
        (tmp_path / program).write_text(f'#!/bin/sh\necho {program} "$@" >> {tmp_path}/calls\n')
        (tmp_path / program).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python"}
    done = script(ROOT / "dapg" / name, *arguments, launcher=["bash"], **path)
    assert done.returncode == 0, done.stderr
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines() if "dapg/train.py" in line]
    flags = [call[call.index("dapg/train.py") + 1 :] for call in calls]
    parsed = [parse_args(each) for each in flags]
    assert sorted(args.row for args in parsed) == sorted(rows)
    assert [args.row for args in parsed] == [each[each.index("--row") + 1] for each in flags]


def test_commands_in_the_documentation_are_rows():
    """The stages' plain commands, as train.py's docstring gives them, are the rows that the next stages read."""
    commands = [line.split("#")[0].split()[2:] for line in train.__doc__.splitlines() if "python dapg/train.py" in line]
    assert [parse_args(flags).row for flags in commands] == [
        "robust/dapg",
        "gan/market",
        "generate/market",
        "align/dapg",
        "agw/ours/sysu",
        "cil/ours/regdb",
    ]
