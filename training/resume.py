"""resume.py — the checkpoints of a run and how it resumes from them (SPEC §8).

A run's folder holds the newest checkpoint and the best model. Both are written atomically, so that
a killed run leaves whole files.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.bert import Bert
from checkpoint.checkpoint import (
    BERT_KEYS,
    Checkpoint,
    check_same_bert,
    read_checkpoint,
    write_checkpoint,
)
from checkpoint.weights import load_state_dict_strict
from common import provenance
from common.errors import InputError, brief_repr, require
from common.files import explain_os_errors
from common.lock import LOCK, only_writer
from common.torch_files import Damaged
from data import Split, TrainingBatches
from training.config import FREE, TrainConfig
from training.log import logs_of, remove
from training.step import TrainStep

log = logging.getLogger(__name__)

NEWEST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
STATES = "text_states_{}.npy"  # BERT's hidden states, see text_cache.py
LARGEST = 2**62  # of any number in TrainState


@dataclass(frozen=True)
class TrainState:
    """How far a run has come, and its best scores so far."""

    epoch: int = 0
    position: int = 0  # of the next batch in the epoch
    step: int = 0  # batches so far
    validated: int = 0  # step of the last validation
    skipped: int = 0  # batches whose loss or gradient was not finite
    best_rsum: float = -1.0  # REFERENCE: R@1 + R@5 of both directions, under its published name
    best_r1: float = -1.0  # image-to-text

    @classmethod
    def read(cls, content: Mapping[str, Any], batches: int) -> "TrainState":
        """Return the state in a checkpoint; an epoch has `batches` batches. Raises ValueError."""
        for field in fields(cls):
            value: Any = content.get(field.name)
            if type(value) is not field.type or not abs(value) <= LARGEST:
                raise ValueError(f"{field.name} is {brief_repr(value)}")
        state = cls(**{field.name: content[field.name] for field in fields(cls)})
        if state.epoch < 0 or not 0 <= state.position < batches:
            raise ValueError(f"position {state.position} of epoch {state.epoch}")
        if state.step != state.epoch * batches + state.position:
            raise ValueError(f"step {state.step} at position {state.position}")
        return state

    @property
    def last_epoch(self) -> int:
        """The epoch of the last batch."""
        return self.epoch - (self.position == 0 < self.step)


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make a run's folder and be the only program that writes there. Raises InputError."""
    with explain_os_errors(folder, "a folder to write to"):
        folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder / LOCK):
        yield


def find_checkpoint(folder: Path, resume: str, overwrite: bool) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None to start a new run.

    Raises InputError if the folder holds a run and neither --resume nor --overwrite is given.
    """
    if resume == "auto":
        return _newest_whole(folder)
    holds_run = bool(logs_of(folder)) or any(
        os.path.lexists(folder / name) for name in (NEWEST, BEST)
    )
    if resume:
        path = Path(resume)
        if holds_run and os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):
            raise InputError(f"{folder}: holds another run than {path}; change --logger_name")
        return read_checkpoint(path)
    # DEVIATION: a folder that holds a run is not overwritten (the published code did).
    if holds_run and not overwrite:
        raise InputError(f"{folder}: holds a run; resume it with --resume auto, or --overwrite it")
    return None


def _newest_whole(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint, or the best one with a warning if the newest is damaged.

    Returns None if there is neither. Raises InputError if both are damaged, and also if a file
    cannot be read for now, for example from a disk that is not mounted.
    """
    problem = None
    for path in (folder / NEWEST, folder / BEST):
        if not os.path.lexists(path):
            continue
        try:
            checkpoint = read_checkpoint(path)
        except Damaged as error:
            log.warning("%s", error)
            problem = problem or error
            continue
        if path.name == BEST:
            log.warning("resuming from %s, because %s is damaged or missing", path, NEWEST)
        return checkpoint
    if problem is not None:
        raise problem
    return None


def clear(folder: Path) -> None:
    """Delete the files of an earlier run."""
    cached = folder.glob(STATES.format("*") + "*")  # also a partial file
    for path in (folder / NEWEST, folder / BEST, *cached, *logs_of(folder)):
        remove(path)


