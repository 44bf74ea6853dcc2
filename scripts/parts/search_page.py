"""search_page.py — the page of `scripts.search serve`: search in a browser, and why an image fits.

A sentence finds images. A click on one shows its route through the cells, and where each word is
seen. An uploaded image finds sentences. Bad input becomes a sentence of the page. The page asks no
other host for anything, and holds small copies of the images, never their files.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from common.cli import print_line
from common.errors import InputError, printable, require
from common.layout import check_finite_rows
from common.signals import Stopped, handled
from scripts.parts.figures import SIDE, png_of, thumbnail
from scripts.parts.route_figures import draw_route, draw_words
from scripts.parts.search_html import image_of, image_tag, list_sentences, summary

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by the import
os.environ["GRADIO_RUN_HISTORY"] = "False"  # which keeps queries in the browser
os.environ["no_proxy"] = "*"  # Gradio asks its own server whether it is up
try:
    import gradio as gr
    import safehttpx
except ImportError as error:
    raise InputError(f"serve: {error}; pip install -r requirements-search.txt") from error


async def _refuse(*arguments: Any, **more: Any) -> Any:
    raise PermissionError("this page asks no other host for anything")


# A client may name a URL instead of a file; Gradio would fetch it with these functions.
safehttpx.get = safehttpx.async_validate_url = _refuse

if TYPE_CHECKING:
    from scripts.parts.search_index import Index

log = logging.getLogger(__name__)

MOST_BYTES = 20 * 2**20  # of an uploaded file
TOP, COLUMNS = 12, 6  # images shown, and in a row
LONGEST_QUERY = 1000  # characters
CACHE_SECONDS = 3600  # until uploads and copies of images are deleted
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
EXAMPLE = "two dogs on a beach"
CSS = """
.grid-wrap { min-height: 0 !important; max-height: none !important; }
.grid-container { grid-template-columns: repeat(auto-fill, minmax(min(11rem, 45%), 1fr))
                  !important; }
.thumbnail-lg { aspect-ratio: auto !important; height: auto !important; }
.thumbnail-lg > img { aspect-ratio: 1; height: auto !important; }
.caption-label { position: static !important; max-width: none !important; border: 0 !important;
                 white-space: normal !important; overflow-wrap: anywhere; }
.submit-button { background: var(--button-primary-background-fill) !important;
                 color: var(--button-primary-text-color) !important; }
