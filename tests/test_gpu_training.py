"""On a GPU: every stage of every project trains in each precision and from each cache, compiles, and continues to the
bit; networks agree with the CPU; one process under torchrun talks NCCL.
"""

import copy
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import dapg_runs
import numpy as np
import prsnet_small
import pytest
import test_aff_scl_train
import test_convnext_ap_train
import test_pixel_sampling_train
import torch
from conftest import ROOT, TORCHRUN, script, write_market_and_duke
from prcc_tree import write_prcc
from test_resume import assert_equal

import aff_scl.train
import convnext_ap.train
import pixel_sampling.train
import prsnet.pretrain
import prsnet.train
from common import checkpoints, runfiles

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of --deterministic, read when CUDA starts
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:market|duke|prcc|sysu|regdb|luperson"),
]
PRECISIONS = {"fp32-disk": ("off", "disk"), "bf16-device": ("bf16", "device"), "fp16-off": ("fp16", "off")}


@functools.cache
def data() -> Path:
    """Miniatures of all data sets in one --data-dir, for this process."""
    data.folder = tempfile.TemporaryDirectory()
    root = write_prcc(write_market_and_duke(prsnet_small.people(Path(data.folder.name), 32)))
    return root


def trained(module, words: str, out: Path, *more) -> list[float]:
    """The losses of all steps of module.main, which also evaluates, saves and records."""
    places = ["--data-dir", data(), "--logs-dir", out / "logs", "--results-dir", out / "results"]
    with dapg_runs.recorded() as losses:
        module.main(module.parse_args([*words.split(), *map(str, (*places, *more))]))
    return losses


def script_of(module, tiny, words="") -> functools.partial:
    return functools.partial(trained, module, " ".join(map(str, (*tiny, words))))


AFF = script_of(aff_scl.train, test_aff_scl_train.TINY, "--epochs 1")
PS = script_of(pixel_sampling.train, test_pixel_sampling_train.TINY)
PLAIN = " ".join(test_pixel_sampling_train.PLAIN)
PRE = script_of(prsnet.pretrain, prsnet_small.WORDS, "--batch-size 16 --epochs 1 --lr 0.02")
FINE = script_of(
    prsnet.train, prsnet_small.WORDS, "--batch-size 8 --num-instances 4 --epochs 1 --iters 2 --weights none"
)
ROBUST = "--stage robust --batch-size 8 --epochs 1 --iters 2 --variant warmup=1 queue=16"
POSES = "--stage align --weights none --batch-size 8 --epochs 1 --iters 2 --source {poses} --variant queue=16"
GAN = "--stage gan --height 128 --width 64 --batch-size 4 --epochs 1 --iters 2 --variant ngf=4 blocks=1"
CROSS = "--weights none --batch-size 32 --epochs 1 --iters 2 --variant draws=1"


def dapg_losses(losses, words: str, out: Path, *more) -> list[float]:
    """The losses of one epoch of a stage, without what its main does around it."""
    found = losses(*words.format(poses=dapg_runs.data_dir() / "poses").split(), *more)
    return found[0] if isinstance(found, tuple) else found


def add(case: functools.partial, words: str) -> functools.partial:
    return functools.partial(case.func, case.args[0], f"{case.args[1]} {words}")


STAGES = {
    "aff_scl-usl": AFF,
    "aff_scl-ce_tri": add(AFF, "--loss ce_tri"),
    "aff_scl-uda": add(AFF, "--mode uda --source duke"),
    "aff_scl-sup": add(AFF, "--mode sup --bn-groups 1"),
    "convnext_ap": script_of(convnext_ap.train, test_convnext_ap_train.TINY, "--epochs 1"),
    "pixel_sampling-l2": PS,
    "pixel_sampling-mgn": add(PS, "--arch mgn --consistency none"),
    "pixel_sampling-head_body": add(PS, f"--arch head_body {PLAIN}"),
    "prsnet-pretrain": PRE,
    "prsnet-pretrain-mae": add(PRE, "--model mae --mask-block 16 8"),
    "prsnet-mctl": FINE,
    "prsnet-mae": add(FINE, "--model mae --mask-block 16 8"),
    "dapg-robust": functools.partial(dapg_losses, dapg_runs.pretraining_losses, ROBUST),
    "dapg-simclr": functools.partial(dapg_losses, dapg_runs.pretraining_losses, f"{ROBUST} --method simclr"),
    "dapg-byol": functools.partial(dapg_losses, dapg_runs.pretraining_losses, f"{ROBUST} --method byol"),
    "dapg-moco": functools.partial(dapg_losses, dapg_runs.pretraining_losses, f"{ROBUST} --method moco"),
    "dapg-align": functools.partial(dapg_losses, dapg_runs.pretraining_losses, POSES),
    "dapg-gan": functools.partial(dapg_losses, dapg_runs.gan_losses, GAN),
    "dapg-agw": functools.partial(dapg_losses, dapg_runs.finetuning_losses, f"--stage agw --dataset sysu {CROSS}"),
    "dapg-cil": functools.partial(dapg_losses, dapg_runs.finetuning_losses, f"--stage cil --dataset regdb {CROSS}"),
}
COMPILED = ("aff_scl-sup", "convnext_ap", "pixel_sampling-l2", "prsnet-pretrain", "dapg-agw")


