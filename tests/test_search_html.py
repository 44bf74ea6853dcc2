"""An answer as an HTML file: what strangers' names and sentences become."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image
from searching import HOSTILE, Elements

from scripts.parts.search_html import write_page
from scripts.parts.search_index import Answer, Hit


def test_a_file_escapes_names_and_says_which_image_is_gone(tmp_path: Path) -> None:
    name = '"><script>alert(1)</script>.png'
    Image.new("RGB", (40, 30)).save(tmp_path / name.replace("/", "%"))
    hits = (Hit(name.replace("/", "%"), 0.5, 0), Hit("gone<b>.png", 0.25, 1))
    answer = Answer(HOSTILE, hits, {"encode": 0.1}, 2, 2)
    folder: Any = SimpleNamespace(images_folder=tmp_path)
    write_page(tmp_path / "page.html", folder, answer)
    page = Elements((tmp_path / "page.html").read_text())
    assert not page.of("script") and [x["alt"] for x in page.of("img")] == [hits[0].name]
    assert HOSTILE in page.text and "gone<b>.png: not found" in page.text


def test_a_name_that_is_not_unicode_is_shown_escaped(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\n.png")
    Image.new("RGB", (40, 30)).save(tmp_path / name)
    answer = Answer(name, (Hit(name, 0.5, 0),), {"encode": 0.1}, 1, 1)
    folder: Any = SimpleNamespace(images_folder=tmp_path)
    write_page(tmp_path / "page.html", folder, answer)
    page = Elements((tmp_path / "page.html").read_text())
    assert [image["alt"] for image in page.of("img")] == [r"\udcff\n.png"]
    assert page.text.count(r"\udcff\n.png") == 3  # as title, heading and name
