#!/usr/bin/env bash
# CIL on SYSU-MM01 and the ten splits of RegDB from one trunk: bash dapg/run_cil.sh DATA_DIR [TRUNK] [flags]
# TRUNK is the middle of the row's name: in, pnl, byol, ssl, vtbr, simclr, ours (default).
set -euo pipefail
data=${1:?usage: bash dapg/run_cil.sh DATA_DIR [TRUNK] [flags]}
[[ $data = /* ]] || data=$PWD/$data
cd "$(dirname "$0")/.."
trunk=${2:-ours}
python dapg/train.py --row "cil/$trunk/sysu" --data-dir "$data" --resume "${@:3}"
for seed in 0 1 2 3 4 5 6 7 8 9; do
    python dapg/train.py --row "cil/$trunk/regdb" --seed "$seed" --data-dir "$data" --resume "${@:3}"
done
