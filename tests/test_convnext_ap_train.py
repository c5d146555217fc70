"""Training ConvNeXt-AP through its stages by the real script: native layouts, resume, processes, bad input, figures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, script, write_market
from PIL import Image
from scipy.io import savemat

from common import checkpoints, inputs, records, runfiles, runtime, transforms
from common.images import ImageStore
from convnext_ap import figures, train
from convnext_ap import test as testing

TINY = ["--trunk", "tiny", "--height", 96, "--width", 32, "--parts", 3, "--batch-size", 8, "--num-instances", 2,
        "--epochs", 2, "--rpp-epochs", 1, "--joint-epochs", 1, "--warmup", 1, "--iters", 2, "--workers", 1]  # fmt: skip


def command(data_dir, out, *more):
    where = ["--data-dir", data_dir, "--logs-dir", out / "logs", "--results-dir", out / "results"]
    return [ROOT / "convnext_ap/train.py", *where, *TINY, *more]


def result(out):
    return json.loads(next((out / "results").rglob("seed0.json")).read_text())


def log_dir(out):
    (found,) = (out / "logs").glob("convnext_ap/*/*/seed0")
    return found


def write_cuhk03(root, original=False, split="detected"):
    """A miniature of CUHK03-NP, or of the original images with the new protocol's list: 8 people, 3 images a view."""
    draw = np.random.default_rng(0)
    names, labels, parts = [], [], {"train": [], "query": [], "gallery": []}
    for pid in range(1, 9):
        colour = draw.integers(0, 256, 3)
        for n in range(6):
            view = n // 3 + 1
            part = "train" if pid <= 5 else "query" if n % 3 == 0 else "gallery"
            picture = Image.fromarray((colour + draw.integers(0, 20, (48, 16, 3))).clip(0, 255).astype(np.uint8))
            if original:
                folder, name = root / "cuhk03/images_detected", f"1_{pid:03d}_{view}_{n + 1:02d}.png"
            else:
                box = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}[part]
                folder, name = root / f"cuhk03-np/{split}/{box}", f"{pid:04d}_c{view}_{n + 1}.png"
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / name)
            names.append(name), labels.append(pid), parts[part].append(len(names))
    if original:
        lists = {"filelist": np.array(names, dtype=object)[:, None], "labels": np.array(labels)[:, None]}
        lists.update({f"{part}_idx": np.array(indices)[:, None] for part, indices in parts.items()})
        savemat(root / "cuhk03/cuhk03_new_protocol_config_detected.mat", lists)
    return root


@pytest.fixture(scope="module")
def trained(market_dir, tmp_path_factory):
    """A finished run of ConvNeXt-AP through all stages, started from another folder."""
    out = tmp_path_factory.mktemp("trained")
    done = script(*command(market_dir, out), cwd="/")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_market_trains_through_all_stages_from_its_native_layout(trained):
    out, said = trained
    for n, stage in enumerate(("pcb", "pcb", "assign", "joint"), 1):
        assert f"epoch {n} ({stage})" in said
    content = result(out)
    assert content["epoch"] == 4 and content["selection"] == "last"
    wanted = {"mAP", "rank1", "rank5", "rank10", "mINP", "G.mAP", "trapezoid.mAP", "pcb.mAP", "before.mAP"}
    assert wanted <= content["metrics"].keys()
    assert content["metrics"]["trapezoid.mAP"] <= content["metrics"]["mAP"]
    first, second = (checkpoints.read(log_dir(out) / f"{name}.pt")["state_dict"] for name in ("pcb", "assign"))
    changed = [key for key in first if not torch.equal(first[key], second[key])]
    assert changed == ["assign.conv.weight"]


@pytest.mark.parametrize("original", [False, True], ids=["cuhk03-np", "cuhk03_release"])
def test_cuhk03_trains_from_its_native_layouts(tmp_path, original):
    done = script(*command(write_cuhk03(tmp_path, original), tmp_path, "-d", "cuhk03", "--joint-epochs", 0))
    assert done.returncode == 0, done.stderr
    content = result(tmp_path)
    assert content["data"]["name"] == "cuhk03" and content["protocol"]["split"] == "detected"
    assert (content["data"]["images"], content["data"]["ids"], content["data"]["cams"]) == (48, 8, 2)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [("none", 0), ("dw", 0), ("none", 3)])
