"""Lists and other text of data sets, in whatever encoding and line ends they come; another format is named.

Text is UTF-8, UTF-16 or UTF-32 with or without byte order mark, else GB18030, which GBK is a part of. Lines may end
in LF, CRLF or CR, fields be parted by any number of blanks and tabs, and folders by slashes or backslashes.
"""

import codecs
import json
import os
import unicodedata
from pathlib import Path

HEAD = 512  # bytes that tell what a file is
MARKS = (  # UTF-32's mark starts with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SIGNATURES = (
    (b"PK\x03\x04", "a zip archive"), (b"\x1f\x8b", "a gzip archive"), (b"Rar!", "a rar archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-zip archive"), (b"%PDF", "a PDF document"), (b"\x89HDF", "an HDF5 file"),
    (b"MATLAB 7.3", "a MATLAB 7.3 file, which is HDF5"), (b"MATLAB 5.0", "a MATLAB file"),
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file (fetch it with git lfs pull)"),
)  # fmt: skip


def foreign(head: bytes) -> str:
    """What the first bytes of a file say that it is, for an error message; "" if they say nothing."""
    if not head:
        return "an empty file"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<!-- ")):
        return "a web page, so the download ended on one"
    return next((name for signature, name in SIGNATURES if head.startswith(signature)), "")


def text(path: str | Path) -> str:
    """The whole text of a file. Raises: ValueError naming the file if it is of another format or no text."""
    content = Path(path).read_bytes()
    if not content:
        return ""
    kind = foreign(content[:HEAD])
    if kind:
        raise ValueError(f"{path} is {kind}; expected a text file")
    for encoding in [name for mark, name in MARKS if content.startswith(mark)][:1] or guesses(content):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise ValueError(f"{path} is no text in UTF-8, UTF-16 or GBK; save it as UTF-8")


def guesses(content: bytes) -> list[str]:
    """The encodings to try for text without a byte order mark: zero bytes beside ASCII tell UTF-16."""
    if b"\0" not in content:
        return ["utf-8", "gb18030"]
    even, odd = content[::2].count(0), content[1::2].count(0)
    if min(even, odd) or len(content) % 2:
        return []
    return ["utf-16-le" if odd else "utf-16-be"]


def lines(path: str | Path) -> list[tuple[int, str]]:
    """(number from 1, line without blanks around it) of every line that is not empty. Raises: as `text`."""
    return [(n, line.strip()) for n, line in enumerate(text(path).splitlines(), start=1) if line.strip()]


def path_and_label(line: str) -> tuple[str, int] | None:
    """The relative path, with slashes, and the number at the end of a line; None for another line."""
    words = line.rsplit(None, 1)
    if len(words) != 2 or not (words[1].isascii() and words[1].isdigit()):
        return None
    return slashes(words[0]), int(words[1])


def slashes(path: str) -> str:
    """A relative path as written on any system, with slashes and without a leading ./"""
    return path.replace("\\", "/").removeprefix("./")


def place(root: Path, relative: str) -> Path:
    """root/relative; where that name is not ASCII, in the spelling that lies on this disk, if one does.

    Names unpacked elsewhere may be GBK bytes, or have their accents apart from their letters (macOS).
    """
    if relative.isascii():
        return root / relative
    spellings = [relative, *(unicodedata.normalize(form, relative) for form in ("NFC", "NFD"))]
    try:
        spellings.append(os.fsdecode(relative.encode("gb18030")))
    except UnicodeEncodeError:
        pass
    return next((root / name for name in spellings if (root / name).exists()), root / relative)


def read_json(path: str | Path):
    """The content of a JSON file, with or without byte order mark. Raises: ValueError naming the file."""
    content = Path(path).read_bytes()
    kind = foreign(content[:HEAD])
    try:
        return json.loads(content)
    except ValueError as error:  # of the syntax or the encoding
        raise ValueError(f"{path} is not readable as JSON ({kind or error})") from error
