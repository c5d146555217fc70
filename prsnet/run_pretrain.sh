#!/usr/bin/env bash
# Pre-train on all GPUs of this machine; run it again after any interruption and it continues.
#   bash prsnet/run_pretrain.sh
#   DATA=/data OUT=/runs EPOCHS=400 BATCH=128 MODEL=mae NGPU=4 bash prsnet/run_pretrain.sh --amp off
# As it stands it is row pretrain/prsnet (or pretrain/mae), where prsnet/train.py looks for weights. With EPOCHS, BATCH or
# other flags it is a training of its own, in a folder custom-...; its last line is the fine-tuning that starts from it.
set -euo pipefail
for folder in DATA OUT; do
    [[ -z ${!folder:-} || ${!folder} = /* ]] || declare "$folder=$PWD/${!folder}"
done
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
MODEL=${MODEL:-prsnet}
NGPU=${NGPU:-$("$PYTHON" -c "import torch; print(max(torch.cuda.device_count(), 1))")}
flags=(--row "${ROW:-pretrain/$MODEL}" --data-dir "${DATA:-data}" --resume)
[[ -n "${OUT:-}" ]] && flags+=(--logs-dir "$OUT")
[[ -n "${EPOCHS:-}" ]] && flags+=(--epochs "$EPOCHS")
[[ -n "${BATCH:-}" ]] && flags+=(--batch-size "$BATCH")
[[ -n "${SYNTHETIC:-}" ]] && flags+=(--synthetic "$SYNTHETIC")
exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NGPU" --max-restarts="${RESTARTS:-3}" \
  prsnet/pretrain.py "${flags[@]}" "$@"
