"""Distances between feature rows and exact nearest neighbours, in blocks: fp32, on the device where the features lie.

Every function takes torch tensors (CPU or CUDA) or numpy arrays and answers in the kind of its first argument. Whatever
TF32 or autocast setting is active outside, the products here are full fp32.
"""

import contextlib
from collections.abc import Iterable

import numpy as np
import torch

METRICS = ("euclidean", "sqeuclidean", "cosine")
BLOCK_BYTES = 128 * 2**20  # of one block of distances, where the caller gives no chunk
CPU_COLUMNS = 3072  # of one matrix product: faster than wider ones on the CPU, with half of their scratch memory
Array = torch.Tensor | np.ndarray


def features(x: Array, name: str, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` as a float32 tensor (N, D) on its device, sharing its memory if it is float32 already, and ||x||^2 (N,).

    Raises: ValueError naming the input if it is not 2-D, or holds NaN or Inf (how many rows, and the first, counted
        from `first`).
    """
    x = torch.as_tensor(x).detach()
    if x.ndim != 2:
        raise ValueError(f"{name}: expected 2-D features (N, D), got shape {tuple(x.shape)}")
    x = x.float()
    norms = squared_norms(x)
    finite = norms.isfinite()
    if not bool(finite.all()):
        rows = (~finite).nonzero()[:, 0]
        raise ValueError(
            f"{name}: NaN, Inf or overflow in {len(rows)} of {len(x)} rows, first row {first + int(rows[0])}"
        )
    return x, norms


def like(result: torch.Tensor, x: Array) -> Array:
    """`result` as a numpy array if `x` is one, unchanged otherwise."""
    return result if isinstance(x, torch.Tensor) else result.cpu().numpy()


@contextlib.contextmanager
def fp32(device: torch.device):
    """Within: no autocast and no TF32 or bf16 inside float32 products; the settings of before come back afterwards."""
    before = torch.get_float32_matmul_precision()  # the one switch for cuBLAS and oneDNN; others beside it would clash
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def squared_norms(x: torch.Tensor) -> torch.Tensor:
    """(N,) float32 sums of squares of the rows, exact where fp32 sums are, without a copy of x."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.einsum("nd,nd->n", x.numpy(), x.numpy()))
    return torch.cat([part.square().sum(1) for part in x.split(4096)])


def rows_per_block(columns: int, chunk: int | None, block_bytes: int = BLOCK_BYTES, most: int = 2048) -> int:
    """Rows of a block of float32 with `columns` columns: `chunk` if given, else what fits `block_bytes`, at least 1."""
    if chunk is not None:
        if chunk < 1:
            raise ValueError(f"chunk: expected at least 1 row, got {chunk}")
        return chunk
    rows = min(most, block_bytes // (4 * max(columns, 1)))
    return max(1, rows - rows % 64 if rows > 64 else rows)


def column_terms(norms: torch.Tensor, metric: str) -> torch.Tensor:
    """(M,) what `block` needs of each row: its squared norm, or for the cosine one over its norm (at least 1e-12)."""
    if metric not in METRICS:
        raise ValueError(f"metric: {metric!r} is unknown, expected one of {', '.join(METRICS)}")
    return norms.clamp(min=1e-24).rsqrt_() if metric == "cosine" else norms


def block(x: torch.Tensor, y: torch.Tensor, y_terms: torch.Tensor, metric: str, out: torch.Tensor | None = None):
    """(b, M) float32 that orders each row as the distance does: distance up to a constant of the row.

    It is ||y||^2 - 2 x.y for both Euclidean metrics, and -||x|| cos(x, y) for the cosine.
    """
    out = x.new_empty(len(x), len(y)) if out is None else out
    x = -x if metric == "cosine" else x
    step = CPU_COLUMNS if x.device.type == "cpu" else max(1, len(y))
    for start in range(0, len(y), step):
        columns = slice(start, start + step)
        if metric == "cosine":
            torch.mm(x, y[columns].T, out=out[:, columns]).mul_(y_terms[columns])
        else:
            torch.addmm(y_terms[columns], x, y[columns].T, alpha=-2, out=out[:, columns])
    return out


def finish(blocks: torch.Tensor, x_terms: torch.Tensor, metric: str) -> torch.Tensor:
    """Turns values of `block` (b, any) into distances in place; x_terms (b,) are the `column_terms` of the rows."""
    if metric == "cosine":
        return blocks.mul_(x_terms[:, None]).add_(1).clamp_(min=0)
    blocks.add_(x_terms[:, None]).clamp_(min=0)
    return blocks.sqrt_() if metric == "euclidean" else blocks


def _same_width(x: torch.Tensor, y: torch.Tensor) -> None:
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y: feature sizes differ, {x.shape[1]} and {y.shape[1]}")


def pairwise(x: Array, y: Array, metric: str = "euclidean", chunk: int | None = None) -> Array:
    """(N, M) float32 distances between the rows of x (N, D) and y (M, D).

    Euclidean distances come from ||x||^2 + ||y||^2 - 2 x.y, clamped at 0: never NaN, absolute error of the square about
    1e-6 (||x||^2 + ||y||^2), so duplicates may show a distance of 1e-3 of their norm. `cosine` is 1 - cos, in [0, 2].
    Memory: the result and one block of `chunk` rows. Raises: ValueError for NaN or Inf, unequal D, an unknown metric.
    """
    (x_, x_norms), (y_, y_norms) = features(x, "x"), features(y, "y")
    _same_width(x_, y_)
    with fp32(x_.device):
        x_terms, y_terms = column_terms(x_norms, metric), column_terms(y_norms, metric)
        dist = torch.empty(len(x_), len(y_), device=x_.device)
        rows = rows_per_block(len(y_), chunk)
        for start in range(0, len(x_), rows):
            part = slice(start, start + rows)
            finish(block(x_[part], y_, y_terms, metric, out=dist[part]), x_terms[part], metric)
    return like(dist, x)


def knn(
    x: Array, k: int, metric: str = "euclidean", y: Array | None = None, chunk: int | None = None
) -> tuple[Array, Array]:
    """The k nearest rows of y for each row of x: indices (N, k) int64, distances (N, k) float32, rows ascending.

    Without y the neighbours are sought among x itself: the row itself always comes first, at distance 0, also among
    duplicates; then half of the product suffices, as distances are symmetric. Equal distances are listed by index;
    which of the equals at rank k is kept is arbitrary. Memory: one block of `chunk` x M distances beside the result.
    Raises: ValueError unless 1 <= k <= M, and as `pairwise`.
    """
    if y is not None:
        y = torch.as_tensor(y)
        if not 1 <= k <= len(y):
            raise ValueError(f"k: expected 1 <= k <= {len(y)} (rows searched), got {k}")
        return nearest(x, [y], k, metric, chunk)
    x_, norms = features(x, "x")
    if not 1 <= k <= len(x_):
        raise ValueError(f"k: expected 1 <= k <= {len(x_)} (rows searched), got {k}")
    with fp32(x_.device):
        indices, dist, _ = self_neighbours(x_, column_terms(norms, metric), k, metric, chunk)
    return like(indices, x), like(dist, x)


def nearest(
    x: Array, blocks: Iterable[Array], k: int, metric: str = "euclidean", chunk: int | None = None, name: str = "y"
) -> tuple[Array, Array]:
    """`knn` among rows that come in blocks (b, D) on x's device, numbered in the order in which they come.

    Memory: a block of `chunk` x b distances beside the result and what comes; never all rows at once.
    Raises: ValueError as `knn`, also for fewer than k rows; `name` says in it what the blocks are.
    """
    x_, x_norms = features(x, "x")
    found, rows_seen = _Nearest(len(x_), k, x_.device), 0
    for y in blocks:  # outside fp32: what computes a block keeps its own settings
        y_, y_norms = features(y, name, rows_seen)
        _same_width(x_, y_)
        with fp32(x_.device):
            y_terms, rows = column_terms(y_norms, metric), rows_per_block(len(y_), chunk)
            for start in range(0, len(x_), rows):
                part = slice(start, start + rows)
                found.feed(part, block(x_[part], y_, y_terms, metric), rows_seen, dim=1)
        rows_seen += len(y_)
    if not 1 <= k <= rows_seen:
        raise ValueError(f"k: expected 1 <= k <= {rows_seen} (rows searched), got {k}")
    with fp32(x_.device):
        indices, dist = _sorted_rows(found.indices, finish(found.dist, column_terms(x_norms, metric), metric))
    return like(indices, x), like(dist, x)


def _sorted_rows(indices: torch.Tensor, dist: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row ascending by (distance, index)."""
    indices, order = indices.sort(dim=1)
    dist, rank = dist.gather(1, order).sort(dim=1, stable=True)
    return indices.gather(1, rank), dist


class _Nearest:
    """The k smallest values seen so far for each of N rows, fed in pieces."""

    def __init__(self, n: int, k: int, device: torch.device):
        self.k = k
        self.dist = torch.full((n, k), torch.inf, device=device)
        self.indices = torch.zeros(n, k, dtype=torch.int64, device=device)

    def feed(self, rows: slice, values: torch.Tensor, offset: int, dim: int) -> None:
        """Takes values (b, M) of columns offset.. for `rows` if dim is 1, or their transpose if dim is 0."""
        near, where = values.topk(min(self.k, values.shape[dim]), dim=dim, largest=False, sorted=False)
        if dim == 0:
            near, where = near.T, where.T
        both = torch.cat([self.dist[rows], near], 1)
        self.dist[rows], keep = both.topk(self.k, dim=1, largest=False, sorted=False)
        self.indices[rows] = torch.cat([self.indices[rows], where + offset], 1).gather(1, keep)


def self_neighbours(
    x: torch.Tensor, terms: torch.Tensor, k: int, metric: str, chunk: int | None = None, farthest: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`knn` of checked features and their `column_terms`, and on request the largest distance (N,) of each row.

    Only blocks on and above the diagonal are multiplied; each serves its rows and, transposed, its columns.
    """
    n = len(x)
    found = _Nearest(n, k, x.device)
    far = torch.zeros(n, device=x.device) if farthest else None
    rows = rows_per_block(n, chunk)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        part, later = slice(start, stop), slice(stop, n)
        dist = _shifted(block(x[part], x[start:], terms[start:], metric), terms[part], metric)  # (b, n - start)
        if farthest:
            far[part] = torch.maximum(far[part], dist.amax(1))
            far[start:] = torch.maximum(far[start:], dist.amax(0))
        dist.diagonal().fill_(-torch.inf)  # self first, also among duplicates
        found.feed(part, dist, start, dim=1)
        if stop < n:
            found.feed(later, dist[:, stop - start :], start, dim=0)
    indices, dist = _sorted_rows(found.indices, found.dist)
    dist.clamp_(min=0)
    if metric == "euclidean":
        dist.sqrt_()
        far = far.sqrt_() if farthest else None
    return indices, dist, far


def _shifted(blocks: torch.Tensor, x_terms: torch.Tensor, metric: str) -> torch.Tensor:
    """`finish` before the clamp and the root, which would only make ties."""
    if metric == "cosine":
        return blocks.mul_(x_terms[:, None]).add_(1)
    return blocks.add_(x_terms[:, None])
