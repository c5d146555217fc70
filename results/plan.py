"""What results/reproduce.py is to run: the rows that patterns name, those that they need, and what is there of each."""

import argparse
import difflib
import fnmatch
import graphlib
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from common import flags, runfiles
from results import cost, schema, tables
from results.schema import Refused


@dataclass
class Job:
    """One row and seed: what to run, and what is there already."""

    project: str
    row: str
    seed: int
    script: str
    flags: list[str]
    folder: str = ""  # the row's name, or custom-<hash> where flags after -- change the row
    status: str = "new"  # done | continue | new
    remark: str = ""
    needs: tuple[str, ...] = ()
    processes: int | None = None  # the most that the row can run in, None for any number

    @property
    def name(self) -> str:
        return f"{self.project}/{self.row} seed {self.seed}"

    def command(self, gpus: int) -> list[str]:
        launcher, count = [sys.executable], self._count(gpus)
        if count > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        return [
            *launcher,
            f"{self.project}/{self.script}",
            *self.flags,
            *(["--resume"] if self.status == "continue" else []),
        ]

    def text(self, gpus: int) -> str:
        count = self._count(gpus)
        launcher = f"torchrun --standalone --nproc_per_node={count}" if count > 1 else "python"
        return f"{launcher} " + shlex.join(self.command(1)[1:])

    def _count(self, gpus: int) -> int:
        return min(gpus, self.processes or gpus)


def matching(root: Path, rows: dict[str, dict], pattern: str) -> list[tuple[str, str]]:
    """The (project, row) pairs that a pattern names. Raises: Refused with close names when there are none."""
    first, _, rest = pattern.strip("/").partition("/")
    projects = [project for project in rows if fnmatch.fnmatchcase(project, first)]
    shown = {project: table_rows(root, project).get(rest, ()) for project in projects}
    found = [
        (project, row)
        for project in projects
        for row in rows[project]
        if rest in ("", row) or row.startswith(rest + "/") or row in shown[project] or fnmatch.fnmatchcase(row, rest)
    ]
    if found:
        return found
    known = [
        name
        for p in rows
        for name in (p, *(f"{p}/{row}" for row in rows[p]), *(f"{p}/{table}" for table in table_rows(root, p)))
    ]
    close = difflib.get_close_matches(pattern, list(dict.fromkeys(known)), 3, 0.4)
    raise Refused(
        f"no row matches {pattern}; "
        + (f"close: {', '.join(close)}" if close else f"projects are {', '.join(rows) or 'none'}")
    )


def table_rows(root: Path, project: str) -> dict[str, set[str]]:
    """Table id -> the rows that tables.yaml shows in it."""
    path = Path(root) / project / "tables.yaml"
    layout = yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.is_file() else {}
    return {name: tables.shown_rows(spec) for name, spec in layout.items()}


