"""Every row of every experiments.yaml can be run as it stands, and every table can be shown."""

from pathlib import Path

import pytest

from results import plan, schema, tables

ROOT = Path(__file__).resolve().parents[1]
ROWS = [(project, row) for project in schema.projects(ROOT) for row in schema.load_rows(ROOT, project)]


@pytest.mark.parametrize("project, row", ROWS)
def test_row_parses_through_its_script(project, row):
    spec = schema.load_rows(ROOT, project)[row]
    args = schema.row_args(ROOT, project, spec.get("script", "train.py"), ("--row", row, "--seed", "3"))
    assert args.row == row and args.seed == 3


@pytest.mark.parametrize("project, row", ROWS)
def test_the_papers_numbers_of_a_row_are_in_the_units_of_result_files(project, row):
    for metric, value in schema.load_rows(ROOT, project)[row].get("paper", {}).items():
        assert isinstance(value, (int, float)) and (0 < value <= 1 if schema.is_retrieval(metric) else value > 0), (
            metric
        )


@pytest.mark.parametrize("project", schema.projects(ROOT))
def test_no_two_rows_are_the_same_training(project):
    found = {}
    for row, spec in schema.load_rows(ROOT, project).items():
        script = spec.get("script", "train.py")
        args = vars(schema.row_args(ROOT, project, script, ("--row", row)))
        found.setdefault(
            repr((script, args.get("synthetic"), sorted(schema.method(args).items(), key=str))), []
        ).append(row)
    assert [rows for rows in found.values() if len(rows) > 1] == []


@pytest.mark.parametrize("project", schema.projects(ROOT))
def test_needs_exist_and_hold_no_circle(project):
    rows = {project: schema.load_rows(ROOT, project)}
    assert sorted(plan.in_order(rows, [(project, row) for row in rows[project]])) == sorted(
        (project, row) for row in rows[project]
    )


@pytest.mark.parametrize("project", schema.projects(ROOT))
def test_a_row_needs_the_rows_that_its_flags_name(project):
    """--weights row:NAME and --source row:NAME, also by default."""
    missing = {}
    for row, spec in schema.load_rows(ROOT, project).items():
        args = vars(schema.row_args(ROOT, project, spec.get("script", "train.py"), ("--row", row)))
        named = {value.removeprefix("row:") for value in args.values() if str(value).startswith("row:")}
        missing[row] = named - set(spec.get("needs", []))
    assert {row: names for row, names in missing.items() if names} == {}


def test_rows_of_dapg_run_in_two_processes_but_those_that_say_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    parse, refused = schema.parser_of(ROOT / "dapg", "train.py"), set()
    for row in (rows := schema.load_rows(ROOT, "dapg")):
        try:
            parse(["--row", row])
        except SystemExit:
            refused.add(row)
    assert refused == {row for row, spec in rows.items() if spec.get("processes") == 1} != set()


@pytest.mark.parametrize("project", schema.projects(ROOT))
def test_every_table_loads_and_every_number_of_the_paper_is_shown(project, tmp_path):
    loaded = tables.load(ROOT, project, tmp_path)
    layout = plan.table_rows(ROOT, project)
    shown = set().union(*layout.values()) if layout else set()
    with_paper = {row for row, spec in schema.load_rows(ROOT, project).items() if spec.get("paper")}
    assert len(loaded.tables) == len(layout)
    assert with_paper - shown == set()
