#!/usr/bin/env bash
# The whole of DAPG, small, on one CPU with synthetic people: stage 1, PN-GAN, generation, alignment, AGW and CIL on
# SYSU-MM01 and RegDB, clean and -C, against the same fine-tuning from scratch. More flags are passed on to every step.
#   bash dapg/run_chain.sh --data-dir data
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
began=$SECONDS
for row in robust gan generate align agw-sysu agw-sysu-scratch agw-regdb agw-regdb-scratch \
           cil-sysu cil-sysu-scratch cil-regdb cil-regdb-scratch; do
    "$PYTHON" dapg/train.py --row "chain/$row" --synthetic small --resume "$@"
done
"$PYTHON" results/render.py dapg
echo "the chain took $((SECONDS - began)) s"
