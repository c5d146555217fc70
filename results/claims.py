"""The claims of a paper that rows of ours can test, and what those say: claims.yaml + result files -> Claim, verdict.

claims.yaml: name -> mapping, in the order of the page.

    both-contrasts:
      claim: "Both contrasts together are better than either alone."    # in our own words
      where: "Table 4"                                                  # where the paper makes it
      metric: mAP                                                       # a key of a result's `metrics`
      rows: {cpu/table4/scl: table2/market, cpu/table4/hard: 0.763}     # our row: the paper's row or number, or nothing
      test: best                  # the first above every other; or order (default), each above the next
      equal: [epoch, batch_size]  # what must be equal for the claim to mean anything: epoch, or flags of the rows
      note: "..."
    learns:
      claim: "AGW learns to search across modalities."
      metric: all.rank1
      rows: {cpu/agw/sysu/ours: }
      above: {untrained: 1, chance: 4}    # baseline, or a row of ours: how many times it; no claim of the paper

The paper's numbers are those of its row in experiments.yaml. A baseline is what the row's own results hold (`before.`
and `histogram.` metrics), else what results/baselines.py recorded for the row. Runs count only with their row's own
flags, on the data that these name.

The verdict is computed from the runs, never written. With means a and b over seeds, sample deviations s and e =
sqrt(s_a^2 / n_a + s_b^2 / n_b) (Welch): *holds* where a - b > 2 e, *does not hold* where a - b < -2 e, *cannot be told*
between them, where a side has fewer than three seeds or where all runs are equal, *not run* where one has none. Of
several differences all must be above for the claim to hold, and one below is enough for it not to. Colour histograms
and chance depend on the data alone and have no error.

What two standard errors are worth at n = 3: with equal spread the difference has about 4 degrees of freedom, with very
unequal spread 2, so that two methods without any difference pass 2 e in 12 to 18 of 100 comparisons (Student's t), half
of them in either direction; with many seeds it would be 5. One verdict alone is weak, a page of them holds a few that
luck wrote, and a difference that papers care about, a point of mAP, is often smaller than 2 e here and cannot be told.
Runs are not paired: those of one seed start from the same weights where the networks are the same, but part within a
few steps, so that their numbers hardly move together. Only the splits of RegDB, which go with the seed, would pair;
leaving that out makes its verdicts careful, not wrong.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from results import schema
from results.schema import Refused, Result
from results.tables import (
    FEWEST,
    Cell,
    Column,
    Project,
    check_keys,
    column_of,
    mean_over_seeds,
    paper_cell,
    read_yaml,
    unlike,
)

NAME = "claims.yaml"
KEYS = {"claim", "where", "metric", "rows", "test", "equal", "note", "above"}
TESTS = ("order", "best")
BASELINES = {  # -> prefix in a row's own results
    "untrained": "before",
    "histogram": "histogram",
    "gradients": "gradients",
    "chance": "chance",
}
OF_TRAINING = {"weights", "epochs", "iters", "lr", "weight_decay"}  # which say nothing of a network without any
EXACT = ("histogram", "chance")  # depend on the data alone
HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "cannot be told", "not run"
VERDICTS = (HOLDS, FAILS, OPEN, MISSING)


@dataclass(frozen=True)
class Side:
    """One of the numbers that a claim compares: the mean over seeds in stored units, None without a run; the paper's.

    `times` is the factor of a baseline; the mean of one that is `exact` has no error, whatever its n.
    """

    name: str
    ours: Cell | None
    paper: Cell | None = None
    times: float = 1
    exact: bool = False


class Difference(NamedTuple):
    """a - b in stored units and its standard error, None where a side has too few seeds."""

    value: float
    error: float | None


@dataclass
class Claim:
    project: str
    name: str
    text: str
    where: str
    note: str
    column: Column
    sides: list[Side]
    pairs: list[tuple[int, int]]  # places in sides: the first is claimed to be above the second
    of_paper: bool
    differences: list[Difference | None] = field(init=False)
    verdict: str = field(init=False)

    def __post_init__(self):
        self.differences = [difference(self.sides[a], self.sides[b]) for a, b in self.pairs]
        self.verdict = verdict_of(self.differences)

    @property
    def n(self) -> int:
        """Seeds of the side that has fewest."""
        return min((side.ours.n if side.ours else 0 for side in self.sides if not side.exact), default=0)


def difference(a: Side, b: Side) -> Difference | None:
    """The first side minus the second; None where one was not run."""
    if a.ours is None or b.ours is None:
        return None
    parts = [_variance(side) for side in (a, b)]
    error = None if None in parts else math.sqrt(sum(parts))
    return Difference(a.ours.value * a.times - b.ours.value * b.times, error)


def _variance(side: Side) -> float | None:
    """Of the side's mean, s^2 / n; None where it is unknown."""
    if side.exact:
        return 0.0
    return None if side.ours.n < FEWEST else (side.times * side.ours.std) ** 2 / side.ours.n


