# Sourced by test.sh and demo.sh in the project's folder: makes .venv where it is missing, installs.
export HF_HUB_OFFLINE=1

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # none, or one that was cut off
    "${PYTHON:-python3}" -m venv --clear .venv
fi
wanted=$(cat requirements.txt requirements-demo.txt pyproject.toml | sha256sum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    .venv/bin/python -m pip install -q --disable-pip-version-check -U "pip>=25.1"
    .venv/bin/python -m pip install -q -r requirements.txt --group dev
    # apart, because every package that is named beside a hash would have to have one
    .venv/bin/python -m pip install -q --no-deps --require-hashes -r requirements-demo.txt
    echo "$wanted" >.venv/installed
fi
