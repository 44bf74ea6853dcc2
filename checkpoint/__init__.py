"""Weights on disk: native and official checkpoints, BERT folders; models that score what they get.

`checkpoint.load_model(path, bert_path=None, device="cpu")` returns a module of torch, and
`checkpoint.Matcher.open(paths, bert_path=None)` encodes, scores and routes images and captions.
"""

from typing import TYPE_CHECKING, Any

from checkpoint.checkpoint import Checkpoint, build_model, load_model, read_checkpoint

if TYPE_CHECKING:
    from checkpoint.matcher import Matcher

__all__ = ["Checkpoint", "Matcher", "build_model", "load_model", "read_checkpoint"]


def __getattr__(name: str) -> Any:
    if name != "Matcher":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from checkpoint.matcher import Matcher  # at its first use: it needs evaluation, and workers

    return Matcher
