"""scripts.search: answers equal those of evaluation; the command line."""

import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_here
from PIL import Image
from searching import SENTENCES, Searching, model_of, options_of, searching, write_world

import evaluate_models
from checkpoint import Checkpoint
from common.errors import InputError
from scripts import search
from scripts.parts import search_models
from scripts.parts.search_first_stage import Faiss, Matrix, best_rows, write_faiss
from scripts.parts.search_models import digest_of_model
from scripts.search import Index, Matcher


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and models, and indexes of them: with and without a first stage, and in float16."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    first = ["--first_stage", model_of(folder, "encoders")]
    captions = ["--captions", folder / "sentences.txt", "--dtype", "float32"]
    with pytest.MonkeyPatch.context() as patch:
        for name, more in {"all": captions, "staged": [*captions, *first], "half": []}.items():
            argv = [*options_of(folder), *more, "--out", folder / name]
            assert run_here(patch, search.main, argv) == 0
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Searching:
    return searching(monkeypatch, capsys)


@pytest.fixture(scope="module")
def expected(world: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Files, captions and scores `[I, T]` of evaluate_models for the training images."""
    data = world / "data/own"
    (world / "data/again").mkdir()
    for name in ("ims.npy", "caps.txt", "ids.txt"):
        shutil.copy(data / f"train_{name}", world / f"data/again/test_{name}")
    models = [str(model_of(world, name)) for name in ("i2t", "t2i")]
    where = ["--data_path", str(world / "data"), "--data_name", "again"]
    scores = ["--save_scores", str(world / "scores.npy")]
    with pytest.MonkeyPatch.context() as patch:
        argv = ["--model_path", *models, *where, *scores, "--workers", "0"]
        assert run_here(patch, evaluate_models.main, argv) == 0
    names = json.loads((data / "id_mapping.json").read_text())
    ids = list(dict.fromkeys((data / "train_ids.txt").read_text().split()))
    captions = (data / "train_caps.txt").read_text().splitlines()
    return [names[key] for key in ids], captions, np.load(world / "scores.npy")


def test_scores_of_a_sentence_are_those_of_evaluation(world: Path, expected: tuple) -> None:
    files, captions, scores = expected
    index = Index.open(world / "all")
    for column in (0, 7, 29):
        answer = index.images(captions[column])
        assert answer.candidates == answer.total == len(answer) == 10
        found = {hit.name: hit.score for hit in answer}
        assert np.abs([found[name] for name in files] - scores[:, column]).max() < 1e-5
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert [index.names[hit.row] for hit in answer] == list(found)


def test_scores_of_an_image_are_those_of_evaluation(
    world: Path, expected: tuple, run: Searching
) -> None:
    """As a file and as an open image."""
    files, captions, scores = expected
    path = world / "own.txt"
    path.write_text("\n".join(captions))
    how = ["--captions", path, "--dtype", "float32", "--out", world / "own"]
    run(*options_of(world), *how)
    index = Index.open(world / "own")
    for row in (0, 5):
        file = world / "images" / files[row]
        for query in (file, Image.open(file)):
            answer = index.sentences_of(query, top=30)
            found = np.zeros(30)
            found[[hit.row for hit in answer]] = [hit.score for hit in answer]
            assert np.abs(found - scores[row]).max() < 1e-5
            assert all(captions[hit.row] == hit.name for hit in answer)
            assert {"regions", "encode", "rerank"} <= answer.seconds.keys()


def test_reranking_all_equals_scoring_all(world: Path) -> None:
    every, staged = Index.open(world / "all"), Index.open(world / "staged")
    for text in SENTENCES[:2]:
        answers = every.images(text), staged.images(text, rerank=10)
        assert [hit.name for hit in answers[0]] == [hit.name for hit in answers[1]]
        scores = [[hit.score for hit in answer] for answer in answers]
        assert np.abs(np.subtract(*scores)).max() < 1e-6


def test_the_best_of_the_first_stage_are_reranked(world: Path) -> None:
    """The others follow with the first stage's score."""
    index, every = Index.open(world / "staged"), Index.open(world / "all")
    encoders = Matcher.open(model_of(world, "encoders"))
    vectors = np.load(world / "staged/images/vectors.npy")
    for text in SENTENCES[:3]:
        products = vectors @ encoders.pooled(encoders.encode_captions([text]))[0]
        order = products.argsort()[::-1]
        answer = index.images(text, top=7, rerank=4)
        assert (answer.candidates, len(answer)) == (4, 7)
        exact = {hit.row: hit.score for hit in every.images(text)}
        first, rest = answer.hits[:4], answer.hits[4:]
        assert {hit.row for hit in first} == set(order[:4])
        assert [hit.score for hit in first] == sorted([exact[r] for r in order[:4]], reverse=True)
        assert [hit.row for hit in rest] == list(order[4:7])
        assert np.allclose([hit.score for hit in rest], products[order[4:7]])
        alone = index.images(text, top=3, rerank=0)
        assert alone.candidates == 0 and [hit.row for hit in alone] == list(order[:3])
        assert len(index.images(text, top=2, rerank=4)) == 2


def test_the_encoders_alone_score_by_products(world: Path, run: Searching) -> None:
    how = options_of(world)
    run(*how[:2], model_of(world, "encoders"), *how[4:], "--out", world / "encoded")
    answer = Index.open(world / "encoded").images(SENTENCES[0])
    staged = Index.open(world / "staged").images(SENTENCES[0], rerank=0)
    assert [hit.name for hit in answer] == [hit.name for hit in staged]
    assert np.allclose([hit.score for hit in answer], [hit.score for hit in staged], atol=1e-6)
    assert answer.candidates == 10


def test_models_compute_in_float32_where_bfloat16_is_slow(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "precision_on", lambda checkpoint, device: "bf16")
    for is_fast, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(search_models, "has_fast_bf16", lambda device, fast=is_fast: fast)
        models = Index.open(world / "staged").models
        opened = [*models.matcher.models, *models.first.models]
        assert [model.precision for model in opened] == [precision] * 3


def test_an_index_computes_in_the_precision_that_it_was_made_with(
    world: Path, run: Searching, tmp_path: Path
) -> None:
    run(*options_of(world, "--precision", "bf16", "--out", tmp_path / "bf16"))
    models = Index.open(tmp_path / "bf16").matcher.models
    assert [model.precision for model in models] == ["bf16"] * 2
    other = options_of(world, "--precision", "fp32", "--out", tmp_path / "bf16")
    assert "--precision" in run(*other, status=2)


def test_float16_changes_scores_little(world: Path) -> None:
    assert np.load(world / "half/images/tokens_0.npy").dtype == np.float16
    exact, half = (Index.open(world / name).images(SENTENCES[0]) for name in ("all", "half"))
    scores = [{hit.name: hit.score for hit in answer} for answer in (exact, half)]
    assert 0 < max(abs(scores[0][name] - scores[1][name]) for name in scores[0]) < 1e-3


def test_the_best_rows_of_equal_scores_are_the_first() -> None:
    scores = np.float32([1, 3, 2, 3, 2, 2, 0])
    for count in range(1, 9):
        assert best_rows(scores, count).tolist() == [1, 3, 2, 4, 5, 0, 6][:count]
    vectors = np.eye(5, dtype=np.float32)
    rows, values = Matrix(vectors).search(np.float32([0, 2, 5, 2, 1]), 3)
    assert (rows.tolist(), values.tolist()) == ([2, 1, 3], [5, 2, 2])


def test_faiss_flat_equals_numpy(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 8)).astype(np.float32)
    digest = write_faiss(tmp_path / "flat", "Flat", vectors)
    flat, matrix = Faiss(tmp_path / "flat", digest, 300, 8), Matrix(vectors)
    inverted = Faiss(tmp_path / "ivf", write_faiss(tmp_path / "ivf", "IVF4,PQ4x4", vectors), 300, 8)
    for query in rng.normal(size=(5, 8)).astype(np.float32):
        rows, scores = matrix.search(query, 9)
        found, approximate = flat.search(query, 9)
        assert found.tolist() == rows.tolist() and np.allclose(scores, approximate, atol=1e-5)
        found, _ = inverted.search(query, 100)
        assert len(set(found) & set(rows[:5])) >= 3
    assert len(inverted.search(vectors[0], 1000)[0]) == 300  # and no row of -1


