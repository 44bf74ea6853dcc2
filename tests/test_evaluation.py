"""evaluation.py, metrics: golden arrays, matrices worked out by hand, folds and intervals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, image_of_caption

from common.bootstrap import bootstrap_ci
from common.errors import InputError
from common.results import EvaluationResult
from evaluation import (
    evaluate_folds,
    evaluate_whole,
    ranks,
    retrieval,
)

METRICS = np.load(GOLDEN / "metrics.npz")
SETS = sorted({name.split(".")[0] for name in METRICS.files})


def figures(recall) -> list[float]:
    return [recall.r1, recall.r5, recall.r10, recall.medr, recall.meanr]


@pytest.mark.parametrize("name", SETS)
def test_metrics_equal_the_golden_ones(name: str) -> None:
    scores = METRICS[f"{name}.sims"]
    owner = image_of_caption(scores.shape[1])
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
    assert retrieval(torch.zeros(20, 100), image_of_caption(100)).rsum == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinite_scores_are_refused(bad: float) -> None:
    scores = torch.rand(3, 15)
    scores[2, 4] = bad
    with pytest.raises(InputError, match="NaN"):
        retrieval(scores, image_of_caption(15))


def test_ranks_depend_on_no_block_and_no_memory_map(tmp_path: Path, monkeypatch) -> None:
    scores, owner = np.random.default_rng(0).random((23, 115), dtype="f"), image_of_caption(115)
    np.save(tmp_path / "scores.npy", scores)
    expected = ranks(scores, owner)
    monkeypatch.setattr("evaluation.ROW_BLOCK", 4)
    actual = ranks(np.load(tmp_path / "scores.npy", mmap_mode="r"), owner)
    assert all(map(np.array_equal, actual, expected))


def test_a_result_survives_json() -> None:
    scores = np.random.default_rng(0).random((10, 50), dtype=np.float32)
    known = {"models": ["a"], "scores": None, "data_name": "x", "split": "test", "seconds": 1.5}
    known |= {"fingerprints": [{"data": "d", "bert": "b", "training": None}], "shortlist": None}
    owner = image_of_caption(50)
    parts = {"whole": evaluate_whole(scores, owner, 100), "fold5": evaluate_folds(scores, owner)}
    result = EvaluationResult(**known, images=10, captions=50, **parts, fold5_asked=True)
    content = json.loads(json.dumps(result.to_json()))
    assert EvaluationResult.from_json(content, "r.json") == result
    assert result.metrics == parts["fold5"].metrics
    content["whole"]["metrics"]["i2t"]["r1"] = "x"
    for damaged in (content, content | {"whole": None}, {}, {"models": []}):
        with pytest.raises(InputError, match=r"r\.json"):
            EvaluationResult.from_json(damaged, "r.json")


def test_intervals_of_a_matrix_worked_out_by_hand() -> None:
    """One of two images is found at rank 1, the other is not: R@1 is 0, 50 or 100 %."""
    drawn, owner = [(np.array([0, 1]), np.array([0] * 5 + [10] * 5))], image_of_caption(10)
    between = bootstrap_ci(drawn, owner, 2000)
    assert between["i2t"]["r1"] == between["t2i"]["r1"] == [0, 100]
    assert between["i2t"]["r5"] == [100, 100] and between["t2i"]["r10"] == [0, 100]
    assert between["t2i"]["medr"] == [1, 11] and between["i2t"]["meanr"] == [1, 2]
    # the captions go with their image, so all figures rise and fall together
    assert between["rsum"] == [200, 600]
    assert bootstrap_ci(drawn, owner, 50) == bootstrap_ci(drawn, owner, 50)


def test_intervals_are_as_wide_as_those_of_a_binomial() -> None:
    """Of 1,000 images half are found at once, and their captions with them."""
    drawn = [(np.repeat([0, 20], 500), np.repeat([0, 20], 2500))]
    between = bootstrap_ci(drawn, image_of_caption(5000), 2000)
    half = 196 * np.sqrt(0.25 / 1000)  # 3.1 %
    for side in ("i2t", "t2i"):
        assert between[side]["r1"] == pytest.approx([50 - half, 50 + half], abs=0.3)
    assert between["rsum"] == pytest.approx([300 - 6 * half, 300 + 6 * half], abs=1.8)


def test_five_folds_of_a_matrix_worked_out_by_hand() -> None:
    """Ten images, two a fold. In the first fold each image has the other one's captions."""
    owner = image_of_caption(50)
    owner[:10] = owner[:10][::-1]  # 1 1 1 1 1 0 0 0 0 0
    scores = (owner == np.arange(10)[:, None]).astype(np.float32)
    mean = evaluate_folds(scores, image_of_caption(50)).metrics.to_json()
    # there its own captions rank 5 to 9, a caption's image 1; in the four others all rank 0
    assert mean["i2t"] == {"r1": 80, "r5": 80, "r10": 100, "medr": 2, "meanr": 2}
    assert mean["t2i"] == {"r1": 80, "r5": 100, "r10": 100, "medr": 1.2, "meanr": 1.2}
    assert mean["rsum"] == 540


def test_each_fold_is_resampled_for_itself() -> None:
    """One fold finds all at once and four find nothing, however their images are drawn."""
    ends = [(np.full(20, rank), np.full(100, rank)) for rank in (0, 20, 20, 20, 20)]
    between = bootstrap_ci(ends, image_of_caption(500), 200)
    assert between["i2t"]["r1"] == between["t2i"]["r10"] == [20, 20]
    assert between["rsum"] == [120, 120]
