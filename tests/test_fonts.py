"""Drawings of captions in scripts that matplotlib's own font lacks."""

from pathlib import Path

import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from pytest import LogCaptureFixture, MonkeyPatch

from scripts.parts.figures import new_figure, write_figure
from scripts.parts.fonts import find_fonts

ITALIC_A, DOG = "\N{MATHEMATICAL BOLD ITALIC CAPITAL A}", "犬"


@pytest.fixture
def own_fonts(monkeypatch: MonkeyPatch) -> None:
    """The fonts that come with matplotlib and no others."""
    entries = font_manager.fontManager.ttflist
    own = [entry for entry in entries if "mpl-data" in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)


def written(text: str, path: Path) -> tuple[Figure, bytes]:
    figure = new_figure(3, 2)
    figure.text(0, 0.5, text)
    write_figure(figure, path)
    return figure, path.read_bytes()


@pytest.mark.usefixtures("own_fonts")
def test_an_installed_font_that_has_the_letters_is_used(
    tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    figure, drawn = written(f"a {ITALIC_A}", tmp_path / "a.png")
    families, missing = find_fonts(ITALIC_A)
    assert len(families) == 1 and not missing and not caplog.records
    assert figure.texts[0].get_fontfamily() == ["sans-serif", *families]
    assert drawn != written("a ?", tmp_path / "b.png")[1]
    assert find_fonts("a dog, ein Hündchen, собака, σκύλος") == ([], set())


@pytest.mark.usefixtures("own_fonts")
def test_letters_that_no_font_has_are_one_line(tmp_path: Path, caplog: LogCaptureFixture) -> None:
    """Warnings would be errors here; matplotlib has one for each letter."""
    figure, _ = written(f"{DOG}が走る🐕 {ITALIC_A}\ta", tmp_path / "a.png")
    (record,) = caplog.records
    assert "5 characters (CJK, HIRAGANA, symbols and emoji)" in record.getMessage()
    assert len(figure.texts[0].get_fontfamily()) == 2  # of what a font has


@pytest.mark.usefixtures("own_fonts")
def test_a_font_that_cannot_be_read_is_passed_over(monkeypatch: MonkeyPatch) -> None:
    gone = font_manager.FontEntry(
        "/none.ttf", "None", "normal", "normal", 400, "normal", "scalable"
    )
    monkeypatch.setattr(
        font_manager.fontManager, "ttflist", [gone, *font_manager.fontManager.ttflist]
    )
    assert find_fonts(DOG) == ([], {DOG})
