"""search_html.py — an answer as one HTML file, which needs no server, network or JavaScript.

The images are small copies inside the file, as data: URIs. Names and sentences are strangers' text:
all of it is escaped, and the page's policy forbids scripts and requests.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import InputError, printable
from common.files import check_writable, write_text
from scripts.parts.figures import thumbnail

if TYPE_CHECKING:
    from scripts.parts.search_index import Answer, Hit, Index

QUALITY = 80  # of JPEG, 1 to 95; a thumbnail has about 15 KB
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{query}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto;
        padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin-bottom: .25rem; overflow-wrap: anywhere; }}
p {{ margin: .25rem 0 1rem; }}
small, p, figcaption {{ color: GrayText; }}
ol {{ padding: 0; list-style: none; }}
ol.images {{ display: grid; gap: 1.25rem;
             grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }}
figure {{ margin: 0; }}
img {{ display: block; width: 100%; height: 13rem; object-fit: contain; border-radius: .5rem;
       background: #8882; }}
img.query {{ width: auto; max-width: 100%; margin-bottom: 1rem; }}
figcaption {{ padding-top: .35rem; font-size: .875rem; overflow-wrap: anywhere; }}
b {{ color: CanvasText; font-variant-numeric: tabular-nums; margin-right: .5rem; }}
figcaption b {{ display: block; }}
ol.sentences li {{ padding: .5rem 0; border-top: 1px solid #8884; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{query}</h1>
<p>{summary}</p>
{body}
</body>
</html>
"""


def write_page(path: Path, index: Index, answer: Answer, image: Path | None = None) -> None:
    """Write an answer as an HTML page; `image` is the query, if the answer is of sentences.

    Raises InputError if `path` cannot be written or is one of the images.
    """
    if image is None:
        files = [index.images_folder / hit.name for hit in answer]
        body = _list_images(answer, files)
    else:
        files = [image]
        body = image_of(image, answer.query, "query") + list_sentences(answer)
    check_writable(path, files)
    query, line = escape(printable(answer.query)), escape(summary(answer))
    write_text(path, PAGE.format(query=query, summary=line, body=body))


def summary(answer: Answer) -> str:
    """Return a line about an answer: how much was searched, and the seconds of its parts."""
    parts = ", ".join(f"{name.replace('_', ' ')} {s:.2f} s" for name, s in answer.seconds.items())
    scored = f"the models scored {answer.candidates} of {answer.total}"
    return f"The best {len(answer)}; {scored} ({parts})."


def list_sentences(answer: Answer) -> str:
    """Return the sentences of an answer with their scores, as HTML."""
    items = [f"<li>{_score(hit)}</li>" for hit in answer]
    return "\n".join(['<ol class="sentences">', *items, "</ol>"])


def _list_images(answer: Answer, files: Sequence[Path]) -> str:
    items = [
        f"<li><figure>{image_of(file, hit.name, 'hit')}"
        f"<figcaption>{_score(hit)}</figcaption></figure></li>"
        for hit, file in zip(answer, files, strict=True)
    ]
    return "\n".join(['<ol class="images">', *items, "</ol>"])


def _score(hit: Hit) -> str:
    return f"<b>{hit.score:.3f}</b>{escape(printable(hit.name))}"


def image_of(file: Path, name: str, kind: str) -> str:
    """Return an image file as HTML, or the reason if it cannot be read any more."""
    try:
        image = thumbnail(file)
    except InputError as error:
        return f"<p>{escape(printable(str(error)))}</p>"
    data = io.BytesIO()
    image.save(data, "JPEG", quality=QUALITY)
    return image_tag(data.getvalue(), "jpeg", name, kind)


def image_tag(data: bytes, form: str, name: str, kind: str) -> str:
    """Return an image inside the page: its bytes and format, its name and its class."""
    coded = base64.b64encode(data).decode()
    text = escape(printable(name))
    return f'<img class="{kind}" alt="{text}" src="data:image/{form};base64,{coded}">'
