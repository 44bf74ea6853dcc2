"""check_bert.py — whether a BERT folder is what it should be, before days of training rest on it.

    python -m scripts.check_bert bert/bert-base-uncased
    python -m scripts.check_bert bert/bert-base-uncased --write bert/normalised

Tells the files, how their weights are called, the sizes, the fingerprint that checkpoints carry,
and whether the vocabulary is uncased. Then BERT reads pairs of sentences that say the same without
sharing a word of weight: one that was loaded rightly finds a sentence's partner closer than other
sentences, one with wrong weights is right half the time. --write OUT writes a new folder under one
set of names (config.json, vocab.txt, model.safetensors).

Exit status 0: nothing is wrong; 1: there are faults, and each is named; 2: it cannot be loaded.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F

from bert import (
    CONFIGURATIONS,
    WEIGHTS,
    Bert,
    assembled_bert,
    bert_parameters,
    read_bert,
    write_bert,
)
from files import check_new_folder, check_writable, write_json
from options import parse, run, say, some
from weights import Weights

FAULTY = 1  # exit status
CASED = 0.01  # share of entries with a capital letter: no uncased vocabulary has any
LONGEST = 32  # WordPieces
# Right answers that are more than chance: a hundred BERTs with random weights stayed below it.
BOUND = 0.75
FILES = (*CONFIGURATIONS, *WEIGHTS, "vocab.txt")

# Each pair says the same in other words; its words of weight occur in no other sentence.
PAIRS = (
    ("a dog is running over the grass", "the puppy sprints across a lawn"),
    ("a man is cooking dinner in the kitchen", "the chef prepares a meal at the stove"),
    ("a child is sleeping in a bed", "the baby naps under a blanket"),
    ("a plane is flying above the clouds", "the jet soars through a sky"),
    ("a boat is sailing on the lake", "the ship drifts along a river"),
    ("a woman is singing on stage", "the vocalist performs a song at the concert"),
    ("the doctor examines a patient", "a physician treats the ill in a hospital"),
    ("the judge sentenced a thief to prison", "a court sent the criminal to jail"),
    ("snow covers the mountain", "a peak is white and icy in winter"),
    ("the car stopped on a road", "a vehicle parked along the street"),
    ("a pupil reads a book at school", "the student studies a novel in the classroom"),
    ("the company earned a large profit", "a firm made the most money in business"),
    ("a bird built the nest in a tree", "the sparrow lays eggs on a branch"),
    ("soldiers fought a war", "the army attacked in a battle"),
    ("a farmer harvests wheat in the field", "the crops grow on a farm of corn"),
    ("the painter finished a portrait", "an artist drew the picture on canvas"),
    ("the king ruled a country", "a monarch governed the nation"),
    ("a goalkeeper caught the ball", "the soccer player scored in a football match"),
    ("rain fell during the storm", "a thunder brought wet weather"),
    ("the priest prayed in a church", "a bishop worships at the cathedral"),
    ("a computer runs the program", "the software was installed on a laptop"),
    ("the couple married in june", "a bride kissed the groom at the wedding"),
    ("a guitar lies beside the piano", "the violin is a musical instrument"),
    ("the planet orbits a star", "a moon circles the earth in space"),
)


@dataclass(frozen=True)
class Options:
    folder: Annotated[str, "folder with configuration, vocabulary and weights of BERT", "DIR"]
    write: Annotated[str | None, "write a folder under one set of names here"] = None
    json: Annotated[str | None, "write all that was found here"] = None


def key_style(weights: Weights) -> str:
    """How a file calls its weights."""
    names = list(weights)
    bare = sum(name.startswith("bert.") for name in names)
    parts = ["prefix 'bert.'" if bare else "no prefix"]
    old = any(re.search(r"LayerNorm\.(gamma|beta)$", name) for name in names)
    parts.append(f"LayerNorm.{'gamma, beta' if old else 'weight, bias'}")
    unused = [n for n in names if re.search(r"^(bert\.)?(cls|pooler)\.|position_ids$", n)]
    if unused:
        parts.append(f"{len(unused)} unused ({some(unused)})")
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in weights.values()})
    return ", ".join([*parts, " and ".join(kinds)])


def capitals(bert: Bert) -> float:
    """Share of the vocabulary's entries with a capital letter; special ones do not count."""
    words = [entry for entry in bert.vocabulary.entries if not re.fullmatch(r"\[.*\]", entry)]
    return sum(word != word.lower() for word in words) / max(1, len(words))


