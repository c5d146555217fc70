"""The stages as scripts on miniature trees: they finish, resume to the bit, feed each other, and name bad input."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, script
from dapg_runs import data_dir, pretraining_losses, run_main, run_test, started
from PIL import Image

from common import checkpoints, evaluation, inputs, transforms
from dapg import train
from dapg.channels import channel_enhancement
from dapg.downstream import cil, protocols
from dapg.downstream import stage as downstream
from dapg.downstream.data import cross_batches
from dapg.flags import parse_args, variants
from dapg.noise.names import TRAIN15
from dapg.poses import gan, pngan, pose
from dapg.pretrain import stage as pretrain
from dapg.pretrain.align import Align
from dapg.pretrain.step import spread
from results import schema


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("dapg")


def run(home, *flags, out="out"):
    return run_main(data_dir(), home / out, *flags)


def refusal(capsys, home, *flags) -> str:
    """The one sentence with which a command ends."""
    try:
        run(home, *flags, out="bad")
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    except SystemExit:
        return capsys.readouterr().err
    raise AssertionError(f"{flags} are taken")


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


def test_alignment_takes_the_images_own_poses_and_greys_a_fifth_of_all_views():
    """Sec. III-B: crop, flip and grey in both stages. The positive of image i is one of its pictures 4 i to 4 i + 3."""

    class Generated:
        def gather(self, chosen):
            self.chosen = chosen
            return pixels[chosen // 4]

    args, run = started(data_dir(), "--stage", "align", "--source", "poses")
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (600, 3, 1, 1)).astype(np.uint8)).expand(-1, -1, 32, 32).contiguous()
    step, index = Align(args, run, 0, Generated()), torch.arange(600).flip(0)
    anchor, positive = step.images(pixels[index], index)
    assert np.array_equal(step.generated.chosen // 4, index.numpy())
    assert all(abs((step.generated.chosen % 4 == pose).mean() - 0.25) < 0.06 for pose in range(4))

    def grey(x):
        return ((x[:, 0] == x[:, 1]) & (x[:, 1] == x[:, 2])).flatten(1).all(1).float().mean()

    assert abs(grey(anchor) - 0.2) < 0.05 and abs(grey(positive) - (7 / 8 + 1 / 8 * 0.2)) < 0.05


def test_the_gan_draws_the_pose_of_the_target():
    args, run = started(data_dir(), "--stage", "gan", "--height", 64, "--width", 64)
    data = gan.Data(args, run, inputs.dataset(run, "market"))
    index = np.array([[0, 5], [13, 12]])
    source, drawn, target = data.batch(index)
    want = [pose.picture(data.poses[i], 64, 64).transpose(2, 0, 1) for i in (5, 12)]
    assert np.array_equal(pngan.to_pixels(drawn).numpy(), np.stack(want))
    assert torch.equal(pngan.to_pixels(source), data.store.gather(np.array([0, 13])).clone())
    assert torch.equal(pngan.to_pixels(target), data.store.gather(np.array([5, 12])).clone())
    assert len(data.training) == len(data.pids) and data.metric == "fixed_l1"  # all people train, as in PN-GAN


@pytest.mark.parametrize(
    "flags, variant",
    [
        (["--noise-base", "chain", "--constraint", "row"], ["augmix_ops=on"]),
        (["--loss", "infonce"], []),
        (["--constraint", "feature"], ["crop=rrc"]),
    ],
    ids=str,
)
def test_every_reading_of_stage_one_takes_a_second_step(flags, variant):
    """Whose weights the first one has moved."""
    few = ["--batch-size", 8, "--epochs", 1, "--iters", 2, "--variant", "warmup=1", "queue=16", *variant]
    assert np.isfinite(pretraining_losses(*few, *flags)[0]).all()


@pytest.fixture(scope="module")
def generated(home):
    small = ["--batch-size", 4, "--epochs", 1, "--iters", 2, "--variant", "ngf=4", "blocks=1"]
    run(home, "--stage", "gan", "--height", 128, "--width", 64, *small)
    gan = log_dir(home, "market")
    run(home, "--stage", "generate", "--source", gan / "generator.pt")
    return gan


def test_gan_generate_and_align_feed_each_other(home, trunk, generated):
    assert (generated / "pairs.png").is_file() and len(pose.read(generated / "canonical_poses.json")) == 4
    notes = list((home / "out/logs/dapg/market").rglob("generated.json"))
    folder = notes[0].parent / json.loads(notes[0].read_text())["folder"]
    assert len(list(folder.glob("*_p3.jpg"))) == 48  # 8 people x 6 images
    flags = [
        "--stage", "align", "--weights", trunk, "--source", folder, "--batch-size", 8, "--epochs", 1, "--iters", 2,
        "--variant", "queue=16", "stage2_noise=0.5"
    ]  # fmt: skip
    assert "tensors into the network" in run(home, *flags)  # the head of stage 1 too
    assert "mc" in metrics(home, "market")
    hidden = next(folder.glob("*_p3.jpg"))
    content = hidden.read_bytes()
    hidden.unlink()
    with pytest.raises(ValueError, match="1 of 48 images have no four generated poses"):
        run(home, *flags, out="other")
    hidden.write_bytes(content)


def test_figures_are_drawn_by_command(home, generated, tmp_path):
    folder = next((home / "out/logs/dapg/market").rglob("*_p0.jpg")).parent
    for number, flags in ((1, []), (3, ["--dataset", "luperson"]), (4, ["--dataset", "market", "--source", folder])):
        said = run_test(data_dir(), "--figure", number, *flags, "--out", tmp_path)
        assert f"figure{number}." in said
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
        home, "--stage", stage, "--dataset", dataset, "--weights", trunk, "--batch-size", 32, "--epochs", 1,
        "--iters", 1, "--variant", "draws=1"
    )  # fmt: skip
    found = metrics(home, dataset)
    for key in keys:
        for kind in ("", "pool.", "bn."):
            assert 0 <= found[f"{kind}{key}.rank1"] <= 1 and 0 <= found[f"{kind}{key}.mAP"] <= 1
    headline = "bn" if stage == "agw" else "pool"
    assert found[f"{keys[0]}.mAP"] == found[f"{headline}.{keys[0]}.mAP"]
    assert found[f"{keys[2]}.mAP"] == found[f"pool.{keys[2]}.mAP"] and "rank-1" in said
    flags = ["--corruption", "contrast", "--severity", 5, "--draws", 1]
    assert keys[2] in run_test(data_dir(), "--checkpoint", log_dir(home, dataset), *flags)


def test_bad_input_is_one_sentence(home, trunk, tmp_path, capsys):
    state = torch.load(trunk, weights_only=True)
    for key in ("layer2.0.bn1.weight", "layer4.1.conv2.weight"):
        del state["state_dict"][key]
    torch.save(state, tmp_path / "broken.pt")
    agw = ["--stage", "agw", "--batch-size", 32, "--epochs", 1]
    said = refusal(capsys, home, *agw, "--weights", tmp_path / "broken.pt")
    assert "2 of 100 tensors missing: layer2.0.bn1.weight, layer4.1.conv2.weight" in said
    said = refusal(capsys, home, *agw, "--weights", "weights/vtbr.pth")
    assert "no file weights/vtbr.pth" in said and "README" in said
    assert "to its end: python dapg/train.py --row generate/market" in refusal(capsys, home, "--stage", "align")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--stage align --negatives batch", "--negatives batch is of --stage robust"),
        ("--stage align --method byol", "--method byol is a baseline of --stage robust"),
        ("--stage agw --preset stable", "--preset stable is of --stage robust and align"),
        ("--stage agw --variant sleet=1", "--variant sleet=1 is unknown; known are"),
        ("--stage gan --height 64 --width 32", "at least 56"),
        ("--noise-exclude rain", "--noise-exclude rain: no training noise"),
        ("--noise-exclude " + " ".join(TRAIN15[:13]), "leaves 2 noise types"),
        ("--batch-size 30", "--batch-size 30 does not divide into the bn_splits=4 groups"),
        ("--stage agw --batch-size 60", "a batch of identities x 8 images"),
        ("--stage agw --split 3", "--split is one of 1..10 and goes with --dataset regdb"),
        ("--variant momentum=2", "momentum and gan_held_out lie in"),
        ("--tau 0", "must be positive"),
        ("--lr -1", "--lr -1 must be positive"),
        ("--delta 1.5", "--delta in 0..1"),
        ("--severity-max 6", "--severity-max 6 is not one of 1..5"),
        ("--iters 0", "must be at least 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused_at_parsing(capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        parse_args(words.split())
    assert message in capsys.readouterr().err


def test_collapse_is_warned_about_once(capsys):
    class Run:
        main = True

    low, high = torch.tensor(0.05), torch.tensor(0.9)
    monitor = pretrain.Monitor(Run(), quiet_steps=10)
    for step in range(1000):
        monitor.see(low, step)
    said = capsys.readouterr().out
    assert said.count("collapsed") == 1 and "at step 249" in said and "--preset stable" in said
    healthy = pretrain.Monitor(Run(), 0)
    for step in range(1000):
        healthy.see(low if step % 150 else high, step)
    assert capsys.readouterr().out == ""


def test_spread_is_one_for_isotropic_and_zero_for_equal_features():
    x = torch.nn.functional.normalize(torch.randn(4000, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    assert abs(float(spread(x)) - 1) < 0.05 and float(spread(x[:1].expand(9, -1))) < 1e-6


def test_channel_enhancement_is_cajs_rule():
    x = torch.randint(0, 256, (4000, 3, 2, 2), generator=torch.Generator().manual_seed(0)).byte()
    out = channel_enhancement(x, torch.Generator().manual_seed(1))
    flat = x.flatten(1)
    single = [(out == x[:, c : c + 1]).flatten(1).all(1).float().mean().item() for c in range(3)]
    same = (out.flatten(1) == flat).all(1).float().mean().item()
    assert all(abs(share - 0.25) < 0.03 for share in single) and abs(same - 0.125) < 0.03
    grey = ((out[:, 0] == out[:, 1]) & (out[:, 1] == out[:, 2])).flatten(1).all(1).float().mean().item()
    assert abs(grey - 0.875) < 0.03


@pytest.mark.parametrize("stage", ["agw", "cil"])
def test_fine_tuning_sees_visible_images_in_single_channels_where_asked(stage):
    """CAJ's rule turns seven of eight grey; infrared images, and both by default, keep what they show."""
    images = torch.randint(0, 256, (2, 400, 3, 16, 8), generator=torch.Generator().manual_seed(0)).byte()
    greys = {}
    for variant in ("colour", "channels"):
        args = parse_args(["--stage", stage, "--variant", f"visible={variant}"])
        args.settings = variants(args)
        visible, infrared = downstream.views(args, *images, torch.Generator().manual_seed(1))
        for name, x in (("visible", visible), ("infrared", infrared)):
            x = (transforms.pictures(x[:400]) * 255).round()
            greys[name, variant] = (x[:, :1] == x).flatten(1).all(1).float().mean().item()
    low, high = (0.83, 0.92) if stage == "agw" else (0.35, 0.75)  # CIL lays coloured noise over half of them
    assert low < greys.pop(("visible", "channels")) < high
    assert set(greys.values()) == {0.0}


