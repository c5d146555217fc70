"""The image store: same pixels whatever the cache, atomic files, errors that name the path, nothing left running."""

import errno
import gc
import multiprocessing
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import images, locks, store
from common.images import batches, open_images
from common.pixels import FILTERS
from common.store import default_cache_dir


@pytest.fixture
def paths(tmp_path) -> list[str]:
    """150 JPEGs and PNGs of several sizes (three chunks), one of them grey, in folder/train."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "train"
    folder.mkdir()
    out = []
    for index in range(150):
        size = (8 + index % 3, 16 + index % 5)
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        out.append(str(folder / f"{index:04d}.{'png' if index % 7 == 0 else 'jpg'}"))
        Image.fromarray(pixels).convert("L" if index == 5 else "RGB").save(out[-1])
    return out


def reference(path: str, height: int, width: int, interpolation: Image.Resampling) -> np.ndarray:
    """One image as PIL reads and resizes it."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((width, height), interpolation)).transpose(2, 0, 1)


def store_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != ".lock")


@pytest.mark.parametrize("name", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("workers", [1, 2])
def test_pixels_equal_pil(paths, tmp_path, name, workers):
    store = open_images(paths, 32, 16, interpolation=name, cache_dir=tmp_path / "cache", workers=workers)
    got = store.gather(np.arange(150)).numpy()
    expected = np.stack([reference(path, 32, 16, FILTERS[name]) for path in paths])
    assert np.array_equal(got, expected) and got.dtype == np.uint8 and len(store) == 150


@pytest.mark.parametrize("workers", [0, 2])
def test_three_caches_give_the_same_batches_in_the_same_order(paths, tmp_path, workers):
    order = [np.array([3, 3, 149]), np.arange(20, 60), torch.tensor([0]), [7, 5]]
    streams = []
    for cache in ("disk", "device", "off"):
        store = open_images(paths, 32, 16, cache=cache, cache_dir=tmp_path / "cache")
        streams.append(list(batches(store, order, "cpu", workers=workers)))
        assert [len(pixels) for pixels, _ in streams[-1]] == [3, 40, 1, 2]
        for (pixels, indices), (first, _), wanted in zip(streams[-1], streams[0], order):
            assert torch.equal(pixels, first) and torch.equal(pixels, store.gather(wanted))
            assert indices.tolist() == list(map(int, wanted)) and indices.dtype == torch.int64


def test_off_leaves_the_global_random_state_alone(paths):
    store = open_images(paths, 32, 16, cache="off")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(batches(store, [[0, 1], [2]], "cpu", workers=2))
    assert torch.equal(before, torch.get_rng_state())


def test_second_opening_reads_the_file_and_a_changed_image_does_not(paths, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = open_images(paths, 32, 16, cache_dir=cache).gather([4])
    os.utime(paths[4], ns=(1, 1))
    open_images(paths, 32, 16, cache_dir=cache)
    assert len(store_files(cache)) == 2
    for other in (dict(height=16, width=16), dict(height=32, width=16, interpolation="bilinear")):
        open_images(paths, cache_dir=cache, **other)
    open_images(paths[::-1], 32, 16, cache_dir=cache)
    assert len(store_files(cache)) == 5
    monkeypatch.setattr(images, "decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(open_images(paths, 32, 16, cache_dir=cache).gather([4]), first)


def test_store_lies_beside_the_folder_of_images_and_moves_with_the_data(paths, tmp_path, monkeypatch):
    assert default_cache_dir(paths) == tmp_path / ".reid_cache"
    assert default_cache_dir([str(tmp_path / "a/x.jpg"), str(tmp_path / "b/y.jpg")]) == tmp_path / ".reid_cache"
    open_images(paths, 32, 16)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("train", ".reid_cache"):
        (tmp_path / name).rename(moved / name)
    monkeypatch.setattr(images, "decode", lambda *_: pytest.fail("decoded again"))
    open_images([path.replace(str(tmp_path), str(moved)) for path in paths], 32, 16)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("cache", ["disk", "off"])
def test_truncated_image_is_an_error_with_its_path_and_not_a_hang(paths, tmp_path, cache, workers):
    Path(paths[70]).write_bytes(Path(paths[70]).read_bytes()[:200])
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f"^{paths[70]}: cannot be decoded"):
        store = open_images(paths, 32, 16, cache=cache, cache_dir=tmp_path / "cache", workers=workers)
        list(batches(store, [[1, 2], [69, 70], [3]], "cpu", workers=workers - 1))
    assert time.perf_counter() - start < 60
    assert cache == "off" or store_files(tmp_path / "cache") == []


def test_missing_image_is_an_error_with_its_path(paths, tmp_path):
    os.remove(paths[9])
    with pytest.raises(FileNotFoundError, match=paths[9]):
        open_images(paths, 32, 16, cache_dir=tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match=paths[9]):
        open_images(paths, 32, 16, cache="off").gather([9])


def test_torn_temporary_file_is_ignored_and_cleaned(paths, tmp_path):
    cache = tmp_path / "cache"
    expected = open_images(paths, 32, 16, cache_dir=cache).gather([0, 149])
    (file,) = store_files(cache)
    file.rename(file.with_name(f"{file.name}.999999.tmp"))
    file.with_name(f"{file.name}.999999.tmp").write_bytes(b"torn")
    assert torch.equal(open_images(paths, 32, 16, cache_dir=cache).gather([0, 149]), expected)
    assert store_files(cache) == [file]


def test_damaged_store_is_an_error_that_names_the_file(paths, tmp_path):
    open_images(paths, 32, 16, cache_dir=tmp_path / "cache")
    (file,) = store_files(tmp_path / "cache")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"{file}: damaged .*delete it"):
        open_images(paths, 32, 16, cache_dir=tmp_path / "cache")


def test_full_disk_names_path_and_bytes_and_leaves_nothing(paths, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="no space for 230,400 bytes.*--cache-dir") as caught:
        open_images(paths, 32, 16, cache_dir=tmp_path / "cache")
    assert caught.value.errno == errno.ENOSPC and str(tmp_path / "cache") in str(caught.value)
    assert store_files(tmp_path / "cache") == []


def refuse(number):
    """A system call that the file system does not know."""

    def call(*_, **__):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_drive_without_locks_is_worked_on_without_and_another_process_keeps_its_file(
    paths, tmp_path, monkeypatch, number
):
    cache = tmp_path / "cache"
    expected = open_images(paths, 32, 16, cache_dir=cache).gather([0, 149])
    (file,) = store_files(cache)
    theirs = file.with_name(f"{file.name}.4711-0.tmp")
    file.rename(theirs)
    monkeypatch.setattr(locks.fcntl, "flock", refuse(number))
    with pytest.warns(UserWarning, match=f"{cache} cannot be locked .*--cache-dir on a local disk") as said:
        assert torch.equal(open_images(paths, 32, 16, cache_dir=cache).gather([0, 149]), expected)
    assert len(said) == 1 and store_files(cache) == [file, theirs]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_drive_that_cannot_reserve_space_is_written_without(paths, tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "posix_fallocate", refuse(number))
    pixels = open_images(paths, 32, 16, cache_dir=tmp_path / "cache").gather([149])
    assert torch.equal(pixels, open_images(paths, 32, 16, cache="off").gather([149]))


def test_a_drive_that_cannot_map_files_is_read_into_memory(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "memmap", refuse(errno.ENODEV))
    with pytest.warns(UserWarning, match="cache cannot map files .No such device., .*230,528 bytes.*--cache-dir"):
        pixels = open_images(paths, 32, 16, cache_dir=tmp_path / "cache")
    assert torch.equal(pixels.gather([149]), open_images(paths, 32, 16, cache="off").gather([149]))


def test_an_image_of_a_disk_limit_is_named_like_a_full_disk(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.EFBIG))
    with pytest.raises(OSError, match="no space for 230,400 bytes .File too large.*--cache-dir"):
        open_images(paths, 32, 16, cache_dir=tmp_path / "cache")


