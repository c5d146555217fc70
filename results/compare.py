"""Runs made here beside the recorded ones: in one sentence each, and as lines of their own in the tables.

    python results/compare.py                   # every run under runs/
    python results/compare.py aff_scl/demo      # those of one row: what was recorded where, what came out here

Result files under results/ are recorded: they belong to the repository and change only in commits. A run writes to
runs/, which git ignores, unless --results-dir names another folder (`results` to record). No mean holds both.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from scipy import special

from common import commandline
from common.flags import RUNS
from results import plan, schema, tables
from results.schema import Refused, Result
from results.tables import HERE, Line, Project

ROOT = Path(__file__).resolve().parents[1]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="results/compare.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="rows, as results/reproduce.py takes them")
    parser.add_argument("--results-dir", type=Path, help="result files made here (default: runs of the repository)")
    return parser.parse_args(commandline.words(argv))


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    args = parse_args(argv)
    folder = args.results_dir or root / RUNS
    try:
        rows = {project: schema.load_rows(root, project) for project in schema.projects(root)}
        wanted = {row for pattern in args.patterns for row in plan.matching(root, rows, pattern)}
        lines = [
            line
            for project in rows
            for run, line in sentences(schema.read_all(root, project, folder), schema.read_all(root, project))
            if not args.patterns or (project, run.row) in wanted
        ]
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines or [f"no run of {', '.join(args.patterns) or 'any row'} in {folder}"]))
    return 0


# --------------------------------------------------------------------------------------------------------- in sentences


def sentences(here: Iterable[Result], recorded: list[Result]) -> Iterator[tuple[Result, str]]:
    """Each run made here, with what was recorded where, what came out here, and whether that is within the spread."""
    for run in here:
        metric = headline(run.metrics)
        mine = f"here {_number(metric, run.metrics[metric])} (seed {run.seed}, {machine(run)})"
        apart = schema.other_data(run)
        name = f"{run.content['project']} {run.row} on {run.data}{apart and f', {apart}'}, {metric}"
        yield (
            run,
            f"{name}: {_judged(mine, metric, run, [r for r in recorded if (r.row, r.data) == (run.row, run.data)])}",
        )


def _judged(mine: str, metric: str, run: Result, recorded: list[Result]) -> str:
    if not recorded:
        return f"{mine}; nothing is recorded for it"
    alike = [r for r in recorded if not unlike(r, run) and metric in r.metrics]
    if not alike:
        return f"{mine}; what is recorded is no measure for it: {unlike(recorded[0], run) or 'it lacks the metric'}"
    values = [r.metrics[metric] for r in alike]
    where = " and ".join(dict.fromkeys(machine(r) for r in alike))
    shown = f"recorded {_number(metric, statistics.fmean(values))}"
    if len(values) < tables.FEWEST:
        same = (
            "the same number"
            if run.metrics[metric] in values
            else f"no spread from {len(values)} seed{'s' * (len(values) > 1)}"
        )
        return f"{shown} (on {where}); {mine}: {same}"
    low, high = spread(values)
    shown += f", the mean of {len(values)} seeds from {_number(metric, min(values))} to {_number(metric, max(values))}"
    expected = (
        f"the spread of {_number(metric, low)} to {_number(metric, high)}, where 95 of 100 further runs are expected"
    )
    if low <= run.metrics[metric] <= high:
        return f"{shown} (on {where}); {mine}: within {expected}"
    return (
        f"{shown} (on {where}); {mine}: outside {expected}. Another processor, number of threads or version of torch "
        "sums in another order, and a small training then ends elsewhere; if these are the same, look for changed code "
        "(git status)"
    )


def spread(values: list[float]) -> tuple[float, float]:
    """Where 95 of 100 further values of the same normal law are expected: mean -+ t s sqrt(1 + 1/n), with the sample
    deviation s and Student's t for n - 1 degrees of freedom.
    """
    n = len(values)
    half = special.stdtrit(n - 1, 0.975) * statistics.stdev(values) * math.sqrt(1 + 1 / n)
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def headline(metrics: dict[str, float]) -> str:
    """The metric that stands for a run: the mAP with the shortest name, else the loss, else the first by name."""
    found = [name for name in metrics if name.rpartition(".")[2] == "mAP"] or [n for n in metrics if n == "loss"]
    return min(found or metrics, key=lambda name: (len(name), name) if found else name)


def unlike(recorded: Result, run: Result) -> str:
    """In what a recorded run differs from one made here, apart from seed and machine; "" if it can be compared."""
    flags = schema.differences(recorded.content["args"], run.content["args"])
    text = ", ".join(f"--{key.replace('_', '-')} {was} there, {now} here" for key, (was, now) in flags.items())
    return text or ("" if recorded.people == run.people else "it comes from other images")


def machine(result: Result) -> str:
    """ "Xeon, 2 threads", or the name of the GPU; with the number of processes where there are several."""
    env = result.content["env"]
    threads = env.get("threads", 0)
    on_cpu = f"{env.get('cpu', 'an unknown processor')}, {threads} thread{'s' * (threads != 1)}"
    several = f", {env['world_size']} processes" if env.get("world_size", 1) > 1 else ""
    return (env.get("gpu") or on_cpu) + several


def _number(metric: str, value: float) -> str:
    return f"{100 * value:.1f}" if schema.is_retrieval(metric) else f"{value:.6g}"


# ------------------------------------------------------------------------------------------------------------ in tables


def beside(root: Path, recorded: Project, folder: Path) -> Project:
    """The project with its runs in `folder`, and for their numbers a line under that of the recorded ones (mutates its
    tables).
    """
    own = tables.load(root, recorded.name, folder)
    for table, other in zip(recorded.tables, own.tables):
        pairs = zip(table.lines, other.lines)
        table.lines = [line for first, second in pairs for line in (first, *_of_here(second))]
    return replace(recorded, here=own.results, warnings=recorded.warnings + own.warnings)


def _of_here(line: Line) -> list[Line]:
    """A line with its numbers alone, named so; none without numbers."""
    if not any(map(any, (line.real, *line.synthetic.values()))):
        return []
    return [replace(line, name=f"{line.name}, {HERE}", source=HERE, paper=[None] * len(line.paper), note="")]


if __name__ == "__main__":
    sys.exit(main())
