"""check_bert.py: what it tells of a folder, what is wrong with it, and the folder it writes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, run_here
from safetensors.torch import load_file

from bert import Bert, load_bert
from scripts import check_bert
from vocab import Vocabulary

LIGHT = """a an the is in on of at was to with and over under above across through along beside it
that from"""
Check = Callable[..., tuple[int, dict]]


@pytest.fixture
def check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Check:
    def run(*argv: object) -> tuple[int, dict]:
        out = tmp_path / "out.json"
        status = run_here(monkeypatch, check_bert.main, [*argv, "--json", out])
        report = json.loads(out.read_text())
        printed = capsys.readouterr().out
        assert report["fingerprint"] in printed
        assert all(fault in printed for fault in report["faults"])
        return status, report

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "i2t/bert", tmp_path / "bert"))


def test_a_tiny_untrained_bert_is_no_better_than_chance(folder: Path, check: Check) -> None:
    status, report = check(folder)
    bert = load_bert(folder)
    assert status == 1 and len(report["faults"]) == 1
    assert "no better than chance" in report["faults"][0]
    assert "48 of the 48 sentences hold an unknown word" in report["faults"][0]
    assert report["fingerprint"] == bert.fingerprint
    assert report["parameters"] == sum(p.numel() for p in bert.model.parameters())
    assert report["hidden"] == bert.model.config.hidden_size
    assert report["files"].keys() == {"bert_config.json", "pytorch_model.bin", "vocab.txt"}
    assert report["weights"] == "pytorch_model.bin"
    assert report["capitals"] == 0


def rename(folder: Path, change: Callable[[str], str]) -> None:
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(
        {change(name): value for name, value in weights.items()}, folder / "pytorch_model.bin"
    )


def test_the_style_of_keys_is_told(folder: Path, check: Check) -> None:
    check_bert.write_bert(folder.parent / "plain", load_bert(folder))
    assert check(folder.parent / "plain")[1]["keys"] == (
        "no prefix, LayerNorm.weight, bias, float32"
    )
    weights = load_file(folder.parent / "plain/model.safetensors")
    weights["pooler.dense.weight"] = torch.zeros(1)
    torch.save(weights, folder / "pytorch_model.bin")

    def old(name: str) -> str:
        new = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        return "bert." + new.replace("LayerNorm.bias", "LayerNorm.beta")

    rename(folder, old)
    assert check(folder)[1]["keys"] == (
        "prefix 'bert.', LayerNorm.gamma, beta, 1 unused (bert.pooler.dense.weight), float32"
    )


def test_a_cased_vocabulary_is_a_fault(folder: Path, check: Check) -> None:
    path = folder / "vocab.txt"
    entries = path.read_text().split("\n")
    path.write_text("\n".join([*entries[:10], *(e.upper() for e in entries[10:])]))
    status, report = check(folder)
    assert status == 1 and report["capitals"] > 0.1
    assert any("vocab.txt: is cased" in fault for fault in report["faults"])


def test_a_normalised_folder_is_the_same_bert(folder: Path, check: Check, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, report = check(folder, "--write", out)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocab.txt",
    ]
    again = load_bert(out)
    assert again.fingerprint == report["fingerprint"] == load_bert(folder).fingerprint
    assert vars(again.model.config) == vars(load_bert(folder).model.config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "out", "out.json"]


def test_a_folder_is_not_written_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(monkeypatch, check_bert.main, [folder, "--write", folder]) == 2
    assert f"--write {folder}: is no new or empty folder" in capsys.readouterr().err


def test_what_cannot_be_loaded_ends_with_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rename(folder, lambda name: name.replace("layer.0.output.dense.bias", "gone"))
    assert run_here(monkeypatch, check_bert.main, [folder]) == 2
    assert "pytorch_model.bin: lacks encoder.layer.0.output.dense.bias" in capsys.readouterr().err


def test_no_word_of_weight_is_in_two_sentences() -> None:
    """Else the number of shared words alone would tell partners from others."""
    light = set(LIGHT.split())
    seen: set[str] = set()
    for sentence in (sentence for pair in check_bert.PAIRS for sentence in pair):
        words = set(sentence.split()) - light
        assert words and not words & seen, words & seen
        seen |= words


class Meanings(torch.nn.Module):
    """Stands for a BERT whose states are what a table says of each sentence."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.table = torch.from_numpy(table).float()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        states = self.table[:, None].expand(-1, input_ids.shape[1], -1)
        return type("Output", (), {"last_hidden_state": states})


@pytest.mark.parametrize("seed", range(5))
def test_the_probe_counts_right_comparisons(seed: int) -> None:
    rng = np.random.default_rng(seed)
    meaning = rng.normal(size=(len(check_bert.PAIRS), 30))
    vocabulary = Vocabulary.load(GOLDEN / "i2t/bert")
    for other, low, high in (
        (meaning + 0.1 * rng.normal(size=meaning.shape), 1, 1),
        (rng.normal(size=meaning.shape), 0.3, check_bert.BOUND),
        (-meaning, 0, 0.1),
    ):
        model = Meanings(np.concatenate([meaning, other]) + 3)  # what all share tells nothing
        assert low <= check_bert.probe(Bert(model, vocabulary, "")) <= high
