"""Record what a row's test gives without any training: the untrained network, histograms, chance.

    python results/baselines.py prsnet/cpu/market/prsnet --seeds 0 1 2
    python results/baselines.py "dapg/cpu/agw/*/ours" "dapg/cpu/cil/*/ours" --data-dir data

For projects whose results do not hold these numbers already; <project>/untrained.py measures them. The network is the
row's own before its first step, without pre-trained weights. What is written to
results/baselines/<project>/<data>/<row>/seed<k>.json has the form of a result file, with metrics under `untrained.`,
`histogram.` (colours) or `gradients.` (oriented ones, across modalities) and `chance.`, which results/claims.py reads.
Nothing is trained, and no log is touched.
"""

import argparse
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from common import commandline, flags

ROOT = Path(__file__).resolve().parents[1]


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = argparse.ArgumentParser(
        prog="results/baselines.py", allow_abbrev=False, description=__doc__.split("\n")[0]
    )
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help="rows, as in results/reproduce.py")
    parser.add_argument("--data-dir", default=str(ROOT / "data"), help="folder that holds the data sets")
    parser.add_argument("--results-dir", default=str(ROOT / "results" / "baselines"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="of the untrained network")
    return parser.parse_args(commandline.words(argv))


if __name__ == "__main__":
    arguments = flags.answer(parse_args)  # torch is loaded below

from common import inputs, runtime
from results import plan, schema
from results.schema import Refused


def main(args: Namespace) -> None:
    rows = {project: schema.load_rows(ROOT, project) for project in schema.projects(ROOT)}
    for project, row in dict.fromkeys(r for pattern in args.patterns for r in plan.matching(ROOT, rows, pattern)):
        for seed in args.seeds:
            print(f"{project}/{row} seed {seed}: {record(args, project, row, rows[project][row], seed)}", flush=True)


def record(args: Namespace, project: str, row: str, spec: dict, seed: int) -> Path:
    """Measure a row's baselines and write them; returns the file. Raises: Refused for a project that measures none."""
    script, words = spec.get("script", "train.py"), ("--row", row, "--seed", str(seed), "--data-dir", args.data_dir)
    if not (ROOT / project / "untrained.py").is_file() or script != "train.py":
        raise Refused(f"{project}/{row}: its own results hold what comes before training, or it searches nobody")
    with tempfile.TemporaryDirectory() as logs:
        given = vars(schema.row_args(ROOT, project, script, words))
        places = {"weights": "none", "logs_dir": logs, "results_dir": args.results_dir, "resume": None}
        own = Namespace(**{**given, **places})
        run = runtime.start(own, project)
        found, data = schema.load_script(ROOT / project / "untrained.py").measure(run, own)
        metrics = {f"{kind}.{name}": value for kind, each in found.items() for name, value in each.items()}
        return runtime.record(run, metrics, inputs.describe(data), {"training": "none"})


if __name__ == "__main__":
    runtime.execute(main, arguments)
