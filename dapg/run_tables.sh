#!/usr/bin/env bash
# Tables I-III: every row, finished ones skipped, interrupted ones continued; SYSU-MM01 with seed 0, RegDB's ten splits
# with seeds 0 to 9. Where a row fails (without its checkpoint), the others still run; the exit status is not 0 then.
#   bash dapg/run_tables.sh DATA_DIR [PART] [flags of reproduce.py] [-- flags of train.py]
#   bash dapg/run_tables.sh /data agw/ours --gpus 4 -- --workers 16
# PART: a line of Tables I and II (agw/ours), all lines of a method (agw), table3, or a row; "": everything.
set -euo pipefail
data=${1:?usage: bash dapg/run_tables.sh DATA_DIR [PART] [flags of reproduce.py] [-- flags of train.py]}
[[ $data = /* ]] || data=$PWD/$data
cd "$(dirname "$0")/.."
part=${2:-}
part=${part%/}
shift $(($# < 2 ? $# : 2))
status=0
reproduce() {
    python results/reproduce.py "dapg/$1" --data-dir "$data" "${@:2}" || status=$?
    [ "$status" -ne 130 ] || exit 130 # interrupted
}
splits() {
    reproduce "$1" --seeds 0 1 2 3 4 5 6 7 8 9 "${@:2}"
}
case $part in
    "") reproduce "*/*/sysu" "$@"; reproduce "table3/*" "$@"; splits "*/*/regdb" "$@" ;;
    agw | cil) reproduce "$part/*/sysu" "$@"; splits "$part/*/regdb" "$@" ;;
    */regdb) splits "$part" "$@" ;;
    agw/*/* | cil/*/*) reproduce "$part" "$@" ;;
    agw/* | cil/*) reproduce "$part/sysu" "$@"; splits "$part/regdb" "$@" ;;
    *) reproduce "$part" "$@" ;;
esac
python results/render.py dapg
exit "$status"
