"""recorded.py, with a recorder that runs on the CPU in the place of CUDA graphs."""

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Run, events, same, state, tiny_train
from torch import Tensor

from common import recorded
from common.recorded import WARM_UP, CudaGraphs, Outputs, Recorded
from training.resume import NEWEST
from training.step import TrainStep

LATER = "operation failed due to a previous error during capture"


class Replays:
    """Runs a function when it is replayed, into the same outputs each time, as a CUDA graph does.

    With an error, its recordings fail.
    """

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, []

    def run(self, function: Callable[[], Outputs]) -> Outputs:
        self.calls.append("run")
        return function()

    def record(self, function: Callable[[], Outputs]) -> Callable[[], Outputs]:
        self.calls.append("record")
        if self.error is not None:
            raise self.error
        outputs: Outputs = {}

        def replay() -> Outputs:
            self.calls.append("replay")
            for name, value in function().items():
                outputs.setdefault(name, torch.empty_like(value)).copy_(value)
            return outputs

        return replay


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    scale: int
    more: Tensor | None = None


class Doubled:
    """Notes the inputs that it was called with."""

    def __init__(self) -> None:
        self.seen: list[Inputs] = []

    def __call__(self, inputs: Inputs) -> Outputs:
        self.seen.append(inputs)
        return {"sum": inputs.scale * inputs.x.sum()}


def of(value: float, length: int = 3, scale: int = 2, more: Tensor | None = None) -> Inputs:
    return Inputs(torch.full((length,), value), scale, more)


def test_recorded_after_some_runs_and_then_replayed_from_the_same_inputs() -> None:
    function, recorder = Doubled(), Replays()
    doubled = Recorded(function, recorder)
    results = [doubled(of(float(n))) for n in range(WARM_UP + 3)]
    assert recorder.calls == ["run"] * WARM_UP + ["record"] + ["replay"] * 3
    # The results of replays are copies, which later replays leave alone.
    assert [result["sum"].item() for result in results] == [6 * n for n in range(WARM_UP + 3)]
    assert len({id(inputs) for inputs in function.seen[WARM_UP:]}) == 1


def test_other_shapes_types_and_numbers_run_eagerly() -> None:
    recorder = Replays()
    doubled = Recorded(Doubled(), recorder)
    assert doubled(of(1, length=4))["sum"] == 8  # a resumed run may begin with the last batch
    for _ in range(WARM_UP + 1):
        doubled(of(1))
    calls = list(recorder.calls)
    assert calls == ["run"] * (1 + WARM_UP) + ["record", "replay"]
    for _ in range(WARM_UP + 1):
        assert doubled(of(1, length=4))["sum"] == 8
        assert doubled(of(1, scale=5))["sum"] == 15
        assert doubled(of(1, more=torch.ones(1)))["sum"] == 6
        assert doubled(Inputs(torch.ones(3, dtype=torch.float64), 2))["sum"].dtype == torch.float64
    assert recorder.calls == calls
    assert doubled(of(7))["sum"] == 42 and recorder.calls[-1] == "replay"


def test_failing_recording_is_one_warning_and_eager_code(caplog) -> None:
    error = RuntimeError(LATER)
    error.__context__ = RuntimeError("nonzero asks\nand more")
    recorder = Replays(error)
    doubled = Recorded(Doubled(), recorder)
    assert [doubled(of(n))["sum"].item() for n in range(9)] == [6 * n for n in range(9)]
    assert recorder.calls == ["run"] * WARM_UP + ["record"]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.message.endswith("nonzero asks")


def test_out_of_memory_raises_as_in_eager_code() -> None:
    error = RuntimeError(LATER)
    error.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    doubled = Recorded(Doubled(), Replays(error))
    for _ in range(WARM_UP):
        doubled(of(1))
    with pytest.raises(RuntimeError, match=LATER):
        doubled(of(1))


