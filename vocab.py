"""vocab.py — WordPiece vocabulary, and captions as ids and masks (SPEC §1).

Knows nothing of images or of the model.
"""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from common.cli import progress
from common.errors import InputError, brief_repr, require, summarise
from common.files import read_json
from common.layout import read_lines

# The loader's workers are forked, and a thread pool does not survive that. One thread tokenises
# 25,000 captions in about a second.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

log = logging.getLogger(__name__)

WORDS, TOKENIZER, FLAGS = "vocab.txt", "tokenizer.json", "tokenizer_config.json"
# What tokenizer_config.json calls a flag, and what tokenizer.json's normaliser calls it.
NAMES = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
# The last two name no tokeniser of their own: tokenizer.json describes it.
CLASSES = ("BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
PAD, UNK, CLS, SEP = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
LARGEST_SIZE = 2**20  # entries; LaBSE's vocabulary has 501,153
CHUNK = 4096  # captions encoded at a time
LONGEST_WORD = 100  # characters; a longer word is one [UNK]
WORDPIECE = {
    "type": "WordPiece",
    "unk_token": UNK,
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": LONGEST_WORD,
}
NO_WORD = re.compile("[\n\ud800-\udfff]")  # a line of UTF-8 cannot hold them

# REFERENCE: a carriage return is dropped like any other control character; the library alone would
# make it a space.
# DEVIATION: characters younger than Unicode 8 are classed as the tokenizers library does (the
# published code asked Python).
CLEAN = normalizers.Sequence(
    [
        normalizers.Replace("\r", ""),
        normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=False, strip_accents=False, lowercase=False
        ),
    ]
)


@dataclass(frozen=True)
class Tokenization:
    """How captions become words. The defaults are the uncased tokeniser of SPEC §1."""

    lower_case: bool = True
    strip_accents: bool = True
    split_chinese: bool = False  # each Chinese character is a word
    # Python cleans and lower-cases first, as in 2018: the library alone makes a carriage return a
    # space, and does not know the final sigma.
    published: bool = True

    @classmethod
    def of_folder(cls, folder: Path) -> "Tokenization":
        """Return what `tokenizer_config.json` says, or else the normaliser in `tokenizer.json`.

        SPEC §1's tokeniser, if neither says anything. Raises InputError if a flag is neither true
        nor false, or if the tokeniser is not BERT's.
        """
        # DEVIATION: a tokenizer_config.json, or else a tokenizer.json, decides on case, accents and
        # Chinese characters, as in the tokenizers library (the published code read all captions
        # as uncased BERT of 2018).
        path = folder / FLAGS
        stated = _read_if_there(path)
        check_class(stated, path)
        if stated.keys().isdisjoint(NAMES):
            path = folder / TOKENIZER
            normalizer = _part(_read_if_there(path), "normalizer", "BertNormalizer", path)
            stated = {flag: normalizer[name] for flag, name in NAMES.items() if name in normalizer}
        if not stated:
            return cls()
        lower = stated.get("do_lower_case", True)
        accents = stated.get("strip_accents")  # null: as do_lower_case says
        chinese = stated.get("tokenize_chinese_chars", True)
        values = (lower, lower if accents is None else accents, chinese)
        for name, value in zip(NAMES, values, strict=True):
            if type(value) is not bool:
                raise InputError(f"{path}: {name} is {brief_repr(value)}; expected true or false")
        return cls(*values, published=False)

    @classmethod
    def of_checkpoint(cls, stored: Any, path: Path) -> "Tokenization":
        """Return what a checkpoint stores, or SPEC §1's tokeniser if it stores None.

        Raises InputError unless all fields are there.
        """
        if stored is None:
            return cls()
        names = [field.name for field in fields(cls)]
        is_complete = isinstance(stored, dict) and stored.keys() == set(names)
        if not (is_complete and all(type(value) is bool for value in stored.values())):
            raise InputError(f"{path}: tokenization: expected {', '.join(names)}, true or false")
        return cls(**stored)

    @property
    def flags(self) -> dict[str, bool]:
        """The content of a `tokenizer_config.json`; SPEC §1's tokeniser has none."""
        values = (self.lower_case, self.strip_accents, self.split_chinese)
        return {} if self.published else dict(zip(NAMES, values, strict=True))

    @property
    def rules(self) -> tuple[str, ...]:
        """What the fields do to captions, in words."""
        return (
            "lower case" if self.lower_case else "case kept",
            "accents removed" if self.strip_accents else "accents kept",
            "Chinese characters split" if self.split_chinese else "Chinese characters not split",
            "cleaned as in 2018" if self.published else "cleaned as the tokenizers library does",
        )


