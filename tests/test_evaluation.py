"""common.evaluation: metrics against loops written from the definitions, with ties, junk and every degenerate case."""

import sys

import numpy as np
import pytest
import torch
from conftest import peak_mib

from common import distances
from common.evaluation import rank_metrics, rank_metrics_from_distances

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")])


def oracle(dist, q_pids, g_pids, q_cams, g_cams, max_rank):
    """mAP, CMC, mINP, AP per query, by walking down each query's list."""
    aps, inps, cmc = [], [], np.zeros(max_rank)
    for i in range(len(q_pids)):
        order = sorted(range(len(g_pids)), key=lambda j: (dist[i][j], j))
        order = [j for j in order if g_pids[j] != -1 and not (g_pids[j] == q_pids[i] and g_cams[j] == q_cams[i])]
        hits, precisions, first = 0, [], None
        for position, j in enumerate(order, start=1):
            if g_pids[j] == q_pids[i]:
                hits += 1
                precisions.append(hits / position)
                first = first or position
                last = position
        aps.append(sum(precisions) / hits if hits else np.nan)
        if hits:
            inps.append(hits / last)
            cmc[first - 1 :] += 1
    return np.nanmean(aps), cmc / len(inps), np.mean(inps), np.array(aps)


def same(ours, expected):
    np.testing.assert_allclose(ours.mAP, expected[0], atol=1e-9)
    np.testing.assert_allclose(ours.cmc, expected[1], atol=1e-9)
    np.testing.assert_allclose(ours.mINP, expected[2], atol=1e-9)
    np.testing.assert_allclose(ours.ap, expected[3], atol=1e-9)
    assert ours.num_valid == np.isfinite(expected[3]).sum()


def market(num_query, num_gallery, ids, seed, junk=0.15, cams=3):
    rng = np.random.default_rng(seed)
    g_pids = rng.integers(0, ids, num_gallery)
    g_pids[rng.random(num_gallery) < junk] = -1
    q_pids = rng.integers(0, ids + 1, num_query)
    return q_pids, g_pids, rng.integers(0, cams, num_query), rng.integers(0, cams, num_gallery)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [2, 5, None])
def test_metrics_from_distances_equal_loop_with_ties_and_junk(levels, seed, device):
    rng = np.random.default_rng(seed)
    ids = market(30, 90, 8, seed)
    dist = rng.integers(0, levels, (30, 90)).astype(np.float32) if levels else rng.random((30, 90), np.float32)
    given = torch.from_numpy(dist).to(device)
    same(rank_metrics_from_distances(given, *ids, max_rank=20, chunk=[None, 1, 7, 30][seed]), oracle(dist, *ids, 20))
    np.testing.assert_array_equal(given.cpu(), dist)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("metric", distances.METRICS)
@pytest.mark.parametrize("chunk", [None, 1, 8])
def test_metrics_from_features_equal_loop_on_float64_distances(metric, chunk, device):
    generator = torch.Generator().manual_seed(3)
    query, gallery = torch.randn(25, 40, generator=generator), torch.randn(120, 40, generator=generator)
    ids = market(25, 120, 9, 5)
    if metric == "cosine":
        unit = [torch.nn.functional.normalize(x.double()) for x in (query, gallery)]
        dist = -(unit[0] @ unit[1].T)
    else:
        dist = torch.cdist(query.double(), gallery.double(), compute_mode="donot_use_mm_for_euclid_dist")
    ours = rank_metrics(query.to(device), gallery.to(device), *ids, metric=metric, max_rank=30, chunk=chunk)
    same(ours, oracle(dist.tolist(), *ids, 30))


@pytest.mark.parametrize("seed", range(3))
def test_exact_ties_of_features_go_by_gallery_index(seed):
    """Small integers: every squared distance is exact, about 40 gallery rows share each value."""
    rng = np.random.default_rng(seed)
    query, gallery = rng.integers(-1, 2, (20, 4)).astype(np.float32), rng.integers(-1, 2, (200, 4)).astype(np.float32)
    ids = market(20, 200, 6, seed)
    dist = ((query[:, None] - gallery[None]) ** 2).sum(2)
    same(rank_metrics(query, gallery, *ids), oracle(dist, *ids, 50))


def test_duplicates_of_real_valued_rows_tie():
    rng = np.random.default_rng(0)
    distinct = rng.standard_normal((30, 256)).astype(np.float32)
    copy = rng.integers(0, 30, 330)
    query = rng.standard_normal((21, 256)).astype(np.float32)
    ids = market(21, 330, 12, 1)
    dist = ((query[:, None].astype(np.float64) - distinct[None]) ** 2).sum(2)[:, copy]
    same(rank_metrics(query, distinct[copy], *ids), oracle(dist, *ids, 50))


