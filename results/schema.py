"""Result files: reading, checking, and whether one belongs to its row.

A file lies at results/<project>/<data>/<row>/seed<k>.json, one made here at the same place under runs/; `<data>` is
`market`, `market-synthetic-small`, ...; <row> may hold slashes. `read_all` refuses, naming the file, whatever could
put a wrong number into a table.
"""

import contextlib
import importlib.util
import io
import json
import math
import re
import sys
from argparse import Namespace
from collections.abc import Container
from dataclasses import dataclass
from functools import cache
from numbers import Real
from pathlib import Path

from common import flags, records

KEYS = {
    "schema": int,
    "project": str,
    "row": str,
    "seed": int,
    "command": str,
    "args": dict,
    "git": dict,
    "metrics": dict,
    "epoch": (int, type(None)),
    "selection": str,
    "protocol": dict,
    "data": dict,
    "env": dict,
    "wall_s": Real,
    "peak_mib": (Real, type(None)),
}
DATA_KEYS = {"name", "kind", "images", "ids", "cams", "digest"}
SELECTIONS = ("last", "best_on_test")
RETRIEVAL = re.compile(r"(^|\.)(mAP|mINP|rank\d+)$")  # metrics that are fractions, under any protocol prefix


class Refused(ValueError):
    """A result, row or table that must not be shown; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Result:
    """One checked result file. `data` is its folder's name, `size` the synthetic size or "" for real data."""

    path: Path
    data: str
    content: dict

    @property
    def row(self) -> str:
        return self.content["row"]

    @property
    def seed(self) -> int:
        return self.content["seed"]

    @property
    def metrics(self) -> dict:
        return self.content["metrics"]

    @property
    def size(self) -> str:
        return synthetic_size(self.data)

    @property
    def people(self) -> dict | str:
        """What names the images: of rendered ones, whose bytes differ between machines, size, seed and version."""
        data = self.content["data"]
        return {**data["rendered"], "images": data["images"]} if data.get("rendered") else data["digest"]

    @property
    def log(self) -> Path:
        return self.path.with_suffix(".log.jsonl")


def synthetic_size(data: str) -> str:
    """ "small" of "market-synthetic-small", "" of "market"."""
    return data.partition("-synthetic-")[2]


def is_retrieval(metric: str) -> bool:
    """True for mAP, mINP and rankK under any protocol prefix: fractions, shown in per cent."""
    return RETRIEVAL.search(metric) is not None


def metrics_text(metrics: dict) -> str:
    """Metrics in one line, retrieval metrics first and in per cent."""
    names = sorted(metrics, key=lambda name: (not is_retrieval(name), name))
    return ", ".join(
        f"{name} {metrics[name] * 100:.1f}" if is_retrieval(name) else f"{name} {metrics[name]:.6g}" for name in names
    )


def projects(root: Path) -> list[str]:
    """The folders that list rows, sorted."""
    return sorted(path.parent.name for path in Path(root).glob("*/experiments.yaml"))


def load_rows(root: Path, project: str) -> dict[str, dict]:
    """The rows of a project; raises Refused for a malformed file."""
    try:
        return records.load_rows(Path(root) / project)
    except (FileNotFoundError, ValueError) as error:
        raise Refused(str(error)) from error


def read_all(root: Path, project: str, results_dir: Path | None = None) -> list[Result]:
    """All result files of a project, checked, sorted by path. Raises: Refused for the first one that breaks a rule."""
    base = Path(results_dir or Path(root) / "results") / project
    rows = load_rows(root, project)
    results = [read(path, base.parent) for path in sorted(base.rglob("*.json"))]
    for result in results:
        if result.row not in rows and not result.row.startswith("custom-"):
            raise Refused(
                f"{result.path}: {records.unknown_row(project, result.row, rows)}; move the file or restore the row"
            )
    return results


