"""The card and the versions on this machine, or why there is none."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from common import records

ROOT = Path(__file__).resolve().parents[3]


def main() -> int:
    """Print one line of JSON; without a usable card one sentence, status 1."""
    with warnings.catch_warnings(record=True) as caught:  # an old driver is told in a warning
        warnings.simplefilter("always")
        try:
            if not torch.cuda.is_available():
                raise RuntimeError(absent([str(one.message) for one in caught]))
            torch.ones(2, device="cuda").sum().item()  # a card that this build has no kernels for fails here
        except RuntimeError as error:
            print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
            return 1
    print(json.dumps({"card": card(), "env": environment(), "git": records.git_state(ROOT)}))
    return 0


def absent(warned: list[str]) -> str:
    """Why torch sees no card, and what to do."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        why = f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}, which hides every GPU; unset it"
    elif torch.version.cuda is None:
        why = f"torch {torch.__version__} is built without CUDA; install a CUDA build on a machine with an NVIDIA GPU"
    else:
        told = f" ({warned[0].splitlines()[0]})" if warned else ""
        why = f"torch {torch.__version__} for CUDA {torch.version.cuda} finds no GPU or no driver new enough{told}"
    return f"no CUDA device: {why}"


def card() -> dict:
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "memory_mib": round(found.total_memory / 2**20),
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "cards": torch.cuda.device_count(),
        "driver": driver(),
    }


def driver() -> str | None:
    """Version of the NVIDIA driver, None where its tool is not there."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=20)
    return (done.stdout.split() or [None])[0] if done.returncode == 0 else None


def environment() -> dict:
    return {
        **records.environment(torch.version.cuda, torch.get_num_threads()),
        "cudnn": torch.backends.cudnn.version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
