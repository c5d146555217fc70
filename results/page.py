"""results/index.html: all tables, curves and pictures on one page that needs no other file, no network and no script.

Tables come from results/tables.py, curves from the result files and their logs. Pictures are the files
results/figures/<project>-*.png or *.jpg; a caption is the text that the project's README gives the picture
(`![caption](../results/figures/NAME)`), else the file's name. The text of the page is the same on every machine;
pictures are shrunk to fit, and `comparable` leaves their bytes out.
"""

import base64
import hashlib
import io
import os
import re
import statistics
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from common.visualize import Curve
from results import claims_shown, compare, curves, device, schema, svg
from results.printing import DASH, difference_text, flag_notes, link, notes_of, number_text, numbered
from results.schema import Result
from results.tables import HERE, Cell, Column, Line, Project, Table

NAME = "index.html"
PICTURE_BYTES = 2_000_000  # of all pictures together, about
WIDEST = 1100  # pixels
OPEN_RUNS = 6  # training curves of more runs than these are folded away
OWN_DIAGNOSES = {"before", "best", "histogram", "pool", "bn", "assign", "pcb", "G", "trapezoid"}  # no CMC of their own
LEGEND = """<dl class="key">
<dt>paper</dt><dd>printed in the paper, for the authors' own runs</dd>
<dt>cited</dt><dd>printed in the paper, for other methods</dd>
<dt class="ours">ours</dt><dd>our runs on the real data set, mean ± sample standard deviation over n seeds</dd>
<dt>difference</dt><dd>ours minus paper, in the column's unit</dd>
<dt class="synthetic">synthetic</dt><dd>our runs on rendered people: they show that the code learns and in which
direction a change acts, and compare with nothing in the paper; an asterisk marks other flags than the row's</dd>
</dl>
<p>mAP and Rank-k are per cent; a dash means that there is no such number. Each number of ours leads to its result file
(n = 1) or folder of files, and shows its command when pointed at; below each table the commands are listed too.</p>"""


def html(root: Path, found: list[Project], pictures: bool = False) -> str:
    """The page; without `pictures` their bytes are left out, as in comparable(page)."""
    files = _picture_files(root, found)
    area = int(PICTURE_BYTES / max(1, len(files)) * 3)  # a third of a byte a pixel, encoded

    def draw(path: Path) -> str:
        return _picture(path, root, files[path], area, pictures)

    front = [draw(path) for path in files if not _owner(path, found)]
    body = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return body.substitute(
        front=f'<div class="front"><div>{_overview(root, found)}\n{LEGEND}</div>{"".join(front)}</div>',
        nav="\n".join(
            [f'<li><a href="#{p.name}">{escape(_title(root, p))}</a></li>' for p in found]
            + [f'<li><a href="#device">{device.TITLE}</a></li>']
        ),
        main="\n".join(
            [_project(root, p, [draw(path) for path in files if _owner(path, found) == p]) for p in found]
            + [device.html(root)]
        ),
    )


def comparable(text: str) -> str:
    """The page without the bytes of its pictures, which depend on the version of the encoder."""
    return re.sub(r' src="data:[^"]*"', ' src=""', text)


def moved(text: str, old: Path, new: Path) -> str:
    """The page of folder `old` as it reads in folder `new`: its links lead where they led."""
    return re.sub(
        r'(?<= href=")(?!#|[a-z]+:)[^"]+', lambda match: link(new.absolute(), old.absolute() / match[0]), text
    )


