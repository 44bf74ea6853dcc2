"""check_bert.py — whether a BERT folder is what it should be, before days of training rest on it.

    python -m scripts.check_bert bert/bert-base-uncased
    python -m scripts.check_bert bert/bert-base-uncased --write bert/normalised

Tells the files, how their weights are called, the sizes, the fingerprint that checkpoints carry,
and whether the vocabulary is uncased. Three things tell a wrong BERT from a right one:

* Meaning: a sentence is closer to its partner, which says the same in other words, than to others.
  This holds word embeddings and vocabulary to each other; the layers hardly matter to it.
* Senses: a word of two senses is closer to itself in the same sense than in the other one. This
  needs the layers, and tells where they are untrained, all transposed or in quite another order.
* Weights that are as an initialisation leaves them: no bias and no LayerNorm stays so in training.

They do not see all: not positions or token types that are off by one, nor neighbouring layers that
are swapped, nor 6 or 8 heads in place of 12. --write OUT writes a new folder under one set of names
(config.json, vocab.txt, model.safetensors).

Exit status 0: nothing is wrong; 1: there are faults, and each is named; 2: it cannot be loaded.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint.bert import (
    Bert,
    assembled_bert,
    bert_files,
    bert_parameters,
    normal_name,
    read_bert,
    write_bert,
)
from checkpoint.weights import Weights
from common.cli import parse, print_line, run
from common.errors import require, summarise
from common.files import check_new_folder, check_writable, write_json
from scripts.parts.probes import PAIRS, SENSES

FAULTY = 1  # exit status
NO_GRADIENT = "attention.self.key.bias"  # moves all of a softmax alike, so may stay 0
CASED = 0.01  # share of entries with a capital letter: no uncased vocabulary has any
LONGEST = 16  # WordPieces
# Least shares of right answers; half would be chance. MiniLM-L6 has 1.00 and 0.99. Of 120 BERTs
# with random weights (32 to 384 wide, 1 to 6 layers) and its vocabulary none had more than 0.69 and
# 0.65. MiniLM with one thing wrong (as in test_check_bert.py): shuffled word embeddings 0.48 and
# 0.51, layers at random 1.00 and 0.56, query and key swapped 0.97 and 0.63, 3 heads 1.00 and 0.69.
# No other trained BERT was measured.
BOUNDS = {"meaning": 0.75, "senses": 0.85}


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
    unused = [name for name in names if normal_name(name) is None]
    if unused:
        parts.append(f"{len(unused)} unused ({summarise(unused)})")
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in weights.values()})
    return ", ".join([*parts, " and ".join(kinds)])


def capitals(bert: Bert) -> float:
    """Share of the vocabulary's entries with a capital letter; special ones do not count."""
    words = [entry for entry in bert.vocabulary.entries if not re.fullmatch(r"\[.*\]", entry)]
    return sum(word != word.lower() for word in words) / max(1, len(words))


