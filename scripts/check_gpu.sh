#!/usr/bin/env bash
# Tells on a machine with a GPU whether everything holds there, and how fast it is: golden parity in
# float32, bfloat16 and compiled, the benchmark, trainings of both directions, one of them compiled
# and gone on with, and their ensemble. What fails is named at the end, and stops nothing else.
#   bash scripts/check_gpu.sh 2>&1 | tee gpu.txt
# DIME_DEVICE=cpu rehearses it where there is none; DIME_PYTHON names a Python of your own.
set -uo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 DIME_DEVICE=${DIME_DEVICE:-cuda}
python=${DIME_PYTHON:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=()
trap 'exit 130' INT

step() { # NAME COMMAND...
    echo "== $1"
    "${@:2}" || failed+=("$1")
}

golden=tests/golden/i2t
training() { # DIRECTION OPTION...
    "$python" train.py --data_path $golden/data --data_name f30k_precomp --bert_path $golden/bert \
        --logger_name "$folder/run" --embed_size 16 --max_words 14 --num_head_IMRC 4 --hid_IMRC 24 \
        --hid_router 20 --batch_size 8 --device "$DIME_DEVICE" --direction "$@"
}

about='import torch; print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())'
step machine "$python" -c "$about"
# a warning of a driver's is none of ours
step tests "$python" -m pytest -q -W default -m "slow or not slow" tests/test_devices.py
step benchmark "$python" -m scripts.benchmark --device "$DIME_DEVICE" --json "$folder/speed.json"
step "training, compiled" training i2t --extra_stc 1 --compile --max_steps 20
step "going on" training i2t --extra_stc 1 --compile --max_steps 40 --resume auto
step compiler bash -c '! grep "not compiled" "$1"/run/i2t/train.log' - "$folder"
step "training, bf16" training t2i --extra_img 1 --precision bf16 --max_steps 20
step evaluation "$python" evaluate_models.py --device "$DIME_DEVICE" --compile \
    --model_path "$folder"/run/i2t/model_best.pth.tar --json "$folder/results.json"
step ensemble "$python" evaluate_models.py --device "$DIME_DEVICE" \
    --model_path "$folder"/run/{i2t,t2i}/model_best.pth.tar
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all of it ran; please send this output"
