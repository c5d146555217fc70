#!/usr/bin/env bash
# Robustness training on LUPerson (sec. II-A): bash dapg/run_stage1.sh DATA_DIR [GPUS] [more flags of train.py]
set -euo pipefail
data=${1:?usage: bash dapg/run_stage1.sh DATA_DIR [GPUS] [flags]}
[[ $data = /* ]] || data=$PWD/$data
cd "$(dirname "$0")/.."
torchrun --standalone --nproc_per_node="${2:-1}" dapg/train.py --row robust/dapg --data-dir "$data" \
    --workers "$(nproc)" --resume "${@:3}"
