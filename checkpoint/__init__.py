"""Weights on disk: native and official checkpoints, BERT folders; models without a data set.

`checkpoint.load_model(path, bert_path=None, device="cpu")` returns a module of torch, and
`checkpoint.Matcher.open(paths, bert_path=None)` what encodes, scores and routes with such modules.
"""

from checkpoint.checkpoint import Checkpoint, build_model, load_model, read_checkpoint
from checkpoint.matcher import Items, Matcher

__all__ = ["Checkpoint", "Items", "Matcher", "build_model", "load_model", "read_checkpoint"]
