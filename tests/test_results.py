"""results/render.py: what a table shows of result files, and that pages equal the files."""

import json

import pytest
from miniature import LAYOUT, result

from results import render, schema, tables


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


@pytest.mark.parametrize(
    "said, listed", [(False, "other data (9 images, 3 people)"), (None, "data that are not known")]
)
def test_real_runs_on_data_without_the_published_counts_fill_no_cell_and_are_listed(root, said, listed):
    result(root, data__published=said)
    assert line_of(markdown(root), "Ours")[1][2] == "–"
    others = render.as_markdown(tables.load(root, "fake"), root / "results", root).split("### Other runs")[1]
    assert listed in others and "mAP 79.1" in others


def test_data_sets_of_which_no_counts_are_published_and_measurements_without_data_fill_their_cells(root):
    path = result(root)
    content = json.loads(path.read_text())
    content["data"]["published"] = None
    path.write_text(json.dumps(content))
    result(root, data="duke", row="table2/duke", data__published=None, data__images=0)
    assert [cell.value for cell in table(root).lines[1].real[::2]] == [0.7912, 0.7912]


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