def test_the_other_variants_train(market_dir, tmp_path, variant):
    done = script(*command(market_dir, tmp_path, "--simam", variant[0], "--parts", variant[1], "--loss", "id+triplet"))
    assert done.returncode == 0, done.stderr
    assert result(tmp_path)["epoch"] == (4 if variant[1] else 2)


@pytest.mark.slow
def test_a_run_stopped_in_a_later_stage_continues_to_the_bit(market_dir, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "again")
    folder = log_dir(tmp_path / "again")
    (folder / "checkpoint_0004.pt").unlink()  # as if killed within the last epoch
    refused = script(*command(market_dir, tmp_path / "again"))
    assert refused.returncode == 1 and "add --resume" in refused.stderr
    done = script(*command(market_dir, tmp_path / "again", "--resume"))
    assert done.returncode == 0 and "continuing after epoch 3" in done.stdout, done.stderr
    first, second = (checkpoints.read(log_dir(out) / "checkpoint_0004.pt") for out in (trained[0], tmp_path / "again"))
    assert all(torch.equal(value, second["state_dict"][key]) for key, value in first["state_dict"].items())
    assert result(trained[0])["metrics"] == result(tmp_path / "again")["metrics"]
    assert (log_dir(trained[0]) / "log.jsonl").read_text() == (folder / "log.jsonl").read_text()


@pytest.mark.parametrize("elsewhere", [False, True], ids=["killed", "from a file elsewhere"])
def test_a_run_continued_where_a_stage_begins_keeps_the_stage_before(market_dir, trained, tmp_path, elsewhere):
    old = log_dir(trained[0])
    flags = ["--resume"]
    if elsewhere:
        flags = ["--resume", old / "assign.pt"]
    else:  # as if killed between the checkpoint of epoch 3 and its copy
        shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
        for name in ("checkpoint_0004.pt", "assign.pt"):
            (log_dir(tmp_path) / name).unlink()
    train.main(train.parse_args([str(word) for word in command(market_dir, tmp_path, *flags)[1:]]))
    assert (log_dir(tmp_path) / "assign.pt").read_bytes() == (old / "checkpoint_0003.pt").read_bytes()
    assert checkpoints.read(log_dir(tmp_path) / "checkpoint_0004.pt")["epoch"] == 4


def test_rows_of_open_questions_train_as_long_as_the_main_row_and_none_ends_as_its_first_stage():
    main = train.make_plan(train.parse_args(["--row", "table4/market/ap"]))
    rows = [row for row in records.load_rows(ROOT / "convnext_ap") if row.startswith("extra/")]
    plans = {row: train.make_plan(train.parse_args(["--row", row])) for row in rows}
    assert {plan.total for plan in plans.values()} == {main.total}
    assert {row for row, plan in plans.items() if plan.epochs != main.epochs} == {"extra/rpp=off"}


def store_of(pixels):
    shape = pixels.shape[1:]
    return ImageStore([""] * len(pixels), shape, "bicubic", "disk", torch.device("cpu"), np.ascontiguousarray(pixels))


def run_here(**flags):
    return runtime.Run("convnext_ap", "test", flags, torch.device("cpu"), 0, 1, Path("."), Path("."), 0.0)


def test_image_and_mirror_image_are_added_in_evaluation(trained):
    """So a mirrored store has the same descriptors, and none is that of its image alone."""
    network, _, _ = testing.load_network(str(log_dir(trained[0])))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 96, 32), dtype=np.uint8)
    found, mirrored = (
        train.features(run_here(amp="off", workers=1), network, store_of(p))["H"] for p in (pixels, pixels[..., ::-1])
    )
    with torch.no_grad():
        one = network.eval()(transforms.normalize(torch.from_numpy(pixels)))
    assert torch.allclose(found, mirrored, atol=1e-5) and not torch.allclose(found, one, atol=1e-3)


def test_a_batch_has_the_labels_of_its_images_half_of_them_erased_with_noise():
    pixels, order = np.full((64, 3, 96, 32), 128, np.uint8), np.random.default_rng(0).permutation(64)
    augment, draw = train.make_augment(train.parse_args([])), torch.Generator().manual_seed(0)
    ((x, labels),) = train.stream(run_here(workers=1), store_of(pixels), torch.arange(64) * 2, [order], augment, draw)
    assert labels.tolist() == (2 * order).tolist()
    changed = x != transforms.normalize(torch.from_numpy(pixels))
    assert 20 <= changed.flatten(1).any(1).sum() <= 44
    assert abs(x[changed].mean().item()) < 0.05 and abs(x[changed].std().item() - 1) < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_reach_the_gpu_without_a_wait_of_the_host():
    run, augment = run_here(workers=1), train.make_augment(train.parse_args([]))
    run.device, draw = torch.device("cuda", 0), torch.Generator("cuda").manual_seed(0)
    store = store_of(np.zeros((32, 3, 96, 32), np.uint8))
    stream = train.stream(run, store, torch.arange(32), np.arange(32).reshape(4, 8), augment, draw)
    next(stream)  # constants are made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        labels = [labels for _, labels in stream]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cat(labels).tolist() == list(range(8, 32))


