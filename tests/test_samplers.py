"""Samplers: whole groups, corners, and the same global batch whatever the number of processes."""

import numpy as np
import pytest

from common.samplers import identity_batches, identity_epoch


def random_labels(count: int = 3000, ids: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels in -1..ids-1 and camids in 0..5."""
    rng = np.random.default_rng(seed)
    return rng.integers(-1, ids, count), rng.integers(0, 6, count)


def check_groups(batches: np.ndarray, labels: np.ndarray, num_ids: int, num_instances: int) -> None:
    """Every batch is num_ids different identities, each num_instances images in a row, none an outlier."""
    for batch in batches:
        groups = labels[batch].reshape(num_ids, num_instances)
        assert (groups == groups[:, :1]).all() and groups.min() >= 0
        assert len(set(groups[:, 0].tolist())) == num_ids


@pytest.mark.parametrize("use_cameras", [False, True])
def test_batches_are_whole_groups_without_outliers(use_cameras):
    labels, camids = random_labels()
    got = identity_batches(labels, 16, 8, camids=camids if use_cameras else None, iters=50, seed=3, epoch=2)
    assert got.shape == (50, 128) and got.dtype == np.int64
    check_groups(got, labels, 16, 8)


def test_images_of_a_group_come_from_other_cameras_than_the_anchor_without_repetition():
    labels, camids = random_labels(6000, 40)
    for batch in identity_batches(labels, 8, 4, camids=camids, iters=30, seed=0, epoch=0):
        for group in batch.reshape(8, 4):
            assert (camids[group[1:]] != camids[group[0]]).all()
            assert len(set(group.tolist())) == 4


def test_one_camera_gives_other_images_and_too_few_are_repeated_among_the_others():
    labels = np.repeat([0, 1], [3, 30])
    for batch in identity_batches(labels, 2, 8, camids=np.zeros(33, int), iters=20, seed=0, epoch=0):
        for group in batch.reshape(2, 8):
            assert group[0] not in group[1:]
            if labels[group[0]] == 1:
                assert len(set(group.tolist())) == 8


def test_few_images_on_other_cameras_are_repeated_rather_than_taken_from_the_anchors_camera():
    labels, camids = np.zeros(24, int), np.array([0] * 10 + [1] * 2 + [0] * 12)
    labels[12:] = 1
    for batch in identity_batches(labels, 2, 8, camids=camids, iters=20, seed=0, epoch=0):
        for group in batch.reshape(2, 8):
            if labels[group[0]] == 0:
                assert (camids[group[1:]] != camids[group[0]]).all()


@pytest.mark.parametrize("sizes", [(1, 3, 100), (1, 1, 1), (2, 1, 50, 1)])
def test_identity_with_one_image_repeats_it_and_groups_stay_aligned(sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    got = identity_batches(labels, len(sizes), 4, camids=np.zeros(len(labels), int), iters=10, seed=0, epoch=0)
    check_groups(got, labels, len(sizes), 4)


def test_each_pass_holds_every_identity_at_most_once_and_one_pass_is_the_default():
    labels, camids = random_labels(3000, 70)
    one = identity_batches(labels, 16, 4, camids=camids, seed=0, epoch=0)
    assert one.shape == (70 // 16, 64)
    anchors = labels[one.reshape(-1, 4)[:, 0]]
    assert len(set(anchors.tolist())) == len(anchors)
    many = identity_batches(labels, 16, 4, camids=camids, iters=9, seed=0, epoch=0)
    assert np.array_equal(many[:4], one)
    assert len(set(labels[many[4:8].reshape(-1, 4)[:, 0]].tolist())) == 64


def test_every_identity_and_every_image_is_drawn_equally_often():
    labels = np.repeat(np.arange(20), 5)
    got = identity_batches(labels, 10, 2, iters=4000, seed=0, epoch=0)
    counts = np.bincount(got.reshape(-1), minlength=100)
    expected = got.size / 100
    assert ((counts - expected) ** 2 / expected).sum() < 150  # chi-square, 99 degrees of freedom: 1 in 10,000 above 150


def test_ranks_share_the_global_batch_in_whole_identities():
    labels, camids = random_labels()
    whole = identity_batches(labels, 16, 8, camids=camids, iters=12, seed=1, epoch=4)
    for world_size in (2, 4, 16):
        parts = [
            identity_batches(labels, 16, 8, camids=camids, iters=12, seed=1, epoch=4, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert np.array_equal(np.concatenate(parts, axis=1), whole)


def test_seed_and_epoch_alone_decide():
    labels, camids = random_labels()
    draw = lambda seed, epoch: identity_batches(labels, 8, 4, camids=camids, iters=5, seed=seed, epoch=epoch)
    state = np.random.get_state()[1].copy()
    first = draw(0, 0)
    np.random.seed(5)
    assert np.array_equal(first, draw(0, 0))
    assert not np.array_equal(first, draw(0, 1)) and not np.array_equal(first, draw(1, 0))
    np.random.seed(0)
    assert state.shape == np.random.get_state()[1].shape


@pytest.mark.parametrize("available, expected", [(8, 8), (13, 8), (2, 2), (15, 8), (16, 16), (17, 16)])
def test_fewer_identities_keep_the_batch_size_with_more_images_each(available, expected):
    labels = np.repeat(np.arange(available), 40)
    got = identity_batches(labels, 16, 8, iters=6, seed=0, epoch=0)
    assert got.shape == (6, 128)
    check_groups(got, labels, expected, 128 // expected)


@pytest.mark.parametrize("labels", [np.full(50, -1), np.zeros(50, int), np.zeros(0, int)])
def test_no_cluster_or_one_is_an_error_that_names_what_to_change(labels):
    with pytest.raises(ValueError, match=f"{len(set(labels.tolist()) - {-1})} identities.*eps or k1.*outliers"):
        identity_batches(labels, 16, 8, iters=4, seed=0, epoch=0)


def test_world_size_that_does_not_divide_names_the_nearest_batch_sizes():
    labels, _ = random_labels()
    with pytest.raises(ValueError, match=r"does not split over 3 ranks.*120 \(15 ident.*\) or 144 \(18 ident"):
        identity_batches(labels, 16, 8, iters=4, seed=0, epoch=0, world_size=3)
    with pytest.raises(ValueError, match="expected at least 1 x 2"):
        identity_batches(labels, 16, 1, iters=4, seed=0, epoch=0)
    with pytest.raises(ValueError, match="iters is 0"):
        identity_batches(labels, 16, 8, iters=0, seed=0, epoch=0)
    with pytest.raises(ValueError, match="2 camids for 3000 labels"):
        identity_batches(labels, 16, 8, camids=np.zeros(2), iters=1, seed=0, epoch=0)


def test_supervised_epoch_uses_an_image_once_and_stops_when_fewer_than_p_identities_are_left():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(30), rng.integers(1, 40, 30))
    got = identity_epoch(labels, 8, 4, seed=0, epoch=0)
    check_groups(got, labels, 8, 4)
    groups = got.reshape(-1, 4)
    drawn = {label: 0 for label in range(30)}
    for group in groups:
        drawn[int(labels[group[0]])] += 1
    sizes = np.bincount(labels)
    for label, size in enumerate(sizes):
        assert drawn[label] <= max(size // 4, 1)
        used = groups[labels[groups[:, 0]] == label].reshape(-1)
        if size >= 4:
            assert len(set(used.tolist())) == len(used)
    assert sum(drawn[label] < max(size // 4, 1) for label, size in enumerate(sizes)) < 8


def test_supervised_epoch_shares_batches_among_ranks_and_refuses_too_few_identities():
    labels, _ = random_labels()
    whole = identity_epoch(labels, 16, 4, seed=0, epoch=7)
    parts = [identity_epoch(labels, 16, 4, seed=0, epoch=7, rank=rank, world_size=4) for rank in range(4)]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)
    assert not np.array_equal(whole[:5], identity_epoch(labels, 16, 4, seed=0, epoch=8)[:5])
    with pytest.raises(ValueError, match="60 identities for batches of 64"):
        identity_epoch(labels, 64, 4, seed=0, epoch=0)


def test_an_epoch_of_market_size_is_made_of_whole_groups():
    labels, camids = random_labels(13000, 700)
    batches = identity_batches(labels, 16, 8, camids=camids, iters=400, seed=0, epoch=0)
    assert batches.shape == (400, 128)
    check_groups(batches, labels, 16, 8)
