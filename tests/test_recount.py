"""results/recount.py: the number of people is corrected where the data are the recorded ones, and nothing else."""

import json

import pytest
from conftest import ROOT
from dapg_trees import write_regdb

from common import datasets, inputs
from results import recount


@pytest.fixture
def result(tmp_path):
    """A result on the miniature RegDB whose twelve people were counted as five."""
    content = json.loads(min((ROOT / "results/dapg").rglob("seed0.json")).read_text()) | {"row": "chain/agw-regdb"}
    content["data"] = {**inputs.describe(datasets.load("regdb", write_regdb(tmp_path), split=2)), "ids": 5}
    content["protocol"]["split"], content["args"]["data_name"] = 2, "regdb"
    path = tmp_path / "results/dapg/regdb/chain/agw-regdb/seed0.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    return path


def run(tmp_path, *flags):
    return recount.main(
        recount.parse_args(["--data-dir", str(tmp_path), "--results-dir", str(tmp_path / "results"), *flags])
    )


def test_a_wrong_count_is_corrected_and_every_other_byte_stays(tmp_path, result):
    before = result.read_text()
    assert run(tmp_path, "--check") == 1 and result.read_text() == before
    assert run(tmp_path) == 1 and result.read_text() == before.replace('"ids": 5', '"ids": 12')
    assert run(tmp_path, "--check") == 0


def test_a_result_of_other_files_is_left_alone(tmp_path, result, capsys):
    next((tmp_path / "RegDB/Visible").rglob("*.bmp")).write_bytes(b"another picture")
    recount.described.cache_clear()
    before = result.read_text()
    assert run(tmp_path) == 0 and result.read_text() == before
    assert "not checked, the files under" in capsys.readouterr().out
