"""Help, wrong flags, lists of rows and missing data are answered before torch could be loaded."""

import re
from pathlib import Path

import pytest
from conftest import ROOT, script

HEAVY = ("torch", "torchvision", "sklearn", "cv2", "matplotlib")
WRONG = {  # every program with flags, and words that it must refuse in a sentence that ends with the last of them
    "aff_scl/train.py": "--epochs many",
    "convnext_ap/train.py": "--epochs many",
    "pixel_sampling/train.py": "--epochs many",
    "prsnet/train.py": "--epochs many",
    "prsnet/pretrain.py": "--epochs many",
    "dapg/train.py": "--epochs many",
    "aff_scl/complexity.py": "--height many",
    "convnext_ap/complexity.py": "--height many",
    "prsnet/deploy.py": "--passes many",
    "aff_scl/test.py": "--weights w --gallery g --gallery-features f",
    "convnext_ap/test.py": "--weights w --gallery-features f",
    "pixel_sampling/test.py": "--weights w --query folder",
    "prsnet/test.py": "--weights w --dataset many",
    "dapg/test.py": "--severity 9",
    "convnext_ap/figures.py": "ranks",
    "pixel_sampling/visualize.py": "1 --number 99",
    "-m pixel_sampling.parse": "--root r",
    "-m prsnet.prepare": "--mix many",
    "-m common.datasets": "market --workers -1",
    "results/reproduce.py": "--gpus many",
    "results/render.py": "--chekc",
    "results/recount.py": "--chekc",
    "results/compare.py": "--chekc",
    "results/baselines.py": "--seeds many",
}


def parts(name):
    return name.split() if name.startswith("-m") else [ROOT / name]


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """Runs a program in a Python in which the heavy packages cannot be imported."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({HEAVY!r}))\n")
    return lambda *command: script(*command, PYTHONPATH=str(folder))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_flag_needs_no_torch(light, name):
    done = light(*parts(name), *WRONG[name].split())
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert ": error: " in done.stderr.splitlines()[-1]


def test_every_program_with_flags_is_asked():
    """All files that read flags when they are run, but for tests and benchmarks."""
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in {Path(name).parts[0] for name in WRONG if not name.startswith("-m")} | {"common"}
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^if __name__ == ", path.read_text("utf-8"), re.MULTILINE)
    ]
    asked = {name[3:].replace(".", "/") + ".py" if name.startswith("-m") else name for name in WRONG}
    asked |= {"common/datasets/__main__.py", "common/synthetic/__main__.py"}  # the latter draws with OpenCV, see below
    assert set(found) <= asked


@pytest.mark.parametrize("name", ("aff_scl/train.py", "dapg/test.py", "results/render.py"))
def test_help_needs_no_torch(light, name):
    assert light(ROOT / name, "--help").returncode == 0


def test_rendering_knows_no_torch():
    code = "import sys; sys.modules['torch'] = None; import common.synthetic.__main__ as m; m.parse_args(['market'])"
    done = script("-c", code)
    assert done.returncode == 2 and "--out" in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize(
    "words, said",
    [
        ("aff_scl/train.py -d market --data-dir DIR", "market: no "),
        ("aff_scl/train.py -d msmt17 --data-dir DIR", "msmt17: no "),
        ("prsnet/test.py --weights DIR/none.pt", "no checkpoint DIR/none.pt"),
        ("dapg/test.py --weights DIR", "no checkpoint DIR/checkpoint_*.pt"),
        (
            "convnext_ap/test.py --weights FILE --query DIR --gallery DIR/none",
            "--gallery DIR/none: no such folder or image",
        ),
        ("aff_scl/test.py --weights FILE -d duke --data-dir DIR --real", "duke: no "),
    ],
)
def test_what_is_missing_is_named_before_torch_is_loaded(light, tmp_path, words, said):
    (tmp_path / "file").touch()
    words, said = (text.replace("DIR", str(tmp_path)) for text in (words.replace("FILE", "DIR/file"), said))
    done = light(*words.split())
    assert done.returncode == 1 and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", (["--list"], ["aff_scl/table4", "--dry-run"]))
def test_rows_are_listed_without_torch(light, words):
    done = light(ROOT / "results/reproduce.py", *words)
    assert done.returncode == 0, done.stderr
