"""A function on several gloo ranks, as torchrun would start them, without a start of Python for each: the processes are
forked from one server that has torch loaded.
"""

import multiprocessing
import os
import socket
import tempfile
import traceback
from pathlib import Path

import torch

from common import runtime

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torchvision", "scipy.sparse", "sklearn.cluster", "cv2", "tqdm", "yaml"])


def on_ranks(world_size: int, function, *arguments, timeout: float = 120) -> list:
    """[what function(*arguments) returned on rank 0, on rank 1, ...]: tensors and plain values.

    `function` stands at the top of a module; it finds RANK, WORLD_SIZE and the rest in the environment, as under
    torchrun, so runtime.start inside it joins the group. With world_size 1 there is no group. AssertionError with the
    traceback of the first rank that failed, or of the time-out.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(target=_rank, args=(rank, world_size, port, folder, function, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(timeout)
                files = sorted(Path(folder).glob("error*"))
                assert not files, files[0].read_text()
                assert process.exitcode == 0, f"exit code {process.exitcode} (None: no end within {timeout} s)"
            return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world_size)]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _rank(rank, world_size, port, folder, function, arguments):
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    if world_size > 1:
        os.environ |= {name: str(value) for name, value in {**names, "MASTER_PORT": port}.items()}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    except BaseException:
        (Path(folder) / f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)  # the other ranks wait for this one in vain; the caller ends them
    if torch.distributed.is_initialized():
        runtime.leave()
