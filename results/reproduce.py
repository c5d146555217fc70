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
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from common import commandline, datasets, flags
from results import cost, plan, schema
from results.schema import Refused

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 30  # between asking a child to stop and killing it


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
    parser.add_argument(
        "--gpus",
        type=int,
        default=1,
        metavar="N",
        help="processes of torchrun; 1 runs plain python, as do rows of a single process",
    )
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
        args.results_dir = root / "results"
    try:
        rows = {project: schema.load_rows(root, project) for project in schema.projects(root)}
        everything = [(project, row) for project in rows for row in rows[project]]
        found = [row for pattern in args.patterns for row in plan.matching(root, rows, pattern)]
        chosen = list(dict.fromkeys(found)) or everything
        if args.list:
            print(listing(root, rows, chosen, args.results_dir))
            return 0
        jobs = plan.planned(root, rows, args, chosen)
        costs = plan.costs_of(root, rows, args.results_dir, jobs)
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


# --------------------------------------------------------------------------------------------------------------- list


def listing(root: Path, rows: dict[str, dict], chosen: list[tuple[str, str]], results_dir: Path | None = None) -> str:
    """The chosen rows: command, what each needs, the paper's numbers, and the results there are, then their count."""
    names, folder = dict.fromkeys(project for project, _ in chosen), results_dir or root / flags.RUNS
    places = {"done": folder} | ({"recorded": root / "results"} if folder != root / "results" else {})
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
    args = schema.own_args(root, project, row, spec)
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
        return f"{word}: " + ", ".join(f"{r.data} seed {r.seed} {plan.apart(r)}".rstrip() for r in own)
    return "missing" + (f" (with other flags: {', '.join(r.data for r in results)})" if results else "")


# ---------------------------------------------------------------------------------------------------------------- run


def run_all(root: Path, args: argparse.Namespace, jobs: list[plan.Job]) -> int:
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


def run_one(root: Path, job: plan.Job, gpus: int) -> int:
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


def _planned_again(root: Path, args: argparse.Namespace, job: plan.Job) -> bool:
    spec = {"script": job.script, "needs": list(job.needs)}
    return plan.planned_one(root, spec, args, job.project, job.row, job.seed).status == "done"


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
