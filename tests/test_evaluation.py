"""evaluation.py: metrics against the golden ones and hand-sized matrices, folds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from evaluation import ceiling, folds, mean_of, owners, ranks, retrieval
from options import InputError

METRICS = np.load(GOLDEN / "metrics.npz")
SETS = sorted({name.split(".")[0] for name in METRICS.files})


def figures(recall) -> list[float]:
    return [recall.r1, recall.r5, recall.r10, recall.medr, recall.meanr]


@pytest.mark.parametrize("name", SETS)
def test_metrics_equal_the_golden_ones(name: str) -> None:
    scores = METRICS[f"{name}.sims"]
    owner = owners(scores.shape[1])
    of_images, of_captions = ranks(scores, owner)
    assert of_images.tolist() == METRICS[f"{name}.i2t_ranks"].tolist()
    assert of_captions.tolist() == METRICS[f"{name}.t2i_ranks"].tolist()
    result = retrieval(torch.tensor(scores), owner)
    np.testing.assert_allclose(figures(result.i2t), METRICS[f"{name}.i2t"], atol=1e-9)
    np.testing.assert_allclose(figures(result.t2i), METRICS[f"{name}.t2i"], atol=1e-9)


def test_a_matrix_worked_out_by_hand() -> None:
    """Two images; image 0 has captions 0 and 2, image 1 has caption 1."""
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.6, 0.3, 0.2]])
    of_images, of_captions = ranks(scores, [0, 1, 0])
    assert of_images.tolist() == [1, 1]  # 0.9 before 0.5; 0.6 before 0.3
    assert of_captions.tolist() == [1, 1, 0]  # 0.6 before 0.1; 0.9 before 0.3; 0.5 first
    result = retrieval(scores, [0, 1, 0])
    assert figures(result.i2t) == [0, 100, 100, 2, 2]
    assert figures(result.t2i) == pytest.approx([100 / 3, 100, 100, 2, 5 / 3])
    assert result.rsum == pytest.approx(400 + 100 / 3)
    assert result.selection == pytest.approx(200 + 100 / 3)


def test_the_median_of_an_even_number_is_rounded_down() -> None:
    scores = torch.tensor([[0.5, 0.4], [0.9, 0.1]])  # ranks of captions: 1 and 1; of images: 0, 1
    assert figures(retrieval(scores, [0, 1]).i2t)[3:] == [1, 1.5]


def test_a_collapsed_model_scores_zero() -> None:
    assert retrieval(torch.zeros(20, 100), owners(100)).rsum == 0


def test_float64_scores_keep_their_order() -> None:
    scores = torch.tensor([[1.0, 1.0 + 1e-12], [0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    assert ranks(scores, [0, 1])[0].tolist() == [1, 0]
    assert ranks(scores.float(), [0, 1])[0].tolist() == [1, 0]  # a tie counts against the model
    assert ranks(scores.flip(0).T.contiguous(), [1, 0])[0].tolist() == [0, 0]
    assert ranks(scores.bfloat16(), [0, 1])[1].tolist() == [0, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_no_numbers_are_refused(bad: float) -> None:
    scores = torch.rand(3, 15)
    scores[2, 4] = bad
    with pytest.raises(InputError, match="NaN"):
        retrieval(scores, owners(15))


def test_ranks_do_not_depend_on_their_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(23, 115)
    whole = ranks(scores, owners(115))
    monkeypatch.setattr("evaluation.ROW_BLOCK", 4)
    assert all(np.array_equal(a, b) for a, b in zip(ranks(scores, owners(115)), whole, strict=True))


def test_folds_are_the_diagonal_blocks() -> None:
    scores = np.random.default_rng(0).random((10, 50), dtype=np.float32)
    for number, (fold, owner) in enumerate(folds(scores, owners(50))):
        block = scores[2 * number : 2 * number + 2, 10 * number : 10 * number + 10]
        assert np.array_equal(fold, block)
        assert owner.tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize("images", [0, 4, 11])
def test_images_that_five_does_not_divide(images: int) -> None:
    with pytest.raises(InputError, match=f"{images} images"):
        list(folds(np.zeros((images, 5 * images)), owners(5 * images)))


def test_the_mean_is_of_every_figure() -> None:
    results = [retrieval(torch.rand(6, 30), owners(30)) for _ in range(3)]
    mean = mean_of(results)
    for side in ("i2t", "t2i"):
        for name in ("r1", "r5", "r10", "medr", "meanr"):
            values = [getattr(getattr(result, side), name) for result in results]
            assert getattr(getattr(mean, side), name) == pytest.approx(sum(values) / 3)
    assert mean.rsum == pytest.approx(sum(result.rsum for result in results) / 3)


def test_a_memory_map_is_ranked_like_an_array(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).random((23, 115), dtype=np.float32)
    np.save(tmp_path / "scores.npy", scores)
    mapped = np.load(tmp_path / "scores.npy", mmap_mode="r")
    for found, expected in zip(ranks(mapped, owners(115)), ranks(scores, owners(115)), strict=True):
        assert np.array_equal(found, expected)


def test_the_ceiling_is_what_known_pairs_allow() -> None:
    """Three images, six captions, two each; image 1 is known with none of its own."""
    known = np.zeros((3, 6), dtype=bool)
    known[0, 0] = known[0, 1] = known[1, 0] = known[2, 5] = True
    assert ceiling(known, [0, 0, 1, 1, 2, 2]) == {"i2t": pytest.approx(200 / 3), "t2i": 50}