def test_hand_worked_case():
    """Gallery by distance: other, match, junk camera, match, junk pid; AP = (1/2 + 2/3) / 2, INP = 2/3."""
    dist = np.array([[0.5, 0.2, 0.1, 0.3, 0.4]], np.float32)
    ours = rank_metrics_from_distances(dist, [7], [7, 7, 9, 7, -1], [0], [1, 2, 0, 0, 1], max_rank=3)
    assert ours.mAP == pytest.approx(7 / 12) and ours.mINP == pytest.approx(2 / 3)
    assert ours.cmc.tolist() == [0, 1, 1] and ours.rank(1) == 0 and ours.rank(2) == 1 and ours.num_valid == 1


def test_gallery_smaller_than_max_rank():
    dist = np.array([[0.3, 0.2], [0.1, 0.9]])
    ours = rank_metrics_from_distances(dist, [1, 2], [1, 2], [0, 0], [1, 1], max_rank=50)
    assert ours.cmc.shape == (50,) and ours.cmc.dtype == np.float64
    assert ours.cmc[0] == 0 and (ours.cmc[1:] == 1).all()


def test_queries_without_a_match_are_nan_and_do_not_count():
    dist = np.array([[0.1, 0.2, 0.3]] * 3)
    ours = rank_metrics_from_distances(dist, [1, 5, -1], [1, -1, 1], [0, 0, 0], [1, 1, 1])
    assert ours.num_valid == 1 and ours.mAP == 1 and ours.ap.dtype == np.float64
    assert np.isnan(ours.ap).tolist() == [False, True, True]


def test_distractors_count_and_junk_at_either_end_or_inside_does_not():
    dist = np.array([[0.1, 0.15, 0.2, 0.3, 0.35]])
    for pids in ([-1, -1, 0, 3, -1], [-1, 0, -1, 3, -1], [0, -1, -1, 3, -1]):
        assert rank_metrics_from_distances(dist, [3], pids, [0], [1] * 5).mAP == 0.5


def test_junk_that_ties_or_lies_at_infinity_never_counts():
    dist = np.zeros((1, 6), np.float32)
    ours = rank_metrics_from_distances(dist, [3], [3, -1, 3, 3, -1, 3], [0], [0, 1, 0, 1, 1, 1])
    assert ours.mAP == 1 and ours.mINP == 1


def test_one_query_and_one_gallery_row():
    one = np.ones((1, 3), np.float32)
    assert rank_metrics(one, one, [4], [4], [0], [1]).mAP == 1


def test_metrics_do_not_depend_on_the_order_of_queries_or_on_chunk():
    rng = np.random.default_rng(1)
    query, gallery, ids = rng.random((40, 8), np.float32), rng.random((150, 8), np.float32), market(40, 150, 10, 2)
    whole = rank_metrics(query, gallery, *ids)
    order = rng.permutation(40)
    shuffled = rank_metrics(query[order], gallery, ids[0][order], ids[1], ids[2][order], ids[3], chunk=9)
    np.testing.assert_allclose(shuffled.ap, whole.ap[order], atol=1e-12)
    assert shuffled.mAP == pytest.approx(whole.mAP, abs=1e-12) and np.allclose(shuffled.cmc, whole.cmc)


def test_numpy_torch_and_other_dtypes_agree():
    rng = np.random.default_rng(4)
    query, gallery = rng.integers(-9, 9, (10, 6)), rng.integers(-9, 9, (50, 6))
    ids = market(10, 50, 4, 3)
    results = [
        rank_metrics(as_(query), as_(gallery), *(kind(i) for i in ids))
        for as_, kind in (
            (lambda x: x.astype(np.float32), lambda i: i),
            (lambda x: x.astype(np.float64), list),
            (lambda x: torch.from_numpy(x).half(), torch.from_numpy),
            (torch.from_numpy, lambda i: i.astype(np.int32)),
        )
    ]
    assert len({r.mAP for r in results}) == 1 and len({r.mINP for r in results}) == 1


