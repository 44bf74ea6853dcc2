"""checkpoint.py and bert.py: own and published checkpoints, BERT folders, what is refused."""

import argparse
import io
import json
import os
import pickle
import pickletools
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CASES, GOLDEN, Case
from safetensors.torch import save_file

from checkpoint.bert import Bert, describe_bert, load_bert
from checkpoint.checkpoint import (
    bert_of,
    build_model,
    load_model,
    read_checkpoint,
    write_checkpoint,
)
from common.config import ModelConfig
from common.errors import InputError
from evaluation import score_split
from model import DIME

BERT = GOLDEN / "i2t/bert"
PUBLISHED = GOLDEN / "i2t/checkpoint.pth.tar"
WEIGHTS = "pytorch_model.bin"


def read(path: Path) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def scores(model: DIME, bert: Bert, case: Case) -> np.ndarray:
    device = torch.device("cpu")
    return score_split(model, case.split(), bert.vocabulary, device=device)


# BERT folders


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BERT, tmp_path / "bert"))


def rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    torch.save(change(read(folder / WEIGHTS)), folder / WEIGHTS)


def old_names(weights: dict) -> dict:
    renamed = {}
    for key, value in weights.items():
        key = key.replace("LayerNorm.weight", "LayerNorm.gamma")
        renamed["bert." + key.replace("LayerNorm.bias", "LayerNorm.beta")] = value
    more = {"cls.predictions.bias": torch.zeros(3), "bert.embeddings.position_ids": torch.arange(9)}
    return renamed | more


def safetensors(folder: Path) -> None:
    weights = {key: value.contiguous() for key, value in read(folder / WEIGHTS).items()}
    save_file(weights, folder / "model.safetensors")
    (folder / WEIGHTS).unlink()
    (folder / "bert_config.json").rename(folder / "config.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: rewrite(folder, old_names),
        lambda folder: rewrite(folder, lambda w: dict(reversed(w.items()))),
        lambda folder: rewrite(folder, lambda w: {k: v.double() for k, v in w.items()}),
        lambda folder: rewrite(folder, lambda w: {k: torch.nn.Parameter(v) for k, v in w.items()}),
        safetensors,
    ],
    ids=["old names", "other order", "doubles", "parameters", "safetensors"],
)
def test_one_bert_in_any_files_has_one_fingerprint(
    bert_folder: Path, change: Callable[[Path], None]
) -> None:
    change(bert_folder)
    found, expected = load_bert(bert_folder), load_bert(BERT)
    assert found.fingerprint == expected.fingerprint
    ids, mask = torch.tensor([[2, 7, 3, 0]]), torch.tensor([[1, 1, 1, 0]])
    states = [bert.model.eval()(ids, mask).last_hidden_state for bert in (found, expected)]
    assert torch.equal(*states)


def another_weight(folder: Path) -> None:
    def change(weights: dict) -> dict:
        weights["encoder.layer.1.output.dense.bias"][0] += 1e-6
        return weights

    rewrite(folder, change)


def another_word(folder: Path) -> None:
    path = folder / "vocab.txt"
    path.write_text(path.read_text().replace("\ndog\n", "\ndogs\n"))


@pytest.mark.parametrize("change", [another_weight, another_word])
def test_another_bert_has_another_fingerprint(
    bert_folder: Path, change: Callable[[Path], None]
) -> None:
    change(bert_folder)
    assert load_bert(bert_folder).fingerprint != load_bert(BERT).fingerprint


def without(key: str) -> Callable[[dict], dict]:
    return lambda weights: {k: v for k, v in weights.items() if k != key}


def configure(folder: Path, **options: object) -> None:
    path = folder / "bert_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