@pytest.mark.parametrize("fails", [False, True])
def test_recorded_training_equals_the_eager_one(
    fails: bool, tiny: Path, run_train: Run, monkeypatch
) -> None:
    """Over epochs with a smaller last batch, validations and a resume."""
    argv, folder = tiny_train(tiny, "--extra_stc", "1", "--val_step", "7"), tiny / "runs/i2t"
    argv += ["--lr_update", "1", "--max_steps"]
    assert run_train(*argv, "23") == 0
    eager, logged = state(folder / NEWEST), losses(folder)
    prepare, recorders = TrainStep.prepare, []

    def recording(self: TrainStep, steps: int) -> None:
        prepare(self, steps)
        recorders.append(Replays(RuntimeError("no graph") if fails else None))
        self.step = Recorded(self.step, recorders[-1])

    monkeypatch.setattr(TrainStep, "prepare", recording)
    assert run_train(*argv, "14", "--overwrite") == 0
    assert run_train(*argv, "23", "--resume", "auto") == 0
    for key in ("weights", "optimizer", "random", "best_rsum"):
        assert same(state(folder / NEWEST)[key], eager[key]), key
    assert [e for e in losses(folder) if e in logged] == logged
    replays = [recorder.calls.count("replay") for recorder in recorders]
    # Steps 1 to 9 and 11 to 14 are full, then 15 to 19 and 21 to 23; each session warms up.
    assert replays == ([0, 0] if fails else [13 - WARM_UP, 8 - WARM_UP])


def losses(folder: Path) -> list[tuple]:
    return [(event["step"], event["Le"], event["lr"]) for event in events(folder) if "Le" in event]


class FakeCuda:
    """What of torch.cuda `CudaGraphs` uses; recording fails if `fails`."""

    def __init__(self, fails: bool) -> None:
        self.now, self.fails, self.log = "main", fails, []
        self.random = SimpleNamespace(
            clone_state=lambda: "state", graphsafe_set_state=self.log.append
        )
        self.default_generators = {1: self.random}

    def Stream(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(device=device, device_index=1, wait_stream=self.log.append)

    def current_stream(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(name=self.now, wait_stream=self.log.append)

    def set_stream(self, stream: SimpleNamespace) -> None:
        self.now = stream.name

    @contextmanager
    def stream(self, stream: SimpleNamespace):
        self.now = "side"
        yield
        self.now = "main"

    @contextmanager
    def device(self, device: torch.device):
        yield

    @contextmanager
    def graph(self, graph: SimpleNamespace, pool: None, stream: SimpleNamespace, mode: str):
        self.now = "side"
        yield
        if self.fails:
            raise RuntimeError(LATER)  # torch does not go back to the stream before
        self.now = "main"

    def CUDAGraph(self) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    def set_sync_debug_mode(self, mode: str) -> None:
        self.log.append(mode)


@pytest.fixture
def fake_cuda(request: pytest.FixtureRequest, monkeypatch) -> FakeCuda:
    cuda = FakeCuda(fails=getattr(request, "param", False))
    monkeypatch.setattr(recorded, "torch", SimpleNamespace(cuda=cuda))
    return cuda


@pytest.mark.parametrize("fake_cuda", [False, True], indirect=True)
def test_failing_recording_gives_back_stream_and_random_state(fake_cuda: FakeCuda) -> None:
    graphs, outputs = CudaGraphs(torch.device("cuda:1")), {"x": torch.ones(1)}
    if fake_cuda.fails:
        with pytest.raises(RuntimeError, match=LATER):
            graphs.record(lambda: outputs)
        assert fake_cuda.log == ["state"]
    else:
        assert graphs.record(lambda: outputs)() is outputs and fake_cuda.log == ["replay"]
    assert fake_cuda.now == "main"


def test_what_waits_for_the_gpu_is_named_and_not_recorded(fake_cuda: FakeCuda) -> None:
    graphs = CudaGraphs(torch.device("cuda:1"))

    def waits() -> Outputs:
        warnings.warn(f"{recorded.SYNCHRONISES} (Triggered internally)", stacklevel=1)
        warnings.warn(f"{recorded.PROTOTYPE} feature", stacklevel=1)
        warnings.warn("another", stacklevel=1)
        return {}

    with pytest.warns(UserWarning) as others:
        graphs.run(waits)
    assert [str(other.message) for other in others] == ["another"]
    with pytest.raises(RuntimeError, match=r"test_recorded\.py"):
        graphs.record(dict)
    graphs.run(dict)
    assert graphs.record(dict)() == {} and fake_cuda.log.count("warn") == 2
    assert fake_cuda.log[-2:] != ["warn"] and fake_cuda.now == "main"
