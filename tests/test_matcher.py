"""checkpoint.Matcher: scores are those of evaluate_models, routes those of inspect_routes."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import IMG_DIM, REGIONS, ROOT, Case, state, tiny_train, write_tiny

import train
from checkpoint import Matcher, read_checkpoint
from checkpoint.checkpoint import bert_of
from checkpoint.matcher import Items
from common.errors import InputError
from data import Split
from evaluate_models import evaluate
from evaluation import encode_split
from scripts.convert_checkpoint import write_arrays
from scripts.parts.routes import Pairs

CPU = torch.device("cpu")
SINGLE = {"i2t": ["i2t"], "t2i": ["t2i"], "encoders alone": ["encoders"]}
SETS = SINGLE | {"ensemble": ["i2t", "t2i"], "mixed ensemble": ["t2i", "encoders"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data and BERT of `tiny`, and i2t, t2i and encoders alone in models, one step each."""
    folder = write_tiny(tmp_path_factory.mktemp("models"))
    (folder / "models").mkdir()
    for name, more in {
        "i2t": ["--embed_size", "12"],
        "t2i": ["--direction", "t2i", "--max_words", "9"],
        "encoders": ["--num_layer_routing", "0"],
    }.items():
        train.main([*tiny_train(folder, "--max_steps", "1", "--overwrite"), *more])
        (best,) = (folder / "runs").glob("*/model_best.pth.tar")
        shutil.copy(best, folder / f"models/{name}.tar")
        shutil.rmtree(folder / "runs")
    return folder


def paths(folder: Path, names: list[str]) -> list[Path]:
    return [folder / f"models/{name}.tar" for name in names]


def read_test(folder: Path) -> tuple[np.ndarray, list[str]]:
    """Features and captions of the test split."""
    data = folder / "data/tiny"
    return np.load(data / "test_ims.npy"), (data / "test_caps.txt").read_text().splitlines()


