"""The tables and sweeps of a paper as data: tables.yaml + experiments.yaml + result files -> Table, Line, Cell.

tables.yaml: table or figure id -> mapping, in the order of the page. Values are in the units of result files:
retrieval metrics are fractions.

    table2:
      title: "Fully unsupervised ReID"                    # without "Table 2", which comes from the id
      settings: [lambda1, lambda2]                        # optional headings of text columns after the name
      columns: {Market-1501: [mAP, rank1], DukeMTMC-reID: [mAP, rank1]}        # group -> metrics, as printed
      lines:                                              # each is cited, or rows, or settings only
        - {name: SSL, year: 2020, cited: {Market-1501: [0.378, 0.717], DukeMTMC-reID: [0.286, null]}}
        - {name: AFF_SCL, settings: ["0.75", "0.25"], rows: {Market-1501: table2/market}, note: "a footnote"}
      notes: ["what is misprinted"]
    figure4:                                              # a sweep: a table with one line per x, and a picture
      title: "Effect of eps"
      x: eps
      metrics: [mAP, rank1]
      curves: [{name: Market-1501, points: {0.55: figure4/market/eps=0.55, 0.65: table2/market}}]

`rows: NAME` fills every group from one row; `cited: [..]` serves a table of one group; `source` replaces the word
"cited". A metric is a key of a result's `metrics`, or {metric: KEY, name: HEADING, scale: FACTOR, digits: N}, with
optional: true where some rows may lack it. The paper's own numbers stand in experiments.yaml (`paper:`) and nowhere
else. `by_epoch: [mAP]` draws these metrics of the logs over the epochs in one picture, a line a row, in the place of a
picture a row. Where a column says no digits, cited and the paper's numbers are shown with the decimals that stand in
the file, at least the usual ones: 0.5400 is the 54.00 that the paper prints.
"""

import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from results.schema import Refused, Result, foreign_flags, is_retrieval, load_rows, other_data, read_all

PLAIN = {
    "params_m": ("Params (M)", 1, 2),
    "flops_g": ("FLOPs (G)", 1, 2),
    "macs_g": ("MACs (G)", 1, 2),
    "memory_mb": ("Memory (MB)", 1, 2),
    "params": ("Params (M)", 1e-6, 2),
    "flops": ("FLOPs (G)", 1e-9, 2),
}  # metric -> heading, scale, decimals
TABLE_KEYS = {"title", "settings", "columns", "lines", "notes", "by_epoch"}
SWEEP_KEYS = {"title", "x", "metrics", "curves", "notes", "by_epoch"}
LINE_KEYS = {"name", "year", "settings", "cited", "rows", "source", "note"}
FEWEST = 3  # seeds that make a spread
HERE = "made here"  # source of a line with runs of this checkout (results/compare.py)


@dataclass(frozen=True)
class Column:
    """A printed column: shown value = stored value * scale, with `digits` decimals."""

    group: str
    metric: str
    name: str
    scale: float
    digits: int
    optional: bool = False  # rows without it are no mistake
    fixed: bool = False  # no number has more decimals


@dataclass(frozen=True)
class Cell:
    """A number in stored units: the mean over `n` seeds and its sample standard deviation (None for n < 2), and the
    files it comes from.
    """

    value: float
    std: float | None = None
    n: int = 0
    best_on_test: bool = False
    files: tuple[Path, ...] = ()
    flags: str = ""  # method flags that differ from the row's: synthetic runs only
    digits: int = 0  # decimals that are shown at least, whatever the column's


class Printed(float):
    """A number of a YAML file that knows its decimals: 4 for 0.5400, -4 for 88.00e+6."""

    decimals: int


class PrintedLoader(yaml.SafeLoader):
    """Reads every float of a file as Printed."""

    def printed(self, node):
        value = Printed(self.construct_yaml_float(node))
        mantissa, _, exponent = node.value.lower().partition("e")
        value.decimals = len(mantissa.partition(".")[2]) - int(exponent or 0)
        return value


