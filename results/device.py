"""What tests/benchmarks/gpu.py measured: results/benchmarks/*.json as tables, a column a file, oldest first."""

import json
from html import escape
from pathlib import Path

from results.printing import DASH, link
from results.schema import Refused

SCHEMA = 1
TITLE = "Device benchmarks"
NONE = (
    "No GPU was at hand so far, so nothing stands here. `make gpu` on a machine with one runs the tests that need it "
    "and these measurements in ten minutes, and records them in results/benchmarks."
)
INTRO = (
    "Measured by `make gpu`. *step*: the training step alone, on a batch that lies on the device; *loop*: the whole "
    "loop as the script runs it. Random images and weights, the paper's network and batch. A part that was stopped "
    "shows what it had."
)


def load(root: Path) -> list[dict]:
    """The records of the folder by date, each with its `path`. Raises: Refused for a file that is no such record."""
    found = [_read(path) for path in sorted((root / "results" / "benchmarks").glob("*.json"))]
    return sorted(found, key=lambda record: (record["date"], record["path"].name))


def _read(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = record["schema"] == SCHEMA
        _column(record), [_cells(record, name) for name in record["parts"]], machine(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(
            f"{path}: no record of tests/benchmarks/gpu.py ({type(error).__name__}: {error}); move it elsewhere"
        ) from error
    if not known:
        raise Refused(f"{path}: schema {record['schema']!r} is unknown, expected {SCHEMA}; run make gpu again")
    if record["small"]:
        raise Refused(f"{path}: made with --small, which only tries the script; move it elsewhere")
    return record | {"path": path}


def _column(record: dict) -> str:
    return f"{record['card']['name']}, {record['date'][:16].replace('T', ' ')}"


def machine(record: dict) -> dict[str, str]:
    """What the figures of a file were measured with."""
    card, env, commit = record["card"], record["env"], record["git"]["commit"]
    return {
        "memory, driver": f"{card['memory_mib'] / 1024:.0f} GiB, {card['driver'] or 'unknown'}",
        "torch, CUDA, cuDNN": f"{env['torch']}, {env['cuda']}, {env['cudnn'] or 'unknown'}",
        "Python, torchvision": f"{env['python']}, {env['torchvision']}",
        "CPU": f"{env['cpu']}, {env['cores']} cores, {env['threads']} threads",
        "commit": f"{commit[:10]}{' and changes' if record['git']['dirty'] else ''}" if commit else "unknown",
        "seconds": number(record["seconds"]),
    }


def tables(records: list[dict], heading) -> list[tuple[str, list[list[str]]]]:
    """Title and lines of each table: the machines, then the parts in their order; heading(record) heads a column."""
    if not records:
        return []
    heads = [heading(record) for record in records]
    machines = [machine(record) for record in records]
    found = [("Machines", [["", *heads], *([name, *(m[name] for m in machines)] for name in machines[0])])]
    for part in dict.fromkeys(part for record in records for part in record["parts"]):
        columns = [_cells(record, part) for record in records]
        names = dict.fromkeys(name for column in columns for name in column)
        title = next(record["parts"][part]["title"] for record in records if part in record["parts"])
        found.append((title, [["", *heads], *([n, *(column.get(n, DASH) for column in columns)] for n in names)]))
    return found


def _cells(record: dict, part: str) -> dict[str, str]:
    """Figure -> its value and unit, and last how the part ended."""
    entry = record["parts"].get(part)
    if entry is None:
        return {}
    found = {f["name"]: f"{number(f['value'])} {f['unit']}".strip() for f in entry.get("figures", [])}
    took = f" in {entry['seconds']:.0f} s" if "seconds" in entry else ""
    return found | {"the part": f"{entry['status']}{took}" + (f": {entry['why']}" if entry["why"] else "")}


def number(value: float) -> str:
    """Three significant digits or more, without exponents."""
    if float(value).is_integer() or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2g}"


def markdown(root: Path, base: Path, table) -> str:
    """The section of results/README.md; table(lines) makes a table of markdown."""
    records = load(root)
    parts = [f"## {TITLE}", INTRO if records else NONE]
    for title, lines in tables(records, lambda record: f"[{_column(record)}]({link(base, record['path'])})"):
        parts.append(f"### {title}\n\n{table(lines)}")
    return "\n\n".join(parts) + "\n"


def html(root: Path) -> str:
    """The section of the page."""
    records, out = load(root), ""
    for title, (head, *lines) in tables(records, lambda record: record):
        links = [f'<a href="{link(root / "results", r["path"])}">{escape(_column(r))}</a>' for r in head[1:]]
        first = "<th></th>" + "".join(f'<th class="number">{one}</th>' for one in links)
        rows = "".join(
            f'<tr><th scope="row">{escape(name)}</th>'
            + "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
            + "</tr>"
            for name, *cells in lines
        )
        out += (
            f'\n<h3>{escape(title)}</h3>\n<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">'
            f"<table><thead><tr>{first}</tr></thead><tbody>{rows}</tbody></table></div>"
        )
    said = escape(INTRO if records else NONE)
    for mark, tag in (("`", "code"), ("*", "em")):
        words = said.split(mark)
        said = "".join(word if i % 2 == 0 else f"<{tag}>{word}</{tag}>" for i, word in enumerate(words))
    return f'<section id="device">\n<h2>{TITLE}</h2>\n<p>{said}</p>{out}\n</section>'