def verdict_of(differences: Iterable[Difference | None]) -> str:
    found = [_verdict(each) for each in differences]
    return next((word for word in (MISSING, FAILS, OPEN) if word in found), HOLDS)


def _verdict(found: Difference | None) -> str:
    if found is None:
        return MISSING
    if not found.error or abs(found.value) <= 2 * found.error:
        return OPEN
    return HOLDS if found.value > 0 else FAILS


# ------------------------------------------------------------------------------------------------------------- reading


def load(root: Path, project: Project) -> list[Claim]:
    """The claims of a project; [] without claims.yaml. Raises: Refused with one sentence for what breaks a rule."""
    path = Path(root) / project.name / NAME
    runs = _Runs(Path(root), project)
    return [_claim(f"{path}: {name}", name, spec, runs) for name, spec in read_yaml(path).items()]


class _Runs:
    """The rows of a project, and their results that may stand for them."""

    def __init__(self, root: Path, project: Project):
        self.root, self.project, self.results = root, project.name, project.results
        self.rows = schema.load_rows(root, project.name)
        self.printed = read_yaml(root / project.name / "experiments.yaml")  # numbers with their decimals

    def of(self, row: str) -> list[Result]:
        """The results of a row with its own flags, on the data that these name."""
        size = schema.own_args(self.root, self.project, row, self.rows[row]).get("synthetic") or ""
        return [
            result
            for result in self.results
            if result.row == row
            and result.size == size
            and not schema.foreign_flags(result, self.root, self.rows[row])
            and not schema.other_data(result)
        ]

    def baselines(self, row: str) -> list[Result]:
        """What results/baselines.py recorded for a row."""
        base = self.root / "results" / "baselines"
        found = [schema.read(path, base) for path in sorted((base / self.project).glob(f"*/{row}/seed*.json"))]
        data = [result.people for result in self.of(row)]
        for result in found:
            other = "on other data than the runs" if data and result.people not in data else ""
            if not other and (changed := schema.foreign_flags(result, self.root, self.rows[row], OF_TRAINING)):
                other = f"with other flags, {changed}, than those"
            if other:
                raise Refused(
                    f"{result.path}: measured {other} of {self.project}/{row}; record it again with "
                    f"python results/baselines.py {self.project}/{row} --seeds {result.seed}"
                )
        return found


def _claim(where: str, name: str, spec: dict, runs: _Runs) -> Claim:
    check_keys(spec, KEYS, where, required=("claim", "metric", "rows"))
    rows, above, test = spec["rows"], spec.get("above") or {}, spec.get("test", "order")
    if not isinstance(rows, dict) or len(rows) < (1 if above else 2) or (above and len(rows) > 1):
        raise Refused(f"{where}: rows must map at least two rows to the paper's; with `above`, one row")
    if test not in TESTS:
        raise Refused(f"{where}: test {test!r} is none of {', '.join(TESTS)}")
    if not above and "where" not in spec:
        raise Refused(f"{where}: says not where the paper makes the claim; add `where`, or `above` for a baseline")
    column = column_of("", spec["metric"], where)
    for row in rows:
        if row not in runs.rows:
            raise Refused(f"{where}: row {row!r} is not in experiments.yaml")
    own = {row: runs.of(row) for row in (*rows, *(kind for kind in above if kind in runs.rows))}
    _check_metric(where, column.metric, [result for found in own.values() for result in found])
    _check_comparable(where, own, spec.get("equal", []))
    sides = [Side(row, _mean(own[row], column.metric), _printed(where, rows[row], column, runs)) for row in rows]
    sides += [_below(where, next(iter(rows)), kind, times, column.metric, runs) for kind, times in above.items()]
    last = len(sides) - 1
    pairs = [(0, i + 1) for i in range(last)] if above or test == "best" else [(i, i + 1) for i in range(last)]
    return Claim(
        runs.project,
        name,
        spec["claim"],
        str(spec.get("where", "")),
        spec.get("note", ""),
        column,
        sides,
        pairs,
        not above,
    )


