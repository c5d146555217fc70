"""tests/benchmarks/gpu.py without a GPU: time boxes, stops, failures, and the table of its file. The parts are ordinary
commands, or the real ones at their smallest on the CPU.
"""

import json
import signal
import sys

import pytest
import torch

from results import device, render
from results.schema import Refused
from tests import family
from tests.benchmarks import gpu
from tests.benchmarks.device import suite
from tests.benchmarks.device.figures import Figures, fitting

HANG = "tail -f /dev/null"
WRITE = """echo '{"figures": [{"name": "step", "value": 1234.5, "unit": "images/s"}]}' > "$2"; """
RECORD = {
    "schema": 1, "date": "2026-01-02T03:04:05+00:00", "command": "python tests/benchmarks/gpu.py", "minutes": 10,
    "small": False, "git": {"commit": "0123456789abcdef", "dirty": False},
    "card": {"name": "A card", "memory_mib": 81920, "driver": None},
    "env": {"torch": "2.11", "torchvision": "0.26", "cuda": "13.0", "cudnn": 91000, "python": "3.12", "cpu": "x",
            "cores": 16, "threads": 16},
}  # fmt: skip


def part(name: str, script: str, box_s: float = 60, needs=()) -> gpu.Part:
    """A part whose command is a shell script; "$2" is the file of its figures."""
    return gpu.Part(name, f"Part {name}", box_s, ("sh", "-c", script, name), needs)


@pytest.fixture
def run(tmp_path):
    """Parts -> (status, what the file holds); the handlers of signals are those of before afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def parts(*chosen: gpu.Part) -> tuple[int, dict]:
        folder = tmp_path / "results" / "benchmarks"
        folder.mkdir(parents=True, exist_ok=True)
        status = gpu.run_parts(list(chosen), dict(RECORD), folder / "A-card.json", False)
        assert [path.name for path in folder.iterdir()] == ["A-card.json"]
        return status, json.loads((folder / "A-card.json").read_text())

    yield parts
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_part_over_its_time_box_is_killed_with_its_children_and_keeps_its_figures(run, tmp_path):
    pids = tmp_path / "pids"
    script = f"{WRITE} {HANG} & echo $! >> {pids}; setsid {HANG} & echo $! >> {pids}; wait"
    status, record = run(part("slow", script, box_s=2), part("next", WRITE))
    slow, following = record["parts"].values()
    assert slow["status"] == "out of time" and slow["why"] == "killed after its 2 s"
    assert slow["figures"] == [{"name": "step", "value": 1234.5, "unit": "images/s"}] and slow["seconds"] >= 2
    assert len(pids.read_text().split()) == 2 and all(family.ended(int(pid)) for pid in pids.read_text().split())
    assert following["status"] == "done" and following["why"] is None and status == 1


def test_a_stop_leaves_the_parts_that_ended_and_the_figures_of_the_one_under_way(run, tmp_path):
    script = f"{WRITE} echo $$ > {tmp_path / 'pid'}; kill -TERM $PPID; {HANG}"
    status, record = run(part("first", WRITE), part("second", script), part("third", WRITE))
    first, second, third = record["parts"].values()
    assert first["status"] == "done" and first["figures"]
    assert second["status"] == "stopped" and second["why"] == "stopped by SIGTERM" and second["figures"]
    assert third["status"] == "not run" and third["why"] == "stopped before it"
    assert family.ended(int((tmp_path / "pid").read_text())) and status == 128 + signal.SIGTERM


def test_a_kill_leaves_the_parts_that_ended(run, tmp_path):
    """What the file holds while the second part runs is what a kill -9 would leave."""
    copy = tmp_path / "copy"
    run(part("first", WRITE), part("second", f"cat {tmp_path}/results/benchmarks/*.json > {copy}"))
    first, second = json.loads(copy.read_text())["parts"].values()
    assert first["status"] == "done" and first["figures"] and second["status"] == "not run"


def test_parts_that_fail_or_cannot_run_say_why_and_the_others_go_on(run, capsys):
    error = """echo '{"figures": [], "error": "ValueError: no such batch"}' > "$2"; exit 1"""
    status, record = run(
        part("late", WRITE, box_s=0),
        part("said", error), part("unsaid", "echo the driver is gone; exit 3"), part("dead", "kill -9 $$"),
        part("needy", WRITE, needs=("no_such_module",)), part("well", WRITE),
    )  # fmt: skip
    found = {name: (entry["status"], entry["why"]) for name, entry in record["parts"].items()}
    assert found == {
        "said": ("failed", "ValueError: no such batch"),
        "unsaid": ("failed", "the driver is gone"),
        "dead": ("failed", "ended with signal SIGKILL"),
        "needy": ("not run", "this Python has no no_such_module"),
        "late": ("not run", "no time was left"),
        "well": ("done", None),
    }
    assert status == 1 and run(part("well", WRITE))[0] == 0


def test_failed_tests_are_named_and_end_with_status_1(run, tmp_path):
    """Counted by the real counter in a pytest of its own."""
    (tmp_path / "test_three.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\ndef test_good(): pass\n"
        "def test_bad(): assert 1 == 2\ndef test_absent(): pytest.skip('no')\n"
    )
    file = tmp_path / "figures.json"
    suite.run(Figures(file), str(tmp_path / "test_three.py"))
    figures = {figure["name"]: figure["value"] for figure in json.loads(file.read_text())["figures"]}
    assert [figures[name] for name in ("passed", "failed", "skipped")] == [1, 1, 1]
    (named,) = (name for name in figures if name.startswith("failed: "))
    assert "test_three.py::test_bad: " in named and "assert 1 == 2" in named
    assert run(part("tests", f'cp {file} "$2"'))[0] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_sentence_and_no_file(tmp_path, capsys):
    assert gpu.main(gpu.parse_args(["--out", str(tmp_path / "out")])) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: no CUDA device: ") and said.err.count("\n") == 1 and not said.out
    assert not (tmp_path / "out").exists()


def test_the_parts_fit_their_minutes():
    assert sum(one.box_s for one in gpu.PARTS) + gpu.START_S <= 60 * gpu.MINUTES


@pytest.mark.slow
@pytest.mark.parametrize("name", [one.name for one in gpu.PARTS if not one.name.startswith("tests-")])
def test_every_benchmark_runs_small_on_the_cpu(name, tmp_path):
    """The project's own epochs are still called as they are written."""
    file, threads = tmp_path / "figures.json", torch.get_num_threads()
    assert gpu.run_one(gpu.parse_args(["--part", name, "--small", "--figures", str(file)])) == 0
    torch.set_num_threads(threads)
    found = json.loads(file.read_text())
    assert len(found["figures"]) >= 3 and "error" not in found
    rates = [figure["value"] for figure in found["figures"] if figure["unit"] == "images/s"]
    assert all(value > 0 for value in rates) and (rates or name in ("evaluation", "jaccard"))


