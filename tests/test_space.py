"""space.py: slices, what is kept of them, and compilation change no score and no gradient."""

import logging
import math
import signal
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from conftest import same
from test_model import ABLATIONS, small_batch, small_model
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import space
from common import compile as compiling
from common.compile import gains_by_compiling
from common.config import Precision
from common.memory import chunk_size
from common.signals import Signals, Stopped
from model import DIME
from router import ContextProjections

CPU = torch.device("cpu")
ROUNDING = 5e-4  # of gradients up to 89; those that batch normalisation cancels are rounding alone


def trained(model: DIME, pairs: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores of a batch in training mode, and gradients and statistics after it."""
    regions, ids, mask = small_batch()
    model.train().text.bert.eval()
    images, captions = model.encode_images(regions), model.encode_captions(ids, mask)
    scores, paths = model.score(images, captions, pairs)
    weights = torch.arange(scores.numel()).view_as(scores) - 4.0
    ((scores * weights).sum() + model.space.embed_paths(paths).sum()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return scores.detach(), found | dict(model.named_buffers())


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
@pytest.mark.parametrize("pairs", [1, 2, 4, 7])
def test_slices_change_no_score_gradient_or_statistic(direction: str, pairs: int) -> None:
    expected = trained(seeded(direction))
    scores, found = trained(seeded(direction), pairs)
    torch.testing.assert_close(scores, expected[0], atol=1e-6, rtol=1e-5)
    assert found.keys() == expected[1].keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[1][name], atol=ROUNDING, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("width", "slices"), [(256, [96, 64]), (192, [128, 32]), (64, [160])])
def test_slices_hold_as_many_numbers_at_every_width(
    width: int, slices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """96 pairs at the published width, 128 and 384 at narrower ones; here of 5 by 32."""
    cpu, gpu = torch.device("cpu"), torch.device("meta")
    assert [chunk_size(cpu, d) for d in (8, 64, 192, 256, 10**5)] == [384, 384, 128, 96, 1]
    assert [chunk_size(gpu, d) for d in (64, 256)] == [4 * 8192, 8192]
    sizes = {"embed_size": width, "num_head_IMRC": 16, "hid_IMRC": 8, "hid_router": 8}
    model = small_model("i2t", **sizes)
    routed, route = [], model.space._route

    def counting(
        tokens: Tensor, views: Sequence[ContextProjections], contexts: int
    ) -> tuple[Tensor, Tensor]:
        routed.append(len(tokens) * contexts)
        return route(tokens, views, contexts)

    monkeypatch.setattr(model.space, "_route", counting)
    query, context = (
        space.Modality(torch.randn(n, 4, width), torch.randn(n, width), torch.ones(n, 4).bool())
        for n in (5, 32)
    )
    with torch.no_grad():
        model.space(query, context)
    assert routed == slices


def seeded(direction: str, **options: object) -> DIME:
    torch.manual_seed(3)
    return small_model(direction, **options)


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
@pytest.mark.parametrize("kept", [0, 4, 8, math.inf])
def test_what_is_computed_again_has_the_same_gradients_to_the_last_bit(
    direction: str, kept: float
) -> None:
    """So a run may be gone on with on a machine with less memory."""
    expected = trained(seeded(direction), 2)
    model = seeded(direction)
    model.space.kept_pairs = kept
    assert same(trained(model, 2), expected)


@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_skipping_changes_no_gradient(routing: str) -> None:
    expected = trained(seeded("i2t", routing=routing))
    model = seeded("i2t", routing=routing)
    model.space.skip_nothing()
    scores, found = trained(model)
    torch.testing.assert_close(scores, expected[0], atol=1e-6, rtol=1e-5)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[1][name], atol=ROUNDING, rtol=1e-4, msg=name)


def test_what_is_kept_of_the_published_model() -> None:
    sizes = {"embed_size": 256, "num_head_IMRC": 16, "hid_IMRC": 512}
    kept = small_model("i2t", **sizes).space.pair_memory(36, "fp32")
    assert kept / (36 * 256 * 4) == pytest.approx(74, rel=0.01)


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hid_IMRC": 2048},
        {"num_layer_routing": 6, "cells": "IMRC,CMRC"},
        {"num_layer_routing": 2},
        {"num_layer_routing": 1},
        {"cells": "CMRC"},
        {"cells": "GLGC,CMRC"},
        {"cells": "RIC,GLGC"},
        {"routing": "hard"},
        {"routing": "uniform"},
        {"embed_size": 64, "hid_IMRC": 128, "hid_router": 128},
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_kept_of_a_pair_is_what_memory_is_reckoned_with(
    direction: str, options: dict[str, object], precision: Precision
) -> None:
    sizes = {"embed_size": 256, "num_head_IMRC": 16, "hid_IMRC": 512, "hid_router": 512}
    model = small_model(direction, **sizes | options).train()
    model.space.skip_nothing()
    images, captions = (torch.randn(12, n, model.config.embed_size) for n in (36, 32))
    images, captions = (F.normalize(x, dim=-1).requires_grad_() for x in (images, captions))
    mask = torch.ones(12, 32, dtype=torch.bool)
    query, context = (images, captions) if direction == "i2t" else (captions, images)
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        kept = model.space(
            space.Modality(query, query.mean(1), mask[:, : query.shape[1]]),
            space.Modality(context, context.mean(1), mask.new_ones(12, context.shape[1])),
            1000,
        )
    assert kept[0].shape == (12, 12)
    found = sum(held.values()) / 144
    assert 0.85 < model.space.pair_memory(query.shape[1], precision) / found < 1.3


def test_a_limit_of_memory_keeps_more_of_a_smaller_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "used_memory", lambda device: 1e9)
    kept = []
    for options in ({}, {"num_layer_routing": 2}, {"cells": "CMRC"}):
        room = small_model("i2t", **options).space
        room.keep_within(1.9e9, 10**6, 36, "fp32")
        kept.append(room.kept_pairs * room.pair_memory(36, "fp32"))
    assert min(kept) > 0.85 * max(kept)


def test_a_limit_of_memory_decides_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room = small_model("i2t").space
    monkeypatch.setattr(space, "used_memory", lambda device: 1e9)
    monkeypatch.setattr(space, "free_memory", lambda device: 100e9)
    with caplog.at_level(logging.INFO):
        room.keep_within(None, 2048, 36, "fp32")
        assert room.kept_pairs >= 2048 and not caplog.records
        most = room.kept_pairs
        room.keep_within(1.9e9, most, 36, "fp32")
        assert 0 < room.kept_pairs < most
        room.keep_within(0.5e9, 2048, 36, "fp32")
    assert room.kept_pairs == 0
    assert "activations of 100 % of the pairs are computed twice" in caplog.text


@pytest.fixture
def compiled_frames(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Counts what is compiled, in place of the compiler."""
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **more: compile_(function, backend=counter, **more)
    )
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_compiled_once_for_every_number_of_images_captions_and_words(
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
        found, _ = model.score(images, captions, 6)
        torch.testing.assert_close(found, whole, atol=1e-6, rtol=0)
        once = compiled_frames.frame_count
        assert once > 0
        # fewer images, fewer captions, and captions of fewer words
        found, _ = model.score(images, short, 6)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        for i, c in ((2, 4), (1, 4), (3, 2), (3, 1), (1, 1)):
            found, _ = model.score(images[:i], captions[:c], 6)
            torch.testing.assert_close(found, whole[:i, :c], atol=1e-6, rtol=0)
    assert compiled_frames.frame_count == once


def test_a_signal_is_no_failure_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes while compiled code runs, in work that is left at once."""
    monkeypatch.setattr(
        torch, "compile", lambda *_, **__: lambda *given: signal.raise_signal(signal.SIGTERM)
    )
    model = small_model("i2t").eval()
    regions, ids, mask = small_batch()
    model.space.compile_routes()
    with Signals() as signals, pytest.raises(Stopped), signals.at_once(), torch.no_grad():
        model.score(model.encode_images(regions), model.encode_captions(ids, mask))
    assert model.space.is_compiled


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_compiled_training_has_the_same_gradients(
    ablation: str, compiled_frames: CompileCounter
) -> None:
    expected = trained(seeded("i2t", **ABLATIONS[ablation]), 6)
    model = seeded("i2t", **ABLATIONS[ablation])
    model.space.compile_routes()
    model.space.kept_pairs = 6
    scores, found = trained(model, 6)
    assert compiled_frames.frame_count > 0 and model.space.is_compiled
    torch.testing.assert_close(scores, expected[0], atol=1e-6, rtol=1e-5)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[1][name], atol=ROUNDING, rtol=1e-4, msg=name)


class NoWayBack(torch.autograd.Function):
    """A step whose backward pass cannot be compiled."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        raise RuntimeError("no code for it\nand more")


@pytest.mark.parametrize("scored_before", [False, True])
@pytest.mark.parametrize("kept", [0, math.inf])
def test_a_backward_pass_that_cannot_be_compiled_is_gone_on_without(
    kept: float,
    scored_before: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As it is known at the first backward pass only, of a checkpoint or after a validation."""

    def compile_(function: Callable, **options: object) -> Callable:
        return lambda *given: tuple(map(NoWayBack.apply, function(*given)))

    monkeypatch.setattr(torch, "compile", compile_)
    expected = trained(seeded("i2t"), 6)
    model = seeded("i2t")
    model.space.kept_pairs = kept
    model.space.compile_routes()
    if scored_before:
        with torch.random.fork_rng(), torch.no_grad():
            regions, ids, mask = small_batch()
            model.eval().score(model.encode_images(regions), model.encode_captions(ids, mask), 6)
        assert model.space.is_compiled
    scores, found = trained(model, 6)
    torch.testing.assert_close(scores, expected[0], atol=1e-6, rtol=1e-5)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[1][name], atol=ROUNDING, rtol=1e-4, msg=name)
    assert not model.space.is_compiled
    (record,) = caplog.records
    assert record.getMessage() == "not compiled, going on without: no code for it"


@pytest.mark.parametrize(
    ("choice", "pairs", "compiler", "compiled"),
    [
        (None, 10**9, True, True),
        (None, 10**9, False, False),
        (None, 1000, True, False),
        (True, 1000, False, True),
        (False, 10**9, True, False),
    ],
)
def test_compiled_where_it_pays(
    choice: bool | None,
    pairs: int,
    compiler: bool,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    done: list[Callable] = []
    monkeypatch.setattr(space, "gains_by_compiling", lambda device, precision: compiler)
    room = small_model("i2t").space
    monkeypatch.setattr(room, "compile_routes", lambda: done.append(room))
    with caplog.at_level(logging.INFO):
        room.compile_where_it_pays(choice, pairs, "bf16")
    assert bool(done) == compiled == ("compiling the routing" in caplog.text)


@pytest.mark.parametrize("found", [None, "there"])
def test_a_processor_compiles_in_bfloat16_only(
    found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: found)
    assert gains_by_compiling(torch.device("cuda"), "fp32") == bool(found)
    assert gains_by_compiling(CPU, "bf16") == bool(found)
    assert not gains_by_compiling(CPU, "fp32")
    assert not gains_by_compiling(torch.device("meta"), "bf16")


def test_a_compiled_batch_is_not_worked_on_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of one query is doubled for compiled code, so that a slice must not be one."""
    model, done = small_model("i2t"), []
    regions, ids, mask = small_batch()
    images, captions = model.encode_images(regions), model.encode_captions(ids, mask)
    images, captions = images[torch.arange(8) % 2], captions[torch.arange(8) % 2]

    real = model.space._route

    def route(tokens: Tensor, views: ContextProjections, contexts: int) -> tuple[Tensor, Tensor]:
        done.append(len(tokens) * contexts)
        return real(tokens, views, contexts)

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(model.space, "_route", route)
    model.space.compile_routes()
    with torch.no_grad():
        model.score(images, captions, 8)
    assert sum(done) == 8 * 8 and max(done) == 8
    assert model.space.is_compiled