@pytest.fixture(autouse=True)
def backends():
    """The switches that a run sets for its process, as they were."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")


@functools.cache
def two_steps(stage: str, amp: str, cache: str) -> list[float]:
    """The losses of two steps or more of a stage."""
    with tempfile.TemporaryDirectory() as out:
        return STAGES[stage](Path(out), "--amp", amp, "--cache", cache)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_in_each_precision_and_from_each_cache(stage, precision):
    losses = two_steps(stage, *PRECISIONS[precision])
    assert len(losses) >= 2 and np.isfinite(losses).all()
    close = 0.3 if stage.startswith("aff_scl") else 0.1  # the draws are the same; clusters of such features may not be
    assert losses[0] == pytest.approx(two_steps(stage, *PRECISIONS["fp32-disk"])[0], rel=close, abs=0.02)


@pytest.mark.parametrize("stage", COMPILED)
def test_a_compiled_stage_takes_the_same_steps(stage, tmp_path):
    losses = STAGES[stage](tmp_path, "--compile")
    assert losses[0] == pytest.approx(two_steps(stage, "off", "disk")[0], rel=0.1)  # dropout draws otherwise
    assert np.isfinite(losses).all()


# ----------------------------------------------------------------------------------------------------------- continued
CONTINUED = {
    "aff_scl": add(AFF, "--epochs 2 --deterministic"),
    "convnext_ap": script_of(convnext_ap.train, test_convnext_ap_train.TINY, "--epochs 1 --deterministic"),
    "pixel_sampling": add(PS, "--epochs 2 --deterministic"),
    "prsnet-pretrain": add(PRE, "--epochs 2 --save-every 1 --deterministic"),
    "prsnet": add(FINE, "--epochs 2 --deterministic"),
    "dapg": None,
}


@pytest.mark.parametrize("project", CONTINUED)
def test_a_deterministic_run_continues_to_the_bit(project, tmp_path):
    """From the last checkpoint but one, moved to another place, to the same weights, optimiser and log."""
    words = [*ROBUST.split(), "--epochs", "2", "--deterministic"]  # of dapg
    once = CONTINUED[project] or (lambda out, *more: dapg_runs.run_main(dapg_runs.data_dir(), out, *words, *more))
    once(tmp_path / "whole")
    whole = next((tmp_path / "whole").rglob("checkpoint_0002.pt")).parent
    first, last = runfiles.listed(whole)
    broken = tmp_path / "broken" / whole.relative_to(tmp_path / "whole")
    broken.mkdir(parents=True)
    shutil.copy(first, broken)
    lines = (whole / "log.jsonl").read_text().splitlines(True)
    (broken / "log.jsonl").write_text("".join(lines[: runfiles.epoch_of(first)]))
    once(tmp_path / "broken", "--resume")
    one, two = (checkpoints.read(folder / last.name) for folder in (whole, broken))
    for key in ("epoch", "state_dict", "optimizer", "scheduler", "scaler"):
        assert_equal(one[key], two[key], key)
    assert (whole / "log.jsonl").read_text() == (broken / "log.jsonl").read_text()


@pytest.mark.parametrize("stage, dataset", [("agw", "regdb"), ("cil", "sysu")])
def test_cross_modal_stages_end_with_their_evaluation(stage, dataset, tmp_path):
    """Clean and corrupted, from loader processes, which must not touch the device."""
    words = ["--stage", stage, "--dataset", dataset, *CROSS.split(), "--iters", 1, "--workers", 2, "--amp", "bf16"]
    assert "result in" in dapg_runs.run_main(dapg_runs.data_dir(), tmp_path, *words)
    (result,) = (tmp_path / "res").rglob("seed0.json")
    assert json.loads(result.read_text())["env"]["gpu"] == torch.cuda.get_device_name()


# ------------------------------------------------------------------------------------------------------------ networks
def networks() -> dict:
    """Name -> (network, inputs), small, of every kind there is."""
    from dapg.downstream.agw import TwoStream
    from pixel_sampling import model as cloth
    from prsnet import masking

    x, grid = torch.randn(4, 3, 64, 32), masking.grid_of(64, 32, (4, 2))
    masked = masking.random_mask(4, grid, 0.75, torch.Generator().manual_seed(0))
    found = {"aff": (aff_scl.train.build_model(aff_scl.train.parse_args(test_aff_scl_train.TINY), 0), (x,))}
    for words in ([], ["--simam", "none", "--parts", "0"]):
        flags = convnext_ap.train.parse_args([*map(str, test_convnext_ap_train.TINY), *words])
        found[f"convnext {words}"] = convnext_ap.train.build_model(flags, 5), (torch.randn(4, 3, 96, 32),)
    for arch in ("bot", "pcb", "mgn", "hpm"):
        found[arch] = cloth.build(arch, 5, "resnet18", "none"), (x,)
    found["prsnet"] = prsnet.pretrain.build_model(prsnet_small.pretrain_args()), (x, masked)
    found["agw"] = TwoStream(5, "resnet18", 1), (x, x.flip(0))
    return found


def run_network(network, inputs, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs and gradients in train mode, on the CPU again."""
    network = copy.deepcopy(network).to(device, dtype, memory_format=torch.channels_last).train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout) or type(module).__name__ in ("StochasticDepth", "DropPath"):
            module.eval()
    out = network(*(x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in inputs))
    parts = tensors(out)
    sum(part.square().mean() for part in parts).backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return [part.detach().cpu() for part in (*parts, *gradients)]


