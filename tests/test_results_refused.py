"""results/render.py: what result files and layouts of tables may not hold."""

import json
import shutil

import pytest
from miniature import result

from results import render, tables

BROKEN = {
    "schema 2 is unknown": {"schema": 2},
    "lacks wall_s": {"wall_s": None},
    "lacks data.digest": {"data__digest": None},
    "seed has the wrong type": {"seed": "0"},
    "project is 'other' inside the file but 'fake' by its path": {"project": "other"},
    "row is 'table2/duke' inside the file but 'table2/market' by its path": {"row": "table2/duke"},
    "seed is 1 inside the file but 0 by its path": {"seed": 1},
    "the data are synthetic but the folder market is for real data": {"data__kind": "synthetic"},
    "written for data 'duke'": {"args__data_name": "duke"},
    "metric mAP is 78.8, outside [0, 1]": {"metrics": {"mAP": 78.8}},
    "metric cross.rank1 is -0.1, outside [0, 1]": {"metrics": {"cross.rank1": -0.1}},
    "metric mAP is nan": {"metrics": {"mAP": float("nan")}},
    "metric mAP is '0.5'": {"metrics": {"mAP": "0.5"}},
    "metric flops is inf": {"metrics": {"flops": float("inf")}},
    "holds no metrics": {"metrics": {}},
    "selection 'lucky' is none of": {"selection": "lucky"},
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_result_is_refused_with_its_name(root, capsys, message):
    path = result(root)
    content = json.loads(path.read_text())
    shutil.rmtree(root / "results" / "fake")
    for key, value in BROKEN[message].items():
        *way, last = key.split("__")
        inside = content[way[0]] if way else content
        inside[last] = value
        if value is None:
            del inside[last]
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    assert render.main(["--record"], root) == 1
    said = capsys.readouterr().err
    assert str(path) in said and message in said and len(said.splitlines()) == 1
    assert not (root / "results" / "README.md").exists()


def test_a_real_result_in_a_synthetic_folder_is_refused(root, capsys):
    result(root, data="market-synthetic-small", data__kind="real")
    assert render.main(["--record"], root) == 1
    assert "the data are real but the folder market-synthetic-small is for synthetic data" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"schema": 1, "proj', "[1]", "", "\x80"])
def test_a_half_written_or_foreign_file_is_refused(root, capsys, text):
    path = result(root)
    path.write_bytes(text.encode("latin-1"))
    assert render.main(["--record"], root) == 1
    assert str(path) in capsys.readouterr().err


def test_a_file_that_is_no_seed_and_a_row_that_does_not_exist_are_refused(root, capsys):
    path = result(root, row="table9/gone")
    assert render.main(["--record"], root) == 1
    assert "no row table9/gone" in capsys.readouterr().err
    path.rename(path.with_name("notes.json"))
    assert render.main(["--record"], root) == 1
    assert "result files are called" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"data__digest": "other"}, {"protocol": {"dataset": "market", "re_ranking": True}}])
def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(root, capsys, change):
    result(root), result(root, seed=1, **change)
    assert render.main(["--record"], root) == 1
    assert "may differ in the seed only" in capsys.readouterr().err


def test_a_split_that_goes_with_the_seed_is_no_other_protocol(root):
    """The ten splits of RegDB are ten seeds of one row."""
    for seed, mAP in enumerate((0.7, 0.8)):
        metrics = {"mAP": mAP, "rank1": 0.9}
        result(root, seed=seed, metrics=metrics, protocol={"dataset": "market", "split": seed + 1})
    cell = tables.load(root, "fake").tables[0].lines[1].real[0]
    assert cell.value == pytest.approx(0.75) and cell.n == 2


LAYOUT_FAULTS = {
    "unknown key 'colums'": "{title: t, colums: {}}",
    "no 'title'": "{columns: {}}",
    "row 'nowhere' is not in": "{title: t, columns: {M: [mAP]}, lines: [{name: a, rows: {M: nowhere}}]}",
    "unknown group 'D'": "{title: t, columns: {M: [mAP]}, lines: [{name: a, rows: {D: extra}}]}",
    "2 cited numbers for the 1 columns": "{title: t, columns: {M: [mAP]}, lines: [{name: a, cited: {M: [0.1, 0.2]}}]}",
    "mAP 78.8 is not a number in": "{title: t, columns: {M: [mAP]}, lines: [{name: a, cited: [78.8]}]}",
    "not from `cited`": "{title: t, columns: {M: [mAP]}, lines: [{name: a, rows: extra, cited: [0.8]}]}",
    "1 settings for 2 headings": "{title: t, columns: {}, settings: [a, b], lines: [{name: a, settings: [x]}]}",
    "no 'x'": "{title: t, metrics: [mAP], curves: [{name: M, points: {1: extra}}]}",
}


@pytest.mark.parametrize("message", LAYOUT_FAULTS)
def test_a_faulty_layout_is_refused_by_name(root, capsys, message):
    (root / "fake" / "tables.yaml").write_text(f"table2: {LAYOUT_FAULTS[message]}\n")
    assert render.main(["--record"], root) == 1
    said = capsys.readouterr().err
    assert message in said and "table2" in said
