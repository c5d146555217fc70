"""Evaluate a fine-tuned network, clean and corrupted, and draw the paper's figures.

python dapg/test.py --checkpoint logs/dapg/sysu/agw/ours/sysu/seed0                  # both protocols, clean and -C
python dapg/test.py --checkpoint CHECKPOINT --corruption fog --severity 3            # one type, one severity
python dapg/test.py --checkpoint CHECKPOINT --noise-exclude fog snow                 # -C without these types
python dapg/test.py --figure 1                                                       # clean and -C bars of results
python dapg/test.py --figure 1 --synthetic small                                     # of the small chain's results
python dapg/test.py --figure 3 --dataset luperson --synthetic small                  # noise groups of six images
python dapg/test.py --figure 4 --source row:generate/market --dataset market         # sources in the four poses
python dapg/test.py --weights CHECKPOINT --query DIR --gallery DIR --out DIR         # your own images
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from common import flags
from dapg.flags import MODALITIES, variants
from dapg.flags import test_args as parse_args

if __name__ == "__main__":
    arguments = flags.answer(parse_args)  # torch is loaded below

import torch

from common import checkpoints, inputs, own_images, processes, runtime
from dapg import figures
from dapg.downstream import agw, protocols
from dapg.downstream.data import Data
from dapg.noise.names import BENCH20


def load_network(path: str) -> tuple[agw.TwoStream, Namespace, Path]:
    """The network of a checkpoint file or log folder that a result reports, the flags it was trained with, the file.

    With --variant select=best_test that is the best epoch so far, not the last.
    """
    file, state = checkpoints.read_newest(path)
    trained = Namespace(**state["args"])
    weights = checkpoints.strip_prefixes(state["state_dict"])
    if getattr(trained, "stage", None) not in ("agw", "cil") or "classifier.weight" not in weights:
        raise ValueError(f"{file} is no checkpoint of --stage agw or cil")
    settings = variants(trained)
    if settings["select"] == "best_test" and "best" in state["extra"]:
        weights = state["extra"]["best"]["state"]
    network = agw.TwoStream(len(weights["classifier.weight"]), trained.backbone, settings["nl_inter"])
    checkpoints.fit(network, weights, file)
    return network.eval(), trained, file


def kind_of(stage: str) -> str:
    """The feature that a stage's published numbers are of: behind BatchNorm for AGW, before it for CIL."""
    return "bn" if stage == "agw" else "pool"


def form(stage: str, modality: str) -> str:
    return f"{kind_of(stage)} of the {modality} stream"


def run_own_images(args) -> None:
    """Ranking, features or program of folders of images, with the feature of the clean published numbers."""
    network, trained, _ = load_network(args.checkpoint)

    def stream(modality: str) -> own_images.Descriptor:
        half = int(kind_of(trained.stage) == "bn")
        extractor = agw.Extractor(network, MODALITIES[modality])
        return own_images.Descriptor(
            extractor, form(trained.stage, modality), after=lambda both: both.chunk(2, 1)[half]
        )

    query, gallery = stream(args.query_modality), stream(args.gallery_modality)
    origin = own_images.origin("dapg", network, vars(trained), "lanczos")
    own_images.run(args, query, origin, Path(args.out), gallery)


def export_features(path: str, run, network, data: Data, trained: Namespace) -> None:
    """Write the clean features of query and gallery, of the stage's published kind. Collective."""
    streams = {"query": "infrared", "gallery": "visible"}
    if data.data.name != "sysu":
        streams = {"query": "visible", "gallery": "infrared"}
    names = [MODALITIES[modality] for modality in streams.values()]
    feats = [protocols.features(run, network, data.stores[name], name)[kind_of(trained.stage)] for name in names]
    if run.main:
        origin = own_images.origin("dapg", network, vars(trained), "lanczos")
        forms = {split: form(trained.stage, modality) for split, modality in streams.items()}
        own_images.export_data(path, torch.cat(feats), data.data, origin, forms)


def evaluate(args) -> None:
    """Clean and corrupted metrics of a checkpoint; with --corruption or --severity the corrupted ones alone."""
    network, trained, file = load_network(args.checkpoint)
    trained_flags = {"split": None, "results_dir": ".", **vars(trained)}
    settings = flags.of_test(args, trained_flags, "split", "logs_dir")
    run = runtime.start(settings, "dapg")
    network, data = network.to(run.device), Data(settings, run)
    check_unseen(run, data, trained)
    data.open(settings, run)
    if args.export_features:
        export_features(args.export_features, run, network, data, trained)
    types = [args.corruption] if args.corruption else [t for t in BENCH20 if t not in args.noise_exclude]
    corruption = protocols.Corruption(tuple(types), args.severity or 0, args.draws)
    clean = args.corruption is None and args.severity is None
    metrics = protocols.evaluate(run, network, data, trained.stage, clean, corruption)
    split = f" split {data.split}" if data.split else ""
    processes.say(
        run,
        f"{file.name} on {inputs.data_name(data.data)}{split}; -C with {', '.join(types)}, severity "
        f"{args.severity or '1..5'}, {args.draws} draws",
    )
    protocols.show(run, metrics)


def check_unseen(run, data: Data, trained: Namespace) -> None:
    """Raises ValueError if the network was trained with people of the test: RegDB's splits share theirs.

    Its pids are labels that each split counts anew, so the folder of an image tells who it is.
    """
    there = getattr(trained, "split", None) or trained.seed % 10 + 1
    options = ({"split": data.split}, {"split": there}) if trained.dataset == "regdb" else ()
    inputs.trained_on(run, data.data, vars(trained), *options, person=lambda s: Path(s.path).parent.name)


def main(args):
    if args.checkpoint:
        return run_own_images(args) if own_images.wanted(args) else evaluate(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    draw = {
        1: lambda: figures.figure1(args.synthetic, out),
        3: lambda: figures.figure3(args, out),
        4: lambda: figures.figure4(args, out),
    }
    print(draw[args.figure]())


if __name__ == "__main__":
    with torch.inference_mode():
        runtime.execute(main, arguments)
