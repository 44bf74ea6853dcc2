"""Weights on disk: native and official checkpoints, BERT folders.

`checkpoint.load_model(path, bert_path=None, device="cpu")` is what most programs need.
"""

from checkpoint.checkpoint import Checkpoint, build_model, load_model, read_checkpoint

__all__ = ["Checkpoint", "build_model", "load_model", "read_checkpoint"]
