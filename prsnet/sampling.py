"""Which images make a batch: plain functions of (labels, seed, epoch), the same on every rank."""

import numpy as np


def identity_plan(labels: np.ndarray, num_ids: int, num_instances: int, *, seed: int, epoch: int) -> np.ndarray:
    """One epoch of P x K batches, of all processes together, in which every image occurs at most once.

    The images of an identity are shuffled and cut into groups of K; a last group of 2 .. K-1 is filled with -1 (no
    image), a single image left over is dropped, but an identity with one image only keeps it. Each batch takes one
    group of P identities drawn at random among those with groups left, whole groups first, until fewer than P are left.

    Args: labels (N,) integers >= 0.
    Returns: (iters, P, K) int64, indices into labels or -1; the first of an identity is never -1.
    Raises: ValueError for fewer than P identities, or fewer than 2 x 2 in a batch.
    """
    labels = np.asarray(labels)
    ids, counts = np.unique(labels, return_counts=True)
    if num_ids < 2 or num_instances < 2:
        raise ValueError(f"batch of {num_ids} identities x {num_instances} images: centroids need at least 2 x 2")
    if len(ids) < num_ids:
        raise ValueError(
            f"{len(ids)} identities for batches of {num_ids}; use a smaller --batch-size or more --num-instances"
        )
    rng = np.random.default_rng([seed, epoch])
    order = np.argsort(labels, kind="stable")
    groups = [cut(rng.permutation(members), num_instances) for members in np.split(order, np.cumsum(counts)[:-1])]
    batches = []
    while len(available := np.flatnonzero([len(g) > 0 for g in groups])) >= num_ids:
        batches.append([groups[i].pop(0) for i in rng.choice(available, num_ids, replace=False)])
    return np.array(batches, dtype=np.int64)


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
    share = images_each(batch_size, world_size)
    if n < batch_size or batch_size < 1:
        raise ValueError(
            f"{n} images cannot fill one batch of {batch_size}; nothing would be trained: lower --batch-size"
        )
    order = np.random.default_rng([seed, epoch]).permutation(n)[: n // batch_size * batch_size]
    return order.reshape(-1, batch_size)[:, rank * share : (rank + 1) * share].astype(np.int64)


def images_each(batch_size: int, world_size: int) -> int:
    """Images of a batch that each process takes. Raises: ValueError if the processes do not divide it."""
    if batch_size % world_size:
        raise ValueError(
            f"--batch-size {batch_size} does not split over {world_size} processes; "
            f"nearest: {batch_size // world_size * world_size or world_size}"
        )
    return batch_size // world_size
