"""What the test of a row of stage agw or cil gives without any training: its network with random weights, and chance.

Colour says nothing across modalities, so there is no colour histogram.
"""

import numpy as np

from common import datasets, evaluation, inputs, log_folder
from common.datasets import sysu
from dapg.downstream import protocols, stage
from dapg.downstream.data import Data
from dapg.flags import variants


def measure(run, args) -> tuple[dict[str, dict], datasets.Dataset]:
    """Clean metrics of the untrained network and the rank-1 of chance, clean and -C, as in the row's result; the data
    set. Opens the run's log. Raises: ValueError for a row of another stage.
    """
    if args.stage not in ("agw", "cil"):
        raise ValueError(f"row {args.row} is of stage {args.stage}: only agw and cil search people")
    args.settings, data = variants(args), Data(args, run)
    log_folder.open_log(run, inputs.data_name(data.data))
    data.open(args, run)
    network, *_ = stage.build(args, run, data)
    return {"untrained": protocols.evaluate(run, network, data, args.stage), "chance": chance(data)}, data.data


def chance(data: Data) -> dict[str, float]:
    """`all.rank1`, `v2t.rank1`, ... of a random order; corruption changes neither queries nor galleries."""
    (v_pids, v_camids), (t_pids, t_camids) = (protocols.columns(data.parts[name]) for name in ("rgb", "ir"))
    found = {"v2t": evaluation.chance(v_pids, t_pids), "t2v": evaluation.chance(t_pids, v_pids)}
    if data.data.name == "sysu":
        found = {}
        for mode in sysu.MODES:
            draws = [sysu.gallery_trial(data.parts["rgb"], mode, trial) for trial in range(protocols.TRIALS)]
            shares = [
                evaluation.chance(t_pids, v_pids[drawn], sysu.same_room(t_camids, v_camids[drawn])) for drawn in draws
            ]
            found[mode] = float(np.mean(shares))
    return {f"{name}{ending}.rank1": value for name, value in found.items() for ending in ("", "_c")}
