"""Every benchmark of `make bench` runs to its end, small; the times themselves are nothing to test."""

import json
import re

import pytest
from conftest import ROOT, script

BENCHES = re.findall(r"tests/benchmarks/(bench_\w+)\.py", (ROOT / "Makefile").read_text())
CALLS = {
    "bench_evaluation": {"clustered", "random", "junk"},
    "bench_jaccard": {"jaccard_distance", "re_rank"},
    "bench_data": {"classic", "store (disk)", "store (device)"},
    "bench_usual": {"metrics from distances", "metrics from features", "Jaccard distance", "clustering"},
}


def test_make_bench_runs_what_is_tested_here():
    assert set(BENCHES) == set(CALLS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_benchmark_runs_and_writes_its_figures(name, tmp_path):
    out = tmp_path / "out.json"
    done = script(ROOT / "tests" / "benchmarks" / f"{name}.py", "--small", "--json", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record, key = json.loads(out.read_text()), "features" if name == "bench_evaluation" else "call"
    calls = record["rounds"][0] if name == "bench_data" else {row[key] for row in record["rows"]}
    assert set(calls) == CALLS[name] and all(call in done.stdout for call in CALLS[name])
    assert record["torch"] and record["threads"] >= 1