def tensors(out) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out] if out.is_floating_point() else []
    return [part for item in out if item is not None for part in tensors(item)]


@pytest.mark.parametrize("name", ["aff", "convnext []", "convnext ['--simam', 'none', '--parts', '0']", "bot", "pcb",
                                  "mgn", "hpm", "prsnet", "agw"])  # fmt: skip
def test_a_network_and_its_gradients_are_those_of_the_cpu(name):
    """In float64, where cuDNN and the CPU agree closely; AGW pools in float32."""
    torch.manual_seed(0)
    network, inputs = networks()[name]
    dtype, close = (torch.float32, 1e-2) if name == "agw" else (torch.float64, 1e-6)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        here, there = (run_network(network, inputs, device, dtype) for device in ("cpu", "cuda"))
    assert len(here) == len(there) > 3
    size = max(float(one.norm()) for one in here)
    for one, other in zip(here, there):
        assert (one - other).norm() <= close * size


# ------------------------------------------------------------------------------------------------------------ torchrun
NCCL = """
import sys
sys.path.insert(0, {root!r})
from argparse import ArgumentParser
import torch
import torch.distributed as dist
from common import flags, processes, runtime
parser = ArgumentParser()
flags.add_run_flags(parser)
args = parser.parse_args([])
args.row = "row"
def main(args):
    run = runtime.start(args, "p")
    assert dist.get_backend() == "nccl" and run.device.type == "cuda"
    x = torch.arange(6.0, device=run.device).reshape(2, 3).requires_grad_()
    rows = processes.GatherWithGradient.apply(x)
    (rows[run.rank * 2 :][:2] * torch.ones_like(x)).sum().backward()
    assert rows.shape == (2 * run.world_size, 3) and torch.equal(x.grad, torch.ones_like(x))
    dist.all_reduce(x.detach())
    dist.broadcast(x.detach(), 0)
    dist.barrier()
    with processes.rank_zero_first(run):
        pass
    model = torch.nn.Linear(3, 1).to(run.device)
    model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[run.device.index])
    runtime.step(run, model(x).sum(), [torch.optim.SGD(model.parameters(), 0.1)], runtime.scaler(run), "step 1")
    print(f"rank {{run.rank}} of {{run.world_size}} done", flush=True)
runtime.execute(main, args)
"""


def visible(number: int) -> str:
    """CUDA_VISIBLE_DEVICES of the first cards that this process sees."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return ",".join(names[:number] if names[0] else map(str, range(number)))


@pytest.mark.parametrize("number", [1, 2])
def test_torchrun_with_nccl_gathers_reduces_and_steps(number, tmp_path):
    if torch.cuda.device_count() < number:
        pytest.skip(f"needs {number} CUDA devices")
    (tmp_path / "program.py").write_text(NCCL.format(root=str(ROOT)))
    launcher = [word.replace("=2", f"={number}") for word in TORCHRUN]
    done = script(tmp_path / "program.py", launcher=launcher, CUDA_VISIBLE_DEVICES=visible(number), timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(f"rank {rank} of {number} done" in done.stdout for rank in range(number))


def test_one_process_under_torchrun_trains_with_nccl(tmp_path):
    launcher = [word.replace("=2", "=1") for word in TORCHRUN]
    places = ["--data-dir", data(), "--logs-dir", tmp_path / "logs", "--results-dir", tmp_path / "results"]
    words = [*test_aff_scl_train.TINY, "--mode", "sup", "--bn-groups", 1, "--epochs", 1, *places]
    done = script(ROOT / "aff_scl/train.py", *words, launcher=launcher, CUDA_VISIBLE_DEVICES=visible(1))
    assert done.returncode == 0 and "result in" in done.stdout, done.stderr
