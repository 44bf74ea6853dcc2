#!/usr/bin/env bash
# Checks the code on a GPU and measures its speed there; --help says how. It installs nothing.
#   bash scripts/check_gpu.sh                      # writes gpu_check/gpu.json and gpu_check/gpu.log
#   bash scripts/check_gpu.sh --device cpu --tiny  # a rehearsal
# DIME_PYTHON names the Python; without it, it is that of .venv if there is one, otherwise python3.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export HF_HUB_OFFLINE=1
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
exec "${DIME_PYTHON:-$python}" "$root/scripts/check_gpu.py" "$@"
