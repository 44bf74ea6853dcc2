"""torchfiles.py: what is damaged, claims too much or asks for code is refused."""

import errno
import hashlib
import io
import os
import pickletools
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from test_files import largest_file

from common.errors import InputError
from common.files import read_text
from common.torch_files import (
    has_checksum,
    read_safetensors,
    read_torch,
    write_old_torch,
    write_torch,
)


def written(folder: Path, content: object) -> Path:
    path = folder / "file.pth.tar"
    write_torch(path, content)
    return path


def test_a_full_disk_is_told_with_the_bytes_needed_and_leaves_the_last_good_file(
    tmp_path: Path,
) -> None:
    path = written(tmp_path, {"step": 1})
    before = path.read_bytes()
    with (
        largest_file(100_000),
        pytest.raises(InputError, match=r"tar: File too large"),
    ):
        write_torch(path, {"weights": torch.zeros(100_000)}, keep=tmp_path / "kept")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_no_space_left_is_told_likewise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, {"step": 1})

    def full(handle: int) -> None:
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(b"x")  # the system's own ENOSPC

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"No space left on device") as error:
        write_torch(path, {"step": 2})
    assert error.value.__cause__.errno == errno.ENOSPC
    assert read_torch(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


CONTENT = {"step": 3, "weights": {"a": torch.arange(1000.0)}, "text": "x", "none": None}


def test_a_written_file_is_plain_data_with_its_checksum_as_a_comment(tmp_path: Path) -> None:
    path = written(tmp_path, CONTENT)
    found = torch.load(path, weights_only=True)
    assert torch.equal(found.pop("weights")["a"], torch.arange(1000.0))
    assert found == {"step": 3, "text": "x", "none": None}
    with zipfile.ZipFile(path) as records:
        assert records.testzip() is None
        comment = records.comment.decode()
    unsealed = io.BytesIO()
    torch.save(CONTENT, unsealed)
    assert comment == "sha256=" + hashlib.sha256(unsealed.getvalue()).hexdigest()


def test_any_changed_byte_is_found(tmp_path: Path) -> None:
    path = written(tmp_path, CONTENT)
    whole = path.read_bytes()
    step = max(1, len(whole) // 60)
    for place in [*range(0, len(whole), step), *range(len(whole) - 100, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"tar: truncated or (damaged|no checkpoint)"):
            read_torch(path)


def test_any_missing_end_is_found(tmp_path: Path) -> None:
    path = written(tmp_path, CONTENT)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"file\.pth\.tar: "):
            read_torch(path)


def saved(path: Path, content: object, **options: object) -> Path:
    torch.save(content, path, **options)
    return path


def test_a_file_without_a_checksum_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "x", {"step": 3})
    assert read_torch(path) == {"step": 3}
    assert not has_checksum(path) and has_checksum(written(tmp_path, CONTENT))
    write_old_torch(path, {"step": 3})
    assert read_torch(path) == {"step": 3} and not has_checksum(path)


def wider(size: int) -> torch.Tensor:
    """A tensor that claims more numbers than it holds."""
    return torch.zeros(1).expand(size)


LOOP: list = []
LOOP.append(LOOP)


BAD = {
    "expanded": (lambda: {"a": wider(2**40)}, "claims an array that"),
    "nested": (lambda: [{"b": (1, {"c": wider(9)})}], "claims an array of shape [9]"),
    "meta": (lambda: torch.zeros(3, device="meta"), "meta_tensor_no_storage, which is not exec"),
    "sparse": (lambda: torch.zeros(3, 3).to_sparse(), "_rebuild_sparse_tensor, which is not exec"),
    "complex": (lambda: torch.zeros(3, dtype=torch.complex64), "ComplexFloatStorage, which is not"),
    "bytes": (lambda: bytearray(9), "bytearray, which is not executed"),
}


@pytest.mark.parametrize("fault", BAD)
def test_arrays_that_are_more_than_the_file_holds_are_refused(tmp_path: Path, fault: str) -> None:
    make, said = BAD[fault]
    with pytest.raises(InputError, match=r"x: ") as error:
        read_torch(saved(tmp_path / "x", make()))
    assert said in str(error.value)


def test_a_list_that_holds_itself_ends(tmp_path: Path) -> None:
    found = read_torch(saved(tmp_path / "x", LOOP))
    assert found[0] is found


def test_sizes_in_a_pickle_are_held_to_the_file(tmp_path: Path) -> None:
    """A tensor's shape rewritten to a terabyte, in both of torch's formats."""
    for zipped in (True, False):
        path = saved(tmp_path / "x", torch.zeros(77), _use_new_zipfile_serialization=zipped)
        data = path.read_bytes()
        shape = b"K" + bytes([77]) + b"\x85"  # BININT1 77, TUPLE1
        assert data.count(shape) == 1
        huge = b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85"  # LONG1
        data = data.replace(shape, huge) if not zipped else repacked(data, shape, huge)
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"x: (claims an array|truncated or no checkpoint)"):
            read_torch(path)


