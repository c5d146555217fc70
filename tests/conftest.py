"""The one allowed path line for tests, and the shared fixtures."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # repository root first

import numpy as np
import pytest
from miniature import plant
from PIL import Image

from tests import family

PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master-port=0", "--standalone"]


def write_market(root: Path, train_ids: int = 8, test_ids: int = 4, seed: int = 0) -> Path:
    """A miniature of Market-1501's layout under root/market1501: 6 images a person, 2 cameras, coloured stripes."""
    draw = np.random.default_rng(seed)
    base = root / "market1501"
    for pid in range(1, train_ids + test_ids + 1):
        stripes = draw.integers(0, 256, (4, 1, 3))
        for n in range(6):
            camera = n // 3 + 1
            picture = np.repeat(np.repeat(stripes, 16, 0), 32, 1) * (0.8 + 0.2 * camera / 2) + draw.normal(
                0, 12, (64, 32, 3)
            )
            folder = "bounding_box_train" if pid <= train_ids else "query" if n % 3 == 0 else "bounding_box_test"
            (base / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(
                base / folder / f"{pid:04d}_c{camera}s1_{n:06d}_01.jpg", quality=95
            )
    return root


def write_market_and_duke(root: Path) -> Path:
    """The miniature Market-1501 and, in the layout of DukeMTMC-reID, another with other people."""
    write_market(root)
    duke = root / "DukeMTMC-reID"
    (write_market(root / "other", seed=1) / "market1501").rename(duke)
    for file in sorted(duke.rglob("*.jpg")):
        pid, camera, frame, _ = file.stem.split("_")
        file.rename(file.with_name(f"{pid}_{camera[:2]}_f{frame}.jpg"))
    return root


@pytest.fixture(scope="session")
def market_dir(tmp_path_factory) -> Path:
    """A --data-dir with the miniature Market-1501."""
    return write_market(tmp_path_factory.mktemp("data"))


@pytest.fixture()
def root(tmp_path) -> Path:
    """A miniature repository: one project, no results yet."""
    return plant(tmp_path)


TINY = (
    "--weights none --backbone resnet18 --height 64 --width 32 --batch-size 16 --num-instances 4 --k1 6 --iters 2 "
    "--bn-groups 2 --workers 1"
).split()


def script(*command, launcher=PYTHON, cwd=ROOT, timeout=240, **environment) -> subprocess.CompletedProcess:
    """Run one of the repository's scripts in a process of its own, one thread, no network."""
    return subprocess.run(
        [*launcher, *map(str, command)],
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
        env=child_environment(**environment),
    )


def child_environment(**more) -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


PEAK = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
{before}
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
{call}
print(resident("VmHWM") - before, {also})
"""


def peak_mib(before: str, call: str, also: str = "0") -> tuple[float, float]:
    """MiB that a statement takes on top of what the statements before it left, in a Python of its own (Linux), and the
    value of another expression.
    """
    done = script("-c", PEAK.format(root=str(ROOT), before=before, call=call, also=also))
    assert done.returncode == 0, done.stderr
    return tuple(map(float, done.stdout.split()))


def kill_when(command: list, folder: Path, pattern: str) -> None:
    """Start a command and send kill -9 to all its processes as soon as a file below `folder` matches `pattern`."""
    process = subprocess.Popen(
        [str(word) for word in command],
        start_new_session=True,
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.time() + 200
    while not list(folder.glob(pattern)):
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.01)
    family.kill(process.pid)
    process.communicate()
