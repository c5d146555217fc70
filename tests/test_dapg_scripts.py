"""dapg/run_tables.sh: which rows and seeds it runs, what a failed row ends, and the counts that the README gives."""

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
from test_docs import shell_calls

from results import plan, reproduce, schema

ROOT = Path(__file__).resolve().parents[1]
ONE, TEN = "--data-dir /data", "--data-dir /data --seeds 0 1 2 3 4 5 6 7 8 9"


def tables(*words, broken="", status=0) -> list[str]:
    """The calls of Python that `bash dapg/run_tables.sh /data WORD ..` makes until it ends with `status`, with which
    those for the pattern `broken` fail.
    """
    given = {"FAILS": f"dapg/{broken}", "CODE": str(status)}
    return [" ".join(call[1:]) for call in shell_calls(["dapg/run_tables.sh", "/data", *words], given, status)]


def calls(*patterns: str) -> list[str]:
    return [f"results/reproduce.py dapg/{pattern}" for pattern in patterns] + ["results/render.py dapg"]


@pytest.mark.parametrize(
    "words, patterns",
    [
        ([], [f"*/*/sysu {ONE}", f"table3/* {ONE}", f"*/*/regdb {TEN}"]),
        (["agw"], [f"agw/*/sysu {ONE}", f"agw/*/regdb {TEN}"]),
        (["cil/ours"], [f"cil/ours/sysu {ONE}", f"cil/ours/regdb {TEN}"]),
        (["agw/ours/"], [f"agw/ours/sysu {ONE}", f"agw/ours/regdb {TEN}"]),
        (["agw/ours/regdb"], [f"agw/ours/regdb {TEN}"]),
        (["agw/ours/sysu"], [f"agw/ours/sysu {ONE}"]),
        (["table3"], [f"table3 {ONE}"]),
        (["robust/dapg"], [f"robust/dapg {ONE}"]),
        (
            ["agw/in", "--gpus", "4", "--", "--cache", "off"],
            [f"agw/in/sysu {ONE} --gpus 4 -- --cache off", f"agw/in/regdb {TEN} --gpus 4 -- --cache off"],
        ),
    ],
)
def test_regdb_runs_with_the_ten_seeds_of_its_splits_and_all_else_with_one(words, patterns):
    assert tables(*words) == calls(*patterns)


def test_a_failed_row_ends_neither_the_later_tables_nor_the_report_but_shows_in_the_status():
    want = calls(f"*/*/sysu {ONE}", f"table3/* {ONE}", f"*/*/regdb {TEN}")
    assert tables(broken="table3/*", status=1) == want


def test_an_interrupt_ends_the_script():
    assert tables("agw", broken="agw/*/sysu", status=130) == calls(f"agw/*/sysu {ONE}")[:1]


@pytest.mark.parametrize(
    "command",
    [
        "bash dapg/run_tables.sh /data",
        "bash dapg/run_tables.sh /data agw/ours",
        "python results/reproduce.py dapg/table3 --data-dir /data",
        'python results/reproduce.py "dapg/extra/*" --data-dir /data',
    ],
)
def test_the_readme_counts_the_trainings_that_a_command_runs(command):
    page = (ROOT / "dapg/README.md").read_text(encoding="utf-8")
    (line,) = (line for line in page.splitlines() if f"| `{command}` |" in line)
    program, *words = shlex.split(command)
    made = [words] if program == "python" else [call.split() for call in tables(*words[2:])[:-1]]
    rows, found = {"dapg": schema.load_rows(ROOT, "dapg")}, set()
    for _, *flags in made:
        args = reproduce.parse_args(flags)
        chosen = [name for pattern in args.patterns for name in plan.matching(ROOT, rows, pattern)]
        for name in plan.in_order(rows, chosen):
            found |= {(name[1], seed) for seed in (args.seeds if name in chosen else [0])}
    count = Counter(re.search(r"--stage (\w+)", rows["dapg"][row]["args"])[1] for row, _ in found)
    assert count["gan"] == count["generate"] == 1
    tuned, trained = count["agw"] + count["cil"], count["robust"] + count["align"]
    assert f" {tuned} fine-tunings" in line and f" {trained} pre-trainings, GAN, generation |" in line