@torch.no_grad()
def probe(bert: Bert) -> float:
    """Share of comparisons in which a sentence's partner is closer than another; chance is 0.5."""
    sentences = [sentence for side in zip(*PAIRS, strict=True) for sentence in side]
    ids, mask = bert.vocabulary.encode(sentences, LONGEST)
    states = bert.model.eval()(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    real = mask.float()
    real[torch.arange(len(real)), mask.sum(1) - 1] = 0  # [SEP]
    real[:, 0] = 0  # [CLS]
    means = (states * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
    # what all sentences share would drown what tells them apart
    first, second = F.normalize(means - means.mean(0), dim=-1).chunk(2)
    closeness = (first @ second.T).numpy()  # [P, P]
    own = closeness.diagonal()
    others = ~np.eye(len(own), dtype=bool)
    right = [(own[:, None] > closeness)[others], (own > closeness)[others]]
    return float(np.mean(right))


def unknown_words(bert: Bert) -> int:
    """Sentences of the probe with a word that the vocabulary lacks."""
    return int((bert.vocabulary.lengths([s for pair in PAIRS for s in pair])[1] > 0).sum())


def faults(bert: Bert, folder: Path, found: dict[str, Any]) -> Iterator[str]:
    """What is wrong."""
    if found["capitals"] > CASED:
        yield (
            f"{bert.vocabulary.path}: is cased, {100 * found['capitals']:.0f} % of its entries "
            "have a capital letter; expected uncased, since captions are read in lower case"
        )
    if found["probe"] < BOUND:
        missing = found["unknown"]
        yield (
            f"{folder}: no better than chance at telling sentences of like meaning: "
            f"{100 * found['probe']:.0f} % right, chance is 50 %, expected {100 * BOUND:.0f} % or "
            "more; its weights are untrained, damaged or another vocabulary's, or it does not read "
            f"English ({missing} of the {2 * len(PAIRS)} sentences hold an unknown word)"
        )


def checked(folder: Path) -> tuple[Bert, dict[str, Any]]:
    """BERT, and all that is found of its folder, plain data. Raises InputError."""
    weights, source = read_bert(folder)
    style = key_style(weights)
    bert = assembled_bert(folder, weights, source)
    config = bert.model.config
    found: dict[str, Any] = {
        "folder": str(folder),
        "files": {n: (folder / n).stat().st_size for n in FILES if (folder / n).is_file()},
        "weights": source.name,
        "keys": style,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "vocabulary": config.vocab_size,
        "positions": config.max_position_embeddings,
        "parameters": bert_parameters(config),
        "fingerprint": bert.fingerprint,
        "capitals": capitals(bert),
        "unknown": unknown_words(bert),
        "probe": probe(bert),
    }
    return bert, found | {"faults": list(faults(bert, folder, found))}


def said(found: dict[str, Any]) -> str:
    """The report as text."""
    files = ", ".join(f"{name} ({size:,} bytes)" for name, size in found["files"].items())
    sizes = f"{found['layers']} layers, {found['hidden']} wide, {found['heads']} heads"
    more = f"{found['vocabulary']:,} entries, {found['positions']} positions"
    case = "cased" if found["capitals"] > CASED else "uncased"
    lines = {
        "files": f"{files}; weights are read from {found['weights']}",
        "keys": found["keys"],
        "sizes": f"{sizes}, {more}, {found['parameters'] / 1e6:.1f} million weights",
        "fingerprint": found["fingerprint"],
        "vocabulary": f"{case}, {100 * found['capitals']:.1f} % of entries with a capital letter",
        "meaning": f"{100 * found['probe']:.0f} % of comparisons right (chance is 50 %)",
    }
    text = "".join(f"{name}: {value}\n" for name, value in lines.items())
    faulty = "".join(f"* {fault}\n" for fault in found["faults"])
    return f"{text}faults:{' none' if not faulty else ''}\n{faulty}"


def main() -> None:
    options = parse(Options, None, __doc__)
    if options.json:
        check_writable(Path(options.json))
    if options.write:
        check_new_folder("--write", Path(options.write))
    bert, found = checked(Path(options.folder))
    if options.write:
        write_bert(Path(options.write), bert)
    if options.json:
        write_json(Path(options.json), found)
    say(said(found))
    if found["faults"]:
        sys.exit(FAULTY)


if __name__ == "__main__":
    run(main)
