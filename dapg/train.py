"""DAPG: pre-training for robust visible-infrared re-identification (Sun et al., IEEE SPL 31, 2024), stage by stage.

    python dapg/train.py --stage robust --data-dir /data --amp bf16     # sec. II-A on LUPerson, 300 epochs
    python dapg/train.py --stage gan --data-dir /data                   # sec. II-B: PN-GAN on Market-1501
    python dapg/train.py --stage generate --data-dir /data              # every image in four poses, to disk
    python dapg/train.py --stage align --data-dir /data --amp bf16      # sec. II-B: contrastive alignment, 200 epochs
    python dapg/train.py --stage agw --dataset sysu --weights row:align/dapg --data-dir /data     # Tables I and II
    python dapg/train.py --row cil/ours/regdb --seed 3 --data-dir /data # any row; RegDB's split is seed + 1
    bash dapg/run_chain.sh                                              # everything small, one CPU, synthetic people

Table I reports rank-1 56.1 / mAP 55.0 (SYSU-MM01, all search) for the whole chain with AGW. Rows, decisions and what to
expect: dapg/README.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the one allowed path line: repository root first

from common import flags
from dapg.flags import parse_args, variants

if __name__ == "__main__":
    arguments = flags.answer(parse_args)  # torch is loaded below

from common import runtime
from dapg.downstream import stage as downstream
from dapg.poses import gan
from dapg.pretrain import stage as pretrain

STAGES = {
    "robust": pretrain.run_stage,
    "gan": gan.run_gan,
    "generate": gan.run_generate,
    "align": pretrain.run_stage,
    "agw": downstream.run_stage,
    "cil": downstream.run_stage,
}


def main(args):
    run = runtime.start(args, "dapg")
    args.settings = variants(args)
    STAGES[args.stage](args, run)


if __name__ == "__main__":
    runtime.execute(main, arguments)
