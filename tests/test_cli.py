"""cli.py: a dataclass as command line, exit statuses, the device."""

import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, Literal
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT

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
    no_norm: Annotated[bool, "already negative"] = False


def test_every_kind_of_option() -> None:
    argv = ["--names", "a", "b", "--breadth=4", "--rate", "1e-3", "--kind", "y", "--where", "w"]
    assert parse(Options, [*argv, "--no-loud", "--no_norm"], "") == Options(
        ["a", "b"], 4, 0.001, "y", "w", False, True
    )
    assert parse(Options, ["--names", "a"], "") == Options(["a"])


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "--names"),
        (["--names", "a", "--siz", "4"], "--siz"),  # no abbreviations
        (["--names", "a", "--size", "four"], "'four'"),
        (["--names", "a", "--rate", "1e39"], "--rate"),
        (["--names", "a", "--kind", "z"], "'z'"),
        (["--names", "a", "--where", ""], "--where"),
        (["--names", "a", "--where", "a\x1b"], "--where"),
        (["--names", "a", "--no-no_norm"], "--no-no_norm"),
    ],
)
def test_wrong_options_are_named(argv: list[str], named: str) -> None:
    with pytest.raises(InputError, match=re.escape(named)):
        parse(Options, argv, "")


GROUPS = {"what": ["names", "kind", "where"], "how": ["loud", "no_norm", "rate", "size"]}


def test_help_shows_groups_and_defaults(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Options, ["--help"], "What it is.", groups=GROUPS)
    assert stop.value.code == 0
    assert parse(Options, ["--names", "a"], "", groups=GROUPS) == Options(["a"])
    options = capsys.readouterr().out.split("What it is.")[1]
    words = ("what:", "--names", "how:", "--breadth", "a size (default: 3)")
    assert sorted(words, key=options.index) == list(words)


def test_an_input_error_is_one_line_and_status_2(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run(Mock(side_effect=InputError("file: holds\x1b[31m this,\nexpected that")))
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(r"error: file: holds\x1b[31m this, expected that")


@pytest.mark.parametrize("connected", [True, False])
def test_a_connected_process_ends_at_once_after_bad_input(monkeypatch, capsys, connected) -> None:
    leave = Mock(side_effect=SystemExit(9))
    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: connected)
    with pytest.raises(SystemExit):
        run(Mock(side_effect=InputError("a process has ended")))
    assert leave.call_count == connected
    assert "a process has ended" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        run(Mock(side_effect=KeyError("bug")))


PRINTS = "from common.cli import print_line, run; run(lambda: print_line('x' * 9**6))"


@pytest.mark.parametrize("target", ["> /dev/full", ">&-", "| true"])
def test_lost_output_is_status_2_without_a_traceback(target: str) -> None:
    command = f'set -o pipefail; "{sys.executable}" -c "{PRINTS}" {target}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "standard output" in done.stderr


def test_unknown_devices_are_refused() -> None:
    for name in ("gpu", "cpu:x", "mpsx"):
        with pytest.raises(InputError, match=f"--device {name}"):
            pick_device(name)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="on an Apple GPU")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=r"--device mps: .*Apple GPU"):
        pick_device("mps")
