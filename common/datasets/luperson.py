"""LUPerson (Fu et al., Unsupervised Pre-training for Person Re-Identification, CVPR 2021): unlabelled people, 4.18 M.

Either any folder tree of images, or the LMDB of its authors' converter: JPEG bytes under ASCII keys, and keys.pkl
beside it, a list of keys or a dictionary with them. Keys look like CC_cc_VVVV_NNNNNNNN (country, city, video, image):
these are not identities, so pid is the image's own number. All images are `train`.
"""

import functools
import os
import pickle
from pathlib import Path

from common.datasets.base import SUFFIXES, Dataset, Sample, kind_of, remedy

TREES = ("LUPerson", "luperson")
SOURCE = "get LUPerson from the page of its authors (Dengpan Fu) and put the images or the LMDB there"
SEPARATOR = "::"  # between the LMDB and the key in Sample.path


def load(data_dir: str | Path) -> Dataset:
    """All images in train, query and gallery empty. Raises: FileNotFoundError, ValueError for a tree without images."""
    roots = [Path(data_dir) / tree for tree in TREES] + [Path(data_dir)]
    for root in roots:
        lmdbs = sorted(root.glob("*/data.mdb")) + sorted(root.glob("data.mdb")) + sorted(root.glob("*.lmdb"))
        if lmdbs:
            path = lmdbs[0].parent if lmdbs[0].name == "data.mdb" else lmdbs[0]
            files = [f"{path}{SEPARATOR}{key}" for key in lmdb_keys(path)]
            return assemble(root, files)
    for root in roots[:-1]:
        if root.is_dir():
            return assemble(root, folder_images(root))
    raise FileNotFoundError(f"luperson: no folder {' or '.join(map(str, roots[:-1]))}; {remedy('luperson', SOURCE)}")


def assemble(root: Path, files: list[str]) -> Dataset:
    if not files:
        raise ValueError(f"luperson: no images ({', '.join(SUFFIXES)}) under {root}; the download is incomplete")
    return Dataset("luperson", root, kind_of(root), [Sample(file, i, 0) for i, file in enumerate(files)], [], [])


def folder_images(root: Path) -> list[str]:
    """Every image below root, sorted by relative path; hidden folders are left out."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(folder, name) for name in names if name.lower().endswith(SUFFIXES)]
    return sorted(found, key=lambda file: os.path.relpath(file, root).replace(os.sep, "/"))


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
                return sorted(key.decode("ascii") if isinstance(key, bytes) else str(key) for key in keys)
            except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"luperson: {file} is no list of keys ({error})") from error
    with environment(str(path), os.getpid()).begin() as transaction:
        return sorted(key.decode("ascii") for key, _ in transaction.cursor())


@functools.lru_cache(maxsize=4)
def environment(path: str, process: int):
    """The open LMDB, once a process. Raises: ValueError without the package."""
    try:
        import lmdb
    except ImportError as error:
        raise ValueError(
            f"luperson: {path} is an LMDB and the package lmdb is not installed; run pip install lmdb, or "
            "unpack the images into a folder LUPerson/ instead"
        ) from error
    return lmdb.open(path, subdir=os.path.isdir(path), readonly=True, lock=False, readahead=False, meminit=False)


def in_lmdb(path: str) -> bool:
    """Whether a sample's path names a value of an LMDB."""
    return SEPARATOR in path


def read(path: str) -> bytes:
    """The bytes of the image file that an LMDB sample's path names. Raises: ValueError for an unknown key."""
    place, _, key = path.partition(SEPARATOR)
    with environment(place, os.getpid()).begin() as transaction:
        value = transaction.get(key.encode("ascii"))
    if value is None:
        raise ValueError(f"luperson: {place} has no key {key}; keys.pkl does not belong to it")
    return bytes(value)
