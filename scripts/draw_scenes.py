"""draw_scenes.py — a small picture set to try the programs on: coloured shapes, five captions each.

    python -m scripts.draw_scenes --out runs/demo/scenes
    python -m scripts.draw_scenes --out scenes --train 40 --dev 10 --test 20 --seed 1

Writes OUT/images/*.png and OUT/dataset_scenes.json, in the layout of Karpathy's files, for
`python -m scripts.prepare_captions`. A scene has two or three shapes of different colours on a
white, grey or black ground. Captions come from a small grammar; all of them name every shape, none
is given to two pictures. The same seed and the same Pillow give the same files.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, pi, sin
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image, ImageDraw

from common.cli import parse, progress, run
from common.errors import InputError, check_range
from common.files import explain_os_errors, write_bytes, write_json

SIDE = 260  # pixels, what EfficientNet-Lite2 takes
FINE = 3  # drawn so many times larger, so that edges are smooth
CELLS, CELL = 3, SIDE // 3  # a shape has one of 3 x 3 cells for itself
JITTER = 7  # pixels that a shape may lie off its cell's middle
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
CAPTIONS, TRIES = 5, 1000
MOST = 20_000  # pictures; many more cannot be told apart by their captions


@dataclass(frozen=True)
class Options:
    out: Annotated[str, "folder to write to"]
    train: Annotated[int, "pictures to train on"] = 800
    dev: Annotated[int, "pictures to choose the best model by"] = 100
    test: Annotated[int, "pictures to test on"] = 100
    seed: Annotated[int, "seed of all that is drawn"] = 0

    def __post_init__(self) -> None:
        check_range(self, ("train", "dev", "test"), 1, MOST)
        check_range(self, ("seed",), 0, 2**63 - 1)


@dataclass(frozen=True)
class Thing:
    """A shape of a scene, and the cell that it lies in."""

    shape: str
    colour: str
    size: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """Two or three things on a ground."""

    ground: str
    things: tuple[Thing, ...]


def one(rng: np.random.Generator, of: Any) -> Any:
    """One of several, each as likely as the next."""
    of = tuple(of)
    return of[rng.integers(len(of))]


def new_scene(rng: np.random.Generator) -> Scene:
    """A scene at random; its things differ in colour and in cell."""
    count = int(rng.integers(2, 4))
    colours = rng.permutation(list(COLOURS))[:count]
    cells = rng.permutation(CELLS * CELLS)[:count]
    things = tuple(
        Thing(one(rng, SHAPES), str(colour), one(rng, SIZES), *divmod(int(cell), CELLS))
        for colour, cell in zip(colours, cells, strict=True)
    )
    return Scene(one(rng, GROUNDS), things)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence of the grammar that names every thing of a scene."""
    a, b, *others = (scene.things[i] for i in rng.permutation(len(scene.things)))
    relation = where(a, b, rng)
    text = one(rng, ("{a} {r} {b}", "{a} is {r} {b}", "there is {a} {r} {b}", "{b} and {a} {r} it"))
    text = text.format(a=named(a, rng), b=named(b, rng), r=relation)
    for c in others:
        text += one(rng, (" and {c}", ", and {c} {r} the {b}", ", with {c} {r} the {b}")).format(
            c=named(c, rng), r=where(c, b, rng), b=f"{b.colour} one"
        )
    return text + one(rng, ("", " on {g}", " on {g}")).format(g=scene.ground)


def named(thing: Thing, rng: np.random.Generator) -> str:
    """A thing with its article; its size is told sometimes."""
    words = (one(rng, SYNONYMS[thing.size]), thing.colour, said(thing.shape, rng))
    text = " ".join(word for word in words if word)
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def where(a: Thing, b: Thing, rng: np.random.Generator) -> str:
    """Where `a` lies, seen from `b`."""
    ways = []
    if a.column != b.column:
        ways.append("left" if a.column < b.column else "right")
    if a.row != b.row:
        ways.append("above" if a.row < b.row else "below")
    return said(one(rng, ways), rng)


def said(word: str, rng: np.random.Generator) -> str:
    """A word, or another one for the same."""
    return one(rng, SYNONYMS.get(word, (word,)))


