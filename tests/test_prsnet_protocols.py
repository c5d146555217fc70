"""PRSNet: the three protocols on hand-made sets and against loops, and the sampler's plan."""

import numpy as np
import pytest
import torch

from common import evaluation
from prsnet import protocols, sampling


def hand_made():
    """Three people, three cameras: the gallery has everybody from all of them, the queries are from cameras 0 and 1."""
    draw = torch.Generator().manual_seed(3)
    gallery_pids, gallery_camids = np.repeat([1, 2, 3], 6), np.tile([0, 0, 1, 1, 2, 2], 3)
    query_pids, query_camids = np.array([1, 1, 2, 2, 3, 3]), np.array([0, 1, 0, 1, 0, 1])
    gallery, query = torch.randn(18, 5, generator=draw), torch.randn(6, 5, generator=draw)
    return query, gallery, query_pids, gallery_pids, query_camids, gallery_camids


def loop(query, gallery, qp, gp, qc, gc, cameras):
    """mAP and rank-1 of the centroid rule, query by query; `cameras` are those the rule reads for the gallery."""
    centroids = {}
    for pid, camid in zip(qp, qc):
        rows = [i for i in range(len(gp)) if gp[i] == pid and cameras[i] != camid]
        if rows:
            key = (pid, frozenset(cameras[i] for i in rows))
            mean = sum(gallery[i] for i in rows) / len(rows)
            centroids[key] = mean / np.linalg.norm(mean)
    aps, hits = [], []
    for x, pid, camid in zip(query, qp, qc):
        x = x / np.linalg.norm(x)
        allowed = [
            (np.linalg.norm(x - c), key[0] == pid)
            for key, c in centroids.items()
            if not (key[0] == pid and camid in key[1])
        ]
        ranked = [right for _, right in sorted(allowed)]
        if any(ranked):
            places = [i + 1 for i, right in enumerate(ranked) if right]
            aps.append(np.mean([(n + 1) / place for n, place in enumerate(places)]))
            hits.append(ranked[0])
    return np.mean(aps), np.mean(hits)


def as_numpy(query, gallery):
    return query.double().numpy(), gallery.double().numpy()


def test_one_positive_a_query_and_then_ap_is_one_over_rank():
    data = hand_made()
    m = protocols.evaluate("centroid", *data)
    made = protocols.centroids(data[1], data[3], data[5], data[2], data[4])
    assert len(made.pids) == 6 and made.cameras[0] == {1, 2} and made.cameras[1] == {0, 2}
    assert torch.allclose(made.feats[0], torch.nn.functional.normalize(data[1][2:6].mean(0), dim=0))
    ranks = 1 / m.ap
    assert np.allclose(ranks, ranks.round()) and m.num_valid == 6
    assert m.mAP == pytest.approx(np.mean(1 / ranks)) and m.mAP >= m.rank(1)


@pytest.mark.parametrize("seed", range(5))
def test_centroid_protocols_equal_a_loop(seed):
    draw = np.random.default_rng(seed)
    qp, qc, gp, gc = draw.integers(1, 6, 20), draw.integers(0, 3, 20), draw.integers(0, 7, 60), draw.integers(0, 3, 60)
    query, gallery = (torch.from_numpy(draw.normal(size=(n, 6))).float() for n in (20, 60))
    legacy = np.concatenate([qc, gc])[:60]
    for protocol, cameras in (("centroid", gc), ("centroid-legacy", legacy)):
        m = protocols.evaluate(protocol, query, gallery, qp, gp, qc, gc)
        mAP, rank1 = loop(*as_numpy(query, gallery), qp, gp, qc, gc, cameras)
        assert m.mAP == pytest.approx(mAP, abs=1e-6) and m.rank(1) == pytest.approx(rank1)


def test_legacy_is_the_same_where_the_shift_changes_nothing_and_differs_otherwise():
    query, gallery, qp, gp, qc, gc = hand_made()
    cyclic = np.tile([0, 1], 9)  # the joint list read with gallery indices gives the same cameras
    a, b = (
        protocols.evaluate(name, query, gallery, qp, gp, np.tile([0, 1], 3), cyclic)
        for name in ("centroid", "centroid-legacy")
    )
    assert a.mAP == b.mAP and np.array_equal(a.cmc, b.cmc)
    a, b = (protocols.evaluate(name, query, gallery, qp, gp, qc, gc) for name in ("centroid", "centroid-legacy"))
    assert a.mAP != b.mAP


def test_distractors_vanish_or_stay():
    query, gallery, qp, gp, qc, gc = hand_made()
    more = torch.cat(
        [gallery, query[:1] * 2, query[1:2] * 3, query[:1], query[1:2]]
    )  # strangers that look like the queries
    gp, gc = np.concatenate([gp, [0, 0, 9, 9]]), np.concatenate([gc, [2, 2, 2, 2]])
    dropped, kept = (
        protocols.evaluate("centroid", query, more, qp, gp, qc, gc, distractors=d) for d in ("drop", "keep")
    )
    assert dropped.mAP == protocols.evaluate("centroid", query, gallery, qp, gp[:18], qc, gc[:18]).mAP
    assert kept.rank(1) < dropped.rank(1) or kept.mAP < dropped.mAP
    assert len(protocols.centroids(more, gp, gc, qp, qc, "keep").pids) == 6 + 2 + 1


