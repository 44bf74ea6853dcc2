#!/usr/bin/env bash
# Sets up .venv, then checks format, lint and types and runs the tests.
#   bash scripts/test.sh [options of pytest, such as -m slow]
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1

bash scripts/set_up.sh
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest -q -n 2 "$@"
