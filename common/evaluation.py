"""Features of a data set over one or several processes, and the retrieval metrics mAP, CMC and mINP from them."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from common import distances
from common.distances import Array
from common.images import ImageStore, batches
from common.transforms import normalize

BLOCK_BYTES = (50 * 2**20, 16 * 2**20)  # of one block of distances on the CPU, on a device (sorting needs four there)
CACHED_VALUES = 2**19  # distances that a thread ranks at a time, about what a core caches
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class RankMetrics:
    """Retrieval metrics, all fractions: mAP; cmc (max_rank,) float64; mINP; ap (Q,) float64, nan without a match."""

    mAP: float
    cmc: np.ndarray
    mINP: float
    ap: np.ndarray
    num_valid: int

    def __str__(self) -> str:
        ranks = ", ".join(f"rank-{k} {100 * self.rank(k):.1f}" for k in (1, 5, 10))
        return f"mAP {100 * self.mAP:.1f}, {ranks}, mINP {100 * self.mINP:.1f} ({self.num_valid} queries)"

    def rank(self, k: int) -> float:
        """Share of valid queries with a match among their k first."""
        if not 1 <= k <= len(self.cmc):
            raise ValueError(f"rank: expected 1 <= k <= {len(self.cmc)} (max_rank), got {k}")
        return float(self.cmc[k - 1])


def extract(
    model: nn.Module,
    images: ImageStore,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 128,
    flip: bool = False,
    amp: str = "off",
    rank: int = 0,
    world_size: int = 1,
    output_device: str | torch.device | None = None,
    workers: int = 2,
) -> torch.Tensor:
    """Features (N, D) float32 of all images in their order, the same on every rank, on output_device or `device`.

    The model maps normalised images (B, 3, H, W) to (B, D); it runs in eval mode without gradients and leaves with the
    modes it came with. `images` has len() and gather(indices) -> uint8 (B, 3, H, W). Block b of batch_size images goes
    to rank b % world_size, so that the batches, and with them the numbers, do not depend on world_size. `flip` takes
    the mean with the mirrored images; `workers` processes decode what no cache holds. Collective if world_size > 1:
    every rank must call it with the same images.
    Memory: the result, and a rank's share of it. Raises: ValueError for no image, a bad argument or a bad output.
    """
    if amp not in AMP_DTYPES:
        raise ValueError(f"amp: expected one of {', '.join(AMP_DTYPES)}, got {amp!r}")
    if len(images) == 0 or batch_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"extract: {len(images)} images, batch_size {batch_size}, rank {rank} of {world_size}; "
            "expected at least one image and batch_size, and 0 <= rank < world_size"
        )
    device = torch.device(device)
    blocks = torch.arange(len(images)).split(batch_size)
    model = model.module if isinstance(model, DistributedDataParallel) else model  # its forward would wait for others
    output_device = device if output_device is None else torch.device(output_device)
    own, row = None, 0  # features of this rank's blocks, in order
    with _eval_mode(model), torch.inference_mode(), _autocast(device, AMP_DTYPES[amp]):
        for pixels, indices in _batches(images, blocks[rank::world_size], device, workers):
            x = normalize(pixels)
            out = model(x).float()
            if out.ndim != 2 or len(out) != len(indices):
                raise ValueError(f"model: expected output ({len(indices)}, D) in eval mode, got {tuple(out.shape)}")
            if own is None:
                own = _ordinary_empty(sum(map(len, blocks[rank::world_size])), out.shape[1], output_device)
            own[row : row + len(out)] = (out + model(x.flip(3)).float()) / 2 if flip else out
            row += len(out)
    return own if world_size == 1 else _gather(own, blocks, rank, world_size, device, output_device)


def _ordinary_empty(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """A tensor that autograd may save later, also when made within inference mode."""
    with torch.inference_mode(False):
        return torch.empty(rows, columns, device=device)


@contextlib.contextmanager
def _eval_mode(model: nn.Module):
    modes = [(module, module.training) for module in model.modules()]  # a module may be frozen in eval mode
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _autocast(device: torch.device, dtype: torch.dtype | None):
    return torch.autocast(device.type, dtype=dtype) if dtype else torch.autocast(device.type, enabled=False)


def _batches(images, blocks, device: torch.device, workers: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if isinstance(images, ImageStore):
        return batches(images, blocks, device, workers=workers)
    return ((images.gather(indices).to(device), indices) for indices in blocks)


def _gather(own, blocks, rank, world_size, device, output_device) -> torch.Tensor:
    """(N, D) on every rank: each sends its rows in turn, and they are placed by index."""
    carrier = device if distributed.get_backend() == "nccl" else torch.device("cpu")
    own = torch.empty(0, 0, device=carrier) if own is None else own.to(carrier)
    size = torch.tensor(own.shape[1], device=carrier)
    distributed.all_reduce(size, distributed.ReduceOp.MAX)
    result = torch.empty(sum(map(len, blocks)), int(size), device=output_device)
    for source in range(world_size):
        if not blocks[source::world_size]:
            continue
        indices = torch.cat(blocks[source::world_size])
        part = own if source == rank else torch.empty(len(indices), int(size), device=carrier)
        distributed.broadcast(part, source)
        result[indices.to(output_device)] = part.to(output_device)
    return result


def rank_metrics(
    query: Array,
    gallery: Array,
    query_pids: Array,
    gallery_pids: Array,
    query_camids: Array,
    gallery_camids: Array,
    metric: str = "euclidean",
    max_rank: int = 50,
    chunk: int | None = None,
) -> RankMetrics:
    """Metrics of query features (Q, D) against gallery features (G, D) under the Market-1501 rule.

    Gallery rows of the query's pid and camid, and of pid -1, are ignored; queries without a match are skipped; ties
    go by gallery index. AP is the mean of the precision at each hit, INP is hits over the rank of the last hit.
    Distances are fp32, compared as squares. Memory: O(Q x matches) and a few blocks of `chunk` x G (one on the CPU),
    never Q x G.
    Raises: ValueError naming the input at fault (NaN or Inf, unequal lengths, nothing to rank, unknown metric).
    """
    (query, _), (gallery, norms) = distances.features(query, "query"), distances.features(gallery, "gallery")
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(f"query and gallery: feature sizes differ, {query.shape[1]} and {gallery.shape[1]}")
    pairs = _Pairs(len(query), len(gallery), query_pids, gallery_pids, query_camids, gallery_camids, max_rank)
    terms = distances.column_terms(norms, metric)[pairs.kept].to(query.device)
    gallery = gallery[pairs.kept].to(query.device)
    with distances.fp32(query.device):

        def fill(start: int, stop: int, out: torch.Tensor) -> None:
            distances.block(query[start:stop], gallery, terms, metric, out=out)

        return _metrics(fill, pairs, query.device, torch.float32, max_rank, chunk)


def chance(query_pids: Array, gallery_pids: Array, ignored: np.ndarray | None = None) -> float:
    """The rank-1 that a random order of the gallery gives on average; `ignored` (Q, G) bool as the protocol leaves out.

    Queries without a match are skipped. Raises: ValueError if none has one. Memory: Q x G.
    """
    query_pids, gallery_pids = _ids(query_pids, "query_pids"), _ids(gallery_pids, "gallery_pids")
    kept = np.ones((len(query_pids), len(gallery_pids)), bool) if ignored is None else ~ignored
    matches = ((query_pids[:, None] == gallery_pids) & kept).sum(1)
    if not matches.any():
        raise ValueError("no valid query: no query has an image of its identity left in the gallery")
    return float(np.mean(matches[matches > 0] / kept.sum(1)[matches > 0]))


def rank_metrics_from_distances(
    dist: Array,
    query_pids: Array,
    gallery_pids: Array,
    query_camids: Array,
    gallery_camids: Array,
    max_rank: int = 50,
    chunk: int | None = None,
) -> RankMetrics:
    """`rank_metrics` of a given matrix dist (Q, G), smaller is closer; float64 is compared as float64, else as float32.

    Memory: a few blocks of `chunk` x G (one on the CPU). Raises: ValueError as `rank_metrics`, also for NaN or Inf.
    """
    dist = torch.as_tensor(dist).detach()
    if dist.ndim != 2:
        raise ValueError(f"dist: expected a (Q, G) matrix, got shape {tuple(dist.shape)}")
    pairs = _Pairs(*dist.shape, query_pids, gallery_pids, query_camids, gallery_camids, max_rank)

    def fill(start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(dist[start:stop, pairs.kept])
        low, high = out.aminmax(dim=1)
        if not bool((high - low).isfinite().all()):
            row = int((~(high - low).isfinite()).nonzero()[0])
            raise ValueError(f"dist: NaN or Inf in row {start + row}")

    dtype = dist.dtype if dist.dtype == torch.float64 else torch.float32
    return _metrics(fill, pairs, dist.device, dtype, max_rank, chunk)


class _Pairs:
    """Which gallery columns are matches and which are junk for each query: flat arrays sorted by query, then column.

    `kept` is the slice of the gallery left after the pid -1 rows at both ends are cut off (a sorted Market-1501 list
    starts with them); columns count from its start. `junk_columns` are the pid -1 rows within it.
    """

    def __init__(self, num_query, num_gallery, query_pids, gallery_pids, query_camids, gallery_camids, max_rank):
        query_pids, query_camids = _ids(query_pids, "query_pids"), _ids(query_camids, "query_camids")
        gallery_pids, gallery_camids = _ids(gallery_pids, "gallery_pids"), _ids(gallery_camids, "gallery_camids")
        for name, ids, size in (
            ("query_pids", query_pids, num_query),
            ("query_camids", query_camids, num_query),
            ("gallery_pids", gallery_pids, num_gallery),
            ("gallery_camids", gallery_camids, num_gallery),
        ):
            if len(ids) != size:
                raise ValueError(f"{name}: {len(ids)} entries for {size} rows of {name.split('_')[0]}")
        if num_query == 0 or num_gallery == 0:
            raise ValueError(f"{'query' if num_query == 0 else 'gallery'}: empty, nothing to rank")
        if max_rank < 1:
            raise ValueError(f"max_rank: expected at least 1, got {max_rank}")
        people = np.flatnonzero(gallery_pids != -1)
        self.kept = slice(int(people[0]), int(people[-1]) + 1) if len(people) else slice(0, 0)
        gallery_pids, gallery_camids = gallery_pids[self.kept], gallery_camids[self.kept]
        self.num_query, self.num_gallery = num_query, len(gallery_pids)
        self.junk_columns = np.flatnonzero(gallery_pids == -1)

        by_pid = np.argsort(gallery_pids, kind="stable")
        first = np.searchsorted(gallery_pids, query_pids, "left", sorter=by_pid)
        count = np.searchsorted(gallery_pids, query_pids, "right", sorter=by_pid) - first
        count[query_pids == -1] = 0
        rows = np.repeat(np.arange(num_query), count)
        columns = by_pid[ranges(first, count)]
        same_camera = gallery_camids[columns] == query_camids[rows]
        self.rows, self.columns = rows[~same_camera], columns[~same_camera]
        self.junk_rows, self.junk = rows[same_camera], columns[same_camera]
        if len(self.rows) == 0:
            raise ValueError("no valid query: no gallery row has a query's pid under another camid")


def _ids(ids: Array, name: str) -> np.ndarray:
    ids = ids.cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{name}: expected a 1-D integer array, got {ids.dtype} of shape {ids.shape}")
    return ids.astype(np.int64, copy=False)


def ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Concatenation of arange(f, f + c) over the pairs (f, c)."""
    ends = np.cumsum(count)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - ends + count, count)


