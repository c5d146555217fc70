"""k-reciprocal Jaccard distance, DBSCAN on it, and re-ranking: exact, sparse, memory O(N x entries of a row).

The neighbours of i are its nearest rows by Euclidean distance, i itself first. R(i) are those among the first n1 that
have i among their first n1, H(i) the same with n2. R*(i) adds to R(i) every H(j), j in R(i), more than two thirds of
which lie in R(i). V_i is a softmax of minus squared distances over R*(i), then averaged over the first k2 neighbours of
i. With s_ij = sum_g min(V_ig, V_jg) the distance is J_ij = 1 - s_ij / (2 - s_ij), which is 1 without common support.
The products run on the device of the features, the sparse algebra on the CPU.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy import sparse
from scipy.sparse import csgraph

from common import distances
from common.distances import Array
from common.evaluation import ranges

UNIT_TOLERANCE = 1e-3
BLOCK_PAIRS = 2**20  # pairs of entries that share a column, expanded at a time and thread
BLOCK_CELLS = 2**18  # sums kept at a time and thread; small enough for a core's cache
BLOCKS_AHEAD = 64  # results that may wait to be stored


def jaccard_distance(feats: Array, k1: int = 30, k2: int = 6, chunk: int | None = None) -> sparse.csr_matrix:
    """Jaccard distances (N, N), float32 csr, of the unit rows feats (N, D): every pair below 1, zeros explicit.

    Symmetric, zero diagonal, sorted indices; an absent pair is at distance 1. k1 neighbours including the row itself
    (n1 = k1, n2 = round(k1 / 2) + 1, both at most N), mean over k2. Memory: one block of `chunk` x N distances, then
    O(N x entries of a row). Raises: ValueError for NaN or Inf, rows that are not of unit length, k1 or k2 below 1.
    """
    x, norms = distances.features(feats, "feats")
    _positive(k1=k1, k2=k2)
    off = ((norms.sqrt() - 1).abs() > UNIT_TOLERANCE).nonzero()[:, 0]
    if len(off):
        raise ValueError(
            f"feats: {len(off)} of {len(x)} rows are not of unit length, first row {int(off[0])} has norm "
            f"{float(norms[off[0]]) ** 0.5:.4g}; apply torch.nn.functional.normalize"
        )
    if len(x) == 0:
        return sparse.csr_matrix((0, 0), dtype=np.float32)
    with distances.fp32(x.device):
        n1, n2 = min(k1, len(x)), min(round(k1 / 2) + 1, len(x))
        indices, dist, _ = distances.self_neighbours(x, norms, max(n1, n2, min(k2, len(x))), "sqeuclidean", chunk)
        v = _encode(x, indices.cpu().numpy(), dist.cpu().numpy(), n1, n2, k2, np.ones(len(x)))
    return _sparse_jaccard(v)


def re_rank(
    query: Array, gallery: Array, k1: int = 20, k2: int = 6, lambda_value: float = 0.3, chunk: int | None = None
) -> Array:
    """(Q, G) float32 k-reciprocal re-ranking distances (Zhong et al. 2017) of features (Q, D) and (G, D), any length.

    d_ij is the squared Euclidean distance over the largest of row i among query and gallery together; the neighbours
    are k1 + 1 and round(k1 / 2) + 1 including the row itself, which always comes first; the result is
    lambda_value * d + (1 - lambda_value) * J. Memory: the result, a copy of the features, a block `chunk` x (Q + G).
    Raises: ValueError for NaN or Inf, unequal D, empty query or gallery, k1 or k2 below 1, lambda_value outside [0, 1].
    """
    (q, q_norms), (g, g_norms) = distances.features(query, "query"), distances.features(gallery, "gallery")
    _positive(k1=k1, k2=k2)
    if q.shape[1] != g.shape[1]:
        raise ValueError(f"query and gallery: feature sizes differ, {q.shape[1]} and {g.shape[1]}")
    if not 0 <= lambda_value <= 1:
        raise ValueError(f"lambda_value: expected a value in [0, 1], got {lambda_value}")
    if len(q) == 0 or len(g) == 0:
        raise ValueError(f"{'query' if len(q) == 0 else 'gallery'}: empty, nothing to rank")
    with distances.fp32(q.device):
        x, norms = torch.cat([q, g.to(q.device)]), torch.cat([q_norms, g_norms.to(q.device)])
        n1, n2 = min(k1 + 1, len(x)), min(round(k1 / 2) + 1, len(x))
        k = max(n1, n2, min(k2, len(x)))
        indices, dist, farthest = distances.self_neighbours(x, norms, k, "sqeuclidean", chunk, farthest=True)
        farthest.clamp_(min=torch.finfo(torch.float32).tiny)
        v = _encode(x, indices.cpu().numpy(), dist.cpu().numpy(), n1, n2, k2, farthest.double().cpu().numpy())
        final = _dense_jaccard(v, len(q), q.device)
        rows = distances.rows_per_block(len(g), chunk)
        for part in (slice(start, min(start + rows, len(q))) for start in range(0, len(q), rows)):
            block = distances.block(x[part], x[len(q) :], norms[len(q) :], "sqeuclidean")
            distances.finish(block, norms[part], "sqeuclidean").div_(farthest[part, None])
            final[part] = torch.lerp(final[part], block, lambda_value)
    return distances.like(final, query)


def cluster(dist: sparse.csr_matrix, eps: float, min_samples: int = 4) -> np.ndarray:
    """DBSCAN labels (N,) int64, -1 outlier, of a symmetric sparse distance matrix in which an absent pair means 1.

    The labels equal sklearn.cluster.DBSCAN on the dense matrix: a core point has min_samples points within eps, itself
    included; clusters are numbered by their first core point; a border point joins the first cluster that reaches it.
    Raises: ValueError unless 0 < eps < 1 (absent pairs would be neighbours), for a dense or non-square matrix, for NaN.
    """
    if not sparse.issparse(dist) or dist.shape[0] != dist.shape[1]:
        raise ValueError(f"dist: expected a square sparse matrix, got {type(dist).__name__} of shape {np.shape(dist)}")
    if not 0 < eps < 1:
        raise ValueError(f"eps: expected 0 < eps < 1, as absent pairs mean distance 1, got {eps}")
    _positive(min_samples=min_samples)
    dist, n = dist.tocsr(), dist.shape[0]
    if np.isnan(dist.data).any():
        raise ValueError("dist: holds NaN")
    near = np.flatnonzero(dist.data <= float(eps))
    rows, columns = np.searchsorted(dist.indptr, near, "right") - 1, dist.indices[near]
    rows, columns = rows[rows != columns], columns[rows != columns]
    core = np.bincount(rows, minlength=n) + 1 >= min_samples
    inner = core[rows] & core[columns]
    graph = sparse.csr_matrix((np.ones(inner.sum(), bool), (rows[inner], columns[inner])), (n, n))
    component = csgraph.connected_components(graph, directed=False)[1]
    labels = np.full(n, -1, dtype=np.int64)
    _, first, inverse = np.unique(component[core], return_index=True, return_inverse=True)
    labels[core] = np.argsort(np.argsort(first))[inverse]
    border = core[columns] & ~core[rows]
    reached = np.full(n, n, dtype=np.int64)
    np.minimum.at(reached, rows[border], labels[columns[border]])
    return np.where(reached < n, reached, labels)


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def _graph(indices: np.ndarray) -> sparse.csr_matrix:
    """(N, N) ones at (i, j) for every j in row i of indices (N, k), columns sorted."""
    n, k = indices.shape
    shape, pointers = (n, n), np.arange(0, n * k + 1, k)
    return sparse.csr_matrix((np.ones(n * k, np.float32), np.sort(indices, axis=1).ravel(), pointers), shape)


def _encode(x, indices, dist, n1, n2, k2, scale) -> sparse.csr_matrix:
    """V (N, N) float64 csr with sorted columns and unit row sums, from neighbour lists and squared distances (N, k).

    The weights are exp(-d_ij / scale_i); k2 = 1 skips the averaging.
    """
    n = len(indices)
    neighbours, half = _graph(indices[:, :n1]), _graph(indices[:, :n2])
    reciprocal = neighbours.multiply(neighbours.T.tocsr()).tocsr()  # R
    half = half.multiply(half.T.tocsr()).tocsr()  # H
    common = (reciprocal @ half.T.tocsr()).multiply(reciprocal).tocsr()  # |R(i) and H(j)| at j in R(i)
    size = np.diff(half.indptr)
    common.data = (3 * common.data > 2 * size[common.indices]).astype(np.float32)
    common.eliminate_zeros()
    expanded = (reciprocal + common @ half).tocsr()  # R*
    expanded.sort_indices()

    weights = np.exp(-_pair_distances(x, expanded, indices, dist) / np.repeat(scale, np.diff(expanded.indptr)))
    totals = np.add.reduceat(weights, expanded.indptr[:-1])  # no row is empty, each holds itself
    weights /= np.repeat(totals, np.diff(expanded.indptr))
    v = sparse.csr_matrix((weights, expanded.indices, expanded.indptr), (n, n))
    if k2 > 1:
        first = _graph(indices[:, :k2]).astype(np.float64)
        v = (first @ v).tocsr()
        v.data /= min(k2, n)
        v.sort_indices()
    return v


def _pair_distances(x: torch.Tensor, pairs: sparse.csr_matrix, indices: np.ndarray, dist: np.ndarray) -> np.ndarray:
    """(nnz,) float64 squared distances of the stored pairs (i, j): from the list of i, else of j, else computed."""
    n, k = indices.shape
    rows = np.repeat(np.arange(n, dtype=np.int64), np.diff(pairs.indptr))
    columns = pairs.indices.astype(np.int64)
    order = np.argsort(indices, axis=1)
    known = (np.take_along_axis(indices, order, 1) + np.arange(n)[:, None] * n).ravel()
    values = np.take_along_axis(dist, order, 1).ravel()
    result = np.full(len(rows), np.nan)
    for keys in (rows * n + columns, columns * n + rows):
        open_ = np.flatnonzero(np.isnan(result))
        place = np.searchsorted(known, keys[open_]).clip(max=len(known) - 1)
        found = known[place] == keys[open_]
        result[open_[found]] = values[place[found]]
    open_ = np.flatnonzero(np.isnan(result))
    for part in np.array_split(open_, len(open_) // 4096 + 1):
        i, j = (torch.from_numpy(a[part]).to(x.device) for a in (rows, columns))
        result[part] = (x[i] - x[j]).square_().sum(1).cpu().numpy()
    return result


class _Columns:
    """The entries of a csr matrix V by column, then row: rows, values, and where each column starts and stops."""

    def __init__(self, v: sparse.csr_matrix):
        order = np.argsort(v.indices, kind="stable")
        self.rows = np.repeat(np.arange(v.shape[0], dtype=np.int32), np.diff(v.indptr))[order]
        self.values = v.data[order]
        size = np.bincount(v.indices, minlength=v.shape[1])
        self.stop = np.cumsum(size)
        self.start = self.stop - size


def _row_blocks(v: sparse.csr_matrix, begin: np.ndarray, stop: np.ndarray, num_rows: int) -> list[tuple[int, int]]:
    """Consecutive row ranges of at most BLOCK_PAIRS pairs and BLOCK_CELLS sums, at least one row each."""
    count = (stop - begin)[v.indices[: v.indptr[num_rows]]]
    pairs = np.concatenate([[0], np.cumsum(count)])[v.indptr[: num_rows + 1]]
    most = max(1, BLOCK_CELLS // v.shape[1])
    blocks, first = [], 0
    while first < num_rows:
        last = int(np.searchsorted(pairs, pairs[first] + BLOCK_PAIRS, "right")) - 1
        last = min(max(last, first + 1), first + most, num_rows)
        blocks.append((first, last))
        first = last
    return blocks


def _min_sums(v, columns: _Columns, begin: np.ndarray, start: int, stop: int, offset: int) -> np.ndarray:
    """s_ij, float64 (stop - start, N - offset), for the rows i in start..stop and j in offset..N.

    begin (N,) says where in each column of V the rows from `offset` on start. Every sum adds its columns in ascending
    order, so s_ij and s_ji are equal to the bit.
    """
    entries = slice(v.indptr[start], v.indptr[stop])
    first = begin[v.indices[entries]]
    count = columns.stop[v.indices[entries]] - first
    width = v.shape[0] - offset
    local = np.repeat(np.arange(stop - start) * width - offset, np.diff(v.indptr[start : stop + 1]))
    partner = ranges(first, count)
    value = columns.values[partner]
    np.minimum(value, np.repeat(v.data[entries], count), out=value)
    cell = np.repeat(local, count)
    cell += columns.rows[partner]
    return np.bincount(cell, value, (stop - start) * width).reshape(stop - start, width)


def _distance(s: np.ndarray) -> np.ndarray:
    """1 - s / (2 - s) in place of s, clipped at 0."""
    rest = 2 - s
    s *= -2
    s += 2
    s /= rest
    return s.clip(min=0, out=s)


def _sparse_jaccard(v: sparse.csr_matrix) -> sparse.csr_matrix:
    """Jaccard distances below 1, float32 csr (N, N) with sorted rows."""
    n, least = v.shape[0], 2.0**-25  # a smaller s makes a distance that rounds to 1
    columns = _Columns(v)

    def work(block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sums = _min_sums(v, columns, columns.start, *block, 0).ravel()
        cells = np.flatnonzero(sums > least)
        value = _distance(sums[cells].astype(np.float32))
        starts = np.arange(block[1] - block[0] + 1) * n
        lengths = np.diff(np.searchsorted(cells, starts))
        cells -= np.repeat(starts[:-1], lengths)
        return lengths, cells.astype(np.int32), value

    indices, data = np.empty(n, np.int32), np.empty(n, np.float32)
    lengths, used = [np.zeros(1, np.int64)], 0
    blocks = _row_blocks(v, columns.start, columns.stop, n)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for group in range(0, len(blocks), BLOCKS_AHEAD):
            for length, index, value in pool.map(work, blocks[group : group + BLOCKS_AHEAD]):
                lengths.append(length)
                stop = used + len(value)
                if stop > len(data):  # in place, so that no second copy of the matrix is ever held
                    for array in (indices, data):
                        array.resize(stop + stop // 8, refcheck=False)
                indices[used:stop], data[used:stop] = index, value
                used = stop
    for array in (indices, data):
        array.resize(used, refcheck=False)
    return sparse.csr_matrix((data, indices, np.cumsum(np.concatenate(lengths))), (n, n))


def _dense_jaccard(v: sparse.csr_matrix, num_query: int, device: torch.device) -> torch.Tensor:
    """(Q, G) float32 Jaccard distances of the first rows of V to the others."""
    columns, n = _Columns(v), v.shape[0]
    begin = columns.start + np.bincount(v.indices[: v.indptr[num_query]], minlength=n)
    result = np.empty((num_query, n - num_query), np.float32)

    def work(block: tuple[int, int]) -> None:
        result[slice(*block)] = _distance(_min_sums(v, columns, begin, *block, num_query).astype(np.float32))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(work, _row_blocks(v, begin, columns.stop, num_query)))
    return torch.from_numpy(result).to(device)
