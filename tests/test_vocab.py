"""vocab.py against the golden tokens, an oracle written from SPEC §1, and the library."""

import json
import pickle
import random
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from tokenizers import BertWordPieceTokenizer
from transformers import BertTokenizerFast

from common.errors import InputError
from vocab import EncodedCaptions, Vocabulary


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


def test_captions_encoded_once_equal_captions_encoded_anew(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vocab.CHUNK", 3)
    captions = ["a man", "", "two dogs run " * 9, "a", "white", "the black cat", "a boy in red"]
    encoded = pickle.loads(pickle.dumps(EncodedCaptions.of(captions, vocabulary, 8)))
    chosen = np.array([6, 2, 2, 1, 0])
    expected = vocabulary.encode([captions[t] for t in chosen], 8)
    for values, wanted in zip(encoded[chosen], expected, strict=True):
        assert torch.equal(values, wanted) and values.dtype == wanted.dtype


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


# Folders as other programs leave them (docs/data.md)

FLAGS, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LETTERS = [chr(i) for i in (*range(65, 91), *range(97, 123))]
WORDS = [
    *("a", "man", "dog", "Man", "Dog", "running", "Müller", "müller", "muller", "Über", "uber"),
    *("café", "cafe", "ΟΔΟΣ", "οδος", "οδοσ", "οδός", "漢字", "漢", "字", "##字", "犬", "##犬"),
    *("개가", "##가", "개", "Iced", "i̇", "ı", "straße", "STRASSE", "ﬁ", "½", "привет", "Привет"),
    *(",", ".", "-", "##s", "##ing"),
]
# "a" is there twice, as words are in some published vocabularies: the last one counts.
ENTRIES = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
CAPTIONS = [
    *("Man running with the Dog .", "a man-dog, MÜLLER Müller Mu\u0308ller", "Café ÜBER café Über"),
    *(
        "漢字 a犬b 犬",
        "日本語のText",
        "개가 달린다 개 가",
        "ΟΔΟΣ οδός ΟΔΟΣ.",
        "привет Привет ПРИВЕТ",
    ),
    *("straße STRASSE", "a\rb\x07c\x00\ufffd\u200b", "İ ı Iced", "ﬁ ½ ①", ""),
    "x" * 100 + " " + "x" * 101,
]


VOCAB = {entry: i for i, entry in enumerate(SPECIAL)}
MODEL = {"vocab": VOCAB}


def put(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("\n".join(ENTRIES))
    return tmp_path


def normalizer(lower: bool, chinese: bool, accents: bool | None) -> dict[str, Any]:
    flags = {"lowercase": lower, "handle_chinese_chars": chinese, "strip_accents": accents}
    return {"type": "BertNormalizer", "clean_text": True} | flags


@pytest.mark.parametrize("accents", [None, False, True])
@pytest.mark.parametrize("chinese", [False, True])
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("source", [FLAGS, TOKENIZER])
def test_ids_are_those_of_the_tokenizers_library(
    folder: Path, source: str, lower: bool, chinese: bool, accents: bool | None
) -> None:
    rules = {"handle_chinese_chars": chinese, "strip_accents": accents, "lowercase": lower}
    library = BertWordPieceTokenizer(str(folder / "vocab.txt"), **rules)
    flags = {"do_lower_case": lower, "tokenize_chinese_chars": chinese, "strip_accents": accents}
    if source == FLAGS:
        put(folder / FLAGS, flags)
    else:
        (folder / "vocab.txt").unlink()
        library.save(str(folder / TOKENIZER))
    ids, mask = Vocabulary.load(folder).encode(CAPTIONS, 128)
    for caption, row, real in zip(CAPTIONS, ids, mask, strict=True):
        assert row[real].tolist() == library.encode(caption).ids, ascii(caption)


@pytest.mark.parametrize("lower", [False, True])
def test_a_folder_that_transformers_saved(folder: Path, lower: bool) -> None:
    entries = list(dict.fromkeys([*ENTRIES, "[MASK]"]))
    (folder / "vocab.txt").write_text("\n".join(entries))
    library = BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=lower)
    library.add_tokens(["skate"])
    library.add_special_tokens({"additional_special_tokens": ["[NEW]"]})
    library.add_tokens(["board"])
    library.add_special_tokens({"additional_special_tokens": ["[MORE]"]})  # may have no embedding
    library.save_pretrained(folder / "saved")
    vocabulary = Vocabulary.load(folder / "saved")
    assert vocabulary.path.name == TOKENIZER
    assert vocabulary.entries == (*entries, "skate", "", "board")
    captions = [*CAPTIONS, "a man, skate board."]
    ids, mask = vocabulary.encode(captions, 128)
    for caption, row, real in zip(captions, ids, mask, strict=True):
        assert row[real].tolist() == library(caption)["input_ids"], ascii(caption)


def tokens(vocabulary: Vocabulary, caption: str) -> str:
    ids, mask = vocabulary.encode([caption], 32)
    return " ".join(vocabulary.entries[i] for i in ids[0][mask[0]][1:-1])


@pytest.mark.parametrize(
    ("flags", "read"),
    [
        (None, "muller a ##犬 ##b οδος a ##b"),
        ({"model_max_length": 512}, "muller a ##犬 ##b οδος a ##b"),
        ({"do_lower_case": True}, "muller a 犬 b οδοσ a b"),
        ({"do_lower_case": True, "strip_accents": False}, "müller a 犬 b οδοσ a b"),
        ({"do_lower_case": False}, "Müller a 犬 b ΟΔΟΣ a b"),
        (
            {"do_lower_case": False, "tokenize_chinese_chars": False},
            "Müller a ##犬 ##b ΟΔΟΣ a b",
        ),
    ],
)
def test_the_folder_says_how_captions_are_read(folder: Path, flags: Any, read: str) -> None:
    if flags is not None:
        put(folder / FLAGS, flags)
    vocabulary = Vocabulary.load(folder)
    assert tokens(vocabulary, "Müller a犬b ΟΔΟΣ a\rb") == read
    for _ in range(2):  # pickled without its tokeniser, then with it
        other = pickle.loads(pickle.dumps(vocabulary))
        assert other.encode(CAPTIONS, 20)[0].equal(vocabulary.encode(CAPTIONS, 20)[0])


def test_the_flags_win_over_the_normalizer(folder: Path) -> None:
    put(folder / TOKENIZER, {"model": MODEL, "normalizer": normalizer(False, False, None)})
    assert tokens(Vocabulary.load(folder), "Müller 犬犬") == "Müller 犬 ##犬"
    put(folder / FLAGS, {"do_lower_case": True, "tokenizer_class": "BertTokenizer"})
    assert tokens(Vocabulary.load(folder), "Müller 犬犬") == "muller 犬 犬"


@pytest.mark.parametrize(
    ("name", "content", "fact"),
    [
        (FLAGS, {"do_lower_case": 1}, "do_lower_case is 1"),
        (FLAGS, {"strip_accents": "no"}, "strip_accents is 'no'"),
        (FLAGS, {"tokenize_chinese_chars": None}, "tokenize_chinese_chars is None"),
        (FLAGS, [], "JSON object"),
        (FLAGS, {"tokenizer_class": "BertJapaneseTokenizer"}, "'BertJapaneseTokenizer'"),
        (FLAGS, {"do_lower_case": True, "tokenizer_class": ["Roberta"]}, "tokenizer_class is list"),
        (TOKENIZER, {"normalizer": {"type": "Lowercase"}}, "normalizer is 'Lowercase'"),
        (TOKENIZER, {"normalizer": None}, "normalizer is None"),
        (TOKENIZER, {"normalizer": normalizer(3, True, None)}, "do_lower_case is 3"),  # type: ignore[arg-type]
    ],
)
def test_other_tokenisers_are_refused(folder: Path, name: str, content: Any, fact: str) -> None:
    put(folder / name, content if name == FLAGS else {"model": MODEL} | content)
    with pytest.raises(InputError, match=name) as error:
        Vocabulary.load(folder)
    assert fact in str(error.value)


@pytest.mark.parametrize(
    ("model", "more", "fact"),
    [
        (None, {}, "model.vocab"),
        ({"type": "BPE", "vocab": VOCAB}, {}, "model.type is 'BPE'"),
        ({"continuing_subword_prefix": "@@", "vocab": VOCAB}, {}, "'@@'"),
        (MODEL, {"pre_tokenizer": {"type": "Whitespace"}}, "'Whitespace'"),
        (MODEL, {"added_tokens": [{"id": 4}]}, "added_tokens"),
        (MODEL, {"added_tokens": [{"content": "a", "id": 3}]}, "id 3"),
        ({"type": "WordPiece", "vocab": [["[PAD]", 0.0]]}, {}, "model.vocab"),
        ({"vocab": VOCAB | {"a": 2**20}}, {}, "'a' has id 1048576"),
        ({"vocab": VOCAB | {"a": 3}}, {}, "'a' has id 3"),
        ({"vocab": VOCAB | {"a": -1}}, {}, "-1"),
        ({"vocab": VOCAB | {"a": True}}, {}, "True"),
        ({"vocab": VOCAB | {"a": 4.0}}, {}, "4.0"),
        ({"vocab": VOCAB | {"a\nb": 4}}, {}, r"'a\nb'"),
        ({"vocab": VOCAB | {"a\ud800": 4}}, {}, r"'a\ud800'"),
        ({"vocab": {"[CLS]": 0, "[UNK]": 1, "[PAD]": 2, "[SEP]": 3}}, {}, "[PAD] has id 2"),
        ({"vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2}}, {}, "[SEP]"),
    ],
)
def test_bad_tokenizers_are_refused(tmp_path: Path, model: Any, more: dict, fact: str) -> None:
    put(tmp_path / TOKENIZER, {"model": model} | more)
    with pytest.raises(InputError, match=r"tokenizer\.json") as error:
        Vocabulary.load(tmp_path)
    assert fact in str(error.value)