def test_two_threads_get_the_answers_of_one(world: Path) -> None:
    index = Index.open(world / "staged")
    alone = [index.images(text).hits for text in SENTENCES]
    found: dict[int, list] = {}

    def ask(number: int) -> None:
        found[number] = [index.images(text).hits for text in SENTENCES]

    threads = [threading.Thread(target=ask, args=[number]) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: alone, 1: alone}


def test_pairs_are_routed_as_the_matcher_routes_them(world: Path) -> None:
    index = Index.open(world / "all")
    matcher, text = index.matcher, SENTENCES[4]
    features = np.load(world / "data/own/train_ims.npy")[:2]
    rows = [index.names.index(f"{key}.png") for key in (0, 1)]
    wanted = matcher.routes(matcher.encode_images(features), matcher.encode_captions([text]))
    for pairs, gates in zip(index.pairs(rows, text), wanted, strict=True):
        for image in (0, 1):
            assert np.abs(pairs.route(image, [0]) - gates[image]).max() < 1e-5
        assert pairs.words(0)[:2] == ["a", "man"]
    assert index.boxes.shape == (10, 36, 4)


def test_a_query_is_printed_and_written(world: Path, run: Searching) -> None:
    path = world / "answer.json"
    where = ["--index", world / "staged", "--json", path]
    printed = run("query", "a man in red", *where, "--top", 3, "--rerank", 2).splitlines()
    answer = json.loads(path.read_text())
    assert answer["query"] == "a man in red"
    assert (answer["candidates"], answer["total"], len(answer["hits"])) == (2, 10, 3)
    assert {"encode", "first_stage", "rerank"} == answer["seconds"].keys()
    for line, hit in zip(printed, answer["hits"], strict=False):
        assert hit["name"] in line and f"{hit['score']:.4f}" in line
    assert "first stage" in printed[2] and "2 of 10" in printed[3]
    run("query", *where, "--image", world / "images/3.png")
    assert json.loads(path.read_text())["hits"][0]["name"] in SENTENCES
    for argv in ([], ["text", "--image", "a.png"]):
        assert "--image" in run("query", *where, *argv, status=2)


