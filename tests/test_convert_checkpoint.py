"""convert_checkpoint.py: every golden case there and back, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, Case, run_here, same, tiny_train

from checkpoint.bert import load_bert
from checkpoint.checkpoint import json_beside, load_model, read_checkpoint, write_checkpoint
from common.config import ModelConfig
from common.torch_files import read_torch, write_torch
from evaluate_models import evaluate
from evaluation import score_split
from model import DIME
from scripts import convert_checkpoint
from vocab import Vocabulary

CASE = Case(GOLDEN / "i2t")
BERT = ("--bert_path", CASE.bert_path)
SUFFIX = {"own": ".pth.tar", "published": ".pth.tar", "safetensors": ".safetensors"}
TOLERANCE = 1e-6  # of a score
HALF = 2e-3  # of scores in the mean: some have a gate near the threshold of a dead path
PUBLISHED = 1e-5  # of a score to the one that the published model gave


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    return lambda source, out, to, *more: run_here(
        monkeypatch,
        convert_checkpoint.main,
        ["--checkpoint", source, "--out", out, "--to", to, *more],
    )


def scores(path: Path, case: Case, bert: Path | None = None) -> np.ndarray:
    """Scores of the test split."""
    model = load_model(path, bert or case.bert_path)
    cpu = torch.device("cpu")
    vocabulary = Vocabulary.load(case.bert_path)
    return score_split(model, case.split(), vocabulary, device=cpu, workers=0)


def content_of(path: Path) -> dict:
    return torch.load(path, weights_only=False)  # a golden file, or one just made from it


@pytest.mark.parametrize("name", ["i2t", "t2i"])
def test_scores_stay_in_every_form_and_on_every_way_back(
    name: str, tmp_path: Path, convert: Callable[..., int]
) -> None:
    case = Case(GOLDEN / name)
    made = {"published": case.model_path}
    before = scores(case.model_path, case)
    np.testing.assert_allclose(before, case.expected("eval")["sims"], rtol=0, atol=PUBLISHED)
    for to, source in (
        ("own", "published"),
        ("safetensors", "published"),
        ("published", "own"),
        ("published", "safetensors"),
        ("own", "safetensors"),
        ("safetensors", "own"),
    ):
        out = tmp_path / f"{source}_{to}{SUFFIX[to]}"
        assert convert(made[source], out, to, "--bert_path", case.bert_path) == 0
        made.setdefault(to, out)
        if to == "published":
            assert content_of(out)["epoch"] == content_of(case.model_path)["epoch"]
        np.testing.assert_allclose(scores(out, case), before, rtol=0, atol=TOLERANCE)


def test_half_the_size(
    case: Case, tmp_path: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights are rounded to 11 bits: a score, between -1 and 1, moves a little in the mean."""
    out, bert = tmp_path / "x.safetensors", ("--bert_path", case.bert_path)
    assert convert(case.model_path, out, "safetensors", *bert, "--half") == 0
    before, found = (read_checkpoint(path).weights for path in (case.model_path, out))
    assert found.keys() == before.keys()
    for name, weight in before.items():
        assert found[name].dtype == (torch.float16 if weight.is_floating_point() else weight.dtype)
        torch.testing.assert_close(found[name].to(weight.dtype), weight, rtol=2**-11, atol=2**-24)
    moved = np.abs(scores(out, case) - scores(case.model_path, case))
    assert 0 < moved.mean() < HALF
    assert convert(case.model_path, tmp_path / "x.pth.tar", "own", *bert, "--half") == 2
    assert "--half goes with --to safetensors" in capsys.readouterr().err