def _check_metric(where: str, metric: str, results: list[Result]) -> None:
    for result in results:
        if metric not in result.metrics:
            known = ", ".join(name for name in sorted(result.metrics) if name.endswith(metric.rpartition(".")[2]))
            raise Refused(
                f"{where}: {result.path} has no metric {metric!r}; "
                + (f"close: {known}" if known else f"it has {', '.join(sorted(result.metrics))}")
            )


def _check_comparable(where: str, own: dict[str, list[Result]], equal: list[str]) -> None:
    """Refuse to compare runs on other data, under another protocol, or that differ in what the claim holds equal."""
    results = [result for found in own.values() for result in found]
    for other in results[1:]:
        what = unlike(results[0], other)
        for name in equal:
            first, second = ({**r.content["args"], "epoch": r.content["epoch"]} for r in (results[0], other))
            if name not in first or name not in second:
                raise Refused(f"{where}: equal: {name!r} is neither epoch nor a flag that {other.path} records")
            what = what or (f"{name} ({second[name]})" if first[name] != second[name] else "")
        if what:
            raise Refused(f"{where}: compares {other.path}, whose {what} is not that of {results[0].path}")


def _mean(results: list[Result], metric: str) -> Cell | None:
    return mean_over_seeds(results, metric, {result.path: "" for result in results})


def _printed(where: str, given, column: Column, runs: _Runs) -> Cell | None:
    """The paper's number: of a row of experiments.yaml, or as given."""
    if not isinstance(given, str):
        return paper_cell(given, where, column)
    if given not in runs.rows:
        raise Refused(f"{where}: row {given!r} is not in experiments.yaml")
    found = runs.printed[given].get("paper", {})
    if column.metric not in found:
        raise Refused(
            f"{where}: the paper prints no {column.metric} for row {given!r}, only {', '.join(found) or 'nothing'}"
        )
    return paper_cell(found[column.metric], where, column)


def _below(where: str, row: str, kind: str, times: float, metric: str, runs: _Runs) -> Side:
    """What a row is claimed to be above: another row, or a baseline of it."""
    if kind not in (*BASELINES, *runs.rows) or not isinstance(times, (int, float)) or times <= 0:
        raise Refused(
            f"{where}: above {kind!r}: {times!r}: expected {', '.join(BASELINES)} or a row, with a number of times"
        )
    if kind in runs.rows:
        return Side(kind, _mean(runs.of(kind), metric), None, times)
    ours = _mean(runs.of(row), f"{BASELINES[kind]}.{metric}") or _mean(runs.baselines(row), f"{kind}.{metric}")
    if ours and kind in EXACT:
        ours = replace(ours, std=None)
    return Side(kind, ours, None, times, kind in EXACT)


# ------------------------------------------------------------------------------------------------------------ counting


def count(claims: Iterable[Claim]) -> dict[str, int]:
    """Verdict -> number of claims."""
    found = [claim.verdict for claim in claims]
    return {verdict: found.count(verdict) for verdict in VERDICTS}


def split(claims: Iterable[Claim]) -> Iterator[list[Claim]]:
    """The paper's claims, then the checks of ours."""
    claims = list(claims)
    yield [claim for claim in claims if claim.of_paper]
    yield [claim for claim in claims if not claim.of_paper]
