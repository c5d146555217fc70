"""Pictures drawn from result files: the sweeps of tables.yaml, and losses and metrics by epoch from the logs beside
the results, of a table's rows together (`by_epoch`) or of each row.
"""

import itertools
import json
import statistics
from pathlib import Path

from common import visualize
from results import schema
from results.schema import Refused
from results.tables import HERE, Project, Table


def draw(project: Project, figures: Path) -> None:
    """Draw every sweep that has a number of ours, and the training curves of every logged run."""
    for table in project.tables:
        for size in table.sizes + [""]:
            if panels := epoch_panels(table, size):
                title = table.heading + (f": synthetic {size}" if size else "")
                visualize.plot(figures / epochs_name(table, size), panels, x_label="epoch", title=title)
        for size in ["", *table.sizes] if table.sweep else []:
            panels = sweep_panels(table, size)
            if panels:
                title = table.heading + (f": synthetic {size}" if size else "")
                visualize.plot(figures / sweep_name(table, size), panels, x_label=table.sweep, title=title)
    for name, figure in curve_figures(project):
        logs = {
            result.seed: read_log(result.log) for result in project.results if f"{result.row}, {result.data}" == name
        }
        panels = log_panels(logs)
        if panels:
            visualize.plot(figures / figure, panels, x_label="epoch", title=f"{project.name} {name}")


def sweep_name(table: Table, size: str) -> str:
    return f"{table.project}-{table.id}" + (f"-synthetic-{size}" if size else "") + ".png"


def sweep_panels(table: Table, size: str) -> dict[str, list[visualize.Curve]]:
    """Per metric, one curve a group from our numbers, and beside real data the paper's points; {} without a number of
    ours.
    """
    panels: dict[str, list[visualize.Curve]] = {}
    ours_anywhere = False
    for index, column in enumerate(table.columns):
        curves = panels.setdefault(column.name + (" (%)" if schema.is_retrieval(column.metric) else ""), [])
        for source, paper in [("", False), (HERE, False)] + ([("", True)] if not size else []):
            lines = [line for line in table.lines if (line.source == HERE) == (source == HERE)]
            cells = [
                (line.synthetic.get(size, [None] * (index + 1)) if size else line.paper if paper else line.real)[index]
                for line in lines
            ]
            points = [(float(line.name.removesuffix(f", {HERE}")), cell) for line, cell in zip(lines, cells) if cell]
            if points:
                ours_anywhere |= not paper
                error = (
                    [(cell.std or 0) * column.scale for _, cell in points]
                    if any(cell.std for _, cell in points)
                    else None
                )
                y = [cell.value * column.scale for _, cell in points]
                name = ", ".join(filter(None, (column.group or "ours", source)))
                curves.append(visualize.Curve(name, [x for x, _ in points], y, error, paper))
    return panels if ours_anywhere else {}


def epochs_name(table: Table, size: str) -> str:
    return f"{table.project}-{table.id}-epochs" + (f"-synthetic-{size}" if size else "") + ".png"


def epoch_panels(table: Table, size: str) -> dict[str, list[visualize.Curve]]:
    """A panel for each key of `by_epoch` and data set, with a curve a row: the mean over its seeds, their deviation."""
    panels: dict[str, list[visualize.Curve]] = {}
    several = len({result.data for runs in table.runs.values() for result in runs if result.size == size}) > 1
    for name, runs in table.runs.items() if table.by_epoch else ():
        rows: dict[tuple[str, str], list[list[dict]]] = {}
        for result in runs:
            if result.size == size:
                rows.setdefault((result.data, result.row), []).append(read_log(result.log))
        for ((data, _), logs), key in itertools.product(rows.items(), table.by_epoch):
            if curve := _over_seeds(name, logs, key):
                title = key + (" (%)" if schema.is_retrieval(key) else "") + (f", {data}" if several else "")
                panels.setdefault(title, []).append(curve)
    return panels


def _over_seeds(name: str, logs: list[list[dict]], key: str) -> visualize.Curve | None:
    """The mean of a key by epoch, of the epochs that all logs hold; None for fewer than two."""
    seeds = [{line["epoch"]: line[key] for line in log if key in line} for log in logs]
    epochs = sorted(set.intersection(*map(set, seeds)))
    if len(epochs) < 2:
        return None
    scale = 100 if schema.is_retrieval(key) else 1
    values = [[seed[epoch] * scale for seed in seeds] for epoch in epochs]
    spread = [statistics.stdev(each) for each in values] if len(seeds) > 1 else None
    return visualize.Curve(name, epochs, list(map(statistics.fmean, values)), spread)


def curve_figures(project: Project) -> list[tuple[str, str]]:
    """(row, data) with a log -> the name of its picture of training curves, in order; none for what a table draws."""
    found = {}
    for result in alone(project):
        if result.log.is_file() and log_panels({result.seed: read_log(result.log)}):
            found[f"{result.row}, {result.data}"] = f"{project.name}-{result.data}-{result.row.replace('/', '_')}.png"
    return sorted(found.items())


def alone(project: Project) -> list[schema.Result]:
    """The results whose curves no table draws."""
    tables = [table for table in project.tables if table.by_epoch]
    drawn = {result.path for table in tables for runs in table.runs.values() for result in runs}
    return [result for result in project.results if result.path not in drawn]


def read_log(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise Refused(f"{path}: a line is not JSON ({error})") from error


def log_panels(logs: dict[int | str, list[dict]]) -> dict[str, list[visualize.Curve]]:
    """One panel for each loss, mAP and rank1 that the logs {seed: lines} hold for several epochs; one curve a seed."""
    panels: dict[str, list[visualize.Curve]] = {}
    for key in sorted({key for log in logs.values() for line in log for key in line}):
        shown = key.rpartition(".")[2] in ("mAP", "rank1")
        if not shown and "loss" not in key:
            continue
        for seed, log in logs.items():
            points = [(line["epoch"], line[key]) for line in log if isinstance(line.get(key), (int, float))]
            if points:
                x, y = [x for x, _ in points], [y * 100 if shown else y for _, y in points]
                panels.setdefault(f"{key} (%)" if shown else key, []).append(visualize.Curve(f"seed {seed}", x, y))
    return {name: found for name, found in panels.items() if any(len(curve.x) > 1 for curve in found)}