class CheckpointManager:
    """Writes the checkpoints of one run and resumes it from one, bit for bit."""

    def __init__(
        self,
        config: TrainConfig,
        train_step: TrainStep,
        bert: Bert,
        batches: TrainingBatches,
        dev: Split,
    ) -> None:
        self.config, self.bert, self.batches, self.dev = config, bert, batches, dev
        self.commit = provenance.commit()  # now, since the files may change while the run lasts
        self.model, self.optimizer = train_step.model, train_step.optimizer
        self.device = train_step.device

    def write(self, name: str, state: TrainState, metrics: dict[str, float] | None) -> None:
        """Write a checkpoint; `metrics` are those of the same weights on dev, if validated."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        content = {
            **asdict(state),
            "optimizer": self.optimizer.state_dict(),
            "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "train_data": self.batches.split.fingerprint,
            "dev_data": self.dev.fingerprint,
            "commit": self.commit,
            "metrics": metrics,
        }
        path = self.config.folder / name
        write_checkpoint(path, self.model, asdict(self.config), self.bert, **content)

    def restore(self, checkpoint: Checkpoint) -> TrainState:
        """Load model, optimiser and random states from a checkpoint; returns the run's state.

        Raises InputError if the checkpoint is damaged or of a run with other options or data.
        """
        path, content = checkpoint.path, checkpoint.state
        require("optimizer" in content, f"{path}: has no optimiser, so no run can resume from it")
        self._check_same_run(checkpoint)
        load_state_dict_strict(self.model, checkpoint.weights, path, keep=BERT_KEYS)
        # DEVIATION: a resumed run continues exactly where it stopped (the published one started
        # again at epoch 0, without its optimiser and best scores).
        try:
            state = TrainState.read(content, len(self.batches))
            self._restore_adam(content["optimizer"]["state"], state.step - state.skipped)
            torch.set_rng_state(content["random"]["cpu"])
            if self.device.type == "cuda" and content["random"]["cuda"] is not None:
                torch.cuda.set_rng_state(content["random"]["cuda"], self.device)
        except Exception as error:  # the content of a file can be wrong in any way
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{path}: no run can resume from it: {reason}") from error
        return self._forget_lost_best(state)

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        """Raise InputError if a checkpoint is of a run with other options, data or BERT."""
        path = checkpoint.path
        for field in fields(self.config):
            then = checkpoint.options.get(field.name, field.default)
            now = getattr(self.config, field.name)
            if field.name not in FREE and then != now:
                raise InputError(f"{path}: was trained with --{field.name} {then}, not {now}")
        check_same_bert(checkpoint, self.bert)
        for name, split in (("train_data", self.batches.split), ("dev_data", self.dev)):
            fingerprint = checkpoint.state.get(name)
            if type(fingerprint) is not str or fingerprint != split.fingerprint:
                raise InputError(f"{path}: was trained on other data than {split.path}")

    def _restore_adam(self, moments: dict[int, dict[str, Tensor]], steps: int) -> None:
        """Load Adam's moments. Raises an exception unless they fit the weights and `steps`."""
        (parameters,) = (group["params"] for group in self.optimizer.param_groups)
        if sorted(moments) != list(range(len(parameters) if steps else 0)):
            raise ValueError(f"moments of {len(moments)} weights after {steps} steps")
        for i, moment in moments.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if moment[name].shape != parameters[i].shape:
                    raise ValueError(f"{name} is {list(moment[name].shape)}")
            if moment["step"].item() != steps:
                raise ValueError(f"Adam's step is {moment['step'].item()}, not {steps}")
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})

    def _forget_lost_best(self, state: TrainState) -> TrainState:
        """Return the state without its best scores if the best model is missing or damaged.

        A best model of a later step is discarded with that step. If only the file is lost, a
        validation that was due at this step is done again.
        """
        path, validated = self.config.folder / BEST, 0
        try:
            if os.path.lexists(path):
                best = read_checkpoint(path).state.get("step")
                if type(best) is int and best <= state.step:
                    return state
                reason, validated = f"{path}: is of step {best}, discarded", state.validated
            elif state.best_rsum < 0:
                return state
            else:
                reason = f"{path}: not found"
        except Damaged as error:
            reason = str(error)
        log.warning("%s; the next validation writes a new best model", reason)
        return replace(state, best_rsum=-1.0, best_r1=-1.0, validated=validated)

    def is_newest(self, path: Path) -> bool:
        """Return whether `path` is the newest checkpoint of the run's folder."""
        return os.path.realpath(path) == os.path.realpath(self.config.folder / NEWEST)

    def discard_later_steps(
        self, resumed: Path, state: TrainState, metrics: dict[str, float] | None
    ) -> None:
        """Make the resumed checkpoint the newest one; delete a best model of a later step."""
        if not self.is_newest(resumed):
            self.write(NEWEST, state, metrics)
        if state.best_rsum < 0:
            remove(self.config.folder / BEST)
