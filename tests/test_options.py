"""options.py: a dataclass as command line, signals, the one error."""

import io
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import torch
from conftest import GOLDEN

from checkpoint.checkpoint import load_model
from common import cli as options
from common.cli import parse, pick_device, run
from common.errors import InputError


@dataclass(frozen=True)
class Options:
    names: Annotated[list[str], "required, one or more"]
    size: Annotated[int, "a size", "--breadth"] = 3
    rate: Annotated[float, "a rate"] = 0.5
    kind: Annotated[Literal["x", "y"], "a choice"] = "x"
    where: Annotated[str | None, "a path"] = None
    loud: Annotated[bool, "a switch"] = True
    no_norm: Annotated[bool, "negative already"] = False


def test_every_kind_of_option() -> None:
    argv = ["--names", "a", "b", "--breadth=4", "--rate", "1e-3", "--kind", "y", "--where", "w"]
    assert parse(Options, [*argv, "--no-loud", "--no_norm"], "") == Options(
        ["a", "b"], 4, 0.001, "y", "w", False, True
    )


def test_defaults() -> None:
    assert parse(Options, ["--names", "a"], "") == Options(["a"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--names"),
        (["--names", "a", "--siz", "4"], "--siz"),  # no abbreviations
        (["--names", "a", "--size", "four"], "'four'"),
        (["--names", "a", "--kind", "z"], "'z'"),
        (["--names", "a", "--no-no_norm"], "--no-no_norm"),
    ],
)
def test_wrong_options_are_named(argv: list[str], said: str) -> None:
    with pytest.raises(InputError) as error:
        parse(Options, argv, "")
    assert said in str(error.value)


def test_help_tells_defaults(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Options, ["--help"], "What it is.")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "What it is." in said and "a size (default: 3)" in said and "--breadth" in said


def test_an_input_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture) -> None:
    def program() -> None:
        raise InputError("file: found this,\nexpected that")

    with pytest.raises(SystemExit) as stop:
        run(program)
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err.splitlines()[-1].endswith("error: file: found this, expected that")
    )


def test_convolutions_on_a_gpu_are_float32() -> None:
    torch.backends.cudnn.allow_tf32 = True
    assert pick_device("cpu") == torch.device("cpu")
    assert not torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    load_model(GOLDEN / "i2t/checkpoint.pth.tar", GOLDEN / "i2t/bert")  # by itself, too
    assert not torch.backends.cudnn.allow_tf32


def test_a_bug_keeps_its_traceback() -> None:
    def program() -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run(program)


def test_letters_that_a_stream_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    options.print_line("a\té\x1b[31m ±\n")
    assert stream.buffer.getvalue() == b"a\t\\xe9\\x1b[31m \\xb1\n"
