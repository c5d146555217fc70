"""The documentation is true: commands parse, flags exist, links lead somewhere, tables equal the result files."""

import ast
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest

from results import plan, render, reproduce, schema

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page for page in [*ROOT.glob("README.md"), *ROOT.glob("*/README.md")] if ".pytest_cache" not in page.parts
)
SCRIPTS = sorted(
    path
    for path in [*ROOT.glob("*/*.py"), *ROOT.glob("common/*/*.py")]
    if not path.relative_to(ROOT).parts[0].startswith((".", "tests"))
)
OTHERS_MODULES = {"pip", "venv", "pytest", "torch.distributed.run", "http.server"}
COMMAND = re.compile(r"^\s*(?:\$ )?((?:[A-Z_]+=\S+ )*(?:python3?|torchrun|bash|make) .*)$")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]")


def commands(text):
    """The command lines of a text, one string each, without comments; lines with ... are sketches."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        match = COMMAND.match(line)
        if match and "..." not in line:
            found.append(match[1])
    return found


def page_commands(text):
    """Commands in fenced blocks and in `inline code` of a markdown page."""
    fenced = "".join(re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return commands(fenced) + commands("\n".join(re.findall(r"`([^`\n]+)`", rest)))


def all_commands():
    found = [
        (page.relative_to(ROOT).as_posix(), command)
        for page in PAGES
        for command in page_commands(page.read_text(encoding="utf-8"))
    ]
    for script in SCRIPTS:
        doc = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
        found += [
            (script.relative_to(ROOT).as_posix(), command)
            for command in commands(doc)
            if not command.startswith("make ")
        ]
    recipes = re.sub(r"^\t@?\$\(PY\)", "python", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    found += [
        ("Makefile", c) for c in commands(recipes.replace("$(DEMO)", "logs")) if "tests/" not in c and "-m" not in c
    ]
    return found


def parse(command):
    """Parse a command as its script would; raises AssertionError saying what is wrong with it."""
    words = shlex.split(command, comments=True)
    given = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        given[name] = value
    program, *words = words
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert set(word for word in words if "=" not in word) <= targets, f"Makefile has {sorted(targets)}"
        return
    if program == "bash":
        for recorded in shell_calls(words, given):
            parse_call(recorded[0], recorded[1:], dry_run=False)
        return
    parse_call(program, words)


def parse_call(program, words, dry_run=True):
    """Parse one call of python or torchrun; without `dry_run`, of reproduce.py only flags and patterns."""
    if words[0] == "-m":
        if words[1] in OTHERS_MODULES:
            return
        module = ROOT / words[1].replace(".", "/")
        path, words = module / "__main__.py" if module.is_dir() else module.with_suffix(".py"), words[2:]
    else:
        index = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert program == "torchrun" or index == 0, f"{words[0]} stands before the script"
        path, words = ROOT / words[index], words[index + 1 :]
    assert path.is_file(), f"{path} does not exist"
    if path == ROOT / "results" / "reproduce.py" and not dry_run:
        rows = {project: schema.load_rows(ROOT, project) for project in schema.projects(ROOT)}
        assert all(plan.matching(ROOT, rows, pattern) for pattern in reproduce.parse_args(words).patterns)
    else:
        parse_words(path, words)


RECORDER = """#!/bin/sh
[ "$1" = -c ] && { echo 1; exit 0; }
{ printf '%s' "$(basename "$0")"; for word in "$@"; do printf '\\037%s' "$word"; done; printf '\\036'; } >> "$RECORD"
for word in "$@"; do [ "$word" = "${FAILS:-}" ] && exit "$CODE"; done; exit 0
"""  # a question of a script is answered with 1, every other call is written down; those with the word FAILS fail


def shell_calls(words, given, status=0, cwd=ROOT):
    """The calls of python and torchrun that a shell script makes until it ends with `status`, run with stand-ins:
    [[program, word, ..]].
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in ("python", "python3", "torchrun"):
            (Path(folder) / name).write_text(RECORDER)
            (Path(folder) / name).chmod(0o755)
        record = Path(folder) / "calls"
        place = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "RECORD": str(record), **given}
        done = subprocess.run(
            ["bash", *words], cwd=cwd, env={**os.environ, **place}, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, f"bash {shlex.join(words)}: {done.stderr}"
        return [call.split("\037") for call in record.read_text().split("\036")[:-1]]


def parse_words(path, words):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            if path == ROOT / "results" / "reproduce.py":
                assert reproduce.main(["--dry-run", *words]) == 0, said.getvalue()
            else:
                schema.parser_of(path.parent, path.name)(words)
    except SystemExit as error:
        assert error.code == 0, said.getvalue()


def help_flags(path):
    """The long flags that a script's --help lists, without --help itself."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        schema.parser_of(path.parent, path.name)(["--help"])
    listed = re.findall(r"^  (-\S.*?)(?:  |$)", text.getvalue(), re.MULTILINE)
    return {flag for line in listed for flag in FLAG.findall(line)} - {"--help"}


@pytest.mark.parametrize("where, command", all_commands())
def test_command_parses(where, command):
    parse(command)


@pytest.mark.parametrize("script", sorted(ROOT.glob("*/*.sh")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_shell_script_stands_on_a_page_or_takes_a_data_folder(script):
    name = script.relative_to(ROOT).as_posix()
    if not any(name in command for _, command in all_commands()):
        parse(f"bash {name} /data")


def test_a_shell_script_is_checked_by_the_calls_it_makes(tmp_path):
    script = tmp_path / "run.sh"
    script.write_text('set -eu\nfor row in a b; do python dapg/train.py --row "$row/$1" $FLAG; done\n')
    found = shell_calls([str(script), "x y"], {"FLAG": "--resume"})
    assert found == [["python", "dapg/train.py", "--row", f"{row}/x y", "--resume"] for row in "ab"]
    script.write_text("python results/render.py --chekc\n")
    with pytest.raises(AssertionError, match="chekc"):
        parse(f"bash {script}")
    script.write_text("exit 3\n")
    with pytest.raises(AssertionError):
        parse(f"bash {script}")


OF_FOLDERS = sorted(set(ROOT.glob("*/run_*.sh")) - {ROOT / "dapg/run_chain.sh"})  # whose folders are flags of train.py


@pytest.mark.parametrize("script", OF_FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shell_script_takes_folders_from_where_it_is_called(script, tmp_path):
    words, given = ["market", "schp.pth"][: 2 if script.name == "run_prcc.sh" else 1], {}
    if script.name == "run_pretrain.sh":
        words, given = [], {"DATA": "market", "OUT": "left"}
    expected = {f"{tmp_path}/{word}" for word in [*words, *given.values()]}
    said = {word for call in shell_calls([str(script), *words], given, cwd=tmp_path) for word in call}
    assert expected <= said and not {*words, *given.values()} & said


def test_the_tables_after_a_failed_one_run_and_an_interrupt_ends_them():
    words, fails = ["pixel_sampling/run_prcc.sh", "/data", "schp.pth"], {"FAILS": "pixel_sampling/T2-c"}
    whole = shell_calls(words, {})
    assert len(whole) == 5 and shell_calls(words, {**fails, "CODE": "1"}, 1) == whole
    assert shell_calls(words, {**fails, "CODE": "130"}, 130) == whole[:2]
    without_parsings = {"FAILS": f"{ROOT}/schp.pth", "CODE": "2"}
    assert len(shell_calls(words, without_parsings, 2)) == 1  # nothing trains
    assert shell_calls(words, {"FAILS": "results/render.py", "CODE": "1"}, 1) == whole


def test_the_command_parser_sees_what_is_wrong():
    fenced = "```bash\npython results/render.py --check  # fine\npython gone.py\n```\n"
    text = fenced + "and `python results/render.py --chekc`, `make demo ...`"
    good, gone, misspelt = page_commands(text)
    parse(good)
    for command in (gone, misspelt):
        with pytest.raises(AssertionError):
            parse(command)


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.name in ("train.py", "test.py")], ids=str)
def test_a_script_has_at_most_40_flags(script):
    assert 0 < len(help_flags(script)) <= 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_flags_named_on_a_page_exist(page):
    scripts = [
        p
        for p in SCRIPTS
        if re.search(r"^    arguments = |^    flags.answer|^def parse_args", p.read_text("utf-8"), re.MULTILINE)
    ]
    known = set().union(*(help_flags(path) for path in scripts)) | {"--nproc-per-node", "--standalone", "--help"}
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert set(FLAG.findall(text.replace("--nproc_per_node", ""))) - known == set()


@pytest.mark.parametrize("project", schema.projects(ROOT))
def test_a_flag_table_lists_exactly_the_flags_of_train(project):
    page = ROOT / project / "README.md"
    section = re.search(r"^#+ Flags\b(.*?)(?=^#|\Z)", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert section, f"{page}: no section Flags"
    listed = {
        flag for line in section[1].splitlines() if line.startswith("|") for flag in FLAG.findall(line.split("|")[1])
    }
    assert listed == help_flags(ROOT / project / "train.py")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_tables_on_all_pages_equal_the_result_files(capsys):
    assert render.main(["--check"]) == 0, capsys.readouterr().err


def linked_numbers(text):
    """(number, target) of every link `[12.3](.../seed0.json)` of a page, also `[12.3 ± 0.4](.../row)`."""
    return re.findall(r"\[(\d+\.\d+)(?: ± \d+\.\d+)?\]\(([^)\s]*results/[^)\s]+|[a-z_]+/[^)\s]+)\)", text)


def is_shown(number, files):
    """Whether the mean of some metric of the result files, at the number's decimals, is the number."""
    metrics = [json.loads(file.read_text())["metrics"] for file in files]
    digits = len(number.partition(".")[2])
    means = [sum(m[key] for m in metrics) / len(metrics) for key in metrics[0] if all(key in m for m in metrics)]
    scales = (1, 100, 1e-6, 1e-9, 1e3, 1e-3)
    return any(f"{mean * scale:.{digits}f}" == number for mean in means for scale in scales)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_number_that_links_to_result_files_is_in_them(page):
    """Also outside the rendered tables, whose equality the next test shows."""
    wrong = []
    for number, target in linked_numbers(page.read_text(encoding="utf-8")):
        place = (page.parent / target).resolve()
        files = [place] if place.is_file() else sorted(place.glob("seed*.json"))
        wrong += [(number, target)] if not files or not is_shown(number, files) else []
    assert wrong == []


def test_a_wrong_linked_number_is_seen(tmp_path):
    file = tmp_path / "seed0.json"
    file.write_text('{"metrics": {"mAP": 0.5213, "params": 26699938}}')
    assert is_shown("52.1", [file]) and is_shown("26.70", [file]) and not is_shown("52.2", [file])
    text = "it reaches [52.1](results/aff_scl/x/demo/seed0.json) and [3.0 ± 0.1](../results/a/b)"
    assert linked_numbers(text) == [("52.1", "results/aff_scl/x/demo/seed0.json"), ("3.0", "../results/a/b")]