def test_sorting_on_a_device_and_in_numpy_give_the_same_ranks(monkeypatch):
    """The CUDA branch sorts with torch; here it runs on the CPU."""
    from common import evaluation

    rng = np.random.default_rng(6)
    dist, ids = rng.integers(0, 20, (30, 100)).astype(np.float32), market(30, 100, 5, 7)
    ours = rank_metrics_from_distances(dist, *ids)
    query, gallery = rng.integers(-2, 3, (30, 4)).astype(np.float32), rng.integers(-2, 3, (100, 4)).astype(np.float32)
    both = [rank_metrics(query, gallery, *ids, metric=metric) for metric in ("cosine", "euclidean")]

    monkeypatch.setattr(evaluation, "_closer", lambda *block: evaluation._closer_by_block(*block[:3]))
    same(rank_metrics_from_distances(dist, *ids), (ours.mAP, ours.cmc, ours.mINP, ours.ap))
    for metric, ours in zip(("cosine", "euclidean"), both):
        same(rank_metrics(query, gallery, *ids, metric=metric), (ours.mAP, ours.cmc, ours.mINP, ours.ap))


def features_and_ids():
    return [np.ones((3, 2), np.float32), np.ones((4, 2), np.float32), [1, 2, 3], [1, 2, 3, 4], [0] * 3, [1] * 4]


@pytest.mark.parametrize(
    "position,value,words",
    [
        (0, np.ones((0, 2), np.float32), "query: empty|query_pids: 3 entries for 0 rows"),
        (0, np.full((3, 2), np.nan, np.float32), "query: NaN, Inf or overflow in 3 of 3 rows, first row 0"),
        (1, np.full((4, 2), np.inf, np.float32), "gallery: NaN, Inf or overflow in 4 of 4"),
        (1, np.ones((4, 3), np.float32), "feature sizes differ, 2 and 3"),
        (2, [1, 2], "query_pids: 2 entries for 3 rows of query"),
        (3, [1, 2, 3], "gallery_pids: 3 entries for 4 rows of gallery"),
        (4, [0], "query_camids: 1 entries for 3"),
        (5, [0] * 5, "gallery_camids: 5 entries for 4"),
        (2, [0.5, 1.0, 2.0], "query_pids: expected a 1-D integer array"),
        (3, [7, 8, 9, 10], "no valid query"),
        (5, [0] * 4, "no valid query"),
        (3, [-1] * 4, "no valid query"),
    ],
)
def test_wrong_input_is_named(position, value, words):
    given = features_and_ids()
    given[position] = value
    with pytest.raises(ValueError, match=words):
        rank_metrics(*given)


def test_wrong_options_and_empty_sets_are_named():
    with pytest.raises(ValueError, match="metric: 'l1' is unknown, expected one of euclidean"):
        rank_metrics(*features_and_ids(), metric="l1")
    with pytest.raises(ValueError, match="max_rank"):
        rank_metrics(*features_and_ids(), max_rank=0)
    with pytest.raises(ValueError, match="query: empty"):
        rank_metrics_from_distances(np.zeros((0, 2)), [], [1, 2], [], [0, 0])
    with pytest.raises(ValueError, match="gallery: empty"):
        rank_metrics_from_distances(np.zeros((2, 0)), [1, 2], [], [0, 0], [])
    with pytest.raises(ValueError, match="dist: expected a"):
        rank_metrics_from_distances(np.zeros(4), [1], [1], [0], [0])
    for bad in (np.nan, np.inf):
        dist = np.zeros((3, 2))
        dist[1, 1] = bad
        with pytest.raises(ValueError, match="dist: NaN or Inf in row 1"):
            rank_metrics_from_distances(dist, [1, 1, 1], [1, 1], [0, 0, 0], [1, 1])
    with pytest.raises(ValueError, match="rank: expected 1 <= k <= 50"):
        rank_metrics_from_distances(np.zeros((1, 1)), [1], [1], [0], [1]).rank(51)


RANKED = """
from common.evaluation import rank_metrics
Q, G, D = {q}, {g}, 16
query, gallery = torch.randn(Q, D), torch.randn(G, D)
pids, cams = torch.arange(Q) % (Q // 4), torch.zeros(Q, dtype=torch.int64)
g_pids = torch.arange(G) % (G // 8)
rank_metrics(query[:4], gallery[:G // 8], pids[:4], g_pids[:G // 8], cams[:4], g_pids[:G // 8] * 0 + 1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("q,g", [(4000, 16000), (8000, 16000)])
def test_peak_memory_stays_at_one_block(q, g):
    """A block of 50 MiB and lists of matches; a Q x G matrix would take 244 and 488 MiB."""
    before = RANKED.format(q=q, g=g)
    peak, _ = peak_mib(before, "rank_metrics(query, gallery, pids, g_pids, cams, g_pids * 0 + 1)")
    assert peak < 61, f"{peak} MiB"
