"""Features of images on disk, and which network they are of: written in blocks, read memory-mapped.

PATH/features.npy holds float32 (N, D), features.jsonl one object a row ({"path", "split"}, and pid and camid where they
are known), features.json what tells these features from others, written last: without it the other two do not count.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.datasets import files
from common.runfiles import TEMPORARY, replace

SCHEMA = 1
ROWS = 8192  # rows of a block: 64 MiB of features of 2,048 numbers
REMEDY = "write it anew with --gallery DIR --export-features PATH"


def names(path: str | Path) -> tuple[Path, Path, Path]:
    """The three files: in the folder `path`, or beside it if it ends in .npy."""
    path = Path(path)
    file = path if path.suffix == ".npy" else path / "features.npy"
    return file, file.with_suffix(".jsonl"), file.with_suffix(".json")


def write(path: str | Path, blocks: Iterable[Tensor], rows: Sequence[dict], made_by: dict, forms: dict) -> None:
    """Write features (N, D) that come in blocks (b, D), and a row's object for each; what was there stays until the
    last block has come.

    Args: rows: N objects with "path" and "split", those of a split together; made_by: `own_images.origin`; forms: split
    -> form.
    Memory: one block. Raises: ValueError for no features, another number of rows, NaN or Inf, with the image; OSError.
    """
    file, lines, about = names(path)
    blocks = iter(blocks)
    first = next(blocks, None)  # before a folder is made
    if first is None:
        raise ValueError(f"{file}: there are no features to write; describe at least one image")
    fresh = not file.parent.is_dir()
    file.parent.mkdir(parents=True, exist_ok=True)
    for torn in file.parent.glob(f"{file.name}.*.tmp"):  # of a writer that was killed
        if TEMPORARY.fullmatch(torn.name):
            torn.unlink(missing_ok=True)
    shape = len(rows), first.shape[1]

    def features(out) -> None:
        np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})
        written = 0
        for block in _chain(first, blocks):
            block = block.float().cpu().numpy()
            if not np.isfinite(block).all():
                row = written + int(np.flatnonzero(~np.isfinite(block).all(1))[0])
                raise ValueError(f"{rows[row]['path']}: the network gives NaN or Inf for it; nothing was written")
            out.write(np.ascontiguousarray(block, "<f4"))
            written += len(block)
        if written != len(rows):
            raise ValueError(f"{written} features for {len(rows)} images")
        out.flush()
        about.unlink(missing_ok=True)  # from here on until the end the three files do not belong together

    try:
        replace(file, features)
    except BaseException:
        if fresh:
            with contextlib.suppress(OSError):
                file.parent.rmdir()
        raise
    replace(lines, lambda out: out.writelines(json.dumps(row).encode() + b"\n" for row in rows))
    splits: dict[str, int] = {}
    for row in rows:
        splits[row["split"]] = splits.get(row["split"], 0) + 1
    told = {**made_by, "dtype": "float32", "rows": shape[0], "columns": shape[1], "splits": splits, "forms": forms}
    replace(about, lambda out: out.write(json.dumps(told, indent=1).encode() + b"\n"))
    print(files.shown(f"features: {file} {shape}, {lines}, {about}"))


def _chain(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest


class Gallery(Sequence):
    """The rows of split "gallery" that `write` wrote: a sequence of their paths, and their features in blocks.

    Memory: eight bytes a row. Raises: FileNotFoundError, ValueError with the path for what is not there, is half
    written or damaged, or was made by another network or form than `made_by` and `form` say.
    """

    def __init__(self, path: str | Path, made_by: dict, form: str, flag: str = "--gallery-features"):
        self.file, self.lines, about = names(path)
        self.name = f"{flag} {self.file} ({REMEDY})"
        if not self.file.is_file():
            raise FileNotFoundError(f"{flag} {path}: there is no {self.file}; {REMEDY}")
        for lacking in (part for part in (self.lines, about) if not part.is_file()):
            raise FileNotFoundError(
                f"{flag} {path}: no {lacking.name}, so {self.file} was not written to its end; {REMEDY}"
            )
        try:
            told = json.loads(about.read_text(encoding="utf-8"))
            rows, self.columns, splits, forms = (told[key] for key in ("rows", "columns", "splits", "forms"))
            self.size, found = splits.get("gallery", 0), {**told, "form": forms.get("gallery")}
            feats = np.load(self.file, mmap_mode="r", allow_pickle=False)
            self.text = np.memmap(self.lines, np.uint8, "r")
        except (ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise ValueError(
                f"{flag} {path}: {self.file} or a file beside it is damaged ({error}); {REMEDY}"
            ) from error
        self.starts = line_starts(self.text)
        self.first = sum(list(splits.values())[: list(splits).index("gallery")]) if self.size else 0  # rows before it
        other = [
            f"{k} {found.get(k)} instead of {v}" for k, v in {**made_by, "form": form}.items() if found.get(k) != v
        ]
        kind = f"{feats.dtype} {feats.shape}"
        wrong = {
            f"it describes no gallery, only {', '.join(splits)}": not self.size,
            f"it is of another network or another form of it: {', '.join(other)}": other,
            f"it holds {kind} instead of float32 {(rows, self.columns)}": kind != f"float32 {(rows, self.columns)}",
            f"{self.lines.name} has {len(self.starts) - 1} lines for {rows} features": len(self.starts) != rows + 1,
        }
        for message in (message for message, holds in wrong.items() if holds):
            remedy = "give the --weights and flags that it was written with, or " if other else ""
            raise ValueError(f"{flag} {path}: {message}; {remedy}{REMEDY}")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} of {self.lines}: its gallery has {self.size}, counted from 0")
        start, stop = self.starts[self.first + index : self.first + index + 2]
        try:
            return json.loads(self.text[start:stop].tobytes())["path"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.name}: line {self.first + index + 1} of {self.lines} is damaged") from error

    def blocks(self, device: torch.device) -> Iterator[Tensor]:
        """The features (b, D) float32 on device, ROWS at a time; the copy to a GPU is not waited for."""
        for start in range(0, self.size, ROWS):
            stop = min(start + ROWS, self.size)
            host = torch.empty(stop - start, self.columns, pin_memory=device.type == "cuda")
            feats = np.load(self.file, mmap_mode="r", allow_pickle=False)  # a map of its own, gone with the block
            host.numpy()[:] = feats[self.first + start : self.first + stop]
            yield host.to(device, non_blocking=True)


def line_starts(text: np.ndarray) -> np.ndarray:
    """(N + 1,) int64: where each of the N lines of some bytes begins, and their end."""
    ends = [
        np.flatnonzero(text[start : start + 2**20] == ord("\n")) + start + 1 for start in range(0, len(text), 2**20)
    ]
    starts = np.concatenate([[0], *ends])
    return starts if starts[-1] == len(text) else np.append(starts, len(text))
