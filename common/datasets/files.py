"""The images of a folder: one rule for all that list images.

Links to files and folders are followed, each folder is read once. What is not listed is said in one warning: hidden
entries and what desktops, NAS and network drives leave behind (thumbnails, trash, snapshots), files that Pillow cannot
read, links that lead nowhere. Nothing needs to be renamed or removed, so that data may be read-only.
"""

import functools
import heapq
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

CACHE_FOLDER = ".reid_cache"
MARKER = "SYNTHETIC"  # file that common.synthetic writes into the root of a data set
OURS = {CACHE_FOLDER, MARKER}  # left out without a word
SYSTEM = {  # hidden entries, whose names start with a dot, need no mention here
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "$recycle.bin", "system volume information",
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "lost+found", "network trash folder",
    "temporary items",
}  # fmt: skip
UNREAD = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow only names, or gives to other programs
SHOWN = 3  # names of each kind in a warning


class LeftOut(UserWarning):
    """Entries of a folder that are not listed as images."""


@functools.cache
def suffixes() -> tuple[str, ...]:
    """Every file suffix that Pillow can read, in lower case."""
    known = Image.registered_extensions()
    return tuple(sorted(end for end, name in known.items() if name in Image.OPEN and name not in UNREAD))


def is_image(name: str | Path) -> bool:
    """Whether a file's name ends as Pillow's formats do, in any case."""
    return os.path.splitext(name)[1].lower() in suffixes()


def is_leftover(name: str) -> bool:
    """Whether an entry of this name belongs to a system and not to the data."""
    return name.startswith(".") or name.lower() in SYSTEM


def images(
    folders: str | Path | Iterable[str | Path],
    deep: bool = True,
    without: Path | None = None,
    ours: Callable[[str], bool] = lambda path: False,
) -> list[str]:
    """Paths of the images in the folders, folder after folder, each sorted by relative path with slashes.

    deep: search the folders below too; without: a folder not to enter; ours: which images are our own output.
    A folder that can be reached in several ways is read once: as it lies there, or by the first of the links to it.
    Raises: OSError for a folder that cannot be opened.
    """
    folders = [str(folder) for folder in ([folders] if isinstance(folders, (str, Path)) else folders)]
    left: dict[str, list[str]] = {}
    closed = {_identity(without)} if without is not None and Path(without).is_dir() else set()
    found = []
    for folder in folders:
        listed = list(_walk(folder, deep, set(closed), left))
        kept = [path for path in listed if not ours(path)]
        if len(kept) < len(listed):
            left["pictures of earlier results"] = [os.path.basename(p) for p in sorted(set(listed) - set(kept))]
        start = len(os.path.join(folder, ""))
        found += sorted(kept, key=lambda path: path[start:].replace(os.sep, "/"))
    if left:
        place = folders[0] if len(folders) == 1 else os.path.commonpath([os.path.abspath(f) for f in folders])
        said = "; ".join(f"{kind}: {len(names)} ({_examples(names)})" for kind, names in left.items())
        warnings.warn(f"{shown(place)}: left out {said}", LeftOut, stacklevel=2)
    return found


def folders(folder: str | Path) -> list[Path]:
    """The folders in a folder, links to folders included, without leftovers of systems; sorted by name."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not is_leftover(entry.name)]
    return [Path(folder) / name for name in sorted(names)]


def shown(path: str | Path) -> str:
    """A path that can be printed: names that are no UTF-8 read as GBK, or with their bytes as \\x.."""
    name = str(path)
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        raw = os.fsencode(name)
    try:
        return raw.decode("gb18030")
    except UnicodeDecodeError:
        return raw.decode("utf-8", "backslashreplace")


def _walk(folder: str, deep: bool, seen: set, left: dict[str, list[str]]) -> Iterable[str]:
    """Image files below the folder: first of the folders that lie there, then by links to others in order of name."""
    lying, links = [folder], []
    while lying or links:
        linked = not lying
        place = heapq.heappop(links) if linked else lying.pop()
        identity = _identity(place)
        if identity in seen:
            if linked:
                left.setdefault("links to folders that are read already", []).append(os.path.basename(place))
            continue
        seen.add(identity)
        with os.scandir(place) as entries:
            for entry in entries:
                kind = _kind(entry, deep)
                if kind == "image":
                    yield entry.path
                elif kind == "folder":
                    lying.append(entry.path)
                elif kind == "link":
                    heapq.heappush(links, entry.path)
                elif kind:
                    left.setdefault(kind, []).append(entry.name)


def _kind(entry: os.DirEntry, deep: bool) -> str:
    """What an entry is: image, folder, link (to a folder), "" for our own, or the words for what is left out."""
    if entry.name in OURS:
        return ""
    if is_leftover(entry.name):
        return "hidden or system entries"
    if entry.is_dir():
        return ("link" if entry.is_symlink() else "folder") if deep else "folders"
    if is_image(entry.name):
        return "image"
    return "links that lead nowhere" if entry.is_symlink() and not entry.is_file() else "files that are no images"


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _examples(names: list[str]) -> str:
    return ", ".join(map(shown, sorted(names)[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
