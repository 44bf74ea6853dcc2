"""counting.py — kernels, bytes and host synchronisations of a GPU, counted without one.

    python -m tests.counting                              # a table
    python -m tests.counting --ops 15                     # and the operators that move most bytes
    python -m tests.counting --only i2t bf16 step         # some rows
    python -m tests.counting --json results/counts.json   # also write the rows, then:
    python -m scripts.results_table --write               # docs/speed.md shows them

A training step (BERT, forward, backward, Adam) and the scoring of a chunk run on tensors that hold
no numbers (FakeTensorMode); a dispatch mode sees every operator. Sizes are the published ones:
bert-base, 36 regions x 2048, 32 words, 32 pairs with 32 extra negatives, so 2,048 pairs.
The tensors are on the CPU, since a backward pass on CUDA needs a GPU and torch's wheels without
CUDA have no such tensors. `as_on_cuda` makes the CPU choose as CUDA does. Eager code is counted.

kernels: operators that are no views. bytes: each operator reads its inputs and writes its outputs
once. peak: bytes of tensors alive at once, weights and batch included; the workspace of an operator
is not counted. sync: what makes the host wait for the device.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import BertConfig, BertModel

from common import memory
from common.cli import parse, print_line, run
from common.compile import needs_fixed_shapes
from common.config import Direction
from common.files import write_json
from data import Batch
from model import DIME
from scripts.parts.tables import counts_table, markdown
from training.config import TrainConfig
from training.step import TrainStep

CPU = torch.device("cpu")
PAIRS, REGIONS, WIDTH, WORDS = 32, 36, 2048, 32

What = Literal["step", "step_checkpointing", "chunk"]
Counted = Literal["fp32", "bf16"]  # tf32 moves what fp32 moves
Word = Literal[Direction, Counted, What]

SYNCHRONISING = {
    *("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"),
    *("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::repeat_interleave.Tensor"),
}
TO_HOST = {"cpu", "numpy", "tolist"}  # methods of a tensor
NO_KERNEL = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"} | {
    *("aten::new_empty_strided", "aten::detach", "aten::lift_fresh", "aten::alias"),
}
OVERWRITTEN = {"aten::copy_", "aten::zero_", "aten::fill_", "aten::bernoulli_"}  # not read
LOOKUPS = {"aten::embedding", "aten::index", "aten::index_select", "aten::gather"}
# What torch.autocast("cuda") computes in float32 (torch/csrc, autocast_mode.h), as far as used.
FLOAT32_ON_CUDA = (
    *("exp", "log", "reciprocal", "rsqrt", "pow.Tensor_Scalar", "pow.Tensor_Tensor"),
    *("norm.Scalar", "norm.ScalarOpt_dim", "layer_norm", "logsumexp", "cumsum"),
)
FLOAT32_RESULT_ON_CUDA = ("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList")
PROMOTED_ON_CUDA = ("addcmul", "addcdiv", "dot")


class Count(TorchDispatchMode):
    """Counts the operators of the code that runs within it.

    An answer that the host waits for is invented: True, WORDS or 1.0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.live = self.peak = 0
        self._alive: set[int] = set()
        self._methods = _HostMethods(self.syncs)

    def __enter__(self) -> "Count":
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def track(self, tensors: Iterable[Tensor]) -> None:
        """Count the memory of these tensors as long as they are alive."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._alive:
                self._alive.add(key)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._forget, key, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if _synchronises(func, name, args):
            self.syncs[name] += 1
        if name == "aten::_local_scalar_dense":
            return {torch.bool: True, torch.int64: WORDS}.get(args[0].dtype, 1.0)
        if name == "aten::equal":
            return True
        output = func(*args, **kwargs)
        outputs = _tensors(output)
        self.track(outputs)
        if not name.startswith("prim") and name not in NO_KERNEL:
            self._add(func, name, args, kwargs, outputs)
        return output

    def _add(self, func: Any, name: str, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        changed = _changed(func, args, kwargs)
        out_of = {a.name for a in func._schema.arguments if a.is_out}
        inputs = _tensors((args, [v for k, v in kwargs.items() if k not in out_of]))
        storages = {tensor.untyped_storage()._cdata for tensor in [*inputs, *changed]}
        new = [o for o in outputs if o.untyped_storage()._cdata not in storages]
        if not (changed or new):
            return  # a view
        if name in LOOKUPS:  # as many entries as they return are read
            inputs = [*inputs[1:], *new]
        if name in OVERWRITTEN:
            inputs = inputs[1:]
        self.kernels[name] += 1
        self.bytes[name] += sum(map(_size, [*inputs, *changed, *new]))


class _HostMethods(TorchFunctionMode):
    """Counts the methods that copy a tensor to the host: on fake CPU tensors they do nothing."""

    def __init__(self, syncs: Counter[str]) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        to_host = name == "to" and "cpu" in [*args[1:], *(kwargs or {}).values()]
        if (name in TO_HOST and isinstance(args[0], Tensor)) or to_host:
            self.syncs[f"Tensor.{name}"] += 1
        return func(*args, **(kwargs or {}))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    """Return the bytes of a tensor; entries that an expansion repeats are counted once."""
    entries = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        entries *= length if stride else min(length, 1)
    return entries * tensor.element_size()


def _changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operator writes in place."""
    changed = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            changed += _tensors(value)
    return changed


