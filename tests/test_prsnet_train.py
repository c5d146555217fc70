"""PRSNet end to end at the smallest size: pre-training, resuming, fine-tuning, folding, pictures, and what is said
about wrong input."""

import json
import subprocess

import prsnet_small as small
import pytest
import torch
from conftest import PYTHON, ROOT, TORCHRUN, child_environment, kill_when, script
from PIL import Image
from test_resume import assert_equal

from common import checkpoints, runfiles
from prsnet import deploy, flags, masking, pretrain, protocols, test, train

TINY = small.WORDS
ALONE = {"device": torch.device("cpu"), "world_size": 1, "rank": 0, "main": True}
RUN = type("Run", (), {**ALONE, "args": {"amp": "off", "compile": False}})  # what build and the steps ask of a run


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return small.people(tmp_path_factory.mktemp("data"), 40)


def command(data_dir, out, *more):
    return [
        str(word)
        for word in ("--data-dir", data_dir, "--logs-dir", out / "logs", "--results-dir", out / "results", *TINY, *more)
    ]


def pretrained(data_dir, out, *more):
    pretrain.main(
        flags.pretrain_args(
            command(data_dir, out, "--batch-size", 16, "--epochs", 4, "--save-every", 2, "--lr", 0.02, *more)
        )
    )
    return next((out / "logs").rglob("best.pt"))


@pytest.fixture(scope="module")
def best(data_dir, tmp_path_factory):
    return pretrained(data_dir, tmp_path_factory.mktemp("pretrained"))


def finetune_words(data_dir, out, best, *more):
    return command(
        data_dir, out, "--batch-size", 8, "--num-instances", 4, "--epochs", 1, "--iters", 2, "--weights", best, *more
    )


@pytest.fixture(scope="module")
def finetuned(data_dir, best, tmp_path_factory):
    out = tmp_path_factory.mktemp("finetuned")
    train.main(flags.train_args(finetune_words(data_dir, out, best)))
    return runfiles.newest(next((out / "logs").rglob("checkpoint_0001.pt")).parent)


def only(out, pattern):
    (found,) = out.rglob(pattern)
    return found


# --------------------------------------------------------------------------------------------------------- pre-training


