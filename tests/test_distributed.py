"""Several processes: what torchrun's environment says, shares, collectives, equal training."""

import copy
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, IMG_DIM, REGIONS, write_split
from ranks import on_ranks
from test_model import SMALL
from transformers import BertConfig, BertModel

from checkpoint.bert import load_bert
from common.config import ModelConfig
from common.distributed import connected
from common.errors import InputError
from common.world import ALONE, World
from data import Split, TrainingBatches
from model import DIME
from scripts.parts.traffic import PATHS, Step
from training.config import TrainConfig
from training.step import TrainStep
from vocab import Vocabulary

CPU = torch.device("cpu")


def test_world_is_what_torchrun_says() -> None:
    assert World.of({}) == ALONE == World(0, 1, 0)
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert World.of(environment) == World(5, 8, 1)
    for name, value in (("RANK", "8"), ("RANK", "x"), ("LOCAL_RANK", "6")):
        with pytest.raises(InputError, match=f"{name}={value}"):
            World.of(environment | {name: value})


@pytest.mark.parametrize(("items", "size"), [(7, 3), (2, 3), (0, 3), (8, 4), (5, 1)])
def test_shares_are_all_items_in_order_and_padded_to_one_length(items: int, size: int) -> None:
    worlds = [World(rank, size) for rank in range(size)]
    shares = [world.share(items) for world in worlds]
    assert [i for share in shares for i in share] == list(range(items))
    most = max(map(len, shares))
    assert worlds[0].largest_share(items) == most
    for world, share in zip(worlds, shares, strict=True):
        padded = world.padded_share(items)
        assert (
            padded[: len(share)]
            == list(share)
            == list(ALONE.share(items))[share.start : share.stop]
        )
        assert len(padded) == most and set(padded) <= set(range(items))


