"""Help, wrong flags, lists of rows and missing data are answered before torch could be loaded."""

import pytest
from conftest import ROOT, script

HEAVY = ("torch", "torchvision", "sklearn", "cv2", "matplotlib")
TRAININGS = (
    "aff_scl/train.py",
    "convnext_ap/train.py",
    "pixel_sampling/train.py",
    "prsnet/train.py",
    "prsnet/pretrain.py",
    "dapg/train.py",
)


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """Runs a script in a Python in which the heavy packages cannot be imported."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({HEAVY!r}))\n")
    return lambda *command: script(*command, PYTHONPATH=str(folder))


@pytest.mark.parametrize("name", TRAININGS)
def test_help_and_a_wrong_flag_know_no_torch(light, name):
    done = light(ROOT / name, "--epochs", "many")
    assert done.returncode == 2 and "--epochs" in done.stderr.splitlines()[-1], done.stderr
    if name == TRAININGS[0]:
        assert light(ROOT / name, "--help").returncode == 0


@pytest.mark.parametrize("name", ("market", "sysu"))
def test_a_missing_data_set_is_named_before_torch_is_loaded(light, tmp_path, name):
    done = light(ROOT / TRAININGS[0], "-d", name, "--data-dir", tmp_path)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {name}: no ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", (["--list"], ["aff_scl/table4", "--dry-run"]))
def test_rows_are_listed_without_torch(light, words):
    done = light(ROOT / "results/reproduce.py", *words)
    assert done.returncode == 0, done.stderr
