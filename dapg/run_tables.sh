#!/usr/bin/env bash
# Tables I-III: every row, finished ones skipped, interrupted ones continued.
#   bash dapg/run_tables.sh DATA_DIR [ROW]        # ROW: one row or the beginning of one, such as agw/ours or table3
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?usage: bash dapg/run_tables.sh DATA_DIR [ROW]}
only=${2:-}
if [ -n "$only" ]; then
    case "$only" in
        */regdb) python results/reproduce.py "dapg/$only" --data-dir "$data" --seeds 0 1 2 3 4 5 6 7 8 9 ;;
        *) python results/reproduce.py "dapg/$only" --data-dir "$data" ;;
    esac
    exit
fi
python results/reproduce.py "dapg/*/*/sysu" --data-dir "$data" || true     # without their checkpoint, rows fail
python results/reproduce.py "dapg/table3/*" --data-dir "$data"
python results/reproduce.py "dapg/*/*/regdb" --data-dir "$data" --seeds 0 1 2 3 4 5 6 7 8 9 || true
python results/render.py dapg
