"""Runs made here beside the recorded ones: never over them, never in one mean, and judged by their spread."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import ROOT, TINY
from miniature import result

from aff_scl import train
from common import flags, runtime
from results import compare, curves, render, reproduce, schema, tables

ENV = {"cpu": "Xeon", "threads": 2, "gpu": None, "world_size": 1}


def made_here(root, **changes):
    """A correct result file under runs/, except for `changes`."""
    path = result(root / "elsewhere", **changes)
    place = root / flags.RUNS / path.relative_to(root / "elsewhere" / "results")
    place.parent.mkdir(parents=True, exist_ok=True)
    return path.rename(place)


def recorded(root, *values, **changes):
    for seed, value in enumerate(values):
        result(root, seed=seed, metrics={"mAP": value, "rank1": 0.9}, env=ENV, **changes)


def said(root, capsys, *words):
    capsys.readouterr()
    assert compare.main([*words], root) == 0
    return capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- the tables


def test_a_run_made_here_stands_beside_the_recorded_mean_and_in_none(root, capsys):
    recorded(root, 0.79, 0.80)
    made_here(root, seed=2, metrics={"mAP": 0.5, "rank1": 0.4})
    assert render.main(["fake"], root) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^ +ours +79\.5 ± 0\.7 \(n=2\) ", shown, re.MULTILINE)
    assert re.search(r"^Ours, made here +made here +50\.0 \(n=1\) +40\.0 \(n=1\) ", shown, re.MULTILINE)
    text = (root / flags.RUNS / "index.html").read_text()
    assert "79.5 ± 0.7" in text and 'href="fake/market/table2/market/seed2.json"' in text
    links = set(re.findall(r' href="(?!#|[a-z]+:)([^"]+)"', text)) - {"../fake/README.md", "../results/README.md"}
    assert "../results/fake/market/table2/market" in links
    assert [link for link in links if not (root / flags.RUNS / link).exists()] == []


def test_runs_on_rendered_people_stand_below_the_recorded_of_their_size(root, capsys):
    made_here(root, data="market-synthetic-small", metrics={"mAP": 0.5, "rank1": 0.4})
    assert render.main(["fake"], root) == 0
    real, small = capsys.readouterr().out.split("synthetic small, not the real data set", 1)
    assert re.search(r"^Ours, made here +50\.0 \(n=1\) ", small, re.MULTILINE) and "Ours, made here" not in real


def test_a_sweep_draws_runs_made_here_as_a_curve_of_their_own(root):
    recorded(root, 0.79)
    made_here(root, seed=0, metrics={"mAP": 0.5, "rank1": 0.4})
    table = compare.beside(root, tables.load(root, "fake"), root / flags.RUNS).tables[-1]
    panels = curves.sweep_panels(table, "")["mAP (%)"]
    drawn = {curve.name: (curve.x, curve.y) for curve in panels if not curve.paper}
    assert drawn == {"Market-1501": ([0.65], [79.0]), "Market-1501, made here": ([0.65], [50.0])}


def test_the_page_shows_the_log_of_a_run_beside_those_of_the_recorded_seeds(root):
    for path in (result(root), made_here(root)):
        path.with_suffix(".log.jsonl").write_text('{"epoch": 1, "loss": 2.5}\n{"epoch": 2, "loss": 1.5}\n')
    assert render.main([], root) == 0
    text = (root / flags.RUNS / "index.html").read_text()
    assert "<span>seed 0</span>" in text and "<span>seed 0, made here</span>" in text


def test_pages_of_recorded_results_know_nothing_of_runs_made_here(root):
    recorded(root, 0.79)
    assert render.main(["--record"], root) == 0
    made_here(root, seed=1)
    assert render.main(["--check"], root) == 0
    assert render.main(["--record"], root) == 0
    assert "made here" not in (root / "results" / "README.md").read_text() + (root / "results/index.html").read_text()


def test_the_recorded_results_are_nobodys_own(root, capsys):
    assert render.main(["--results-dir", str(root / "results")], root) == 1
    assert "--record" in capsys.readouterr().err and not (root / "results" / "index.html").exists()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
@pytest.mark.filterwarnings("ignore:market")
def test_after_a_training_and_all_that_shows_it_git_sees_no_change(market_dir, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    kept_out = shutil.ignore_patterns(".git", ".venv", "data", "logs", "runs", "__pycache__", ".*_cache", "tests")
    shutil.copytree(ROOT, copy, ignore=lambda folder, names: kept_out(folder, names) if folder == str(ROOT) else [])

    def git(*words):
        return subprocess.run(["git", "-C", copy, *words], check=True, capture_output=True, text=True).stdout

    git("init", "--quiet"), git("add", "--all")
    before = git("status", "--porcelain")
    for module in (flags, runtime):
        monkeypatch.setattr(module, "ROOT", copy)
    train.main(train.parse_args([*TINY, "--epochs", "1", "--data-dir", str(market_dir)]))
    (file,) = copy.rglob("runs/aff_scl/market/custom-*/seed0.json")
    capsys.readouterr()
    assert render.main([], copy) == 0 and compare.main([], copy) == 0
    assert (
        f"aff_scl {file.parent.name} on market, other data (72 images, 12 people), mAP: here "
        in capsys.readouterr().out
    )
    assert reproduce.main(["aff_scl/demo", "--dry-run"], copy) == 0
    assert git("status", "--porcelain") == before


# --------------------------------------------------------------------------------------------------------- the sentence


def test_a_run_within_the_spread_is_told_with_seeds_and_machines(root, capsys):
    recorded(root, 0.78, 0.79, 0.80)
    made_here(root, seed=0, metrics={"mAP": 0.81}, env=ENV | {"threads": 1})
    assert said(root, capsys, "fake/table2/market") == (
        "fake table2/market on market, mAP: recorded 79.0, the mean of 3 seeds from 78.0 to 80.0 (on Xeon, 2 threads); "
        "here 81.0 (seed 0, Xeon, 1 thread): within the spread of 74.0 to 84.0, where 95 of 100 further runs are "
        "expected\n"
    )


def test_a_run_outside_the_spread_is_no_failure_and_says_what_to_look_for(root, capsys):
    recorded(root, 0.78, 0.79, 0.80)
    made_here(root, metrics={"mAP": 0.73})
    (line,) = said(root, capsys).splitlines()
    assert "here 73.0" in line and ": outside the spread of 74.0 to 84.0" in line
    assert "threads" in line and "processor" in line and line.endswith("look for changed code (git status)")


@pytest.mark.parametrize("values, told", [([0.78], "no spread from 1 seed"), ([0.78, 0.8], "no spread from 2 seeds")])
def test_one_or_two_recorded_seeds_are_no_spread(root, capsys, values, told):
    recorded(root, *values)
    made_here(root, metrics={"mAP": 0.1})
    assert said(root, capsys).endswith(f"{told}\n")


def test_what_cannot_be_compared_is_told(root, capsys):
    made_here(root)
    assert said(root, capsys).endswith("nothing is recorded for it\n")
    recorded(root, 0.78, 0.79, 0.80, args__lr=0.3)
    assert said(root, capsys).endswith("what is recorded is no measure for it: --lr 0.3 there, 0.1 here\n")
    recorded(root, 0.78, 0.79, 0.80, data__digest="other")
    assert said(root, capsys).endswith("it comes from other images\n")
    assert said(root, capsys, "fake/extra") == f"no run of fake/extra in {root / flags.RUNS}\n"
    assert compare.main(["fake/nothing"], root) == 1


def test_rendered_people_are_compared_by_their_renderer_not_by_their_bytes(root, capsys):
    small = {"data": "market-synthetic-small"}
    recorded(root, 0.5, 0.5, 0.5, data__rendered={"version": 4}, data__digest="a", **small)
    made_here(root, metrics={"mAP": 0.5}, data__rendered={"version": 4}, data__digest="b", **small)
    assert ": within the spread" in said(root, capsys)
    made_here(root, metrics={"mAP": 0.5}, data__rendered={"version": 5}, data__digest="a", **small)
    assert "it comes from other images" in said(root, capsys)


def test_the_spread_holds_95_of_100_further_values():
    draw = np.random.default_rng(0)
    for n in (3, 6):
        known, further = draw.normal(50, 4, (4000, n)), draw.normal(50, 4, 4000)
        inside = [low <= value <= high for value, (low, high) in zip(further, map(compare.spread, known.tolist()))]
        assert np.mean(inside) == pytest.approx(0.95, abs=0.012)


def test_the_number_of_a_run_is_its_plainest_mAP_or_its_loss():
    assert compare.headline({"mINP": 0, "mAP": 0, "before.mAP": 0, "histogram.mAP": 0}) == "mAP"
    assert compare.headline({"bn.all.mAP": 0, "all.mAP": 0, "all_c.mAP": 0}) == "all.mAP"
    assert compare.headline({"best_loss": 0, "loss": 0}) == "loss" and compare.headline({"b": 0, "a": 0}) == "a"


def test_the_demo_is_recorded_with_a_spread_above_its_start():
    """What `make demo` says at its end: five seeds or more, all far above the untrained network and above colours."""
    runs = [r for r in schema.read_all(ROOT, "aff_scl") if r.row == "demo"]
    assert len(runs) >= 5 and not any(compare.unlike(runs[-1], r) for r in runs)
    assert all(r.metrics["mAP"] > 2 * r.metrics["before.mAP"] for r in runs)
    assert all(r.metrics["mAP"] > r.metrics["histogram.mAP"] for r in runs)
    assert json.loads(runs[-1].path.read_text())["git"]["dirty"] is False
