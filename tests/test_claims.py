"""results/claims.py: verdicts equal hand-computed ones, and a claim that cannot be tested is refused, not guessed."""

import json
import math

import pytest
from miniature import result

from results import claims, curves, page, render, tables
from results.claims import FAILS, HOLDS, MISSING, OPEN, Side
from results.tables import Cell
from tests.test_results_page import Reader, numbers

ROWS = "rows: {table2/market: table2/market, extra: 0.7}"
CLAIM = f"high: {{claim: A is above B., where: Table 2, metric: mAP, {ROWS}}}"


def write(root, text=CLAIM):
    (root / "fake" / "claims.yaml").write_text(text)


def runs(root, row, values, **changes):
    for seed, value in enumerate(values):
        result(root, row=row, seed=seed, metrics={"mAP": value, "rank1": 0.9}, **changes)


def found(root, name=None):
    """The only claim, or that of the name."""
    listed = claims.load(root, tables.load(root, "fake"))
    return next(claim for claim in listed if name in (None, claim.name))


def side(value, std=None, n=1, **more):
    return Side("x", Cell(value, std, n), **more)


# --------------------------------------------------------------------------------------------------------- arithmetic


def test_the_error_of_a_difference_is_welchs():
    """By hand: s = 0.03 over 3 and 0.04 over 4 give sqrt(0.0003 + 0.0004)."""
    made = claims.difference(side(0.6, 0.03, 3), side(0.5, 0.04, 4))
    assert made.value == pytest.approx(0.1) and made.error == pytest.approx(math.sqrt(0.0007))


@pytest.mark.parametrize(
    "a, b, verdict",
    [
        ((0.70, 0.03, 3), (0.60, 0.03, 3), HOLDS),  # 0.10 > 2 * 0.0245
        ((0.64, 0.03, 3), (0.60, 0.03, 3), OPEN),  # 0.04 < 0.049
        ((0.56, 0.03, 3), (0.60, 0.03, 3), OPEN),
        ((0.50, 0.03, 3), (0.60, 0.03, 3), FAILS),
        ((0.64, 0.03, 12), (0.60, 0.03, 12), HOLDS),  # the same difference with more seeds: 0.04 > 0.0245
        ((0.9, None, 1), (0.1, 0.01, 3), OPEN),  # n = 1 has no deviation, however large the difference
        ((0.9, 0.01, 3), (0.1, None, 1), OPEN),
        ((0.9, 0.01, 2), (0.1, 0.01, 3), OPEN),  # nor do two seeds make a spread
        ((0.61, 0.0, 3), (0.60, 0.0, 3), OPEN),  # nor do equal runs, which say nothing about others
    ],
)
def test_two_standard_errors_decide(a, b, verdict):
    assert claims.verdict_of([claims.difference(side(*a), side(*b))]) == verdict


def test_all_differences_must_be_above_and_one_below_or_missing_is_enough():
    up, down, near = claims.Difference(0.1, 0.01), claims.Difference(-0.1, 0.01), claims.Difference(0.01, 0.01)
    assert claims.verdict_of([up, up]) == HOLDS and claims.verdict_of([up, near]) == OPEN
    assert claims.verdict_of([up, near, down]) == FAILS and claims.verdict_of([up, down, None]) == MISSING


def test_a_factor_multiplies_the_mean_and_its_error_and_an_exact_baseline_has_none():
    made = claims.difference(side(0.5, 0.02, 4), side(0.1, 0.02, 4, times=4))
    assert made.value == pytest.approx(0.1) and made.error == pytest.approx(math.sqrt(0.0001 + 16 * 0.0001))
    exact = claims.difference(side(0.5, 0.02, 4), side(0.1, None, 1, times=4, exact=True))
    assert exact.error == pytest.approx(0.01)


# -------------------------------------------------------------------------------------------------- from files to pages


def test_a_claim_is_computed_from_the_files_of_its_rows(root):
    write(root)
    assert found(root).verdict == MISSING
    runs(root, "table2/market", [0.80, 0.82, 0.84])
    assert found(root).verdict == MISSING
    runs(root, "extra", [0.70])
    one = found(root)
    assert one.verdict == OPEN and one.n == 1 and one.differences[0].value == pytest.approx(0.12)
    runs(root, "extra", [0.70, 0.74])
    assert found(root).verdict == OPEN and found(root).n == 2
    runs(root, "extra", [0.70, 0.74, 0.72])
    three = found(root)
    assert three.verdict == HOLDS and three.n == 3
    assert three.differences[0].error == pytest.approx(math.sqrt(0.0004 / 3 + 0.0004 / 3))
    runs(root, "extra", [0.90, 0.94, 0.92])
    assert found(root).verdict == FAILS