QUERY = "encoder.layer.0.attention.self.query.weight"
BAD_BERTS = {
    "no vocabulary": (lambda f: (f / "vocab.txt").unlink(), "vocab.txt: not found"),
    "no configuration": (lambda f: (f / "bert_config.json").unlink(), "no bert_config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no pytorch_model.bin"),
    "missing key": (lambda f: rewrite(f, without(QUERY)), QUERY),
    "surplus key": (lambda f: rewrite(f, lambda w: w | {"a.b": torch.zeros(1)}), "a.b"),
    "integers": (lambda f: rewrite(f, lambda w: w | {QUERY: w[QUERY].int()}), "int32"),
    "meta": (
        lambda f: rewrite(f, lambda w: w | {QUERY: w[QUERY].to("meta")}),
        "which is not executed",
    ),
    "two names": (lambda f: rewrite(f, lambda w: w | {"bert." + QUERY: w[QUERY]}), "twice"),
    "shape": (lambda f: rewrite(f, lambda w: w | {QUERY: torch.zeros(3, 4)}), "[3, 4]"),
    "fewer words": (
        lambda f: (f / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n"),
        "4 entries",
    ),
    "other size": (lambda f: configure(f, vocab_size=54), "vocab_size 54"),
    "many layers": (lambda f: configure(f, num_hidden_layers=5000), "5000 layers; expected 100"),
    "other layers": (lambda f: configure(f, num_hidden_layers=3), "holds 2 layers, its"),
    "no heads": (lambda f: configure(f, num_attention_heads=None), "lacks num_attention_heads"),
    "negative": (lambda f: configure(f, hidden_size=-24), "hidden_size is -24"),
    "heads": (lambda f: configure(f, num_attention_heads=5), "5 attention heads"),
    "activation": (lambda f: configure(f, hidden_act="relu"), "hidden_act is 'relu'"),
    "no BERT": (lambda f: configure(f, model_type="roberta"), "roberta"),
    "no JSON": (lambda f: (f / "bert_config.json").write_text("{"), "not JSON"),
    "a list": (lambda f: (f / "bert_config.json").write_text("[]"), "JSON object"),
    "truncated": (lambda f: os.truncate(f / WEIGHTS, 9999), "truncated"),
    "no dictionary": (lambda f: torch.save([1], f / WEIGHTS), "dictionary"),
    "no folder": (shutil.rmtree, "no such folder"),
    "bad safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "safetensors"),
}


@pytest.mark.parametrize("fault", BAD_BERTS)
def test_bad_berts_are_named(bert_folder: Path, fault: str) -> None:
    change, said = BAD_BERTS[fault]
    change(bert_folder)
    with pytest.raises(InputError, match="bert") as error:
        load_bert(bert_folder)
    assert said in str(error.value)


# Published checkpoints


def python2(data: bytes) -> bytes:
    """A non-zip torch file with the byte strings of Python 2: its five pickles, then raw data."""
    source, written = io.BytesIO(data), io.BytesIO()
    for _ in range(5):
        start = source.tell()
        ops = list(pickletools.genops(source))
        stops = [position for _, _, position in ops[1:]] + [source.tell()]
        for (op, argument, position), stop in zip(ops, stops, strict=True):
            text = argument.encode() if op.name == "BINUNICODE" else b""
            if op.name == "BINUNICODE" and len(text) < 256:
                written.write(pickle.SHORT_BINSTRING + bytes([len(text)]) + text)
            else:
                written.write(data[position:stop])
        assert start < source.tell()
    return written.getvalue() + source.read()


def rename_norms(content: dict) -> dict:
    text = content["model"][1]
    for key in [key for key in text if "LayerNorm" in key]:
        name = key.replace("LayerNorm.weight", "LayerNorm.gamma")
        text[name.replace("LayerNorm.bias", "LayerNorm.beta")] = text.pop(key)
    return content


@pytest.mark.parametrize("case", CASES[:2], indirect=True)
def test_python_2_and_old_names_are_read(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "old.pth.tar"
    content = rename_norms(read(case.model_path))
    torch.save(content, path, _use_new_zipfile_serialization=False, pickle_protocol=2)
    old = python2(path.read_bytes())
    assert old != path.read_bytes() and b"LayerNorm.gamma" in old
    path.write_bytes(old)
    checkpoint = read_checkpoint(path)
    assert checkpoint.options == read_checkpoint(case.model_path).options
    bert = bert_of(checkpoint, case.bert_path)
    found = scores(build_model(checkpoint, bert), bert, case)
    np.testing.assert_allclose(found, case.expected("eval")["sims"], rtol=0, atol=1e-5)


def test_the_checkpoints_bert_is_used_and_the_folder_gives_the_rest(bert_folder: Path) -> None:
    (bert_folder / WEIGHTS).unlink()
    bert = bert_of(read_checkpoint(PUBLISHED), bert_folder)
    assert bert.fingerprint == load_bert(BERT).fingerprint


def test_options_that_are_not_there_have_their_defaults(tmp_path: Path) -> None:
    content = read(PUBLISHED)
    for name in ("raw_feature_norm_CMRC", "use_abs", "lambda_softmax_CMRC"):
        delattr(content["opt"], name)
    content["opt"].something_else = [1, 2]
    torch.save(content, tmp_path / "model.pth.tar")
    config = read_checkpoint(tmp_path / "model.pth.tar").config
    assert config.raw_feature_norm_CMRC == "clipped_l2norm" and config.lambda_softmax_CMRC == 4.0
    assert not config.use_abs and config.embed_size == 16


class Evil:
    """What unpickles by making a folder, or by evaluating an expression that makes one."""

    def __init__(self, expression: bool = False) -> None:
        self.expression = expression

    def __reduce__(self) -> tuple:
        if self.expression:
            return eval, ("__import__('os').mkdir('executed')",)
        return os.mkdir, ("executed",)


def part(index: int, change: Callable[[dict], object]) -> Callable[[dict], dict]:
    def changed(content: dict) -> dict:
        change(content["model"][index])
        return content

    return changed


def option(name: str, value: object) -> Callable[[dict], dict]:
    def changed(content: dict) -> dict:
        setattr(content["opt"], name, value)
        return content

    return changed


CONV, QUERY_2 = "convs1.1.weight", "dynamic_itr_l1.imrc.sa.att_layer.linears.1.weight"
GUIDE = "dynamic_itr_l1.glgc.fc_1.weight"


def laughs() -> list:
    """A list whose text would fill any memory."""
    found: list = ["ha"]
    for _ in range(60):
        found = [found, found]
    return found


BAD_CHECKPOINTS = {
    "a list for an option": (option("embed_size", laughs()), "option embed_size is list"),
    "a list for a path": (option("data_path", laughs()), "option data_path is list"),
    "no text": (option("bert_path", "a\0b"), "bert_path is a text that cannot be printed"),
    "no number": (option("lambda_softmax_CMRC", float("nan")), "nan; expected a finite number"),
    "no float": (option("lambda_softmax_CMRC", 10**400), "expected a finite number"),
    "code": (lambda c: c | {"epoch": Evil()}, "asks for code, posix.mkdir"),
    "an expression": (lambda c: c | {"epoch": Evil(True)}, "eval, which is not executed"),
    "code in opt": (option("x", Evil()), "asks for code, posix.mkdir"),
    "missing": (part(2, lambda p: p.pop(GUIDE)), GUIDE),
    "surplus": (part(0, lambda p: p.update(more=torch.zeros(2))), "img_enc/more"),
    "no tensor": (part(2, lambda p: p.update({GUIDE: 3})), GUIDE),
    "other shape": (part(0, lambda p: p.update({"fc.weight": torch.zeros(3, 4)})), "image.fc"),
    "other width": (option("embed_size", 32), "image.fc"),
    "wrong type": (option("embed_size", "16"), "embed_size is '16'"),
    "wrong choice": (option("raw_feature_norm_CMRC", "l3norm"), "l3norm"),
    "wrong direction": (option("direction", "both"), "both"),
    "no size": (option("embed_size", 0), "model.pth.tar: --embed_size 0"),
    "flat convolution": (part(1, lambda p: p.update({CONV: torch.zeros(3)})), CONV),
    "other widths": (part(2, lambda p: p.update({QUERY_2: torch.zeros(3, 4)})), QUERY_2),
    "BERT no tensor": (part(1, lambda p: p.update({"bert.x": "y"})), "'bert.x' is str"),
    "two parts": (lambda c: c | {"model": c["model"][:2]}, "three state dicts"),
    "no options": (lambda c: {k: v for k, v in c.items() if k != "opt"}, "neither"),
    "a list": (lambda c: [c], "list"),
    "BERT key": (part(1, lambda p: p.pop("bert.embeddings.LayerNorm.bias")), "LayerNorm.bias"),
}


@pytest.mark.parametrize("fault", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_named_and_nothing_is_executed(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change, said = BAD_CHECKPOINTS[fault]
    path = tmp_path / "model.pth.tar"
    torch.save(change(read(PUBLISHED)), path)
    with pytest.raises(InputError, match=r"model\.pth\.tar|bert") as error:
        load_model(path, BERT)
    assert said in str(error.value)
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("length", [0, 1, 100, 5000, 150_000])
def test_a_truncated_checkpoint(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.pth.tar"
    path.write_bytes(PUBLISHED.read_bytes()[:length])
    with pytest.raises(InputError, match=r"model\.pth\.tar: truncated or no checkpoint"):
        load_model(path, BERT)


def test_a_plain_pickle_that_asks_for_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pth.tar"
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(InputError, match=r"model\.pth\.tar: asks for code, posix\.mkdir, which is"):
        load_model(path, BERT)
    assert sorted(tmp_path.iterdir()) == [path]


def test_no_advice_to_execute_a_file_is_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "model.pth.tar"
    for data in (b"", b"text", pickle.dumps([1, {2, 3}], protocol=2), PUBLISHED.read_bytes()[:999]):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"model\.pth\.tar: ") as error:
            load_model(path, BERT)
        assert "weights_only" not in str(error.value)


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Is a directory; expected a file that torch wrote"):
        load_model(tmp_path, BERT)


# Own checkpoints


@pytest.fixture
def own(tmp_path: Path, case: Case) -> Path:
    model, bert, checkpoint = case.load()
    options = asdict(checkpoint.config) | {"bert_path": str(case.bert_path)}
    write_checkpoint(tmp_path / "own.pth.tar", model, options, bert, epoch=3, step=77)
    return tmp_path / "own.pth.tar"


def test_an_own_checkpoint_is_plain_data_without_bert(own: Path, case: Case) -> None:
    content = torch.load(own, weights_only=True)  # with nothing allowed but plain data
    assert content["options"]["embed_size"] == case.load()[0].config.embed_size
    assert content["epoch"] == 3 and content["step"] == 77
    assert not any("bert." in name for name in content["weights"])
    found = load_model(own)
    bert = load_bert(case.bert_path)
    expected = case.expected("eval")["sims"]
    np.testing.assert_allclose(scores(found, bert, case), expected, rtol=0, atol=1e-5)
    assert not found.training and isinstance(found.config, ModelConfig)


@pytest.mark.parametrize("case", CASES[:1], indirect=True)
def test_a_checkpoint_without_its_checksum_is_read_with_a_warning(
    own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_model(own)
    assert "checksum" not in caplog.text
    torch.save(torch.load(own, weights_only=True), own)
    load_model(own)
    assert "own.pth.tar: carries no checksum" in caplog.text


@pytest.mark.parametrize("case", CASES[:1], indirect=True)
def test_evaluation_with_another_bert_is_refused(own: Path, bert_folder: Path) -> None:
    another_weight(bert_folder)
    with pytest.raises(InputError, match=r"own\.pth\.tar: was trained with another BERT"):
        load_model(own, bert_folder)


@pytest.mark.parametrize("case", CASES[:1], indirect=True)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": [1]}, "options are no dictionary"),
        ({"weights": {"image.fc.weight": "x"}}, "'image.fc.weight' is str"),
        ({"bert": None}, "fingerprint is no text"),
        ({"weights": {}}, "lacks image.fc.bias, image.fc.weight, "),
        ({"format": "dime-9"}, "neither a checkpoint of this project (dime-1)"),
    ],
)
def test_own_checkpoints_of_another_kind(own: Path, change: dict, said: str) -> None:
    torch.save(torch.load(own, weights_only=True) | change, own)
    with pytest.raises(InputError, match=r"own\.pth\.tar: ") as error:
        load_model(own)
    assert said in str(error.value)


@pytest.mark.parametrize("case", CASES[:1], indirect=True)
def test_more_words_than_bert_can_read(own: Path) -> None:
    content = torch.load(own, weights_only=True)
    content["options"]["max_words"] = 65
    torch.save(content, own)
    with pytest.raises(
        InputError, match=r"own\.pth\.tar: --max_words 65: this BERT reads 64 at most"
    ):
        load_model(own)


def test_weights_that_share_their_numbers_do_not_multiply(tmp_path: Path) -> None:
    """A megabyte of names for one array would take gigabytes in float32."""
    shutil.copytree(GOLDEN / "i2t/bert", tmp_path / "bert")
    shared = torch.zeros(2**16, dtype=torch.float16)
    torch.save({f"x{i}": shared for i in range(60)}, tmp_path / "bert/pytorch_model.bin")
    with pytest.raises(InputError, match=r"bytes of weights in a file of"):
        load_bert(tmp_path / "bert")


@pytest.mark.parametrize("name", ["a" * 300, "loop"])
def test_a_folder_that_no_system_call_takes_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="no such folder"):
        load_bert(tmp_path / name)


def test_a_bert_folder_is_described(bert_folder: Path) -> None:
    text = "\n".join(describe_bert(bert_folder))
    for fact in (WEIGHTS, "vocab.txt", "2 layers", load_bert(BERT).fingerprint, "uncased"):
        assert fact in text
    path = bert_folder / "vocab.txt"
    entries = path.read_text().split("\n")
    path.write_text("\n".join([*entries[:10], *(entry.upper() for entry in entries[10:])]))
    assert "uncased (" not in "\n".join(describe_bert(bert_folder))