@pytest.mark.parametrize("names", SETS.values(), ids=SETS)
def test_scores_are_those_of_evaluate_models(
    names: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = paths(folder, names)
    evaluate(models, split="test", workers=0, save_scores=tmp_path / "scores.npy")
    for block in ("checkpoint.matcher.IMAGE_BLOCK", "evaluation.CAPTION_BLOCK", "evaluation.TILE"):
        monkeypatch.setattr(block, 4)
    matcher = Matcher.open(models)
    features, texts = read_test(folder)
    images, captions = matcher.encode_images(features), matcher.encode_captions(texts)
    assert (len(images), len(captions)) == (10, 50) and matcher.img_dim == IMG_DIM
    scores = matcher.score(images, captions)
    assert scores.dtype == np.float32
    expected = np.load(tmp_path / "scores.npy")
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    some = matcher.score(images[torch.tensor([7, 2])], captions[11:14])
    np.testing.assert_allclose(some, expected[[7, 2], 11:14], rtol=0, atol=1e-5)


def test_official_checkpoints_give_the_golden_scores(case: Case, tmp_path: Path) -> None:
    models = [case.model_path, Path(shutil.copy(case.model_path, tmp_path))]
    split = case.split()
    features = split.regions(np.arange(split.images))
    for some in (models[0], models):
        matcher = Matcher.open(some, case.bert_path)
        sides = matcher.encode_images(features), matcher.encode_captions(split.captions)
        expected = case.expected("eval")["sims"]
        np.testing.assert_allclose(matcher.score(*sides), expected, rtol=0, atol=1e-5)


def test_routes_are_those_of_inspect_routes(folder: Path) -> None:
    names = ["i2t", "t2i"]
    matcher = Matcher.open(paths(folder, names))
    features, texts = read_test(folder)
    images, captions = matcher.encode_images(features[:3]), matcher.encode_captions(texts[:7])
    routes = matcher.routes(images, captions)
    assert [gates.shape for gates in routes] == [(3, 7, 9, 4)] * 2
    split, words = Split.open(folder / "data/tiny", "test", IMG_DIM), matcher.bert.vocabulary
    own = matcher.encoded(images[1:2], captions[4:5])
    for model, gates, one in zip(matcher.models, routes, own, strict=True):
        encoded = encode_split(model, split, words, device=CPU)
        owner = split.groups.image_of_caption
        pairs = Pairs(model, split.captions, owner, words, encoded)
        for image in range(3):
            expected = pairs.route(image, range(7))
            np.testing.assert_allclose(gates[image], expected, rtol=0, atol=1e-5)
        pair = Pairs(model, [texts[4]], np.array([0]), words, one)  # of no data set
        np.testing.assert_allclose(pair.routes(1)[0], gates[1, 4], rtol=0, atol=1e-5)
        expected = pairs.attention(1, 4)
        np.testing.assert_allclose(pair.attention(0, 0), expected, rtol=0, atol=1e-5)


def test_tokens_may_be_a_memory_map_of_float16(folder: Path, tmp_path: Path) -> None:
    matcher = Matcher.open(paths(folder, ["i2t", "t2i"]))
    features, texts = read_test(folder)
    images, captions = matcher.encode_images(features), matcher.encode_captions(texts[:6])
    mapped = []
    for number, side in enumerate(images.of_models):
        np.save(tmp_path / f"{number}.npy", side.tokens.half().numpy())
        tokens = torch.from_numpy(np.load(tmp_path / f"{number}.npy", mmap_mode="r+"))
        mapped.append(replace(side, tokens=tokens))
    exact, rounded = (matcher.score(each, captions) for each in (images, Items(tuple(mapped))))
    assert rounded.dtype == np.float32 and 0 < np.abs(rounded - exact).max() < 0.01
    assert matcher.routes(Items(tuple(mapped)), captions)[1].dtype == np.float32


def test_products_of_pooled_vectors_are_the_scores_of_encoders_alone(folder: Path) -> None:
    matcher = Matcher.open(paths(folder, ["encoders"]))
    features, texts = read_test(folder)
    images, captions = matcher.encode_images(features), matcher.encode_captions(texts)
    vectors = matcher.pooled(images), matcher.pooled(captions)
    assert all(each.dtype == np.float32 for each in vectors)
    expected = matcher.score(images, captions)
    np.testing.assert_allclose(vectors[0] @ vectors[1].T, expected, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match=r"encoders\.tar.*--num_layer_routing 0"):
        matcher.routes(images, captions)
    routed = Matcher.open(paths(folder, ["t2i"]))
    with pytest.raises(InputError, match=r"t2i\.tar.*--num_layer_routing 3"):
        routed.pooled(routed.encode_images(features))


def test_a_text_without_a_known_word(folder: Path) -> None:
    matcher = Matcher.open(paths(folder, ["i2t"]))
    assert all(map(matcher.unknown, ("", "  ", "♞", "♞ ♞")))
    assert not any(map(matcher.unknown, ("dog", "♞ dog")))


def test_precision_is_the_checkpoints_or_the_one_that_is_asked_for(folder: Path) -> None:
    for given, used in ((None, "fp32"), ("bf16", "bf16")):
        matcher = Matcher.open(paths(folder, ["t2i"])[0], precision=given)
        assert [model.precision for model in matcher.models] == [used]


CHANGES: dict[str, tuple[Callable[[dict], object], str]] = {
    "width": (lambda content: content["options"].update(img_dim=7), "features 7 wide"),
    "BERT": (lambda content: content.update(bert="0" * 64), "another BERT, 000000"),
    "tokens": (lambda content: content["tokenization"].update(lower_case=False), "case kept"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_models_that_are_no_ensemble_are_refused(change: str, folder: Path, tmp_path: Path) -> None:
    first, second = paths(folder, ["i2t", "t2i"])
    content = state(second)
    make, named = CHANGES[change]
    make(content)
    torch.save(content, tmp_path / "other.tar")
    with pytest.raises(InputError, match=rf"other\.tar.*{named}"):
        Matcher.open([first, tmp_path / "other.tar"])


def test_bad_input_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="model_paths"):
        Matcher.open([])
    matcher = Matcher.open(paths(folder, ["i2t"]))
    good = np.zeros((2, REGIONS, IMG_DIM))
    for features in (good[0], good[:0], good[..., :-1], good[:, :0]):
        with pytest.raises(InputError, match=re.escape(str(features.shape))):
            matcher.encode_images(features)
    good[1, 3, 5] = np.nan
    for features in (good, torch.from_numpy(good)):
        with pytest.raises(InputError, match=r"images 0 to 1.*NaN"):
            matcher.encode_images(features)
    for texts, named in (
        ([], "list"),
        ("dog", "'dog'"),
        (["\ud800"], "d800"),
        (["a" * 10**5], "100000"),
    ):
        with pytest.raises(InputError, match=named):
            matcher.encode_captions(texts)


def test_the_example_of_the_page_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs/evaluation.md").read_text()
    (code,) = re.findall(r"## The model in Python\n[^#]*?```python\n(.*?)```", page, re.DOTALL)
    for path in paths(folder, ["i2t", "t2i"]):
        checkpoint = read_checkpoint(path)
        write_arrays(tmp_path / f"{path.stem}.safetensors", checkpoint, bert_of(checkpoint))
    (tmp_path / "bert").symlink_to(folder / "bert")
    shutil.copy(folder / "data/tiny/test_ims.npy", tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["scores"].shape == (10, 2)
    assert names["i2t"].shape == names["t2i"].shape == (1, 2, 9, 4)
    best = names["scores"].max(0)[0]
    assert names["scores"][names["best"][0], 0] == best