.problem { color: var(--error-text-color) !important; font-weight: 600; }
.sentences { list-style: none; padding: 0; margin: 0; display: flow-root; }
.sentences li { padding: .5rem 0; border-top: 1px solid var(--border-color-primary); }
img.upload { float: left; max-width: 20rem; margin: 0 1.5rem 1rem 0; border-radius: .5rem; }
img.drawing { width: 100%; max-width: 70rem; background: white; }
.sentences b { font-variant-numeric: tabular-nums; margin-right: .75rem; }
"""
ROUTE = (
    "The route of this image: lines are as wide as its gates with the sentence. Below, how much"
    " each gate differs from its mean over the images shown."
)
WORDS = "Where each word is seen in this image: the attention of the first layer."
NO_ROUTE = "The models of this index have no routing space, so no route can be drawn."
NO_SENTENCES = "This index has no sentences; `index` with --captions FILE makes one with sentences."


@dataclass(frozen=True)
class Shown:
    """What the page of one user shows: a sentence, and the images that it found."""

    text: str
    rows: tuple[int, ...]  # of the images in the index
    chosen: int  # place of an image among them


class Page:
    """The page of an index. Its methods answer events, each with the values of some components."""

    def __init__(self, index: Index) -> None:
        self.index = index
        matcher = index.matcher
        pairs = zip(matcher.models, matcher.checkpoints, strict=True)
        self.models = [f"{model.direction} ({checkpoint.path.name})" for model, checkpoint in pairs]
        layers = [model.config.num_layer_routing for model in matcher.models]
        self.routed = [i for i, count in enumerate(layers) if count]

    def build(self) -> gr.Blocks:
        """Return the page, to be launched."""
        with gr.Blocks(title="DIME search", delete_cache=(CACHE_SECONDS, CACHE_SECONDS)) as page:
            gr.HTML(self._heading())
            with gr.Tab("Find images"):
                self._build_images()
            with gr.Tab("Find sentences"):
                if self.index.sentences:
                    self._build_sentences()
                else:
                    gr.HTML(_sentence(NO_SENTENCES))
        return page

    def _heading(self) -> str:
        """Return what the index holds, and which models rank it."""
        models = escape(" and ".join(self.models))
        texts = f" and {len(self.index.sentences)} sentences" if self.index.sentences else ""
        title = f"Search {len(self.index.names)} images{texts}"
        return f"<h1>{title}</h1><p>Ranked by {models}.</p>"

    def _build_images(self) -> None:
        """Add the search for images, and the drawings of a chosen one."""
        text = gr.Textbox(
            label="What the images show",
            placeholder=self.index.sentences[0] if self.index.sentences else EXAMPLE,
            max_lines=1,
            max_length=LONGEST_QUERY,
            submit_btn="Search",
        )
        status, shown = gr.HTML(), gr.State(None)
        gallery = gr.Gallery(
            label="Images, best first",
            show_label=False,
            columns=COLUMNS,
            height="auto",
            object_fit="contain",
            allow_preview=False,
            buttons=[],
            interactive=False,
        )
        model = gr.Radio(
            [(name, i) for i, name in enumerate(self.models) if i in self.routed],
            value=self.routed[0] if self.routed else None,
            label="Model whose route is drawn",
            visible=False,
        )
        reason = gr.HTML()
        results = [status, shown, gallery, model, reason]
        text.submit(self.find_images, text, results, api_name="images")
        why: Any = {"inputs": [shown, model], "outputs": [model, reason]}
        private: Any = {"api_visibility": "private"}
        chosen = gallery.select(self.choose, shown, shown, show_progress="hidden", **private)
        chosen.then(self.explain, **why, scroll_to_output=True, **private)
        model.input(self.explain, **why, **private)

    def _build_sentences(self) -> None:
        """Add the search for sentences."""
        size = f"at most {MOST_BYTES >> 20} MB"
        file = gr.File(label=f"Image file, {size}", type="filepath", height=120)
        status, sentences = gr.HTML(), gr.HTML()
        file.change(self.find_sentences, file, [status, sentences], api_name="sentences")

    def find_images(self, text: str | None) -> list[Any]:
        """Return status, state and gallery, and hide why an earlier image was found."""
        hidden, text = [gr.update(visible=False), None], text or ""  # a program may send null
        try:
            answer = self.index.images(text, TOP)
        except InputError as error:
            return [_problem(error), None, [], *hidden]
        images = [
            (self._copy(hit.name), f"{hit.score:.3f}  {printable(hit.name)}") for hit in answer
        ]
        shown = Shown(text, tuple(hit.row for hit in answer), 0)
        line = _sentence(f"{summary(answer)} Choose an image to see why it was found.")
        return [line, shown, gr.update(value=images, selected_index=None), *hidden]

    def choose(self, shown: Shown | None, event: gr.SelectData) -> Shown | None:
        """Return the state after an image was chosen; None if a failed search removed it."""
        return shown and replace(shown, chosen=event.index)

    def explain(self, shown: Shown | None, model: int | None) -> list[Any]:
        """Return the choice of the model, and why it found the chosen image."""
        if shown is None:
            return [gr.update(visible=False), None]
        if model is None:
            return [gr.update(visible=False), _sentence(NO_ROUTE)]
        try:
            drawings = self._draw(shown, model)
        except InputError as error:
            return [gr.update(visible=False), _problem(error)]
        return [gr.update(visible=len(self.routed) > 1), drawings]

    def find_sentences(self, path: str | None) -> list[Any]:
        """Return the status, and an uploaded image with its sentences."""
        if path is None:
            return [None, None]
        file = Path(path)
        try:
            size = file.stat().st_size
            require(size <= MOST_BYTES, f"{file}: {size} bytes; expected at most {MOST_BYTES}")
            answer = self.index.sentences_of(file, TOP)
        except InputError as error:
            return [_problem(error, file), None]
        body = image_of(file, file.name, "upload") + list_sentences(answer)
        return [_sentence(summary(answer)), body]

    def _copy(self, name: str) -> Image.Image:
        """Return a small copy of an image, or a grey one if its file cannot be read any more."""
        try:
            return thumbnail(self.index.images_folder / name)
        except InputError as error:
            log.warning("%s", error)
            return Image.new("RGB", (SIDE, SIDE), "grey")

    def _draw(self, shown: Shown, model: int) -> str:
        """Return the route of the chosen image, and where each word is seen, as HTML."""
        row, pair = shown.rows[shown.chosen], (shown.chosen, 0)
        name = self.index.names[row]
        file, title = self.index.images_folder / name, printable(f"{name}: {shown.text}")
        with self.index.lock:  # also since matplotlib is not made for threads
            pairs = self.index.pairs(shown.rows, shown.text)[model]
            gates = np.concatenate([pairs.route(i, [0]) for i in range(len(shown.rows))])
            figures = {ROUTE: draw_route(pairs, gates, pair, file, title)}
            if "CMRC" in pairs.cells:
                boxes = self.index.boxes[[row]]
                check_finite_rows(self.index.folder / "images/boxes.npy", boxes, [row])
                figures[WORDS] = draw_words(pairs, pair, file, boxes[0], title)
            drawings = [
                _sentence(about) + image_tag(png_of(figure), "png", about, "drawing")
                for about, figure in figures.items()
            ]
        return "".join(drawings)


def _sentence(text: str) -> str:
    return f'<p role="status">{escape(text)}</p>'


def _problem(error: InputError, upload: Path | None = None) -> str:
    """Return the message of an error, with an uploaded file's name instead of its path here."""
    text = str(error).replace(str(upload), upload.name) if upload else str(error)
    return f'<p role="alert" class="problem">{escape(printable(text))}</p>'


