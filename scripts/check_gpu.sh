#!/usr/bin/env bash
# Checks the code on a GPU and measures its speed there: golden arrays in float32, bfloat16 and compiled,
# the benchmark, a training of each direction (one compiled and resumed) and their ensemble. A step that
# fails is named at the end; the others still run.
#   bash scripts/check_gpu.sh 2>&1 | tee gpu.txt
# DIME_DEVICE=cpu rehearses it without a GPU. DIME_PYTHON names a Python that has everything installed;
# without it, .venv is set up.
set -uo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 DIME_DEVICE=${DIME_DEVICE:-cuda}
[ -n "${DIME_PYTHON:-}" ] || bash scripts/set_up.sh || exit
python=${DIME_PYTHON:-.venv/bin/python}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
trap 'exit 130' INT
failed=()

step() { # NAME COMMAND...
    echo "== $1"
    "${@:2}" || failed+=("$1")
}

golden=tests/golden/i2t
train() { # DIRECTION OPTION...
    "$python" train.py --data_path $golden/data --data_name f30k_precomp --bert_path $golden/bert \
        --logger_name "$out/run" --embed_size 16 --max_words 14 --num_head_IMRC 4 --hid_IMRC 24 \
        --hid_router 20 --batch_size 8 --device "$DIME_DEVICE" --direction "$@"
}

about='import torch; print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())'
step machine "$python" -c "$about"
# -W default: warnings of a driver are no failures of this project
step tests "$python" -m pytest -q -W default -m "slow or not slow" tests/test_devices.py
step benchmark "$python" -m scripts.benchmark --device "$DIME_DEVICE" --json "$out/speed.json"
step "training, compiled" train i2t --extra_stc 1 --compile --max_steps 20
step resume train i2t --extra_stc 1 --compile --max_steps 40 --resume auto
step "compiler did not fail" bash -c '! grep "not compiled" "$1"/run/i2t/train.log' - "$out"
step "training, bf16" train t2i --extra_img 1 --precision bf16 --max_steps 20
step evaluation "$python" evaluate_models.py --device "$DIME_DEVICE" --compile \
    --model_path "$out/run/i2t/model_best.pth.tar"
step ensemble "$python" evaluate_models.py --device "$DIME_DEVICE" \
    --model_path "$out/run/i2t/model_best.pth.tar" "$out/run/t2i/model_best.pth.tar"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "everything ran; please send this output"
