"""checkpoint.py and bert.py: native and official checkpoints, BERT folders, and refused files."""

import io
import json
import pickle
import pickletools
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CASES, GOLDEN, Case, same
from safetensors.torch import save_file

from checkpoint.bert import Bert, describe_bert, load_bert
from checkpoint.checkpoint import (
    bert_of,
    build_model,
    load_model,
    read_checkpoint,
    write_checkpoint,
)
from common.errors import InputError
from common.torch_files import read_torch
from evaluation import score_split
from model import DIME
from scripts.parts.lite2 import SHA256

BERT = GOLDEN / "i2t/bert"
OFFICIAL = GOLDEN / "i2t/checkpoint.pth.tar"
WEIGHTS = "pytorch_model.bin"
# Checkpoints hold fingerprints, results/models too: this one stays what it is.
FINGERPRINT = "5d763cd8f18bd0389223194b1e8eb586a39a6a00f78fca560ed22694133dfde4"


def check_scores(model: DIME, bert: Bert, case: Case) -> None:
    """Compare with the scores of the published model."""
    actual = score_split(model, case.split(), bert.vocabulary, device=torch.device("cpu"))
    np.testing.assert_allclose(actual, case.expected("eval")["sims"], rtol=0, atol=1e-5)


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BERT, tmp_path / "bert"))