def test_taken_port_is_named(monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        port = f"port: {server.getsockname()[1]}"
        with pytest.raises(InputError, match=port), connected(World(0, 2)):
            pass


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """15 captions, so that batches of 7 leave one item: other ranks than the last have none."""
    folder = tmp_path_factory.mktemp("data")
    write_split(folder, "train", 3, longest=5)
    return Split.open(folder, "train", IMG_DIM, training=True)


@dataclass(frozen=True)
class Equality:
    """What is trained, and how; `dtype` stands for the float32 of the program."""

    direction: str = "i2t"
    extras: int = 1
    options: tuple[tuple[str, object], ...] = ()
    dtype: torch.dtype = torch.float64
    compiled: bool = False

    def train(self, split: Split, world: World, steps: int = 3) -> list[dict[str, torch.Tensor]]:
        """Train some steps; returns losses, gradients, weights and statistics of each."""
        torch.manual_seed(0)
        name = "extra_stc" if self.direction == "i2t" else "extra_img"
        options = SMALL | {name: self.extras, "img_dim": IMG_DIM} | dict(self.options)
        config = TrainConfig(direction=self.direction, batch_size=7, workers=0, **options)
        skips = config.skips_single(split.regions_per_image)
        vocabulary = Vocabulary.load(GOLDEN / "i2t/bert")
        batches = TrainingBatches(split, vocabulary, config, 10, skips, world=world)
        bert = load_bert(GOLDEN / "i2t/bert").model  # without dropout
        step = TrainStep(config, DIME(config, bert).to(self.dtype), CPU, world)
        step.prepare(steps)
        if self.compiled:
            step.model.space.compile_routes()
        states = []
        for number in range(steps):
            batch = batches[divmod(number, len(batches))].to(CPU)
            figures = step.step(replace(batch, regions=batch.regions.to(self.dtype)))
            assert step.model.is_compiled == self.compiled
            named = {
                f"grad of {n}": p.grad
                for n, p in step.model.named_parameters()
                if p.grad is not None
            }
            weights = {
                n: v for n, v in step.model.state_dict().items() if not n.startswith("text.bert")
            }
            states.append(copy.deepcopy(figures | named | weights))
        return states


def as_it_is(function: Callable, **options: object) -> Callable:
    """Stands for a compiler: chunks are padded and copied as for compiled code."""
    return function


def double_is_float32() -> None:
    """Make this process compute in float64 where the program asks for float32."""
    mean, narrow = torch.Tensor.mean, torch.Tensor.float

    def wide(self: torch.Tensor, *args: object, dtype: object = None, **kwargs: object) -> object:
        return mean(self, *args, dtype=dtype and torch.float64, **kwargs)

    torch.Tensor.mean = wide
    # Adam takes its flag, made of a bool, in float32 alone.
    torch.Tensor.float = lambda t: narrow(t) if t.dtype == torch.bool else t.double()


def trained(case: Equality, split: Split, backend: str | None, world: World) -> list[dict]:
    """Return what `case.train` returns in this process, compiled by a back end."""
    if case.dtype == torch.float64:
        double_is_float32()
    torch.compile = partial(torch.compile, backend=backend) if backend else as_it_is
    return case.train(split, world)


def assert_equality(
    folder: Path, split: Split, case: Equality, size: int, backend: str | None = None
) -> None:
    """Compare what `size` processes and one compute."""
    work = partial(trained, case, split, backend)
    (alone,), ranks = (on_ranks(folder, n, work) for n in (1, size))
    if case.dtype == torch.float64:
        limit, steps, kinds = 1e-10, 3, ("",)
    else:  # Adam makes a full step of a gradient that is rounding noise: what follows differs
        limit, steps, kinds = 1e-5, 1, ("grad of ", "L", "Rank", "Path", "running_")
    for rank, states in enumerate(ranks):
        for number in range(steps):
            ours, theirs = states[number], alone[number]
            assert ours.keys() == theirs.keys() and ours["finite"] == 1
            names = [name for name in ours if any(kind in name for kind in kinds)]
            for name in names:
                where = f"rank {rank}, step {number}: {name}: "
                torch.testing.assert_close(
                    *(ours[name], theirs[name]), atol=limit, rtol=limit, msg=where.__add__
                )


SUM, CHECKPOINTED = ("max_violation", False), ("activation_checkpointing", True)
EQUALITIES = [
    (2, Equality("i2t", extras=0)),
    (3, Equality("i2t", extras=2, options=(SUM,))),
    (4, Equality("i2t", options=(CHECKPOINTED,))),
    (2, Equality("t2i", extras=2, options=(SUM, CHECKPOINTED))),
    (3, Equality("t2i", extras=0)),
    (4, Equality("t2i")),
    (3, Equality("i2t", options=(("num_layer_routing", 0),))),
    (3, Equality("t2i", dtype=torch.float32)),
    (2, Equality("i2t", dtype=torch.float32, compiled=True)),
]
NAMED = pytest.mark.parametrize(("size", "case"), EQUALITIES)


@NAMED
def test_several_processes_compute_what_one_computes(tmp_path, split, size, case) -> None:
    assert_equality(tmp_path, split, case, size)


WIDE = [
    Equality(direction, extras, options, dtype, compiled)
    for direction in ("i2t", "t2i")
    for extras in (0, 1)
    for options in ((), (SUM,), (CHECKPOINTED,))
    for dtype, compiled in ((torch.float64, False), (torch.float32, False), (torch.float32, True))
]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("case", WIDE)
def test_every_case_of_several_processes(tmp_path, split, size, case) -> None:
    assert_equality(tmp_path, split, case, size, "eager")


def bytes_of_messages(case: Equality, split: Split, world: World) -> list[int]:
    """Return how many bytes a step gathers and sums."""
    gathered, summed = [], []
    all_gather, all_reduce = torch.distributed.all_gather, torch.distributed.all_reduce

    def counted_gather(every: list[torch.Tensor], own: torch.Tensor) -> None:
        gathered.append(sum(each.nbytes for each in every))
        all_gather(every, own)

    def counted_sum(tensor: torch.Tensor) -> None:
        summed.append(tensor.nbytes)
        all_reduce(tensor)

    torch.distributed.all_gather, torch.distributed.all_reduce = counted_gather, counted_sum
    states = case.train(split, world, steps=1)
    weights = sum(v.numel() for n, v in states[0].items() if n.startswith("grad of "))
    return [sum(gathered), sum(summed), weights]


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_the_estimated_traffic_is_that_of_a_step(tmp_path, split, direction) -> None:
    case = Equality(direction, dtype=torch.float32)
    (gathered, summed, weights), other, last = on_ranks(
        tmp_path, 3, partial(bytes_of_messages, case, split)
    )
    assert [gathered, summed, weights] == other == last
    hidden = load_bert(GOLDEN / "i2t/bert").model.config.hidden_size
    sizes = {"dim": SMALL["embed_size"], "hidden": hidden, "regions": REGIONS, "words": 10}
    step = Step(direction, batch=7, processes=3, weights=weights, **sizes)
    # In i2t, captions are gathered with all their positions.
    assert (step.gathered, step.summed) == (gathered, summed)


def test_the_estimate_has_the_weights_of_the_published_sizes() -> None:
    with torch.device("meta"):
        model = DIME(ModelConfig(direction="t2i"), BertModel(BertConfig(), add_pooling_layer=False))
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert Step("t2i", 32, 8).weights == weights
    assert model.space.path_mapping.out_features == PATHS
