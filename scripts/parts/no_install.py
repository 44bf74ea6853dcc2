"""no_install.py — the build backend that pyproject.toml names: it refuses to install the project.

Its modules have names like `model` and `data`, which would replace those of other projects.
"""

from typing import NoReturn


def refuse(*arguments: object, **options: object) -> NoReturn:
    """End the build with advice, whatever is to be built."""
    raise SystemExit(
        "This project cannot be installed: clone it, and run `bash scripts/set_up.sh` there. "
        "Its programs run from any folder; docs/design.md says how to import it."
    )


build_wheel = build_sdist = build_editable = refuse
