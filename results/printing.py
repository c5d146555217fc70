"""How numbers, marks, notes and links read, in the README and on the page alike."""

import os
from pathlib import Path

from results.tables import Cell, Column, Line, Table

DASH = "–"


def numbered(table: Table) -> list[tuple[int, Line]]:
    """Lines with the number of their footnote, 0 for none."""
    notes = [line for line in table.lines if line.note]
    return [(notes.index(line) + 1 if line.note else 0, line) for line in table.lines]


def number_text(cell: Cell | None, column: Column) -> str:
    if cell is None:
        return DASH
    digits = max(column.digits, cell.digits)
    value = f"{cell.value * column.scale:.{digits}f}"
    return value if cell.std is None else f"{value} ± {cell.std * column.scale:.{digits}f}"


def difference_text(paper: Cell | None, ours: Cell | None, column: Column) -> str:
    """Ours minus paper, from the unrounded numbers."""
    if paper is None or ours is None:
        return DASH
    text = f"{(ours.value - paper.value) * column.scale:+.{column.digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def marks(cell: Cell) -> str:
    """What a reader must know about a number of ours."""
    return ("*" if cell.flags else "") + f" (n={cell.n}{', best on test' if cell.best_on_test else ''})"


def notes_of(table: Table) -> list[str]:
    return [f"[{number}] {line.note}" for number, line in numbered(table) if number] + table.notes


def flag_notes(table: Table, size: str) -> list[str]:
    """For each line with an asterisk, the flags in which its runs differ from the row."""
    found = []
    for line in table.lines:
        flags = dict.fromkeys(cell.flags for cell in line.synthetic.get(size, []) if cell and cell.flags)
        found += [f"* {line.name}: {text}" for text in flags]
    return found


def on_synthetic(size: str) -> str:
    """How a heading says that its numbers are not from the real data set; "" for real data."""
    return f": synthetic {size}, not the real data set" if size else ""


def link(base: Path, path: Path) -> str:
    return Path(os.path.relpath(path, base)).as_posix().replace(" ", "%20")
