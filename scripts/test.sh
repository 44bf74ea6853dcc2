#!/usr/bin/env bash
# Sets up .venv where it is missing, installs, and runs format check, lint and tests.
#   bash scripts/test.sh [options of pytest, such as -m slow]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/set_up.sh

.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/python -m pytest -q -n 2 "$@"
