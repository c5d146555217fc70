"""The device of a process, and one sentence for each way in which a GPU can be out of reach or too small."""

import os
import re
import warnings
from argparse import Namespace

import torch

ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+ \w+)", re.IGNORECASE)  # PyTorch on both devices, NumPy
WHOLE = re.compile(r"total capacity of ([\d.]+ \w+)")
FULL = ("out of memory", "can't allocate memory", "unable to allocate", "alloc_failed")  # also of cuDNN and cuBLAS


def choose(local: int = 0, here: int = 1) -> torch.device:
    """The GPU of process `local` of the `here` on this machine; the CPU where there is no GPU, or the user hides it.

    Raises: ValueError for a GPU that cannot be used (a driver older than torch's build), a CUDA_VISIBLE_DEVICES that
        names none, and more processes than GPUs.
    """
    if hidden():
        return torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is_available has to say stands in the error below
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count >= here:
        return torch.device("cuda", local)
    if count:
        raise ValueError(
            f"{here} processes were started on a machine with {count} GPU(s) for them; use --nproc_per_node={count}"
        )
    if reason := _out_of_reach():
        raise ValueError(f"{reason}; to compute on the CPU hide the GPUs with CUDA_VISIBLE_DEVICES=-1")
    return torch.device("cpu")


def hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES is set and names no GPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")  # the last is Slurm's


def _out_of_reach() -> str | None:
    """Why a GPU that is there, or was named, cannot be used; None where there is none."""
    try:
        torch.cuda.init()
    except AssertionError:  # a build of torch without CUDA
        return None
    except RuntimeError as error:
        said = str(error).strip().partition(". ")[0]
        if "no NVIDIA driver" in said:
            return None
        if "No CUDA GPUs" not in said:
            built = f"torch {torch.__version__} was built for CUDA {torch.version.cuda}"
            return f"the GPU cannot be used: {said}; {built}: update the driver, or install torch for its CUDA"
        if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
            return f"CUDA_VISIBLE_DEVICES={named} names no GPU of this machine"
    return None


def described(device: torch.device) -> str:
    """The kind of device for a line of the log, and why it is no GPU where the user decided that."""
    return "cpu (CUDA_VISIBLE_DEVICES hides all GPUs)" if device.type == "cpu" and hidden() else device.type


def out_of_memory(error: Exception, args: Namespace) -> str | None:
    """One sentence for an error that says that memory was full: what was asked for, and which flags lower it."""
    said = str(error)
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(word in said.lower() for word in FULL):
        return None
    asked, whole = ASKED.search(said), WHOLE.search(said)
    gpu = isinstance(error, torch.OutOfMemoryError) or "CU" in said  # CUDA, CUDNN, CUBLAS
    text = f"the memory of {'the GPU' if gpu else 'this machine'} is too small"
    text += f": {_size(asked[1])} more did not fit" if asked else ""
    text += f" into its {whole[1]}" if whole else ""
    return f"{text}; {_smaller(args)}"


def _size(words: str) -> str:
    number, unit = words.split()
    return f"{float(number) / 2**30:.2f} GiB" if unit == "bytes" else words


def _smaller(args: Namespace) -> str:
    """The flags of this command that lower its memory, with their values."""
    given, lower, use = vars(args), [], []
    if given.get("batch_size"):
        lower.append(f"--batch-size ({given['batch_size']})")
    if given.get("height"):
        lower.append(f"--height and --width ({given['height']} x {given['width']})")
    use += ["--amp bf16"] if given.get("amp") == "off" else []
    use += ["--cache disk"] if given.get("cache") == "device" else []
    ways = [f"lower {' or '.join(lower)}"] * bool(lower) + [f"use {' and '.join(use)}"] * bool(use)
    return ", or ".join(ways) or "free some, or take a larger one"
