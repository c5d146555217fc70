"""Show the results: every paper's tables beside our numbers, sweeps and training curves. The layout is described in
results/tables.py.

    python results/render.py             # print all tables, your runs beside the recorded ones; write runs/index.html
    python results/render.py aff_scl     # the same, but print only this project
    python results/render.py --record    # the recorded ones: update results/README.md, index.html, READMEs, figures
    python results/render.py --check     # change nothing; exit 1 if a page is not what the recorded files give

A README shows tables between `<!-- results -->` and `<!-- /results -->`; `<!-- results table2 figure4 -->` shows some
of them, `<!-- results claims -->` the claims, and `<!-- results aff_scl/table2 -->` those of a project by name. A
number appears only where a result file is, and links to it.
"""

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from common import commandline
from common.flags import RUNS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="results/render.py", description=__doc__.splitlines()[0])
    parser.add_argument("projects", nargs="*", metavar="PROJECT", help="print only these (default: all)")
    parser.add_argument("--record", action="store_true", help="write the pages of the recorded results that git tracks")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if such a page is out of date")
    parser.add_argument("--results-dir", type=Path, help="result files made here (default: runs of the repository)")
    return parser.parse_args(commandline.words(argv))


if __name__ == "__main__":
    parse_args()  # torch and matplotlib are loaded below

from common.runfiles import replace
from results import claims, claims_shown, compare, curves, device, page, schema, tables
from results.printing import (
    DASH,
    difference_text,
    flag_notes,
    link,
    marks,
    notes_of,
    number_text,
    numbered,
    on_synthetic,
)
from results.schema import Refused
from results.tables import HERE, Cell, Column, Project, Table

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- results(?: ([^>]*?))? -->\n).*?(<!-- /results -->)", re.DOTALL)
INTRO = """# Results

Written by `python results/render.py --record` from the result files in this folder; edit nothing here by hand. The same
with curves and pictures on one page for a browser: [index.html](index.html). Runs of your own lie in `runs/`, which git
ignores, and stand beside these in `runs/index.html`, written by `python results/render.py`.

How to read it. *paper*: printed in the paper, for the authors' own runs. *cited*: printed in the paper, for other
methods. *ours*: our runs on the real data set, mean ± sample standard deviation over n seeds; each number links to
its file (n = 1) or folder of files. Runs with other flags than their row's, and runs on real data without the published
counts, such as your own, fill no cell and are listed below. *difference*: ours minus paper, in the column's unit. A
dash means that there is no such number. *best on test* marks a run that reports its best epoch, chosen on the test set,
instead of its last. Runs on rendered people stand under headings of their own (*synthetic small*, *medium*, *full*):
they show that the code learns and in which direction a change acts, and compare with nothing in the paper. An asterisk
marks a synthetic run with other flags than its row's. mAP and Rank-k are per cent.

Claims are those of `<project>/claims.yaml`; their verdicts are computed from the same files by results/claims.py.
`baselines/` holds what some rows give without training, recorded by `results/baselines.py`.

A result file `<project>/<data>/<row>/seed<k>.json` holds `schema`, `project`, `row`, `seed`, `command` and `args`
(how to repeat it), `git` (commit, dirty), `metrics` (retrieval metrics as fractions), `epoch` and `selection` (`last`
or `best_on_test`), `protocol`, `data` (name, kind real or synthetic, counts, digest of the file list; of real data,
whether all that the run read has the published counts, null where none are published), `env`
(versions, GPU, processes, precision), `wall_s` and `peak_mib` (null on Windows, unless of a GPU); beside it
`seed<k>.log.jsonl` is the log, one object an epoch. A file is refused, by name, if its schema is unknown, a field is
missing, its path contradicts its content, a retrieval metric leaves [0, 1], or synthetic and real data are confused;
runs of one row may differ in the seed only. A picture figures/<project>-*.png or .jpg appears on the page under the
caption that a README gives it.
"""


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    args = parse_args(argv)
    try:
        found, folder = [tables.load(root, name) for name in schema.projects(root)], args.results_dir or root / RUNS
        for project in found:
            project.claims = claims.load(root, project)
        unknown = sorted(set(args.projects) - {project.name for project in found})
        if unknown:
            raise Refused(
                f"no project {unknown[0]}; there are {', '.join(project.name for project in found) or 'none'}"
            )
        if args.check:
            return check(root, {**all_pages(root, found), root / "results" / page.NAME: page.html(root, found)})
        if args.record:
            record(root, found)
        else:
            if folder.resolve() == (root / "results").resolve():
                raise Refused(f"{folder} holds the recorded results; --record writes their pages")
            found = [compare.beside(root, project, folder) for project in found]
            write(folder / page.NAME, page.moved(page.html(root, found, pictures=True), root / "results", folder))
        for project in found:
            print("".join(f"warning: {text}\n" for text in project.warnings), end="", file=sys.stderr)
            if project.name in (args.projects or [project.name]):
                print(as_text(project), claims_shown.text(project.claims), sep="\n\n")
        for title, rows in device.tables(device.load(root), lambda record: record["path"].stem):
            print(f"\n{device.TITLE}: {title}\n{_aligned(rows)}")
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def record(root: Path, found: list[Project]) -> None:
    """Draw the figures of the recorded results and write their pages, where these are out of date."""
    pages = all_pages(root, found)
    for project in found:
        curves.draw(project, root / "results" / "figures")
    pages[root / "results" / page.NAME] = page.html(root, found)
    for path in _stale(pages):
        write(path, pages[path] if path.suffix == ".md" else page.html(root, found, pictures=True))


