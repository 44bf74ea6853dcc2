"""changes.py — how fuzzing changes a file: some of its bytes, or some values of plain data."""

from functools import reduce
from typing import Any

import torch
from hypothesis import strategies as st

WORDS = [n.to_bytes(size, "little") for size in (4, 8) for n in (0, 1, 127, 2**31, 2**32 - 1)]
WORDS += b"\0 \n \r \xff \xe2\x80\xa8 \xed\xa0\x80 PK\x03\x04 PK\x05\x06 cos\nsystem\n".split(b" ")
WORDS += [*b'(F4) t. R [ { " -1 1e999 NaN null'.split(), b"\x85" * 50, b"9" * 30]
AT, GONE = st.integers(0, 2**32 - 1), st.integers(0, 40) | st.just(2**40)  # how many bytes go
NEW = st.binary(max_size=12) | st.sampled_from(WORDS)
byte_changes = st.lists(st.tuples(AT, GONE, NEW), max_size=6)


def change_bytes(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for where, gone, new in changes:
        at = where % (len(data) + 1)
        data = data[:at] + new + data[at + gone :]
    return data


ODD: list[Any] = [
    *(None, True, -1, 0, 3, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf"), -(10**400)),
    *("", "x" * 50, "a\0b", "a\ud800", "\x1b[2J", b"x", 1j, [], {}, (), [[]], {"a": {}}),
    ("a", ("b",)),
    reduce(lambda nested, _: [nested, nested], range(40), ["ha"]),  # its text fills any memory
    *(torch.zeros(3, dtype=dtype) for dtype in (torch.float32, torch.int64, torch.complex64)),
    *(torch.zeros(0), torch.tensor(3.0), torch.full((2, 2), torch.nan)),
    *(torch.zeros(1).expand(2**40), torch.zeros(2, device="meta")),
    torch.nn.Parameter(torch.zeros(4)),
]
PATH, ODDS = st.lists(st.integers(0, 2**16), max_size=6), st.integers(0, len(ODD) - 1)
KIND = st.sampled_from(("set", "remove", "rename", "reshape", "type"))
value_changes = st.lists(st.tuples(PATH, ODDS, KIND), max_size=4)


def change_value(content: Any, path: list[int], odd: int, kind: str) -> Any:
    """Return plain data with one value replaced; `path` leads to it."""
    if path and isinstance(content, dict | list) and content:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key, new = keys[path[0] % len(keys)], content.copy()
        if len(path) == 1 and kind in ("remove", "rename") and isinstance(content, dict):
            value = new.pop(key)
            return new if kind == "remove" else new | {f"{key}x": value}
        new[key] = change_value(content[key], path[1:], odd, kind)
        return new
    if isinstance(content, torch.Tensor) and content.numel() < 10**6:
        if kind == "reshape":
            return content.unsqueeze(0) if odd % 2 else content.double()
        if kind == "type":
            dtypes = (torch.bool, torch.int64, torch.complex64, torch.float16, torch.uint16)
            return content.to(dtypes[odd % len(dtypes)])
    return ODD[odd]
