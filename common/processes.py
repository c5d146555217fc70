"""Several processes under torchrun: order, gathering, broadcasting, the wrapped model. All of it also works with one.

`run` is a runtime.Run; only its rank, world_size, device and args are read.
"""

import contextlib
import datetime
import functools
import inspect
from collections.abc import Callable

import torch
import torch.distributed as dist


def say(run, text: str) -> None:
    """Print on rank 0."""
    if run.main:
        print(text, flush=True)


def barrier(run) -> None:
    if run.world_size > 1:
        dist.barrier()


@contextlib.contextmanager
def rank_zero_first(run):
    """Rank 0 runs the block (writes a cache), then the others do (and find it), however long rank 0 takes."""
    if run.world_size == 1:
        yield
        return
    group = _patient_group()
    if not run.main:
        dist.barrier(group)
    yield
    if run.main:
        dist.barrier(group)


@functools.cache
def _patient_group():
    """All ranks, waiting on the CPU for up to a week: decoding millions of images outlasts the default group's hour."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


def gather(run, tensor: torch.Tensor) -> torch.Tensor:
    """(B, ...) of every rank -> (B * world_size, ...) on every rank, in rank order, no gradient; B must be equal."""
    tensor = tensor.detach().contiguous()
    if run.world_size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(run.world_size)]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def broadcast(run, tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's values in every rank's tensor (mutated and returned)."""
    if run.world_size > 1:
        on_device = tensor.to(run.device)
        dist.broadcast(on_device, 0)
        tensor.copy_(on_device)
    return tensor


def of_rank_zero(run, make: Callable[[], object]):
    """What make() returns on rank 0, on every rank: a plain value, however long rank 0 takes."""
    value = [make() if run.main else None]
    if run.world_size > 1:
        dist.broadcast_object_list(value, 0, group=_patient_group())
    return value[0]


def sync_buffers(run, model: torch.nn.Module) -> None:
    """Give every rank the same buffers, so that all evaluate the same network: the mean over ranks of floating-point
    ones (BatchNorm statistics; equal ones stay to the bit), rank 0's of others.
    """
    if run.world_size == 1:
        return
    for buffer in model.buffers():
        if not buffer.is_floating_point():
            broadcast(run, buffer)
            continue
        parts = gather(run, buffer.to(run.device)[None])
        equal = (parts == parts[0]).all()  # a mean of equal numbers may round
        buffer.copy_(torch.where(equal, parts[0], parts.mean(0)))


class GatherWithGradient(torch.autograd.Function):
    """(B, ...) of every rank -> (W B, ...) in rank order on every rank; the gradients of all ranks are summed.

    With the average that DistributedDataParallel takes, the gradient is that of the mean loss over the global batch.
    """

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may share it with other nodes
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(x: torch.Tensor) -> torch.Tensor:
    """The rows of the global batch on every rank, in rank order and differentiable; x itself without other ranks.

    A loss of the gathered rows that every rank computes alike then has, after DistributedDataParallel's mean over the
    ranks, the gradient that one process would have. B must be equal on all ranks.
    """
    return GatherWithGradient.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


def parallel(run, model: torch.nn.Module) -> torch.nn.Module:
    """The model, in DistributedDataParallel if there are several ranks, compiled if asked. BatchNorm: batchnorm.py.

    Under fp16 the run is told the running statistics, which must not keep a batch that overflows (runtime.step).
    """
    if run.args["amp"] == "fp16":
        norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        running = [buffer for m in norms for buffer in (m.running_mean, m.running_var) if buffer is not None]
        run.statistics = running, [buffer.clone() for buffer in running]
    if run.world_size > 1:
        ids = [run.device.index] if run.device.type == "cuda" else None
        ddp = torch.nn.parallel.DistributedDataParallel
        newer = "forward_sync_buffers" in inspect.signature(ddp).parameters  # broadcast_buffers is going away
        model = ddp(model, device_ids=ids, **{"forward_sync_buffers" if newer else "broadcast_buffers": False})
    return torch.compile(model) if run.args["compile"] else model  # outermost, so that it cuts where DDP reduces