@dataclass(frozen=True)
class Vocabulary:
    """WordPieces, index = id, and how captions are split into them."""

    path: Path  # of the file that was read
    entries: tuple[str, ...]
    tokenization: Tokenization = Tokenization()

    @classmethod
    def load(cls, folder: str | Path) -> "Vocabulary":
        """Read `vocab.txt` or else `tokenizer.json` of a folder, and its `tokenizer_config.json`.

        Raises InputError if a file is missing or damaged, or if a special entry is missing.
        """
        folder = Path(folder)
        path = folder / WORDS
        if not os.path.lexists(path) and os.path.lexists(folder / TOKENIZER):
            path = folder / TOKENIZER
            entries = _read_tokenizer(path)
        else:
            wanted = f"the vocabulary of BERT (or {TOKENIZER}), in the folder of --bert_path"
            entries = read_lines(path, wanted)
            _warn_of_other_ids(path, entries, folder / TOKENIZER)
        for special in (PAD, UNK, CLS, SEP):
            require(special in entries, f"{path}: no entry {special}; a BERT vocabulary has one")
        pad = entries.index(PAD)
        require(pad == 0, f"{path}: {PAD} has id {pad}; expected 0, which captions are padded with")
        return cls(path, entries, Tokenization.of_folder(folder))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        ids = {entry: i for i, entry in enumerate(self.entries)}
        tokenizer = Tokenizer(
            models.WordPiece(ids, unk_token=UNK, max_input_chars_per_word=LONGEST_WORD)
        )
        # No special tokens are registered: [CLS] in a caption is ordinary text.
        # REFERENCE: CJK characters stay inside their word.
        tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=self.tokenization.split_chinese,
            strip_accents=self.tokenization.strip_accents,
            lowercase=self.tokenization.lower_case,
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return tokenizer

    def encode(self, captions: Sequence[str], max_words: int) -> tuple[Tensor, Tensor]:
        """Return ids `[T, max_words]` int64 and mask `[T, max_words]` bool, True = a real token.

        A row is `[CLS]`, at most `max_words - 2` WordPieces, `[SEP]`, and padding with id 0.
        """
        cls, sep = self.entries.index(CLS), self.entries.index(SEP)
        ids = torch.zeros(len(captions), max_words, dtype=torch.int64)
        mask = torch.zeros(len(captions), max_words, dtype=torch.bool)
        for row, pieces in enumerate(self._pieces(captions)):
            wrapped = [cls, *pieces[: max_words - 2], sep]
            ids[row, : len(wrapped)] = torch.tensor(wrapped)
            mask[row, : len(wrapped)] = True
        return ids, mask

    def lengths(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return tokens of each uncut caption `[T]`, and how many of them are `[UNK]` `[T]`."""
        unknown, pieces = self.entries.index(UNK), self._pieces(captions)
        lengths = torch.tensor([len(row) + 2 for row in pieces])  # [CLS] and [SEP]
        return lengths, torch.tensor([row.count(unknown) for row in pieces])

    def _pieces(self, captions: Sequence[str]) -> list[list[int]]:
        """Ids of the WordPieces of captions, uncut, without `[CLS]` and `[SEP]`."""
        rules = self.tokenization
        if rules.published:
            # Dropped characters go first, because they decide which sigma is final.
            captions = [CLEAN.normalize_str(caption) for caption in captions]
            captions = [text.lower() for text in captions] if rules.lower_case else captions
        encoded = self._tokenizer.encode_batch(captions, add_special_tokens=False)
        return [pieces.ids for pieces in encoded]


@dataclass(frozen=True)
class EncodedCaptions:
    """Captions that were encoded once; `self[captions]` is what `Vocabulary.encode` returns.

    MSCOCO's 566,000 captions of 32 words take 75 MB. These are arrays because torch sends a tensor
    to a spawned worker through shared memory, of which a container has 64 MB.
    """

    ids: np.ndarray  # [T, max_words] int32
    lengths: np.ndarray  # [T] int32, number of real tokens

    @classmethod
    def of(
        cls, captions: Sequence[str], vocabulary: Vocabulary, max_words: int
    ) -> "EncodedCaptions":
        """Encode captions, with a progress bar."""
        ids = np.empty((len(captions), max_words), np.int32)
        lengths = np.empty(len(captions), np.int32)
        with progress("reading captions", len(captions), "captions") as bar:
            for first in range(0, len(captions), CHUNK):
                chunk = slice(first, first + CHUNK)
                chunk_ids, mask = vocabulary.encode(captions[chunk], max_words)
                ids[chunk], lengths[chunk] = chunk_ids.numpy(), mask.sum(1).numpy()
                bar.update(len(mask))
        return cls(ids, lengths)

    def __getitem__(self, captions: np.ndarray) -> tuple[Tensor, Tensor]:
        mask = np.arange(self.ids.shape[1]) < self.lengths[captions, None]
        return torch.from_numpy(self.ids[captions].astype(np.int64)), torch.from_numpy(mask)


def _warn_of_other_ids(path: Path, entries: tuple[str, ...], other: Path) -> None:
    """Warn if a `tokenizer.json` beside a vocab.txt, which is read, has other ids."""
    if not os.path.lexists(other):
        return
    ids, others = ({e: i for i, e in enumerate(v)} for v in (entries, _read_tokenizer(other)))
    if different := [entry for entry, i in ids.items() if entry and others.get(entry) != i]:
        message = "%s: has other ids of %s; those in %s are used"
        log.warning(message, other, summarise(different), path.name)


def check_class(content: dict[str, Any], path: Path) -> None:
    """Raise InputError if a configuration names a tokeniser that splits words in another way."""
    name = content.get("tokenizer_class") or CLASSES[0]
    found = f"{path}: tokenizer_class is {brief_repr(name)}"
    require(name in CLASSES, f"{found}; expected {CLASSES[0]}, which captions are read with")


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path, "options of BERT's tokeniser") if os.path.lexists(path) else {}


def _part(content: dict[str, Any], name: str, kind: str, path: Path) -> dict[str, Any]:
    """Return a part of a `tokenizer.json`, if it is there. Raises InputError if not BERT's."""
    part = content.get(name, {"type": kind})
    if not (isinstance(part, dict) and part.get("type") == kind):
        found = part.get("type") if isinstance(part, dict) else part
        raise InputError(f"{path}: {name} is {brief_repr(found)}; expected {kind}, as BERT's is")
    return part


def _read_tokenizer(path: Path) -> tuple[str, ...]:
    """Return the entries and added words in a `tokenizer.json`, in the order of their ids.

    Ids without an entry, which a vocab.txt with a line twice leaves, get an empty one.
    Raises InputError unless it is of BERT's WordPieces.
    """
    content = read_json(path, "a WordPiece tokenizer")
    _part(content, "pre_tokenizer", "BertPreTokenizer", path)
    model = content.get("model")
    if not (isinstance(model, dict) and isinstance(vocab := model.get("vocab"), dict)):
        raise InputError(f"{path}: no model.vocab of a WordPiece tokenizer")
    for name, expected in WORDPIECE.items():
        value = brief_repr(model.get(name, expected))
        right = value == repr(expected)
        require(right, f"{path}: model.{name} is {value}; expected {expected!r}, as BERT's is")
    words = {}
    for entry, i in (_added_words(content.get("added_tokens") or [], path) | vocab).items():
        if not (type(i) is int and 0 <= i < LARGEST_SIZE) or NO_WORD.search(entry):
            found = f"{path}: {entry[:40]!r} has id {brief_repr(i)}"
            raise InputError(f"{found}; expected words and ids up to {LARGEST_SIZE - 1}")
        require(i not in words, f"{path}: {entry[:40]!r} has id {i}, as another entry has")
        words[i] = entry.strip()  # as the lines of vocab.txt
    return tuple(words.get(i, "") for i in range(max(words, default=0) + 1))


def _added_words(tokens: Any, path: Path) -> dict[str, int]:
    """Return the words that were added to a `tokenizer.json`, and their ids.

    Special ones are left out: they are ordinary text in captions. Raises InputError.
    """
    valid = isinstance(tokens, list) and all(
        isinstance(token, dict) and isinstance(token.get("content"), str) for token in tokens
    )
    require(valid, f"{path}: added_tokens: expected a list of content and id")
    words = {token["content"]: token.get("id") for token in tokens if not token.get("special")}
    if words:
        log.info("%s: added %s: read like words of its vocabulary", path, summarise(list(words)))
    return words