def read(path: Path, results_dir: Path) -> Result:
    """One result file, checked alone. Raises: Refused with one sentence."""
    project, data, *row, name = path.relative_to(results_dir).parts
    seed = re.fullmatch(r"seed(\d+)\.json", name)
    if seed is None or not row:
        raise Refused(f"{path}: result files are called <project>/<data>/<row>/seed<k>.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict) or content.get("schema") != records.SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise Refused(f"{path}: schema {found!r} is unknown, this code reads {records.SCHEMA}")
    _check_keys(path, content)
    for key, expected in (("project", project), ("row", "/".join(row)), ("seed", int(seed[1]))):
        if content[key] != expected:
            raise Refused(f"{path}: {key} is {content[key]!r} inside the file but {expected!r} by its path")
    if content["args"].get("data_name", data) != data:
        raise Refused(f"{path}: written for data {content['args']['data_name']!r} but lies under {data!r}")
    kind = "synthetic" if synthetic_size(data) else "real"
    if content["data"]["kind"] != kind:
        raise Refused(f"{path}: the data are {content['data']['kind']} but the folder {data} is for {kind} data")
    _check_metrics(path, content["metrics"])
    return Result(path, data, content)


def _check_keys(path: Path, content: dict) -> None:
    missing = sorted(KEYS.keys() - content.keys()) + [
        f"data.{key}" for key in sorted(DATA_KEYS - set(content.get("data") or DATA_KEYS))
    ]
    if missing:
        raise Refused(f"{path}: lacks {', '.join(missing)}")
    for key, kind in KEYS.items():
        if not isinstance(content[key], kind) or isinstance(content[key], bool):
            raise Refused(f"{path}: {key} has the wrong type, {type(content[key]).__name__}")
    if content["selection"] not in SELECTIONS:
        raise Refused(f"{path}: selection {content['selection']!r} is none of {', '.join(SELECTIONS)}")


def _check_metrics(path: Path, metrics: dict) -> None:
    if not metrics:
        raise Refused(f"{path}: holds no metrics")
    for name, value in metrics.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise Refused(f"{path}: metric {name} is {value!r}, not a finite number")
        if is_retrieval(name) and not 0 <= value <= 1:
            raise Refused(
                f"{path}: metric {name} is {value}, outside [0, 1]; result files hold fractions, not per cent"
            )


# --------------------------------------------------------------------------------------------------- results and rows


def method(args: dict) -> dict:
    """The flags that define a training, without what only says where and on what it ran."""
    return {key: value for key, value in flags.method_flags(args).items() if key != "data_name"}


def differences(stored: dict, expected: dict) -> dict[str, tuple]:
    """Method flags on which two argument dictionaries disagree, files by content: {flag: (stored, expected)}.

    Only flags that both know are compared, so that adding a flag later does not disown older results.
    """
    stored, expected = (_plain(method(args)) for args in flags.compared(stored, expected))
    return {
        key: (stored[key], expected[key])
        for key in sorted(stored.keys() & expected.keys())
        if stored[key] != expected[key]
    }


def _plain(args: dict) -> dict:
    return json.loads(json.dumps(args, default=str))  # tuples become lists, paths strings, as in the file


def foreign_flags(result: Result, root: Path, row: dict, but: Container[str] = ()) -> str:
    """The method flags, `but` these, in which a result departs from its row, as text ("--epochs 5 (row: 60)"); "" when
    it is the row's own.
    """
    changed = differences(result.content["args"], own_args(root, result.content["project"], result.row, row))
    return ", ".join(
        f"--{key.replace('_', '-')} {was} (row: {own})" for key, (was, own) in changed.items() if key not in but
    )


def other_data(result: Result) -> str:
    """What sets a result's images apart from those that the paper measures, "" for nothing: real data without the
    published counts, or of which its file does not say whether they have them.
    """
    data = result.content["data"]
    if result.size or not data["images"] or data.get("published", False) is not False:  # None: no counts are published
        return ""
    known = "other data" if "published" in data else "data that are not known to be the published ones"
    return f"{known} ({data['images']} images, {data['ids']} people)"


def own_args(root: Path, project: str, name: str, row: dict) -> dict:
    """All flags of a row without any beside it. Raises: Refused with the parser's message."""
    return vars(row_args(Path(root), project, row.get("script", "train.py"), ("--row", name)))


@cache
def row_args(root: Path, project: str, script: str, argv: tuple[str, ...]) -> Namespace:
    """What the project's script makes of the flags `argv`, without running it. Raises: Refused with the parser's
    message.
    """
    path = root / project / script
    if not path.is_file():
        raise Refused(f"{path} does not exist, but {project}/experiments.yaml runs it")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser_of(root / project, script)(list(argv))
    except SystemExit as error:
        message = said.getvalue().strip().splitlines() or ["no message"]
        raise Refused(f"{project}/{script} refuses {' '.join(argv)}: {message[-1]}") from error


def parser_of(project: Path, script: str):
    """The function that reads the flags of a project's script: in its flags.py, which knows no torch, or in itself."""
    flags_py = project / "flags.py"
    parsers = getattr(load_script(flags_py), "PARSERS", {}) if flags_py.is_file() else {}
    return parsers.get(script) or load_script(project / script).parse_args


@cache
def load_script(path: Path):
    """The script as a module; scripts do no work at import."""
    spec = importlib.util.spec_from_file_location("_script_" + re.sub(r"\W", "_", str(path)), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    kept = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = kept
    return module