def test_interrupted_pretraining_continues_to_the_same_losses_and_weights(data_dir, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pretrained(data_dir, whole)
    original = pretrain.train_one_epoch

    def stops(*arguments):
        if arguments[-1] == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(pretrain, "train_one_epoch", stops)  # epochs 1-3 run, the checkpoint is of epoch 2
    with pytest.raises(KeyboardInterrupt):
        pretrained(data_dir, broken)
    monkeypatch.setattr(pretrain, "train_one_epoch", original)
    pretrained(data_dir, broken, "--resume")
    logs = [only(out / "logs", "log.jsonl").read_text() for out in (whole, broken)]
    assert logs[0] == logs[1] and logs[0].count("\n") == 4
    for name in ("checkpoint_0004.pt", "best.pt"):
        a, b = (checkpoints.read(only(out / "logs", name)) for out in (whole, broken))
        assert all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items())
    assert json.loads(logs[0].splitlines()[0])["loss"] > json.loads(logs[0].splitlines()[-1])["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [PYTHON, TORCHRUN], ids=["one_process", "two_processes"])
def test_killed_pretraining_continues_to_the_bit(data_dir, tmp_path, launcher):
    def words(out, *more):
        options = ("--batch-size", 16, "--epochs", 20, "--save-every", 2, "--lr", 0.02, *more)
        return [ROOT / "prsnet" / "pretrain.py", *command(data_dir, tmp_path / out, *options)]

    done = script(*words("whole"), launcher=launcher)
    assert done.returncode == 0, done.stderr
    kill_when([*launcher, *words("broken")], tmp_path, "broken/**/checkpoint_0002.pt")
    assert not list(tmp_path.glob("broken/**/checkpoint_0020.pt"))
    done = script(*words("broken", "--resume"), launcher=launcher)
    assert done.returncode == 0 and "continuing after epoch" in done.stdout, done.stderr
    for name in ("checkpoint_0020.pt", "best.pt"):
        a, b = (checkpoints.read(only(tmp_path / out, name)) for out in ("whole", "broken"))
        for key in ("epoch", "state_dict", "optimizer", "scheduler"):
            assert_equal(a[key], b[key], f"{name}.{key}")
    logs = [only(tmp_path / out / "logs", "log.jsonl").read_text() for out in ("whole", "broken")]
    assert logs[0] == logs[1] and logs[0].count("\n") == 20


def test_a_pretraining_of_its_own_ends_with_the_command_that_finds_it(data_dir, tmp_path, capsys):
    best = pretrained(data_dir, tmp_path, "--batch-size", 40)
    said = capsys.readouterr().out.splitlines()[-1]
    assert "custom-" in said and said.startswith("fine-tune from it: python prsnet/train.py")
    args = flags.train_args(said.partition("train.py ")[2].split())
    assert flags.weights_file(args, "market") == best
    args.weights = str(best.parent)  # a log folder
    assert flags.weights_file(args, "market") == best
    train.build(args, RUN, 3, "market")


def test_best_checkpoint_is_the_epoch_of_lowest_loss_and_its_args_are_plain(best):
    log = [json.loads(line) for line in (best.parent / "log.jsonl").read_text().splitlines()]
    state = checkpoints.read(best)
    assert state["epoch"] == min(log, key=lambda line: line["loss"])["epoch"]
    assert state["extra"]["loss"] == min(line["loss"] for line in log)
    assert {k.split(".")[0] for k in state["state_dict"]} == {"encoder", "decoder"}


def test_rate_warms_up_by_iteration_and_ends_at_zero():
    factor = pretrain.cosine(10, 110)
    assert [factor(step) for step in (0, 5, 10, 60, 110)] == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-9)
    steps = train.warmup_steps(120)
    assert [steps(e) for e in (0, 4, 9, 39, 40, 69, 70, 119)] == pytest.approx([0.1, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_weight_decay_is_on_matrices_only(tmp_path):
    args = flags.pretrain_args([*TINY, "--batch-size", "16"])
    model, optimizer, _ = pretrain.build(args, RUN, 1)
    matrices, vectors = (group["params"] for group in optimizer.param_groups)
    assert (
        all(p.ndim > 1 for p in matrices)
        and all(p.ndim == 1 for p in vectors)
        and len(matrices) + len(vectors) == len(list(model.parameters()))
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(3e-4 * 16 / 256)


@pytest.mark.parametrize(
    "more", [["--model", "mae"], ["--preset", "authors", "--bottleneck", "32"], ["--block", "v2", "--clip", "1"]]
)
def test_the_other_networks_pretrain_too(data_dir, tmp_path, more):
    pretrain.main(flags.pretrain_args(command(data_dir, tmp_path, "--batch-size", 20, "--epochs", 2, *more)))
    metrics = json.loads(only(tmp_path / "results", "seed0.json").read_text())["metrics"]
    assert metrics.keys() == {"masked_mse", "mean_colour_mse", "loss", "best_loss"}


def test_shell_script_passes_its_environment_on_and_resumes():
    environment = child_environment(
        PYTHON="echo", NGPU="4", DATA="/d", OUT="/o", EPOCHS="7", BATCH="64", MODEL="mae", SYNTHETIC="small"
    )
    said = subprocess.run(
        ["bash", "prsnet/run_pretrain.sh", "--amp", "off"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert (
        said.split()
        == (
            "-m torch.distributed.run --standalone --nproc_per_node=4 --max-restarts=3 prsnet/pretrain.py "
            "--row pretrain/mae --data-dir /d "
            "--resume --logs-dir /o --epochs 7 --batch-size 64 --synthetic small --amp off"
        ).split()
    )


# ---------------------------------------------------------------------------------------------- fine-tuning, folding


def test_finetuning_records_every_protocol_by_name(finetuned, data_dir):
    results = only(finetuned.parents[5], "seed0.json")
    metrics = json.loads(results.read_text())["metrics"]
    assert {key.rpartition(".")[0] for key in metrics} == set(protocols.PROTOCOLS)
    state = checkpoints.read(finetuned)["state_dict"]
    assert not any(k.startswith("decoder") for k in state)


@pytest.mark.parametrize(
    "more",
    [
        ["--model", "mae", "--weights", "none"],
        ["--preset", "authors", "--weights", "none", "--mae-head", "linear"],
        ["--centroid", "ctl", "--dist", "sq"],
        ["--variant", "norms=drop", "neck=polluted", "erase=mean"],
    ],
)
def test_the_other_ways_to_finetune_run(data_dir, tmp_path, best, more):
    train.main(flags.train_args(finetune_words(data_dir, tmp_path, best, *more)))
    assert only(tmp_path / "results", "seed0.json").is_file()


def test_one_step_of_finetuning_changes_every_parameter_and_padding_is_not_seen():
    args = flags.train_args([*TINY, "--batch-size", "8", "--weights", "none"])
    torch.manual_seed(0)
    model, optimizer, centres, _ = train.build(args, RUN, 3, "market")
    before = {k: v.detach().clone() for k, v in model.train().named_parameters()}
    draw = torch.Generator().manual_seed(0)
    real = torch.tensor([[True] * 4, [True, True, True, False]])
    x, labels = torch.randn(7, 3, 64, 32, generator=draw), torch.tensor([0, 1])
    output = train.global_batch(RUN, model(x, masking.random_mask(7, (16, 16), 0.75, draw)), real)
    assert output.feats.shape == output.masked.shape == (2, 4, 64) and output.logits.shape == (2, 4, 3)
    assert not output.feats[1, 3].any() and output.feats[real].all()
    loss, parts = train.objective(args, model.centres, output, real, labels)
    loss.backward()
    optimizer.step()
    centres.step()
    kept = [k for k, v in model.named_parameters() if torch.equal(v, before[k])]
    assert kept == ["neck.bias"]  # frozen
    assert set(parts) == {"id", "triplet", "centre", "centroid"}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4] and optimizer.defaults["lr"] == 3.5e-4
    moved = (model.centres - before["centres"]).norm(dim=1)
    assert moved[0] > 0.1 and moved[1] > 0.1 and moved[2] == 0  # by their own rate 0.5, whatever their weight 5e-4


def test_weights_of_pretraining_arrive_in_the_encoder_and_the_map_to_the_feature_is_a_new_one(best):
    def state(weights):
        torch.manual_seed(0)
        args = flags.train_args([*TINY, "--batch-size", "8", "--weights", weights])
        return train.build(args, RUN, 3, "market")[0].state_dict()

    own, new = state(str(best)), state("none")
    stored = {k: v for k, v in checkpoints.read(best)["state_dict"].items() if k.startswith("encoder.")}
    projection = stored.pop("encoder.proj.weight")
    assert stored.keys() == {k for k in own if k.startswith("encoder.")} - {"encoder.proj.weight"}
    assert all(torch.equal(own[k], v) for k, v in stored.items())
    assert torch.equal(own["encoder.proj.weight"], new["encoder.proj.weight"])
    assert not torch.equal(own["encoder.proj.weight"], projection)


@pytest.mark.parametrize(
    "words, told",
    [
        ([], []),
        (["--model", "mae", "--epochs", "3"], ["--model", "mae"]),
        (["--preset", "authors"], ["--block", "plain"]),
        (["--size", "small", "--synthetic", "small"], ["--size", "small", "--synthetic", "small"]),
        (["--mask-block", "32", "8", "--bottleneck", "512"], ["--mask-block", "32", "8", "--bottleneck", "512"]),
    ],
)
def test_pretraining_tells_the_command_that_starts_from_it(words, told, tmp_path):
    args, file = flags.pretrain_args(words), tmp_path / "best.pt"
    file.touch()
    command = flags.fine_tuning(args, file).split()
    assert command[:6] == ["python", "prsnet/train.py", "--dataset", "market", "--weights", str(file)]
    assert command[6:] == told
    finetuned = flags.train_args(command[2:])
    assert flags.weights_file(finetuned, "market") == file
    same = train.same_network(finetuned)
    assert same == {name: getattr(args, name) for name in same}


def test_folded_checkpoint_gives_the_same_metrics_and_loads_as_plain(finetuned, best, data_dir, tmp_path, capsys):
    for source in (finetuned, best):
        words = ["--checkpoint", source, "--out", tmp_path / source.name, "--passes", 1, "--batch-size", 2]
        deploy.main(deploy.deploy_args([str(word) for word in words]))
    assert "times as fast" in capsys.readouterr().out
    said = []
    for file in (finetuned, tmp_path / finetuned.name):
        words = ["--checkpoint", file, "--data-dir", data_dir, "--workers", 1]
        test.main(test.parse_args([str(word) for word in words]))
        said.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("protocol")])
    assert said[0] == said[1] and [line.split()[1] for line in said[0]] == [f"{name}:" for name in protocols.PROTOCOLS]
    train.main(flags.train_args(finetune_words(data_dir, tmp_path, tmp_path / "best.pt", "--block", "plain")))


def test_pictures_are_drawn(finetuned, best, data_dir, tmp_path, capsys):
    for checkpoint, kind in ((best, "recon"), (best, "heat"), (finetuned, "heat"), (finetuned, "rank")):
        out = tmp_path / f"{checkpoint.stem}-{kind}.png"
        words = ["--checkpoint", checkpoint, "--viz", kind, "--out", out, "--number", 3]
        words += ["--data-dir", data_dir, "--workers", 1]
        test.main(test.parse_args([str(w) for w in words]))
        assert Image.open(out).size[0] > 100
    assert "the image's mean colour" in capsys.readouterr().out


def test_a_row_of_pre_training_gives_its_weights_when_it_has_ended(tmp_path):
    args = flags.train_args(["--row", "demo/pretrained", "--logs-dir", str(tmp_path)])
    ends = flags.pretrain_args(["--row", args.weights]).epochs
    folder = tmp_path / "prsnet/person_crops-synthetic-small" / args.weights / "seed0"
    folder.mkdir(parents=True)
    for name in ("best.pt", f"checkpoint_{ends - 1:04d}.pt"):
        (folder / name).touch()
    with pytest.raises(FileNotFoundError, match=f"row {args.weights} has left no checkpoint_{ends:04d}.pt"):
        flags.weights_file(args, "market-synthetic-small")
    (folder / f"checkpoint_{ends:04d}.pt").touch()
    assert flags.weights_file(args, "market-synthetic-small") == folder / "best.pt"
    with pytest.raises(FileNotFoundError, match="--synthetic medium"):
        flags.weights_file(args, "market-synthetic-medium")


# -------------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--block", "plain"],
            "--block rep there, plain here; use the same flags, or fold it first: python prsnet/deploy.py",
        ),
        (["--block", "v2"], "--block rep there, v2 here"),
        (["--model", "mae"], "--model prsnet there, mae here"),
        (["--size", "small"], "--size tiny there, small here"),
        (["--weights", "nowhere.pt"], "neither a file nor a row of pre-training"),
        (["--weights", "pretrain/prsnet"], "run it first, to its end: python prsnet/pretrain.py --row pretrain/prsnet"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_with_the_remedy(data_dir, tmp_path, best, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.main(flags.train_args(finetune_words(data_dir, tmp_path, best, *words)))


def test_resuming_with_other_method_flags_lists_them(data_dir, tmp_path, best, finetuned):
    with pytest.raises(ValueError, match="was written with other flags: --mask-ratio 0.75 -> 0.5"):
        pretrained(data_dir, tmp_path, "--mask-ratio", 0.5, "--resume", runfiles.newest(best.parent))
    with pytest.raises(ValueError, match="was written with other flags: --centroid mctl -> ctl"):
        train.main(
            flags.train_args(finetune_words(data_dir, tmp_path, best, "--centroid", "ctl", "--resume", finetuned))
        )


def test_wrong_kinds_of_checkpoints_are_named(best, finetuned, data_dir, tmp_path):
    with pytest.raises(ValueError, match="is a pre-training checkpoint: it draws"):
        test.main(test.parse_args(["--checkpoint", str(best), "--data-dir", str(data_dir)]))
    with pytest.raises(ValueError, match="has no decoder any more"):
        test.main(test.parse_args(["--checkpoint", str(finetuned), "--viz", "recon", "--data-dir", str(data_dir)]))
    with pytest.raises(FileNotFoundError, match="no image"):
        test.main(
            test.parse_args(
                ["--checkpoint", str(best), "--viz", "heat", "--images", str(tmp_path), "--data-dir", str(data_dir)]
            )
        )


@pytest.mark.parametrize(
    "parse, words, message",
    [
        ("train", "--mask-block 15 8", "does not divide an image of 256 x 128: its height 15 must be one of"),
        ("pretrain", "--mask-block 16 7", "its width 7 must be one of"),
        ("pretrain", "--mask-ratio 1.0", "it must hide at least one and not all"),
        ("pretrain", "--height 240", "multiples of 32"),
        ("pretrain", "--weights x.pt", "to continue a run use --resume"),
        ("pretrain", "--warmup 9 --epochs 9", "must be below --epochs 9"),
        ("train", "--batch-size 30", "nearest: 28"),
        ("train", "--iters 0", "--iters must be at least 1"),
        ("train", "--variant neck=dirty", "known are norms=load|drop"),
        ("train", "--row table5/market", "no row table5/market"),
    ],
)
def test_flags_that_do_not_fit_end_with_one_sentence(parse, words, message, capsys):
    with pytest.raises(SystemExit):
        (flags.train_args if parse == "train" else flags.pretrain_args)(words.split())
    assert message in capsys.readouterr().err


def test_presets_set_what_the_table_says_and_given_flags_win():
    args = flags.train_args(["--preset", "authors", "--centroid", "ctl-authors"])
    assert (args.block, args.centroid, args.mae_head, args.row) == (
        "plain",
        "ctl-authors",
        "authors24",
        "authors/market-ctl",
    )
    args = flags.pretrain_args(["--preset", "authors"])
    assert (args.block, args.bottleneck, args.mask_loss, args.crop_ratio) == ("plain", 768, "authors", [0.75, 1.333])
    args = flags.pretrain_args([])
    assert (args.block, args.bottleneck, args.mask_loss, args.warmup, args.epochs) == ("rep", 2048, "masked", 20, 400)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_trains_as_the_cpu_does_and_in_bf16(data_dir, tmp_path):
    losses = {}
    for amp in ("off", "bf16"):
        pretrained(data_dir, tmp_path / amp, "--amp", amp, "--cache", "device")
        losses[amp] = json.loads(only(tmp_path / amp / "logs", "log.jsonl").read_text().splitlines()[-1])["loss"]
    assert losses["bf16"] == pytest.approx(losses["off"], rel=0.05)
