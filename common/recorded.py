"""recorded.py — a training step whose kernel launches are recorded as a CUDA graph and replayed.

A step launches some 2,000 kernels, which takes Python longer than it takes a GPU to run them.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from common.memory import is_oom

log = logging.getLogger(__name__)

WARM_UP = 3  # runs before a recording: they compile, and create what is kept between runs
SYNCHRONISES = "called a synchronizing CUDA operation"  # torch's warning
PROTOTYPE = "Synchronization debug mode is a prototype"  # its warning of that warning

Outputs = dict[str, Tensor]


class Recorder(Protocol):
    """What records the launches of a function: `CudaGraphs`, or another one in a test."""

    def run(self, function: Callable[[], Outputs]) -> Outputs:
        """Return `function()`, run as a recording would run it."""

    def record(self, function: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Record `function()` without running it; returns a function that replays it."""


class Recorded:
    """A function of a dataclass of tensors that is recorded once it was called a few times.

    It is recorded for the first shape that was called WARM_UP times; other shapes run eagerly. The
    function changes tensors in place only, and reads no other tensor that an earlier call left. If
    the recording fails, a warning is logged and the function runs eagerly from then on.
    """

    def __init__(self, function: Callable[[Any], Outputs], recorder: Recorder) -> None:
        self.function, self.recorder = function, recorder
        self.calls: Counter[tuple] = Counter()  # by shape
        self.shape: tuple | None = None  # of the recording
        self.inputs: dict[str, Tensor] = {}  # that the recording reads
        self.replay: Callable[[], Outputs] | None = None
        self.failed = False

    def __call__(self, inputs: Any) -> Outputs:
        """Return `function(inputs)`. Out of memory raises as in eager code."""
        shape = tuple(map(_shape, vars(inputs).items()))
        if self.replay is None and not self.failed:
            self.calls[shape] += 1
            if self.calls[shape] <= WARM_UP:
                return self.recorder.run(lambda: self.function(inputs))
            self._record(inputs, shape)
        if self.replay is None or shape != self.shape:
            return self.function(inputs)
        for name, tensor in self.inputs.items():
            tensor.copy_(getattr(inputs, name), non_blocking=True)
        # The next replay overwrites its outputs.
        return {name: output.clone() for name, output in self.replay().items()}

    def _record(self, inputs: Any, shape: tuple) -> None:
        tensors = {name: v.clone() for name, v in vars(inputs).items() if isinstance(v, Tensor)}
        own = replace(inputs, **tensors)
        try:
            self.replay = self.recorder.record(lambda: self.function(own))
            self.shape, self.inputs = shape, tensors
        except Exception as error:  # of many types; one remedy
            if is_oom(error):
                raise
            cause = error.__context__ or error  # ending a recording that has failed fails, too
            reason = (str(cause) or type(cause).__name__).splitlines()[0]
            log.warning("no CUDA graph, launching each kernel by itself: %s", reason)
            self.failed = True


def _shape(item: tuple[str, Any]) -> tuple:
    name, value = item
    return (name, value.shape, value.dtype) if isinstance(value, Tensor) else item


class CudaGraphs:
    """Records functions as CUDA graphs."""

    # A resumed run draws the same dropout as one that was not cut off, although it records at
    # another step. A kernel's random numbers depend on the generator's seed and offset alone. A
    # replay reads the present offset and advances it as far as an eager run would; a recording
    # leaves it as it is.

    def __init__(self, device: torch.device) -> None:
        # What autograd and cuBLAS keep for a stream has to be there before a recording, and no
        # recording may wait for the default stream. So everything before it runs on this one.
        self.stream = torch.cuda.Stream(device)
        self.waits: str | None = None  # where the last run waited for the GPU, if it did

    def run(self, function: Callable[[], Outputs]) -> Outputs:
        """Return `function()`, run on the stream that records."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with self._watching(), torch.cuda.stream(self.stream):
            outputs = function()
        current.wait_stream(self.stream)
        return outputs

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Note where the host waits for the GPU, which a recording cannot do."""
        show, self.waits = warnings.showwarning, None

        def note(message: Any, category: Any, filename: str, line: int, *more: Any) -> None:
            if SYNCHRONISES in str(message):
                self.waits = f"{Path(filename).name}, line {line}, waits for the GPU"
            else:
                show(message, category, filename, line, *more)

        with warnings.catch_warnings():
            warnings.filterwarnings("always", SYNCHRONISES)
            warnings.filterwarnings("ignore", PROTOTYPE)
            warnings.showwarning = note  # type: ignore[assignment]  # takes all arguments
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def record(self, function: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Record `function()` without running it; returns a function that replays it.

        The outputs are always the same tensors. Raises RuntimeError if it cannot be recorded.
        """
        if self.waits is not None:
            raise RuntimeError(self.waits)
        graph, device = torch.cuda.CUDAGraph(), self.stream.device
        current = torch.cuda.current_stream(device)
        generator = torch.cuda.default_generators[self.stream.device_index]
        random = generator.clone_state()
        # Only this thread is held to what a recording allows: the loader's pins memory meanwhile.
        mode = "thread_local"
        try:
            with torch.cuda.device(device), torch.cuda.graph(graph, None, self.stream, mode):
                outputs = function()
        except Exception:
            # Torch leaves both as they are in a recording.
            torch.cuda.set_stream(current)
            generator.graphsafe_set_state(random)
            raise

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay
