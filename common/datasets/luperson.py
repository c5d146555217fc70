"""LUPerson (Fu et al., Unsupervised Pre-training for Person Re-Identification, CVPR 2021): unlabelled people, 4.18 M.

Either any folder tree of images, or the LMDB of its authors' converter: JPEG bytes under ASCII keys, and keys.pkl
beside it, a list of keys or a dictionary with them. Keys look like CC_cc_VVVV_NNNNNNNN (country, city, video, image):
these are not identities, so pid is the image's own number. All images are `train`.
"""

import hashlib
import json
import os
import pickle
import threading
import warnings
from pathlib import Path

from common.datasets import files
from common.datasets.base import Dataset, Sample, kind_of, remedy

TREES = ("LUPerson", "luperson")
SOURCE = "get LUPerson from the page of its authors (Dengpan Fu) and put the images or the LMDB there"
SEPARATOR = "::"  # between the LMDB and the key in Sample.path


class Values(Dataset):
    """The images of an LMDB."""

    def digest(self) -> str:
        """Hex SHA-256 over the keys and the sizes of their values, none of which is read; the same wherever it lies."""
        place = self.train[0].path.partition(SEPARATOR)[0]
        with environment(place).begin(buffers=True) as transaction:
            keys = [sample.path.partition(SEPARATOR)[2] for sample in self.train]
            rows = [[key, len(value_of(transaction, place, key))] for key in keys]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def load(data_dir: str | Path) -> Dataset:
    """All images in train, query and gallery empty. Raises: FileNotFoundError, ValueError for a tree without images."""
    roots = [Path(data_dir) / tree for tree in TREES] + [Path(data_dir)]
    for root in roots:
        lmdbs = sorted(root.glob("*/data.mdb")) + sorted(root.glob("data.mdb")) + sorted(root.glob("*.lmdb"))
        if lmdbs:
            path, *others = [file.parent if file.name == "data.mdb" else file for file in lmdbs]
            if others:
                warnings.warn(f"{path} is read and not {', '.join(map(str, others))}", files.LeftOut, stacklevel=2)
            return assemble(Values, root, [f"{path}{SEPARATOR}{key}" for key in lmdb_keys(path)])
    for root in roots[:-1]:
        if root.is_dir():
            return assemble(Dataset, root, files.images(root))
    raise FileNotFoundError(f"luperson: no folder {' or '.join(map(str, roots[:-1]))}; {remedy('luperson', SOURCE)}")


def assemble(kind: type[Dataset], root: Path, paths: list[str]) -> Dataset:
    if not paths:
        raise ValueError(f"luperson: no images under {root}; the download is incomplete")
    return kind("luperson", root, kind_of(root), [Sample(path, i, 0) for i, path in enumerate(paths)], [], [])


class _Plain(pickle.Unpickler):
    """Reads lists, dictionaries, strings and numbers only, so that a file of keys cannot run code."""

    def find_class(self, module, name):
        raise ValueError(f"it holds {module}.{name}, expected a list of keys or a dictionary with them")


def lmdb_keys(path: Path) -> list[str]:
    """Keys of keys.pkl inside or beside the LMDB, sorted; without that file, those of the LMDB itself."""
    for file in (path / "keys.pkl", path.parent / "keys.pkl"):
        if file.is_file():
            try:
                with open(file, "rb") as stream:
                    keys = _Plain(stream).load()
                keys = keys["keys"] if isinstance(keys, dict) else keys
                return sorted(os.fsdecode(key) if isinstance(key, bytes) else str(key) for key in keys)
            except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"luperson: {file} is no list of keys ({error})") from error
    with environment(str(path)).begin() as transaction:
        return sorted(os.fsdecode(key) for key, _ in transaction.cursor())


_opened: dict = {}  # real path -> the LMDB, open in this process
_opening = threading.Lock()


def environment(path: str):
    """The LMDB, opened once a process for all of its threads. Raises: ValueError without the package."""
    try:
        import lmdb
    except ImportError as error:
        raise ValueError(
            f"luperson: {path} is an LMDB and the package lmdb is not installed; run pip install lmdb, or "
            "unpack the images into a folder LUPerson/ instead"
        ) from error
    path = os.path.realpath(path)
    with _opening:
        if path not in _opened:
            try:
                _opened[path] = lmdb.open(
                    path, subdir=os.path.isdir(path), readonly=True, lock=False, readahead=False, meminit=False
                )
            except lmdb.Error as error:
                raise ValueError(f"luperson: {path} cannot be opened as an LMDB ({error}); get it again") from error
        return _opened[path]


def _after_fork() -> None:
    """A forked process may not use its parent's LMDBs, nor open them again while they count as open: close them."""
    global _opening
    _opening = threading.Lock()
    while _opened:
        _opened.popitem()[1].close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def in_lmdb(path: str) -> bool:
    """Whether a sample's path names a value of an LMDB."""
    return SEPARATOR in path


def read(path: str) -> bytes:
    """The bytes of the image file that an LMDB sample's path names. Raises: ValueError for an unknown key."""
    place, _, key = path.partition(SEPARATOR)
    with environment(place).begin() as transaction:
        return value_of(transaction, place, key)


def value_of(transaction, place: str, key: str):
    """A value of the LMDB at `place`. Raises: ValueError for an unknown key."""
    value = transaction.get(os.fsencode(key))
    if value is None:
        raise ValueError(f"luperson: {place} has no key {key}; keys.pkl does not belong to it")
    return value


def content(path: str) -> bytes | None:
    """The bytes of an LMDB sample's image, None for an image that is a file."""
    return read(path) if in_lmdb(path) else None
