"""evaluation.py, scores: no score depends on its chunk or tile; everything is encoded once."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import GOLDEN, IMG_DIM, ROOT, write_split
from test_model import LENGTHS, small_batch, small_model

import evaluation
from common.errors import InputError
from data import Split
from evaluation import (
    Encoded,
    encode_split,
    is_reranked,
    rank_last,
    recall_upper_bound,
    score_all,
    score_some,
    score_split,
    shortlist,
)
from model import DIME
from router import Modality
from vocab import Vocabulary

CPU = torch.device("cpu")


def small_encoded(model: DIME) -> Encoded:
    regions, ids, mask = small_batch()
    with torch.no_grad():
        images, captions = model.encode_images(regions), model.encode_captions(ids, mask)
    return Encoded(images, captions, np.arange(len(LENGTHS)))


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
@pytest.mark.parametrize("pairs", [1, 4, 7])
@pytest.mark.parametrize("tile", [1, 2, 128])
@pytest.mark.parametrize("layers", [0, 3])
def test_no_score_depends_on_its_chunk_or_tile(
    direction: str, pairs: int, tile: int, layers: int, monkeypatch
) -> None:
    model = small_model(direction, num_layer_routing=layers)
    encoded = small_encoded(model)
    with torch.no_grad():
        whole, _ = model.score(encoded.images, encoded.captions, 10**9)
    monkeypatch.setattr(evaluation, "TILE", tile)
    monkeypatch.setattr(evaluation, "chunk_size", lambda device, dim: pairs)
    np.testing.assert_allclose(score_all(model, encoded, CPU), whole, rtol=0, atol=1e-6)


def test_running_out_of_memory_halves_the_chunk(monkeypatch, caplog) -> None:
    """No tile is scored twice."""
    model = small_model("i2t")
    encoded = small_encoded(model)
    expected = score_all(model, encoded, CPU)
    calls: list[int] = []
    score = model.score

    def score_with_little_memory(images: Modality, captions: Modality, pairs: int) -> tuple:
        calls.append(pairs)
        if len(calls) > 2 and pairs > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return score(images, captions, pairs)

    monkeypatch.setattr(evaluation, "TILE", 2)
    monkeypatch.setattr(evaluation, "chunk_size", lambda device, dim: 8)
    monkeypatch.setattr(model, "score", score_with_little_memory)
    with caplog.at_level(logging.WARNING):
        scores = score_all(model, encoded, CPU)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
    assert calls == [8, 8, 8, 4, 2, 2, 2, 2]  # six tiles, two failures
    assert "2 pairs" in caplog.text


def test_captions_are_not_trimmed_if_shapes_are_fixed(monkeypatch) -> None:
    """On a CPU words that no caption uses are left out; the scores stay the same."""
    model, widths = small_model("i2t"), []
    encoded = small_encoded(model)
    short = encoded.captions[encoded.captions.mask.sum(1) <= 5]
    space = model.space.forward

    def noting(query: Modality, context: Modality, *rest: object) -> tuple:
        widths.append(context.tokens.shape[1])
        return space(query, context, *rest)

    monkeypatch.setattr(model.space, "forward", noting)
    with torch.no_grad():
        trimmed, _ = model.score(encoded.images, short)
        monkeypatch.setattr("model.needs_fixed_shapes", lambda device: True)
        whole, _ = model.score(encoded.images, short)
    torch.testing.assert_close(trimmed, whole, atol=1e-6, rtol=0)
    assert widths == [8, 10]


def test_scores_are_fetched_once_a_band(monkeypatch) -> None:
    """Tiles of 4, 2, 4, 2, 2 and 1 pairs, at least 8 of them together."""
    model, fetched, fetch = small_model("i2t"), [], evaluation._fetch
    encoded = small_encoded(model)

    def noting(band: list, own: list[torch.Tensor], *rest: object) -> Iterator:
        fetched.append([tile.numel() for tile in own])
        return fetch(band, own, *rest)

    monkeypatch.setattr(evaluation, "TILE", 2)
    monkeypatch.setattr(evaluation, "_fetch", noting)
    monkeypatch.setattr(evaluation, "BAND", 1)
    expected = score_all(model, encoded, CPU)
    assert fetched == [[4], [2], [4], [2], [2], [1]]
    fetched.clear()
    monkeypatch.setattr(evaluation, "BAND", 8)
    assert np.array_equal(score_all(model, encoded, CPU), expected)
    assert fetched == [[4, 2, 4], [2, 2, 1]]


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_every_tile_has_one_shape_if_shapes_are_fixed(direction: str, monkeypatch) -> None:
    model, shapes = small_model(direction), set()
    encoded, score = small_encoded(model), model.score
    expected = score_all(model, encoded, CPU)

    def noting(images: Modality, captions: Modality, pairs: int | None = None) -> tuple:
        shapes.add((images.tokens.shape, captions.tokens.shape))
        return score(images, captions, pairs)

    monkeypatch.setattr(model, "score", noting)
    monkeypatch.setattr(evaluation, "TILE", 4)
    monkeypatch.setattr(evaluation, "needs_fixed_shapes", lambda device: True)
    scores = score_all(model, encoded, CPU)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
    assert shapes == {((4, 7, 8), (4, 10, 8))}


def test_items_in_main_memory_are_sent_to_the_device() -> None:
    """`meta` stands in for it: a device that holds no numbers."""
    images = small_encoded(small_model("i2t")).images
    index = torch.tensor([2, 0])
    there = evaluation._take(images, index, torch.device("meta"), 5)
    assert there.tokens.device.type == there.mask.device.type == "meta"
    assert there.tokens.shape == (5, 7, 8) and there.pooled.shape == (5, 8)
    here = evaluation._take(images, index, CPU, 5)
    assert torch.equal(here.tokens, images.tokens[[2, 0, 2, 0, 2]])
    assert len(evaluation._take(images, index, CPU, 1)) == 2


def test_scores_of_nan_are_refused_by_the_name_of_the_model() -> None:
    model = small_model("i2t")
    encoded = small_encoded(model)
    torch.nn.init.constant_(model.space.norm.weight, torch.nan)
    with pytest.raises(InputError, match=r"x\.pth\.tar.*NaN"):
        score_all(model, encoded, CPU, "x.pth.tar")


def test_stop_is_called_before_every_tile(monkeypatch) -> None:
    model, stop = small_model("i2t"), Mock()
    monkeypatch.setattr(evaluation, "TILE", 2)
    score_all(model, small_encoded(model), CPU, stop=stop)
    assert stop.call_count == 6
    with pytest.raises(KeyboardInterrupt):
        score_all(model, small_encoded(model), CPU, stop=Mock(side_effect=KeyboardInterrupt))


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_some_pairs_have_the_scores_of_all(direction: str) -> None:
    model = small_model(direction)
    encoded = small_encoded(model)
    whole = score_all(model, encoded, CPU)
    wanted = np.random.default_rng(0).random(whole.shape) < 0.4
    some = score_some(model, encoded, wanted, CPU)
    np.testing.assert_allclose(some, np.where(wanted, whole, 0), rtol=0, atol=1e-6)


def test_a_shortlist_holds_the_best_of_each_row_and_column() -> None:
    coarse = np.random.default_rng(0).random((7, 35), dtype=np.float32)
    wanted = shortlist(coarse, 3)
    rows, columns = (-coarse).argsort(1).argsort(1) < 3, (-coarse).argsort(0).argsort(0) < 3
    assert np.array_equal(wanted, rows | columns)
    assert shortlist(coarse, 35).all() and shortlist(coarse, 99).all()


@pytest.mark.parametrize("scale", [1, 50])
def test_pairs_outside_a_shortlist_rank_last_in_coarse_order(scale: float) -> None:
    """Also if images have no unit length, so that scores have any size."""
    rng = np.random.default_rng(0)
    coarse = scale * rng.uniform(-1, 1, (6, 30)).astype(np.float32)
    scores = scale * rng.uniform(-1, 1, (6, 30)).astype(np.float32)
    wanted = shortlist(coarse, 4)
    reranked = rank_last(scores, coarse, wanted)
    assert np.array_equal(reranked[wanted], scores[wanted])
    assert reranked[~wanted].max() < scores[wanted].min()
    gaps = (reranked - coarse)[~wanted]
    np.testing.assert_allclose(gaps, gaps[0], rtol=0, atol=1e-4 * scale)
    assert is_reranked(reranked) and (scale > 1 or not is_reranked(scores))


def test_the_upper_bound_counts_queries_with_a_known_answer() -> None:
    """Three images with two captions each; of image 1 no own caption is known."""
    known = np.zeros((3, 6), dtype=bool)
    known[0, 0] = known[0, 1] = known[1, 0] = known[2, 5] = True
    expected = {"i2t": pytest.approx(200 / 3), "t2i": 50}
    assert recall_upper_bound(known, [0, 0, 1, 1, 2, 2]) == expected


class CountingModel(DIME):
    """Scores are products of pooled vectors; it counts what it encodes."""

    def __init__(self) -> None:
        model = small_model("i2t")
        super().__init__(model.config, model.text.bert)
        self.encoded = [0, 0]

    def encode_images(self, regions: torch.Tensor) -> Modality:
        assert not self.training
        self.encoded[0] += len(regions)
        return super().encode_images(regions[..., :9])

    def encode_captions(self, ids: torch.Tensor, mask: torch.Tensor) -> Modality:
        assert not self.training
        self.encoded[1] += len(ids)
        return super().encode_captions(ids.clamp(max=49), mask)

    def score(self, images: Modality, captions: Modality, pairs: int | None = None) -> tuple:
        assert not self.training
        return images.pooled @ captions.pooled.T, torch.ones(1)


@pytest.fixture
def split(tmp_path: Path) -> Iterator[Split]:
    """Seven images; captions 2, 11 and 34 are equal."""
    write_split(tmp_path, "dev", 7, repeat=True, longest=3)
    captions = (tmp_path / "dev_caps.txt").read_text().splitlines()
    captions = [f"{caption} {number}" for number, caption in enumerate(captions)]
    captions[11] = captions[34] = captions[2]
    (tmp_path / "dev_caps.txt").write_text("\n".join(captions))
    yield Split.open(tmp_path, "dev", IMG_DIM)


@pytest.mark.parametrize("training", [True, False])
def test_a_split_is_encoded_once_in_evaluation_mode(split: Split, training: bool) -> None:
    model, vocabulary = CountingModel().train(training), Vocabulary.load(GOLDEN / "i2t/bert")
    scores = score_split(model, split, vocabulary, device=CPU)
    assert scores.shape == (7, 35) and scores.dtype == np.float32
    assert model.encoded == [7, 33] and model.training == training
    assert np.array_equal(scores[:, 11], scores[:, 2])
    assert np.array_equal(scores[:, 34], scores[:, 2])
    first = score_split(model, split, vocabulary, device=CPU, images=3)
    np.testing.assert_allclose(first, scores[:3, :15], rtol=0, atol=1e-6)


def test_encoded_items_are_kept_where_they_fit(split: Split, monkeypatch) -> None:
    asked = []

    def noting(device: torch.device, size: int) -> torch.device:
        asked.append((device, size))
        return device

    monkeypatch.setattr(evaluation, "storage_device", noting)
    model, vocabulary = CountingModel(), Vocabulary.load(GOLDEN / "i2t/bert")
    encoded = encode_split(model, split, vocabulary, device=CPU)
    sizes = [sum(t.nbytes for t in vars(m).values()) for m in (encoded.images, encoded.captions)]
    assert asked == [(CPU, size) for size in sizes]


def test_equal_captions_are_scored_if_one_of_them_is_wanted(split: Split) -> None:
    model, vocabulary = CountingModel(), Vocabulary.load(GOLDEN / "i2t/bert")
    encoded = encode_split(model, split, vocabulary, device=CPU)
    wanted = np.zeros((7, 35), dtype=bool)
    wanted[4, 11] = wanted[5, 2] = wanted[5, 3] = True
    scores = score_some(model, encoded, wanted, CPU)
    np.testing.assert_allclose(scores[wanted], encoded.coarse_scores()[wanted], rtol=0, atol=1e-6)
    assert not scores[~wanted].any()


MEASURED = """
import sys
import numpy as np, torch
sys.path[:0] = ["tests"]
from common.memory import peak_memory
from evaluation import Encoded, score_all
from router import Modality
from test_model import small_model

torch.set_num_threads(1)
model, cpu = small_model("i2t"), torch.device("cpu")
def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)

images = Modality(unit(9, 7, 8), unit(9, 8), torch.ones(9, 7, dtype=torch.bool))
lengths = torch.randint(2, 11, (20000, 1))
captions = Modality(unit(20000, 10, 8), unit(20000, 8), torch.arange(10) < lengths)
before = peak_memory(cpu)
scores = score_all(model, Encoded(images, captions, np.arange(20000)), cpu)
print(scores.shape, peak_memory(cpu) - before)
"""


def test_scoring_20000_captions_needs_little_memory() -> None:
    """All pairs at once would need 180,000 x 40 tensors of 7 x 8 numbers, 1.6 GB."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shape, used = done.stdout.rsplit(" ", 1)
    assert shape == "(9, 20000)" and int(used) < 50e6
