#!/usr/bin/env bash
# Task alignment on Market-1501 (sec. II-B), after run_stage1.sh: bash dapg/run_stage2.sh DATA_DIR [flags of train.py]
set -euo pipefail
data=${1:?usage: bash dapg/run_stage2.sh DATA_DIR [flags]}
[[ $data = /* ]] || data=$PWD/$data
cd "$(dirname "$0")/.."
for row in gan/market generate/market align/dapg; do
    python dapg/train.py --row "$row" --data-dir "$data" --resume "${@:2}"
done
