#!/usr/bin/env bash
# Runs the tests with the oldest versions that requirements.txt and requirements-search.txt allow, in .venv-oldest.
#   PYTHON=python3.10 bash scripts/test_oldest.sh [options of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1

rm -rf .venv-oldest
"${PYTHON:-python3.10}" -m venv .venv-oldest
cat requirements.txt requirements-search.txt | sed 's/>=/==/' >.venv-oldest/oldest.txt
.venv-oldest/bin/python -m pip install -q --disable-pip-version-check -U "pip>=25.1"
.venv-oldest/bin/python -m pip install -q -r .venv-oldest/oldest.txt --group dev
.venv-oldest/bin/python -m pip install -q --no-deps --require-hashes -r requirements-demo.txt
.venv-oldest/bin/python -m pip freeze
.venv-oldest/bin/python -m pytest -q -n 2 "$@"