def _overview(root: Path, found: list[Project]) -> str:
    """The first table: of each paper its claims by verdict, then its rows; and what a verdict means."""
    lines = []
    for project in found:
        rows = schema.load_rows(root, project.name)
        real = [r for r in project.results if not r.size and r.content["data"]["images"]]  # no mere counts
        sizes = [{r.row for r in runs} for runs in (real, [r for r in project.results if r.size])]
        lines.append(
            f'<tbody><tr><th scope="row"><a href="#{project.name}">{escape(_title(root, project))}</a></th>'
            + "".join(
                f'<td class="number">{number if str(number) not in ("0", DASH) else _dash()}</td>'
                for number in (*claims_shown.counts(project.claims), len(rows), *map(len, sizes))
            )
            + f'<td><a href="{link(root / "results", root / project.name / "README.md")}">README</a></td></tr></tbody>'
        )
    heads = (*claims_shown.COUNT_HEADS[1:], "rows", "run on real data", "on rendered people")
    return (
        '<div class="scroll"><table class="counts"><thead><tr><th>paper</th>'
        + "".join(f'<th class="number">{text}</th>' for text in heads)
        + f"<th></th></tr></thead>{''.join(lines)}</table></div>"
        + (claims_shown.meaning_html() if any(project.claims for project in found) else "")
    )


def _title(root: Path, project: Project) -> str:
    """The first heading of the project's README, else its name."""
    readme = root / project.name / "README.md"
    heading = re.search(r"^# (.+)$", readme.read_text(encoding="utf-8"), re.MULTILINE) if readme.is_file() else None
    return heading[1] if heading else project.name


def _project(root: Path, project: Project, pictures: list[str]) -> str:
    commands = {result.path: result.content["command"] for result in [*project.results, *project.here]}
    sections = [("claims", "Claims of the paper", claims_shown.html(project.claims, root / "results"))]
    sections += [(table.id, table.heading, _table(root, table, commands)) for table in project.tables]
    sections.append(("runs", "Runs outside the tables", _others(root, project)))
    sections.append(("here", "Made here", _here(root, project)))
    sections.append(("cmc", "Matching rate by rank (CMC)", _cmc(project)))
    sections.append(("curves", "Training curves", _training(project)))
    sections.append(("pictures", "Pictures", f'<div class="pictures">{"".join(pictures)}</div>' if pictures else ""))
    sections = [(f"{project.name}-{key}", heading, text) for key, heading, text in sections if text]
    contents = "".join(f'<a href="#{escape(key)}">{escape(heading)}</a>' for key, heading, _ in sections)
    readme = link(root / "results", root / project.name / "README.md")
    return (
        f'<section id="{project.name}">\n<h2>{escape(_title(root, project))}</h2>\n'
        f'<p><a href="{readme}">What it is, and what was found</a> · all its rows: '
        f"<code>python results/reproduce.py {project.name} --list</code></p>\n"
        f'<p class="contents">{contents}</p>\n'
        + "\n".join(f'<h3 id="{escape(key)}">{escape(heading)}</h3>\n{text}' for key, heading, text in sections)
        + "\n</section>"
    )


# -------------------------------------------------------------------------------------------------------------- tables


def _table(root: Path, table: Table, commands: dict[Path, str]) -> str:
    lines = [_line(root, table, number, line, commands) for number, line in numbered(table)]
    notes = [_prose(note) for note in notes_of(table)]
    notes += [f"synthetic {size}, {_prose(note)}" for size in table.sizes for note in flag_notes(table, size)]
    listed = "".join(f"<li>{note}</li>" for note in notes)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.heading)}"><table>\n'
        f"{_head(table)}\n"
        + "\n".join(lines)
        + "\n</table></div>"
        + (f'\n<ul class="notes">{listed}</ul>' if notes else "")
        + _sweeps(table)
        + _commands(root, table, commands)
    )


def _head(table: Table) -> str:
    groups = list(dict.fromkeys(column.group for column in table.columns))
    first = [table.sweep or ("Method" if table.columns else ""), *table.settings, *([""] if table.columns else [])]
    two = len(groups) > 1
    span = ' rowspan="2"' if two else ""
    top = "".join(f"<th{span}>{escape(text)}</th>" for text in first)
    names = "".join(f'<th class="number">{escape(column.name)}</th>' for column in table.columns)
    if not two:
        return f"<thead><tr>{top}{names}</tr></thead>"
    for group in groups:
        count = sum(column.group == group for column in table.columns)
        top += f'<th class="group" colspan="{count}">{escape(group)}</th>'
    return f"<thead><tr>{top}</tr><tr>{names}</tr></thead>"


