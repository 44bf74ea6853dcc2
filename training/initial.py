"""initial.py — a run that begins with the weights of another model (`--init`).

The weights alone: optimiser, random state, epoch and best scores are those of a new run.
"""

from dataclasses import fields
from pathlib import Path

import torch

from checkpoint.bert import Bert, assemble_bert
from checkpoint.checkpoint import BERT_KEYS, Checkpoint, check_same_bert, read_checkpoint
from checkpoint.weights import load_state_dict_strict
from common.config import ModelConfig
from common.errors import InputError, require
from common.files import sha256_of
from model import DIME
from training.config import TrainConfig


def read_initial(config: TrainConfig) -> Checkpoint | None:
    """Read the model of `--init`; None without the option.

    Raises InputError if the file is no model, or if `--overwrite` would delete it.
    """
    if config.init is None:
        return None
    path = Path(config.init)
    is_deleted = config.overwrite and path.resolve().parent == config.folder.resolve()
    require(
        not is_deleted, f"--init {path}: --overwrite would delete it; expected a copy elsewhere"
    )
    return read_checkpoint(path)


def load_initial_weights(model: DIME, initial: Checkpoint, config: TrainConfig, bert: Bert) -> str:
    """Load the weights of `initial` into a new model; returns the SHA-256 of the file.

    Raises InputError if the file is of a model with other options or another BERT.
    """
    path, theirs = initial.path, initial.config
    for option in fields(ModelConfig):
        then, now = getattr(theirs, option.name), getattr(config, option.name)
        if then != now:
            problem = f"--init {path}: was trained with --{option.name} {then}"
            raise InputError(f"{problem}; expected {now}, as in this run")
    _check_bert(initial, bert)
    load_state_dict_strict(model, initial.weights, path, keep=BERT_KEYS)
    return sha256_of(path)


def _check_bert(checkpoint: Checkpoint, bert: Bert) -> None:
    """Raise InputError if a checkpoint was trained with another BERT than this run's."""
    if checkpoint.bert_weights is None:
        check_same_bert(checkpoint, bert)
        return
    folder = bert.vocabulary.path.parent
    with torch.random.fork_rng(devices=[]):  # a new BERT draws weights before it is given some
        brought = assemble_bert(folder, checkpoint.bert_weights, checkpoint.path)
    require(
        brought.fingerprint == bert.fingerprint,
        f"{checkpoint.path}: brings another BERT than the one in {folder}; expected the same",
    )
