"""The README's example of a project of one's own trains, continues when killed, and leaves a result file."""

import json

import pytest
import torch
from sixth_paper import train

from common import log_folder, transforms


def end_of(folder, market_dir, *more):
    words = f"--data-dir {market_dir} --logs-dir {folder} --results-dir {folder} --weights none --height 64 --width 32"
    train.main(train.parse_args([*words.split(), *"--batch-size 16 --epochs 2 -j 1".split(), *more]))
    return torch.load(next(folder.rglob("checkpoint_0002.pt")))["state_dict"]


def test_the_smallest_project_trains_and_continues_to_the_same_bits(market_dir, tmp_path, monkeypatch):
    whole = end_of(tmp_path / "whole", market_dir)
    result = json.loads(next((tmp_path / "whole").rglob("seed0.json")).read_text())
    assert result["project"] == "sixth_paper" and 0 <= result["metrics"]["mAP"] <= 1

    def killed_after(run, epoch, *rest):
        save(run, epoch, *rest)
        if epoch == 1:
            raise KeyboardInterrupt

    save = log_folder.save
    monkeypatch.setattr(log_folder, "save", killed_after)
    with pytest.raises(KeyboardInterrupt):
        end_of(tmp_path / "parts", market_dir)
    monkeypatch.undo()
    torch.manual_seed(99)  # what another process would have drawn meanwhile
    parts = end_of(tmp_path / "parts", market_dir, "--resume")
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), parts.values()))


def test_every_step_of_an_epoch_draws_its_own_augmentation(market_dir, tmp_path, monkeypatch):
    drawn, draw = [], transforms.draw_geometry

    def recorded(shape, generator, *options):
        drawn.append(generator.get_state())
        return draw(shape, generator, *options)

    monkeypatch.setattr(transforms, "draw_geometry", recorded)
    end_of(tmp_path, market_dir)
    assert len(drawn) > 2 and len({bytes(state.numpy()) for state in drawn}) == len(drawn)
