#!/usr/bin/env bash
# Tables 2-5: every row; finished ones are skipped, interrupted ones continued. More flags go to reproduce.py.
#   bash convnext_ap/run_tables.sh DATA_DIR [--gpus 4] [--seeds 0 1 2]
set -euo pipefail
data=${1:?usage: bash convnext_ap/run_tables.sh DATA_DIR [flags of results/reproduce.py]}
[[ $data = /* ]] || data=$PWD/$data
cd "$(dirname "$0")/.."
python results/reproduce.py convnext_ap/table4 --data-dir "$data" "${@:2}"
python convnext_ap/complexity.py
python results/render.py convnext_ap
