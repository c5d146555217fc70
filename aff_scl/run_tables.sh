#!/usr/bin/env bash
# Tables 2-8 and Figure 4: every row; finished ones are skipped, interrupted ones continued. More flags go to reproduce.py.
# Any --gpus that divides the batches gives the same training: 1, 2, 4, 8, ...
#   bash aff_scl/run_tables.sh DATA_DIR [--gpus 4] [--seeds 0 1 2]
set -euo pipefail
data=${1:?usage: bash aff_scl/run_tables.sh DATA_DIR [flags of results/reproduce.py]}
[[ $data = /* ]] || data=$PWD/$data
cd "$(dirname "$0")/.."
python results/reproduce.py aff_scl/table2 aff_scl/table3 aff_scl/table4 aff_scl/table5 aff_scl/table6 aff_scl/table7 \
    aff_scl/table8 aff_scl/figure4 --data-dir "$data" "${@:2}"
python results/render.py aff_scl
