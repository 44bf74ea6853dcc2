"""plot_run.py: curves of runs."""

import json
from pathlib import Path

import pytest
from conftest import run_here
from PIL import Image

from common.errors import InputError
from scripts import plot_run
from training.log import events


def test_curves_show_loss_and_recalls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "curves.png"
    lines = [{"step": 1, "Le": 3.0}, {"step": 2, "Le": 2.0}]
    lines.append({"step": 2, "r1": 9.0, "r1i": 8.0, "r10": 40.0, "r10i": 35.0, "rsum": 200.0})
    (tmp_path / "i2t").mkdir()
    log = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "i2t/metrics.jsonl").write_text(log)
    assert run_here(monkeypatch, plot_run.main, [tmp_path / "i2t", "--out", out]) == 0
    with Image.open(out) as picture:
        assert picture.size[0] > 1000 and len(picture.getcolors(2**20)) > 10
    loss, recall = plot_run.figure({"i2t": lines}).axes
    assert loss.lines[0].get_xydata().tolist() == [[1, 3], [2, 2]]
    assert [line.get_ydata()[0] for line in recall.lines[:4]] == [9, 8, 40, 35]
    assert loss.get_ylim()[0] == recall.get_ylim()[0] == 0


def test_runs_have_styles_of_their_own() -> None:
    names = [f"seed{seed}/i2t" for seed in range(12)]
    drawing = plot_run.figure({name: [{"step": 1, "Le": 2.0}] for name in names})
    loss, _ = drawing.axes
    assert len({(line.get_color(), line.get_linestyle()) for line in loss.lines}) == 12
    assert loss.lines[0].get_marker() == "."  # a line through one point shows nothing
    runs, recalls = drawing.legends
    assert [text.get_text() for text in runs.get_texts()] == names
    assert [text.get_text() for text in recalls.get_texts()] == [*plot_run.RECALLS.values()]


@pytest.mark.parametrize(
    ("lines", "place"),
    [("", "is empty"), ('{"step": 1}\nx\n', "line 2"), ('{"step": NaN}', "line 1")],
)
def test_damaged_logs_are_refused(lines: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(InputError, match=f"metrics.jsonl: {place}"):
        events(tmp_path)


def test_outputs_that_cannot_be_written_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "c.png").mkdir()
    for name in ("c.jpg", "c.png"):
        assert run_here(monkeypatch, plot_run.main, [tmp_path, "--out", tmp_path / name]) == 2
        assert name in capsys.readouterr().err