def test_cross_modality_batches_hold_the_same_people_in_both():
    rng = np.random.default_rng(0)
    visible, infrared = np.repeat(np.arange(10), 7), np.repeat(np.arange(1, 12), 2)
    v, i, chosen = cross_batches(visible, infrared, 8, 20, rng)
    assert v.shape == i.shape == (20, 32) and (visible[v] == infrared[i]).all() and (visible[v] == chosen).all()
    assert all(len(set(row)) == 8 for row in chosen.tolist())
    with pytest.raises(ValueError, match="9 identities"):
        cross_batches(visible, infrared, 10, 1, rng)


def test_soft_erasing_keeps_the_range_and_half_of_the_images():
    x = torch.full((400, 3, 32, 16), 0.5)
    out = cil.soft_erasing(x, torch.Generator().manual_seed(0))
    changed = (out != x).flatten(1).any(1).float().mean()
    assert 0.4 < changed < 0.6 and out.min() >= 0 and out.max() <= 1  # a patch of a flat image changes nothing


def test_cils_mixture_is_beta_and_its_rectangles_have_uniform_ratios():
    """Beta(0.5, 1): P(m < 1/4) = 1/2. Height over width is uniform in 0.3 to 1/0.3: its median is 1.8, not 1."""
    m = cil.mixing(4000, torch.Generator().manual_seed(0))
    assert abs(m.mean() - 1 / 3) < 0.02 and abs((m < 0.25).float().mean() - 0.5) < 0.03
    x = torch.full((600, 3, 64, 64), 0.5)  # a flat image shows only the rectangle of noise
    changed = (cil.soft_erasing(x, torch.Generator().manual_seed(0)) != x).any(1)
    changed = changed[changed.flatten(1).any(1)]
    ratio = changed.any(2).sum(1) / changed.any(1).sum(1)
    assert 1.5 < ratio.median() < 2.1


def test_metrics_over_trials_are_means_with_deviations():
    trials = [evaluation.RankMetrics(a, np.full(20, a), a, np.array([a]), 1) for a in (0.2, 0.4)]
    found = protocols.summary(trials, "x.")
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
