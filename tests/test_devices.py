"""Which device a run takes, and one sentence for a GPU out of reach, too few of them, or memory that is full."""

import os
import shutil
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, TINY, TORCHRUN, child_environment, script

from aff_scl import train
from common import checkpoints, devices, runfiles, runtime


@pytest.fixture
def cards(monkeypatch):
    """A machine with so many GPUs, as torch tells of them."""

    def install(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return install


def test_every_process_of_a_machine_has_a_gpu_of_its_own(cards):
    cards(4)
    assert [devices.choose(local, 4).index for local in range(4)] == [0, 1, 2, 3]
    assert devices.choose() == torch.device("cuda", 0)


def test_more_processes_than_gpus_are_refused_on_all_of_them(cards):
    cards(2)
    for local in range(3):
        with pytest.raises(ValueError, match=r"3 processes .* machine with 2 GPU.*; use --nproc_per_node=2"):
            devices.choose(local, 3)


@pytest.mark.parametrize("value", ["", "-1", " "])
def test_hidden_gpus_are_not_used_and_the_log_says_so(cards, monkeypatch, value):
    cards(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert devices.choose(0, 3) == torch.device("cpu")
    assert devices.described(torch.device("cpu")) == "cpu (CUDA_VISIBLE_DEVICES hides all GPUs)"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert devices.described(torch.device("cpu")) == "cpu"


DRIVER = """
int cuDriverGetVersion(int *version) { *version = 11040; return 0; }
int cuInit(unsigned flags) { return 0; }
int cuGetProcAddress(const char *name, void **found, int version, unsigned long flags) { return 500; }
"""


@pytest.mark.skipif(torch.version.cuda is None, reason="torch without CUDA")
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver of this machine comes first")
def test_a_driver_older_than_torchs_build_is_named_and_not_computed_around(tmp_path):
    """With a driver of CUDA 11.4, of which there is just enough to say so."""
    (tmp_path / "driver.c").write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "libcuda.so.1", "driver.c"], cwd=tmp_path, check=True)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from argparse import Namespace; "
        "from common import devices, runtime; runtime.execute(lambda args: print(devices.choose()), Namespace())"
    )
    environment = {k: v for k, v in child_environment().items() if k != "CUDA_VISIBLE_DEVICES"}
    environment["LD_LIBRARY_PATH"] = f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the GPU cannot be used: The NVIDIA driver on your system is too old")
    for part in ("found version 11040", f"built for CUDA {torch.version.cuda}", "CUDA_VISIBLE_DEVICES=-1"):
        assert part in done.stderr


def test_fp16_on_a_cpu_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ["--amp", "fp16", "--data-dir", str(tmp_path), "--logs-dir", str(tmp_path / "logs")]
    with pytest.raises(ValueError, match="--amp fp16 needs a GPU.*use --amp bf16 or --amp off"):
        train.main(train.parse_args(words))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- memory
@pytest.fixture
def ended(monkeypatch, capsys):
    """Execute a main as a script does: its exit status and what it says."""

    def execute(main, args):
        status = []
        monkeypatch.setattr(runtime.os, "_exit", status.append)
        runtime.execute(main, args)
        return status, capsys.readouterr().err

    return execute


def ask_for(size, device="cpu"):
    return lambda args: torch.empty(size, dtype=torch.uint8, device=device)


def test_full_memory_is_one_sentence_with_the_flags_that_lower_it(ended):
    args = Namespace(batch_size=64, height=256, width=128, amp="off", cache="device")
    status, said = ended(ask_for(2**60), args)
    assert status == [1] and said.count("\n") == 1
    assert said.startswith(
        "error: the memory of this machine is too small: 1073741824.00 GiB more did not fit; lower --batch-size (64) "
        "or --height and --width (256 x 128), or use --amp bf16 and --cache disk (details: "
    )


@pytest.mark.parametrize(
    "text, sentence",
    [
        (
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7.79 GiB of which 1.10 GiB "
            "is free.",
            "the memory of the GPU is too small: 2.50 GiB more did not fit into its 7.79 GiB; lower --batch-size (8)",
        ),
        ("CUDA error: out of memory", "the memory of the GPU is too small; lower --batch-size (8)"),
        ("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "the memory of the GPU is too small; lower --batch"),
        ("Unable to allocate 3.5 TiB for an array", "the memory of this machine is too small: 3.5 TiB more did not"),
    ],
)
def test_every_way_to_say_that_memory_is_full_is_understood(text, sentence):
    assert devices.out_of_memory(RuntimeError(text), Namespace(batch_size=8, amp="bf16")).startswith(sentence)


def test_other_errors_of_torch_stay_errors(ended):
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        ended(lambda args: torch.zeros(2, 3) @ torch.zeros(2, 3), Namespace())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_too_small_for_a_batch_ends_the_run_and_leaves_nothing_half_written(market_dir, tmp_path, ended):
    """The memory fills up in the second epoch, with a checkpoint there to continue from."""
    places = ["--data-dir", market_dir, "--logs-dir", tmp_path / "logs", "--results-dir", tmp_path / "results"]
    args = train.parse_args([str(word) for word in (*TINY, "--epochs", 2, *places)])
    seed_epoch = runtime.seed_epoch

    def smaller(run, epoch):
        seed_epoch(run, epoch)
        if epoch == 1:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1e-6)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "seed_epoch", smaller)
        try:
            status, said = ended(train.main, args)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert status == [1] and "the memory of the GPU is too small: " in said and "lower --batch-size (16)" in said
    assert not (tmp_path / "results").exists() and not list(tmp_path.rglob("*.tmp"))
    (log,) = tmp_path.rglob("log.jsonl")
    assert checkpoints.read(runfiles.newest(log.parent))["epoch"] == 1 == len(log.read_text().splitlines())
    train.main(train.parse_args([*map(str, (*TINY, "--epochs", 2, *places)), "--resume"]))
    assert list((tmp_path / "results").rglob("seed0.json"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_process_too_many_under_torchrun_ends_all_with_a_sentence(market_dir, tmp_path):
    count = torch.cuda.device_count()
    launcher = [word.replace("nproc_per_node=2", f"nproc_per_node={count + 1}") for word in TORCHRUN]
    words = [*TINY, "--data-dir", market_dir, "--logs-dir", tmp_path / "logs", "--results-dir", tmp_path]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    done = script(ROOT / "aff_scl/train.py", *words, launcher=launcher, CUDA_VISIBLE_DEVICES=visible)
    assert done.returncode == 1 and f"use --nproc_per_node={count}" in done.stderr and not (tmp_path / "logs").exists()
