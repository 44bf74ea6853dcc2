# Sourced by test.sh and demo.sh in the project's folder: makes .venv where it is missing, installs.
export HF_HUB_OFFLINE=1

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # none, or one that was cut off
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'; then
        echo "$python: $("$python" -V 2>&1); expected Python 3.10 to 3.13 (PYTHON=... names one)" >&2
        exit 2
    fi
    "$python" -m venv --clear .venv
fi
wanted=$(cat requirements.txt requirements-demo.txt pyproject.toml | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    .venv/bin/python -m pip install -q --disable-pip-version-check -U "pip>=25.1"
    .venv/bin/python -m pip install -q -r requirements.txt --group dev
    # apart, because every package that is named beside a hash would have to have one
    .venv/bin/python -m pip install -q --no-deps --require-hashes -r requirements-demo.txt
    echo "$wanted" >.venv/installed
fi