def rewrite(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    return lambda folder: torch.save(change(read_torch(folder / WEIGHTS)), folder / WEIGHTS)


def old_norms(weights: dict) -> dict:
    new, old = ("LayerNorm.weight", "LayerNorm.bias"), ("LayerNorm.gamma", "LayerNorm.beta")
    return {k.replace(new[0], old[0]).replace(new[1], old[1]): v for k, v in weights.items()}


def old_names(weights: dict) -> dict:
    more = {"cls.predictions.bias": torch.zeros(3), "bert.embeddings.position_ids": torch.arange(9)}
    return {f"bert.{key}": value for key, value in old_norms(weights).items()} | more


def safetensors(folder: Path) -> None:
    save_file(read_torch(folder / WEIGHTS), folder / "model.safetensors")
    (folder / WEIGHTS).unlink()
    (folder / "bert_config.json").rename(folder / "config.json")


@pytest.mark.parametrize(
    "change",
    [
        rewrite(old_names),
        rewrite(lambda w: dict(reversed(w.items()))),
        rewrite(lambda w: {k: v.double() for k, v in w.items()}),
        safetensors,
    ],
    ids=["old names", "other order", "doubles", "safetensors"],
)
def test_one_bert_in_any_files_has_one_fingerprint(
    bert_folder: Path, change: Callable[[Path], None]
) -> None:
    change(bert_folder)
    bert, expected = load_bert(bert_folder), load_bert(BERT)
    assert bert.fingerprint == expected.fingerprint == FINGERPRINT
    assert same(dict(bert.model.state_dict()), dict(expected.model.state_dict()))


def another_weight(weights: dict) -> dict:
    weights["encoder.layer.1.output.dense.bias"][0] += 1e-6
    return weights


def another_word(folder: Path) -> None:
    path = folder / "vocab.txt"
    path.write_text(path.read_text().replace("\ndog\n", "\ndogs\n"))


@pytest.mark.parametrize("change", [rewrite(another_weight), another_word])
def test_another_bert_has_another_fingerprint(
    bert_folder: Path, change: Callable[[Path], None]
) -> None:
    change(bert_folder)
    assert load_bert(bert_folder).fingerprint != load_bert(BERT).fingerprint


def one_more_word(folder: Path) -> None:
    path = folder / "vocab.txt"
    path.write_text(path.read_text().rstrip("\n") + "\nmore\n")


def configure(**options: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "bert_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | options))

    return change


def disagree(folder: Path) -> None:
    configuration = json.loads((folder / "bert_config.json").read_text())
    (folder / "config.json").write_text(json.dumps(configuration | {"num_attention_heads": 1}))


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def replace_file(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


QUERY = "encoder.layer.0.attention.self.query.weight"
BAD_BERTS = {
    "no vocabulary": (remove("vocab.txt"), "vocab.txt"),
    "no configuration": (remove("bert_config.json"), "bert_config.json"),
    "no weights": (remove(WEIGHTS), WEIGHTS),
    "missing": (rewrite(lambda w: {k: v for k, v in w.items() if k != QUERY}), QUERY),
    "surplus": (rewrite(lambda w: w | {"a.b": torch.zeros(1)}), "a.b"),
    "integers": (rewrite(lambda w: w | {QUERY: w[QUERY].int()}), "int32"),
    "meta": (rewrite(lambda w: w | {QUERY: w[QUERY].to("meta")}), WEIGHTS),
    "two names": (rewrite(lambda w: w | {"bert." + QUERY: w[QUERY]}), QUERY),
    "shape": (rewrite(lambda w: w | {QUERY: torch.zeros(3, 4)}), "[3, 4]"),
    "NaN": (rewrite(lambda w: w | {QUERY: w[QUERY] * torch.nan}), QUERY),
    "more words": (one_more_word, "56 entries"),
    "other layers": (configure(num_hidden_layers=3), "layers are [55, 24, 2]"),
    "negative": (configure(hidden_size=-24), "hidden_size"),
    "heads": (configure(num_attention_heads=5), "5 heads"),
    "two configurations": (disagree, "num_attention_heads 1"),
    "activation": (configure(hidden_act="relu"), "relu"),
    "no BERT": (configure(model_type="roberta"), "roberta"),
    "decoder": (configure(is_decoder=True), "is_decoder"),
    "positions": (configure(position_embedding_type="relative_key"), "relative_key"),
    "tokeniser": (configure(tokenizer_class="BertJapaneseTokenizer"), "BertJapaneseTokenizer"),
    "too many words": (configure(vocab_size=2**20 + 1), "vocab_size is 1048577"),
    "no dictionary": (lambda folder: torch.save([1], folder / WEIGHTS), "dictionary"),
    "no folder": (shutil.rmtree, "no such folder"),
    "bad safetensors": (replace_file("model.safetensors", b"x" * 99), "model.safetensors"),
}


@pytest.mark.parametrize("problem", BAD_BERTS)
def test_bad_berts_are_refused_by_name(bert_folder: Path, problem: str) -> None:
    change, fact = BAD_BERTS[problem]
    change(bert_folder)
    with pytest.raises(InputError, match="bert") as error:
        load_bert(bert_folder)
    assert fact in str(error.value)


def test_loading_bert_needs_no_network(bert_folder: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(socket, "socket", lambda *args, **more: pytest.fail("asks the network"))
    load_bert(bert_folder)
    assert capfd.readouterr() == ("", "")


def test_a_bert_folder_is_described(bert_folder: Path) -> None:
    text = "\n".join(describe_bert(bert_folder))
    for fact in (WEIGHTS, "vocab.txt", "2 layers", load_bert(BERT).fingerprint, "uncased"):
        assert fact in text
    path = bert_folder / "vocab.txt"
    entries = path.read_text().split("\n")
    path.write_text("\n".join([*entries[:10], *(entry.upper() for entry in entries[10:])]))
    assert "uncased (" not in "\n".join(describe_bert(bert_folder))


def python2(data: bytes) -> bytes:
    """A non-zip torch file with the byte strings of Python 2: its five pickles, then raw data."""
    source, written = io.BytesIO(data), io.BytesIO()
    for _ in range(5):
        ops = list(pickletools.genops(source))
        stops = [position for _, _, position in ops[1:]] + [source.tell()]
        for (op, argument, position), stop in zip(ops, stops, strict=True):
            text = argument.encode() if op.name == "BINUNICODE" else b""
            if op.name == "BINUNICODE" and len(text) < 256:
                written.write(pickle.SHORT_BINSTRING + bytes([len(text)]) + text)
            else:
                written.write(data[position:stop])
    return written.getvalue() + source.read()


@pytest.mark.parametrize("case", CASES[:2], indirect=True)
def test_python_2_and_old_names_are_read(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "old.pth.tar"
    content = read_torch(case.model_path)
    content["model"][1] = old_norms(content["model"][1])
    torch.save(content, path, _use_new_zipfile_serialization=False, pickle_protocol=2)
    old = python2(path.read_bytes())
    assert old != path.read_bytes() and b"LayerNorm.gamma" in old
    path.write_bytes(old)
    checkpoint = read_checkpoint(path)
    assert checkpoint.options == read_checkpoint(case.model_path).options
    bert = bert_of(checkpoint, case.bert_path)
    check_scores(build_model(checkpoint, bert), bert, case)


def test_an_official_checkpoint_brings_its_bert(bert_folder: Path) -> None:
    (bert_folder / WEIGHTS).unlink()
    bert = bert_of(read_checkpoint(OFFICIAL), bert_folder)
    assert bert.fingerprint == load_bert(BERT).fingerprint


def test_missing_options_have_their_defaults(tmp_path: Path) -> None:
    content = read_torch(OFFICIAL)
    for name in ("raw_feature_norm_CMRC", "use_abs", "lambda_softmax_CMRC"):
        delattr(content["opt"], name)
    content["opt"].something_else = [1, 2]
    torch.save(content, tmp_path / "model.pth.tar")
    config = read_checkpoint(tmp_path / "model.pth.tar").config
    assert config.raw_feature_norm_CMRC == "clipped_l2norm" and config.lambda_softmax_CMRC == 4.0
    assert not config.use_abs and config.embed_size == 16


def part(index: int, change: Callable[[dict], object]) -> Callable[[dict], object]:
    return lambda content: change(content["model"][index])


def option(name: str, value: object) -> Callable[[dict], object]:
    return lambda content: setattr(content["opt"], name, value)


CONV, QUERY_2 = "convs1.1.weight", "dynamic_itr_l1.imrc.sa.att_layer.linears.1.weight"
GUIDE = "dynamic_itr_l1.glgc.fc_1.weight"
BAD_CHECKPOINTS = {
    "a list for an option": (option("embed_size", [3]), "embed_size"),
    "no number": (option("lambda_softmax_CMRC", float("nan")), "lambda_softmax_CMRC"),
    "no float": (option("lambda_softmax_CMRC", 10**400), "lambda_softmax_CMRC"),
    "missing": (part(2, lambda p: p.pop(GUIDE)), GUIDE),
    "surplus": (part(0, lambda p: p.update(more=torch.zeros(2))), "img_enc/more"),
    "NaN": (part(0, lambda p: p["fc.bias"].fill_(torch.nan)), "image.fc.bias"),
    "no tensor": (part(2, lambda p: p.update({GUIDE: 3})), GUIDE),
    "other shape": (part(0, lambda p: p.update({"fc.weight": torch.zeros(3, 4)})), "image.fc"),
    "wrong type": (option("embed_size", "16"), "embed_size"),
    "wrong choice": (option("raw_feature_norm_CMRC", "l3norm"), "l3norm"),
    "no size": (option("embed_size", 0), "embed_size"),
    "flat convolution": (part(1, lambda p: p.update({CONV: torch.zeros(3)})), CONV),
    "other widths": (part(2, lambda p: p.update({QUERY_2: torch.zeros(3, 4)})), QUERY_2),
    "BERT key": (part(1, lambda p: p.pop("bert.embeddings.LayerNorm.bias")), "LayerNorm.bias"),
    "two parts": (lambda c: c["model"].pop(), "three state dicts"),
    "no options": (lambda c: c.pop("opt"), "neither"),
}


@pytest.mark.parametrize("problem", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_refused_by_name(tmp_path: Path, problem: str) -> None:
    change, fact = BAD_CHECKPOINTS[problem]
    content, path = read_torch(OFFICIAL), tmp_path / "model.pth.tar"
    change(content)
    torch.save(content, path)
    with pytest.raises(InputError, match=r"model\.pth\.tar|bert") as error:
        load_model(path, BERT)
    assert fact in str(error.value)


@pytest.fixture
def native(tmp_path: Path, case: Case) -> Path:
    model, bert, checkpoint = case.load()
    options = asdict(checkpoint.config) | {"bert_path": str(case.bert_path)}
    write_checkpoint(tmp_path / "native.pth.tar", model, options, bert, epoch=3, step=77)
    return tmp_path / "native.pth.tar"


def test_a_native_checkpoint_is_plain_data_without_bert(native: Path, case: Case) -> None:
    content = torch.load(native, weights_only=True)  # which allows nothing but plain data
    assert content["options"]["embed_size"] == case.load()[0].config.embed_size
    assert content["epoch"] == 3 and content["step"] == 77
    assert not any("bert." in name for name in content["weights"])
    model = load_model(native)
    check_scores(model, load_bert(case.bert_path), case)
    assert not model.training


@pytest.mark.parametrize("case", CASES[:1], indirect=True)
def test_another_bert_is_refused(native: Path, bert_folder: Path) -> None:
    rewrite(another_weight)(bert_folder)
    with pytest.raises(InputError, match=r"native\.pth\.tar: .*another BERT"):
        load_model(native, bert_folder)


@pytest.mark.parametrize("case", CASES[:1], indirect=True)
@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"options": [1]}, "options"),
        ({"options": {"max_words": 65}}, "this BERT reads 64"),
        ({"weights": {"image.fc.weight": "x"}}, "image.fc.weight"),
        ({"bert": None}, "fingerprint"),
        ({"weights": {}}, "image.fc.weight"),
        ({"format": "dime-9"}, "dime-1"),
    ],
)
def test_bad_native_checkpoints_are_refused_by_name(native: Path, change: dict, fact: str) -> None:
    content = torch.load(native, weights_only=True)
    if isinstance(change.get("options"), dict):
        change = {"options": content["options"] | change["options"]}
    torch.save(content | change, native)
    with pytest.raises(InputError, match=r"native\.pth\.tar: ") as error:
        load_model(native)
    assert fact in str(error.value)


def test_the_models_in_results_load() -> None:
    folder = GOLDEN.parent.parent / "results/models"
    for path in sorted(folder.glob("*.safetensors")):
        checkpoint = read_checkpoint(path)
        backbone = checkpoint.backbone or {}
        assert backbone["model"] == "efficientnet_lite2"
        assert backbone["weights"].startswith(SHA256)
        is_half = any(tensor.dtype == torch.float16 for tensor in checkpoint.weights.values())
        assert checkpoint.config.embed_size == 256
        assert (checkpoint.metrics is None) == is_half  # those of the whole weights