# ----------------------------------------------------------------------------------------------------- what is refused

REFUSED = {
    "6 parts do not fit the 4x2 map of a 128x64 input": ["--height", "128", "--width", "64"],
    "SimAM takes the variance over a map": ["--height", "32", "--width", "32", "--parts", "0"],
    "leaves no positive pair in a batch; use 2 or more, or --loss id": ["--num-instances", "1"],
    "--batch-size 30 is no multiple of --num-instances 4": ["-b", "30"],
    "no ImageNet weights for --trunk tiny": ["--trunk", "tiny", "--weights", "imagenet"],
    "--split is about the boxes of cuhk03": ["--split", "labeled"],
    "--variant temperature=1 is unknown; known are": ["--variant", "temperature=1"],
    "--iters must be at least 1": ["--iters", "0"],
    "no row table4/market/pa": ["--row", "table4/market/pa"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_flags_that_do_not_fit_are_refused_with_a_sentence(capsys, message):
    with pytest.raises(SystemExit) as status:
        train.parse_args(REFUSED[message])
    assert status.value.code == 2 and message in capsys.readouterr().err


def test_a_batch_without_positives_is_refused():
    labels = np.array([0, 0, 1, 2, 3])
    assert len(train.need_positives(np.array([[0, 1, 2]]), labels, "id+circle")) == 1
    with pytest.raises(ValueError, match=r"batch 2 holds no two images of one person, so --loss id\+circle"):
        train.need_positives(np.array([[0, 1, 2], [1, 2, 3]]), labels, "id+circle")


def test_a_checkpoint_of_another_variant_is_refused(market_dir, trained, tmp_path):
    newest = runfiles.newest(log_dir(trained[0]))
    other = script(*command(market_dir, tmp_path, "--simam", "none", "--resume", newest))
    said = "is a checkpoint of ConvNeXt-AP (--simam dw --parts 3), not of ConvNeXt-P (--simam none"
    assert other.returncode == 1 and said in other.stderr and "Traceback" not in other.stderr
    with pytest.raises(ValueError, match="not of ConvNeXt-A "):
        testing.main(testing.parse_args(["--checkpoint", str(newest), "--parts", "0"]))
    state = checkpoints.read(newest)
    foreign = tmp_path / "checkpoint_0001.pt"
    torch.save({**state, "args": {"tau": 0.05}}, foreign)
    with pytest.raises(ValueError, match="is no checkpoint of convnext_ap"):
        testing.load_network(str(foreign))


def test_a_data_set_with_one_camera_is_refused(market_dir, tmp_path):
    shutil.copytree(market_dir / "market1501", tmp_path / "market1501")
    for folder in ("query", "bounding_box_test"):
        for file in sorted((tmp_path / "market1501" / folder).glob("*_c2*")):
            file.unlink()
    done = script(*command(tmp_path, tmp_path))
    assert done.returncode == 1 and "have camera 1, so no query has a match on another camera" in done.stderr
    assert "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------------------- test.py, figures.py


def test_a_checkpoint_evaluates_to_the_numbers_of_its_training(market_dir, trained, tmp_path):
    out = trained[0]
    words = ["--checkpoint", log_dir(out), "--out", tmp_path, "--export-features", tmp_path / "f.npy", "-j", 1]
    done = script(ROOT / "convnext_ap/test.py", *words, cwd="/")
    assert done.returncode == 0, done.stderr
    metrics = result(out)["metrics"]
    assert f"descriptor H (1024): mAP {100 * metrics['mAP']:.1f}" in done.stdout
    assert f"descriptor G (768): mAP {100 * metrics['G.mAP']:.1f}" in done.stdout
    assert f"trapezoidal mAP {100 * metrics['trapezoid.mAP']:.1f}" in done.stdout
    assert (tmp_path / "cmc.png").is_file() and (tmp_path / "rank_list.png").is_file()
    feats = np.load(tmp_path / "f.npy")
    assert feats.shape == (24, 1024) and len((tmp_path / "f.jsonl").read_text().splitlines()) == 24


def test_the_checkpoint_before_refinement_is_read_in_its_stage(trained):
    for name, stage in (("pcb.pt", "pcb"), ("assign.pt", "assign"), ("checkpoint_0004.pt", "joint")):
        assert testing.load_network(str(log_dir(trained[0]) / name))[0].stage == stage


@pytest.mark.parametrize("figure, file", [
    ("lr", "figure2.png"), ("erasing", "figure3.png"), ("compare", "figure13.png"), ("ranks", "figure14-market.png"),
    ("heat", "figure16-market.png"), ("cmc", "figure17-market.png"), ("parts", "figure7-market.png")])  # fmt: skip
def test_every_figure_is_drawn(market_dir, trained, tmp_path, monkeypatch, figure, file):
    monkeypatch.chdir(tmp_path)
    words = [figure, "--out", str(tmp_path), "-n", "2", "-j", "1", "--data-dir", str(market_dir)]
    if figure in ("ranks", "heat", "cmc", "parts"):
        words += ["--checkpoint", *[str(log_dir(trained[0]))] * (2 if figure in ("heat", "cmc") else 1)]
    args = figures.parse_args(words)
    args.logs_dir = str(tmp_path)
    figures.main(args)
    with Image.open(tmp_path / file) as picture:
        assert min(picture.size) > 100


def drawn(tmp_path, *words):
    figures.main(figures.parse_args([*map(str, words), "--out", str(tmp_path / "out"), "-n", "1", "-j", "1"]))


def changed(checkpoint, file, **flags):
    """A checkpoint as of a training with other flags; its file."""
    state = checkpoints.read(checkpoint)
    torch.save({**state, "args": {**state["args"], **flags}}, file)
    return file


@pytest.mark.parametrize("figure", ["ranks", "heat", "cmc", "parts"])
def test_no_figure_shows_people_that_a_network_was_trained_with(trained, tmp_path, figure):
    newest = runfiles.newest(log_dir(trained[0]))
    flags = {"synthetic": "small", "data_name": "market-synthetic-small"}
    small = changed(newest, tmp_path / "small.pt", **flags)
    (write_market(tmp_path) / "market1501/SYNTHETIC").write_text('{"size": "medium", "seed": 0}')
    with pytest.raises(ValueError, match="same people, so some of these were trained with; measure with --synthetic s"):
        drawn(tmp_path, figure, "--checkpoint", newest, small, "--real", "--data-dir", tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_figure_has_one_data_set_and_one_size(trained, tmp_path):
    newest = runfiles.newest(log_dir(trained[0]))
    for flags, said in (
        ({"height": 128, "width": 64}, "height 96 and 128, width 32 and 64"),
        ({"dataset": "cuhk03", "split": "labeled"}, "dataset market and cuhk03, split None and labeled"),
        ({"synthetic": "small"}, "synthetic None and small"),
    ):
        other = changed(newest, tmp_path / "other.pt", **flags)
        with pytest.raises(ValueError, match=f"checkpoint_0004.pt and .*other.pt would be drawn with {said}, and a"):
            drawn(tmp_path, "cmc", "--checkpoint", newest, other)


def test_the_figure_of_erasing_shows_the_boxes_of_its_split(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        inputs, "open_images", lambda *a, real=inputs.open_images, **k: seen.extend(a[1]) or real(*a, **k)
    )
    write_cuhk03(tmp_path, split="labeled")  # alone: the usual ones are not there
    drawn(tmp_path, "erasing", "-d", "cuhk03", "--split", "labeled", "--data-dir", tmp_path)
    assert seen and all("/labeled/" in sample.path for sample in seen)
    with Image.open(tmp_path / "out/figure3.png") as picture:
        assert min(picture.size) > 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_simam_on_a_gpu_equals_the_cpu():
    from convnext_ap.simam import simam

    x = torch.randn(4, 32, 16, 8)
    a, b = x.clone().requires_grad_(), x.cuda().contiguous(memory_format=torch.channels_last).requires_grad_()
    ya, yb = simam(a), simam(b)
    ya.square().sum().backward(), yb.square().sum().backward()
    assert torch.allclose(ya, yb.cpu(), atol=1e-5) and torch.allclose(a.grad, b.grad.cpu(), atol=1e-4)