def test_the_code_of_the_page_runs_in_any_folder(world: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs/search.md").read_text()
    (code,) = re.findall(r"## Python\n[^#]*?```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "DIME").symlink_to(ROOT)
    (tmp_path / "INDEX").symlink_to(world / "all")
    shutil.copy(world / "images/3.png", tmp_path / "photo.jpg")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(str(world / "images") in line for line in lines[:3]) and "10 of 10" in lines[3]
    assert {line.split(maxsplit=1)[1] for line in lines[4:]} < set(SENTENCES)


def test_an_unknown_name_is_no_part_of_the_module() -> None:
    with pytest.raises(ImportError):
        from scripts.search import Indexes  # noqa: F401


@pytest.mark.parametrize("verb", ["index", "query", "serve"])
def test_help_of_a_verb_imports_no_torch(verb: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "scripts.search", verb, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--device" in done.stdout
    assert not re.search(r"\| +(torch|transformers|faiss|gradio)$", done.stderr, re.MULTILINE)


def test_another_verb_is_refused(run: Searching) -> None:
    assert "serve" in run("search", status=2)


def test_a_query_needs_a_word(world: Path) -> None:
    index = Index.open(world / "half")
    for text in ("", "  ", "♞♞", "x" * 10_001):
        with pytest.raises(InputError):
            index.images(text)
    assert len(index.images("♞ a man")) == 10


def test_an_index_of_another_kind_is_refused(tmp_path: Path, run: Searching) -> None:
    for content in ('{"format": "dime-search-2"}', "[]", '{"format": "dime-search-1"}'):
        (tmp_path / "index.json").write_text(content)
        assert "index.json" in run("query", "--index", tmp_path, SENTENCES[0], status=2)
    assert "index.json" in run("query", "--index", tmp_path / "none", SENTENCES[0], status=2)


def test_the_digest_of_a_model_covers_its_options(tmp_path: Path) -> None:
    weights, options = tmp_path / "a.safetensors", tmp_path / "a.json"
    weights.write_bytes(b"weights")
    digests = set()
    for value in (4, 9):
        options.write_text(json.dumps({"options": {"lambda_softmax_CMRC": value}}))
        digests.add(digest_of_model(weights))
    assert len(digests) == 2


def test_a_first_stage_has_no_routing_space(world: Path, run: Searching) -> None:
    how = [*options_of(world), "--out", world / "index"]
    error = run(*how, "--first_stage", model_of(world, "i2t"), status=2)
    assert "--num_layer_routing" in error and not (world / "index").exists()
