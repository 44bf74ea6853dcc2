#!/usr/bin/env bash
# Makes .venv if it is missing and installs the packages if their lists have changed.
#   bash scripts/set_up.sh
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash scripts/set_up.sh   # without a GPU
# It is run, never sourced, so that it cannot change a variable of its caller.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # missing, or its making was cut off
    base=${PYTHON:-python3}
    if ! "$base" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'; then
        echo "$base: $("$base" -V 2>&1); expected Python 3.10 to 3.13 (name one by PYTHON=...)" >&2
        exit 2
    fi
    "$base" -m venv --clear .venv
fi
wanted=$(cat requirements.txt requirements-search.txt requirements-demo.txt pyproject.toml | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    .venv/bin/python -m pip install -q --disable-pip-version-check -U "pip>=25.1"
    .venv/bin/python -m pip install -q -r requirements.txt -r requirements-search.txt --group dev
    # On its own, since pip wants a hash for every package if one has a hash.
    .venv/bin/python -m pip install -q --no-deps --require-hashes -r requirements-demo.txt
    # transformers imports torchvision, so a torchvision that was built for another torch stops it, too.
    if ! .venv/bin/python -c 'import torch, torchvision' 2>/dev/null; then
        versions=$(.venv/bin/python -m pip freeze | grep -E '^torch(vision)?[= ]' | tr '\n' ' ')
        echo ".venv: $versions: torchvision does not fit torch; install both from one index" >&2
        exit 2
    fi
    echo "$wanted" >.venv/installed
fi
