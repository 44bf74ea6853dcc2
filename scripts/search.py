"""search.py — search one's own images with a sentence, and sentences with an image.

    python -m scripts.search index --model_path I2T T2I --images photos --out index
    python -m scripts.search index ... --first_stage ENCODERS --captions sentences.txt
    python -m scripts.search query --index index "two dogs on a beach"
    python -m scripts.search query --index index --image dog.jpg --json answer.json
    python -m scripts.search serve --index index           # a page at http://127.0.0.1:7860
    python -m scripts.search index --help                  # the options of `index`

`index` encodes a folder of images; the same command resumes it. The models score the best
`--rerank` images of the first stage, an encoders-alone model; without one they score all.
In Python, `Index` and `Matcher` of this module are the same.
"""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

from common.cli import parse, print_line, run
from common.errors import printable, require
from common.files import check_writable, write_json
from scripts.parts.search_options import IndexOptions, QueryOptions, ServeOptions

if TYPE_CHECKING:
    from scripts.parts.search_index import Answer

VERBS = ("index", "query", "serve")


def __getattr__(name: str) -> Any:
    """Import `Index` or `Matcher`, and with it torch, when it is asked for."""
    if name == "Index":
        from scripts.parts.search_index import Index

        return Index
    if name == "Matcher":
        from checkpoint.matcher import Matcher

        return Matcher
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def query(options: QueryOptions) -> None:
    """Print the answer to a query and write its files. Raises InputError."""
    outputs = [Path(path) for path in (options.json, options.html) if path is not None]
    for path in outputs:
        check_writable(path, [other for other in outputs if other is not path])
    from scripts.parts.search_index import Index

    index = Index.open(options.index, options.device, options.bert_path, options.model_path or ())
    sizes = options.top, options.rerank
    if options.text is not None:
        answer = index.images(options.text, *sizes)
    else:
        answer = index.sentences_of(Path(str(options.image)), *sizes)
    print_line(describe(answer))
    if options.json is not None:
        write_json(Path(options.json), answer.to_json())
    if options.html is not None:
        from scripts.parts.search_html import write_page

        image = None if options.image is None else Path(options.image)
        write_page(Path(options.html), index, answer, image)


def describe(answer: "Answer") -> str:
    """Return an answer as lines: score and name of each hit, and the time it took."""
    lines = []
    for rank, hit in enumerate(answer, 1):
        note = "" if rank <= answer.candidates else "  (first stage alone)"
        lines.append(f"{rank:3}  {hit.score:7.4f}  {printable(hit.name)}{note}")
    seconds = ", ".join(f"{part} {time:.3f} s" for part, time in answer.seconds.items())
    return "\n".join([*lines, f"scored {answer.candidates} of {answer.total}: {seconds}"])


def serve(options: ServeOptions) -> None:
    """Serve the page of an index until a signal ends the program."""
    from scripts.parts.search_index import Index
    from scripts.parts.search_page import serve

    index = Index.open(options.index, options.device, options.bert_path, options.model_path or ())
    serve(index, options.host, options.port)


def main() -> None:
    verb, *rest = sys.argv[1:] or ["--help"]
    program = f"search.py {verb}"
    if verb == "index":
        options = parse(IndexOptions, rest, __doc__, program)
        from scripts.parts.search_build import build

        resuming = [each for each in sys.argv[1:] if each != "--overwrite"]  # it begins again
        build(options, shlex.join(["python", "-m", "scripts.search", *resuming]))
    elif verb == "query":
        query(parse(QueryOptions, rest, __doc__, program))
    elif verb == "serve":
        serve(parse(ServeOptions, rest, __doc__, program))
    else:
        require(verb in ("-h", "--help"), f"{verb}: expected {', '.join(VERBS)} (see --help)")
        print_line(__doc__)


if __name__ == "__main__":
    run(main)
