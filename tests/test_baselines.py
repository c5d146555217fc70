"""results/baselines.py and <project>/untrained.py: a row's test without training, under its own protocols."""

import dapg_runs
import numpy as np
import pytest
import torch
from conftest import write_market
from prcc_tree import write_prcc

from common import evaluation, histogram, images, runtime
from common.datasets import sysu
from dapg.untrained import Gradients
from pixel_sampling import untrained as pixel_sampling
from pixel_sampling.flags import parse_args as pixel_sampling_args
from prsnet import untrained as prsnet
from prsnet.flags import train_args as prsnet_args
from results import baselines, schema


def test_chance_is_the_mean_rank1_of_random_orders():
    draw = np.random.default_rng(0)
    queries, gallery = draw.integers(0, 4, 12), draw.integers(0, 5, 30)
    cameras, there = np.arange(12) % 3, draw.integers(0, 3, 30)
    ignored = sysu.same_room(cameras, there)
    shares = []
    for _ in range(3000):
        order = draw.permutation(30)
        for row, pid in enumerate(queries):
            line = gallery[order][~ignored[row][order]]
            shares.append(line[0] == pid if pid in line else np.nan)
    assert evaluation.chance(queries, gallery, ignored) == pytest.approx(np.nanmean(shares), abs=0.01)
    assert evaluation.chance(torch.tensor([1, 9]), [1, 2, 1, 3]) == 0.5  # nobody finds 9
    with pytest.raises(ValueError, match="no valid query"):
        evaluation.chance([1], [2])


def places(tmp_path, data):
    folders = {"--data-dir": data, "--logs-dir": tmp_path / "logs", "--results-dir": tmp_path, "--cache-dir": tmp_path}
    return [str(word) for pair in folders.items() for word in pair]


def measured(module, args, project):
    run = runtime.start(args, project)
    return module.measure(run, args)


def test_prsnet_measures_network_and_colours_under_its_three_protocols(tmp_path):
    words = "--dataset market --weights none --size tiny --height 64 --width 32 --mask-block 4 2 --workers 1".split()
    args = prsnet_args(words + places(tmp_path, write_market(tmp_path, 8, 4)))
    found, data = measured(prsnet, args, "prsnet")
    assert (
        found["untrained"].keys() == found["histogram"].keys() >= {"image.mAP", "centroid.mAP", "centroid-legacy.mAP"}
    )
    store = images.open_images(
        [s.path for s in data.query + data.gallery], 64, 32, interpolation="bilinear", cache="off"
    )
    q, ids = len(data.query), [[s.pid for s in part] for part in (data.query, data.gallery)]
    cameras = [[s.camid for s in part] for part in (data.query, data.gallery)]
    feats = histogram.color_histograms(store)
    assert found["histogram"]["image.mAP"] == evaluation.rank_metrics(feats[:q], feats[q:], *ids, *cameras).mAP


def test_pixel_sampling_measures_network_colours_and_chance_of_both_query_sets(tmp_path):
    words = "--weights none --backbone resnet18 --height 64 --width 32 --workers 1 --ps-mode off --consistency none"
    args = pixel_sampling_args(words.split() + places(tmp_path, write_prcc(tmp_path)))
    found, _ = measured(pixel_sampling, args, "pixel_sampling")
    assert found["chance"] == {"cross.rank1": pytest.approx(1 / 3), "same.rank1": pytest.approx(1 / 3)}  # three people
    assert found["untrained"].keys() == found["histogram"].keys() >= {"cross.mAP", "same.mAP", "cross.single10.rank1"}
    assert found["histogram"]["same.mAP"] > found["histogram"]["cross.mAP"]  # colour knows clothes


def test_oriented_gradients_see_edges_and_neither_brightness_nor_sign():
    """One edge: all of its cells' votes are in its direction, whatever the contrast and its sign."""
    stripe = torch.zeros(1, 3, 128, 64)
    stripe[..., 32:] = 1
    upright, lying = (Gradients().pooled(x, None) for x in (stripe, stripe.mT))
    directions = upright.view(1, 4, 9, 15, 7).sum((0, 1, 3, 4))
    assert directions[0] == directions.sum() > 0
    assert torch.allclose(Gradients().pooled(None, 0.3 - 0.2 * stripe), upright, atol=1e-5)
    assert not torch.allclose(lying, upright, atol=0.1)
    assert upright.shape == (1, 3780)


def test_a_recorded_baseline_is_a_result_file_of_the_row_without_its_weights(tmp_path):
    row, data = "chain/agw-sysu", dapg_runs.data_dir()
    words = [f"dapg/{row}", "--data-dir", str(data), "--results-dir", str(tmp_path / "base"), "--seeds", "1"]
    baselines.main(baselines.parse_args(words))
    found = schema.read(tmp_path / f"base/dapg/sysu/{row}/seed1.json", tmp_path / "base")
    assert found.content["args"]["weights"] == "none" and found.content["protocol"]["training"] == "none"
    assert found.content["epoch"] is None and found.seed == 1
    assert found.metrics["chance.all.rank1"] == found.metrics["chance.all_c.rank1"] == 0.25  # one image in four
    assert found.metrics.keys() >= {"untrained.all.rank1", "untrained.indoor.mAP", "gradients.all.rank1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("pattern", ["aff_scl/demo", "prsnet/demo/pretrain"])
def test_rows_that_record_their_own_or_search_nobody_are_refused(tmp_path, pattern):
    with pytest.raises(ValueError, match="its own results hold what comes before training, or it searches nobody"):
        baselines.main(baselines.parse_args([pattern, "--results-dir", str(tmp_path)]))


def test_a_stage_that_searches_nobody_is_refused(tmp_path):
    with pytest.raises(ValueError, match="only agw and cil search people"):
        baselines.main(baselines.parse_args(["dapg/chain/robust", "--results-dir", str(tmp_path)]))