def in_order(rows: dict[str, dict], chosen: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The chosen rows and all that they need, needed ones first. Raises: Refused for unknown needs and circles."""
    graph: dict[tuple[str, str], list[tuple[str, str]]] = {}
    waiting = list(chosen)
    while waiting:
        project, row = waiting.pop(0)
        if (project, row) not in graph:
            needs = rows[project][row].get("needs", [])
            unknown = [need for need in needs if need not in rows[project]]
            if unknown:
                raise Refused(f"{project}/experiments.yaml: row {row} needs {unknown[0]}, which is not a row")
            graph[project, row] = [(project, need) for need in needs]
            waiting += graph[project, row]
    try:
        return list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise Refused(
            "rows need each other in a circle: " + " -> ".join("/".join(row) for row in error.args[1])
        ) from error


def planned(root: Path, rows: dict[str, dict], args: argparse.Namespace, chosen: list[tuple[str, str]]) -> list[Job]:
    """The chosen rows with the seeds asked for and, before them, what they need with seed 0, each with its status."""
    order = in_order(rows, chosen)
    needed = {(project, need) for project, row in order for need in rows[project][row].get("needs", [])}
    jobs = []
    for project, row in order:
        seeds = [0] * ((project, row) in needed) + args.seeds * ((project, row) in chosen)
        jobs += [planned_one(root, rows[project][row], args, project, row, seed) for seed in dict.fromkeys(seeds)]
    return jobs


def costs_of(root: Path, rows: dict[str, dict], results_dir: Path | None, jobs: list[Job]) -> list[cost.Cost]:
    """What each job takes, from the wall times of the runs in results_dir (default: runs) and of the recorded ones."""
    folders = dict.fromkeys((results_dir or root / flags.RUNS, root / "results"))

    def own(project: str) -> list[schema.Result]:
        """Those with the flags of their row; of one row and seed on the same data the first folder's."""
        read = [result for folder in folders for result in schema.read_all(root, project, folder)]
        kept = [r for r in read if r.row in rows[project] and not schema.foreign_flags(r, root, rows[project][r.row])]
        return list({(r.data, r.row, r.seed): r for r in reversed(kept)}.values())

    found = {project: own(project) for project in {job.project for job in jobs}}

    def of(job: Job) -> cost.Cost:
        args = vars(schema.row_args(root, job.project, job.script, tuple(job.flags)))
        script_of = {row: spec.get("script", "train.py") for row, spec in rows[job.project].items()}.get
        return cost.of(job.folder, job.seed, job.script, args, found[job.project], script_of)

    return [of(job) for job in jobs]


def planned_one(root: Path, spec: dict, args: argparse.Namespace, project: str, row: str, seed: int) -> Job:
    words = ["--row", row, "--seed", str(seed), *(["--synthetic", args.synthetic] if args.synthetic else [])]
    for flag, folder in (
        ("--data-dir", args.data_dir),
        ("--logs-dir", args.logs_dir),
        ("--results-dir", args.results_dir),
    ):
        words += [flag, _from_root(folder, root)] if folder else []
    own = {"needs": tuple(spec.get("needs", [])), "processes": spec.get("processes")}
    job = Job(project, row, seed, spec.get("script", "train.py"), words + args.extra, **own)
    expected = vars(schema.row_args(root, project, job.script, tuple(job.flags)))
    job.folder = expected["row"]
    size, results_dir = expected.get("synthetic") or "", args.results_dir or root / flags.RUNS
    done, job.remark = _found(results_dir, job, expected, size)
    if done:
        job.status = "done"
        if other := apart(done):
            job.remark = f"{other}; for other images give another --logs-dir and --results-dir"
        return job
    folders = _files(args.logs_dir or root / "logs", job, f"seed{seed}")
    begun = [runfiles.newest(path) for path in folders if schema.synthetic_size(_data_of(path, job.folder)) == size]
    epochs = [runfiles.epoch_of(path) for path in begun if path is not None]
    if max(epochs, default=0) and not job.remark:
        job.status, job.remark = "continue", f"after epoch {max(epochs)}"
    recorded, _ = _found(root / "results", job, expected, size)
    if recorded:
        told = f"recorded: {_from_root(recorded.path, root)}"
        job.remark = f"{job.remark}; {told}" if job.remark else told
    return job


def apart(result: schema.Result) -> str:
    """ "on other data (...)" of a result that was not made on what the paper measures, else ""."""
    other = schema.other_data(result)
    return f"on {other}" if other else ""


def _found(folder: Path, job: Job, expected: dict, size: str) -> tuple[schema.Result | None, str]:
    """The result of a job in a folder of results, and without it what another one there has that this must not."""
    remark = ""
    for path in _files(folder, job, f"seed{job.seed}.json"):
        result = schema.read(path, folder)
        if result.size != size and result.content["data"]["images"]:  # counts of parameters hold for any data
            continue
        changed = schema.differences(result.content["args"], expected)
        if not changed:
            return result, ""
        text = ", ".join(f"{key} {was} -> {now}" for key, (was, now) in changed.items())
        remark = f"{path} has other flags: {text}"
    return None, remark


def _from_root(folder: Path, root: Path) -> str:
    """A folder as a command run from the repository root names it: relative inside the repository, else absolute."""
    folder = folder.absolute()
    return folder.relative_to(root).as_posix() if folder.is_relative_to(root) else str(folder)


def _files(base: Path, job: Job, name: str) -> list[Path]:
    """The files and folders <base>/<project>/<data>/<row>/<name> of any data."""
    folders = sorted(path / job.folder for path in (Path(base) / job.project).glob("*") if path.is_dir())
    return [path for folder in folders for path in sorted(folder.glob(name))]


def _data_of(log_folder: Path, row: str) -> str:
    """The folder <data> of .../<data>/<row>/seed<k>."""
    return log_folder.parents[len(Path(row).parts)].name
