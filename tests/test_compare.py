"""scripts/compare.py against loops over images and seeds, and what must hold for any scores."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import run_here, write_split

from common.layout import CaptionGroups
from common.results import Retrieval
from evaluation import ranks
from scripts import compare

COUNTS = np.array([3, 1, 5, 2, 4, 1, 7, 2, 2, 6, 1])
GROUPS = CaptionGroups(COUNTS)
OWNER = GROUPS.image_of_caption
IMAGES, CAPTIONS = len(COUNTS), len(OWNER)
Program = Callable[..., dict]


def scores_of(skill: float, seed: int) -> np.ndarray:
    """Random scores in which a matching pair stands out by `skill`."""
    noise = np.random.default_rng(seed).normal(size=(IMAGES, CAPTIONS))
    return (noise + skill * (np.arange(IMAGES)[:, None] == OWNER)).astype(np.float32)


def seven(metrics: Retrieval) -> list[float]:
    """Six recalls and rsum."""
    sides = (metrics.i2t, metrics.t2i)
    return [*(getattr(side, k) for side in sides for k in ("r1", "r5", "r10")), metrics.rsum]


def drawn_by_loops(pairs: list[tuple[np.ndarray, np.ndarray]], chosen: np.ndarray) -> np.ndarray:
    """A's figures less B's for the drawn images and all their captions, mean over pairs."""
    differences = []
    for pair in pairs:
        of_both = []
        for scores in pair:
            of_images, of_captions = ranks(scores, OWNER)
            captions = [t for i in chosen for t in range(CAPTIONS) if OWNER[t] == i]
            of_both.append(seven(Retrieval.of(of_images[chosen], of_captions[captions])))
        differences.append(np.subtract(*of_both))
    return np.mean(differences, axis=0)


MATRICES = [scores_of(skill, seed) for seed, skill in enumerate((2.5, 2, 2.2, 1, 1.4, 0.6))]
PAIRS = list(zip(MATRICES[:3], MATRICES[3:], strict=True))


def hits_of(matrices: list[np.ndarray]) -> np.ndarray:
    return np.stack([compare.count_hits(matrix, GROUPS) for matrix in matrices])


class Draws:
    """A generator that notes what it drew."""

    def __init__(self) -> None:
        self.rng, self.drawn = np.random.default_rng(0), []

    def __getattr__(self, name: str) -> Callable[..., np.ndarray]:
        def draw(*args: object, **options: object) -> np.ndarray:
            self.drawn.append(getattr(self.rng, name)(*args, **options))
            return self.drawn[-1]

        return draw


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_bootstrap_equals_loops_over_images_and_seeds(seeds: int) -> None:
    hits, draws = hits_of([*MATRICES[:seeds], *MATRICES[3 : 3 + seeds]]), Draws()
    actual = compare.bootstrap(hits[:seeds] - hits[seeds:], GROUPS, 8, draws)
    assert len(draws.drawn) == 16
    for sample in range(8):
        chosen, pairs = draws.drawn[2 * sample : 2 * sample + 2]
        expected = drawn_by_loops([PAIRS[pair] for pair in pairs], chosen)
        np.testing.assert_allclose(actual[sample], expected, atol=1e-9)


def test_an_exchange_swaps_the_ranks_of_an_image_and_its_captions() -> None:
    hits, draws = hits_of(MATRICES), Draws()
    actual = compare.exchange(hits[:3] - hits[3:], GROUPS, 8, draws)
    for sample, signs in enumerate(draws.drawn):
        expected = []
        for pair in PAIRS:
            both = [ranks(scores, OWNER) for scores in pair]
            for i in np.flatnonzero(signs < 0):
                for side, items in enumerate(([i], np.flatnonzero(i == OWNER))):
                    a, b = both[0][side], both[1][side]
                    a[items], b[items] = b[items].copy(), a[items].copy()
            expected.append(np.subtract(*(seven(Retrieval.of(*each)) for each in both)))
        np.testing.assert_allclose(actual[sample], np.mean(expected, axis=0), atol=1e-9)


def test_figures_are_those_of_an_evaluation() -> None:
    result = compare.compare(hits_of(MATRICES), GROUPS, 100, 0)
    for name, matrices in (("a", MATRICES[:3]), ("b", MATRICES[3:])):
        expected = [seven(Retrieval.of(*ranks(matrix, OWNER))) for matrix in matrices]
        np.testing.assert_allclose(result[name], np.mean(expected, axis=0))
    np.testing.assert_allclose(result["difference"], result["a"] - result["b"])


def test_a_model_does_not_differ_from_itself() -> None:
    result = compare.compare(hits_of([MATRICES[0]] * 2), GROUPS, 100, 0)
    assert not any(result[name].any() for name in ("difference", "low", "high"))
    assert (result["p"] == 1).all()


def test_the_other_order_turns_signs_and_keeps_p() -> None:
    hits = hits_of(MATRICES)
    one = compare.compare(hits, GROUPS, 200, 4)
    other = compare.compare(np.roll(hits, 3, axis=0), GROUPS, 200, 4)
    for name, mirrored in (("a", "b"), ("p", "p")):
        np.testing.assert_array_equal(one[name], other[mirrored])
    for name, mirrored in (("difference", "difference"), ("low", "high"), ("high", "low")):
        np.testing.assert_allclose(one[name], -other[mirrored], atol=1e-9)


def test_p_is_uniform_for_equal_models_and_small_for_different_ones() -> None:
    groups = CaptionGroups(np.full(60, 2))
    rng = np.random.default_rng(0)
    hits = [rng.random((2, 60, 6)) < 0.5 for _ in range(80)]
    p = np.array([compare.compare(h.astype(int), groups, 200, 0)["p"][6] for h in hits])
    assert 0.35 < p.mean() < 0.65 and 0.02 < (p < 0.25).mean() < 0.45
    better = np.stack([rng.random((60, 6)) < chance for chance in (0.8, 0.3)]).astype(int)
    result = compare.compare(better, groups, 200, 0)
    assert (result["p"] < 0.02).all() and (result["low"] > 0).all()


@pytest.fixture
def program(tmp_path: Path, monkeypatch, capsys) -> Program:
    """Run compare on files; return its JSON, or its error's last line after status 2."""
    write_split(tmp_path / "data", "test", IMAGES, counts=COUNTS.tolist())
    for k, matrix in enumerate(MATRICES):
        np.save(tmp_path / f"{k}.npy", matrix)

    def run(*names: str, status: int = 0, more: tuple[object, ...] = ()) -> dict | str:
        out = tmp_path / "out.json"
        where = ["--data_path", tmp_path, "--data_name", "data", "--split", "test"]
        argv = [*(tmp_path / name for name in names), *where, "--samples", 100, "--json", out]
        assert run_here(monkeypatch, compare.main, [*argv, *more]) == status
        printed = capsys.readouterr()
        return printed.err.splitlines()[-1] if status else json.loads(out.read_text())

    return run


