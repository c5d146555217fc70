"""results/render.py: what result files may hold, what a table may show, and that pages equal the files."""

import json
import shutil

import pytest

from results import render, schema, tables

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


@pytest.fixture()
def root(tmp_path):
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


def table(root, name="table2"):
    return next(t for t in tables.load(root, "fake").tables if t.id == name)


def markdown(root, name="table2"):
    return render.table_markdown(table(root, name), root / "results", root)


def line_of(text, start):
    """The cells of the markdown lines from the one that starts with `start` to the next named one."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    first = next(i for i, cells in enumerate(lines) if cells[0].startswith(start))
    last = next((i for i in range(first + 1, len(lines)) if lines[i][0]), len(lines))
    return lines[first:last]


# ------------------------------------------------------------------------------------------------------ what is shown


def test_without_a_file_there_is_no_number(root):
    paper, ours = line_of(markdown(root), "Ours")
    assert paper == ["Ours [1]", "paper", "78.8", "90.9", "68.6", "82.4"]
    assert ours == ["", "ours", "–", "–", "–", "–"]


def test_cited_numbers_are_per_cent_and_missing_ones_dashes(root):
    assert line_of(markdown(root), "SSL") == [["SSL (2020)", "cited", "37.8", "71.7", "28.6", "–"]]


def test_printed_numbers_keep_the_decimals_that_stand_in_the_file(root):
    for name, old, new in (("tables", "0.378, 0.717", "0.1879, 0.5400"), ("experiments", "0.788", "0.7880")):
        path = root / "fake" / f"{name}.yaml"
        path.write_text(path.read_text().replace(old, new))
    result(root)
    assert line_of(markdown(root), "SSL") == [["SSL (2020)", "cited", "18.79", "54.00", "28.6", "–"]]
    assert [line[2] for line in line_of(markdown(root), "Ours")][0] == "78.80"
    assert "[79.1](" in line_of(markdown(root), "Ours")[1][2]  # ours as the column has it
    assert line_of(markdown(root, "table8"), "MGN")[0][2] == "74.38"  # 74.38e+6, in millions


def test_mean_and_sample_std_over_seeds_and_difference_to_the_paper(root):
    for seed, value in enumerate((0.79, 0.80, 0.78)):
        result(root, seed=seed, metrics={"mAP": value, "rank1": 0.9})
    paper, ours, difference = line_of(markdown(root), "Ours")
    assert ours[2] == "[79.0 ± 1.0](fake/market/table2/market) (n=3)"
    assert difference == ["", "difference", "+0.2", "−0.9", "–", "–"]


def test_a_single_run_is_marked_and_links_to_its_file(root):
    result(root)
    assert line_of(markdown(root), "Ours")[1][2] == "[79.1](fake/market/table2/market/seed0.json) (n=1)"


def test_best_on_test_is_marked(root):
    result(root, selection="best_on_test")
    assert line_of(markdown(root), "Ours")[1][2].endswith("(n=1, best on test)")


def test_every_number_of_ours_links_to_an_existing_file(root):
    (
        result(root),
        result(root, row="extra"),
        result(root, data="market-synthetic-small"),
        result(root, row="demo", data="market-synthetic-small"),
    )
    text = render.as_markdown(tables.load(root, "fake"), root / "results", root)
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert len(links) >= 7
    assert all((root / "results" / link).exists() or link.startswith("figures/") for link in links)


def test_synthetic_data_never_fill_a_paper_or_real_cell(root):
    result(root, data="market-synthetic-small", metrics={"mAP": 0.4321, "rank1": 0.5})
    text = markdown(root)
    before, after = text.split("#### Table 2. Unsupervised: synthetic small, not the real data set\n")
    assert "43.2" not in before and line_of(before, "Ours")[1][2] == "–"
    assert line_of(after, "Ours") == [
        [
            "Ours [1]",
            "[43.2](fake/market-synthetic-small/table2/market/seed0.json) (n=1)",
            "[50.0](fake/market-synthetic-small/table2/market/seed0.json) (n=1)",
            "–",
            "–",
        ]
    ]


def test_sizes_of_synthetic_data_are_not_mixed(root):
    (
        result(root, data="market-synthetic-small", metrics={"mAP": 0.4}),
        result(root, data="market-synthetic-full", seed=1, metrics={"mAP": 0.6}),
    )
    found = table(root)
    assert found.sizes == ["small", "full"]
    assert [found.lines[1].synthetic[size][0].value for size in found.sizes] == [0.4, 0.6]


def test_real_runs_with_other_flags_fill_no_cell_and_are_listed_with_them(root):
    result(root, args__lr=0.3)
    assert line_of(markdown(root), "Ours")[1][2] == "–"
    listed = render.as_markdown(tables.load(root, "fake"), root / "results", root).split("### Other runs")[1]
    assert "--lr 0.3 (row: 0.1)" in listed and "mAP 79.1" in listed


def test_flags_that_only_say_where_and_how_to_run_do_not_count(root):
    result(root, args__workers=99, args__data_dir="/elsewhere", args__a_flag_of_the_future=1)
    assert table(root).lines[1].real[0].value == 0.7912


def test_synthetic_runs_with_other_flags_carry_an_asterisk(root):
    result(root, data="market-synthetic-small", args__lr=0.3)
    text = markdown(root)
    assert r"\* (n=1)" in text and "* Ours: --lr 0.3 (row: 0.1)" in text


def test_a_metric_that_a_table_wants_and_a_file_lacks_is_a_dash_and_a_warning(root, capsys):
    path = result(root, metrics={"mAP": 0.7})
    assert [cells[3] for cells in line_of(markdown(root), "Ours")[:2]] == ["90.9", "–"]
    assert render.main(["--record"], root) == 0
    assert f"{path} has no metric rank1, which table2 shows" in capsys.readouterr().err


def test_an_optional_metric_may_be_missing_without_a_warning(root, capsys):
    layout = root / "fake" / "tables.yaml"
    layout.write_text(LAYOUT.replace("[mAP, rank1], Duke", "[mAP, {metric: rank1, optional: true}], Duke"))
    result(root, metrics={"mAP": 0.7})
    assert render.main(["--record"], root) == 0
    assert "has no metric" not in capsys.readouterr().err


def test_a_table_of_synthetic_runs_alone_has_no_table_of_dashes(root):
    layout = root / "fake" / "tables.yaml"
    layout.write_text(LAYOUT + "small: {title: Small, columns: {M: [mAP]}, lines: [{name: Demo, rows: demo}]}")
    assert markdown(root, "small").count("| Demo |") == 1  # nothing was run: a dash
    result(root, row="demo", data="market-synthetic-small")
    assert markdown(root, "small").count("| Demo |") == 1 and "79.1" in markdown(root, "small")
    result(root, row="demo")
    assert markdown(root, "small").count("| Demo |") == 2


def test_rows_outside_all_tables_are_listed(root):
    result(root, row="demo", data="market-synthetic-small"), result(root, row="custom-1a2b")
    _, real, synthetic = render.as_markdown(tables.load(root, "fake"), root / "results", root).split("### Other runs")
    assert "| custom-1a2b | market | 0 |" in real and "demo" not in real
    assert "synthetic small, not the real data set" in synthetic and "custom" not in synthetic
    assert "| demo | market-synthetic-small | 0 |" in synthetic


def test_counts_are_scaled_and_a_metric_can_be_given_a_heading(root):
    result(
        root, row="complexity", data="no-data", metrics={"params": 26699938, "memory_mb": 186.4}, epoch=None, args={}
    )
    text = markdown(root, "table8")
    assert "| Method |  | Params (M) | MB |" in text
    assert line_of(text, "MGN") == [["MGN", "measured by the authors", "74.38", "180"]]
    assert [cells[2].split("]")[0] for cells in line_of(text, "Ours")] == ["26.70", "[26.70", "0.00"]


def test_a_text_table_needs_no_numbers(root):
    assert "| Market-1501 | 32,668 |" in markdown(root, "table1")


def test_a_sweep_is_a_table_by_x_and_a_picture(root):
    result(root), result(root, row="extra"), result(root, data="market-synthetic-small")
    assert render.main(["--record"], root) == 0
    assert [line.name for line in table(root, "figure4").lines] == ["0.5", "0.65"]
    assert "](figures/fake-figure4.png)" in (root / "results" / "README.md").read_text()
    for name in ("fake-figure4.png", "fake-figure4-synthetic-small.png"):
        assert (root / "results" / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_training_curves_are_drawn_from_the_log(root):
    log = result(root).with_suffix(".log.jsonl")
    log.write_text('{"epoch": 1, "loss": 2.5}\n{"epoch": 2, "loss": 1.5, "mAP": 0.4}\n')
    assert render.main(["--record"], root) == 0
    assert (root / "results" / "figures" / "fake-market-table2_market.png").is_file()
    log.write_text('{"epoch": 1, "lo')
    assert render.main(["--record"], root) == 1


# ---------------------------------------------------------------------------------------------------- what is refused

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
    cell = table(root).lines[1].real[0]
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


# -------------------------------------------------------------------------------------------------------------- pages


def test_check_fails_until_the_pages_equal_the_files(root, capsys):
    readme = root / "fake" / "README.md"
    readme.write_text("# Fake\n\n<!-- results table2 -->\nold numbers\n<!-- /results -->\n\nend\n")
    assert render.main(["--check"], root) == 1
    assert "fake/README.md differs" in capsys.readouterr().err and "old numbers" in readme.read_text()
    assert render.main(["--record"], root) == 0 and render.main(["--check"], root) == 0
    text = readme.read_text()
    assert (
        "Table 2. Unsupervised" in text
        and "Table 8" not in text
        and "old numbers" not in text
        and text.endswith("\nend\n")
    )
    result(root)
    assert render.main(["--check"], root) == 1
    assert render.main(["--record"], root) == 0
    assert "](../results/fake/market/table2/market/seed0.json)" in readme.read_text()
    readme.write_text(readme.read_text().replace("79.1", "80.1"))
    assert render.main(["--check"], root) == 1


def test_check_writes_nothing(root):
    before = sorted(root.rglob("*"))
    render.main(["--check"], root)
    assert [path for path in sorted(root.rglob("*")) if path not in before and "__pycache__" not in str(path)] == []


def test_an_open_block_or_an_unknown_table_in_a_readme_is_refused(root, capsys):
    for text in ("<!-- results -->\nno end\n", "<!-- results table99 -->\n<!-- /results -->\n"):
        (root / "fake" / "README.md").write_text(text)
        assert render.main(["--record"], root) == 1
        assert "README.md" in capsys.readouterr().err


def test_the_front_page_shows_tables_by_project(root):
    (root / "README.md").write_text("<!-- results fake/table2 -->\n<!-- /results -->\n")
    result(root)
    assert render.main(["--record"], root) == 0
    assert "](results/fake/market/table2/market/seed0.json)" in (root / "README.md").read_text()


def test_the_terminal_shows_the_same_numbers_without_links(root, capsys):
    result(root)
    assert render.main(["fake"], root) == 0
    said = capsys.readouterr().out
    assert "79.1 (n=1)" in said and "](" not in said
    assert render.main(["nobody"], root) == 1


def test_retrieval_metrics_are_recognised_under_any_prefix():
    assert all(map(schema.is_retrieval, ["mAP", "rank1", "rank20", "mINP", "rerank.mAP", "before.rank1"]))
    assert not any(map(schema.is_retrieval, ["params", "ranking", "mAP_std", "loss"]))


def test_seeds_rendered_on_two_machines_are_averaged_although_their_jpegs_differ_by_bytes(root):
    small = {"data": "market-synthetic-small", "data__rendered": {"size": "small", "seed": 0, "version": 4}}
    result(root, data__digest="a", **small), result(root, seed=1, data__digest="b", **small)
    assert tables.load(root, "fake").tables
    result(root, seed=2, data__digest="b", **{**small, "data__rendered": {"size": "small", "seed": 0, "version": 5}})
    with pytest.raises(schema.Refused, match="its set of images is not that of"):
        tables.load(root, "fake")
