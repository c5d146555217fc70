#!/usr/bin/env bash
# The paper's experiments on PRCC, three seeds, one after another; continues what was interrupted. A row that fails does
# not stop those after it; the exit status is then 1.
#   bash pixel_sampling/run_prcc.sh /data CHECKPOINT      folder that holds prcc/rgb; the official ATR checkpoint
set -euo pipefail
data=${1:?folder that holds prcc}
checkpoint=${2:-}
[[ $data = /* ]] || data=$PWD/$data
[[ -z $checkpoint || $checkpoint = /* ]] || checkpoint=$PWD/$checkpoint
cd "$(dirname "$0")/.."
if [[ -n $checkpoint ]] || ! compgen -G "$data/[pP][rR][cC][cC]/mask" > /dev/null; then
  python -m pixel_sampling.parse --root "$data" --ckpt "${checkpoint:?official ATR checkpoint of SCHP}" --overlays 32
fi
failed=0
reproduce() {
  local status=0
  python results/reproduce.py "$@" --data-dir "$data" --seeds 0 1 2 || status=$?
  if [ "$status" -eq 130 ]; then exit 130; fi      # interrupted
  if [ "$status" -ne 0 ]; then failed=1; fi
}
reproduce pixel_sampling/T2-c pixel_sampling/X5
reproduce pixel_sampling/table1 pixel_sampling/table2 pixel_sampling/table3 pixel_sampling/table4
reproduce pixel_sampling/extras
python results/render.py pixel_sampling || failed=1
exit "$failed"
