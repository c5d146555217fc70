"""Run the rows of the papers' tables, one after another, and leave a result file for each under runs/.

    python results/reproduce.py --list     # every row: flags, what it needs, the paper's numbers, done or missing
    python results/reproduce.py aff_scl/table4 --data-dir /data --dry-run      # the plan only
    python results/reproduce.py aff_scl/table4 --data-dir /data --seeds 0 1 2 --gpus 2
    python results/reproduce.py "aff_scl/table5/*" --synthetic small -- --epochs 4 --amp bf16

A pattern is a project, a table (project/table4: all rows that the table shows), a row, the beginning of one up to a
slash, or a glob, also over projects ("*/cpu/*"). The plan says what each run costs, from recorded wall times
(results/cost.py). Rows that others need run first, with seed 0, from which all seeds of the others start. A row and
seed is *done* when a result file is there, on data of the same kind and size, whose method flags equal those that the
command would set; flags that only say where and how to run (data folder, workers, cache, compile) do not count. It is
*continued* when its log folder holds a checkpoint, and *new* otherwise. A result recorded in this repository, under
results/, is named but does not make a row done: it was run elsewhere. --record writes there instead, where only missing
ones run. A row that fails does not stop the rest; the exit status is then 1.
"""

import argparse
import difflib
import fnmatch
import graphlib
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

import yaml

from common import commandline, datasets, flags, runfiles
from results import cost, schema, tables
from results.schema import Refused