def _line(root: Path, table: Table, number: int, line: Line, commands: dict[Path, str]) -> str:
    """One printed line: its name over one row each for the paper, ours, the difference and synthetic people."""

    def ours(cells: Iterable[Cell | None]) -> list[str]:
        return [_ours(root, cell, column, commands) for cell, column in zip(cells, table.columns)]

    printed = [
        escape(number_text(cell, column)) if cell else _dash() for cell, column in zip(line.paper, table.columns)
    ]
    rows = []
    synthetic = [size for size in table.sizes if any(line.synthetic.get(size, []))]
    if any(line.paper) or not line.own:
        rows.append(("paper", line.source, printed))
    if line.own and (any(line.paper) or any(line.real) or not synthetic):
        source = line.source if line.source == HERE else "ours"
        rows.append(("ours" if any(line.real) else "missing", source, ours(line.real)))
    if any(a and b for a, b in zip(line.paper, line.real)):
        rows.append(("difference", "difference", list(map(_difference, line.paper, line.real, table.columns))))
    rows += [("synthetic", f"synthetic {size}", ours(line.synthetic[size])) for size in synthetic]
    span = f' rowspan="{len(rows)}"' if len(rows) > 1 else ""
    name = escape(line.name) + (f" <sup>[{number}]</sup>" if number else "")
    name = f'<th scope="row"{span}>{name}</th>' + "".join(f"<td{span}>{_prose(text)}</td>" for text in line.settings)
    out = []
    for kind, source, cells in rows:
        shown = f'<td class="source">{escape(source)}</td>' if table.columns else ""
        cells = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        out.append(f'<tr class="{kind}">{name if not out else ""}{shown}{cells}</tr>')
    return f'<tbody class="{"own" if line.own else "cited"}">' + "".join(out) + "</tbody>"


def _ours(root: Path, cell: Cell | None, column: Column, commands: dict[Path, str]) -> str:
    if cell is None:
        return _dash()
    said = ("*" if cell.flags else "") + f" n={cell.n}" + (", best on test" if cell.best_on_test else "")
    command = escape(commands[cell.files[0]], quote=True)
    return (
        f'<a href="{_target(root, cell)}" title="{command}">{escape(number_text(cell, column))}</a>'
        f'<span class="mark">{said}</span>'
    )


def _target(root: Path, cell: Cell) -> str:
    return link(root / "results", cell.files[0] if cell.n == 1 else cell.files[0].parent)


def _difference(paper: Cell | None, ours: Cell | None, column: Column) -> str:
    text = difference_text(paper, ours, column)
    kind = "up" if text.startswith("+") else "down" if text.startswith("−") else ""
    if text == DASH:
        return _dash()
    return f'<span class="{kind}">{text}</span>' if kind and schema.is_retrieval(column.metric) else text


def _dash() -> str:
    return f'<span class="empty">{DASH}</span>'


def _commands(root: Path, table: Table, commands: dict[Path, str]) -> str:
    """The command of each result file that the table shows, folded away, and the one that fills the table."""
    cells = [cell for line in table.lines for part in (line.real, *line.synthetic.values()) for cell in part if cell]
    files = list(dict.fromkeys(path for cell in cells for path in cell.files))
    items = [
        f'<li><a href="{link(root / "results", path)}">{escape(_row_and_seed(root, path))}</a>: '
        f"<code>{escape(commands[path])}</code></li>"
        for path in files
    ]
    if any(line.own for line in table.lines):
        text = f"python results/reproduce.py {table.project}/{table.id} --data-dir /data"
        items.append(f"<li>all rows of this table: <code>{escape(text)}</code></li>")
    if not items:
        return ""
    count = f"Commands of {len(files)} run{'s' * (len(files) > 1)}" if files else "How to run it"
    return f'\n<details class="commands"><summary>{count}</summary><ul>{"".join(items)}</ul></details>'


