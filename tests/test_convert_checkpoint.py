"""convert_checkpoint.py: golden cases in every form, and refused input."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, Case, run_here, same

from checkpoint.checkpoint import json_beside, load_model, read_checkpoint
from common.errors import InputError
from common.torch_files import read_torch
from evaluate_models import evaluate
from evaluation import score_split
from scripts import convert_checkpoint
from vocab import Vocabulary

CASE = Case(GOLDEN / "i2t")
BERT = ("--bert_path", CASE.bert_path)
TOLERANCE = 1e-6  # of a score
HALF = 2e-3  # of scores in the mean: some have a gate near the threshold of a dead path


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    return lambda source, out, *more: run_here(
        monkeypatch, convert_checkpoint.main, ["--checkpoint", source, "--out", out, *more]
    )


def scores(path: Path, case: Case) -> np.ndarray:
    """Scores of the test split."""
    model = load_model(path, case.bert_path)
    vocabulary = Vocabulary.load(case.bert_path)
    return score_split(model, case.split(), vocabulary, device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["i2t", "t2i"])
def test_scores_stay_the_same_in_every_form(
    name: str, tmp_path: Path, convert: Callable[..., int]
) -> None:
    case = Case(GOLDEN / name)
    before = scores(case.model_path, case)
    native, arrays, again = (tmp_path / file for file in ("x.tar", "y.safetensors", "z.tar"))
    for source, out in ((case.model_path, native), (native, arrays), (arrays, again)):
        assert convert(source, out, "--bert_path", case.bert_path) == 0
        np.testing.assert_allclose(scores(out, case), before, rtol=0, atol=TOLERANCE)
    assert same(read_torch(native)["weights"], read_torch(again)["weights"])
    epoch = read_torch(case.model_path)["epoch"] - 1  # official ones count from 1
    assert read_torch(native)["epoch"] == read_torch(again)["epoch"] == epoch


def test_half_the_size(tmp_path: Path, convert: Callable[..., int], capsys) -> None:
    """Weights are rounded to 11 bits: a score, between -1 and 1, moves a little in the mean."""
    out = tmp_path / "x.safetensors"
    assert convert(CASE.model_path, out, *BERT, "--half") == 0
    before, after = (read_checkpoint(path).weights for path in (CASE.model_path, out))
    assert after.keys() == before.keys()
    for name, weight in before.items():
        assert after[name].dtype == (torch.float16 if weight.is_floating_point() else weight.dtype)
        torch.testing.assert_close(after[name].to(weight.dtype), weight, rtol=2**-11, atol=2**-24)
    moved = np.abs(scores(out, CASE) - scores(CASE.model_path, CASE))
    assert 0 < moved.mean() < HALF
    assert convert(CASE.model_path, tmp_path / "x.tar", *BERT, "--half") == 2
    assert "--half" in capsys.readouterr().err


def test_the_split_that_selected_the_model_is_known_in_other_forms(
    trained: Path, convert: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    best, arrays = trained / "runs/i2t/model_best.pth.tar", trained / "x.safetensors"
    native = trained / "native.tar"
    for source, out in ((best, arrays), (arrays, native)):
        assert convert(source, out) == 0
        caplog.clear()
        evaluate(out, data_path=trained / "data", split="dev", workers=0)
        assert f"{out}: the model was selected on this split" in caplog.text
    before, after = read_torch(best), read_torch(native)
    assert "optimizer" in before and "optimizer" not in after
    for name in ("weights", "bert", "options", "dev_data", "commit", "metrics", "epoch", "step"):
        assert same(after.get(name), before[name]), name
    assert convert(best, trained / "half.safetensors", "--half") == 0
    half = json.loads((trained / "half.json").read_text())
    assert half["dev_data"] == before["dev_data"] and "metrics" not in half


def test_a_bert_that_would_be_lost_is_refused(
    tmp_path: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    content = read_torch(CASE.model_path)
    content["model"][1]["bert.embeddings.LayerNorm.weight"] += 1
    torch.save(content, tmp_path / "x.pth.tar")
    assert convert(tmp_path / "x.pth.tar", tmp_path / "native.pth.tar", *BERT) == 2
    assert f"{CASE.bert_path}: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth.tar"]


@pytest.mark.parametrize(
    ("out", "fact"),
    [("taken.json",) * 2, ("taken.safetensors", "taken.json"), ("none/x.tar", "x.tar")],
)
def test_outputs_that_cost_a_file_are_refused(
    out: str, fact: str, tmp_path: Path, convert: Callable[..., int], capsys
) -> None:
    taken = tmp_path / "taken.json"
    taken.write_text("{}")
    assert convert(CASE.model_path, tmp_path / out, *BERT) == 2
    assert fact in capsys.readouterr().err
    assert taken.read_text() == "{}" and list(tmp_path.iterdir()) == [taken]


@pytest.fixture
def arrays(tmp_path: Path, convert: Callable[..., int]) -> Path:
    """A checkpoint as safetensors, with JSON beside it."""
    assert convert(CASE.model_path, tmp_path / "x.safetensors", *BERT) == 0
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda c: c.pop("format"), "dime-1"),
        (lambda c: c.update(sha256="0" * 64), "SHA-256"),
        (lambda c: c["options"].update(embed_size=[3]), "embed_size"),
        (lambda c: c.update(bert="0" * 64), "another BERT"),
    ],
)
def test_json_that_does_not_fit_is_refused(
    change: Callable[[dict], object], fact: str, arrays: Path
) -> None:
    content = json.loads(json_beside(arrays).read_text())
    assert content["step"] == 4242
    change(content)
    json_beside(arrays).write_text(json.dumps(content))
    with pytest.raises(InputError, match=fact):
        load_model(arrays, CASE.bert_path)


def test_damaged_and_missing_files_are_refused(arrays: Path) -> None:
    data = bytearray(arrays.read_bytes())
    data[-1] ^= 1
    arrays.write_bytes(data)
    with pytest.raises(InputError, match=r"x\.safetensors.*SHA-256"):
        load_model(arrays, CASE.bert_path)
    json_beside(arrays).unlink()
    with pytest.raises(InputError, match=r"x\.json"):
        load_model(arrays, CASE.bert_path)
