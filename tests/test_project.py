"""The project as a whole: README and code agree, and nothing of one machine is in it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from scripts import results_table

MODULES = sorted(ROOT.glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOP = {
    *("README.md", "requirements.txt", "train.py", "evaluate_models.py", "model.py", "data.py"),
    *("vocab.py", "evaluation.py", "router.py", "cells.py", "options.py", "checkpoint.py"),
    *("scripts", "tests", "LICENSE", "pyproject.toml", ".gitignore", ".ci/run"),
}


def tagged(tag: str) -> set[str]:
    """What the comments with a tag say, up to the comment's end."""
    found = set()
    for path in MODULES:
        for block in re.findall(
            rf"# {tag}: ((?:.*\n(?: *# )?)*?.*?\.)\n(?! *# )", path.read_text()
        ):
            found.add(" ".join(re.sub(r"\n *# ", " ", block).split()).rstrip("."))
    return found


def test_the_readme_lists_every_deviation() -> None:
    section = README.split("## Deviations")[1].split("\n## ")[0]
    listed = {line.removeprefix("* ") for line in section.splitlines() if line.startswith("* ")}
    assert listed == tagged("DEVIATION")
    assert len(listed) == sum(path.read_text().count("# DEVIATION:") for path in MODULES)


def test_the_layout_is_there() -> None:
    assert [name for name in TOP if not (ROOT / name).exists()] == []


def test_imports_point_one_way() -> None:
    """options below all; router, cells, model, bert, checkpoint; the two programs on top."""
    order = [
        "memory",
        "signals",
        "options",
        "loader",
        "pickles",
        "files",
        "torchfiles",
        "locking",
        "pictures",
        "layout",
        "vocab",
        "data",
        "router",
        "cells",
        "space",
    ]
    order += [
        "model",
        "published",
        "weights",
        "regions",
        "bert",
        "checkpoint",
        "evaluation",
        "scoring",
        "runlog",
        "runfolder",
    ]
    order += [
        "mscoco",
        "textcache",
        "trainconfig",
        "learner",
        "snapshots",
        "trainer",
        "evalconfig",
        "train",
        "evaluate_models",
    ]
    for path in MODULES:
        imported = re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
        above = set(order[order.index(path.stem) :])
        assert not above & set(imported), path.name
    for name in ("evaluation.py", "scoring.py"):
        text = (ROOT / name).read_text()
        imported = re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)
        assert not {"model", "space", "cells"} & set(imported)


def test_every_script_is_in_the_readme() -> None:
    for path in (ROOT / "scripts").glob("*.*"):
        assert path.name == "__init__.py" or path.name in README, path.name


def test_the_readmes_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = results_table.updated(README)
    assert found == README, "run: python -m scripts.results_table --write"


def test_a_run_without_its_log_is_not_run(tmp_path: Path) -> None:
    run = ROOT / "results/flickr8k/i2t"
    shutil.copytree(run, tmp_path / "flickr8k/i2t")
    shutil.copy(ROOT / "results/paper.json", tmp_path)
    assert "| step |" in results_table.results(tmp_path)
    (tmp_path / "flickr8k/i2t/metrics.jsonl").unlink()
    text = results_table.results(tmp_path)
    assert "| step |" not in text and "--resume auto`: not run.\n" in text


def test_no_path_of_a_machine_is_in_the_project() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".json", ".jsonl", ".log", ".toml", ".sh", ".txt"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"/(?:home|root|work|Users)/", text) or path == Path(__file__), (
                name
            )
