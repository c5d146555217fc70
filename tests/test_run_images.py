"""The images of a run: none is continued or taken for finished with others, and its result says whose they are."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_market
from test_run_files import DATA, begin, content, train

from common import checkpoints, datasets, inputs, runtime


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two --data-dir with a data set of a user's own in Market-1501's layout; the images have the same names."""
    return [str(write_market(tmp_path_factory.mktemp("own"), 2, 2, seed)) for seed in (0, 1)]


def test_a_finished_run_on_other_images_is_not_the_one_asked_for(sets, tmp_path):
    train(tmp_path, data_dir=sets[0])
    before = content(tmp_path)
    for resume in (None, "auto"):
        with pytest.raises(ValueError) as said:
            train(tmp_path, resume=resume, data_dir=sets[1])
        for part in (r"checkpoint_0003.pt was trained on other images of market (names and sizes ", sets[0]):
            assert part in str(said.value)
        assert "another --logs-dir and --results-dir" in str(said.value) and content(tmp_path) == before


def test_an_unfinished_run_does_not_go_on_with_other_images(sets, tmp_path):
    folder = train(tmp_path, until=2, data_dir=sets[0])
    before = content(folder)
    for resume in (None, "auto", str(folder / "checkpoint_0001.pt")):
        with pytest.raises(ValueError, match="trained on other images of market"):
            train(tmp_path, resume=resume, data_dir=sets[1])
    assert content(folder) == before


def test_images_that_moved_are_the_same_and_the_run_continues_to_the_same_bits(sets, tmp_path):
    moved = shutil.copytree(sets[0], tmp_path / "moved")
    (moved / "market1501").rename(moved / "Market-1501-v15.09.15")
    folder = train(tmp_path, until=2, data_dir=sets[0])
    train(tmp_path, resume="auto", data_dir=str(moved))
    whole = train(tmp_path / "whole", data_dir=sets[0])
    last = [checkpoints.read(path / "checkpoint_0003.pt") for path in (folder, whole)]
    assert torch.equal(*(state["state_dict"]["weight"] for state in last)) and last[0]["data"] == last[1]["data"]


def test_rendered_people_are_named_by_what_the_renderer_was_told_and_not_by_their_bytes(sets, tmp_path):
    folders = [Path(shutil.copytree(folder, tmp_path / Path(folder).name)) for folder in sets]
    stamp = {"size": "small", "seed": 0, "version": 1}

    def write(folder, **changes):
        (folder / "market1501" / "SYNTHETIC").write_text(json.dumps(stamp | changes))

    write(folders[0]), write(folders[1])
    train(tmp_path, until=2, data_dir=str(folders[0]))
    train(tmp_path, until=2, resume="auto", data_dir=str(folders[1]))
    write(folders[1], seed=7)
    with pytest.raises(ValueError, match=r"other images of market-synthetic-small \(seed 0 -> 7\)"):
        train(tmp_path, resume="auto", data_dir=str(folders[1]))


def test_a_checkpoint_from_before_images_were_kept_continues(sets, tmp_path):
    folder = train(tmp_path, until=2, data_dir=sets[0])
    state = checkpoints.read(folder / "checkpoint_0002.pt")
    del state["data"]
    torch.save(state, folder / "checkpoint_0002.pt")
    train(tmp_path, resume="auto", data_dir=sets[1])
    assert checkpoints.read(folder / "checkpoint_0003.pt")["data"]["market"]["images"] == 24


@pytest.mark.parametrize("read", ["market", "another"])
def test_a_result_says_whether_a_set_that_its_run_read_is_one_of_the_users_own(sets, tmp_path, read):
    run, _, _ = begin(tmp_path, **({"data_dir": sets[0]} if read == "market" else {}))
    data = inputs.describe(datasets.load("market", sets[0]))
    assert data["published"] is False
    path = runtime.record(run, {"mAP": 0.5}, data if read == "market" else DATA | {"published": True}, {})
    assert json.loads(path.read_text())["data"]["published"] is (read == "another")
    if read == "market":  # a source of the user's own beside a published target
        path = runtime.record(run, {"mAP": 0.5}, DATA | {"published": True}, {})
        assert json.loads(path.read_text())["data"]["published"] is False
