"""Chunks, activation checkpointing and compilation change no score and no gradient."""

import logging
from collections.abc import Callable, Iterator, Sequence
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import same
from test_model import ABLATIONS, BOTH, small_batch, small_model
from test_scoring import small_encoded
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from common import compile as compiling
from common.compile import WORTH_COMPILING, compiling_pays
from evaluation import score_all
from model import DIME

ROUNDING = 5e-4  # of gradients up to 89; those that batch normalisation cancels are only rounding


def trained(model: DIME, pairs: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores of a batch in training mode, and gradients and statistics after it."""
    regions, ids, mask = small_batch()
    model.train().text.bert.eval()
    images, captions = model.encode_images(regions), model.encode_captions(ids, mask)
    scores, paths = model.score(images, captions, pairs)
    weights = torch.arange(scores.numel()).view_as(scores) - 4.0
    ((scores * weights).sum() + model.space.embed_paths(paths).sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return scores.detach(), gradients | dict(model.named_buffers())


def seeded(direction: str, **options: object) -> DIME:
    torch.manual_seed(3)
    return small_model(direction, **options)


def assert_trained_alike(actual: tuple, expected: tuple) -> None:
    torch.testing.assert_close(actual[0], expected[0], atol=1e-6, rtol=1e-5)
    assert actual[1].keys() == expected[1].keys()
    for name, value in actual[1].items():
        torch.testing.assert_close(value, expected[1][name], atol=ROUNDING, rtol=1e-4, msg=name)


@BOTH
@pytest.mark.parametrize("pairs", [1, 2, 7])
def test_chunks_change_no_score_gradient_or_statistic(direction: str, pairs: int) -> None:
    assert_trained_alike(trained(seeded(direction), pairs), trained(seeded(direction)))


def count_routed(model: DIME, monkeypatch) -> list[int]:
    """A list that gets the number of pairs of every chunk."""
    routed: list[int] = []
    route = model.space.route

    def counting(tokens: Tensor, projections: Sequence, contexts: int) -> tuple[Tensor, Tensor]:
        routed.append(len(tokens) * contexts)
        return route(tokens, projections, contexts)

    monkeypatch.setattr(model.space, "route", counting)
    return routed


@BOTH
def test_activation_checkpointing_has_the_same_gradients_to_the_last_bit(
    direction: str, monkeypatch
) -> None:
    expected = trained(seeded(direction), 2)
    model = seeded(direction)
    model.space.activation_checkpointing = True
    routed = count_routed(model, monkeypatch)
    assert same(trained(model, 2), expected)
    assert sum(routed) == 2 * expected[0].numel(), "every pair is routed twice"


@pytest.fixture
def compiled_frames(monkeypatch) -> Iterator[CompileCounter]:
    """Counts the compiled functions, in place of the compiler."""
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **more: compile_(function, backend=counter, **more)
    )
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


@BOTH
def test_one_compilation_serves_every_number_of_images_captions_and_words(
    direction: str, compiled_frames: CompileCounter
) -> None:
    model = small_model(direction)
    regions, ids, mask = small_batch()
    with torch.no_grad():
        images, captions = model.encode_images(regions), model.encode_captions(ids, mask)
        whole, _ = model.score(images, captions, 6)
        short = captions[captions.mask.sum(1) <= 5]
        expected, _ = model.score(images, short, 6)
        model.space.compile_routes()
        torch.testing.assert_close(model.score(images, captions, 6)[0], whole, atol=1e-6, rtol=0)
        once = compiled_frames.frame_count
        assert once > 0
        # fewer captions, and captions with fewer words
        torch.testing.assert_close(model.score(images, short, 6)[0], expected, atol=1e-6, rtol=0)
        for i, c in ((2, 4), (1, 4), (3, 1), (1, 1)):
            scores, _ = model.score(images[:i], captions[:c], 6)
            torch.testing.assert_close(scores, whole[:i, :c], atol=1e-6, rtol=0)
    assert compiled_frames.frame_count == once


@pytest.fixture
def fixed_shapes(monkeypatch) -> None:
    """The CPU stands in for a GPU."""
    for place in ("model", "router"):
        monkeypatch.setattr(f"{place}.needs_fixed_shapes", lambda device: True)


@BOTH
def test_fixed_shapes_are_compiled_once_and_others_run_eagerly(
    direction: str, fixed_shapes: None, compiled_frames: CompileCounter, caplog
) -> None:
    """Five captions in chunks of 3, the last one padded."""
    model = small_model(direction)
    regions, ids, mask = small_batch()
    routed: list[int] = []
    with torch.no_grad():
        images, captions = model.encode_images(regions), model.encode_captions(ids, mask)
        expected, _ = model.score(images, captions)
        route = model.space.route
        model.space.compile_routes()
        compiled = model.space.compiled
        assert compiled is not None

        def noting(tokens: Tensor, projections: Sequence, contexts: int) -> tuple[Tensor, Tensor]:
            routed.append(len(tokens) * contexts)
            return route(tokens, projections, contexts)

        scores, _ = model.score(images, captions, 4)
        torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
        once = compiled_frames.frame_count
        assert once > 0
        compiled.function = noting  # the eager code
        torch.testing.assert_close(model.score(images, captions, 4)[0], scores)
        assert not routed
        for i, c, sizes in ((2, 4, 6), (3, 5, 1), (3, 1, 6)):
            scores, _ = model.score(images[:i], captions[:c], sizes)
            torch.testing.assert_close(scores, expected[:i, :c], atol=1e-6, rtol=0)
    assert routed and compiled_frames.frame_count == once and model.space.is_compiled
    assert all(record.levelno < logging.WARNING for record in caplog.records)


@BOTH
@pytest.mark.parametrize("pairs", [4, 10])
def test_padded_chunks_have_the_same_gradients(
    direction: str, pairs: int, fixed_shapes: None, monkeypatch
) -> None:
    """Contexts are padded, or queries; every chunk has one shape."""
    expected = trained(seeded(direction))
    model = seeded(direction)
    model.space.activation_checkpointing = True
    routed = count_routed(model, monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model.space.compile_routes()
    assert_trained_alike(trained(model, pairs), expected)
    assert len(set(routed)) == 1 and len(routed) > 2


def test_a_larger_batch_takes_the_place_of_a_smaller_one(
    fixed_shapes: None, compiled_frames: CompileCounter
) -> None:
    """A resumed run may begin with the smaller last batch of an epoch."""
    model = small_model("i2t")
    model.space.compile_routes()
    counts, compiled = [], model.space.compiled
    for captions, images in ((3, 2), (5, 3), (3, 2), (5, 3), (1, 1)):
        regions, ids, mask = small_batch(captions, images)
        scores = model(regions, ids, mask, 1).scores
        scores.sum().backward()
        counts.append(compiled_frames.frame_count)
        assert compiled is not None and len(compiled.shapes) == 1
    assert counts == [1, 2, 2, 2, 2]


def test_a_halved_chunk_is_compiled_after_running_out_of_memory(
    fixed_shapes: None, monkeypatch, caplog
) -> None:
    model = small_model("i2t")
    encoded = small_encoded(model)
    expected = score_all(model, encoded, torch.device("cpu"))
    compiled_chunks: list[int] = []

    def compile_(function: Callable, **options: object) -> Callable:
        def compiled(tokens: Tensor, projections: Sequence, contexts: int) -> object:
            if len(tokens) * contexts > 4:
                raise RuntimeError("CUDA out of memory")
            compiled_chunks.append(len(tokens) * contexts)
            return function(tokens, projections, contexts)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr("evaluation.chunk_size", lambda device, dim: 16)
    model.space.compile_routes()
    scores = score_all(model, encoded, torch.device("cpu"))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
    assert set(compiled_chunks) == {3} and model.space.is_compiled
    assert "out of memory" in caplog.text and "not compiled" not in caplog.text


@pytest.mark.parametrize("ablation", ["none", "hard", "no RIC", "one layer"])
def test_compiled_training_has_the_same_gradients(
    ablation: str, compiled_frames: CompileCounter
) -> None:
    expected = trained(seeded("i2t", **ABLATIONS[ablation]), 6)
    model = seeded("i2t", **ABLATIONS[ablation])
    model.space.compile_routes()
    model.space.activation_checkpointing = True
    assert_trained_alike(trained(model, 6), expected)
    assert compiled_frames.frame_count > 0 and model.space.is_compiled


@pytest.mark.parametrize("scored_before", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_backward_pass_that_cannot_be_compiled_runs_eagerly(
    checkpointing: bool, scored_before: bool, monkeypatch, caplog
) -> None:
    """The failure shows at the first backward pass only, perhaps after a validation."""

    def no_backward(output: Tensor) -> Tensor:
        output = output.clone()
        if output.requires_grad:
            output.register_hook(Mock(side_effect=RuntimeError("no code for it\nand more")))
        return output

    def compile_(function: Callable, **options: object) -> Callable:
        return lambda *inputs: tuple(map(no_backward, function(*inputs)))

    monkeypatch.setattr(torch, "compile", compile_)
    expected = trained(seeded("i2t"), 6)
    model = seeded("i2t")
    model.space.activation_checkpointing = checkpointing
    model.space.compile_routes()
    if scored_before:
        with torch.random.fork_rng(), torch.no_grad():
            regions, ids, mask = small_batch()
            model.eval().score(model.encode_images(regions), model.encode_captions(ids, mask), 6)
        assert model.space.is_compiled
    assert_trained_alike(trained(model, 6), expected)
    assert not model.space.is_compiled
    (record,) = caplog.records
    assert "no code for it" in record.getMessage() and "and more" not in record.getMessage()


def test_running_out_of_memory_is_no_failure_of_the_compiler(monkeypatch) -> None:
    fails = Mock(side_effect=RuntimeError("CUDA out of memory"))
    monkeypatch.setattr(torch, "compile", lambda function, **options: fails)
    model, (regions, ids, mask) = small_model("i2t"), small_batch()
    model.space.compile_routes()
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
        model.score(model.encode_images(regions), model.encode_captions(ids, mask))
    assert model.space.is_compiled


@pytest.mark.parametrize(
    ("choice", "pays", "compiled"),
    [(None, True, True), (None, False, False), (True, False, True), (False, True, False)],
)
def test_the_choice_counts_before_what_pays(
    choice: bool | None, pays: bool, compiled: bool, monkeypatch
) -> None:
    monkeypatch.setattr("model.compiling_pays", lambda *given: pays)
    model = small_model("i2t")
    model.compile_if_it_pays(choice, 10**9 if pays else 1)
    assert model.space.is_compiled == compiled


@pytest.mark.parametrize("program", [None, "there"])
def test_a_cpu_compiles_in_bfloat16_only(program: str | None, monkeypatch) -> None:
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: program)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: program)
    many = WORTH_COMPILING
    assert compiling_pays("cuda", "fp32", many) == bool(program)
    assert compiling_pays("cpu", "bf16", many) == bool(program)
    assert not compiling_pays("cpu", "fp32", many) and not compiling_pays("cpu", "bf16", many - 1)


def test_a_compiled_batch_is_not_padded_to_twice_its_work(monkeypatch) -> None:
    """Compiled chunks have at least 2 queries, so a chunk must not hold only one of them."""
    model = small_model("i2t")
    regions, ids, mask = small_batch()
    images, captions = model.encode_images(regions), model.encode_captions(ids, mask)
    images, captions = images[torch.arange(8) % 2], captions[torch.arange(8) % 2]
    routed = count_routed(model, monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model.space.compile_routes()
    with torch.no_grad():
        model.score(images, captions, 8)
    assert sum(routed) == 64
