"""One pass over the batches of an epoch: the bar, the means of what a loop feeds it, the printed line.

epoch = Epoch(run, number, batches, steps)
for x, labels in epoch:
    loss, parts = ...
    runtime.step(run, loss, [optimizer], grad_scaler, epoch.where)
    epoch.add(len(x), loss=loss, **parts)
return epoch.means(model)
"""

import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from common import log_folder, processes, runtime


class Epoch:
    """Iterates over `batches` once; `where` says epoch and step, for messages; `number` counts from 0, as epochs do."""

    def __init__(self, run: runtime.Run, number: int, batches: Iterable, steps: int):
        self.run, self.number, self.batches, self.steps = run, number, batches, steps
        self.step, self.images, self.began = 0, 0, time.time()
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int | Tensor] = {}  # of steps whose value counts: all but for fp16, where some overflow
        runtime.begin_epoch(run)

    @property
    def where(self) -> str:
        return f"epoch {self.number + 1}, step {self.step}"

    def __iter__(self) -> Iterator:
        quiet = None if self.run.main else True  # None: no bar where there is no terminal
        title = f"epoch {self.number + 1}"
        for batch in tqdm(self.batches, total=self.steps, desc=title, leave=False, disable=quiet):
            self.step += 1
            yield batch

    def add(self, images: int, **values: Tensor) -> None:
        """Count this rank's images of a step and add the step's losses, () tensors by name; waits for no GPU."""
        self.images += images
        for name, value in values.items():
            value, one = value.detach(), 1
            if self.run.skipped is not None:
                one = torch.isfinite(value)
                value = torch.where(one, value, 0)
            self.totals[name] = self.totals.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + one

    def means(self, model: torch.nn.Module, note: str = "", digits: int = 3) -> dict[str, float]:
        """Mean of every value over steps and ranks; prints them. Gives all ranks the same buffers. Collective.

        Under fp16 over the steps where it is finite, left out if there is none, and with the number of steps `skipped`.
        Raises: ValueError after an epoch without a step, which would have trained nothing.
        """
        if self.step == 0:
            raise ValueError(f"epoch {self.number + 1} has no batch; lower --batch-size or raise --iters")
        processes.sync_buffers(self.run, log_folder.bare(model))
        sums = torch.stack([value.float() for value in self.totals.values()])
        counts = torch.stack([torch.as_tensor(count, device=sums.device).float() for count in self.counts.values()])
        sums, counts = processes.gather(self.run, torch.stack([sums, counts])[None]).double().mean(0)
        means = {name: s / n for name, s, n in zip(self.totals, sums.tolist(), counts.tolist()) if n}
        text = ", ".join(f"{name} {value:.{digits}f}" for name, value in means.items())
        if self.run.skipped is not None:
            means["skipped"] = self.run.skipped[0].item()
            text += f", {means['skipped']:.0f} steps skipped (fp16)" * bool(means["skipped"])
        rate = self.images * self.run.world_size / (time.time() - self.began)
        processes.say(self.run, f"epoch {self.number + 1}{f' ({note})' if note else ''}: {text}; {rate:.0f} images/s")
        return means