PrintedLoader.add_constructor("tag:yaml.org,2002:float", PrintedLoader.printed)


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file, {} without one, its floats Printed."""
    return yaml.load(path.read_text(encoding="utf-8"), PrintedLoader) or {} if path.is_file() else {}


@dataclass
class Line:
    """A printed line. `paper` holds cited numbers or the paper's own; `real` and `synthetic[size]` hold ours, None
    where no file is.
    """

    name: str
    settings: list[str]
    source: str  # "cited", "paper", ..., "" for text only
    own: bool
    paper: list[Cell | None]
    real: list[Cell | None]
    synthetic: dict[str, list[Cell | None]]
    note: str = ""


@dataclass
class Table:
    project: str
    id: str
    title: str
    settings: list[str]
    columns: list[Column]
    lines: list[Line]
    notes: list[str] = field(default_factory=list)
    sweep: str = ""  # the x axis, for a table that is also drawn
    by_epoch: list[str] = field(default_factory=list)  # keys of the logs of these runs, drawn a line a row
    runs: dict[str, list[Result]] = field(default_factory=dict)  # by the name of their line

    @property
    def heading(self) -> str:
        """`Table 2. Fully unsupervised ReID` from the id table2, `Table 2 on rendered people. ...` from table2-cpu; a
        single group joins the title, so that columns need not repeat it.
        """
        label = re.sub(r"^([a-z]+)(\d+)", lambda match: f"{match[1].capitalize()} {match[2]}", self.id)
        label = re.sub(r"-cpu$", " on rendered people", label)
        groups = {column.group for column in self.columns} - {""}
        return f"{label}. {self.title}" + (f" ({groups.pop()})" if len(groups) == 1 else "")

    @property
    def sizes(self) -> list[str]:
        """Synthetic sizes with at least one number here."""
        found = {size for line in self.lines for size, cells in line.synthetic.items() if any(cells)}
        return sorted(found, reverse=True)

    @property
    def only_synthetic(self) -> bool:
        """Nothing is known but numbers on synthetic people: a table of paper and real data would hold dashes alone."""
        return bool(self.sizes) and not any(not line.own or any(line.paper) or any(line.real) for line in self.lines)


@dataclass
class Project:
    """All that is shown of a project. `others` are results that stand in no table: (result, flags that differ from
    the row, and data that differ from the paper's); `warnings` name files without a metric that a table shows.
    """

    name: str
    tables: list[Table]
    results: list[Result]
    others: list[tuple[Result, str]]
    warnings: list[str]
    here: list[Result] = field(default_factory=list)  # made in this checkout, never in a mean with recorded ones
    claims: list = field(default_factory=list)


def load(root: Path, project: str, results_dir: Path | None = None) -> Project:
    """Everything that is shown of a project. Raises: Refused for results, rows or tables that break a rule."""
    rows, results = load_rows(root, project), read_all(root, project, results_dir)
    departs = {r.path: foreign_flags(r, root, rows[r.row]) if r.row in rows else "" for r in results}
    apart = {r.path: ", ".join(filter(None, [departs[r.path], other_data(r)])) for r in results}
    usable: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.row in rows and (result.size or not apart[result.path]):  # real data set apart fill no cell
            usable.setdefault((result.row, result.size), []).append(result)
    for found in usable.values():
        _check_alike(found, {departs[r.path] for r in found})
    path = Path(root) / project / "tables.yaml"
    layout, rows = read_yaml(path), read_yaml(path.with_name("experiments.yaml"))
    tables, shown, warnings = [], set(), []
    for name, spec in layout.items():
        where = f"{path}: {name}"
        check_keys(
            spec,
            SWEEP_KEYS if "curves" in spec else TABLE_KEYS,
            where,
            required=("title", *(("x", "metrics") if "curves" in spec else ())),
        )
        tables.append(_table(where, project, name, spec, rows, usable, departs))
        shown |= shown_rows(spec)
        warnings += _missing(name, spec, tables[-1], usable)
    others = [(r, apart[r.path]) for r in results if r.row not in shown or (apart[r.path] and not r.size)]
    return Project(project, tables, results, others, warnings)


def _missing(name: str, spec: dict, table: Table, usable: dict) -> list[str]:
    """One sentence per result file that lacks a metric which the table shows of its row."""
    found = []
    for line in _lines(spec):
        by_group = line.get("rows", {})
        for column in table.columns:
            row = by_group if isinstance(by_group, str) else by_group.get(column.group)
            found += [
                f"{result.path} has no metric {column.metric}, which {name} shows"
                for (used, _), results in usable.items()
                if used == row
                for result in results
                if column.metric not in result.metrics and not column.optional
            ]
    return found


def _check_alike(results: list[Result], flags: set[str]) -> None:
    """Refuse a mean over runs that differ in more than the seed, or in the split that goes with it (RegDB has ten)."""

    first = results[0]
    for other in results[1:]:
        if what := unlike(first, other):
            raise Refused(
                f"{other.path}: its {what} is not that of {first.path}; runs of one row may differ in the seed only"
            )
    if len(flags) > 1:
        raise Refused(f"{first.path.parent}: its runs have different flags ({'; '.join(sorted(flags))}); keep one kind")


def unlike(a: Result, b: Result) -> str:
    """In what two results differ that are to be compared, "" for nothing; the split goes with the seed."""

    def measured(result: Result) -> dict:
        protocol = {key: value for key, value in result.content["protocol"].items() if key != "split"}
        return {"data folder": result.data, "protocol": protocol, "set of images": result.people}

    other = measured(b)
    return next((what for what, value in measured(a).items() if value != other[what]), "")


# ------------------------------------------------------------------------------------------------------------- layout


def _table(where: str, project: str, name: str, spec: dict, rows: dict, usable: dict, departs: dict) -> Table:
    if "curves" in spec:
        columns, settings = {curve["name"]: spec["metrics"] for curve in spec["curves"]}, []
    else:
        columns, settings = spec.get("columns") or {}, list(spec.get("settings", []))
    columns = [column_of(group, metric, where) for group, metrics in columns.items() for metric in metrics]
    lines = []
    for line in _lines(spec):
        check_keys(line, LINE_KEYS, f"{where}, line {line.get('name')!r}", required=("name",))
        lines.append(_line(f"{where}, line {line['name']!r}", line, columns, settings, rows, usable, departs))
    drawn = {"notes": list(spec.get("notes", [])), "sweep": spec.get("x", ""), "by_epoch": spec.get("by_epoch", [])}
    runs = {
        line["name"]: [r for key, found in usable.items() if key[0] in rows_of(line) for r in found]
        for line in _lines(spec)
    }
    return Table(project, name, spec["title"], settings, columns, lines, **drawn, runs=runs)


def _lines(spec: dict) -> Iterable[dict]:
    """The lines of a table; a sweep has one per x value."""
    if "curves" not in spec:
        return spec.get("lines", [])
    values = sorted({x for curve in spec["curves"] for x in curve["points"]}, key=float)
    return [
        {
            "name": str(x),
            "rows": {curve["name"]: curve["points"][x] for curve in spec["curves"] if x in curve["points"]},
        }
        for x in values
    ]


def shown_rows(spec: dict) -> set[str]:
    """The rows that a table or sweep shows."""
    return {row for line in _lines(spec) for row in rows_of(line)}


def rows_of(line: dict) -> list[str]:
    """The rows of one line, each once."""
    rows = line.get("rows", {})
    return [rows] if isinstance(rows, str) else list(dict.fromkeys(rows.values()))


def column_of(group: str, metric: str | dict, where: str) -> Column:
    given = {"metric": metric} if isinstance(metric, str) else dict(metric)
    check_keys(given, {"metric", "name", "scale", "digits", "optional"}, f"{where}, columns", required=("metric",))
    key = given["metric"]
    last = key.rpartition(".")[2]
    if is_retrieval(key):
        name, scale, digits = re.sub(r"^rank", "Rank-", last), 100, 1
    else:
        name, scale, digits = PLAIN.get(last, (last, 1, 2))
    shown = given.get("name", name), given.get("scale", scale), given.get("digits", digits)
    return Column(group, key, *shown, given.get("optional", False), "digits" in given)


def _line(
    where: str, line: dict, columns: list[Column], settings: list, rows: dict, usable: dict, departs: dict
) -> Line:
    groups = list(dict.fromkeys(column.group for column in columns))
    texts = [str(text) for text in line.get("settings", [])]
    if len(texts) not in (0, len(settings)):
        raise Refused(f"{where}: {len(texts)} settings for {len(settings)} headings")
    name = f"{line['name']} ({line['year']})" if "year" in line else line["name"]
    texts = texts or [""] * len(settings)
    if "rows" not in line:
        cited = _cited(where, line.get("cited"), columns, groups)
        return Line(
            name,
            texts,
            line.get("source", "cited" if any(cited) else ""),
            False,
            cited,
            [None] * len(columns),
            {},
            line.get("note", ""),
        )
    if "cited" in line:
        raise Refused(f"{where}: an own line takes the paper's numbers from experiments.yaml, not from `cited`")
    by_group = {group: line["rows"] for group in groups} if isinstance(line["rows"], str) else line["rows"]
    for key, row in by_group.items():
        if key not in groups:
            raise Refused(f"{where}: unknown group {key!r}; the table has {', '.join(map(repr, groups))}")
        if row not in rows:
            raise Refused(f"{where}: row {row!r} is not in experiments.yaml")
    names = [by_group.get(column.group) for column in columns]
    paper = [
        paper_cell(rows[row].get("paper", {}).get(column.metric), f"experiments.yaml, row {row}", column)
        if row
        else None
        for row, column in zip(names, columns)
    ]
    sizes = sorted({size for row, size in usable if size and row in names})
    real, *synthetic = (
        [mean_over_seeds(usable.get((row, size), []), column.metric, departs) for row, column in zip(names, columns)]
        for size in ["", *sizes]
    )
    return Line(name, texts, "paper", True, paper, real, dict(zip(sizes, synthetic)), line.get("note", ""))


def _cited(where: str, cited, columns: list[Column], groups: list[str]) -> list[Cell | None]:
    if isinstance(cited, list):
        if len(groups) != 1:
            raise Refused(f"{where}: `cited` is a list, but the table has {len(groups)} groups; name them")
        cited = {groups[0]: cited}
    cells = {}
    for group, values in (cited or {}).items():
        inside = [column for column in columns if column.group == group]
        if len(inside) != len(values):
            raise Refused(f"{where}: {len(values)} cited numbers for the {len(inside)} columns of {group!r}")
        cells.update(
            {(group, i): paper_cell(value, where, column) for i, (value, column) in enumerate(zip(values, inside))}
        )
    counted: dict[str, int] = {}
    out = []
    for column in columns:
        out.append(cells.get((column.group, counted.get(column.group, 0))))
        counted[column.group] = counted.get(column.group, 0) + 1
    return out


def paper_cell(value, where: str, column: Column) -> Cell | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or is_retrieval(column.metric) and not 0 <= value <= 1:
        raise Refused(
            f"{where}: {column.metric} {value!r} is not a number in the units of result files (mAP and rank: fractions)"
        )
    digits = 0 if column.fixed else getattr(value, "decimals", 0) - round(math.log10(column.scale))
    return Cell(float(value), digits=max(0, digits))


def mean_over_seeds(results: list[Result], metric: str, departs: dict) -> Cell | None:
    """Mean and sample standard deviation over the seeds that have the metric; None without a file."""
    found = [result for result in results if metric in result.metrics]
    if not found:
        return None
    values = [result.metrics[metric] for result in found]
    return Cell(
        statistics.fmean(values),
        statistics.stdev(values) if len(values) > 1 else None,
        len(values),
        any(result.content["selection"] == "best_on_test" for result in found),
        tuple(result.path for result in found),
        departs[found[0].path],
    )


def check_keys(mapping, keys: set[str], where: str, required: tuple[str, ...] = ()) -> None:
    if not isinstance(mapping, dict):
        raise Refused(f"{where}: expected a mapping")
    unknown, missing = sorted(set(mapping) - keys), [key for key in required if key not in mapping]
    if unknown or missing:
        raise Refused(
            f"{where}: " + "; ".join([f"unknown key {key!r}" for key in unknown] + [f"no {key!r}" for key in missing])
        )