def test_junk_is_left_out_before_the_joint_list_is_made():
    query, gallery, qp, gp, qc, gc = hand_made()
    junk = torch.cat([torch.randn(3, 5), gallery])
    for name in protocols.PROTOCOLS:
        a = protocols.evaluate(name, query, gallery, qp, gp, qc, gc)
        b = protocols.evaluate(name, query, junk, qp, np.concatenate([[-1] * 3, gp]), qc, np.concatenate([[0] * 3, gc]))
        assert a.mAP == b.mAP


def test_image_protocol_equals_the_reference_on_random_features():
    draw = np.random.default_rng(0)
    qp, qc, gp, gc = (
        draw.integers(1, 20, 50),
        draw.integers(0, 4, 50),
        draw.integers(0, 22, 400),
        draw.integers(0, 4, 400),
    )
    query, gallery = (torch.from_numpy(draw.normal(size=(n, 8))).float() for n in (50, 400))
    m, aps = protocols.evaluate("image", query, gallery, qp, gp, qc, gc), []
    q, g = (torch.nn.functional.normalize(x).double().numpy() for x in (query, gallery))
    for i in range(50):
        keep = ~((gp == qp[i]) & (gc == qc[i]))
        right = (gp[keep] == qp[i])[np.argsort(((q[i] - g[keep]) ** 2).sum(1), kind="stable")]
        if right.any():
            places = np.flatnonzero(right) + 1
            aps.append(np.mean(np.arange(1, len(places) + 1) / places))
    assert m.mAP == pytest.approx(np.mean(aps), abs=1e-6)
    assert isinstance(m, evaluation.RankMetrics)


def test_nothing_to_rank_is_said():
    query, gallery, qp, gp, qc, gc = hand_made()
    with pytest.raises(ValueError, match="no query identity has a gallery image of another camera"):
        protocols.evaluate("centroid", query, gallery, qp + 50, gp, qc, gc)
    with pytest.raises(ValueError, match="choose from image, centroid, centroid-legacy"):
        protocols.evaluate("centroids", query, gallery, qp, gp, qc, gc)


# ----------------------------------------------------------------------------------------------------------------- plan


def test_every_image_occurs_at_most_once_and_groups_belong_to_one_person():
    draw = np.random.default_rng(0)
    labels = draw.permutation(np.repeat(np.arange(12), draw.integers(1, 14, 12)))
    plan = sampling.identity_plan(labels, 4, 4, seed=1, epoch=2)
    used = plan[plan >= 0]
    assert len(np.unique(used)) == len(used)
    assert (plan[:, :, 0] >= 0).all()
    for row in plan:
        ids = [set(labels[group[group >= 0]]) for group in row]
        assert all(len(found) == 1 for found in ids) and len(set().union(*ids)) == 4
        assert all(
            (group >= 0).sum() != 1 or (labels == next(iter(found))).sum() == 1 for group, found in zip(row, ids)
        )


def test_groups_are_cut_as_the_rule_says():
    sizes = {1: [1], 2: [2], 4: [4], 5: [4], 6: [4, 2], 9: [4, 4], 11: [4, 4, 3]}
    for n, expected in sizes.items():
        assert [int((g >= 0).sum()) for g in sampling.cut(np.arange(n), 4)] == expected


def test_plans_follow_seed_and_epoch_and_ranks_share_one_batch():
    labels = np.repeat(np.arange(8), 9)
    whole = sampling.identity_plan(labels, 4, 3, seed=0, epoch=0)
    assert not np.array_equal(whole, sampling.identity_plan(labels, 4, 3, seed=0, epoch=1)[: len(whole)])
    order = [sampling.shuffled_batches(100, 32, seed=0, epoch=0, rank=r, world_size=2) for r in (0, 1)]
    assert np.array_equal(np.concatenate(order, 1), sampling.shuffled_batches(100, 32, seed=0, epoch=0))
    assert len(np.unique(np.concatenate(order))) == 96


def test_batches_that_cannot_be_made_are_named():
    with pytest.raises(ValueError, match="3 identities for batches of 4"):
        sampling.identity_plan(np.repeat(np.arange(3), 4), 4, 4, seed=0, epoch=0)
    with pytest.raises(ValueError, match="--batch-size 16 does not split over 3 processes; nearest: 15"):
        sampling.shuffled_batches(20, 16, seed=0, epoch=0, world_size=3)
    with pytest.raises(ValueError, match="10 images cannot fill one batch of 16; nothing would be trained"):
        sampling.shuffled_batches(10, 16, seed=0, epoch=0)