def serve(index: Index, host: str, port: int) -> None:
    """Serve the page of an index until a signal ends the program.

    Raises InputError if the address cannot be used, and Stopped after the signal.
    """
    check_address(host, port)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs each request of a client
    stopped, received = threading.Event(), []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        stopped.set()

    with tempfile.TemporaryDirectory(prefix="dime-search-") as folder, handled(stop):
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and copies of images
        page = Page(index).build()
        launch(page, host, port)
        if host not in LOOPBACK:
            log.warning("--host %s: whoever reaches this machine can see the images", host)
        print_line(f"{page.local_url}  (Ctrl-C ends it)")
        stopped.wait()
        page.close(verbose=False)
    raise Stopped(received[0])


def check_address(host: str, port: int) -> None:
    """Raise InputError if a server cannot listen at this address."""
    for name in dict.fromkeys((host.strip("[]"), "127.0.0.1")):  # Gradio tries the latter, too
        try:
            with socket.socket(socket.AF_INET6 if ":" in name else socket.AF_INET) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind((name, port))
        except OSError as error:
            problem = f"--host {host} --port {port}: {error.strerror or error}"
            raise InputError(f"{problem}; expected an own address and a free port") from error


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Start the server of a page in a thread."""
    # Hosts of fonts, statistics and tunnels are never asked, whatever the environment says.
    fonts: Any = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    page.launch(
        server_name=host,
        server_port=port,
        max_file_size=MOST_BYTES,
        theme=gr.themes.Default(**fonts),
        css=CSS,
        footer_links=[],
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
    )
