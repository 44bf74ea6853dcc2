"""The page of `scripts.search serve`, in a browser and by HTTP, and answers as HTML files."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from conftest import ROOT, run_here
from PIL import Image
from searching import HOSTILE, SENTENCES, Elements, options_of, write_world

from scripts import search
from scripts.parts.search_index import Index

HOSTILE_NAME = "<b>${6*7}{{value}}.png"
BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome")
QUERY = "a man in red"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, models, and an index of the images and of sentences, one of them hostile."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    (folder / "images/0.png").rename(folder / "images" / HOSTILE_NAME)
    (folder / "sentences.txt").write_text("\n".join([*SENTENCES, HOSTILE]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        how = ["--captions", folder / "sentences.txt", "--out", folder / "index"]
        assert run_here(patch, search.main, [*options_of(folder), *how]) == 0
        how = ["--out", folder / "images_only"]
        assert run_here(patch, search.main, [*options_of(folder), *how]) == 0
    return folder


@pytest.fixture(scope="module")
def index(world: Path) -> Index:
    return Index.open(world / "index")


# An answer as a file


def test_a_file_holds_images_scores_and_seconds(
    world: Path, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "answer.html"
    argv = ["query", "--index", world / "index", QUERY, "--top", 4, "--html", path]
    assert run_here(monkeypatch, search.main, argv) == 0
    page = Elements(path.read_text())
    assert [image["alt"] for image in page.of("img")] == [h.name for h in index.images(QUERY, 4)]
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.of("img"))
    for hit in index.images(QUERY, 4):
        assert f"{hit.score:.3f}" in page.text
    assert QUERY in page.text and "4" in page.text and "encode" in page.text
    assert not page.of("script") and not page.of("link") and "://" not in path.read_text()


def test_a_file_of_sentences_shows_the_image_of_the_query(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, image = tmp_path / "answer.html", world / "images/3.png"
    argv = ["query", "--index", world / "index", "--image", image, "--html", path]
    assert run_here(monkeypatch, search.main, argv) == 0
    page = Elements(path.read_text())
    assert len(page.of("img")) == 1 and len(page.of("li")) == len(SENTENCES) + 1
    assert all(text in page.text for text in [*SENTENCES, HOSTILE])
    assert not page.of("script")


def test_a_file_never_replaces_an_image(world: Path, monkeypatch, capsys) -> None:
    path = world / "images/2.png"
    before = path.read_bytes()
    argv = ["query", "--index", world / "index", QUERY, "--html", path]
    assert run_here(monkeypatch, search.main, argv) == 2
    assert str(path) in capsys.readouterr().err and path.read_bytes() == before


# What the page answers


@pytest.fixture(scope="module")
def page(index: Index) -> Any:
    pytest.importorskip("gradio")
    from scripts.parts.search_page import Page

    return Page(index)


def drawings(text: str) -> list[dict[str, str | None]]:
    return [image for image in Elements(text).of("img") if image["class"] == "drawing"]


def test_a_chosen_image_is_explained(page: Any, index: Index) -> None:
    from scripts.parts.search_page import Shown

    _, shown, gallery, _, reason = page.find_images(QUERY)
    hits = index.images(QUERY, 12).hits
    assert shown == Shown(QUERY, tuple(hit.row for hit in hits), 0) and reason is None
    texts = [f"{hit.score:.3f}  {hit.name}" for hit in hits]
    assert [text for _, text in gallery["value"]] == texts
    chosen = page.choose(shown, SimpleNamespace(index=2))
    assert chosen.chosen == 2
    seen = {page.explain(chosen, model)[1] for model in (0, 1)}
    assert len(seen) == 2 and all(len(drawings(text)) == 2 for text in seen)
    assert all(image["alt"] for text in seen for image in drawings(text))
    assert page.explain(None, 0)[1] is None


def test_the_route_of_an_image_whose_name_is_not_unicode(page: Any, index: Index) -> None:
    shown, name = page.find_images(QUERY)[1], os.fsdecode(b"\xff.png")
    row = shown.rows[0]
    known, index.names[row] = index.names[row], name
    shutil.copy(index.images_folder / known, index.images_folder / name)
    try:
        assert len(drawings(page.explain(shown, 0)[1])) == 2
        captions = [text for _, text in page.find_images(QUERY)[2]["value"]]
        assert any(text.endswith(r"\udcff.png") for text in captions)
    finally:
        index.names[row] = known
        (index.images_folder / name).unlink()


def test_boxes_that_hold_nan_are_named(page: Any, index: Index, monkeypatch) -> None:
    monkeypatch.setattr(index, "boxes", np.full_like(index.boxes, np.nan))
    reason = page.explain(page.find_images(QUERY)[1], 0)[1]
    assert "boxes.npy" in reason and "alert" in reason


def test_models_without_a_route_say_so(page: Any) -> None:
    shown = page.find_images(QUERY)[1]
    assert "no routing space" in page.explain(shown, None)[1]


def test_a_photograph_that_is_gone_is_named(page: Any, index: Index, tmp_path: Path) -> None:
    shutil.copytree(index.images_folder, tmp_path / "images")
    known, index.images_folder = index.images_folder, tmp_path / "images"
    try:
        first = page.find_images(QUERY)
        name = index.names[first[1].rows[0]]
        (tmp_path / "images" / name).unlink()
        assert len(page.find_images(QUERY)[2]["value"]) == len(index.names)
        reason = page.explain(first[1], 0)[1]
        assert f"{escape(name)}: not found" in reason and "alert" in reason
    finally:
        index.images_folder = known


def test_bad_input_becomes_a_sentence(page: Any, tmp_path: Path, monkeypatch) -> None:
    from scripts.parts import search_page

    text, dot, broken = (tmp_path / name for name in ("a <b>.txt", "dot.png", "broken.png"))
    text.write_text("no image")
    Image.new("RGB", (1, 1)).save(dot)
    Image.new("RGB", (99, 99)).save(broken)
    broken.write_bytes(broken.read_bytes()[:-40])
    for path, problem in ((text, "a &lt;b&gt;.txt"), (dot, "1 x 1"), (broken, "broken.png")):
        status, sentences = page.find_sentences(str(path))
        assert problem in status and "alert" in status and str(tmp_path) not in status
        assert sentences is None
    monkeypatch.setattr(search_page, "MOST_BYTES", 10)
    assert "expected at most 10" in page.find_sentences(str(dot))[0]
    assert page.find_sentences(None) == [None, None]
    for query in ("", "\u2603", None):
        status, shown, gallery, *_ = page.find_images(query)
        assert "alert" in status and shown is None and gallery == []


def test_a_missing_package_is_asked_for_by_name(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "scripts.parts.search_page", raising=False)
    assert run_here(monkeypatch, search.main, ["serve", "--index", world / "index"]) == 2
    assert "pip install -r requirements-search.txt" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1", "no host"])
def test_an_address_that_cannot_be_used_is_named(
    host: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        argv = ["serve", "--index", world / "index", "--host", host, "--port", port]
        assert run_here(monkeypatch, search.main, argv) == 2
    assert f"--host {host} --port {port}" in capsys.readouterr().err.splitlines()[-1]


# What the server answers


class Server:
    """A server that runs as a user starts it; what it writes goes to files in `folder`."""

    def __init__(self, world: Path, name: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.copies, self.log = world / f"{name}.copies", world / f"{name}.log"
        self.copies.mkdir()
        command = [sys.executable, "-m", "scripts.search", "serve", "--index", world / name]
        command += ["--port", self.port]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*map(str, command)],
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(self.copies)},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split(" ")[0]
        assert self.url == f"http://127.0.0.1:{self.port}/", self.log.read_text()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        self.process.stdout.close()
        return status


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[Server]:
    pytest.importorskip("gradio")
    server = Server(world, "index")
    yield server
    server.stop()


def captions_found(server: Server, query: str) -> list[str]:
    """Ask for images as a program does, by HTTP; return the captions of the gallery."""
    url = f"{server.url}gradio_api/call/images"
    body = json.dumps({"data": [query]}).encode()
    with urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=30) as answer:
        event = json.load(answer)["event_id"]
    with urlopen(f"{url}/{event}", timeout=60) as answer:
        last = [line for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    _, _, gallery, *_ = json.loads(last[-1].removeprefix("data: "))
    return [image["caption"] for image in gallery["value"]]


def test_a_server_without_sentences_until_a_signal_ends_it(world: Path) -> None:
    pytest.importorskip("gradio")
    server = Server(world, "images_only")
    with urlopen(f"{server.url}config", timeout=30) as answer:
        assert "--captions FILE" in answer.read().decode()
    captions_found(server, QUERY)
    assert [path for path in server.copies.rglob("*") if path.is_file()]
    assert server.stop() == 128 + signal.SIGTERM
    assert not [path for path in server.copies.rglob("*") if path.is_file()]
    assert "Traceback" not in server.log.read_text()


def status_of(url: str) -> int:
    try:
        with urlopen(url, timeout=30) as answer:
            return answer.status
    except HTTPError as error:
        error.close()
        return error.code


def test_no_other_file_is_served(server: Server, world: Path) -> None:
    assert status_of(server.url) == 200
    files = ["/etc/passwd", world / "images/1.png", world / "index/index.json"]
    for file in (*files, ROOT / "pyproject.toml", "pyproject.toml", "https://example.com/x.png"):
        assert status_of(f"{server.url}gradio_api/file={file}") == 403, file


def test_urls_that_a_client_names_are_not_fetched() -> None:
    pytest.importorskip("gradio")
    from gradio import processing_utils, route_utils

    import scripts.parts.search_page  # noqa: F401

    assert processing_utils.sh is route_utils.safehttpx
    for fetch in (route_utils.safehttpx.get, route_utils.safehttpx.async_validate_url):
        with pytest.raises(PermissionError):
            asyncio.run(fetch("example.com"))


def test_two_users_get_their_own_answers(server: Server, index: Index) -> None:
    queries = [QUERY, "a white dog"] * 3
    with ThreadPoolExecutor(2) as users:
        answers = list(users.map(lambda query: captions_found(server, query), queries))
    for query, answer in zip(queries, answers, strict=True):
        assert answer == [f"{hit.score:.3f}  {hit.name}" for hit in index.images(query, 12)]
    assert answers[0] != answers[1]


# What a browser shows


@pytest.fixture
def tab(server: Server) -> Iterator[Any]:
    """A page of a headless Chromium that noted its problems: other hosts and console errors."""
    playwright = pytest.importorskip("playwright.sync_api")
    names = (os.environ.get("DIME_CHROMIUM"), *BROWSERS)
    path = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if path is None:
        pytest.skip(f"no Chromium: expected {', '.join(BROWSERS)} or DIME_CHROMIUM")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        problems: list[str] = []

        def note_request(request: Any) -> None:
            if not request.url.startswith((server.url, "data:", "blob:")):
                problems.append(request.url)

        def note_message(message: Any) -> None:
            # Gradio asks for the progress of an upload that may be over already.
            if message.type == "error" and "upload_progress" not in message.location["url"]:
                problems.append(message.text)

        tab.on("request", note_request)
        tab.on("console", note_message)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.goto(server.url)
        tab.problems = problems
        yield tab
        browser.close()


def test_a_sentence_finds_images_and_a_chosen_one_is_explained(tab: Any, index: Index) -> None:
    """By keyboard alone."""
    tab.get_by_role("heading", name=f"Search {len(index.names)} images").wait_for()
    tab.get_by_label("What the images show").fill(QUERY)
    tab.keyboard.press("Enter")
    tab.locator(".thumbnail-item").first.wait_for()
    hits = index.images(QUERY, 12).hits
    texts = [text.split() for text in tab.locator(".caption-label").all_inner_texts()]
    assert texts == [[f"{hit.score:.3f}", hit.name] for hit in hits]
    tab.locator(".thumbnail-item").nth(1).focus()
    tab.keyboard.press("Enter")
    tab.locator("img.drawing").nth(1).wait_for()
    widths = tab.locator("img.drawing").evaluate_all("all => all.map(one => one.naturalWidth)")
    assert len(widths) == 2 and min(widths) > 300
    before = tab.locator("img.drawing").first.get_attribute("src")
    tab.get_by_role("radio").nth(1).check()
    tab.wait_for_function("text => document.querySelector('img.drawing')?.src != text", arg=before)
    tab.get_by_label("What the images show").fill("\u2603")
    tab.get_by_role("button", name="Search").click()
    tab.get_by_role("alert").wait_for()
    assert tab.locator("img.drawing").count() == 0
    assert tab.problems == []


def test_an_image_finds_sentences_and_other_files_are_refused(
    tab: Any, world: Path, tmp_path: Path
) -> None:
    text, large = tmp_path / "text.txt", tmp_path / "large.png"
    text.write_text("no image")
    with large.open("wb") as file:
        file.truncate(21 * 2**20)
    tab.get_by_role("tab", name="Find sentences").click()
    upload = tab.locator("input[type=file]")
    upload.set_input_files(text)
    tab.get_by_role("alert").filter(has_text="text.txt").wait_for()
    tab.get_by_label("Clear").click()
    upload.set_input_files(large)
    tab.get_by_text(re.compile("large.png")).wait_for()
    upload.set_input_files(world / "images/3.png")
    tab.locator("ol.sentences li").first.wait_for()
    shown = tab.locator("ol.sentences li").all_inner_texts()
    assert len(shown) == len(SENTENCES) + 1
    assert any(text.endswith(HOSTILE) for text in shown)
    assert tab.evaluate("window.hacked") is None
    assert tab.problems == []
