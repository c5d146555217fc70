"""common.jaccard.re_rank against a dense loop written from the published algorithm (Zhong et al. 2017, sec. 3)."""

import numpy as np
import pytest
import torch

from common import jaccard

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")]


def oracle(query, gallery, k1, k2, lambda_value):
    """Dense, float64: scaled distances, k-reciprocal sets, expansion, local query expansion, Jaccard, mixture."""
    x = np.concatenate([query, gallery]).astype(np.float64)
    n, num_query = len(x), len(query)
    dist = ((x[:, None] - x[None]) ** 2).sum(2)
    dist = (dist / dist.max(axis=0)).T
    ordered = dist.copy()
    np.fill_diagonal(ordered, -1)
    rank = np.argsort(ordered, axis=1, kind="stable")

    def reciprocal(i, k):
        forward = rank[i, : k + 1]
        return [j for j in forward if i in rank[j, : k + 1]]

    v = np.zeros((n, n))
    for i in range(n):
        base = reciprocal(i, k1)
        members = list(base)
        for j in base:
            candidates = reciprocal(j, int(np.around(k1 / 2)))
            if len(np.intersect1d(candidates, base)) > 2 / 3 * len(candidates):
                members += candidates
        members = np.unique(members)
        weight = np.exp(-dist[i, members])
        v[i, members] = weight / weight.sum()
    if k2 != 1:
        v = np.stack([v[rank[i, :k2]].mean(axis=0) for i in range(n)])
    final = np.zeros((num_query, n - num_query))
    for i in range(num_query):
        for j in range(num_query, n):
            common = np.minimum(v[i], v[j]).sum()
            final[i, j - num_query] = (1 - lambda_value) * (1 - common / (2 - common)) + lambda_value * dist[i, j]
    return final


def case(num_query, num_gallery, d=24, ids=8, noise=0.6, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((ids, d)) * 2
    n = num_query + num_gallery
    x = centres[rng.integers(0, ids, n)] + noise * rng.standard_normal((n, d))
    return x[:num_query].astype(np.float32), x[num_query:].astype(np.float32)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize(
    "k1,k2,lambda_value,chunk",
    [(20, 6, 0.3, None), (20, 6, 0.3, 9), (20, 1, 0.3, None), (7, 3, 0.0, None), (10, 4, 1.0, 1), (5, 2, 0.5, None)],
)
def test_equals_loop_of_the_published_algorithm(k1, k2, lambda_value, chunk, device):
    query, gallery = case(20, 110, seed=k1)
    expected = oracle(query, gallery, k1, k2, lambda_value)
    given = [torch.from_numpy(x).to(device) for x in (query, gallery)]
    ours = jaccard.re_rank(*given, k1, k2, lambda_value, chunk=chunk)
    assert ours.dtype == torch.float32 and ours.shape == (20, 110)
    ours = ours.cpu().numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    for ranking, reference in zip(np.argsort(ours, axis=1), expected):  # equal up to exchanges of equal values
        assert (np.diff(reference[ranking]) > -1e-6).all()


@pytest.mark.parametrize("num_query,num_gallery", [(1, 1), (1, 5), (3, 2), (4, 15)])
def test_fewer_rows_than_neighbours(num_query, num_gallery):
    query, gallery = case(num_query, num_gallery, seed=num_gallery)
    np.testing.assert_allclose(jaccard.re_rank(query, gallery), oracle(query, gallery, 20, 6, 0.3), atol=1e-5)


def test_lambda_one_keeps_the_order_of_the_distances():
    query, gallery = case(10, 60)
    order = np.argsort(((query[:, None] - gallery[None]) ** 2).sum(2), axis=1)
    np.testing.assert_array_equal(np.argsort(jaccard.re_rank(query, gallery, lambda_value=1.0), axis=1), order)


def test_follows_permutations_of_query_and_gallery():
    query, gallery = case(15, 80, seed=4)
    rng = np.random.default_rng(0)
    q, g = rng.permutation(15), rng.permutation(80)
    expected = jaccard.re_rank(query, gallery)[q][:, g]
    np.testing.assert_allclose(jaccard.re_rank(query[q], gallery[g]), expected, atol=1e-6)


def test_identical_features_give_finite_distances():
    same = np.ones((6, 4), np.float32)
    assert np.isfinite(jaccard.re_rank(same[:2], same[2:])).all()


def test_kind_of_the_answer_is_that_of_the_query():
    query, gallery = case(4, 30)
    as_torch = jaccard.re_rank(torch.from_numpy(query), torch.from_numpy(gallery))
    assert isinstance(as_torch, torch.Tensor) and isinstance(jaccard.re_rank(query, gallery), np.ndarray)
    np.testing.assert_array_equal(as_torch.numpy(), jaccard.re_rank(query, gallery))


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(k1=0), "k1: "),
        (dict(k2=0), "k2: "),
        (dict(lambda_value=1.5), "lambda_value: expected a value in"),
        (dict(gallery=np.zeros((0, 24), np.float32)), "gallery: empty"),
        (dict(query=np.zeros((0, 24), np.float32)), "query: empty"),
        (dict(query=np.full((2, 24), np.nan, np.float32)), "query: NaN"),
        (dict(gallery=np.zeros((3, 5), np.float32)), "feature sizes differ, 24 and 5"),
    ],
)
def test_wrong_input_is_named(change, words):
    query, gallery = case(4, 30)
    with pytest.raises(ValueError, match=words):
        jaccard.re_rank(**({"query": query, "gallery": gallery} | change))