def _row_and_seed(root: Path, path: Path) -> str:
    inside = root / "results" if path.is_relative_to(root / "results") else root
    return Path(os.path.relpath(path, inside)).with_suffix("").as_posix()


def _others(root: Path, project: Project) -> str:
    """Results that stand in no table."""
    out = []
    for result, flags in project.others:
        command = escape(result.content["command"], quote=True)
        name = f"{result.row}, {result.data}, seed {result.seed}"
        out.append(
            f'<div class="run{" synthetic" if result.size else ""}">'
            f'<a href="{link(root / "results", result.path)}" title="{command}">{escape(name)}</a>'
            + (f" (differs from the row: {escape(flags)})" if flags else "")
            + f"<br>{escape(schema.metrics_text(result.metrics))}<br><code>{command}</code></div>"
        )
    return "\n".join(out)


def _here(root: Path, project: Project) -> str:
    """Runs made in this checkout, each with its curves beside those of the recorded seeds."""
    out = []
    for run, text in compare.sentences(project.here, project.results):
        logs = {r.seed: curves.read_log(r.log) for r in project.results if (r.row, r.data) == (run.row, run.data)}
        panels = curves.log_panels({**logs, f"{run.seed}, {HERE}": curves.read_log(run.log)})
        out.append(
            f'<div class="run"><a href="{link(root / "results", run.path)}">{escape(text)}</a>'
            f"<br><code>{escape(run.content['command'])}</code></div>" + (_charts(panels, "epoch") if panels else "")
        )
    return "\n".join(out)


