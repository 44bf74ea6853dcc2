"""fonts.py — installed fonts for captions whose letters matplotlib's own font lacks."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

from common.errors import summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.ft2font import FT2Font

log = logging.getLogger(__name__)

PLACEHOLDER = "Last Resort"  # comes with matplotlib: a box for every character


def set_fonts(figure: Figure) -> None:
    """Let the texts of a figure fall back on installed fonts that have their characters.

    Logs one warning if no font has some of them; they are drawn as boxes.
    """
    import matplotlib
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    characters = {c for text in texts for c in text.get_text() if c.isprintable() and c != " "}
    fallbacks, missing = find_fonts(characters)
    for text in texts if fallbacks else []:
        text.set_fontfamily([*matplotlib.rcParams["font.family"], *fallbacks])
    if missing:
        kinds = sorted({_script(c) for c in missing})
        log.warning(
            "drawn as boxes: %d characters (%s), since no installed font has them; "
            "install a font of that script, such as Noto Sans",
            *(len(missing), summarise(kinds)),
        )


def _script(character: str) -> str:
    if unicodedata.category(character) == "So":
        return "symbols and emoji"
    return unicodedata.name(character, "UNNAMED").split()[0]


def find_fonts(characters: Iterable[str]) -> tuple[list[str], set[str]]:
    """Return families that have what matplotlib's own font lacks, and what no family has.

    The family that has most of the rest comes next, so that few are needed.
    """
    from matplotlib import font_manager

    own = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    missing, families = set(characters) - _characters(own), []
    fonts = _installed() if missing else {}
    while missing and fonts:
        best = max(fonts, key=lambda name: len(missing & fonts[name]))
        has = fonts.pop(best)
        if not missing & has:
            break
        families.append(best)
        missing -= has
    return families, missing


def _installed() -> dict[str, set[str]]:
    """Return the characters of each installed family, of its upright regular font if it has one."""
    from matplotlib import font_manager

    entries = font_manager.fontManager.ttflist
    files: dict[str, str] = {}
    for entry in sorted(entries, key=lambda e: (e.style != "normal", e.weight != 400, e.name)):
        if not entry.name.startswith(PLACEHOLDER):
            files.setdefault(entry.name, entry.fname)
    fonts = {}
    for name, file in sorted(files.items()):
        try:
            fonts[name] = _characters(font_manager.get_font(file))
        except (OSError, RuntimeError):  # removed meanwhile, or damaged
            continue
    return fonts


def _characters(font: FT2Font) -> set[str]:
    return set(map(chr, font.get_charmap()))
