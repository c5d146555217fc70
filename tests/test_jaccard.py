"""common.jaccard: the sparse distance against a dense loop of the definition, DBSCAN labels against scikit-learn."""

import sys

import numpy as np
import pytest
import torch
from conftest import peak_mib
from scipy import sparse
from sklearn.cluster import DBSCAN

from common import jaccard

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")]


def clustered(n, d=32, per_cluster=12, noise=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(1, n // per_cluster), d, generator=generator)
    x = centres[torch.randint(len(centres), (n,), generator=generator)] + noise * torch.randn(n, d, generator=generator)
    return torch.nn.functional.normalize(x, dim=1)


def oracle(feats, k1, k2):
    """Steps 1 to 6 of the definition with Python sets, float64."""
    x = feats.double().numpy()
    n = len(x)
    dist = 2 - 2 * x @ x.T
    rank = []
    for i in range(n):
        others = sorted((j for j in range(n) if j != i), key=lambda j: (dist[i, j], j))
        rank.append([i] + others)
    n1, n2 = k1, round(k1 / 2) + 1

    def reciprocal(i, k):
        return {j for j in rank[i][:k] if i in rank[j][:k]}

    v = np.zeros((n, n))
    for i in range(n):
        base = reciprocal(i, n1)
        expanded = set(base)
        for j in base:
            other = reciprocal(j, n2)
            if 3 * len(other & base) > 2 * len(other):
                expanded |= other
        members = sorted(expanded)
        v[i, members] = np.exp(-dist[i, members])
        v[i] /= v[i].sum()
    if k2 > 1:
        v = np.array([v[rank[i][:k2]].mean(0) for i in range(n)])
    result = np.zeros((n, n))
    for i in range(n):
        s = np.minimum(v[i], v).sum(1)
        result[i] = 1 - s / (2 - s)
    return result.clip(min=0)


def dense(matrix):
    """With 1 where no entry is stored."""
    out = np.ones(matrix.shape, np.float32)
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    out[rows, matrix.indices] = matrix.data
    return out


def well_formed(matrix):
    full = dense(matrix)
    assert matrix.dtype == np.float32 and isinstance(matrix, sparse.csr_matrix)
    assert (matrix.data >= 0).all() and (matrix.data < 1).all()
    assert np.array_equal(full, full.T) and (np.diag(full) == 0).all()
    for start, stop in zip(matrix.indptr[:-1], matrix.indptr[1:]):
        assert (np.diff(matrix.indices[start:stop]) > 0).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize(
    "n,k1,k2,chunk",
    [
        (300, 30, 6, None),
        (300, 30, 6, 37),
        (150, 20, 1, None),
        (150, 10, 4, None),
        (100, 5, 3, 1),
        (60, 1, 1, None),
        (40, 2, 5, None),
        (64, 3, 2, None),
        pytest.param(600, 30, 6, None, marks=pytest.mark.slow),
    ],
)
def test_equals_loop_of_the_definition(n, k1, k2, chunk, device):
    x = clustered(n, seed=n + k1)
    ours = jaccard.jaccard_distance(x.to(device), k1, k2, chunk=chunk)
    well_formed(ours)
    np.testing.assert_allclose(dense(ours), oracle(x, k1, k2), atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 7, 29])
def test_fewer_rows_than_neighbours_asked_for(n):
    x = clustered(n, seed=n)
    ours = jaccard.jaccard_distance(x)
    well_formed(ours)
    np.testing.assert_allclose(dense(ours), oracle(x, 30, 6), atol=1e-6)


def test_no_rows():
    ours = jaccard.jaccard_distance(torch.zeros(0, 8))
    assert ours.shape == (0, 0) and ours.dtype == np.float32
    assert jaccard.cluster(ours, 0.5).shape == (0,)


def test_every_row_meets_itself_first_among_more_duplicates_than_neighbours():
    """50 copies of one row and 40 others: without the rule a copy may miss itself, and its own distance is not 0."""
    x = torch.cat([clustered(1).repeat(50, 1), clustered(40, seed=3)])
    ours = jaccard.jaccard_distance(x[torch.randperm(90, generator=torch.Generator().manual_seed(0))])
    well_formed(ours)
    for few in (2, 10):
        pairs = torch.cat([clustered(60, seed=4)] + [clustered(60, seed=4)[:5]] * few)
        well_formed(jaccard.jaccard_distance(pairs))


def test_a_pair_of_copies_is_at_an_explicit_zero():
    x = torch.eye(8).repeat_interleave(3, 0)
    ours = jaccard.jaccard_distance(x, k1=3, k2=3)
    assert ours.nnz == 24 * 3 and (ours.data < 1e-6).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_follows_a_permutation_of_the_rows(seed):
    x = clustered(200, seed=seed)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
    whole, shuffled = (dense(jaccard.jaccard_distance(feats)) for feats in (x, x[order]))
    np.testing.assert_allclose(shuffled, whole[order][:, order], atol=1e-6)


def test_blocks_of_any_size_and_threads_give_the_same_matrix(monkeypatch):
    x = clustered(180, seed=5)
    whole = jaccard.jaccard_distance(x)
    for pairs, cells in ((1, 1), (500, 10**6), (10**6, 400)):
        monkeypatch.setattr(jaccard, "BLOCK_PAIRS", pairs)
        monkeypatch.setattr(jaccard, "BLOCK_CELLS", cells)
        again = jaccard.jaccard_distance(x.numpy())
        assert np.array_equal(again.indptr, whole.indptr) and np.array_equal(again.indices, whole.indices)
        np.testing.assert_array_equal(again.data, whole.data)


@pytest.mark.parametrize(
    "row,value,words",
    [
        (4, float("nan"), "feats: NaN, Inf or overflow in 1 of 20 rows, first row 4"),
        (7, float("inf"), "feats: NaN, Inf or overflow in 1 of 20 rows, first row 7"),
        (3, 20.0, "feats: 1 of 20 rows are not of unit length, first row 3"),
        (3, 0.0, "not of unit length"),
    ],
)
def test_wrong_features_are_named(row, value, words):
    x = clustered(20)
    x[row] = value
    with pytest.raises(ValueError, match=words):
        jaccard.jaccard_distance(x)


def test_wrong_options_are_named():
    x = clustered(20)
    for call, words in (
        (lambda: jaccard.jaccard_distance(x, k1=0), "k1: expected at least 1"),
        (lambda: jaccard.jaccard_distance(x, k2=0), "k2: expected at least 1"),
        (lambda: jaccard.jaccard_distance(x[0]), "feats: expected 2-D"),
        (lambda: jaccard.cluster(sparse.eye(3, format="csr"), 1.0), "eps: expected 0 < eps < 1"),
        (lambda: jaccard.cluster(sparse.eye(3, format="csr"), 0.0), "eps: "),
        (lambda: jaccard.cluster(sparse.eye(3, format="csr"), 0.5, 0), "min_samples: "),
        (lambda: jaccard.cluster(np.zeros((3, 3)), 0.5), "dist: expected a square sparse matrix"),
        (lambda: jaccard.cluster(sparse.csr_matrix((2, 3)), 0.5), r"dist: expected a square .*\(2, 3\)"),
        (lambda: jaccard.cluster(sparse.csr_matrix(np.array([[np.nan]])), 0.5), "dist: holds NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def sklearn_labels(matrix, eps, min_samples):
    return DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(dense(matrix))


@pytest.mark.parametrize("eps", [0.05, 0.3, 0.5, 0.6, 0.7, 0.9])
@pytest.mark.parametrize("min_samples", [1, 2, 4, 9])
def test_labels_equal_sklearn_on_the_dense_matrix(eps, min_samples):
    ours = jaccard.jaccard_distance(clustered(400, noise=0.9, seed=6), k1=20)
    labels = jaccard.cluster(ours, eps, min_samples)
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, sklearn_labels(ours, eps, min_samples))


@pytest.mark.parametrize("seed", range(20))
def test_border_points_and_numbering_equal_sklearn_on_random_symmetric_matrices(seed):
    """Distances of one decimal, so that many equal eps and borders touch several clusters; diagonal stored or not."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 60))
    upper = np.triu(rng.integers(1, 10, (n, n)) / 10 * (rng.random((n, n)) < 0.15), 1)
    stored = np.argwhere(upper + upper.T > 0)
    values = (upper + upper.T)[tuple(stored.T)].astype(np.float32)
    matrix = sparse.csr_matrix((values, stored.T), (n, n))
    full = dense(matrix)
    np.fill_diagonal(full, 0)
    for min_samples in (1, 2, 3, 4):
        for eps in (0.3, 0.6, 0.9):
            expected = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(full)
            np.testing.assert_array_equal(jaccard.cluster(matrix, eps, min_samples), expected)


def test_explicit_zeros_are_neighbours():
    zeros = sparse.csr_matrix((np.zeros(9, np.float32), np.tile([0, 1, 2], 3), [0, 3, 6, 9]), (3, 3))
    assert jaccard.cluster(zeros, 0.1, 3).tolist() == [0, 0, 0]
    assert jaccard.cluster(sparse.csr_matrix((3, 3), dtype=np.float32), 0.1, 2).tolist() == [-1, -1, -1]


def test_well_separated_clusters_are_found():
    labels = torch.arange(20).repeat_interleave(10)
    noise = 0.02 * torch.randn(200, 20, generator=torch.Generator().manual_seed(1))
    x = torch.nn.functional.normalize(torch.eye(20)[labels] + noise)
    found = jaccard.cluster(jaccard.jaccard_distance(x, k1=10), 0.6)
    np.testing.assert_array_equal(found, labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")
def test_labels_on_cuda_equal_labels_on_the_cpu():
    x = clustered(3000, d=256)
    on_cpu, on_cuda = (jaccard.cluster(jaccard.jaccard_distance(x.to(d)), 0.6) for d in ("cpu", "cuda"))
    np.testing.assert_array_equal(on_cpu, on_cuda)


CLUSTERED = """
from common import jaccard
N = {n}
centres = torch.randn(N // 16, 64)
x = torch.nn.functional.normalize(centres[torch.arange(N) % len(centres)] + 0.3 * torch.randn(N, 64))
jaccard.jaccard_distance(x[:500])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("n", [4000, 8000])
def test_peak_memory_grows_with_the_entries_of_a_row_and_not_with_n_squared(n):
    """Below 8 KiB a row beside the block of distances (a dense float32 matrix takes 16 and 32 KiB a row)."""
    call = "matrix = jaccard.jaccard_distance(x, chunk=128)"
    peak, entries = peak_mib(CLUSTERED.format(n=n), call, "matrix.nnz / N")
    assert entries < 500
    assert peak < 3 * 128 * n * 4 / 2**20 + 8 * n / 1024, f"{peak} MiB, {entries} entries a row"