def _prose(text: str) -> str:
    """Escaped text with `code` and [links](target) of markdown."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\[([^]]+)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>', text)


# -------------------------------------------------------------------------------------------------------------- curves


def _charts(panels: dict[str, list[Curve]], x_label: str) -> str:
    figures = [
        f"<figure><figcaption>{escape(name)}</figcaption>{svg.chart(lines, x_label, name)}</figure>"
        for name, lines in panels.items()
        if any(len(curve.x) for curve in lines)
    ]
    names = dict.fromkeys((curve.name, curve.paper) for lines in panels.values() for curve in lines)
    order = list(dict.fromkeys(name for name, _ in names))
    legend = ""
    for name, paper in names:
        colour = order.index(name)
        dashed = " dashed" if paper or colour >= svg.COLOURS else ""
        legend += f'<li class="c{colour % svg.COLOURS}{dashed}"><span>{escape(name)}{", paper" * paper}</span></li>'
    return f'<ul class="legend">{legend}</ul><div class="charts">{"".join(figures)}</div>'


def _sweeps(table: Table) -> str:
    """The sweep of a table, and its rows over the epochs."""
    out = ""
    for size in ["", *table.sizes]:
        panels = curves.sweep_panels(table, size) if table.sweep else {}
        for drawn, x_label in ((panels, table.sweep), (curves.epoch_panels(table, size), "epoch")):
            if drawn:
                out += f'\n<h4 class="synthetic-note">synthetic {size}</h4>' if size else ""
                out += _charts(drawn, x_label)
    return out


def _cmc(project: Project) -> str:
    """Rank-k of every row by data set and protocol, means over its seeds, where results hold at least three of them."""
    runs: dict[tuple[str, str], list[Result]] = {}
    for result in project.results:
        runs.setdefault((result.data, result.row), []).append(result)
    panels: dict[str, dict[str, list[Curve]]] = {}
    for (data, row), results in runs.items():
        shared = set.intersection(*(set(result.metrics) for result in results))
        for prefix, ranks in _ranks(shared).items():
            values = [statistics.fmean(r.metrics[f"{prefix}rank{k}"] * 100 for r in results) for k in ranks]
            name = row + (f", mean of {len(results)}" if len(results) > 1 else "")
            panels.setdefault(data, {}).setdefault(f"{prefix}rank-k (%)", []).append(Curve(name, ranks, values))
    return "".join(f"<h4>{escape(data)}</h4>{_charts(charts, 'k')}" for data, charts in sorted(panels.items()))


def _ranks(metrics: Iterable[str]) -> dict[str, list[int]]:
    """Protocol prefix ("" or "cross.") -> its k in ascending order, three at least."""
    found: dict[str, list[int]] = {}
    for name in metrics:
        match = re.fullmatch(r"((?:[^.]+\.)?)rank(\d+)", name)
        if match and match[1].rstrip(".") not in OWN_DIAGNOSES:
            found.setdefault(match[1], []).append(int(match[2]))
    return {prefix: sorted(ranks) for prefix, ranks in sorted(found.items()) if len(ranks) >= 3}


def _training(project: Project) -> str:
    """Losses and metrics by epoch of every logged run that no table draws."""
    logs: dict[tuple[str, str], dict[int, Result]] = {}
    for result in curves.alone(project):
        if result.log.is_file():
            logs.setdefault((result.row, result.data), {})[result.seed] = result
    parts = []
    for (row, data), results in sorted(logs.items()):
        panels = curves.log_panels({seed: curves.read_log(result.log) for seed, result in results.items()})
        if panels:
            parts.append((f"{escape(row)}, {escape(data)}", _charts(panels, "epoch")))
    opened = " open" if len(parts) <= OPEN_RUNS else ""
    return "".join(f"<details{opened}><summary>{name}</summary>{text}</details>" for name, text in parts)


# ------------------------------------------------------------------------------------------------------------ pictures


def _picture_files(root: Path, found: list[Project]) -> dict[Path, str]:
    """Pictures that are no drawing of tables or logs -> caption; those of no project first."""
    folder = root / "results" / "figures"
    drawn = {name for project in found for _, name in curves.curve_figures(project)}
    for table in (table for project in found for table in project.tables):
        for size in ["", *table.sizes]:
            drawn |= {curves.sweep_name(table, size)} if table.sweep else set()
            drawn |= {curves.epochs_name(table, size)} if table.by_epoch else set()
    files = sorted(path for path in folder.glob("*") if path.suffix in (".png", ".jpg") and path.name not in drawn)
    pages = [root / "README.md", *(root / project.name / "README.md" for project in found)]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages if page.is_file())
    shown = re.findall(r"!\[([^]]*)\]\([^)\s]*results/figures/([^)\s]+)\)", text)
    captions = {name: caption for caption, name in shown}
    return {path: captions.get(path.name) or _name(path, found) for path in files}


def _owner(path: Path, found: list[Project]) -> Project | None:
    return next((project for project in found if path.name.startswith(f"{project.name}-")), None)


def _name(path: Path, found: list[Project]) -> str:
    """The words of a file name, without the project's."""
    owner = _owner(path, found)
    return re.sub(r"[-_]+", " ", path.stem.removeprefix(f"{owner.name}-" if owner else ""))


def _picture(path: Path, root: Path, caption: str, area: int, embed: bool) -> str:
    """A figure at most `area` pixels large that leads to the whole picture."""
    with Image.open(path) as image:
        factor = min(1.0, WIDEST / image.width, (area / (image.width * image.height)) ** 0.5)
        size = max(1, int(image.width * factor)), max(1, int(image.height * factor))
        source = _data_uri(image, size) if embed else ""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    text = escape(caption, quote=True)
    return (
        f'<figure><a href="{link(root / "results", path)}"><img src="{source}" width="{size[0]}" height="{size[1]}" '
        f'data-digest="{digest}" alt="{text}"></a><figcaption>{_prose(caption)}</figcaption></figure>'
    )


def _data_uri(image: Image.Image, size: tuple[int, int]) -> str:
    out = io.BytesIO()
    sheet = Image.new("RGB", image.size, "white")
    sheet.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
    sheet.resize(size, Image.Resampling.LANCZOS).save(out, "jpeg", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
