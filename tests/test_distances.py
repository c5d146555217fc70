"""common.distances against float64 loops: values, neighbours, self first, bad input, settings left as found."""

import numpy as np
import pytest
import torch

from common import distances

METRICS = distances.METRICS
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")])


def oracle(x, y, metric):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    out = np.zeros((len(x), len(y)))
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            if metric == "cosine":
                norms = max(np.linalg.norm(a), 1e-12) * max(np.linalg.norm(b), 1e-12)
                out[i, j] = 1 - a @ b / norms
            else:
                out[i, j] = ((a - b) ** 2).sum() ** (0.5 if metric == "euclidean" else 1)
    return out


def random_features(n, d, seed, scale=1.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_pairwise_equals_loop_in_float64(metric, chunk, device):
    x, y = random_features(23, 19, 0), random_features(31, 19, 1)
    x[3] = 0
    dist = distances.pairwise(x.to(device), y.to(device), metric, chunk)
    assert dist.dtype == torch.float32 and dist.device.type == device
    np.testing.assert_allclose(dist.cpu(), oracle(x, y, metric), atol=2e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_error_of_squares_is_within_the_stated_bound_far_from_the_origin(scale):
    x = (random_features(20, 64, 2) * 0.01 + 1) * scale
    y = (random_features(25, 64, 3) * 0.01 + 1) * scale
    bound = 1e-6 * ((x**2).sum(1)[:, None] + (y**2).sum(1)).double()
    error = (distances.pairwise(x, y, "sqeuclidean").double() - torch.from_numpy(oracle(x, y, "sqeuclidean"))).abs()
    assert (error <= bound).all()


@pytest.mark.parametrize("metric", METRICS)
def test_duplicates_never_give_nan_or_negative_distances(metric):
    x = random_features(1, 513, 4, 30.0).repeat(40, 1)
    dist = distances.pairwise(x, x, metric)
    assert dist.isfinite().all() and (dist >= 0).all()
    indices, near = distances.knn(x, 40, metric)
    assert near.isfinite().all() and (near >= 0).all()
    assert (indices[:, 0] == torch.arange(40)).all() and (near[:, 0] == 0).all()
    assert (indices.sort(1).values == torch.arange(40)).all()


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n,k,chunk", [(1, 1, None), (2, 2, 1), (37, 1, 8), (37, 5, 8), (37, 37, 10), (64, 9, None)])
def test_knn_equals_sorted_distances(metric, n, k, chunk, device):
    x = random_features(n, 12, 5, 3.0)
    indices, dist = distances.knn(x.to(device), k, metric, chunk=chunk)
    assert indices.dtype == torch.int64 and indices.shape == dist.shape == (n, k)
    full = oracle(x, x, metric)
    np.fill_diagonal(full, -1)
    expected = np.argsort(full, axis=1)[:, :k]
    np.fill_diagonal(full, 0)
    np.testing.assert_array_equal(indices.cpu(), expected)
    np.testing.assert_allclose(dist.cpu(), np.take_along_axis(full, expected, 1), atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("metric", METRICS)
def test_knn_in_another_set_equals_sorted_distances(metric, chunk):
    x, y = random_features(9, 6, 6), random_features(21, 6, 7)
    indices, dist = distances.knn(x, 21, metric, y=y, chunk=chunk)
    full = oracle(x, y, metric)
    np.testing.assert_array_equal(indices, np.argsort(full, axis=1))
    np.testing.assert_allclose(dist, np.sort(full, axis=1), atol=1e-5)


def test_equal_distances_are_listed_by_index():
    x = torch.tensor([[0.0], [1.0], [-1.0], [1.0], [-1.0], [2.0]])
    indices, dist = distances.knn(x, 6, "sqeuclidean", chunk=2)
    assert indices[0].tolist() == [0, 1, 2, 3, 4, 5] and dist[0].tolist() == [0, 1, 1, 1, 1, 4]
    assert indices[3].tolist() == [3, 1, 0, 5, 2, 4]


def test_knn_follows_a_permutation_of_the_rows():
    x = random_features(50, 8, 8)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(9))
    indices, _ = distances.knn(x, 7, chunk=16)
    shuffled, _ = distances.knn(x[order], 7, chunk=16)
    assert (order[shuffled] == indices[order]).all()


def test_answers_in_the_kind_of_the_input():
    x = random_features(6, 4, 10)
    assert isinstance(distances.pairwise(x.numpy(), x.numpy()), np.ndarray)
    assert all(isinstance(part, np.ndarray) for part in distances.knn(x.numpy(), 2))
    np.testing.assert_array_equal(distances.pairwise(x.numpy(), x), distances.pairwise(x, x))
    assert distances.pairwise(x.double(), x.half()).dtype == torch.float32


def test_empty_sets_give_empty_results():
    x, none = random_features(3, 4, 11), torch.zeros(0, 4)
    assert distances.pairwise(x, none).shape == (3, 0) and distances.pairwise(none, x).shape == (0, 3)
    assert distances.knn(none, 2, y=x)[0].shape == (0, 2)


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda x: distances.pairwise(x, x, "manhattan"), "metric: 'manhattan' .*euclidean, sqeuclidean, cosine"),
        (lambda x: distances.pairwise(x, x[:, :3]), "feature sizes differ, 4 and 3"),
        (lambda x: distances.pairwise(x[0], x), r"x: expected 2-D .*\(4,\)"),
        (lambda x: distances.knn(x, 0), "k: expected 1 <= k <= 6"),
        (lambda x: distances.knn(x, 7), "k: expected 1 <= k <= 6"),
        (lambda x: distances.knn(x, 3, y=x[:2]), "k: expected 1 <= k <= 2"),
        (lambda x: distances.knn(x[:0], 1), "k: "),
        (lambda x: distances.pairwise(x, x, chunk=0), "chunk: "),
    ],
)
def test_wrong_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(random_features(6, 4, 12))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_named_with_their_rows(bad):
    x, y = random_features(6, 4, 13), random_features(6, 4, 14)
    y[2, 1] = y[5, 0] = bad
    with pytest.raises(ValueError, match="y: NaN, Inf or overflow in 2 of 6 rows, first row 2"):
        distances.pairwise(x, y)
    with pytest.raises(ValueError, match="x: NaN"):
        distances.knn(y, 2)


def test_the_settings_of_precision_agree_with_each_other_inside_and_after():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with distances.fp32(torch.device("cpu")):
            assert torch.backends.cuda.matmul.allow_tf32 is False  # raises where old and new settings are mixed
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.allow_tf32 is True
    finally:
        torch.set_float32_matmul_precision(before)


def test_precision_settings_are_overridden_inside_and_restored_after():
    x = random_features(70, 256, 15)
    exact, near = distances.pairwise(x, x), distances.knn(x, 5)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(distances.pairwise(x, x), exact)
            assert torch.equal(distances.knn(x, 5)[1], near[1])
            assert (x @ x.T).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_knn_is_the_same_on_every_call():
    x = random_features(200, 16, 16).round()
    first = distances.knn(x, 20, chunk=64)
    assert all(torch.equal(a, b) for a, b in zip(first, distances.knn(x, 20, chunk=64)))
