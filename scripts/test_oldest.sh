#!/usr/bin/env bash
# Runs the tests with the oldest versions that requirements.txt allows, in .venv-oldest. gradio needs
# a newer transformers, so the tests of search that need requirements-search.txt skip themselves.
#   PYTHON=python3.10 bash scripts/test_oldest.sh [options of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1

rm -rf .venv-oldest
"${PYTHON:-python3.10}" -m venv .venv-oldest
sed 's/>=/==/' requirements.txt >.venv-oldest/oldest.txt
.venv-oldest/bin/python -m pip install -q --disable-pip-version-check -U "pip>=25.1"
.venv-oldest/bin/python -m pip install -q -r .venv-oldest/oldest.txt --group dev
.venv-oldest/bin/python -m pip install -q --no-deps --require-hashes -r requirements-demo.txt
.venv-oldest/bin/python -m pip freeze
.venv-oldest/bin/python -m pytest -q -n 2 "$@"
