"""The project as a whole: its tree, its imports, its pages, and nothing of one machine in it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_here

from scripts import results_table

PROGRAMS = {"train.py", "evaluate_models.py"}
TOP_MODULES = {"model.py", "router.py", "cells.py", "data.py", "vocab.py", "evaluation.py"}
OTHERS = """common checkpoint training scripts tests docs results .ci .github README.md LICENSE
    CONTRIBUTING.md CITATION.cff pyproject.toml .gitignore requirements.txt requirements-demo.txt
    requirements-search.txt"""
TRACKED = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
TRACKED = [name for name in TRACKED if (ROOT / name).exists()]
PAGES = [name for name in TRACKED if name.endswith(".md")]
CODE = [ROOT / name for name in TRACKED if name.endswith(".py") and not name.startswith("tests/")]

# A file may import those that stand before it; within one place, each other.
ORDER = [
    *("common", "vocab", "data", "router", "cells", "model", "evaluation", "checkpoint"),
    *("training", "train evaluate_models", "scripts", "tests"),
]
PLACE = {name: place for place, names in enumerate(ORDER) for name in names.split()}


def test_the_top_level_holds_the_list_and_nothing_else() -> None:
    top = {name.split("/")[0] for name in TRACKED}
    assert top == PROGRAMS | TOP_MODULES | set(OTHERS.split())


def test_imports_go_one_way() -> None:
    for path in CODE:
        place = path.relative_to(ROOT).parts[0].removesuffix(".py")
        later = {name for name in PLACE if PLACE[name] > PLACE[place]}
        assert not later & imports(path), path


def imports(path: Path) -> set[str]:
    """Return the top-level names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_a_script_is_one_program_and_imports_no_other() -> None:
    """What scripts share is in scripts/parts, which holds no program."""
    for path in (ROOT / "scripts").glob("*.py"):
        text = path.read_text()
        assert "if __name__ ==" in text and text.startswith(f'"""{path.name} — '), path
        assert not re.search(r"from scripts import|import scripts\b|from scripts\.(?!parts)", text)
    for path in (ROOT / "scripts/parts").glob("*.py"):
        assert "if __name__ ==" not in path.read_text(), path


SCRIPTS = sorted(f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py"))
HEAVY = r"\| +(torch|torchvision|transformers|tensorboard|matplotlib|sklearn|gradio|faiss)$"


@pytest.mark.parametrize("program", [*sorted(PROGRAMS), *SCRIPTS])
def test_help_is_quick_since_it_imports_nothing_heavy(program: str, tmp_path: Path) -> None:
    """From any folder, even one whose modules have the names of the project's, and by a link."""
    for name in ("common", "model", "scripts"):
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    (tmp_path / "link.py").symlink_to(ROOT / program)
    command = [sys.executable, "-X", "importtime", "link.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not re.search(HEAVY, done.stderr, re.MULTILINE), done.stderr


def test_a_script_runs_as_a_module_too() -> None:
    command = [sys.executable, "-m", "scripts.check_data", "--help"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def test_the_project_refuses_to_be_installed(tmp_path: Path) -> None:
    pytest.importorskip("pip")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--target", tmp_path / "site"]
    for what in ([ROOT], ["-e", ROOT]):
        command = [sys.executable, "-m", "pip", "install", *offline, *what]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0 and "scripts/set_up.sh" in done.stdout + done.stderr
    assert not (tmp_path / "site").exists()


def test_files_and_functions_are_short() -> None:
    """400 lines and 40, docstrings of functions not counted."""
    for path in CODE:
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                assert not body or body[-1].end_lineno - body[0].lineno < 40, f"{path}: {node.name}"


def test_the_readme_is_short_and_begins_with_results_and_a_command() -> None:
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    assert 140 <= len(lines) <= 180 and len(text.encode()) <= 10_000
    begin = "\n".join(lines[:50])
    assert "## Results" in begin and "bash scripts/demo.sh" in begin


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    path = ROOT / page
    text = path.read_text()
    for target in re.findall(r"\]\((?!https?://)([^)#]*)", text):
        assert (path.parent / target).exists(), target
    for name in re.findall(r"`((?:scripts|docs|tests|results|common|training)/[\w/.-]+)`", text):
        assert (ROOT / name).exists(), name


def test_the_page_of_deviations_lists_every_one() -> None:
    text = (ROOT / "docs/deviations.md").read_text()
    listed = [line.removeprefix("* ") for line in text.splitlines() if line.startswith("* ")]
    assert sorted(listed) == sorted(tagged("DEVIATION"))
    assert len(listed) == sum(path.read_text().count("# DEVIATION:") for path in CODE)


def tagged(tag: str) -> list[str]:
    """Return the comments with a tag, each on one line."""
    block = rf"# {tag}: ((?:.*\n(?: *# )?)*?.*?\.)\n(?! *# )"
    comments = [text for path in CODE for text in re.findall(block, path.read_text())]
    return [" ".join(re.sub(r"\n *# ", " ", text).split()).rstrip(".") for text in comments]


@pytest.mark.parametrize("page", results_table.PAGES)
def test_tables_of_the_pages_are_up_to_date(page: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text()
    assert results_table.updated(page) == text, "run: python -m scripts.results_table --write"


def test_tables_are_written_between_their_markers(tmp_path: Path, monkeypatch, capsys) -> None:
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


def test_no_path_of_a_machine_is_in_the_project() -> None:
    kinds = (".py", ".md", ".json", ".jsonl", ".log", ".toml", ".sh", ".txt", ".yml", ".cff", "")
    for name in TRACKED:
        path = ROOT / name
        if path.suffix in kinds and path != Path(__file__):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"/(?:home|root|work|Users)/", text), name
