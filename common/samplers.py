"""Which images make a batch: plain functions of (labels, seed, epoch) that return index arrays, the same on every rank.

A global batch is P identities x K images, identity after identity; rank r of W takes the r-th P/W identities of it,
so a chunk of a batch always holds whole identities, and the global batch does not depend on W.
"""

import numpy as np


def identity_batches(
    labels: np.ndarray,
    num_ids: int,
    num_instances: int,
    *,
    camids: np.ndarray | None = None,
    iters: int | None = None,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
) -> np.ndarray:
    """Batches of P = num_ids identities x K = num_instances images, with one group of each identity per pass.

    A group is a random anchor and K - 1 other images of its identity: from other cameras than the anchor's where
    camids are given and such images exist, else any but the anchor; with replacement if there are fewer than K - 1;
    the anchor itself repeated if it is the only image. Passes follow each other until iters batches are full;
    identities that do not fill the last batch of a pass are dropped, so no identity occurs twice in a batch.
    iters=None is one pass. Where fewer than P identities exist, the batch keeps its size P * K with the largest
    number of identities that exists and divides it, and more images of each.
    Deviation: the lineage's sampler also draws with replacement at exactly K - 1 candidates, and emits a lone index
    for an identity with one image, which shifts all later groups.

    Args: labels (N,) integers, -1 is never drawn; camids (N,) integers; iters > 0 or None.
    Returns: (iters, P * K / world_size) int64 indices into labels.
    Raises: ValueError for fewer than two identities, K < 2, or a world size that does not divide P.
    """
    labels = np.asarray(labels)
    check_shape(num_ids, num_instances, rank, world_size)
    if camids is not None and len(camids) != len(labels):
        raise ValueError(f"{len(camids)} camids for {len(labels)} labels")
    if iters is not None and iters < 1:
        raise ValueError(f"iters is {iters}, expected at least 1")
    members, starts, counts = group(labels)
    num_ids, num_instances = fit(num_ids, num_instances, len(counts), world_size)
    cameras = np.zeros(len(labels), dtype=np.int64) if camids is None else np.asarray(camids)
    per_pass = len(counts) // num_ids
    iters = per_pass if iters is None else iters
    rng = np.random.default_rng([seed, epoch])
    passes = []
    for _ in range(-(-iters // per_pass)):
        chosen = rng.permutation(len(counts))[: per_pass * num_ids]
        groups = draw_groups(members, starts, counts, cameras[members], num_instances, rng)
        passes.append(groups[chosen].reshape(per_pass, num_ids, num_instances))
    return own_share(np.concatenate(passes)[:iters], rank, world_size)


def identity_epoch(
    labels: np.ndarray, num_ids: int, num_instances: int, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """One epoch of P x K batches in which every image is used at most once, the rule of the supervised baselines.

    The images of each identity are shuffled and cut into groups of K (an identity with fewer than K draws K of its
    images with replacement; what is left over of a cut is dropped). Each batch takes the next group of P identities
    drawn at random among those with groups left, until fewer than P are left. labels, K and the result are as for
    identity_batches; the number of batches varies a little from epoch to epoch.

    Raises: ValueError for fewer than P identities, K < 2, or a world size that does not divide P.
    """
    check_shape(num_ids, num_instances, rank, world_size)
    members, starts, counts = group(np.asarray(labels))
    if len(counts) < num_ids:
        raise ValueError(f"{len(counts)} identities for batches of {num_ids}; use a smaller batch or more images each")
    rng = np.random.default_rng([seed, epoch])
    shuffled = members[np.lexsort((rng.random(len(members)), np.repeat(np.arange(len(counts)), counts)))]
    short = np.flatnonzero(counts < num_instances)
    places = (rng.random((len(short), num_instances)) * counts[short, None]).astype(np.int64)
    drawn = shuffled[starts[short, None] + places]
    remaining = np.maximum(counts // num_instances, 1)
    used = np.zeros(len(counts), dtype=np.int64)
    row_of = np.full(len(counts), -1)
    row_of[short] = np.arange(len(short))
    batches = []
    available = np.arange(len(counts))
    while len(available) >= num_ids:
        ids = rng.choice(available, size=num_ids, replace=False)
        first = starts[ids] + used[ids] * num_instances
        offsets = np.minimum(np.arange(num_instances), counts[ids, None] - 1)
        picked = shuffled[first[:, None] + offsets]
        few = row_of[ids] >= 0
        picked[few] = drawn[row_of[ids[few]]]
        batches.append(picked)
        used[ids] += 1
        available = available[used[available] < remaining[available]]
    return own_share(np.stack(batches), rank, world_size)


def group(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices with label >= 0 ordered by label (M,), the start of each identity in it (C,), and its number of images
    (C,)."""
    order = np.argsort(labels, kind="stable")
    members = order[np.searchsorted(labels[order], 0) :]
    _, starts, counts = np.unique(labels[members], return_index=True, return_counts=True)
    return members, starts, counts


def draw_groups(
    members: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    cameras: np.ndarray,
    num_instances: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """One group of K images of every identity, (C, K), the anchor first; cameras (M,) goes with members."""
    identity = np.repeat(np.arange(len(counts)), counts)
    anchor = starts + (rng.random(len(counts)) * counts).astype(np.int64)  # (C,) positions in members
    other = cameras != cameras[anchor][identity]  # (M,) candidates
    single_camera = np.add.reduceat(other, starts) == 0
    not_anchor = np.ones(len(members), dtype=bool)
    not_anchor[anchor] = False
    other |= single_camera[identity] & not_anchor
    candidates = np.add.reduceat(other, starts)[:, None]  # (C, 1) number of candidates
    ranked = np.argsort(identity + 0.5 * rng.random(len(members)) + 0.5 * ~other, kind="stable")
    in_order = np.arange(num_instances - 1)[None, :]
    repeated = (rng.random((len(counts), num_instances - 1)) * candidates).astype(np.int64)  # 0 if none: the anchor
    picked = ranked[starts[:, None] + np.where(candidates >= num_instances - 1, in_order, repeated)]
    return members[np.concatenate([anchor[:, None], picked], axis=1)]


def fit(num_ids: int, num_instances: int, available: int, world_size: int) -> tuple[int, int]:
    """(P, K) of equal product for the identities available; ValueError if not even two, or one a rank, are there."""
    batch = num_ids * num_instances
    if available >= num_ids:
        return num_ids, num_instances
    for fewer in range(available, 1, -1):
        if batch % fewer == 0 and fewer % world_size == 0:
            return fewer, batch // fewer
    raise ValueError(
        f"{available} identities with label >= 0 cannot fill a batch of {batch} on {world_size} ranks, "
        f"expected at least {max(2, world_size)}; if labels are clusters, change eps or k1, or see the "
        f"share of outliers"
    )


def check_shape(num_ids: int, num_instances: int, rank: int, world_size: int) -> None:
    """ValueError unless P >= 1 identities of K >= 2 images split evenly over the ranks."""
    if num_ids < 1 or num_instances < 2:
        raise ValueError(f"batch of {num_ids} identities x {num_instances} images, expected at least 1 x 2")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
    if num_ids % world_size:
        below, above = num_ids // world_size * world_size, -(-num_ids // world_size) * world_size
        near = " or ".join(f"{ids * num_instances} ({ids} identities)" for ids in (below, above) if ids)
        raise ValueError(
            f"batch of {num_ids} identities x {num_instances} = {num_ids * num_instances} images does not "
            f"split over {world_size} ranks; nearest batch sizes that do: {near}"
        )


def own_share(batches: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The rank's whole identities of each batch: (iters, P, K) -> (iters, P * K / world_size) int64."""
    ids = batches.shape[1] // world_size
    return batches[:, rank * ids : (rank + 1) * ids].reshape(len(batches), -1).astype(np.int64)