def test_an_error_of_a_part_is_kept_as_its_first_sentence(tmp_path):
    file = tmp_path / "figures.json"
    keep = Figures(file)
    keep("step", 1.5, "s")
    keep.fail(RuntimeError("CUDA error: no kernel image\nCompile with TORCH_USE_CUDA_DSA\n"))
    assert json.loads(file.read_text()) == {
        "figures": [{"name": "step", "value": 1.5, "unit": "s"}],
        "error": "RuntimeError: CUDA error: no kernel image",
    }


def test_a_batch_that_does_not_fit_the_card_is_halved():
    tried = []

    def work(batch):
        tried.append(batch)
        if batch > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")

    fitting(64, 8, work)
    assert tried == [64, 32, 16]
    with pytest.raises(torch.OutOfMemoryError):
        fitting(64, 24, work)


# ----------------------------------------------------------------------------------------------------------- rendering
def test_a_recorded_file_is_shown_as_a_table(run, tmp_path):
    run(part("aff_scl", WRITE), part("gone", "exit 3"))
    text = device.markdown(tmp_path, tmp_path / "results", render._markdown)
    assert "[A card, 2026-01-02 03:04](benchmarks/A-card.json)" in text and "| CPU | x, 16 cores, 16 threads |" in text
    assert "### Part aff_scl" in text and "| step | 1,234 images/s |" in text and "failed in 0 s: ended with" in text
    page = device.html(tmp_path)
    assert '<a href="benchmarks/A-card.json">A card, 2026-01-02 03:04</a>' in page and "1,234 images/s</td>" in page
    assert page.count("<table>") == 3


def test_without_a_file_the_section_says_that_no_gpu_was_at_hand(tmp_path):
    for text in (device.markdown(tmp_path, tmp_path, render._markdown), device.html(tmp_path)):
        assert "Device benchmarks" in text and "No GPU was at hand" in text and "<table>" not in text


@pytest.mark.parametrize(
    "change, words",
    [
        ({"small": True}, "--small, which only tries"),
        ({"schema": 9}, "schema 9 is unknown"),
        ({"card": {}}, "no record"),
    ],
)
def test_files_that_record_nothing_are_refused_by_name(run, tmp_path, change, words):
    _, record = run(part("one", WRITE))
    file = tmp_path / "results" / "benchmarks" / "A-card.json"
    file.write_text(json.dumps(record | change))
    with pytest.raises(Refused, match=f"A-card.json: .*{words}"):
        device.load(tmp_path)
    file.write_text("{")
    with pytest.raises(Refused, match="A-card.json: no record"):
        device.load(tmp_path)


def test_numbers_are_readable():
    shown = [device.number(value) for value in (12345.6, 1234, 12.345, 0.9876, 0.00012345, 0)]
    assert shown == ["12,346", "1,234", "12.35", "0.988", "0.00012", "0"]
