"""pixel_sampling end to end on a miniature PRCC: every network and switch, resuming, pictures, bad input."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PYTHON, ROOT, TORCHRUN, kill_when, script
from PIL import Image
from prcc_tree import write_prcc

from common import checkpoints, log_folder, runtime
from common.datasets import Sample
from common.images import ImageStore
from pixel_sampling import model, train, visualize
from pixel_sampling import test as evaluation_script
from pixel_sampling.masks import MaskStore, write_labels

TINY = (
    "--weights none --backbone resnet18 --height 32 --width 16 --batch-size 8 --num-instances 2 --iters 2 --epochs 1 "
    "--eval-period 1 --workers 1 --lr 0.01"
).split()
PLAIN = ["--ps-mode", "off", "--consistency", "none"]
MODES = {
    "T2-c": [],
    "T2-a": PLAIN,
    "T2-b": ["--consistency", "none"],
    "T2-e": ["--re"],
    "atr18": ["--mask-format", "atr18", "--cache", "off"],
    "T3-pcb": ["--arch", "pcb", "--consistency", "none"],
    "T3-mgn": ["--arch", "mgn", "--consistency", "none"],
    "T3-hpm": ["--arch", "hpm", "--consistency", "none"],
    "T4-head": ["--arch", "head", *PLAIN],
    "T4-hb": ["--arch", "head_body", *PLAIN],
    "X5": ["--ps-mode", "flat", "--mask-align", "none", "--aug", "code", "--consistency", "sigmoid"],
    "X6": "--ps-mode random --ps-classes upper --consistency mse --selection test-best".split(),
    "bf16": "--amp bf16 --height 64 --width 32".split(),  # tiny bf16 maps are not reliable on CPUs
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_prcc(tmp_path_factory.mktemp("prcc_data"))


def run(data_dir, out, *flags):
    """One training in this process: the result file and the log lines."""
    places = ["--data-dir", str(data_dir), "--logs-dir", str(out / "logs"), "--results-dir", str(out / "results")]
    train.main(train.parse_args([*TINY, *places, *map(str, flags)]))
    (result,) = (out / "results").rglob("seed0.json")
    log = result.with_suffix(".log.jsonl").read_text().splitlines()
    return json.loads(result.read_text()), [json.loads(line) for line in log]


pytestmark = pytest.mark.filterwarnings("ignore:prcc under")


@pytest.mark.parametrize("mode", MODES)
def test_every_network_and_switch_trains_evaluates_and_records(data_dir, tmp_path, mode):
    result, log = run(data_dir, tmp_path, *MODES[mode])
    assert [line["epoch"] for line in log] == [1] and all(np.isfinite(line["loss"]) for line in log)
    assert ("consistency" in log[0]) == (mode in ("T2-c", "T2-e", "atr18", "X5", "X6", "bf16"))
    metrics = result["metrics"]
    for query in ("cross", "same"):
        assert {
            f"{query}.{k}" for k in ("mAP", "rank1", "rank5", "rank10", "mINP", "single10.rank1", "single10.mrr")
        } <= metrics.keys()
    best = mode == "X6"
    assert (
        result["selection"] == ("best_on_test" if best else "last")
        and ("last.cross.rank1" if best else "best.cross.rank1") in metrics
    )
    assert result["protocol"]["gallery_draws"] == {"multi": 1, "single10": 10} and result["data"]["ids"] == 8


def white_clothes(device):
    """(stream of train.py, order): batches of 8 of 32 pictures of white clothes on black, with their masks."""
    clothes = np.zeros((32, 40, 20), np.uint8)
    clothes[:, 8:30, 3:9] = 1
    cpu, order = torch.device("cpu"), np.random.default_rng(0).permutation(32)
    store = ImageStore([""] * 32, (3, 40, 20), "bilinear", "disk", cpu, np.repeat(clothes[:, None] * 255, 3, 1))
    masks = MaskStore([Sample("", 1, 0, mask="there")] * 32, 40, 20, "part6", cpu, clothes * 2)
    args = train.parse_args(["--height", "40", "--width", "20", "-j", "1"])
    here = runtime.Run("pixel_sampling", "test", vars(args), device, 0, 1, Path("."), Path("."), 0.0)
    augment, draw = train.augmentation(args), torch.Generator(device).manual_seed(0)
    labels, batches = torch.arange(32) * 3, order.reshape(4, 8)
    return train.stream(here, args, store, masks, labels, batches, augment, draw), order


def test_masks_move_with_their_images_and_labels_are_those_of_the_images():
    """After flip and crop white is still where the parts say clothes."""
    stream, order = white_clothes(torch.device("cpu"))
    x, parts, labels = (torch.cat(each) for each in zip(*stream))
    assert labels.tolist() == (3 * order).tolist()
    assert torch.equal(x[:, 0] > 0, parts == 2) and len(parts.unique(dim=0)) > 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_reach_the_gpu_without_a_wait_of_the_host():
    stream, order = white_clothes(torch.device("cuda", 0))
    next(stream)  # constants are made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        labels = [labels for _, _, labels in stream]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cat(labels).tolist() == (3 * order[8:]).tolist()


def test_resumed_run_equals_an_uninterrupted_one(data_dir, tmp_path):
    whole, log = run(data_dir, tmp_path / "whole", "--epochs", 2)
    places = [
        "--data-dir",
        str(data_dir),
        "--logs-dir",
        str(tmp_path / "cut/logs"),
        "--results-dir",
        str(tmp_path / "cut/results"),
    ]
    arguments = train.parse_args([*TINY, "--epochs", "2", *places])

    class Killed(Exception):
        pass

    def stop(*args, **options):
        original(*args, **options)
        if args[1] == 1:
            raise Killed

    original, train.log_folder.save = train.log_folder.save, stop
    try:
        with pytest.raises(Killed):
            train.main(arguments)
    finally:
        train.log_folder.save = original
    result, again = run(data_dir, tmp_path / "cut", "--epochs", 2, "--resume")
    assert again == log and result["metrics"] == whole["metrics"]
    states = [
        checkpoints.read(next((tmp_path / part / "logs").rglob("checkpoint_0002.pt")))["state_dict"]
        for part in ("whole", "cut")
    ]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [PYTHON, TORCHRUN], ids=["one process", "two processes"])
def test_training_killed_with_signal_9_continues_to_the_quiet_runs_numbers(data_dir, tmp_path, launcher):
    def command(out, *more):
        places = ["--data-dir", data_dir, "--logs-dir", tmp_path / out / "logs", "--results-dir", tmp_path / out]
        return [ROOT / "pixel_sampling/train.py", *TINY, "--epochs", 4, *places, *more]

    quiet = script(*command("quiet"), launcher=launcher)
    assert quiet.returncode == 0, quiet.stderr[-2000:]
    kill_when([*launcher, *command("cut")], tmp_path, "cut/logs/**/checkpoint_0001.pt")
    assert not list(tmp_path.glob("cut/**/seed0.json"))
    again = script(*command("cut", "--resume"), launcher=launcher)
    assert again.returncode == 0, again.stderr[-2000:]
    results = [json.loads(next((tmp_path / out).rglob("seed0.json")).read_text()) for out in ("quiet", "cut")]
    assert results[0]["metrics"] == results[1]["metrics"]
    states = [
        checkpoints.read(next((tmp_path / out).rglob("checkpoint_0004.pt")))["state_dict"] for out in ("quiet", "cut")
    ]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_checkpoint_evaluates_to_the_recorded_metrics_and_draws_the_figures(data_dir, tmp_path, capsys, monkeypatch):
    ours, _ = run(data_dir, tmp_path / "ours")
    run(data_dir, tmp_path / "hpm", "--arch", "hpm", "--consistency", "none", "--height", "96", "--width", "48")
    folders = {
        name: str(next((tmp_path / name / "logs").rglob("checkpoint_0001.pt")).parent) for name in ("ours", "hpm")
    }
    evaluation_script.main(
        evaluation_script.parse_args(["--checkpoint", folders["ours"], "--csv", str(tmp_path / "out.csv"), "-j", "1"])
    )
    rows = {
        (row["query"], row["protocol"]): row for row in csv.DictReader(open(tmp_path / "out.csv", encoding="utf-8"))
    }
    assert set(rows) == {(q, p) for q in ("cross", "same") for p in ("multi", "single10")}
    for (query, protocol), row in rows.items():
        prefix = query + (".single10" if protocol == "single10" else "")
        assert float(row["rank1"]) == ours["metrics"][f"{prefix}.rank1"]
        assert (row["mAP"] == "") == (protocol == "single10") == (row["mrr"] != "")
    flags = ["--data-dir", str(data_dir), "--out", str(tmp_path / "figures"), "-j", "1"]
    networks = ["--checkpoint", folders["ours"], "--against", folders["hpm"], "--number", "3"]
    fed, maps_of = [], visualize.activation_maps

    def seen(network, x, *of):
        fed.append(tuple(x.shape[2:]))
        return maps_of(network, x, *of)

    monkeypatch.setattr(visualize, "activation_maps", seen)
    capsys.readouterr()
    for figure in (
        ["1", "--number", "5"],
        ["3"],
        ["4", *networks],
        ["4", *networks, "--split", "train", "--cam", "raw"],
        ["5", *networks, "--query", "same"],
    ):
        visualize.main(visualize.parse_args([*figure, *flags]))
    size = ours["args"]["height"], ours["args"]["width"]
    assert fed == [(96, 48), size] * 2  # each network at its own
    drawn = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(tmp_path))]
    assert len(drawn) >= 8
    for path in drawn:
        if path.endswith(".png"):
            assert min(Image.open(path).size) > 100
        else:
            listed = list(csv.DictReader(open(path, encoding="utf-8")))
            assert (
                len(listed) == 6 * 6 and {"query", "gallery", "rank", "match"} <= listed[0].keys()
            )  # 6 queries, 6 gallery images


def test_the_mean_of_a_class_map_is_the_score_of_its_class_and_every_image_lights_up():
    torch.manual_seed(0)
    network = model.build("bot", 5, "resnet18")
    torch.nn.init.normal_(network.classifier.weight)
    for _ in range(3):  # running statistics off their start
        network.train()(torch.randn(8, 3, 64, 32))
    network.eval()
    x, labels = torch.randn(6, 3, 64, 32), torch.tensor([0, 1, 2, 3, 4, 0])
    scores = network.scores(x).gather(1, labels[:, None])[:, 0]
    assert torch.allclose(visualize.class_maps(network, x, labels, folded=True).mean((1, 2)), scores, atol=1e-4)
    maps, chosen = visualize.activation_maps(network, x, None, folded=True)
    assert torch.equal(chosen, network.scores(x).argmax(1)) and maps.shape == (6, 64, 32)
    assert (maps.amax((1, 2)) > 0.5).all() and maps.min() >= 0 and maps.max() <= 1
    raw = visualize.class_maps(network, x, labels, folded=False)
    expected = (network.backbone(x) * network.classifier.weight[labels][:, :, None, None]).sum(1)
    assert torch.allclose(raw, expected, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_and_give_one_result(data_dir, tmp_path):
    flags = [
        *TINY, "--epochs", "1", "--data-dir", data_dir, "--logs-dir", tmp_path / "logs", "--results-dir",
        tmp_path / "results"
    ]  # fmt: skip
    done = script("pixel_sampling/train.py", *flags, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = (tmp_path / "results").rglob("seed0.json")
    assert (
        json.loads(result.read_text())["env"]["world_size"] == 2 and "2 identities x 2 images a process" in done.stdout
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--arch", "pcb"], "--consistency compares"),
        (PLAIN[:2], "--consistency compares"),
        (["--arch", "head", "--consistency", "none"], "without pixel sampling"),
        (["--mask-align", "none"], "--aug code"),
        (["--batch-size", "9"], "nearest: 8"),
        (["--label-smooth", "1"], "outside"),
        (["--epochs", "0"], "at least 1"),
    ],
)
def test_flags_that_do_not_fit_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        train.parse_args([*TINY, *flags])
    assert message in capsys.readouterr().err


def test_a_network_starts_from_the_last_checkpoint_of_a_finished_row_alone(tmp_path):
    flags = ["--row", "cpu/table3/pcb", "--logs-dir", str(tmp_path)]
    args = train.parse_args(flags)
    assert args.weights == "row:cpu/table2/bot" and args.row == "cpu/table3/pcb"
    folder = tmp_path / "pixel_sampling" / "prcc-synthetic-medium" / "cpu/table2/bot" / "seed0"
    folder.mkdir(parents=True)
    checkpoints.write(folder, 14, {"state_dict": {}})  # of 15 epochs
    with pytest.raises(FileNotFoundError, match="to its end: python pixel_sampling/train.py --row cpu/table2/bot"):
        train.initial_weights(args)
    donor = model.build("bot", 5, "resnet18")
    path = checkpoints.write(folder, 15, {"state_dict": donor.state_dict()})
    assert train.initial_weights(args) == str(path)
    network = model.build("pcb", 7, "resnet18", train.initial_weights(args))
    assert torch.equal(network.backbone.layer4[1].conv2.weight, donor.backbone.layer4[1].conv2.weight)
    assert train.initial_weights(train.parse_args(["--weights", "none"])) == "none"


def copied(data_dir, tmp_path):
    shutil.copytree(data_dir / "prcc", tmp_path / "data/prcc", ignore=shutil.ignore_patterns(".reid_cache"))
    return tmp_path / "data"


def test_missing_masks_are_counted_and_warned_and_training_goes_on(data_dir, tmp_path):
    data = copied(data_dir, tmp_path)
    for mask in sorted((data / "prcc/mask/train").rglob("*.png"))[:7]:
        mask.unlink()
    with pytest.warns(UserWarning, match="7 of 30 images .*have no mask"):
        result, _ = run(data, tmp_path)
    assert np.isfinite(result["metrics"]["cross.mAP"])


def test_a_finished_run_with_other_masks_is_not_the_one_asked_for(data_dir, tmp_path):
    data = copied(data_dir, tmp_path)
    run(data, tmp_path)
    with pytest.raises(log_folder.Finished):
        run(shutil.move(data, tmp_path / "moved"), tmp_path)
    (tmp_path / "moved/prcc/mask/train/001/A_cropped_rgb001.png").unlink()
    with (
        pytest.warns(UserWarning, match="no mask"),
        pytest.raises(ValueError, match="other images of prcc train masks"),
    ):
        run(tmp_path / "moved", tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda root: write_labels(root / "mask/train/001/A_cropped_rgb001.png", np.zeros((20, 10), np.uint8)),
            "is 10x20 but its image is 24x48",
        ),
        (
            lambda root: write_labels(root / "mask/train/001/A_cropped_rgb001.png", np.full((48, 24), 9, np.uint8)),
            "use --mask-format atr18",
        ),
        (
            lambda root: (root / "rgb/train/002/B_cropped_rgb001.jpg").write_bytes(b"\xff\xd8 cut"),
            "B_cropped_rgb001.jpg: cannot be decoded",
        ),
    ],
)
def test_wrong_masks_and_images_end_the_run_before_training(data_dir, tmp_path, change, message):
    data = copied(data_dir, tmp_path)
    change(data / "prcc")
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path)


def test_clothes_absent_from_all_masks_train_with_finite_losses(data_dir, tmp_path):
    """X' = X, so f = f' and the distance of Eq. (3) is zero for every pair."""
    data = copied(data_dir, tmp_path)
    for mask in sorted((data / "prcc/mask/train").rglob("*.png")):
        write_labels(mask, np.zeros((48, 24), np.uint8))
    _, log = run(data, tmp_path)
    assert np.isfinite(log[0]["loss"]) and log[0]["consistency"] < 1e-3


def test_a_person_without_a_gallery_image_is_left_out_of_multi_and_single10_is_refused(data_dir, tmp_path, capsys):
    data = copied(data_dir, tmp_path)
    shutil.rmtree(data / "prcc/rgb/test/A/008")
    result, _ = run(data, tmp_path)
    assert "query people [8] have no gallery image: multi without them, and no single10" in capsys.readouterr().out
    assert result["protocol"]["gallery_draws"] == {"multi": 1}
    assert not [name for name in result["metrics"] if "single10" in name]
    words = ["--checkpoint", str(next((tmp_path / "logs").rglob("checkpoint_0001.pt"))), "-j", "1"]
    evaluation_script.main(evaluation_script.parse_args([*words, "--protocol", "multi"]))
    said = capsys.readouterr().out
    assert f"cross  multi     rank1 {100 * result['metrics']['cross.rank1']:5.1f}" in said and "single10" not in said
    with pytest.raises(ValueError, match=r"single10 draws .* and \[8\] have none: use --protocol multi"):
        evaluation_script.main(evaluation_script.parse_args(words))


def test_foreign_checkpoints_are_named(data_dir, tmp_path):
    torch.save({"x": 1}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="no checkpoint of this repository"):
        evaluation_script.load_network(str(tmp_path / "foreign.pt"))
    with pytest.raises(FileNotFoundError):
        evaluation_script.load_network(str(tmp_path / "gone"))
    done = script(ROOT / "pixel_sampling/test.py", "--checkpoint", tmp_path / "foreign.pt", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