def test_a_finished_store_is_read_from_a_folder_that_cannot_be_written(paths, tmp_path, monkeypatch):
    first = open_images(paths, 32, 16, cache_dir=tmp_path / "cache").gather([4])
    monkeypatch.setattr(store, "locked", lambda folder: pytest.fail("took the lock"))
    assert torch.equal(open_images(paths, 32, 16, cache_dir=tmp_path / "cache").gather([4]), first)


def test_cache_folder_that_cannot_be_written_names_the_option(paths, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="image cache .*file/cache cannot be written .*--cache-dir"):
        open_images(paths, 32, 16, cache_dir=tmp_path / "file/cache")


def open_in_process(paths: list[str], cache: str, queue) -> None:
    queue.put(int(open_images(paths, 32, 16, cache_dir=cache).gather(np.arange(150)).sum()))


def test_processes_that_open_at_once_write_one_store(paths, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = paths, str(tmp_path / "cache"), queue
    processes = [context.Process(target=open_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    assert len({queue.get(timeout=60) for _ in processes}) == 1
    for process in processes:
        process.join()
    assert len(store_files(tmp_path / "cache")) == 1


def read_ahead_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize("cache", ["disk", "off"])
def test_abandoned_iterator_leaves_no_thread_and_no_process(paths, tmp_path, cache):
    store = open_images(paths, 32, 16, cache=cache, cache_dir=tmp_path / "cache", workers=1)
    stream = batches(store, [[i] for i in range(150)], "cpu", workers=2)
    next(stream)
    assert read_ahead_threads() if cache == "disk" else multiprocessing.active_children()
    del stream
    gc.collect()
    assert not read_ahead_threads() and not multiprocessing.active_children()


def test_errors_of_the_read_ahead_thread_and_of_the_index_stream_reach_the_caller(paths, tmp_path, monkeypatch):
    store = open_images(paths, 32, 16, cache_dir=tmp_path / "cache")
    with pytest.raises(IndexError, match="span 150..150, the store holds 0..149"):
        list(batches(store, [[0], [150]], "cpu"))
    monkeypatch.setattr(store, "host", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(batches(store, [[0], [1]], "cpu"))
    assert not read_ahead_threads()


def test_next_batch_is_read_while_the_caller_works(paths, tmp_path, monkeypatch):
    store = open_images(paths, 32, 16, cache_dir=tmp_path / "cache")
    read, original = [], store.host
    monkeypatch.setattr(store, "host", lambda indices, pin: (read.append(int(indices[0])), original(indices, pin))[1])
    stream = batches(store, [[0], [1], [2]], "cpu")
    next(stream)
    deadline = time.monotonic() + 10
    while len(read) < 2 and time.monotonic() < deadline:
        threading.Event().wait(0.001)
    assert read == [0, 1]


def test_lent_memory_comes_back_with_the_last_view_and_at_most_twice():
    shape = (7, 3, 5, 11)  # of this test alone
    spare = images.spare_buffers(shape, torch.uint8)
    first = images.lend(shape, torch.uint8)
    place, view = first.data_ptr(), first[2:]
    del first
    assert not spare and images.lend(shape, torch.uint8).data_ptr() != place
    del view
    assert place in [buffer.ctypes.data for buffer in spare]
    held = [images.lend(shape, torch.uint8) for _ in range(4)]
    assert len({tensor.data_ptr() for tensor in held}) == 4 and not spare
    del held
    assert len(spare) == 2 and images.lend(shape, torch.float32).dtype == torch.float32


def test_a_batch_still_held_keeps_its_pixels(paths, tmp_path):
    store = open_images(paths, 32, 16, cache_dir=tmp_path / "cache")
    order = np.arange(150).reshape(15, 10)
    kept = [pixels for pixels, _ in batches(store, order, "cpu")]
    assert torch.equal(torch.cat(kept), store.gather(np.arange(150)))


def test_label_maps_keep_their_values(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 18, (20, 10), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.putpalette(list(range(256)) * 3)
    image.save(tmp_path / "mask.png")
    store = open_images([str(tmp_path / "mask.png")], 20, 10, interpolation="nearest", channels=1, cache="off")
    assert np.array_equal(store.gather([0])[0, 0].numpy(), pixels)
    with pytest.raises(ValueError, match="1 channels with bicubic; expected 3, or 1"):
        open_images([str(tmp_path / "mask.png")], 20, 10, channels=1)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(cache="ram"), "cache 'ram' is not one of disk, device, off"),
        (dict(interpolation="area"), "'area' is not one of bicubic"),
        (dict(height=0), "150 images of 0x16"),
        (dict(paths=[]), "0 images of 32x16"),
    ],
)
def test_bad_arguments_are_named(paths, change, words):
    with pytest.raises(ValueError, match=words):
        open_images(**{**dict(paths=paths, height=32, width=16), **change})


def test_no_cache_reads_pickles():
    source = Path(store.__file__).read_text()
    assert "allow_pickle=False" in source and "allow_pickle=True" not in source


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cache", ["disk", "device", "off"])
def test_batches_on_the_gpu_equal_those_on_the_cpu(paths, tmp_path, cache):
    order = [np.arange(30), np.arange(30, 90), np.array([149, 0])]
    store = open_images(paths, 32, 16, cache=cache, cache_dir=tmp_path / "cache", device="cuda")
    host = open_images(paths, 32, 16, cache_dir=tmp_path / "cache")
    for (pixels, indices), wanted in zip(batches(store, order, "cuda"), order):
        assert pixels.is_cuda and not indices.is_cuda and torch.equal(pixels.cpu(), host.gather(wanted))
