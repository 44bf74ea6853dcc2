"""provenance.py: the commit that results come from."""

import re
import subprocess
from pathlib import Path

from common import provenance


def test_commit_has_a_plus_if_code_differs(tmp_path: Path, capfd) -> None:
    assert provenance.commit(tmp_path) is None
    assert capfd.readouterr() == ("", "")
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    names = ("file", "README.md", "results/table", "docs/table")
    for folder in ("results", "docs"):
        (tmp_path / folder).mkdir()
    for name in names:
        (tmp_path / name).write_text("a")
    for command in (["init", "-q"], ["add", *names], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    assert re.fullmatch("[0-9a-f]{40}", provenance.commit(tmp_path))
    (tmp_path / "file").write_text("b")
    assert provenance.commit(tmp_path).endswith("+")
    (tmp_path / "file").write_text("a")
    for name in names[1:]:
        (tmp_path / name).write_text("b")
    assert re.fullmatch("[0-9a-f]{40}", provenance.commit(tmp_path))  # tables are made from results
    (tmp_path / "unpacked").mkdir()
    (tmp_path / "unpacked/file").write_text("a")
    assert provenance.commit(tmp_path / "unpacked") is None


def test_without_git_a_variable_names_the_commit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("DIME_COMMIT", "abc")
    assert provenance.commit(tmp_path) == "abc"
    assert provenance.commit() != "abc"  # this folder has git
