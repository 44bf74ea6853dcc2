"""vocab.py — WordPiece vocabulary, and captions as ids and masks (SPEC §1).

Knows nothing of images or of the model.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from common.errors import require
from common.layout import read_lines

# Captions are tokenised in the loader's workers. A thread pool of the parent does not survive the
# fork, and one thread tokenises 25,000 captions in about a second.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PAD, UNK, CLS, SEP = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
LONGEST_WORD = 100  # characters; a longer word is one [UNK]

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
class Vocabulary:
    """The entries of a `vocab.txt`, line number = id."""

    path: Path
    entries: tuple[str, ...]

    @classmethod
    def load(cls, folder: str | Path) -> "Vocabulary":
        """Read `folder/vocab.txt`.

        Raises InputError if it is missing, not UTF-8 or lacks a special entry.
        """
        path = Path(folder) / "vocab.txt"
        entries = read_lines(path, "the vocabulary of BERT, in the folder of --bert_path")
        for special in (PAD, UNK, CLS, SEP):
            require(special in entries, f"{path}: no entry {special}; a BERT vocabulary has one")
        require(entries[0] == PAD, f"{path}: first entry {entries[0]!r}, expected {PAD} (id 0)")
        return cls(path, entries)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        ids = {entry: i for i, entry in enumerate(self.entries)}
        tokenizer = Tokenizer(
            models.WordPiece(ids, unk_token=UNK, max_input_chars_per_word=LONGEST_WORD)
        )
        # REFERENCE: CJK characters stay inside their word.
        tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=False, handle_chinese_chars=False, strip_accents=True, lowercase=True
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
        # Python lower-cases as the tokeniser of 2018 did and knows the final sigma; the library
        # does not. Dropped characters go first, because they decide which sigma is final.
        lower = [CLEAN.normalize_str(caption).lower() for caption in captions]
        encoded = self._tokenizer.encode_batch(lower, add_special_tokens=False)
        return [pieces.ids for pieces in encoded]