def five_captions(scene: Scene, rng: np.random.Generator, taken: set[str]) -> list[str] | None:
    """Five different captions, or None where one of them is another picture's already."""
    found: dict[str, None] = {}
    while len(found) < CAPTIONS:
        found[caption(scene, rng)] = None
    return None if taken & found.keys() else list(found)


def draw(scene: Scene, rng: np.random.Generator) -> "Image.Image":
    """The picture of a scene, SIDE pixels wide and high."""
    picture = Image.new("RGB", (SIDE * FINE, SIDE * FINE), GROUNDS[scene.ground])
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        x, y = (
            FINE * (CELL * place + CELL // 2 + int(rng.integers(-JITTER, JITTER + 1)))
            for place in (thing.column, thing.row)
        )
        _draw_thing(pen, thing, x, y)
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


def _draw_thing(pen: "ImageDraw.ImageDraw", thing: Thing, x: int, y: int) -> None:
    size, colour = FINE * SIZES[thing.size], COLOURS[thing.colour]
    around = (x - size, y - size, x + size, y + size)
    if thing.shape == "circle":
        pen.ellipse(around, fill=colour)
    elif thing.shape == "ring":
        pen.ellipse(around, outline=colour, width=size // 3)
    elif thing.shape == "cross":
        arm = size // 3
        pen.rectangle((x - size, y - arm, x + size, y + arm), fill=colour)
        pen.rectangle((x - arm, y - size, x + arm, y + size), fill=colour)
    else:
        pen.polygon(list(corners(thing.shape, x, y, size)), fill=colour)


def corners(shape: str, x: int, y: int, size: int) -> Iterator[tuple[float, float]]:
    """Corners of a square, a triangle or a five-pointed star around a point."""
    count, turn = {"square": (4, pi / 4), "triangle": (3, 0), "star": (10, 0)}[shape]
    for k in range(count):
        far = size * (0.42 if shape == "star" and k % 2 else 1)
        yield x + far * sin(turn + 2 * pi * k / count), y - far * cos(turn + 2 * pi * k / count)


def entry(number: int, split: str, sentences: list[str]) -> dict[str, Any]:
    """A picture in Karpathy's JSON."""
    ids = range(CAPTIONS * number, CAPTIONS * (number + 1))
    return {
        "filename": f"scene_{number:05d}.png",
        "imgid": number,
        "split": split,
        "sentids": list(ids),
        "sentences": [
            {
                "raw": f"{text[0].upper()}{text[1:]}.",
                "tokens": text.replace(",", "").split(),
                "imgid": number,
                "sentid": sentid,
            }
            for sentid, text in zip(ids, sentences, strict=True)
        ],
    }


def write_picture(path: Path, picture: "Image.Image") -> None:
    """Write a PNG file, whole or not at all."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    write_bytes(path, data.getbuffer())


def scenes(count: int, rng: np.random.Generator) -> Iterator[tuple[Scene, list[str]]]:
    """Scenes with their captions, which no two share. Raises InputError where they run out."""
    taken: set[str] = set()
    for _ in range(count):
        for _ in range(TRIES):
            scene = new_scene(rng)
            sentences = five_captions(scene, rng, taken)
            if sentences:
                break
        else:
            raise InputError(f"{count} pictures: no new captions after {len(taken) // CAPTIONS}")
        taken.update(sentences)
        yield scene, sentences


def main() -> None:
    chosen = parse(Options, None, __doc__)
    out = Path(chosen.out)
    with explain_os_errors(out, "a folder to write to"):
        (out / "images").mkdir(parents=True, exist_ok=True)
    splits = [name for name in ("train", "val", "test") for _ in range(counts(chosen)[name])]
    # pictures and sentences have their own numbers: a change of the drawing keeps the captions
    words, places = (np.random.default_rng((chosen.seed, part)) for part in range(2))
    entries = []
    with progress("drawing", len(splits), "picture") as bar:
        for number, (scene, sentences) in enumerate(scenes(len(splits), words)):
            entries.append(entry(number, splits[number], sentences))
            write_picture(out / "images" / entries[-1]["filename"], draw(scene, places))
            bar.update()
    write_json(out / "dataset_scenes.json", {"dataset": "scenes", "images": entries})


def counts(chosen: Options) -> dict[str, int]:
    """Pictures by the name of a split in Karpathy's files."""
    return {"train": chosen.train, "val": chosen.dev, "test": chosen.test}


if __name__ == "__main__":
    run(main)