ROOT = Path(__file__).resolve().parents[1]
RECORDED = "results"  # folder of the repository for the result files that belong to it
PATIENCE_S = 30  # between asking a child to stop and killing it


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

    @property
    def name(self) -> str:
        return f"{self.project}/{self.row} seed {self.seed}"

    def command(self, gpus: int) -> list[str]:
        launcher = [sys.executable]
        if gpus > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        return [
            *launcher,
            f"{self.project}/{self.script}",
            *self.flags,
            *(["--resume"] if self.status == "continue" else []),
        ]

    def text(self, gpus: int) -> str:
        launcher = f"torchrun --standalone --nproc_per_node={gpus}" if gpus > 1 else "python"
        return f"{launcher} " + shlex.join(self.command(1)[1:])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, and in `extra` whatever follows a lone --."""
    argv = commandline.words(argv)
    argv, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(
        prog="results/reproduce.py",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        usage="%(prog)s PATTERN [PATTERN ...] [flags] [-- flags for the scripts]",
    )
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="project, project/table, project/row, or a glob")
    parser.add_argument(
        "--data-dir", type=Path, help="folder that holds the data sets (default: data of the repository)"
    )
    parser.add_argument("--synthetic", choices=flags.SYNTHETIC, help="run on synthetic people instead of real data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes of torchrun; 1 runs plain python")
    parser.add_argument("--logs-dir", type=Path, help="checkpoints and logs (default: logs of the repository)")
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--results-dir", type=Path, help="result files (default: runs of the repository)")
    folder.add_argument("--record", action="store_true", help="write result files to results, which git tracks")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    parser.add_argument("--list", action="store_true", help="print the matching rows (default: all) and stop")
    args = parser.parse_args(argv)
    args.extra = extra
    if not args.patterns and not args.list:
        parser.error("give a PATTERN, or --list to see the rows")
    if args.gpus < 1:
        parser.error(f"--gpus must be at least 1, not {args.gpus}")
    return args


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    args = parse_args(argv)
    if args.record:
        args.results_dir = root / RECORDED
    try:
        rows = {project: schema.load_rows(root, project) for project in schema.projects(root)}
        everything = [(project, row) for project in rows for row in rows[project]]
        chosen = (
            list(dict.fromkeys(row for pattern in args.patterns for row in matching(root, rows, pattern))) or everything
        )
        if args.list:
            print(listing(root, rows, chosen, args.results_dir))
            return 0
        jobs = planned(root, rows, args, chosen)
        costs = costs_of(root, rows, args.results_dir, jobs)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(jobs)} runs, of which {sum(job.status == 'done' for job in jobs)} are done:")
    for job, each in zip(jobs, costs):
        remark = f" ({job.remark})" if job.remark else ""
        print(f"  {job.status:<8}  {job.name}{remark}  {each.text()}\n            {job.text(args.gpus)}", flush=True)
    print(cost.total((job.status == "done", each) for job, each in zip(jobs, costs)), flush=True)
    if args.dry_run:
        return 0
    hangup = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # Windows has none
    before = [(number, signal.signal(number, _interrupt)) for number in (signal.SIGTERM, *hangup)]
    try:
        return run_all(root, args, jobs)
    finally:
        for number, handler in before:
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------------------- plan


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
        jobs += [_planned(root, rows[project][row], args, project, row, seed) for seed in dict.fromkeys(seeds)]
    return jobs


def costs_of(root: Path, rows: dict[str, dict], results_dir: Path | None, jobs: list[Job]) -> list[cost.Cost]:
    """What each job takes, from the wall times of recorded runs."""
    found = {project: schema.read_all(root, project, results_dir) for project in {job.project for job in jobs}}

    def of(job: Job) -> cost.Cost:
        args = vars(schema.row_args(root, job.project, job.script, tuple(job.flags)))
        script_of = {row: spec.get("script", "train.py") for row, spec in rows[job.project].items()}.get
        return cost.of(job.folder, job.seed, job.script, args, found[job.project], script_of)

    return [of(job) for job in jobs]


def _planned(root: Path, spec: dict, args: argparse.Namespace, project: str, row: str, seed: int) -> Job:
    words = ["--row", row, "--seed", str(seed), *(["--synthetic", args.synthetic] if args.synthetic else [])]
    for flag, folder in (
        ("--data-dir", args.data_dir),
        ("--logs-dir", args.logs_dir),
        ("--results-dir", args.results_dir),
    ):
        words += [flag, _from_root(folder, root)] if folder else []
    job = Job(
        project, row, seed, spec.get("script", "train.py"), words + args.extra, needs=tuple(spec.get("needs", []))
    )
    expected = vars(schema.row_args(root, project, job.script, tuple(job.flags)))
    job.folder = expected["row"]
    size, results_dir = expected.get("synthetic") or "", args.results_dir or root / flags.RUNS
    done, job.remark = _found(results_dir, job, expected, size)
    if done:
        job.status, job.remark = "done", ""
        return job
    folders = _files(args.logs_dir or root / "logs", job, f"seed{seed}")
    begun = [runfiles.newest(path) for path in folders if schema.synthetic_size(_data_of(path, job.folder)) == size]
    epochs = [runfiles.epoch_of(path) for path in begun if path is not None]
    if max(epochs, default=0) and not job.remark:
        job.status, job.remark = "continue", f"after epoch {max(epochs)}"
    recorded, _ = _found(root / RECORDED, job, expected, size)
    if recorded:
        told = f"recorded: {_from_root(recorded.path, root)}"
        job.remark = f"{job.remark}; {told}" if job.remark else told
    return job


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


def listing(root: Path, rows: dict[str, dict], chosen: list[tuple[str, str]], results_dir: Path | None = None) -> str:
    """The chosen rows: command, what each needs, the paper's numbers, and the results there are, then their count."""
    names, folder = dict.fromkeys(project for project, _ in chosen), results_dir or root / flags.RUNS
    places = {"done": folder} | ({"recorded": root / RECORDED} if folder != root / RECORDED else {})
    found = {word: {p: schema.read_all(root, p, place) for p in names} for word, place in places.items()}
    parts, done = [], dict.fromkeys(places, 0)
    for project, row in chosen:
        spec = rows[project][row]
        texts = {word: _status(root, spec, [r for r in found[word][project] if r.row == row], word) for word in places}
        held = [word for word, text in texts.items() if text.startswith(word)]
        done |= {word: done[word] + 1 for word in held}
        status = "; ".join(texts[word] for word in held) or texts["done"]
        paper = schema.metrics_text(spec.get("paper", {}))
        parts.append(
            f"{project}/{row}: {spec.get('script', 'train.py')} {spec.get('args', '')}".rstrip()
            + f"\n    needs {needed(root, project, row, spec)}"
            + (f"\n    paper: {paper}" if paper else "")
            + f"\n    {status}"
        )
    counts = ", ".join(f"{count} {word}" for word, count in done.items())
    return "\n".join([*parts, f"{len(chosen)} rows, of them {counts}"])