def test_an_order_compares_neighbours_and_best_the_first_with_all(root):
    rows = "rows: {table2/market: , extra: , table2/duke: }"
    write(root, "\n".join(f"{t}: {{claim: c, where: w, metric: mAP, {rows}, test: {t}}}" for t in ("order", "best")))
    runs(root, "table2/market", [0.80, 0.81, 0.82])
    runs(root, "extra", [0.50, 0.51, 0.52])
    runs(root, "table2/duke", [0.60, 0.61, 0.62], args__dataset="duke")
    assert found(root, "best").verdict == HOLDS and found(root, "order").verdict == FAILS


def test_runs_with_other_flags_or_of_another_size_say_nothing(root):
    write(root)
    runs(root, "table2/market", [0.80, 0.82], args__lr=0.3)
    runs(root, "extra", [0.70, 0.72])
    assert found(root).verdict == MISSING
    runs(root, "table2/market", [0.80, 0.82], data="market-synthetic-small")
    assert found(root).verdict == MISSING


def test_runs_on_data_of_the_users_own_say_nothing(root):
    write(root)
    runs(root, "table2/market", [0.80, 0.82, 0.84], data__published=False)
    runs(root, "extra", [0.70, 0.74, 0.72])
    assert found(root).verdict == MISSING


def test_the_papers_numbers_come_from_its_rows(root):
    write(root)
    assert [s.paper.value for s in found(root).sides] == [0.788, 0.7]


def test_the_untrained_network_and_histograms_of_the_same_results_are_baselines(root):
    write(root, "x: {claim: It learns., metric: mAP, rows: {extra: }, above: {untrained: 1, histogram: 1}}")
    for seed, (value, before) in enumerate(((0.48, 0.10), (0.51, 0.13), (0.54, 0.16))):
        result(root, row="extra", seed=seed, metrics={"mAP": value, "before.mAP": before, "histogram.mAP": 0.45})
    claim = found(root)
    untrained, colours = claim.differences
    assert untrained.value == pytest.approx(0.38) and untrained.error == pytest.approx(math.sqrt(0.0003 + 0.0003))
    assert colours == (pytest.approx(0.06), pytest.approx(math.sqrt(0.0003)))
    assert claim.verdict == HOLDS and not claim.of_paper
    assert claims.count([claim])[HOLDS] == 1


def record_baseline(root, row, metrics, **changes):
    """A file as results/baselines.py writes them."""
    path = result(root, row=row, **changes)
    content = json.loads(path.read_text()) | {"metrics": metrics, "epoch": None}
    target = root / "results" / "baselines" / path.relative_to(root / "results")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content))
    path.unlink()


def test_recorded_baselines_serve_rows_whose_results_hold_none(root, capsys):
    write(root, "x: {claim: It learns., metric: rank1, rows: {extra: }, above: {chance: 4}}")
    record_baseline(root, "extra", {"chance.rank1": 0.02})
    assert found(root).verdict == MISSING
    for seed, rank1 in enumerate((0.10, 0.11, 0.12)):
        result(root, row="extra", seed=seed, metrics={"rank1": rank1})
    claim = found(root)
    assert claim.verdict == HOLDS and claim.differences[0] == (pytest.approx(0.03), pytest.approx(0.01 / math.sqrt(3)))
    assert render.main(["--record"], root) == 0
    shown = (root / "results" / "README.md").read_text()
    assert (
        "chance 4 × [2.0](baselines/fake/market/extra/seed0.json)" in shown and "**holds**: +3.0 (needs 1.2)" in shown
    )
    record_baseline(root, "extra", {"chance.rank1": 0.02}, data__digest="other")
    result(root, row="extra", metrics={"rank1": 0.10})
    assert render.main(["--record"], root) == 1
    assert "measured on other data than the runs of fake/extra" in capsys.readouterr().err


