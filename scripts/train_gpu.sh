#!/usr/bin/env bash
# Trains both directions with the published options and evaluates them and their ensemble. It installs
# nothing. Run it again to resume.
#   bash scripts/train_gpu.sh DATA BERT OUT                 # DATA: a folder in SCAN's layout
#   bash scripts/train_gpu.sh DATA BERT OUT t2i             # one direction
#   MINUTES=9 bash scripts/train_gpu.sh DATA BERT OUT both --num_epochs 20    # options of train.py
# OUT gets DIRECTION.safetensors (float16) and its DIRECTION.json, results as NAME_result.json, and
# logs.tar.gz. A direction whose weights are in OUT is not trained again.
# MINUTES ends the training after that time, with a checkpoint and exit status 124. RUNS is the folder
# of the checkpoints (default: OUT/runs), DEVICE and SPLIT (default: test if DATA has one, otherwise
# dev) are those of train.py and evaluate_models.py. DIME_PYTHON names the Python; without it, it is
# that of .venv if there is one, otherwise python3.
set -euo pipefail
fail() {
    echo "train_gpu.sh: $1" >&2
    exit 2
}
[ $# -ge 3 ] || fail "expected DATA BERT OUT [both, i2t or t2i] [options of train.py]"
root=$(cd "$(dirname "$0")/.." && pwd)
export HF_HUB_OFFLINE=1
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
python=${DIME_PYTHON:-$python}
data=${1%/} bert=$2 out=$3
case ${4:-both} in
    both) directions="i2t t2i" ;;
    i2t | t2i) directions=$4 ;;
    *) fail "$4: expected both, i2t or t2i" ;;
esac
runs=${RUNS:-$out/runs} device=${DEVICE:-auto}
[ -e "$data/train_ims.npy" ] || fail "$data: expected a folder with train_ims.npy"
where=(--data_path "$(dirname "$data")" --data_name "$(basename "$data")" --bert_path "$bert")
split=dev
[ ! -e "$data/test_ims.npy" ] || split=test
split=${SPLIT:-$split}
mkdir -p "$out" "$runs"

keep_logs() {
    (cd "$runs" && find . -name '*.log' -o -name '*.jsonl' -o -name run.json) |
        tar czf "$out/logs.tar.gz" -C "$runs" -T -
}
trap keep_logs EXIT

train() { # DIRECTION OPTION...
    local limit=() left status=0
    if [ -n "${MINUTES:-}" ]; then
        left=$(awk "BEGIN { print int(60 * $MINUTES) - $SECONDS }")
        [ "$left" -gt 0 ] || over
        limit=(timeout --foreground --kill-after 60 "$left") # train.py saves when it gets SIGTERM
    fi
    "${limit[@]}" "$python" "$root/train.py" "${where[@]}" --logger_name "$runs" --direction "$@" \
        --device "$device" --resume auto || status=$?
    [ $status != 124 ] || over
    return $status
}

over() {
    echo "train_gpu.sh: the $MINUTES minutes are over; run the same command to resume" >&2
    exit 124
}

evaluate() { # NAME MODEL...
    "$python" "$root/evaluate_models.py" "${where[@]}" --split "$split" --device "$device" \
        --json "$out/$1_result.json" --model_path "${@:2}"
}

for direction in $directions; do
    published=(--extra_stc 1 --lambda_softmax 4)
    [ "$direction" = i2t ] || published=(--extra_img 1 --lambda_softmax 9)
    weights=$out/$direction.safetensors
    if [ ! -e "$out/$direction.json" ]; then # is written last
        echo "== train $direction"
        train "$direction" "${published[@]}" --precision bf16 --val_captions 1000 "${@:5}"
        rm -f "$weights"
        "$python" "$root/scripts/convert_checkpoint.py" --bert_path "$bert" --half \
            --checkpoint "$runs/$direction/model_best.pth.tar" --out "$weights"
    fi
    echo "== evaluate $direction on $split"
    evaluate "$direction" "$weights"
done
if [ -e "$out/i2t.json" ] && [ -e "$out/t2i.json" ]; then
    echo "== evaluate the ensemble on $split"
    evaluate ensemble "$out/i2t.safetensors" "$out/t2i.safetensors"
fi
