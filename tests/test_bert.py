"""Folders of BERT as other programs leave them: their files, names, and reading of captions."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, run_here, tiny_train
from safetensors.torch import save_file

import evaluate_models
from checkpoint.bert import describe_bert, load_bert, write_bert
from checkpoint.bert_files import bert_files
from checkpoint.checkpoint import (
    bert_of,
    bert_to_train_with,
    build_model,
    read_checkpoint,
    write_checkpoint,
)
from common.errors import InputError
from common.torch_files import read_torch
from scripts import convert_checkpoint
from training.resume import NEWEST
from training.text_cache import cache_text
from vocab import Tokenization

BERT, OFFICIAL = GOLDEN / "i2t/bert", GOLDEN / "i2t/checkpoint.pth.tar"
WEIGHTS, FLAGS = "pytorch_model.bin", "tokenizer_config.json"
CASED = Tokenization(False, False, True, published=False)
SAYS_CASED = {"do_lower_case": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BERT, tmp_path / "bert"))


def put(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("words", "flag", "read"),
    [
        (["Man", "Dog"], {"do_lower_case": False}, "case kept"),
        (["müller", "개"], {"strip_accents": False}, "accents kept"),
        (list("漢字犬中国"), {"tokenize_chinese_chars": True}, "Chinese characters split"),
    ],
)
def test_a_vocabulary_that_captions_are_not_read_for_is_named(
    folder: Path, words: list[str], flag: dict, read: str, caplog: pytest.LogCaptureFixture
) -> None:
    def described() -> str:
        return "\n".join(describe_bert(folder))

    lines = (folder / "vocab.txt").read_text().split("\n")
    assert "uncased" in described() and json.dumps(flag) not in described()
    (folder / "vocab.txt").write_text("\n".join([*lines[: 55 - len(words)], *words]))
    bert_to_train_with(folder, None)
    assert json.dumps(flag) in caplog.text and json.dumps(flag) in described()
    caplog.clear()
    put(folder / FLAGS, flag)
    assert read in described() and json.dumps(flag) not in described()
    bert_to_train_with(folder, None)
    assert not caplog.records


@pytest.mark.parametrize("count", [55, 50])  # the last embeddings may have no word
def test_a_tokenizer_json_stands_for_vocab_txt(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    caplog.set_level(logging.INFO)
    entries = (folder / "vocab.txt").read_text().split()[:count]
    (folder / "vocab.txt").write_text("\n".join(entries))
    put(folder / "tokenizer.json", {"model": {"vocab": {"[PAD]": 0, "other": 1}}})
    expected = load_bert(folder)  # with vocab.txt, the other one's words are not used
    assert "tokenizer.json: has other ids" in caplog.text
    caplog.clear()
    (folder / "vocab.txt").unlink()
    vocabulary = {entry: i for i, entry in reversed(list(enumerate(entries)))}
    put(folder / "tokenizer.json", {"model": {"vocab": vocabulary}})
    assert "tokenizer.json" in "\n".join(describe_bert(folder))
    bert = load_bert(folder)
    assert bert.fingerprint == expected.fingerprint
    assert bert.vocabulary == replace(expected.vocabulary, path=folder / "tokenizer.json")
    write_bert(tmp_path / "new", bert)
    assert load_bert(tmp_path / "new").fingerprint == expected.fingerprint
    for record in caplog.records:
        assert "50" in record.getMessage() and "55" in record.getMessage()
    assert bool(caplog.records) == (count < 55)  # and no warning of other ids


# Checkpoints keep the tokenisation of their training


def native(folder: Path, path: Path) -> Path:
    """Write a checkpoint that was trained with the BERT in a folder."""
    checkpoint, bert = read_checkpoint(OFFICIAL), load_bert(folder)
    model = build_model(checkpoint, bert)
    options = asdict(checkpoint.config) | {"bert_path": str(folder)}
    write_checkpoint(path, model, options, bert)
    return path


def test_a_checkpoint_keeps_its_tokenization(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder / FLAGS, SAYS_CASED)
    trained = native(folder, tmp_path / "a.pth.tar")
    assert bert_of(read_checkpoint(trained)).vocabulary.tokenization == CASED
    (folder / FLAGS).unlink()
    arrays = tmp_path / "b.safetensors"
    for source, out in ((trained, arrays), (arrays, tmp_path / "c.pth.tar")):
        arguments = ["--checkpoint", source, "--out", out]
        assert run_here(monkeypatch, convert_checkpoint.main, arguments) == 0
    for path in (trained, arrays, tmp_path / "c.pth.tar"):
        caplog.clear()
        checkpoint = read_checkpoint(path)
        bert = bert_of(checkpoint)
        assert bert.vocabulary.tokenization == CASED
        assert bert_to_train_with(folder, checkpoint).vocabulary.tokenization == CASED
        for record in caplog.records:
            assert record.levelname == "WARNING" and str(folder) in record.getMessage()
            assert "case kept" in record.getMessage() and "lower case" in record.getMessage()
        assert len(caplog.records) == 2


@pytest.mark.parametrize("kind", ["official", "older native"])
def test_a_checkpoint_that_says_nothing_was_trained_with_the_uncased_tokeniser(
    kind: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = OFFICIAL
    if kind == "older native":
        path = native(folder, tmp_path / "a.pth.tar")
        content = read_torch(path)
        del content["tokenization"]
        torch.save(content, path)
    checkpoint = read_checkpoint(path)
    assert bert_of(checkpoint, folder).vocabulary.tokenization == Tokenization()
    assert not caplog.records
    put(folder / FLAGS, SAYS_CASED)
    assert bert_of(checkpoint, folder).vocabulary.tokenization == Tokenization()
    (record,) = caplog.records
    assert str(folder) in record.getMessage() and "case kept" in record.getMessage()


def test_a_resumed_run_keeps_its_tokenization(
    tiny: Path,
    run_train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def warnings() -> list[str]:
        messages = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        caplog.clear()
        return messages

    put(tiny / "bert" / FLAGS, SAYS_CASED)
    assert run_train(*tiny_train(tiny), "--max_steps", "1") == 0
    assert warnings() == []
    (tiny / "bert" / FLAGS).unlink()
    assert run_train(*tiny_train(tiny), "--max_steps", "2", "--resume", "auto") == 0
    (of_training,) = warnings()
    checkpoint = read_checkpoint(tiny / "runs/i2t" / NEWEST)
    assert checkpoint.tokenization == CASED and checkpoint.state["step"] == 2
    models = ["--model_path", checkpoint.path]
    assert run_here(monkeypatch, evaluate_models.main, models) == 0
    assert "; 0 of 50 captions" in caplog.text and not warnings()
    captions = tiny / "data/tiny/test_caps.txt"
    captions.write_text("A Man\n" + captions.read_text().split("\n", 1)[1])
    assert run_here(monkeypatch, evaluate_models.main, models) == 0
    (of_evaluation,) = warnings()
    assert "; 1 of 50 captions" in of_evaluation
    begun = ["--init", str(checkpoint.path), "--logger_name", str(tiny / "more")]
    assert run_train(*tiny_train(tiny), *begun, "--max_steps", "1") == 0
    (of_new_run,) = warnings()
    assert read_checkpoint(tiny / "more/i2t" / NEWEST).tokenization == CASED
    for message in (of_training, of_evaluation, of_new_run):
        assert str(tiny / "bert") in message and "case kept" in message


@pytest.mark.parametrize("value", [[], {1: True, "a": True}, asdict(CASED) | {"published": 0}])
def test_a_bad_tokenization_is_refused(folder: Path, tmp_path: Path, value: Any) -> None:
    path = native(folder, tmp_path / "a.pth.tar")
    torch.save(read_torch(path) | {"tokenization": value}, path)
    with pytest.raises(InputError, match=r"a\.pth\.tar: tokenization"):
        read_checkpoint(path)


def test_tokenization_is_no_part_of_the_fingerprint_but_of_cached_states(
    folder: Path, tmp_path: Path
) -> None:
    bert = load_bert(folder)
    put(folder / FLAGS, SAYS_CASED)
    cased = load_bert(folder)
    assert cased.fingerprint == bert.fingerprint
    encoder = build_model(read_checkpoint(OFFICIAL), bert).text
    names = [cache_text(tmp_path, encoder, b, ["A man"], 6) for b in (bert, cased, bert)]
    assert names[0] == names[2] != names[1]


# Weights


def shard(folder: Path, end: str) -> Path:
    """Replace the weights by two shards and their index, whose path is returned."""
    weights = read_torch(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save = save_file if end == ".safetensors" else torch.save
    stem, names, weight_map = Path(WEIGHTS if end == ".bin" else "model.x").stem, list(weights), {}
    for i, part in enumerate((names[::2], names[1::2])):
        name = f"{stem}-0000{i + 1}-of-00002{end}"
        save({key: weights[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = folder / f"{stem}{end}.index.json"
    put(index, {"metadata": {"total_size": 9}, "weight_map": weight_map})
    return index


@pytest.mark.parametrize("end", [".bin", ".safetensors"])
def test_shards_are_read(folder: Path, end: str) -> None:
    expected = load_bert(folder).fingerprint
    index = shard(folder, end)
    assert load_bert(folder).fingerprint == expected
    second = next(folder.glob(f"*-00002-of-*{end}"))
    assert second in bert_files(folder) and index in bert_files(folder)
    assert second.name in "\n".join(describe_bert(folder))
    second.unlink()
    with pytest.raises(InputError, match=second.name):
        load_bert(folder)


@pytest.mark.parametrize("name", ["../a.bin", "/a.bin", "b/a.bin", "..", ".", "", "a.pt", 3, None])
def test_shards_stay_inside_their_folder(folder: Path, name: Any) -> None:
    shutil.copy(folder / WEIGHTS, folder.parent / "a.bin")
    index = shard(folder, ".bin")
    for content in ({"weight_map": {"a": name}}, {"weight_map": {}}, {"weight_map": [name]}, {}):
        put(index, content)
        with pytest.raises(InputError, match=index.name):
            load_bert(folder)


def test_a_weight_in_two_shards_is_refused(folder: Path) -> None:
    shard(folder, ".bin")
    first, second = (next(folder.glob(f"*-0000{i}-of-*")) for i in (1, 2))
    name, value = next(iter(read_torch(first).items()))
    torch.save(read_torch(second) | {name: value}, second)
    with pytest.raises(InputError, match=name):
        load_bert(folder)


def prefix(text: str) -> Callable[[dict], dict]:
    return lambda weights: {f"{text}{key}": value for key, value in weights.items()}


def head(weights: dict) -> dict:
    more = {"classifier.weight": torch.zeros(2, 24), "classifier.bias": torch.zeros(2)}
    return prefix("bert.")(weights) | more | {"cls.predictions.bias": torch.zeros(3)}


@pytest.mark.parametrize(
    ("change", "ignored"),
    [
        (prefix("module."), None),
        (prefix("module.bert."), None),
        (head, "classifier.weight"),
        (lambda weights: prefix("module.")(head(weights)), "classifier.weight"),
    ],
)
def test_prefixes_and_heads_are_taken_off(
    folder: Path,
    change: Callable[[dict], dict],
    ignored: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    expected = load_bert(folder).fingerprint
    torch.save(change(read_torch(folder / WEIGHTS)), folder / WEIGHTS)
    assert load_bert(folder).fingerprint == expected
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (1 if ignored else 0)
    assert all(ignored in message and "cls." not in message for message in messages if ignored)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda w: w | {"classifier.bias": torch.zeros(2)}, "classifier.bias"),
        (lambda w: prefix("module.")(w) | {"more": torch.zeros(2)}, "module.embeddings."),
        (lambda w: prefix("bert.")(w) | {"bert.more": torch.zeros(2)}, "more"),
    ],
)
def test_other_surplus_weights_are_refused(
    folder: Path, change: Callable[[dict], dict], fact: str
) -> None:
    torch.save(change(read_torch(folder / WEIGHTS)), folder / WEIGHTS)
    with pytest.raises(InputError, match=WEIGHTS) as error:
        load_bert(folder)
    assert fact in str(error.value)
