"""Image stores of this project: LUPerson's LMDB, a seeded subset, corrupted copies for the -C benchmarks."""

import numpy as np
import torch

from common import images, inputs, pixels, processes
from common.datasets import luperson
from dapg.noise import corruptions
from dapg.noise.names import BENCH20


def subset(samples: list, count: int, seed: int) -> list:
    """`count` of the samples in their order, the same for the same seed; all of them for 0.

    Raises: ValueError if there are fewer.
    """
    if count == 0:
        return list(samples)
    if count > len(samples):
        raise ValueError(f"--subset {count}: there are only {len(samples)} images; use at most that, or 0 for all")
    chosen = np.random.default_rng(seed).choice(len(samples), count, replace=False)
    return [samples[i] for i in np.sort(chosen)]


def open_store(run, samples: list, height: int, width: int, name: str, interpolation: str = "bicubic"):
    """The decoded images of the samples; those of an LMDB are decoded for each batch, whatever --cache says."""
    if not luperson.in_lmdb(samples[0].path):
        return inputs.open_images(run, samples, height, width, name, interpolation)
    processes.say(run, "images in an LMDB are decoded batch by batch (--cache off)")
    return LmdbStore([s.path for s in samples], (3, height, width), interpolation, "off", run.device, None)


class LmdbStore(images.ImageStore):
    """Images whose files are values of an LMDB, decoded in the loader's processes."""

    def decode(self, index: int) -> np.ndarray:
        path, size = self.paths[index], (self.channels, self.height, self.width)
        return pixels.decode(path, *size, self.interpolation, luperson.content(path))


class CorruptedStore(images.ImageStore):
    """SYSU-MM01-C and RegDB-C on the fly: each image of a store with one corruption, applied at network size.

    Type uniform over `types`, severity uniform 1..5 (or fixed), both and the noise itself from a generator of
    (seed, repetition, image), so that the result depends on neither workers nor batches nor processes.
    """

    def __init__(
        self,
        store: images.ImageStore,
        repetition: int,
        seed: int = 0,
        types: tuple = BENCH20,
        severity: int = 0,
        index: np.ndarray | None = None,
    ):
        shape = (store.channels, store.height, store.width)
        self.index = np.arange(len(store)) if index is None else index  # images taken, by number
        super().__init__([store.paths[i] for i in self.index], shape, store.interpolation, "off", store.device, None)
        self.key, self.types, self.severity = (seed, repetition), types, severity
        pixels, cpu = store.pixels, torch.device("cpu")
        if isinstance(pixels, torch.Tensor) and pixels.is_cuda:  # taken here: loader processes cannot use the GPU
            pixels = np.zeros((len(store), *shape), np.uint8)  # memory is taken where it is written
            pixels[self.index] = store.pixels[torch.from_numpy(self.index).to(store.device)].cpu()
        self.clean = images.ImageStore(store.paths, shape, store.interpolation, store.cache, cpu, pixels)

    def decode(self, index: int) -> np.ndarray:
        index = int(self.index[index])
        rng = np.random.default_rng(np.random.SeedSequence([*self.key, index]))
        name = self.types[int(rng.integers(len(self.types)))]
        severity = self.severity or int(rng.integers(1, 6))
        pixels = self.clean.host(np.array([index]))[0].permute(1, 2, 0).numpy()
        return np.ascontiguousarray(corruptions.corrupt(pixels, name, severity, rng).transpose(2, 0, 1))