def repacked(data: bytes, old: bytes, new: bytes) -> bytes:
    """A zip file with bytes of its pickle replaced."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as records, zipfile.ZipFile(buffer, "w") as out:
        for record in records.infolist():
            out.writestr(record.filename, records.read(record).replace(old, new))
    return buffer.getvalue()


def pickled(folder: Path, *parts: bytes) -> Path:
    """A torch file of the old format whose content is that pickle."""
    path = saved(folder / "x", {}, _use_new_zipfile_serialization=False)
    source = io.BytesIO(path.read_bytes())
    for _ in range(3):  # magic number, version, system
        list(pickletools.genops(source))
    path.write_bytes(source.getvalue()[: source.tell()] + b"".join(parts))
    return path


# BINPERSID of ("storage", FloatStorage, "0", "cpu", 1)
STORAGE_OF_1 = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x01tQ"


TUPLES = b"q\x00h\x00\x86"  # remember, fetch, pair


HOSTILE = {
    # hashing it takes 2 to the 60 steps
    "shared key": (b"\x80\x02})" + TUPLES * 60 + b"Ns.", "has a key that is neither"),
    # hashing it takes the whole stack
    "deep key": (b"\x80\x02})" + b"\x85" * 10**5 + b"Ns.", "has a key that is neither"),
    "key in an OrderedDict": (
        b"\x80\x02ccollections\nOrderedDict\n]](" + b")K\x01e" + b"a\x85R.",
        "has a key that is neither",
    ),
    "bytes without number": (
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x01\x85R.",
        "asks for code, __builtin__.bytearray",
    ),
    "tensor without number": (
        b"\x80\x02ctorch\nTensor\n\x8a\x05\0\0\0\0\x01\x85R.",
        "asks for code, torch.Tensor",
    ),
    "storage": (
        b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
        b"\x8a\x05\0\0\0\0\x01NtQ.",
        "claims numbers that a file of",
    ),
    "attributes of a list": (b"\x80\x02]}b.", "gives attributes to what has none"),
    "call of a list": (b"\x80\x02])R.", "calls what cannot be called"),
    "entries of a list": (b"\x80\x02]NNs.", "sets entries of what is no dictionary"),
    "entries of a tensor": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE_OF_1 + b"K\x00))NNtRK\x00Ns.",
        "sets entries of what is no dictionary",
    ),
    # what is asked for again and again would take memory as the square of the file
    "shared pairs": (
        b"\x80\x02]("
        + b"".join(b"J%bN\x86" % struct.pack("<i", n) for n in range(300))
        + b"e\x85q\x00ccollections\nOrderedDict\nq\x01]("
        + b"h\x01h\x00R" * 300
        + b"e.",
        "entries in a file of",
    ),
    "shared attributes": (
        b"\x80\x02}("
        + b"".join(b"J%bN" % struct.pack("<i", n) for n in range(300))
        + b"uq\x00ccollections\nOrderedDict\nq\x01]("
        + b"h\x01)Rh\x00b" * 300
        + b"e.",
        "entries in a file of",
    ),
    # multiplied out, they would take time as the square of the file
    "many axes": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE_OF_1
        + b"K\x00("
        + b"K\x01q\x05"
        + b"h\x05" * 70
        + b"tq\x06h\x06NNtR.",
        "an array without numbers or shape",
    ),
    "a long axis": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE_OF_1
        + b"K\x00"
        + b"\x8a\xff"
        + b"\xff" * 254
        + b"\x7f\x85K\x01\x85NNtR.",
        "claims an array that",
    ),
    "two sizes of one storage": (
        b"\x80\x02]" + STORAGE_OF_1 + STORAGE_OF_1.replace(b"K\x01tQ", b"K\x02tQ") + b"aa.",
        "the same numbers twice",
    ),
    "empty stack": (b"\x80\x02a.", "stack is empty"),
    "popped": (b"\x80\x02NN0.", "holds the instruction POP"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_pickle_that_would_take_time_or_memory_is_not_loaded(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    instructions, said = HOSTILE[fault]
    path = pickled(tmp_path, instructions, b"\x80\x02].")
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(InputError, match=r"x: ") as error:
        read_torch(path)
    assert said in str(error.value)


def test_numbers_that_a_record_does_not_hold_are_not_read(tmp_path: Path) -> None:
    """A storage's size is held to its record, not to the file: torch before 2.10 believes it."""
    path = saved(tmp_path / "x", [torch.zeros(4), torch.zeros(5000)])
    size, more = b"K\x04tq", b"K\x60tq"  # BININT1 4, TUPLE, and what refers to it
    data = repacked(path.read_bytes(), size, more)
    assert data != path.read_bytes()
    path.write_bytes(data)
    with pytest.raises(InputError, match="claims numbers that its records do not hold"):
        read_torch(path)