def _closer(dist: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, pool: ThreadPoolExecutor) -> torch.Tensor:
    """(P,) int64: how many columns of dist (b, G) come before each match (rows[p], columns[p]), ties by column.

    Matches go by ascending row.
    """
    if dist.device.type != "cpu":
        return _closer_by_block(dist, rows, columns)
    ends = np.searchsorted(rows.numpy(), np.arange(len(dist) + 1))
    matches = [columns.numpy()[low:high] for low, high in zip(ends, ends[1:])]
    size = max(1, CACHED_VALUES // dist.shape[1])
    parts = [slice(first, first + size) for first in range(0, len(dist), size)]

    def count(part: slice) -> np.ndarray:
        return _closer_by_row(dist.numpy()[part], matches[part])

    first = count(parts[0])
    long_sorts = len(first) and first.mean() > 1000  # short ones would only wait for each other's interpreter lock
    return torch.from_numpy(np.concatenate([first, *(pool.map if long_sorts else map)(count, parts[1:])]))


def _closer_by_row(dist: np.ndarray, matches: list[np.ndarray]) -> np.ndarray:
    """A few rows, while they are in a core's cache. Only what is as close as a row's last match is sorted."""
    counts = [np.empty(0, np.int64)]
    for row, columns in zip(dist, matches):
        if len(columns) == 0:
            continue
        values = row[columns]
        near = row[row <= values.max()]
        near.sort()
        closer = near.searchsorted(values)
        for p in np.flatnonzero(near.searchsorted(values, "right") - closer > 1):
            closer[p] += np.count_nonzero(row[: columns[p]] == values[p])
        counts.append(closer)
    return np.concatenate(counts)


def _closer_by_block(dist: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The whole block; matches are laid out as a padded (b, most matches) table to be looked up in one call."""
    ordered = dist.sort(dim=1).values
    count = torch.bincount(rows, minlength=len(dist))
    place = torch.arange(len(rows), device=dist.device) - (count.cumsum(0) - count)[rows]
    value = dist[rows, columns]
    table = dist.new_zeros(len(dist), int(count.max()) if len(rows) else 0)
    table[rows, place] = value
    closer = torch.searchsorted(ordered, table)[rows, place]
    tied = ordered[rows, (closer + 1).clamp(max=ordered.shape[1] - 1)] == value
    tied &= closer + 1 < ordered.shape[1]
    for p in tied.nonzero()[:, 0].tolist():
        closer[p] += (dist[rows[p], : columns[p]] == value[p]).count_nonzero()
    return closer


def _metrics(fill, pairs: _Pairs, device: torch.device, dtype: torch.dtype, max_rank: int, chunk) -> RankMetrics:
    """Ranks every match block by block; fill(start, stop, out) writes the distances of queries start..stop."""
    block_bytes = BLOCK_BYTES[device.type != "cpu"] * 4 // dtype.itemsize
    size = min(distances.rows_per_block(pairs.num_gallery, chunk, block_bytes), pairs.num_query)
    block = torch.empty(size, pairs.num_gallery, dtype=dtype, device=device)
    junk_columns = torch.from_numpy(pairs.junk_columns).to(device)
    ranks = []
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start in range(0, pairs.num_query, size):
            stop = min(start + size, pairs.num_query)
            dist = block[: stop - start]
            fill(start, stop, dist)
            dist.index_fill_(1, junk_columns, torch.inf)
            rows, columns = _part(pairs.junk_rows, pairs.junk, start, stop, device)
            dist[rows, columns] = torch.inf
            ranks.append(_closer(dist, *_part(pairs.rows, pairs.columns, start, stop, device), pool))
    return _summary(pairs, torch.cat(ranks).cpu().numpy(), max_rank)


def _part(rows: np.ndarray, columns: np.ndarray, start: int, stop: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of queries start..stop; rows count from start."""
    low, high = np.searchsorted(rows, (start, stop))
    return torch.from_numpy(rows[low:high] - start).to(device), torch.from_numpy(columns[low:high]).to(device)


def _summary(pairs: _Pairs, ranks: np.ndarray, max_rank: int) -> RankMetrics:
    """Metrics from the 0-based ranks (P,) of all matches, grouped by query in pairs.rows."""
    ranks = ranks[np.lexsort((ranks, pairs.rows))] + 1
    hits = np.bincount(pairs.rows, minlength=pairs.num_query)
    first = np.cumsum(hits) - hits
    precision = (np.arange(len(ranks)) - first[pairs.rows] + 1) / ranks
    valid = hits > 0
    ap = np.full(pairs.num_query, np.nan)
    ap[valid] = np.bincount(pairs.rows, precision, pairs.num_query)[valid] / hits[valid]
    best, last = ranks[first[valid]], ranks[first[valid] + hits[valid] - 1]
    cmc = np.cumsum(np.bincount(best[best <= max_rank] - 1, minlength=max_rank)) / valid.sum()
    return RankMetrics(float(ap[valid].mean()), cmc, float((hits[valid] / last).mean()), ap, int(valid.sum()))
