"""A repository of one invented project, and result files in it."""

import json

TRAIN = """
import argparse, pathlib, shlex, yaml

def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="fake/train.py", allow_abbrev=False)
    for flag in ("--row", "--data-dir", "--synthetic", "--dataset"):
        parser.add_argument(flag)
    for flag in ("--seed", "--workers"):
        parser.add_argument(flag, type=int)
    parser.add_argument("--lr", type=float, default=0.1)
    row = parser.parse_known_args(argv)[0].row
    rows = yaml.safe_load((pathlib.Path(__file__).parent / "experiments.yaml").read_text())
    return parser.parse_args(shlex.split(rows[row].get("args", "")) + list(argv))
"""
ROWS = """
table2/market: {paper: {mAP: 0.788, rank1: 0.909}, args: "--dataset market"}
table2/duke: {paper: {mAP: 0.686, rank1: 0.824}, args: "--dataset duke"}
extra: {args: "--dataset market --lr 0.5"}
demo: {args: "--dataset market --synthetic small"}
complexity: {paper: {params: 26.7e+6}, args: ""}
"""
COMMON = """{"schema": 1, "project": "fake", "command": "python fake/train.py", "git": {}, "env": {}, "epoch": 60,
"selection": "last", "wall_s": 1.5, "peak_mib": 10.0}"""
LAYOUT = """
table2:
  title: Unsupervised
  columns: {Market-1501: [mAP, rank1], DukeMTMC-reID: [mAP, rank1]}
  lines:
    - {name: SSL, year: 2020, cited: {Market-1501: [0.378, 0.717], DukeMTMC-reID: [0.286, null]}}
    - {name: Ours, rows: {Market-1501: table2/market, DukeMTMC-reID: table2/duke}, note: two runs}
    - {name: Extra, rows: {Market-1501: extra}}
  notes: [two columns are swapped in the paper]
table8:
  title: Cost
  columns: {"": [params, {metric: memory_mb, name: MB, digits: 0}]}
  lines:
    - {name: MGN, cited: [74.38e+6, 179.55], source: measured by the authors}
    - {name: Ours, rows: complexity}
table1: {title: Data sets, columns: {}, settings: [images], lines: [{name: Market-1501, settings: ["32,668"]}]}
figure4:
  title: eps
  x: eps
  metrics: [mAP]
  curves: [{name: Market-1501, points: {0.65: table2/market, 0.5: extra}}]
"""


def plant(tmp_path):
    """The root of a repository of one project with rows, tables and a train.py that parses their flags."""
    project = tmp_path / "fake"
    project.mkdir()
    (tmp_path / "results").mkdir()
    (project / "experiments.yaml").write_text(ROWS)
    (project / "tables.yaml").write_text(LAYOUT)
    (project / "train.py").write_text(TRAIN)
    return tmp_path


def result(root, row="table2/market", data="market", seed=0, **changes):
    """Write a correct result file, except for `changes`; dotted names reach inside, None deletes."""
    kind = "synthetic" if "-synthetic-" in data else "real"
    flags = {"seed": seed, "workers": 7, "synthetic": None, "data_name": data, "dataset": data.partition("-")[0]}
    flags["lr"] = 0.5 if row == "extra" else 0.1
    content = json.loads(COMMON) | {"row": row, "seed": seed, "args": flags, "protocol": {"dataset": data}}
    content["metrics"] = {"mAP": 0.7912, "rank1": 0.9}
    content["data"] = {"name": data, "kind": kind, "images": 9, "ids": 3, "cams": 2, "digest": "d"}
    content["data"] |= {"published": True} if kind == "real" else {}
    for key, value in changes.items():
        inside = content
        *way, last = key.split("__")
        for part in way:
            inside = inside[part]
        inside[last] = value
        if value is None and last != "epoch":
            del inside[last]
    path = root / "results" / "fake" / data / row / f"seed{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path
