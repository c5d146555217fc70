"""Decode every image once into a memory-mapped uint8 store, then feed batches of rows to the device.

    images = open_images([s.path for s in data.train], 256, 128)       # decodes on first use, later opens the file
    for pixels, indices in batches(images, identity_batches(...), device):     # uint8 (B, 3, H, W) on the device
        loss = step(augment(pixels, generator), labels[indices])

cache="disk" maps the store and copies rows one batch ahead, "device" holds it whole on the device, "off" decodes each
image anew in loader processes. The three give the same pixels in the same order.
"""

import errno
import functools
import hashlib
import json
import multiprocessing
import os
import struct
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: two processes may then decode the same store, and the last one wins with the same bytes
    fcntl = None

STORE_VERSION = 1  # part of the key: raise it when decoding changes
CACHE_FOLDER = ".reid_cache"
FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
CHUNK = 64  # images a worker decodes at a time


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
    """The images at one size, decoded by PIL and resized with the given filter (bicubic, bilinear, lanczos or nearest).

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
    pixels = open_store(paths, shape, interpolation, cache_dir, workers, name)
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
    """The tensor on device, without waiting for the copy where its memory is pinned."""
    return tensor.to(device, non_blocking=True)


def upload(pixels: np.ndarray, device: torch.device) -> torch.Tensor:
    """The memory map as one tensor on device, copied in slices so that host memory stays small."""
    out = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(pixels), 1024):
        out[start : start + 1024] = torch.from_numpy(np.array(pixels[start : start + 1024]))
    return out


def decode(path: str, channels: int, height: int, width: int, interpolation: str) -> np.ndarray:
    """One image file as uint8 (C, H, W). Raises FileNotFoundError, or ValueError if it cannot be decoded to the last
    row."""
    try:
        with Image.open(path) as image:
            if channels == 3:
                image = image.convert("RGB")
            elif image.mode not in ("P", "L"):
                raise ValueError(f"a label map needs mode P or L, this has {image.mode}")
            if image.size != (width, height):
                image = image.resize((width, height), FILTERS[interpolation])
            pixels = np.asarray(image, dtype=np.uint8)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image; the data set is incomplete") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path}: cannot be decoded ({error}); replace the file, or list all broken ones with "
            f"python -m common.datasets check NAME"
        ) from error
    return pixels.reshape(height, width, channels).transpose(2, 0, 1).copy()


def open_store(
    paths: list[str],
    shape: tuple[int, int, int],
    interpolation: str,
    cache_dir: str | Path | None,
    workers: int,
    name: str,
) -> np.ndarray:
    """Memory map (N, C, H, W) of the store file, written first if it is not there; other processes wait for the
    writer."""
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir(paths)
    stem = name.replace(" ", "-").replace(os.sep, "-")
    file = folder / f"{stem}-{shape[1]}x{shape[2]}-{store_key(paths, shape, interpolation)[:16]}.npy"
    if not file.exists():
        with locked(folder):
            if not file.exists():
                write_store(file, paths, shape, interpolation, workers, name)
    try:
        pixels = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file}: damaged ({error}); delete it, the next run writes it again") from error
    if pixels.shape != (len(paths), *shape) or pixels.dtype != np.uint8:
        raise ValueError(
            f"{file}: holds {pixels.dtype} {pixels.shape}, expected uint8 {(len(paths), *shape)}; "
            f"delete it, the next run writes it again"
        )
    return pixels


def default_cache_dir(paths: list[str]) -> Path:
    """.reid_cache in the folder that all paths share, or in the one above if that holds images of the list itself."""
    parents = {os.path.dirname(os.path.abspath(path)) for path in paths}
    common = os.path.commonpath(sorted(parents))
    return Path(os.path.dirname(common) if common in parents else common) / CACHE_FOLDER


def store_key(paths: list[str], shape: tuple[int, int, int], interpolation: str) -> str:
    """Hex SHA-256 of the file list (relative to its common folder), sizes, times of change, geometry, filter and
    version."""
    full = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in full])
    digest = hashlib.sha256(json.dumps([STORE_VERSION, *shape, interpolation, len(paths)]).encode())
    for path in full:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such image; the data set is incomplete") from None
        digest.update(json.dumps([os.path.relpath(path, common), status.st_size, status.st_mtime_ns]).encode())
    return digest.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the cache folder's lock, which the system releases if this process dies. OSError if the folder is not
    writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "a", encoding="utf-8")
    except OSError as error:
        raise OSError(
            error.errno,
            f"image cache {folder} cannot be written ({error.strerror}); give another folder "
            f"with --cache-dir, or use --cache off",
        ) from error
    with handle:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_store(
    file: Path, paths: list[str], shape: tuple[int, int, int], interpolation: str, workers: int, name: str
) -> None:
    """Decode all images into file: under a temporary name, flushed to disk, then renamed. Removes torn earlier
    attempts."""
    for torn in file.parent.glob(f"{file.name}.*.tmp"):
        torn.unlink()
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    needed = len(paths) * int(np.prod(shape))
    try:
        with open(temporary, "xb") as out:
            np.lib.format.write_array_header_1_0(
                out, {"descr": "|u1", "fortran_order": False, "shape": (len(paths), *shape)}
            )
            out.flush()
            offset = out.tell()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(out.fileno(), offset, needed)  # a full disk shows here, before the work
            decode_all(temporary, offset, paths, shape, interpolation, workers, name)
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"{file}: no space for {needed:,} bytes; free some, give another folder with "
            f"--cache-dir, or use --cache off",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def decode_all(
    file: Path, offset: int, paths: list[str], shape: tuple[int, int, int], interpolation: str, workers: int, name: str
) -> None:
    """Decode chunks of images in processes, each written to its place in the file; the first error stops the rest."""
    size = int(np.prod(shape))
    chunks = [
        (file, offset + start * size, paths[start : start + CHUNK], shape, interpolation)
        for start in range(0, len(paths), CHUNK)
    ]
    with tqdm(total=len(paths), desc=f"decode {name}", unit="img", disable=None) as bar:
        if workers < 2 or len(chunks) < 2:
            for chunk in chunks:
                bar.update(write_chunk(*chunk))
            return
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            try:
                for done in as_completed([pool.submit(write_chunk, *chunk) for chunk in chunks]):
                    bar.update(done.result())
            finally:
                pool.shutdown(cancel_futures=True)


def write_chunk(file: Path, position: int, paths: list[str], shape: tuple[int, int, int], interpolation: str) -> int:
    """Decode some images and write them at a byte position of the file; returns their number."""
    pixels = np.stack([decode(path, *shape, interpolation) for path in paths])
    with open(file, "r+b") as out:
        out.seek(position)
        out.write(pixels)
    return len(paths)