def meaning(bert: Bert) -> float:
    """Share of comparisons in which a sentence's partner is closer than another; chance is 0.5."""
    states, mask = read(bert, [sentence for side in zip(*PAIRS, strict=True) for sentence in side])
    real = mask.float()
    real[torch.arange(len(real)), mask.sum(1) - 1] = 0  # [SEP]
    real[:, 0] = 0  # [CLS]
    means = (states * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
    # what all sentences share would drown what tells them apart
    first, second = F.normalize(means - means.mean(0), dim=-1).chunk(2)
    closeness = first @ second.T  # [P, P]
    own, others = closeness.diagonal(), ~torch.eye(len(PAIRS), dtype=torch.bool)
    right = torch.stack([own[:, None] > closeness, own > closeness])
    return right[:, others].float().mean().item()


def senses(bert: Bert) -> float:
    """Share of comparisons in which a word is closer in one sense than in two; chance is 0.5."""
    states, _ = read(bert, [sentence for four in SENSES.values() for sentence in four])
    before = [re.split(rf"\b{word}\b", s)[0] for word, four in SENSES.items() for s in four]
    places = (bert.vocabulary.lengths(before)[0] - 1).clamp(max=LONGEST - 1)  # after [CLS]
    words = states[torch.arange(len(before)), places].unflatten(0, (-1, 4))  # [W, 4, hidden]
    # without what the word says in either sense
    words = F.normalize(words - words.mean(1, keepdim=True), dim=-1)
    closeness = words @ words.mT  # [W, 4, 4]
    same = torch.stack([closeness[:, 0, 1], closeness[:, 2, 3]], 1)  # [W, 2]
    other = closeness[:, :2, 2:].flatten(1)  # [W, 4]
    return (same[:, :, None] > other[:, None]).float().mean().item()


@torch.no_grad()
def read(bert: Bert, sentences: list[str]) -> tuple[Tensor, Tensor]:
    """BERT's last states `[T, LONGEST, hidden]`, without dropout, and mask `[T, LONGEST]`."""
    ids, mask = bert.vocabulary.encode(sentences, LONGEST)
    given = {"input_ids": ids, "attention_mask": mask.long()}
    return bert.model.eval()(**given).last_hidden_state, mask


def untrained(bert: Bert) -> list[str]:
    """Weights that are all one number, as an initialisation leaves them."""
    return [
        name
        for name, value in bert.model.state_dict().items()
        if value.dim() == 1 and (value == value[0]).all() and not name.endswith(NO_GRADIENT)
    ]


def unknown_words(bert: Bert) -> int:
    """Sentences of the probes with a word that the vocabulary lacks."""
    sentences = [s for texts in (*PAIRS, *SENSES.values()) for s in texts]
    return int((bert.vocabulary.lengths(sentences)[1] > 0).sum())


def faults(bert: Bert, folder: Path, found: dict[str, Any]) -> Iterator[str]:
    """What is wrong."""
    if found["capitals"] > CASED:
        yield (
            f"{bert.vocabulary.path}: is cased, {100 * found['capitals']:.0f} % of its entries "
            "have a capital letter; expected uncased, since captions are read in lower case"
        )
    twice = [entry for entry, n in Counter(bert.vocabulary.entries).items() if n > 1]
    if twice:
        yield f"{bert.vocabulary.path}: holds {summarise(twice)} twice; expected an entry once"
    if found["untrained"]:
        yield (
            f"{folder}: {summarise(found['untrained'])} hold one number each, as where they were "
            "never filled; expected trained weights"
        )
    for probe, bound in BOUNDS.items():
        if found[probe] < bound:
            yield (
                f"{folder}: {probe}: {100 * found[probe]:.0f} % of comparisons right, chance is "
                f"50 %, expected {100 * bound:.0f} % or more; its weights are untrained, damaged, "
                "misplaced or another vocabulary's, or it does not read English "
                f"({found['unknown']} of the probes' sentences hold an unknown word)"
            )


def checked(folder: Path) -> tuple[Bert, dict[str, Any]]:
    """BERT, and all that is found of its folder, plain data. Raises InputError."""
    weights, source = read_bert(folder)
    style = key_style(weights)
    bert = assembled_bert(folder, weights, source)
    positions = bert.model.config.max_position_embeddings
    require(positions >= LONGEST, f"{folder}: reads {positions} tokens; expected {LONGEST} or more")
    config = bert.model.config
    found: dict[str, Any] = {
        "folder": str(folder),
        "files": {path.name: path.stat().st_size for path in bert_files(folder) if path.is_file()},
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
        "untrained": untrained(bert),
        "meaning": meaning(bert),
        "senses": senses(bert),
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
    }
    for probe in BOUNDS:
        lines[probe] = f"{100 * found[probe]:.0f} % of comparisons right (chance is 50 %)"
    text = "".join(f"{name}: {value}\n" for name, value in lines.items())
    faulty = "".join(f"* {fault}\n" for fault in found["faults"])
    return f"{text}faults:{' none' if not faulty else ''}\n{faulty}"


def main() -> None:
    options = parse(Options, None, __doc__)
    if options.json:
        folders = [folder for folder in (options.folder, options.write) if folder]
        taken = [path for folder in folders for path in bert_files(folder)]
        check_writable(Path(options.json), taken)
    if options.write:
        check_new_folder("--write", Path(options.write))
    bert, found = checked(Path(options.folder))
    if options.write:
        write_bert(Path(options.write), bert)
    if options.json:
        write_json(Path(options.json), found)
    print_line(said(found))
    if found["faults"]:
        sys.exit(FAULTY)


if __name__ == "__main__":
    run(main)
