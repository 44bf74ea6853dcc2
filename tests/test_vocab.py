"""vocab.py against the golden tokens, and an oracle written from SPEC §1."""

import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN

from common.errors import InputError
from vocab import Vocabulary


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("bert")
    shutil.copy(GOLDEN / "bert-base-uncased-vocab.txt", folder / "vocab.txt")
    return Vocabulary.load(folder)


def test_golden_tokens(vocabulary: Vocabulary) -> None:
    golden = json.loads((GOLDEN / "tokenization.json").read_text())
    ids, mask = vocabulary.encode(golden["captions"], golden["max_words"])
    assert ids.tolist() == golden["input_ids"]
    assert mask.long().tolist() == golden["attention_mask"]
    for row, real, tokens in zip(ids, mask, golden["tokens"], strict=True):
        assert [vocabulary.entries[i] for i in row[real]] == tokens


def is_punctuation(c: str) -> bool:
    marks = r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~"""
    return c in marks or unicodedata.category(c).startswith("P")


def pieces(entries: set[str], word: str) -> list[str]:
    """Greedy longest match."""
    matched, first = [], 0
    while first < len(word):
        for stop in range(len(word), first, -1):
            piece = ("##" if first else "") + word[first:stop]
            if piece in entries:
                matched.append(piece)
                first = stop
                break
        else:
            return ["[UNK]"]
    return matched if len(word) <= 100 else ["[UNK]"]


def tokens_by_spec(entries: set[str], caption: str) -> list[str]:
    clean = []
    for c in caption:
        if c in "\t\n" or unicodedata.category(c) == "Zs":
            clean.append(" ")
        elif c not in "\0\ufffd" and not unicodedata.category(c).startswith("C"):
            clean.append(c)
    words = []
    for chunk in "".join(clean).split():
        plain = unicodedata.normalize("NFD", chunk.lower())
        word = ""
        for c in plain:
            if unicodedata.category(c) == "Mn":
                continue
            if is_punctuation(c):
                words += [word, c]
                word = ""
            else:
                word += c
        words.append(word)
    return [piece for word in words if word for piece in pieces(entries, word)]


def test_tokens_equal_an_oracle_from_the_spec(vocabulary: Vocabulary) -> None:
    rng = random.Random(0)
    alphabet = (
        "abcdeinorst THE Dog's 2nd,.-!?()[]#$%&@_/\\\"'`~^ \t\r\n\v\f\x00\x07\x85\xa0\xad"
        "éÉñüßøÅİıσςΣΣΩЖжшאבلا漢字カが한국ﬁ½²№€£°•…—–“”‘’\u200b\u200d\u2028\u2029\u3000\ufeff\ufffd😀🐶"
    )
    entries = set(vocabulary.entries)
    captions = ["".join(rng.choices(alphabet, k=rng.randint(0, 24))) for _ in range(3000)]
    captions += ["ΟΔΟΣ", "ΑΣ\x07Α ΑΣ\ufffdΑ ΑΣ\rΑ Α\x07Σ"]
    captions += ["a\rb", "x" * 100, "x" * 101, "[CLS] [SEP] [MASK] [PAD] [UNK]"]
    ids, mask = vocabulary.encode(captions, 128)
    for caption, row, real in zip(captions, ids, mask, strict=True):
        expected = ["[CLS]", *tokens_by_spec(entries, caption), "[SEP]"]
        assert [vocabulary.entries[i] for i in row[real]] == expected, ascii(caption)


def test_long_caption_is_cut_and_short_one_padded() -> None:
    vocabulary = Vocabulary.load(GOLDEN / "i2t/bert")
    ids, mask = vocabulary.encode(["a man " * 9, "", "dog"], 7)
    cls, sep = vocabulary.entries.index("[CLS]"), vocabulary.entries.index("[SEP]")
    assert ids.shape == mask.shape == (3, 7)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [7, 2, 3]
    assert ids[0, 0] == cls and ids[0, 6] == sep
    assert ids[1].tolist() == [cls, sep, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "not found"),
        (b"[PAD]\n\xff\n", "line 2 is not UTF-8"),
        (b"[PAD]\n[UNK]\n[CLS]\na\n", "[SEP]"),
        (b"a\n[PAD]\n[UNK]\n[CLS]\n[SEP]\n", "[PAD] has id 1"),
    ],
)
def test_bad_vocabularies(tmp_path: Path, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"vocab\.txt") as error:
        Vocabulary.load(tmp_path)
    assert expected in str(error.value)
