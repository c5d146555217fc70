"""results/cost.py: a plan says what each run takes, from recorded wall times, and what nobody knows."""

import json
import re

import pytest

from results import cost, reproduce
from tests.test_reproduce import root  # noqa: F401 the miniature repository


def recorded(root, row, seed, wall_s, *where, folder="results", **args):  # noqa: F811
    """A result of a run that took wall_s seconds."""
    assert reproduce.main([f"fake/{row}", *(where or ["--record"]), "--seeds", str(seed)], root) == 0
    path = root / folder / "fake" / "market" / row / f"seed{seed}.json"
    content = json.loads(path.read_text()) | {"wall_s": wall_s}
    path.write_text(json.dumps(content | {"args": content["args"] | args}))


def planned(root, capsys, *words, where=("--record",)):  # noqa: F811
    capsys.readouterr()
    assert reproduce.main([*words, *where, "--dry-run"], root) == 0
    said = capsys.readouterr().out
    lines = re.findall(r"^  (\w+) +fake/(\S+) seed (\d)(?: \(.*\))?  (.*)$", said, re.MULTILINE)
    return {f"{row}:{seed}": f"{status}, {text}" for status, row, seed, text in lines}, said.splitlines()[-1]


def test_a_run_costs_its_own_time_then_its_other_seeds_then_its_nearest_rows(root, capsys):  # noqa: F811
    (
        recorded(root, "table4/mean", 0, 600),
        recorded(root, "table4/mean", 1, 1200),
        recorded(root, "table2/market", 0, 60),
    )
    found, last = planned(
        root, capsys, "fake/table4/mean", "fake/table4/hard", "fake/table40", "--seeds", "0", "1", "2"
    )
    assert found["table4/mean:0"] == "done, took 10 min" and found["table4/mean:1"] == "done, took 20 min"
    assert found["table4/mean:2"] == "new, about 15 min, as its other seeds"
    assert found["table4/hard:2"] == "new, about 15 min, as table4/mean"
    assert found["table40:0"] == "new, about 10 min, as table2/market and 1 more"  # no folder in common: all alike
    # 15 + 3 x 15 + 10.3 (needed: pretrain, once) + 3 x 10.3 min
    assert last == "done: 2, 30 min; to do: 8, about 1.7 h"


def test_other_sizes_and_stages_say_nothing(root, capsys):  # noqa: F811
    recorded(root, "table4/mean", 0, 600)
    found, last = planned(root, capsys, "fake/table4/mean", "--synthetic", "medium")
    assert found == {"table4/mean:0": "new, cost unknown"}
    assert last == "done: 0, 0 s; to do: 1, 1 of unknown cost"
    assert planned(root, capsys, "fake/table2/market")[0] == {"table2/market:0": "new, about 10 min, as table4/mean"}
    experiments = root / "fake" / "experiments.yaml"
    experiments.write_text(experiments.read_text().replace("--lr 0.5", "--lr 0.5 --mode uda", 1))
    recorded(root, "table4/mean", 0, 600, mode="uda")
    assert planned(root, capsys, "fake/table2/market")[0] == {"table2/market:0": "new, cost unknown"}


def test_a_run_made_here_costs_its_own_time_and_the_recorded_one_only_where_there_is_none(root, capsys):  # noqa: F811
    recorded(root, "table4/mean", 0, 600)
    recorded(root, "table4/mean", 0, 1200, "--results-dir", str(root / "runs"), folder="runs")
    assert planned(root, capsys, "fake/table4/mean", where=())[0] == {"table4/mean:0": "done, took 20 min"}
    other = planned(root, capsys, "fake/table4/mean", where=("--results-dir", str(root / "other")))
    assert other[0] == {"table4/mean:0": "new, took 10 min"}


def test_a_result_of_a_row_that_has_changed_says_nothing_of_its_cost(root, capsys):  # noqa: F811
    recorded(root, "table4/mean", 0, 600, lr=0.4)
    assert planned(root, capsys, "fake/table4/mean")[0] == {"table4/mean:0": "new, cost unknown"}


def test_what_is_unknown_is_counted(root, capsys):  # noqa: F811
    experiments = root / "fake" / "experiments.yaml"
    experiments.write_text(experiments.read_text() + 'other: {args: "--mode other"}\n')
    recorded(root, "table4/mean", 0, 80)
    found, last = planned(root, capsys, "fake/table4/mean", "fake/other", "--seeds", "0", "1")
    assert found["other:0"] == "new, cost unknown"
    assert last == "done: 1, 80 s; to do: 3, about 80 s and 2 of unknown cost"


def test_a_glob_may_name_the_project(root, capsys):  # noqa: F811
    assert set(planned(root, capsys, "*/table4/*")[0]) == {"table4/mean:0", "table4/hard:0", "pretrain:0"}
    assert reproduce.main(["*/gone/*"], root) == 2


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")]
)
def test_durations_read_in_seconds_minutes_and_hours(seconds, text):
    assert cost.duration(seconds) == text
