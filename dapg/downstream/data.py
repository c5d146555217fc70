"""SYSU-MM01 and RegDB by modality, and AGW's batches of both."""

import numpy as np

from common import datasets, inputs

INSTANCES = 4  # images of an identity and modality in a batch


class Data:
    """A data set by modality: stores, labels and samples of training, query and gallery."""

    def __init__(self, args, run):
        options = {"split": args.split or run.seed % 10 + 1} if args.dataset == "regdb" else {}
        self.data = inputs.dataset(run, args.dataset, **options)
        self.split = options.get("split", 0)
        self.parts = {
            "train_rgb": [s for s in self.data.train if s.modality == "rgb"],
            "train_ir": [s for s in self.data.train if s.modality == "ir"],
        }
        all_labels = dict(zip((s.path for s in self.data.train), datasets.labels(self.data.train)))
        self.labels = {name: np.array([all_labels[s.path] for s in part]) for name, part in self.parts.items()}
        self.num_classes = 1 + max(int(labels.max()) for labels in self.labels.values())
        self.parts["rgb"] = self.data.gallery if args.dataset == "sysu" else self.data.query
        self.parts["ir"] = self.data.query if args.dataset == "sysu" else self.data.gallery

    def open(self, args, run) -> "Data":
        def opened(name):
            title, size = f"{self.data.name} {name}", (args.height, args.width)
            return inputs.open_images(run, self.parts[name], *size, title, "lanczos")

        self.stores = {name: opened(name) for name in self.parts}
        return self


def cross_batches(visible: np.ndarray, infrared: np.ndarray, num_ids: int, iters: int, rng) -> tuple:
    """Indices (iters, ids * 4) into both modalities: ids without repetition, images with replacement.

    Row i holds the same identities at the same places of both. Raises: ValueError for too few identities.
    """
    ids = np.intersect1d(visible, infrared)
    if len(ids) < num_ids:
        raise ValueError(f"{len(ids)} identities have images in both modalities, a batch needs {num_ids}")
    chosen = ids[rng.random((iters, len(ids))).argsort(1)[:, :num_ids]].repeat(INSTANCES, 1)
    picked = []
    for labels in (visible, infrared):
        order = np.argsort(labels, kind="stable")
        start, end = (np.searchsorted(labels[order], chosen, side) for side in ("left", "right"))
        picked.append(order[start + (rng.random(chosen.shape) * (end - start)).astype(np.int64)])
    return (*picked, chosen)
