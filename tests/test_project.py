"""The project as a whole: README and code agree, and nothing of one machine is in it."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, run_here

from scripts import results_table

PACKAGES = ("common", "checkpoint", "training")
MODULES = sorted(
    [*ROOT.glob("*.py"), *(p for name in PACKAGES for p in (ROOT / name).glob("[!_]*.py"))]
)
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOP = {
    *("README.md", "requirements.txt", "train.py", "evaluate_models.py", "model.py", "data.py"),
    *("vocab.py", "evaluation.py", "router.py", "cells.py", "common", "checkpoint", "training"),
    *("scripts", "tests", "LICENSE", "pyproject.toml", ".gitignore", ".ci/run"),
}


def tagged(tag: str) -> set[str]:
    """What the comments with a tag say, up to the comment's end."""
    found = set()
    for path in [*MODULES, *SCRIPTS]:
        for block in re.findall(
            rf"# {tag}: ((?:.*\n(?: *# )?)*?.*?\.)\n(?! *# )", path.read_text()
        ):
            found.add(" ".join(re.sub(r"\n *# ", " ", block).split()).rstrip("."))
    return found


def test_the_readme_lists_every_deviation() -> None:
    section = README.split("## Deviations")[1].split("\n## ")[0]
    listed = {line.removeprefix("* ") for line in section.splitlines() if line.startswith("* ")}
    assert listed == tagged("DEVIATION")
    texts = [path.read_text() for path in [*MODULES, *SCRIPTS]]
    assert len(listed) == sum(text.count("# DEVIATION:") for text in texts)


def test_the_layout_is_there() -> None:
    assert [name for name in TOP if not (ROOT / name).exists()] == []


# Each may import those before it; of one rank, each other.
ORDER = [
    *("common", "vocab", "data", "router", "cells", "model", "evaluation"),
    *("checkpoint", "training", "train", "evaluate_models", "scripts", "tests"),
]


def test_imports_point_one_way() -> None:
    for path in [*MODULES, *SCRIPTS]:
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        above = set(ORDER[ORDER.index(room) + 1 :])
        assert not above & imports(path), path


def imports(path: Path) -> set[str]:
    """What a file imports, wherever it does so, by first names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_every_file_is_in_the_readme() -> None:
    scripts = [path for path in (ROOT / "scripts").rglob("*.*") if path.suffix != ".pyc"]
    for path in [*MODULES, *scripts]:
        assert f"`{path.relative_to(ROOT)}`" in README, path


def test_scripts_are_programs_and_import_no_other() -> None:
    """What they share is in scripts/parts, which holds no program."""
    programs = {path.stem: path.read_text() for path in (ROOT / "scripts").glob("*.py")}
    for name, text in programs.items():
        assert "if __name__ ==" in text and re.match(rf'"""{name}\.py — ', text), name
        assert not re.search(
            r"(from scripts import|import scripts\b|from scripts\.(?!parts))", text
        ), name
    for path in (ROOT / "scripts/parts").glob("*.py"):
        assert "if __name__ ==" not in path.read_text(), path


def test_files_and_functions_can_be_read_at_one_go() -> None:
    """300 lines and 30, docstrings of functions not counted."""
    for path in [*MODULES, *SCRIPTS]:
        text = path.read_text()
        assert len(text.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                assert not body or body[-1].end_lineno - body[0].lineno < 30, f"{path}: {node.name}"


@pytest.mark.parametrize("page", results_table.PAGES)
def test_tables_of_the_pages_are_up_to_date(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text()
    assert results_table.updated(page, text) == text, "run: python -m scripts.results_table --write"


def test_tables_are_written_between_their_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "results").symlink_to(ROOT / "results")
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    marked = re.compile(r"(<!-- \w+: begin -->\n).*?(<!-- \w+: end -->)", re.DOTALL)
    for page in results_table.PAGES:
        (tmp_path / page).write_text(marked.sub(r"\1\2", (ROOT / page).read_text()))
    assert run_here(monkeypatch, results_table.main, ["--write"]) == 0
    for page in results_table.PAGES:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text()
    speed = tmp_path / "docs/speed.md"
    speed.write_text("<!-- speed: begin -->\n")
    assert run_here(monkeypatch, results_table.main, ["--write"]) == 2
    assert "docs/speed.md" in capsys.readouterr().err
    assert speed.read_text() == "<!-- speed: begin -->\n"


def test_a_training_without_its_log_is_not_run(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "results/flickr8k/i2t", tmp_path / "i2t")
    assert "| step |" in results_table.training(tmp_path / "i2t")
    (tmp_path / "i2t/metrics.jsonl").unlink()
    assert results_table.training(tmp_path / "i2t").endswith("not run.\n")


def test_no_path_of_a_machine_is_in_the_project() -> None:
    names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    assert {"train.py", ".ci/run"} <= set(names)
    for name in names:
        path = ROOT / name
        kinds = (".py", ".md", ".json", ".jsonl", ".log", ".toml", ".sh", ".txt")
        if path.suffix in kinds or name == ".ci/run":
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"/(?:home|root|work|Users)/", text) or path == Path(__file__), (
                name
            )