def write(path: Path, text: str) -> None:
    """Write a page in one step, its folder first, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, lambda file: file.write(text.encode()))
    print(f"wrote {os.path.relpath(path)}")


def check(root: Path, pages: dict[Path, str]) -> int:
    """0 if every page on disk is what the result files give, else 1 after naming those that are not."""
    stale = _stale(pages)
    for path in stale:
        print(
            f"{path.relative_to(root)} differs from what the result files give: run python results/render.py --record",
            file=sys.stderr,
        )
    return 1 if stale else 0


def _stale(pages: dict[Path, str]) -> list[Path]:
    """The pages whose text on disk, pictures of index.html left out, is another."""
    return [p for p, text in pages.items() if not p.is_file() or page.comparable(p.read_text("utf-8")) != text]


def all_pages(root: Path, found: list[Project]) -> dict[Path, str]:
    """What every generated or partly generated page should contain."""
    listing = root / "results" / "README.md"
    parts = [INTRO, *filter(None, [claims_shown.summary(found)])]
    for project in found:
        own = [claims_shown.markdown(project.claims, listing.parent), as_markdown(project, listing.parent, root)]
        parts.append(f"## {project.name}\n\n" + "\n".join(filter(None, own)))
    parts.append(device.markdown(root, listing.parent, _markdown))
    pages = {listing: "\n".join(parts).rstrip() + "\n"}
    for readme in [root / "README.md", *(root / project.name / "README.md" for project in found)]:
        if readme.is_file():
            pages[readme] = _filled(readme, root, found)
    return pages


def _filled(readme: Path, root: Path, found: list[Project]) -> str:
    text = readme.read_text(encoding="utf-8")
    if len(re.findall(r"<!-- results\b", text)) != len(BLOCK.findall(text)):
        raise Refused(f"{readme}: a block starts with <!-- results --> on its own line and ends with <!-- /results -->")
    default = [project for project in found if readme.parent in (root, root / project.name)]

    def fill(match: re.Match) -> str:
        names = (match[2] or "claims").split()
        chosen = [_find(readme, name, default, found) for name in names if name != "claims"]
        if not match[2]:
            chosen = [table for project in default for table in project.tables]
        parts = [claims_shown.markdown(project.claims, readme.parent) for project in default if "claims" in names]
        parts += [table_markdown(table, readme.parent, root) for table in chosen]
        return match[1] + "\n" + "\n".join(filter(None, parts)) + match[3]

    return BLOCK.sub(fill, text)


def _find(readme: Path, name: str, default: list[Project], found: list[Project]) -> Table:
    project, _, table = name.rpartition("/")
    for candidate in found if project else default:
        for one in candidate.tables:
            if one.id == table and project in ("", candidate.name):
                return one
    raise Refused(f"{readme}: no table {name} in any tables.yaml")


# ------------------------------------------------------------------------------------------------------------ printing


def rows_of(table: Table, size: str, show) -> list[list[str]]:
    """Header and lines of a table as strings; size "" gives paper and real data, else our numbers on synthetic people
    of that size.

    `show(cell, column)` prints one of our numbers.
    """
    several = len({column.group for column in table.columns}) > 1
    names = [f"{column.group} {column.name}".strip() if several else column.name for column in table.columns]
    sources = [""] if table.columns and not size else []
    out = [[table.sweep or ("Method" if table.columns else ""), *table.settings, *sources, *names]]
    for number, line in numbered(table):
        name = line.name + (f" [{number}]" if number else "")
        ours = line.synthetic.get(size, []) if size else line.real
        if size:
            if any(ours):
                out.append([name, *line.settings, *(show(cell, column) for cell, column in zip(ours, table.columns))])
            continue
        blank = ["", *([""] * len(table.settings))]
        first = [name, *line.settings]
        if not line.own or any(line.paper):
            out.append(
                first
                + ([line.source] if sources else [])
                + [number_text(c, column) for c, column in zip(line.paper, table.columns)]
            )
            first = blank
        if line.own and (any(ours) or line.source != HERE):
            out.append(
                [
                    *first,
                    line.source if line.source == HERE else "ours",
                    *(show(cell, column) for cell, column in zip(ours, table.columns)),
                ]
            )
        if line.own and any(a and b for a, b in zip(line.paper, ours)):
            out.append([*blank, "difference", *map(difference_text, line.paper, ours, table.columns)])
    return out


def others_of(project: Project, target=None) -> list[tuple[str, list[list[str]]]]:
    """Title and lines of the runs that stand in no table, real and each synthetic size apart; `target(result)` makes
    their numbers links.
    """
    found = []
    for size in sorted({result.size for result, _ in project.others}):
        rows = [["Row", "Data", "Seed", "Metrics", "Flags that differ from the row"]]
        for result, flags in project.others:
            if result.size == size:
                text = schema.metrics_text(result.metrics)
                rows.append(
                    [
                        result.row,
                        result.data,
                        str(result.seed),
                        f"[{text}]({target(result)})" if target else text,
                        flags,
                    ]
                )
        found.append((f"Other runs of {project.name}{on_synthetic(size)}", rows))
    return found


def as_markdown(project: Project, base: Path, root: Path) -> str:
    """All tables of a project, its other runs and its training curves, with links relative to `base`."""
    parts = [table_markdown(table, base, root) for table in project.tables]
    for title, rows in others_of(project, lambda result: link(base, result.path)):
        parts.append(f"### {title}\n\n{_markdown(rows)}\n")
    pictures = [(name, root / "results" / "figures" / figure) for name, figure in curves.curve_figures(project)]
    if pictures:
        lines = "\n".join(f"- [{name}]({link(base, path)})" for name, path in pictures)
        parts.append(f"### Training curves of {project.name}\n\n{lines}\n")
    return "\n".join(parts)


def table_markdown(table: Table, base: Path, root: Path) -> str:
    def show(cell: Cell | None, column: Column) -> str:
        if cell is None:
            return DASH
        target = cell.files[0] if cell.n == 1 else cell.files[0].parent
        return f"[{number_text(cell, column)}]({link(base, target)}){marks(cell)}".replace("*", r"\*")

    figures = root / "results" / "figures"
    text = f"### {table.heading}\n"
    if not table.only_synthetic:
        text += f"\n{_markdown(rows_of(table, '', show))}\n" + _picture(table, "", base, figures)
    if notes_of(table):
        text += "\n" + "\n".join(f"- {note}" for note in notes_of(table)) + "\n"
    for size in table.sizes:
        text += f"\n#### {table.heading}{on_synthetic(size)}\n\n{_markdown(rows_of(table, size, show))}\n" + _picture(
            table, size, base, figures
        )
        text += "".join(f"\n\\{note}\n" for note in flag_notes(table, size))
    return text


def _picture(table: Table, size: str, base: Path, figures: Path) -> str:
    names = [curves.sweep_name(table, size)] if table.sweep and curves.sweep_panels(table, size) else []
    names += [curves.epochs_name(table, size)] if curves.epoch_panels(table, size) else []
    return "".join(f"\n![{table.heading}]({link(base, figures / name)})\n" for name in names)


def _markdown(rows: list[list[str]]) -> str:
    header, *lines = [[text.replace("|", "\\|") for text in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *lines])


def as_text(project: Project) -> str:
    """All tables of a project for a terminal."""

    def show(cell: Cell | None, column: Column) -> str:
        return DASH if cell is None else number_text(cell, column) + marks(cell)

    parts = []
    for table in project.tables:
        parts += ["", f"{project.name}: {table.heading}"]
        parts += [] if table.only_synthetic else [_aligned(rows_of(table, "", show))]
        parts += notes_of(table)
        for size in table.sizes:
            parts += [
                "",
                f"{project.name}: {table.heading}{on_synthetic(size)}",
                _aligned(rows_of(table, size, show)),
                *flag_notes(table, size),
            ]
    for title, rows in others_of(project):
        parts += ["", title, _aligned(rows)]
    if project.here:
        lines = [line for _, line in compare.sentences(project.here, project.results)]
        parts += ["", f"Made here: {project.name}", *lines]
    return "\n".join(parts)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


if __name__ == "__main__":
    sys.exit(main())
