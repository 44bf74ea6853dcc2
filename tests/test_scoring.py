"""scoring.py: no score depends on how pairs are gone through, and each thing is encoded once."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, IMG_DIM, ROOT, write_split
from test_model import LENGTHS, small_batch, small_model

import scoring
from data import Split
from model import DIME
from router import Modality
from scoring import BadScores, Encoded, Scorer, behind, encode_split, score_split, shortlist
from vocab import Vocabulary

CPU = torch.device("cpu")


def small_encoded(model: DIME) -> Encoded:
    regions, ids, mask = small_batch()
    with torch.no_grad():
        images, captions = model.encode_images(regions), model.encode_captions(ids, mask)
    return Encoded(images, captions, np.arange(len(LENGTHS)))


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
@pytest.mark.parametrize("pairs", [1, 2, 4, 7, 1000])
@pytest.mark.parametrize("tile", [1, 2, 128])
def test_no_score_depends_on_its_slice_or_tile(
    direction: str, pairs: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(direction)
    encoded = small_encoded(model)
    with torch.no_grad():
        whole, _ = model.score(encoded.images, encoded.captions, 10**9)
    monkeypatch.setattr(scoring, "TILE", tile)
    scorer = Scorer(model, encoded, CPU)
    scorer.pairs = pairs
    np.testing.assert_allclose(scorer.all_pairs(), whole, rtol=0, atol=1e-6)
    assert scorer.scored == whole.numel()


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_skipping_closed_cells_changes_no_score(direction: str, routing: str) -> None:
    """And the cells see fewer pairs, exactly those that are counted as closed."""
    model = small_model(direction, routing=routing)
    encoded = small_encoded(model)
    seen: dict[str, int] = {}
    cells = [
        (f"{number}.{name}", cell)
        for number, layer in enumerate([*model.space.layers, model.space.merge])
        for name, cell in layer.cells.items()
    ]
    for key, cell in cells:
        cell.register_forward_hook(
            lambda _, __, out, key=key: seen.update(
                {key: seen.get(key, 0) + out.shape[0] * out.shape[1]}
            )
        )
    scorer = Scorer(model, encoded, CPU)
    skipped = scorer.all_pairs()
    counts = dict(seen)
    model.space.skip_nothing()
    np.testing.assert_allclose(skipped, Scorer(model, encoded, CPU).all_pairs(), rtol=0, atol=1e-6)
    closed = scorer.closed.numpy()
    assert closed.shape == (3, 4) and (closed[1:] > 0).any()
    checked = 0
    for (key, cell), count in zip(cells[4:], closed[1:].flatten(), strict=True):
        share = count / scorer.scored
        if not isinstance(cell, type(cells[0][1])) and share >= 0.2:
            assert counts[key] == scorer.scored - count, key
            checked += 1
    assert checked > 0


def test_memory_that_runs_out_halves_the_slices_and_nothing_is_done_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_model("i2t")
    encoded = small_encoded(model)
    expected = Scorer(model, encoded, CPU).all_pairs()
    monkeypatch.setattr(scoring, "TILE", 2)
    calls, score = [], model.score

    def short_of_memory(images: Modality, captions: Modality, pairs: int):
        calls.append(pairs)
        if len(calls) > 2 and pairs > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return score(images, captions, pairs)

    monkeypatch.setattr(model, "score", short_of_memory)
    scorer = Scorer(model, encoded, CPU)
    scorer.pairs = 8
    with caplog.at_level(logging.WARNING):
        found = scorer.all_pairs()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert calls == [8, 8, 8, 4, 2, 2, 2, 2]  # six tiles, two refusals
    assert "going on with 2 pairs at a time" in caplog.text


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("i2t")

    def broken(*given: object):
        raise RuntimeError("sizes do not match")

    monkeypatch.setattr(model, "score", broken)
    with pytest.raises(RuntimeError, match="sizes"):
        Scorer(model, small_encoded(model), CPU).all_pairs()


def test_scores_that_are_no_numbers_are_noticed_at_once() -> None:
    model = small_model("i2t")
    encoded = small_encoded(model)
    torch.nn.init.constant_(model.space.norm.weight, torch.nan)
    with pytest.raises(BadScores, match=r"x\.pth\.tar gives scores of NaN"):
        Scorer(model, encoded, CPU, "x.pth.tar").all_pairs()


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_some_pairs_have_the_scores_of_all(direction: str) -> None:
    model = small_model(direction)
    encoded = small_encoded(model)
    whole = Scorer(model, encoded, CPU).all_pairs()
    wanted = np.random.default_rng(0).random(whole.shape) < 0.4
    scorer = Scorer(model, encoded, CPU)
    found = scorer.some_pairs(wanted)
    np.testing.assert_allclose(found, np.where(wanted, whole, 0), rtol=0, atol=1e-6)
    assert scorer.scored == wanted.sum()


def test_a_shortlist_holds_the_best_of_each_row_and_column() -> None:
    products = np.random.default_rng(0).random((7, 35), dtype=np.float32)
    wanted = shortlist(products, 3)
    rows, columns = (-products).argsort(1).argsort(1) < 3, (-products).argsort(0).argsort(0) < 3
    assert np.array_equal(wanted, rows | columns)
    assert shortlist(products, 35).all() and shortlist(products, 99).all()


@pytest.mark.parametrize("scale", [1, 50])
def test_pairs_outside_a_shortlist_rank_behind_it_in_pooled_order(scale: float) -> None:
    """Also where images have no unit length, and a product may be of any size."""
    rng = np.random.default_rng(0)
    products = scale * rng.uniform(-1, 1, (6, 30)).astype(np.float32)
    scores = scale * rng.uniform(-1, 1, (6, 30)).astype(np.float32)
    wanted = shortlist(products, 4)
    found = behind(scores, products, wanted)
    assert np.array_equal(found[wanted], scores[wanted])
    assert found[~wanted].max() < scores[wanted].min()
    outside = (found - products)[~wanted]
    np.testing.assert_allclose(outside, outside[0], rtol=0, atol=1e-4 * scale)
    if scale == 1:
        np.testing.assert_allclose(outside, -4, rtol=0, atol=1e-6)


class CountingModel:
    """Scores are products of pooled vectors; it counts what it encodes."""

    direction = "i2t"

    def __init__(self, training: bool) -> None:
        self.model, self.encoded, self.training = small_model("i2t"), [0, 0], training

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def encode_images(self, regions: torch.Tensor):
        assert not self.training
        self.encoded[0] += len(regions)
        return self.model.encode_images(regions[..., :9])

    def encode_captions(self, ids: torch.Tensor, mask: torch.Tensor):
        assert not self.training
        self.encoded[1] += len(ids)
        return self.model.encode_captions(ids.clamp(max=49), mask)

    def score(self, images, captions, pairs):
        assert not self.training
        return images.pooled @ captions.pooled.T, torch.ones(1)

    def closed(self, paths):
        return torch.zeros(3, 4)


@pytest.fixture
def split(tmp_path: Path) -> Iterator[Split]:
    write_split(tmp_path, "dev", 7, repeat=True, longest=3)
    captions = (tmp_path / "dev_caps.txt").read_text().splitlines()
    captions = [f"{caption} {number}" for number, caption in enumerate(captions)]
    captions[11] = captions[34] = captions[2]
    (tmp_path / "dev_caps.txt").write_text("\n".join(captions))
    yield Split.open(tmp_path, "dev", IMG_DIM)


@pytest.mark.parametrize("training", [True, False])
def test_a_split_is_encoded_once_in_evaluation_mode(split: Split, training: bool) -> None:
    """The longest caption has fewer than max_words tokens, which the published code crashed on."""
    model, vocabulary = CountingModel(training), Vocabulary.load(GOLDEN / "i2t/bert")
    scores = score_split(model, split, vocabulary, 16, device=CPU)
    assert scores.shape == (7, 35) and scores.dtype == np.float32
    assert model.encoded == [7, 33] and model.training == training  # two captions stand there twice
    assert np.array_equal(scores[:, 11], scores[:, 2])
    assert np.array_equal(scores[:, 34], scores[:, 2])
    some = score_split(model, split, vocabulary, 16, device=CPU, images=3)
    np.testing.assert_allclose(some, scores[:3, :15], rtol=0, atol=1e-6)


def test_repeated_captions_are_wanted_where_one_of_them_is(split: Split) -> None:
    model, vocabulary = CountingModel(False), Vocabulary.load(GOLDEN / "i2t/bert")
    encoded = encode_split(model, split, vocabulary, 16, device=CPU)
    wanted = np.zeros((7, 35), dtype=bool)
    wanted[4, 11] = wanted[5, 2] = wanted[5, 3] = True
    scorer = Scorer(model, encoded, CPU)
    found = scorer.some_pairs(wanted)
    np.testing.assert_allclose(found[wanted], encoded.products()[wanted], rtol=0, atol=1e-6)
    assert not found[~wanted].any() and scorer.scored == 3


BOUNDED = """
import sys
import numpy as np, torch
sys.path[:0] = ["tests"]
from common.memory import peak_memory
from router import Modality
from scoring import Encoded, Scorer
from test_model import small_model

torch.set_num_threads(1)
model, cpu = small_model("i2t"), torch.device("cpu")
def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)

images = Modality(unit(9, 7, 8), unit(9, 8), torch.ones(9, 7, dtype=torch.bool))
lengths = torch.randint(2, 11, (20000, 1))
captions = Modality(unit(20000, 10, 8), unit(20000, 8), torch.arange(10) < lengths)
before = peak_memory(cpu)
scores = Scorer(model, Encoded(images, captions, np.arange(20000)), cpu).all_pairs()
print(scores.shape, peak_memory(cpu) - before)
"""


def test_scoring_20000_captions_takes_little_memory() -> None:
    """All pairs at once would take 180,000 x 40 tensors of 7 x 8 numbers, 1.6 GB."""
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shape, taken = done.stdout.rsplit(" ", 1)
    assert shape == "(9, 20000)" and int(taken) < 50e6
