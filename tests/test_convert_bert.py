"""convert_bert.py on a tiny checkpoint in TensorFlow's own format, compared with BERT in NumPy.

TensorFlow is 600 MB and not among the project's tools: tests of its own reader are skipped if it is
missing. The others replace the reader by one of the same variables.
"""

import importlib.util
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, run_here
from transformers import BertModel

from checkpoint.bert import assemble_bert, load_bert
from common.errors import InputError
from scripts import convert_bert
from tests.write_tensorflow_bert import FOLDER, SIZES, arrays, write

DATA = FOLDER / "bert_model.ckpt.data-00000-of-00001"
TOLERANCE = 1e-5  # of a hidden state, whose size is about 1
IDS = [[2, 5, 7, 9, 11, 3], [2, 16, 4, 3, 0, 0]]
MASK = [[1] * 6, [1, 1, 1, 1, 0, 0]]

needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason="TensorFlow is not installed: pip install tensorflow-cpu",
)


class Arrays:
    """A reader of arrays in memory, in place of TensorFlow's."""

    def __init__(self, content: dict[str, np.ndarray]) -> None:
        self.content = content

    def get_variable_to_dtype_map(self) -> dict[str, np.dtype]:
        return {name: value.dtype for name, value in self.content.items()}

    def get_tensor(self, name: str) -> np.ndarray:
        return self.content[name]


def hidden_states(w: dict[str, np.ndarray], ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """BERT's last layer by its equations, in float64, from TensorFlow's variables."""
    w = {name: value.astype(np.float64) for name, value in w.items()}

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * w[f"{name}/LayerNorm/gamma"] + w[f"{name}/LayerNorm/beta"]

    def dense(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

    def heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:2], SIZES["num_attention_heads"], -1).transpose(0, 2, 1, 3)

    where = "bert/embeddings"
    x = w[f"{where}/word_embeddings"][ids] + w[f"{where}/token_type_embeddings"][0]
    x = norm(where, x + w[f"{where}/position_embeddings"][: ids.shape[1]])
    for layer in range(SIZES["num_hidden_layers"]):
        where = f"bert/encoder/layer_{layer}"
        parts = (f"{where}/attention/self/{part}" for part in ("query", "key", "value"))
        query, key, value = (heads(dense(part, x)) for part in parts)
        logits = query @ key.transpose(0, 1, 3, 2) / math.sqrt(query.shape[-1])
        weights = np.exp(logits) * mask[:, None, None, :]
        attended = (weights / weights.sum(-1, keepdims=True)) @ value
        attended = attended.transpose(0, 2, 1, 3).reshape(x.shape)
        x = norm(
            f"{where}/attention/output", x + dense(f"{where}/attention/output/dense", attended)
        )
        inner = dense(f"{where}/intermediate/dense", x)
        inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        x = norm(f"{where}/output", x + dense(f"{where}/output/dense", inner))
    return x


def check(model: BertModel) -> None:
    """Compare a model with the plain BERT, at real words."""
    with torch.no_grad():
        states = model.eval()(torch.tensor(IDS), torch.tensor(MASK)).last_hidden_state.numpy()
    mask = np.array(MASK, bool)
    expected = hidden_states(arrays(), np.array(IDS), mask)
    assert np.abs(expected[mask]).max() > 0.5
    np.testing.assert_allclose(states[mask], expected[mask], rtol=0, atol=TOLERANCE)


def test_the_kept_checkpoint_holds_the_numbers_of_the_program_that_wrote_it() -> None:
    content = arrays()
    assert DATA.read_bytes() == b"".join(content[name].tobytes() for name in sorted(content))


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    return lambda source, out: run_here(
        monkeypatch, convert_bert.main, ["--tensorflow", source, "--out", out]
    )


def test_names_and_transposes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, convert: Callable[..., int]
) -> None:
    """The whole program, with a stand-in for TensorFlow's reader."""
    readers = {FOLDER / "bert_model.ckpt": Arrays(arrays())}
    monkeypatch.setattr(convert_bert, "open_checkpoint", readers.__getitem__)
    folder = tmp_path / "new/bert"
    assert convert(FOLDER, folder) == 0
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "vocab.txt"]
    check(load_bert(folder).model)
    check(BertModel.from_pretrained(folder, add_pooling_layer=False))
    assert (folder / "vocab.txt").read_text() == (FOLDER / "vocab.txt").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_dropout_prob"] == 0.1 and SIZES.items() <= config.items()


BIAS, KERNEL = "bert/encoder/layer_1/output/dense/bias", "bert/encoder/layer_0/output/dense/kernel"


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda a: a.pop(BIAS), "encoder.layer.1.output"),
        (lambda a: a.update({"bert/odd": a["bert/pooler/dense/bias"]}), "odd"),
        (lambda a: a.update({"bert/odd": np.zeros(2)}), "float64"),
        (lambda a: a.update({KERNEL: np.ones((12, 20), np.float32)}), "output.dense.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: Callable, fact: str) -> None:
    content = arrays()
    change(content)
    with pytest.raises(InputError, match=fact):
        assemble_bert(FOLDER, convert_bert.read_weights(Arrays(content), DATA), DATA)


def test_without_tensorflow_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setitem(sys.modules, "tensorflow.train", None)
    with pytest.raises(InputError, match="pip install tensorflow-cpu"):
        convert_bert.open_checkpoint(FOLDER / "bert_model.ckpt")


def test_folders_that_cannot_be_used_are_refused(
    tmp_path: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    copy, two = (Path(shutil.copytree(FOLDER, tmp_path / name)) for name in ("copy", "two"))
    (copy / DATA.name).unlink()
    shutil.copy(two / "bert_model.ckpt.index", two / "other.ckpt.index")
    for source, out, fact in (
        (FOLDER, copy, "--out"),
        (tmp_path / "none", tmp_path / "out", "none"),
        (GOLDEN / "i2t/bert", tmp_path / "out", "ckpt.index"),
        (two, tmp_path / "out", "other.ckpt.index"),
        (copy, tmp_path / "out", DATA.name),
    ):
        assert convert(source, out) == 2
        assert fact in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_tensorflow
def test_a_checkpoint_in_tensorflows_own_format(
    tmp_path: Path, convert: Callable[..., int]
) -> None:
    assert convert(FOLDER, tmp_path / "bert") == 0
    check(load_bert(tmp_path / "bert").model)
    write(tmp_path / "again")
    for kept in FOLDER.iterdir():
        assert (tmp_path / "again" / kept.name).read_bytes() == kept.read_bytes(), kept.name


@needs_tensorflow
@pytest.mark.parametrize("name", ["bert_model.ckpt.index", DATA.name])
def test_a_damaged_checkpoint_is_refused(
    name: str, tmp_path: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(FOLDER, tmp_path / "copy")
    data = bytearray((FOLDER / name).read_bytes())
    for at in range(0, len(data), 50):
        data[at] ^= 255
    (tmp_path / "copy" / name).write_bytes(data)
    assert convert(tmp_path / "copy", tmp_path / "bert") == 2
    assert "copy" in capsys.readouterr().err
    assert not (tmp_path / "bert").exists()
