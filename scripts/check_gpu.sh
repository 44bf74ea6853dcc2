#!/usr/bin/env bash
# Tells on a machine with a GPU whether everything holds there, and how fast it is: golden parity in
# float32, bfloat16 and compiled, the benchmark, one training and one evaluation.
#   bash scripts/check_gpu.sh 2>&1 | tee gpu.txt
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 DIME_DEVICE=cuda
python=${PYTHON:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'
"$python" -m pytest -q -m "slow or not slow" tests/test_devices.py
"$python" -m scripts.benchmark --device cuda --json "$folder/speed.json"

golden=tests/golden/i2t
"$python" train.py --data_path $golden/data --data_name f30k_precomp --bert_path $golden/bert \
    --logger_name "$folder/run" --embed_size 16 --img_dim 20 --max_words 14 --num_head_IMRC 4 \
    --hid_IMRC 24 --hid_router 20 --batch_size 8 --extra_stc 1 --max_steps 20 --device cuda
"$python" evaluate_models.py --model_path "$folder/run/i2t/model_best.pth.tar" --device cuda
echo "all of it ran; please send this output"