def test_evaluate_models_gives_every_form_the_same_figures(
    tmp_path: Path, convert: Callable[..., int], run_evaluate: Callable[..., int]
) -> None:
    paths = {to: tmp_path / f"x_{to}{suffix}" for to, suffix in SUFFIX.items()}
    found = {}
    for to, path in {"before": CASE.model_path, **paths}.items():
        assert to == "before" or convert(CASE.model_path, path, to, *BERT) == 0
        where = ("--data_path", CASE.data_path, *BERT, "--workers", "0")
        kept = ("--json", tmp_path / f"{to}.json", "--save_scores", tmp_path / f"{to}.npy")
        assert run_evaluate("--model_path", path, *where, *kept) == 0
        found[to] = json.loads((tmp_path / f"{to}.json").read_text())["metrics"]
    for to in paths:
        assert found[to] == found["before"]
        np.testing.assert_allclose(
            np.load(tmp_path / f"{to}.npy"),
            np.load(tmp_path / "before.npy"),
            rtol=0,
            atol=TOLERANCE,
        )


@pytest.mark.parametrize(
    ("option", "value", "default"),
    [
        ("routing", "uniform", "soft"),
        ("routing", "hard", "soft"),
        ("num_layer_routing", 2, "3"),
        ("cells", "GLGC,CMRC", "RIC,GLGC,IMRC,CMRC"),
    ],
)
def test_ablations_cannot_be_published(
    option: str,
    value: str | int,
    default: str,
    tmp_path: Path,
    convert: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    bert = load_bert(CASE.bert_path)
    options = {"embed_size": 8, "img_dim": 5, "hid_IMRC": 6, "hid_router": 4, "num_head_IMRC": 2}
    options |= {"max_words": 12, option: value}
    model = DIME(ModelConfig(**options), bert.model)
    own, out, arrays = tmp_path / "own.pth.tar", tmp_path / "x.pth.tar", tmp_path / "x.safetensors"
    write_checkpoint(own, model, options, bert)
    assert convert(own, out, "published", *BERT, "--bert_out", tmp_path / "bert") == 2
    expected = f"{own}: --{option} {value}: the published code knows {default} alone"
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [own]
    assert convert(own, arrays, "safetensors", *BERT) == 0
    assert getattr(load_model(arrays, CASE.bert_path).config, option) == value


def test_there_and_back_gives_the_same_bits(
    case: Case, tmp_path: Path, convert: Callable[..., int]
) -> None:
    own, back = tmp_path / "own.pth.tar", tmp_path / "back.pth.tar"
    assert convert(case.model_path, own, "own", "--bert_path", case.bert_path) == 0
    assert convert(own, back, "published", "--bert_path", case.bert_path) == 0
    before, after = content_of(case.model_path), content_of(back)
    assert before.keys() == after.keys() and vars(before["opt"]) == vars(after["opt"])
    assert same(
        {k: v for k, v in before.items() if k != "opt"}, {k: after[k] for k in before if k != "opt"}
    )
    assert back.read_bytes()[:2] != b"PK"  # PyTorch 1.0 reads no zip files
    arrays = [value for part in after["model"] for value in part.values()]
    assert len({value.untyped_storage().data_ptr() for value in arrays}) == len(arrays)
    assert all(value.is_contiguous() for value in arrays)


@pytest.mark.parametrize("end", ["--max_steps", "--num_epochs"])
def test_a_checkpoint_of_ones_own_training_goes_there_and_back(
    tiny: Path, run_train: Callable[..., int], convert: Callable[..., int], end: str
) -> None:
    """It brings no pooler and no idle layers: they are zeros, under all the published keys."""
    assert run_train(*tiny_train(tiny, end, "1")) == 0
    own, out, back = tiny / "runs/i2t/checkpoint.pth.tar", tiny / "p.pth.tar", tiny / "o.pth.tar"
    assert convert(own, out, "published") == 0
    assert convert(out, back, "own") == 0
    mine, again = read_torch(own), read_torch(back)
    assert same(mine["weights"], again["weights"]) and mine["bert"] == again["bert"]
    assert mine["options"].items() <= again["options"].items()
    assert "optimizer" in mine and "optimizer" not in again
    published, golden = content_of(out), content_of(CASE.model_path)
    for found, expected in zip(published["model"], golden["model"], strict=True):
        assert found.keys() == expected.keys()
    assert (published["epoch"], published["Eiters"]) == (1, mine["step"])  # the last step's epoch
    assert mine["epoch"] == (end == "--num_epochs")  # the next step's, from 0
    assert not published["model"][1]["bert.pooler.dense.weight"].any()
    assert published["model"][0]["bn.weight"].eq(1).all()


def test_the_split_that_selected_the_model_is_known_in_other_forms(
    tiny: Path,
    run_train: Callable[..., int],
    convert: Callable[..., int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its fingerprint goes along, if it is one; the published form has no place for it."""
    assert run_train(*tiny_train(tiny, "--max_steps", "1")) == 0
    best, arrays = tiny / "runs/i2t/model_best.pth.tar", tiny / "x.safetensors"
    own, theirs = tiny / "own.pth.tar", tiny / "theirs.pth.tar"
    for source, out, to, known in (
        (best, arrays, "safetensors", "the model was selected on this split, so"),
        (arrays, own, "own", "the model was selected on this split, so"),
        (own, theirs, "published", "if the model was selected on this dev split,"),
    ):
        assert convert(source, out, to) == 0
        caplog.clear()
        evaluate(out, split="dev", workers=0)
        assert f"{out}: {known} its figures" in caplog.text
    kept = {"dev_data", "commit", "metrics"}
    kept -= {name for name in kept if read_torch(best)[name] is None}  # without git
    for name in kept:
        assert read_torch(own)[name] == read_torch(best)[name], name
    assert convert(best, tiny / "half.safetensors", "safetensors", "--half") == 0
    half = json.loads((tiny / "half.json").read_text())
    assert half["dev_data"] == read_torch(best)["dev_data"] and "metrics" not in half
    write_torch(own, read_torch(own) | {"dev_data": 3, "commit": [], "metrics": {"r1": "x"}})
    assert convert(own, tiny / "again.pth.tar", "own") == 0
    assert not kept & read_torch(tiny / "again.pth.tar").keys()


def test_names_of_bert_come_back(tmp_path: Path, convert: Callable[..., int]) -> None:
    content = content_of(CASE.model_path)
    image, text, space = content["model"]
    text = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in text.items()}
    content["model"] = [image, text, space]
    torch.save(content, tmp_path / "x.pth.tar")
    assert convert(tmp_path / "x.pth.tar", tmp_path / "own.pth.tar", "own", *BERT) == 0
    assert convert(tmp_path / "own.pth.tar", tmp_path / "y.pth.tar", "published", *BERT) == 0
    assert same(content["model"], content_of(tmp_path / "y.pth.tar")["model"])


def test_a_bert_that_would_be_lost(
    tmp_path: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    content = content_of(CASE.model_path)
    content["model"][1]["bert.embeddings.LayerNorm.weight"] += 1
    torch.save(content, tmp_path / "x.pth.tar")
    out, folder = tmp_path / "own.pth.tar", tmp_path / "bert"
    assert convert(tmp_path / "x.pth.tar", out, "own", *BERT) == 2
    assert "holds another BERT than the checkpoint" in capsys.readouterr().err
    assert not out.exists()
    assert convert(tmp_path / "x.pth.tar", out, "own", *BERT, "--bert_out", folder) == 0
    assert load_bert(folder).fingerprint == read_checkpoint(out).bert_fingerprint
    expected = scores(tmp_path / "x.pth.tar", CASE)
    found = scores(out, CASE, folder)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_outputs_that_are_refused(
    tmp_path: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken.json"
    taken.write_text("{}")
    for out, to, more, message in (
        (CASE.model_path, "own", (), "is there already"),
        (tmp_path / "taken.safetensors", "safetensors", (), "taken.json is there already"),
        (tmp_path / "x.pth.tar", "safetensors", (), "ends with .safetensors"),
        (tmp_path / "x.safetensors", "own", (), "no other form's does"),
        (tmp_path / "none/x.pth.tar", "own", (), "x.pth.tar: not found; expected a file to write"),
        (tmp_path / "x.pth.tar", "own", ("--bert_out", tmp_path), "is no new or empty folder"),
        (tmp_path / "b/vocab.txt", "own", ("--bert_out", tmp_path / "b"), "or another output"),
        (
            *(tmp_path / "b/model.safetensors", "safetensors", ("--bert_out", tmp_path / "b")),
            "model.safetensors: is an input or another output",
        ),
    ):
        assert convert(CASE.model_path, out, to, *BERT, *more) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and message in said[0]
    assert taken.read_text() == "{}" and list(tmp_path.iterdir()) == [taken]


@pytest.fixture
def arrays(tmp_path: Path, convert: Callable[..., int]) -> Path:
    """A checkpoint as safetensors, with JSON beside it."""
    assert convert(CASE.model_path, tmp_path / "x.safetensors", "safetensors", *BERT) == 0
    return tmp_path / "x.safetensors"


def test_the_json_beside_holds_options_and_fingerprint(arrays: Path) -> None:
    content = json.loads(json_beside(arrays).read_text())
    assert content["options"]["direction"] == "i2t" and content["step"] == 4242
    assert content["bert"] == load_bert(CASE.bert_path).fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("format"), "format None; expected 'dime-1'"),
        (lambda c: c.update(sha256="0" * 64), "its SHA-256 is not the one in"),
        (lambda c: c.pop("options"), "x.json: lacks options"),
        (lambda c: c["options"].update(embed_size=[3]), "x.json: option embed_size is list"),
        (lambda c: c.update(bert="0" * 64), "was trained with another BERT"),
        (lambda c: c.update(weights={}), "x.json: holds weights"),
    ],
)
def test_json_that_does_not_fit(
    change: Callable[[dict], object],
    message: str,
    arrays: Path,
    run_evaluate: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = json.loads(json_beside(arrays).read_text())
    change(content)
    json_beside(arrays).write_text(json.dumps(content))
    where = ("--data_path", CASE.data_path, *BERT)
    assert run_evaluate("--model_path", arrays, *where) == 2
    assert message in capsys.readouterr().err


def test_damaged_and_missing_files(
    arrays: Path, run_evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    data = arrays.read_bytes()
    arrays.write_bytes(data[:-4] + b"\0\0\0\0")
    assert run_evaluate("--model_path", arrays, "--data_path", CASE.data_path, *BERT) == 2
    assert "its SHA-256 is not the one in" in capsys.readouterr().err
    json_beside(arrays).unlink()
    assert run_evaluate("--model_path", arrays, "--data_path", CASE.data_path, *BERT) == 2
    assert "x.json: not found; expected the options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ([], "is list; expected a dictionary"),
        ({"weights": {}}, "lacks its names"),
        ({"weights": {"txt_enc/bert.cls.x": 3}, "bert_names": []}, "is no weight"),
        ({"weights": {}, "bert_names": [3]}, "is no weight"),
        ({"weights": {}, "bert_names": ["bert.x"]}, "has other layers than"),
        (
            {"weights": {"img_enc/fc.weight": torch.zeros(2)}, "bert_names": []},
            "would take the place of a weight in use",
        ),
        (
            {"weights": {"txt_enc/bert.encoder.x": torch.zeros(2)}, "bert_names": []},
            "would take the place of a weight in use",
        ),
    ],
)
def test_what_an_own_checkpoint_says_of_a_published_one(
    rest: object,
    message: str,
    tmp_path: Path,
    convert: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    own, out = tmp_path / "own.pth.tar", tmp_path / "x.pth.tar"
    assert convert(CASE.model_path, own, "own", *BERT) == 0
    write_torch(own, read_torch(own) | {"published": rest})
    assert convert(own, out, "published", *BERT) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