def test_a_baseline_of_another_network_than_the_rows_is_refused_and_one_of_another_training_is_not(root, capsys):
    write(root, "x: {claim: It learns., metric: rank1, rows: {extra: }, above: {chance: 4}}")
    record_baseline(root, "extra", {"chance.rank1": 0.02}, args__lr=7)
    assert found(root).verdict == MISSING
    record_baseline(root, "extra", {"chance.rank1": 0.02}, args__dataset="duke")
    assert render.main(["--record"], root) == 1
    assert (
        "measured with other flags, --dataset duke (row: market), than those of fake/extra" in capsys.readouterr().err
    )


def test_another_row_of_ours_may_be_what_a_row_is_above(root):
    write(root, "x: {claim: c, metric: mAP, rows: {table2/market: }, above: {extra: 1}}")
    runs(root, "table2/market", [0.80, 0.82, 0.84])
    runs(root, "extra", [0.70, 0.72, 0.74])
    assert found(root).verdict == HOLDS and not found(root).of_paper


FAULTS = {
    "row 'gone' is not in experiments.yaml": "{claim: c, where: w, metric: mAP, rows: {gone: , extra: }}",
    "row 'nowhere' is not in experiments.yaml": "{claim: c, where: w, metric: mAP, rows: {extra: nowhere, demo: }}",
    "the paper prints no rank5 for row 'table2/market', only mAP, rank1": (
        "{claim: c, where: w, metric: rank5, rows: {table2/duke: table2/market, demo: }}"
    ),
    "seed0.json has no metric 'map'; it has mAP, rank1": "{claim: c, where: w, metric: map, rows: {extra: , demo: }}",
    "seed0.json has no metric 'x.mAP'; close: mAP": "{claim: c, where: w, metric: x.mAP, rows: {extra: , demo: }}",
    "at least two rows": "{claim: c, where: w, metric: mAP, rows: {extra: }}",
    "with `above`, one row": "{claim: c, metric: mAP, rows: {extra: , demo: }, above: {chance: 4}}",
    "above 'luck': 1: expected untrained, histogram, gradients, chance or a row": (
        "{claim: c, metric: mAP, rows: {extra: }, above: {luck: 1}}"
    ),
    "above 'chance': 0": "{claim: c, metric: mAP, rows: {extra: }, above: {chance: 0}}",
    "test 'worst' is none of order, best": "{claim: c, where: w, metric: mAP, rows: {extra: , demo: }, test: worst}",
    "says not where the paper makes the claim": "{claim: c, metric: mAP, rows: {extra: , demo: }}",
    "unknown key 'verdict'": "{claim: c, where: w, metric: mAP, rows: {extra: , demo: }, verdict: holds}",
    "no 'metric'": "{claim: c, where: w, rows: {extra: , demo: }}",
    "mAP 70 is not a number in the units": "{claim: c, where: w, metric: mAP, rows: {extra: 70, demo: }}",
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_faulty_claim_is_refused_in_one_sentence(root, capsys, message):
    result(root, row="extra")
    write(root, f"first: {FAULTS[message]}")
    assert render.main(["--record"], root) == 1
    said = capsys.readouterr().err
    assert message in said and "claims.yaml: first" in said and len(said.splitlines()) == 1


UNLIKE = {
    "set of images": {"data__digest": "other"},
    "protocol": {"protocol": {"dataset": "market", "re_ranking": True}},
    "epoch (30)": {"epoch": 30},
    "workers (9)": {"args__workers": 9},
}


@pytest.mark.parametrize("what", UNLIKE)
def test_runs_that_differ_in_what_a_claim_holds_equal_are_not_compared(root, capsys, what):
    write(root, CLAIM.replace("{claim", "{equal: [epoch, workers], claim", 1))
    runs(root, "table2/market", [0.8]), runs(root, "extra", [0.7])
    assert render.main(["--record"], root) == 0
    runs(root, "extra", [0.7], **UNLIKE[what])
    capsys.readouterr()
    assert render.main(["--record"], root) == 1
    assert f"whose {what} is not that of" in capsys.readouterr().err


def test_a_flag_that_no_result_records_cannot_be_equal(root, capsys):
    write(root, CLAIM.replace("{claim", "{equal: [step], claim", 1))
    runs(root, "table2/market", [0.8]), runs(root, "extra", [0.7])
    assert render.main(["--record"], root) == 1
    assert "'step' is neither epoch nor a flag" in capsys.readouterr().err


def test_claims_open_the_readmes_and_the_page_and_are_counted(root):
    (root / "fake" / "README.md").write_text(
        "# Fake\n\n<!-- results -->\n<!-- /results -->\n\n<!-- results claims -->\n<!-- /results -->\n"
    )
    write(root, CLAIM + "\nopen: {claim: a | b, where: Table 3, metric: rank1, rows: {extra: , demo: }, note: Beware.}")
    runs(root, "table2/market", [0.80, 0.82, 0.84]), runs(root, "extra", [0.70, 0.72, 0.74])
    assert render.main(["--record"], root) == 0
    listing = (root / "results" / "README.md").read_text()
    line = (
        "| A is above B. | Table 2 | mAP | 78.8; 70.0 | table2/market [82.0 ± 2.0](fake/market/table2/market) (n=3); "
        "extra [72.0 ± 2.0](fake/market/extra) (n=3) | **holds**: +10.0 (needs 3.3) |"
    )
    assert line in listing and "| fake | 2 | 1 | 0 | 0 | 1 | – |" in listing
    assert "| a \\| b | Table 3 | rank1 | –; – | extra [90.0" in listing and "**not run**: demo |" in listing
    assert (
        listing.index("| fake | 2 |") < listing.index("## fake") < listing.index(line) < listing.index("### Table 2.")
    )
    readme = (root / "fake" / "README.md").read_text()
    assert readme.count("**holds**: +10.0 (needs 3.3)") == 2 and readme.count("### Table 2. Unsupervised") == 1
    assert "](../results/fake/market/extra)" in readme and "- a | b Beware." in readme
    text = (root / "results" / page.NAME).read_text()
    reader = Reader(text)
    assert reader.faults == [] and text.index('<table class="counts">') < text.index('<dl class="key">')
    shown = " ".join(reader.words)
    assert [number for number in numbers(listing) if number not in shown] == []
    assert "holds" in reader.words and "Beware." in reader.words and "fake-claims" in text
    assert "What a verdict says" in listing and "What a verdict says" in text


def test_the_smallest_number_of_seeds_is_said_and_one_seed_shows_the_sign(root, capsys):
    write(root)
    runs(root, "table2/market", [0.80, 0.82, 0.84]), runs(root, "extra", [0.70])
    assert render.main(["--record"], root) == 0
    assert "**cannot be told at n=1**: +12.0 |" in (root / "results" / "README.md").read_text()
    assert "extra 70.0 (n=1)] cannot be told at n=1: +12.0" in capsys.readouterr().out


def test_without_claims_the_pages_say_nothing_of_them(root):
    assert render.main(["--record"], root) == 0
    assert "Claims of the papers" not in (root / "results" / "README.md").read_text()
    assert "What a verdict says" not in (root / "results" / page.NAME).read_text()


# ------------------------------------------------------------------------------------------------------ curves by epoch


def log(path, values):
    lines = [{"epoch": epoch + 1, "mAP": value} for epoch, value in enumerate(values)]
    path.with_suffix(".log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_table_draws_its_rows_over_the_epochs_in_the_place_of_their_own_pictures(root):
    layout = root / "fake" / "tables.yaml"
    layout.write_text(
        layout.read_text().replace("  title: Unsupervised\n", "  title: Unsupervised\n  by_epoch: [mAP]\n")
    )
    log(result(root), [0.2, 0.4]), log(result(root, seed=1), [0.4, 0.5, 0.9])
    log(result(root, row="demo", data="market-synthetic-small"), [0.1, 0.2])
    ((name, (curve,)),) = tables_panels(root).items()
    assert name == "mAP (%)" and curve.name == "Ours" and list(curve.x) == [1, 2]  # epochs that both seeds hold
    assert list(curve.y) == pytest.approx([30, 45]) and curve.error == pytest.approx([math.sqrt(200), math.sqrt(50)])
    assert render.main(["--record"], root) == 0
    pictures = {path.name for path in (root / "results" / "figures").iterdir()}
    assert pictures >= {"fake-table2-epochs.png", "fake-market-synthetic-small-demo.png"}
    assert "fake-market-table2_market.png" not in pictures
    assert "](figures/fake-table2-epochs.png)" in (root / "results" / "README.md").read_text()
    text = (root / "results" / page.NAME).read_text()
    assert text.count('class="band"') == 1 and "<summary>table2/market" not in text and "<summary>demo" in text


def tables_panels(root):
    return curves.epoch_panels(next(t for t in tables.load(root, "fake").tables if t.id == "table2"), "")
