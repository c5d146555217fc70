"""Rows of experiments.yaml, the log of a run and its result file."""

import difflib
import functools
import hashlib
import json
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import yaml

from common.runfiles import replace

try:
    import resource
except ImportError:  # Windows
    resource = None

SCHEMA = 1
ROW_KEYS = {"paper", "args", "script", "needs", "processes", "note", "like"}


def load_rows(project_dir: Path) -> dict[str, dict]:
    """Row name -> {paper, args, script, needs, processes, note} of <project>/experiments.yaml.

    `processes: N` is the most processes that the row can run in, for one that cannot run in any number.
    `like: NAME` takes over what that row above says of script, needs, processes and args; own args follow them, and of
    a flag given twice the last counts.

    Raises: FileNotFoundError; ValueError for unknown keys, wrong kinds of values, or a `like` that is no row above it.
    """
    path = Path(project_dir) / "experiments.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: every project lists its rows there")
    return _rows(path, path.stat().st_mtime_ns)


@functools.cache
def _rows(path: Path, changed: int) -> dict[str, dict]:
    """The checked content of a file of rows as it was at that time; not to be changed, since callers share it."""
    rows = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
    for name, row in rows.items():
        unknown = set(row) - ROW_KEYS
        if unknown:
            raise ValueError(
                f"{path}: row {name} has unknown keys {', '.join(sorted(unknown))}; known are "
                f"{', '.join(sorted(ROW_KEYS))}"
            )
        if not isinstance(row.get("args", ""), str) or not isinstance(row.get("paper", {}), dict):
            raise ValueError(f"{path}: row {name}: args must be a string and paper a mapping")
        if type(row.get("processes", 1)) is not int or row.get("processes", 1) < 1:
            raise ValueError(f"{path}: row {name}: processes must be a whole number from 1, not {row['processes']!r}")
    whole = {}
    for name, row in rows.items():
        if "like" in row:
            if row["like"] not in whole:
                raise ValueError(f"{path}: row {name} is like {row['like']}, which is no row above it")
            model = whole[row["like"]]
            taken = {key: model[key] for key in ("script", "needs", "processes") if key in model}
            row = taken | row | {"args": f"{model.get('args', '')} {row.get('args', '')}".strip()}
            del row["like"]
        whole[name] = row
    return whole


def unknown_row(project: str, name: str, rows: dict) -> str:
    """One sentence that says a row does not exist and which names come close."""
    close = difflib.get_close_matches(name, rows, 3, 0.3) or list(rows)[:3]
    return f"no row {name} in {project}/experiments.yaml; close: {', '.join(close)}"


def digest(value) -> str:
    """Eight hex digits of a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


def append_log(path: Path, line: dict) -> None:
    """Append one JSON object of plain values, never times, so that equal runs log equal lines."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, sort_keys=True) + "\n")


def trim_log(path: Path, epoch: int) -> None:
    """Drop the lines after `epoch` and a torn last line: what a killed run logged beyond its last checkpoint."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["epoch"] <= epoch:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    replace(path, lambda file: file.write("".join(kept).encode()))


def write_result(path: Path, result: dict, log: Path) -> None:
    """Write the result file in one atomic step, after a copy of the run's log beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if log.is_file():
        replace(path.with_suffix(".log.jsonl"), lambda file: file.write(log.read_bytes()))
    text = json.dumps(result, indent=1, sort_keys=True, default=str)
    replace(path, lambda file: file.write(text.encode() + b"\n"))


def environment(cuda: str | None, threads: int) -> dict:
    """Versions and processor, as result files record them; cuda: the version in use, None on the CPU."""
    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in ("torch", "torchvision", "numpy")},
        "cuda": cuda,
        "cpu": _cpu(),
        "threads": threads,
    }


def peak_mib() -> float | None:
    """The most memory that this process has held, in MiB; None on Windows, where Python has no count of it."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, the others KiB


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.partition(":")[2].strip()
            for line in info.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.startswith("model name")
        ]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor()


def git_state(root: Path) -> dict:
    """{"commit": hash, "dirty": bool}, None where there is no git or no commit; results/ does not make it dirty."""
    if shutil.which("git") is None:
        return {"commit": None, "dirty": None}

    def git(*words):
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, encoding="utf-8", errors="replace", check=False
        )

    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain", "--", ".", ":!results")
    return (
        {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}
        if commit.returncode == 0
        else {"commit": None, "dirty": None}
    )