def test_attributes_of_dictionaries_and_parameters_do_not_come_in(tmp_path: Path) -> None:
    content = OrderedDict(a=torch.nn.Parameter(torch.ones(2)), b=[3])
    for zipped in (True, False):
        path = saved(tmp_path / "x", content, _use_new_zipfile_serialization=zipped)
        found = read_torch(path)
        assert type(found) is dict and found["b"] == found.get("b") == [3]
        assert type(found["a"]) is torch.Tensor and not found["a"].requires_grad


def test_a_dictionary_whose_functions_are_taken_from_it(tmp_path: Path) -> None:
    made = b"\x80\x02ccollections\nOrderedDict\n)R}X\x03\0\0\0getK\x03sb."
    found = read_torch(pickled(tmp_path, made, b"\x80\x02]."))
    assert found == {} and found.get("a") is None


def test_what_python_2_wrote_of_an_ordered_dictionary_is_read(tmp_path: Path) -> None:
    """Its pairs are given to the constructor."""
    made = b"\x80\x02ccollections\nOrderedDict\n]](X\x01\0\0\0aK\x07ea\x85R."
    assert read_torch(pickled(tmp_path, made, b"\x80\x02].")) == {"a": 7}


def test_a_second_list_of_records_is_refused(tmp_path: Path) -> None:
    """Python would read the last one, torch the one that the end record points to."""
    data = saved(tmp_path / "x", torch.zeros(99)).read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as records:
        listed = records.start_dir
    end = data.rindex(b"PK\x06\x06")
    (tmp_path / "x").write_bytes(data[:end] + data[listed:end] + data[end:])
    with pytest.raises(InputError, match=r"records (is|are) not where"):
        read_torch(tmp_path / "x")


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        for read in (lambda path: read_text(path, "a text"), read_torch, read_safetensors):
            with pytest.raises(InputError, match=f"{name}: is a pipe or a device; expected a"):
                read(tmp_path / name)


def test_no_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, CONTENT)

    def failing(*args: object, **more: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "load", failing)
    with pytest.raises(MemoryError):
        read_torch(path)


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    """A few bytes of them can claim any size."""
    path = saved(tmp_path / "x", torch.zeros(10**6))
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as records, zipfile.ZipFile(buffer, "w", 8) as out:
        for record in records.infolist():
            out.writestr(record.filename, records.read(record))
    path.write_bytes(buffer.getvalue())
    assert len(buffer.getvalue()) < 10_000
    with pytest.raises(InputError, match="its records are compressed; torch writes them plain"):
        read_torch(path)


def test_a_safetensors_header_that_claims_too_much(tmp_path: Path) -> None:
    header = (
        b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}'
    )
    path = tmp_path / "x.safetensors"
    for data in (struct.pack("<Q", len(header)) + header, struct.pack("<Q", 2**60) + header, b""):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"x\.safetensors: no whole safetensors file"):
            read_safetensors(path)