def _synchronises(func: Any, name: str, args: tuple[Any, ...]) -> bool:
    if name in ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"):
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))
    return name in SYNCHRONISING or str(func).replace("aten.", "aten::") in SYNCHRONISING


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Have operators on the CPU chosen as they are on CUDA.

    Precisions of autocast, fused dropout and attention, operators on lists of tensors, fixed
    shapes, and chunks of a GPU's size.
    """
    foreach = "torch.utils._foreach_utils._get_foreach_kernels_supported_devices"
    with ExitStack() as stack:
        library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        for names, rule in (
            (FLOAT32_ON_CUDA, _in_float32),
            (FLOAT32_RESULT_ON_CUDA, _to_float32),
            (PROMOTED_ON_CUDA, _promoted),
        ):
            for name in names:
                operator, _, overload = name.partition(".")
                packet = getattr(torch.ops.aten, operator)
                library.impl(name, rule(getattr(packet, overload or "default")), "AutocastCPU")
        for target, value in (
            (foreach, lambda: ["cpu"]),
            ("torch.nn.functional.dropout", _dropout),
            ("torch.nn.functional.scaled_dot_product_attention", _attention),
            ("common.memory.CPU_CHUNK", memory.GPU_CHUNK),
        ):
            stack.enter_context(mock.patch(target, value))

        def always(device: torch.device) -> bool:
            return True

        # Its code, since modules import the function by name.
        stack.callback(setattr, needs_fixed_shapes, "__code__", needs_fixed_shapes.__code__)
        needs_fixed_shapes.__code__ = always.__code__
        yield


def _autocast_of(change: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> Any:
    """Return a rule that makes an operator's kernel under autocast: `change(op, args, kwargs)`."""

    def rule(op: Any) -> Any:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
            with torch._C._ExcludeDispatchKeyGuard(key):
                return change(op, args, kwargs)

        return kernel

    return rule


def _widen(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype == torch.bfloat16 else t, tree)


_in_float32 = _autocast_of(lambda op, args, kwargs: op(*_widen(args), **_widen(kwargs)))


