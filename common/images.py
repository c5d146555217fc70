"""Decode every image once into a memory-mapped uint8 store, then feed batches of rows to the device.

    images = open_images([s.path for s in data.train], 256, 128)       # decodes on first use, later opens the file
    for pixels, indices in batches(images, identity_batches(...), device):     # uint8 (B, 3, H, W) on the device
        loss = step(augment(pixels, generator), labels[indices])

cache="disk" maps the store and copies rows one batch ahead, "device" holds it whole on the device, "off" decodes each
image anew in loader processes. The three give the same pixels in the same order.
"""

import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from common import store
from common.pixels import FILTERS, decode


class ImageStore:
    """Images of one size, addressed by index; made by open_images."""

    def __init__(
        self,
        paths: Sequence[str],
        shape: tuple[int, int, int],
        interpolation: str,
        cache: str,
        device: torch.device,
        pixels: np.ndarray | torch.Tensor | None,
    ):
        self.paths, self.interpolation, self.cache, self.device = list(paths), interpolation, cache, device
        self.channels, self.height, self.width = shape
        self.pixels = pixels  # (N, C, H, W): memory map or array; tensor on a GPU; None if "off"

    def __len__(self) -> int:
        return len(self.paths)

    def gather(self, indices: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Images of the given indices, uint8 (B, C, H, W) on the store's device. Raises IndexError outside 0..N-1."""
        indices = self.checked(indices)
        if isinstance(self.pixels, torch.Tensor):
            return self.pixels.index_select(0, to_device(torch.from_numpy(indices), self.device))
        return to_device(self.host(indices, pin=self.device.type == "cuda"), self.device)

    def checked(self, indices: torch.Tensor | np.ndarray) -> np.ndarray:
        """The indices as an int64 array (B,), all in 0..N-1."""
        array = indices.cpu().numpy() if isinstance(indices, torch.Tensor) else np.asarray(indices)
        array = array.astype(np.int64, copy=False).reshape(-1)
        if len(array) and (array.min() < 0 or array.max() >= len(self)):
            raise IndexError(f"image indices span {array.min()}..{array.max()}, the store holds 0..{len(self) - 1}")
        return array

    def host(self, indices: np.ndarray, pin: bool = False) -> torch.Tensor:
        """Images of checked indices in host memory, uint8 (B, C, H, W); pinned for an asynchronous copy if asked."""
        shape = (len(indices), self.channels, self.height, self.width)
        out = torch.empty(shape, dtype=torch.uint8, pin_memory=True) if pin else lend(shape, torch.uint8)
        if self.pixels is None:
            for row, index in enumerate(indices):
                out[row] = torch.from_numpy(self.decode(index))
        else:
            np.take(self.pixels, indices, axis=0, out=out.numpy(), mode="clip")  # clip: no buffered copy
        return out

    def decode(self, index: int) -> np.ndarray:
        """One image decoded from its file, uint8 (C, H, W)."""
        return decode(self.paths[index], self.channels, self.height, self.width, self.interpolation)


def open_images(
    paths: Sequence[str],
    height: int,
    width: int,
    *,
    interpolation: str = "bicubic",
    cache: str = "disk",
    cache_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
    workers: int = 2,
    name: str = "images",
    channels: int = 3,
) -> ImageStore:
    """The images at one size, decoded by the rule of common.pixels and resized with the given filter (bicubic,
    bilinear, lanczos or nearest).

    cache: "disk" (memory map), "device" (the whole store on device) or "off" (decode at every use). cache_dir: folder
    of the store files, by default .reid_cache beside the folder of the images. channels=1 reads label maps: palette
    or grey values as they are, with interpolation "nearest" only. Disk space and, for "device", device memory: N *
    channels * H * W bytes.

    Raises: ValueError for bad arguments or an image that cannot be decoded, with its path; FileNotFoundError for a
    missing image; OSError for a cache folder that cannot be written or a full disk, with the path and the bytes
    needed.
    """
    if cache not in ("disk", "device", "off"):
        raise ValueError(f"cache {cache!r} is not one of disk, device, off")
    if interpolation not in FILTERS:
        raise ValueError(f"interpolation {interpolation!r} is not one of {', '.join(FILTERS)}")
    if channels not in (1, 3) or (channels == 1 and interpolation != "nearest"):
        raise ValueError(f"{channels} channels with {interpolation}; expected 3, or 1 (labels) with nearest")
    if len(paths) == 0 or height < 1 or width < 1:
        raise ValueError(f"{name}: {len(paths)} images of {height}x{width}, expected at least one of at least 1x1")
    paths, shape, device = [str(path) for path in paths], (channels, height, width), torch.device(device)
    if cache == "off":
        return ImageStore(paths, shape, interpolation, cache, device, None)
    decoded = functools.partial(decode, channels=channels, height=height, width=width, interpolation=interpolation)
    file = store.place(paths, shape, interpolation, cache_dir, name)
    pixels = store.open_rows(file, store.Rows(decoded, paths, shape, f"decode {name}", workers))
    if cache == "device":
        pixels = np.array(pixels) if device.type == "cpu" else upload(pixels, device)
    return ImageStore(paths, shape, interpolation, cache, device, pixels)


def batches(
    images: ImageStore, index_batches: Iterable[Sequence[int]], device: str | torch.device, *, workers: int = 2
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each index batch in order: (uint8 (B, C, H, W) on device, indices (B,) int64 on the CPU), one batch read
    ahead.

    workers is the number of decoding processes with cache="off". Errors of the thread or the processes are raised
    here; a generator that is left or closed early stops them.
    """
    device = torch.device(device)
    checked = (images.checked(indices) for indices in index_batches)
    if isinstance(images.pixels, torch.Tensor):
        for indices in checked:
            yield to_device(images.gather(indices), device), torch.from_numpy(indices)
    else:
        if images.cache == "off":
            stream = loaded(images, checked, workers, device)
        else:
            stream = read_ahead(images, checked, device)
        for pixels, indices in stream:
            yield to_device(pixels, device), torch.from_numpy(indices)


def read_ahead(
    images: ImageStore, index_batches: Iterator[np.ndarray], device: torch.device
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Host batches, the next of which a thread copies while the caller uses this one."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as pool:
        waiting = None
        for indices in index_batches:
            coming = pool.submit(images.host, indices, device.type == "cuda"), indices
            if waiting is not None:
                yield waiting[0].result(), waiting[1]
            waiting = coming
        if waiting is not None:
            yield waiting[0].result(), waiting[1]


def loaded(
    images: ImageStore, index_batches: Iterator[np.ndarray], workers: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Host batches decoded image by image in loader processes that live for this iteration only."""
    loader = DataLoader(
        Decoded(images),
        batch_sampler=index_batches,
        num_workers=workers,
        collate_fn=stack,
        generator=torch.Generator().manual_seed(0),  # nothing random; leaves the global generator alone
        pin_memory=device.type == "cuda",
        persistent_workers=False,
    )
    for pixels, indices in loader:
        if isinstance(pixels, Exception):
            raise pixels
        yield pixels, indices.numpy()


class Decoded(torch.utils.data.Dataset):
    """The store as a map from index to (image, index), for loader processes."""

    def __init__(self, images: ImageStore):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray | Exception, int]:
        try:
            return self.images.decode(index), int(index)
        except (ValueError, FileNotFoundError) as error:
            return error, int(index)  # raised by the caller's process, so that the loader ends in order


def stack(items: list[tuple[np.ndarray | Exception, int]]) -> tuple[torch.Tensor | Exception, torch.Tensor]:
    """Batch of (image, index) pairs: uint8 (B, C, H, W), or the first error among the images; int64 (B,)."""
    indices = torch.tensor([index for _, index in items])
    for pixels, _ in items:
        if isinstance(pixels, Exception):
            return pixels, indices
    return torch.from_numpy(np.stack([pixels for pixels, _ in items])), indices


def lend(shape: Sequence[int], dtype: torch.dtype, device: torch.device = torch.device("cpu")) -> torch.Tensor:
    """Tensor of the shape with unknown content. On the CPU, where the system clears fresh memory, which takes as long
    as writing it, in the memory of an earlier one of that shape of which no tensor or view is left, if there is one."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    spare = spare_buffers(tuple(shape), dtype)
    try:
        buffer = spare.pop()
    except IndexError:
        buffer = np.empty(shape, dtype=torch.empty(0, dtype=dtype).numpy().dtype)
    view = buffer.view()  # lives exactly as long as the storage of the tensor below
    weakref.finalize(view, give_back, spare, buffer).atexit = False
    return torch.from_numpy(view)


@functools.lru_cache(maxsize=8)
def spare_buffers(shape: tuple, dtype: torch.dtype) -> list[np.ndarray]:
    """The buffers of this kind that are not lent; forgotten when eight other kinds were asked for since."""
    return []


def give_back(spare: list[np.ndarray], buffer: np.ndarray) -> None:
    """Keep the buffer unless two of its kind are kept: one is filled while the caller still holds another."""
    if len(spare) < 2:
        spare.append(buffer)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on device; the host does not wait for the copy, for which its memory is pinned if it is not."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def upload(pixels: np.ndarray, device: torch.device) -> torch.Tensor:
    """The memory map as one tensor on device, copied in slices so that host memory stays small."""
    out = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(pixels), 1024):
        out[start : start + 1024] = torch.from_numpy(np.array(pixels[start : start + 1024]))
    return out
