"""draw_scenes.py — a small data set to try the programs on: coloured shapes, five captions each.

    python -m scripts.draw_scenes --out runs/demo/scenes
    python -m scripts.draw_scenes --out scenes --train 40 --dev 10 --test 20

Writes OUT/images/*.png and OUT/dataset_scenes.json, in the layout of Karpathy's files, for
`python -m scripts.prepare_captions`. A scene has two or three shapes of different colours on a
white, grey or black ground. Captions come from a small grammar; each names every shape, and no two
images share one. The same version of Pillow gives the same files.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi, sin
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any folder

from common.cli import parse, run
from common.errors import check_range
from common.files import explain_os_errors, write_json

SIDE = 260  # pixels, what EfficientNet-Lite2 takes
SCALE = 3  # scenes are drawn larger and shrunk, so that edges are smooth
CELLS, CELL = 3, SIDE // 3  # each shape has one of 3 x 3 cells to itself
JITTER = 7  # largest distance of a shape from its cell's middle, in pixels
SIZES = {"big": 36, "small": 20}  # pixels from a shape's middle to its rim
COLOURS = {
    "red": (214, 30, 36),
    "orange": (245, 136, 20),
    "yellow": (247, 222, 40),
    "green": (34, 145, 58),
    "blue": (33, 76, 205),
    "purple": (124, 44, 158),
    "pink": (245, 140, 190),
    "brown": (118, 70, 32),
    "turquoise": (44, 200, 200),
}
GROUNDS = {"white": (246, 246, 244), "grey": (150, 150, 150), "black": (16, 16, 18)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SYNONYMS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "cross": ("cross", "plus"),
    "big": ("big", "large", ""),
    "small": ("small", "little", ""),
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
SENTENCES = ("{a} {r} {b}", "{a} is {r} {b}", "there is {a} {r} {b}", "{b} and {a} {r} it")
CAPTIONS = 5  # of an image


@dataclass(frozen=True)
class Options:
    out: Annotated[str, "folder to write to"]
    train: Annotated[int, "images to train on"] = 800
    dev: Annotated[int, "images to select the best model with"] = 100
    test: Annotated[int, "images to test on"] = 100

    def __post_init__(self) -> None:
        check_range(self, ("train", "dev", "test"), 1)


@dataclass(frozen=True)
class Shape:
    """A shape of a scene and the cell that it is in."""

    kind: str
    colour: str
    size: str
    row: int
    column: int


def choose(rng: np.random.Generator, options: Iterable[str]) -> str:
    """Return one of `options`, all equally likely."""
    options = tuple(options)
    return options[rng.integers(len(options))]


def new_shapes(rng: np.random.Generator) -> list[Shape]:
    """Return two or three random shapes, which differ in colour and in cell."""
    count = int(rng.integers(2, 4))
    colours = rng.permutation(list(COLOURS))[:count]
    cells = rng.permutation(CELLS * CELLS)[:count]
    return [
        Shape(choose(rng, SHAPES), str(colour), choose(rng, SIZES), *divmod(int(cell), CELLS))
        for colour, cell in zip(colours, cells, strict=True)
    ]


def caption(ground: str, shapes: Sequence[Shape], rng: np.random.Generator) -> str:
    """Return a sentence of the grammar that names every shape of a scene."""
    a, b, *others = (shapes[i] for i in rng.permutation(len(shapes)))
    r = relation(a, b, rng)
    text = choose(rng, SENTENCES).format(a=describe(a, rng), b=describe(b, rng), r=r)
    for c in others:
        more = choose(rng, (" and {c}", ", and {c} {r} the {b}", ", with {c} {r} the {b}"))
        text += more.format(c=describe(c, rng), r=relation(c, b, rng), b=f"{b.colour} one")
    return text + choose(rng, ("", " on {g}", " on {g}")).format(g=ground)


def describe(shape: Shape, rng: np.random.Generator) -> str:
    """Return article, perhaps size, colour and kind of a shape."""
    words = (choose(rng, SYNONYMS[shape.size]), shape.colour, synonym(shape.kind, rng))
    text = " ".join(word for word in words if word)
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def relation(a: Shape, b: Shape, rng: np.random.Generator) -> str:
    """Return where `a` is, seen from `b`."""
    ways = []
    if a.column != b.column:
        ways.append("left" if a.column < b.column else "right")
    if a.row != b.row:
        ways.append("above" if a.row < b.row else "below")
    return synonym(choose(rng, ways), rng)


def synonym(word: str, rng: np.random.Generator) -> str:
    """Return a word or one of its synonyms."""
    return choose(rng, SYNONYMS.get(word, (word,)))


def draw(ground: str, shapes: Sequence[Shape], rng: np.random.Generator) -> Image.Image:
    """Return the image of a scene, SIDE pixels wide and high."""
    image = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), GROUNDS[ground])
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        x, y = (
            SCALE * (CELL * place + CELL // 2 + int(rng.integers(-JITTER, JITTER + 1)))
            for place in (shape.column, shape.row)
        )
        _draw_shape(pen, shape, x, y)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def _draw_shape(pen: ImageDraw.ImageDraw, shape: Shape, x: int, y: int) -> None:
    size, colour = SCALE * SIZES[shape.size], COLOURS[shape.colour]
    around = (x - size, y - size, x + size, y + size)
    if shape.kind == "circle":
        pen.ellipse(around, fill=colour)
    elif shape.kind == "ring":
        pen.ellipse(around, outline=colour, width=size // 3)
    elif shape.kind == "cross":
        arm = size // 3
        pen.rectangle((x - size, y - arm, x + size, y + arm), fill=colour)
        pen.rectangle((x - arm, y - size, x + arm, y + size), fill=colour)
    else:
        pen.polygon(list(corners(shape.kind, x, y, size)), fill=colour)


def corners(kind: str, x: int, y: int, size: int) -> Iterator[tuple[float, float]]:
    """Yield the corners of a square, a triangle or a five-pointed star around a point."""
    count, turn = {"square": (4, pi / 4), "triangle": (3, 0), "star": (10, 0)}[kind]
    for k in range(count):
        radius = size * (0.42 if kind == "star" and k % 2 else 1)
        angle = turn + 2 * pi * k / count
        yield x + radius * sin(angle), y - radius * cos(angle)


def scenes(
    count: int, rng: np.random.Generator
) -> Iterator[tuple[str, Sequence[Shape], list[str]]]:
    """Yield ground, shapes and five captions of each scene; no two scenes share a caption."""
    taken: set[str] = set()
    while len(taken) < CAPTIONS * count:
        shapes, ground = new_shapes(rng), choose(rng, GROUNDS)
        captions: dict[str, None] = {}  # different ones, in their order
        while len(captions) < CAPTIONS:
            captions[caption(ground, shapes, rng)] = None
        if taken.isdisjoint(captions):
            taken.update(captions)
            yield ground, shapes, list(captions)


def main() -> None:
    options = parse(Options, None, __doc__)
    out = Path(options.out)
    splits = ["train"] * options.train + ["val"] * options.dev + ["test"] * options.test
    # Two generators, so that a change of the drawing does not change the captions.
    words, places = (np.random.default_rng((0, part)) for part in range(2))
    entries = []
    with explain_os_errors(out, "a folder to write to"):
        (out / "images").mkdir(parents=True, exist_ok=True)
        for number, (ground, shapes, captions) in enumerate(scenes(len(splits), words)):
            name = f"scene_{number:05d}.png"
            draw(ground, shapes, places).save(out / "images" / name)
            sentences = [{"raw": f"{text[0].upper()}{text[1:]}."} for text in captions]
            about = {"filename": name, "imgid": number, "split": splits[number]}
            entries.append(about | {"sentences": sentences})
    write_json(out / "dataset_scenes.json", {"dataset": "scenes", "images": entries})


if __name__ == "__main__":
    run(main)