@_autocast_of
def _to_float32(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args[0].is_floating_point() and kwargs.get("dtype") is None and len(args) < 3:
        kwargs = kwargs | {"dtype": torch.float32}
    return op(*args, **kwargs)


@_autocast_of
def _promoted(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    same = len({tensor.dtype for tensor in _tensors(args)}) == 1
    return op(*(args if same else _widen(args)), **kwargs)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """One kernel whatever the mask and dropout are, as on CUDA."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.bfloat16() for t in (query, key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    direction: Direction
    precision: Counted
    what: What


def cases(only: Iterable[str] = ()) -> Iterator[Case]:
    """Yield the rows that match all words of `only`."""
    axes = [get_args(axis) for axis in (Direction, Counted, What)]
    for words in product(*([word for word in axis if word in only] or axis for axis in axes)):
        yield Case(*words)


def count(case: Case) -> Count:
    """Return what a step or the scoring of a chunk needs."""
    with as_on_cuda(), FakeTensorMode(allow_non_fake_inputs=True):
        train_step = _new_train_step(case)
        images, captions = (1, 2) if case.direction == "i2t" else (2, 1)
        regions = torch.rand(images * PAIRS, REGIONS, WIDTH)
        ids = torch.zeros(captions * PAIRS, WORDS, dtype=torch.long)
        mask = torch.ones_like(ids, dtype=torch.bool)
        if case.what != "chunk":
            batch = Batch(regions, ids, mask, torch.arange(len(ids)), PAIRS)
            return _count_step(train_step, batch)
        model = train_step.model
        with model.evaluating():
            sides = model.encode_images(regions), model.encode_captions(ids, mask)
            with Count() as counter:
                model.score(*sides)
        return counter


def _count_step(train_step: TrainStep, batch: Batch) -> Count:
    optimizer = train_step.optimizer
    for parameter in train_step.parameters:  # the first step makes the optimiser's state
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model, counter = train_step.model, Count()
    held = [*model.parameters(), *model.buffers(), *_tensors(list(optimizer.state.values()))]
    counter.track([*held, *_tensors(list(vars(batch).values()))])
    with counter:
        train_step.step(batch)
    return counter


def _new_train_step(case: Case) -> TrainStep:
    i2t = case.direction == "i2t"
    config = TrainConfig(
        direction=case.direction,
        img_dim=WIDTH,
        precision=case.precision,
        compile=False,
        extra_stc=int(i2t),
        extra_img=int(not i2t),
        batch_size=PAIRS,
        activation_checkpointing=case.what == "step_checkpointing",
    )
    bert = BertModel(BertConfig(attn_implementation="sdpa"), add_pooling_layer=False)
    train_step = TrainStep(config, DIME(config, bert), CPU)
    train_step.prepare(steps=1)
    return train_step


def row_of(case: Case, counter: Count) -> dict[str, Any]:
    """Return the row of a case as JSON."""
    moved, pairs = counter.bytes.total(), 2 * PAIRS**2
    row = {
        "kernels": counter.kernels.total(),
        "syncs": counter.syncs.total(),
        "gb": round(moved / 1e9, 3),
        "mb_a_pair": round(moved / pairs / 1e6, 3),
    }
    return vars(case) | row | {"peak_gb": round(counter.peak / 1e9, 3)}


def _operators(counter: Count, most: int) -> str:
    lines = [
        [name.removeprefix("aten::"), str(counter.kernels[name]), f"{moved / 1e9:.2f}"]
        for name, moved in counter.bytes.most_common(most)
    ]
    return markdown(["operator", "kernels", "GB"], lines)


@dataclass(frozen=True)
class Options:
    only: Annotated[list[Word] | None, "only these rows"] = None
    ops: Annotated[int, "also list so many operators of each row"] = 0
    json: Annotated[str | None, "write the rows here"] = None


def main() -> None:
    options = parse(Options, None, __doc__)
    rows = []
    for case in cases(options.only or ()):
        counter = count(case)
        rows.append(row_of(case, counter))
        if options.ops:
            title = " ".join(map(str, vars(case).values()))
            print_line(f"{title}: {dict(counter.syncs)}\n\n{_operators(counter, options.ops)}")
    print_line(counts_table(rows))
    if options.json is not None:
        write_json(Path(options.json), {"torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    sys.exit(run(main))