def needed(root: Path, project: str, row: str, spec: dict) -> str:
    """Data set, initial weights and earlier rows of a row, as its script's flags and experiments.yaml say."""
    args = vars(schema.row_args(root, project, spec.get("script", "train.py"), ("--row", row)))
    data = [args.get("dataset"), args["source"] if args.get("source") in datasets.NAMES else None]
    if args.get("synthetic"):
        text = f"no data set: it renders {args.get('dataset') or 'people'} {args['synthetic']} by itself"
    elif any(data):
        text = " and ".join(f"data set {name}" for name in data if name)
    elif args.get("epochs"):
        text = f"data as {project}/README.md says"
    else:
        return "nothing but the code"
    weights, needs = str(args.get("weights") or "none").removeprefix("row:"), spec.get("needs", [])
    if weights in schema.load_rows(root, project):
        needs = list(dict.fromkeys([weights, *needs]))
    initial = [] if weights in ("none", *needs) else [f"weights {weights}"]
    return "; ".join([text, *initial, *(f"row {need}" for need in needs)])


def _status(root: Path, spec: dict, results: list[schema.Result], word: str) -> str:
    """ "done: market seed 0" with the given word, or "missing", with the data of results of other flags."""
    own = [result for result in results if not schema.foreign_flags(result, root, spec)]
    if own:
        return f"{word}: " + ", ".join(f"{result.data} seed {result.seed}" for result in own)
    return "missing" + (f" (with other flags: {', '.join(r.data for r in results)})" if results else "")


# ---------------------------------------------------------------------------------------------------------------- run


def run_all(root: Path, args: argparse.Namespace, jobs: list[Job]) -> int:
    """Run the jobs that are not done; returns the exit status: 0, 1 after failures, 130 when interrupted."""
    failed: dict[str, str] = {}
    for job in jobs:
        broken = [need for need in job.needs if f"{job.project}/{need} seed 0" in failed]
        if job.status == "done":
            continue
        if broken:
            failed[job.name] = f"not run, because {broken[0]} failed"
            continue
        print(f"\n=== {job.name}\n{job.text(args.gpus)}", flush=True)
        began = time.time()
        try:
            status = run_one(root, job, args.gpus)
        except KeyboardInterrupt:
            print(f"stopped during {job.name}; the same command continues it", file=sys.stderr)
            return 130
        minutes = (time.time() - began) / 60
        if status:
            failed[job.name] = f"exit status {status} after {minutes:.1f} min"
        elif not _planned_again(root, args, job):
            failed[job.name] = "ended without a result file for these flags"
        print(f"=== {job.name}: {failed.get(job.name, f'finished after {minutes:.1f} min')}", flush=True)
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if not failed:
        print(f"\nall done; python results/render.py{' --record' * args.record} shows the tables")
    return 1 if failed else 0


def run_one(root: Path, job: Job, gpus: int) -> int:
    """Run one job in a process group of its own, so that an interrupt ends all of it before it is passed on."""
    child = subprocess.Popen(job.command(gpus), cwd=root, start_new_session=True)
    try:
        return child.wait()
    except KeyboardInterrupt:
        for force in (False, True):
            try:
                _end(child, force)
                child.wait(PATIENCE_S)
                break
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                break
        raise


def _end(child: subprocess.Popen, force: bool) -> None:
    """Ask the child's process group to end, or make it; Windows has no groups, and there both kill the child."""
    if hasattr(os, "killpg"):
        os.killpg(child.pid, signal.SIGKILL if force else signal.SIGTERM)
    else:
        child.terminate()


def _planned_again(root: Path, args: argparse.Namespace, job: Job) -> bool:
    spec = {"script": job.script, "needs": list(job.needs)}
    return _planned(root, spec, args, job.project, job.row, job.seed).status == "done"


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
