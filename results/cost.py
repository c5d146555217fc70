"""How long rows take, from the wall times that result files record: what a plan costs before it is run.

A row and seed takes what it took itself, else what its other seeds took, else what the rows nearest to it took: of the
same script, stage and size of data, those whose names have most folders in common. Nothing comparable: unknown. Times
are of the machines that the files tell of and of what else these did, and say nothing about another kind of machine.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os.path import commonprefix
from statistics import fmean

from results.schema import Result


@dataclass(frozen=True)
class Cost:
    """Seconds, None if unknown, and whose they are: "" for the run's own."""

    wall_s: float | None
    source: str = ""

    def text(self) -> str:
        if self.wall_s is None:
            return "cost unknown"
        return (
            f"took {duration(self.wall_s)}" if not self.source else f"about {duration(self.wall_s)}, as {self.source}"
        )


def duration(seconds: float) -> str:
    """40 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def stage_of(args: dict) -> tuple:
    """What a run does, by its flags: runs of another stage or mode say nothing about its cost."""
    return tuple(args.get(key) for key in ("stage", "mode", "model"))


def of(
    row: str, seed: int, script: str, args: dict, results: Iterable[Result], script_of: Callable[[str], str | None]
) -> Cost:
    """The cost of a row and seed with these flags; script_of(row) is the script of a row, None for one that is gone."""
    size = args.get("synthetic") or ""
    found = [
        r
        for r in results
        if r.size == size and script_of(r.row) == script and stage_of(r.content["args"]) == stage_of(args)
    ]
    own = [r for r in found if r.row == row]
    itself, near = [r for r in own if r.seed == seed], _nearest(row, found)
    for chosen, source in ((itself, ""), (own, "its other seeds"), (near, _names(near))):
        if chosen:
            return Cost(fmean(r.content["wall_s"] for r in chosen), source)
    return Cost(None)


def _nearest(row: str, results: list[Result]) -> list[Result]:
    """Of results of other rows those whose row has most folders in common with this one."""

    def shared(result: Result) -> int:
        return len(commonprefix([row.split("/"), result.row.split("/")]))

    most = max(map(shared, results), default=0)
    return [result for result in results if shared(result) == most]


def _names(results: list[Result]) -> str:
    names = sorted({result.row for result in results})
    return "".join(names[:1]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def total(costs: Iterable[tuple[bool, Cost]]) -> str:
    """One line for (done, cost) of all runs of a plan: what was spent, what remains, and how many are unknown."""
    costs = list(costs)
    done, left = ([cost.wall_s for is_done, cost in costs if is_done == wanted] for wanted in (True, False))
    known = [wall_s for wall_s in left if wall_s is not None]
    unknown = len(left) - len(known)
    cost = [f"about {duration(sum(known))}"] if known or not unknown else []
    if unknown:
        cost.append(f"{unknown} of unknown cost")
    return f"done: {len(done)}, {duration(sum(filter(None, done)))}; to do: {len(left)}, {' and '.join(cost)}"
