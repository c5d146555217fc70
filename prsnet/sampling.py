"""Which images make a batch: plain functions of (labels, seed, epoch), the same on every rank."""

import numpy as np


def identity_plan(
    labels: np.ndarray, num_ids: int, num_instances: int, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """One epoch of P x K batches in which every image occurs at most once (spec of the authors' loader).

    The images of an identity are shuffled and cut into groups of K; a last group of 2 .. K-1 is filled with -1 (no
    image), a single image left over is dropped, but an identity with one image only keeps it. Each batch takes one
    group of P identities drawn at random among those with groups left, until fewer than P are left.

    Args: labels (N,) integers >= 0.
    Returns: (iters, P * K / world_size) int64, indices into labels or -1; the rank's whole identities of each batch.
    Raises: ValueError for fewer than P identities, K < 2, or a world size that does not divide P.
    """
    labels = np.asarray(labels)
    ids, counts = np.unique(labels, return_counts=True)
    if num_ids < 2 or num_instances < 2:
        raise ValueError(f"batch of {num_ids} identities x {num_instances} images: centroids need at least 2 x 2")
    if len(ids) < num_ids:
        raise ValueError(
            f"{len(ids)} identities for batches of {num_ids}; use a smaller --batch-size or more --num-instances"
        )
    if num_ids % world_size:
        raise ValueError(
            f"batch of {num_ids} identities x {num_instances} images does not split over {world_size} processes; "
            f"use a --batch-size of {-(-num_ids // world_size) * world_size * num_instances}"
        )
    rng = np.random.default_rng([seed, epoch])
    order = np.argsort(labels, kind="stable")
    groups = [cut(rng.permutation(members), num_instances) for members in np.split(order, np.cumsum(counts)[:-1])]
    batches = []
    while len(available := np.flatnonzero([len(g) > 0 for g in groups])) >= num_ids:
        batches.append([groups[i].pop() for i in rng.choice(available, num_ids, replace=False)])
    own = num_ids // world_size
    plan = np.array(batches, dtype=np.int64)[:, rank * own : (rank + 1) * own]
    return plan.reshape(len(plan), -1)


def cut(members: np.ndarray, size: int) -> list[np.ndarray]:
    """Groups of `size`, the last filled with -1; a single left-over member is dropped unless it is all there is."""
    groups = [members[start : start + size] for start in range(0, len(members), size)]
    if len(groups[-1]) == 1 and len(groups) > 1:
        groups.pop()
    return [np.pad(group, (0, size - len(group)), constant_values=-1) for group in groups]


def shuffled_batches(
    n: int, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """One epoch over n images in random order, (iters, batch_size / world_size) int64; an incomplete batch is dropped.

    Raises: ValueError if not one batch can be filled, or the processes do not divide it.
    """
    if batch_size % world_size:
        raise ValueError(
            f"--batch-size {batch_size} does not split over {world_size} processes; "
            f"nearest: {batch_size // world_size * world_size or world_size}"
        )
    if n < batch_size or batch_size < 1:
        raise ValueError(
            f"{n} images cannot fill one batch of {batch_size}; nothing would be trained: lower --batch-size"
        )
    order = np.random.default_rng([seed, epoch]).permutation(n)[: n // batch_size * batch_size]
    share = batch_size // world_size
    return order.reshape(-1, batch_size)[:, rank * share : (rank + 1) * share].astype(np.int64)