def test_the_program_writes_what_it_compares(program: Program, tmp_path: Path) -> None:
    result = program("0.npy", "1.npy", "3.npy", "4.npy", more=("--seed", 5))
    files = {"a": ["0.npy", "1.npy"], "b": ["3.npy", "4.npy"]}
    assert {k: [Path(p).name for p in v] for k, v in result["scores"].items()} == files
    sizes = (result[name] for name in ("images", "captions", "samples", "seed"))
    assert [*sizes] == [IMAGES, CAPTIONS, 100, 5]
    expected = compare.compare(hits_of([MATRICES[k] for k in (0, 1, 3, 4)]), GROUPS, 100, 5)
    low, high = result["intervals"]["t2i"]["r5"]
    assert [low, high] == [expected["low"][4], expected["high"][4]]
    assert result["p"]["rsum"] == expected["p"][6]
    assert result["difference"]["i2t"]["r10"] == expected["difference"][2]
    again = program("0.npy", "1.npy", "3.npy", "4.npy", more=("--seed", 5))
    assert result == again


def test_bad_input_is_one_line(program: Program, tmp_path: Path, monkeypatch, capsys) -> None:
    np.save(tmp_path / "short.npy", MATRICES[0][:, :-1])
    assert "short.npy" in program("0.npy", "short.npy", status=2)
    assert "3 files" in program("0.npy", "1.npy", "2.npy", status=2)
    assert "--samples 9" in program("0.npy", "1.npy", status=2, more=("--samples", 9))
    assert run_here(monkeypatch, compare.main, ["0.npy", "1.npy", "--split", "test"]) == 2
    assert "--split" in capsys.readouterr().err.splitlines()[-1]
    out = ("--json", tmp_path / "1.npy")
    assert "1.npy: " in program("0.npy", "1.npy", status=2, more=out)
    np.save(tmp_path / "nan.npy", MATRICES[0] * np.nan)
    assert "nan.npy" in program("0.npy", "nan.npy", status=2)
