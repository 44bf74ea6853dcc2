"""torch_files.py: damaged files and files that ask for code are refused."""

import os
import random
import struct
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, same

from common.errors import InputError
from common.files import read_text
from common.torch_files import Damaged, read_safetensors, read_torch, write_torch

WEIGHTS = {"a": torch.arange(1000.0), "b": torch.zeros(3)}
CONTENT = {"step": 3, "weights": WEIGHTS, "text": "x", "none": None}
FLIPS = 200


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_torch(tmp_path / "file.pth.tar", CONTENT)
    return tmp_path / "file.pth.tar"


def test_a_flipped_bit_is_refused_or_changes_nothing(path: Path) -> None:
    whole, draw = path.read_bytes(), random.Random(0)
    assert same(read_torch(path), CONTENT) and same(torch.load(path, weights_only=True), CONTENT)
    refused = 0
    for _ in range(FLIPS):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(read_torch(path), CONTENT)
        except Damaged as error:
            assert path.name in str(error)
            refused += 1
    assert refused > FLIPS / 2  # the others hit padding and dates


@pytest.mark.parametrize("official", [False, True])
def test_a_truncated_file_is_refused(path: Path, official: bool) -> None:
    whole = (GOLDEN / "i2t/checkpoint.pth.tar").read_bytes() if official else path.read_bytes()
    for length in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged, match=path.name):
            read_torch(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_never_runs(tmp_path: Path, monkeypatch, zipped: bool) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, ("executed",)

    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, tmp_path / "x", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="mkdir") as error:
        read_torch(tmp_path / "x")
    assert not isinstance(error.value, Damaged) and "weights_only" not in str(error.value)
    assert os.listdir(tmp_path) == ["x"]


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        for read in (lambda path: read_text(path, "a text"), read_torch, read_safetensors):
            with pytest.raises(InputError, match=name):
                read(tmp_path / name)


def test_a_safetensors_header_that_claims_too_much(tmp_path: Path) -> None:
    header = (
        b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}'
    )
    path = tmp_path / "x.safetensors"
    for data in (struct.pack("<Q", len(header)) + header, struct.pack("<Q", 2**60) + header, b""):
        path.write_bytes(data)
        with pytest.raises(Damaged, match=path.name):
            read_safetensors(path)
