"""resume.py — the checkpoints of a run and how it resumes from them (SPEC §8).

A run's folder holds the newest checkpoint and the best model. Both are written atomically, so that
a killed run leaves whole files.
"""

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
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
from common.torch_files import Damaged
from data import Split, TrainingBatches
from training.config import FREE, TrainConfig
from training.log import EVENTS, LOG, METRICS, RUN
from training.step import TrainStep

log = logging.getLogger(__name__)

AFRESH = "--init begins a new run with its weights"
NEWEST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
STATES = "text_states_{}.npy"  # BERT's hidden states, see text_cache.py


@dataclass(frozen=True)
class TrainState:
    """How far a run has come, and its best scores so far."""

    step: int = 0  # batches so far
    validated: int = 0  # step of the last validation
    skipped: int = 0  # batches whose loss or gradient was not finite
    best_rsum: float = -1.0  # REFERENCE: R@1 + R@5 of both directions, under its published name
    best_r1: float = -1.0  # image-to-text
    best_step: int = 0  # of the validation with the largest best_rsum

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "TrainState":
        """Return the state in a checkpoint. Raises ValueError."""
        # Older checkpoints lack the step of the best validation: --patience counts from now on.
        content = {"best_step": content.get("step"), **content}
        values: dict[str, Any] = {each.name: content.get(each.name) for each in fields(cls)}
        for each in fields(cls):
            value = values[each.name]
            if type(value) is not each.type or not math.isfinite(value):
                raise ValueError(f"{each.name} is {brief_repr(value)}")
        return cls(**values)


def find_checkpoint(folder: Path, resume: str, overwrite: bool) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None to start a new run.

    Raises InputError if the folder holds a run and neither --resume nor --overwrite is given.
    """
    if resume == "auto":
        return _newest_whole(folder)
    holds_run = any(_files(folder))
    if resume:
        path = Path(resume)
        require(path.is_file(), f"--resume {path}: not found; expected auto or a checkpoint file")
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
    for path in filter(os.path.lexists, (folder / NEWEST, folder / BEST)):
        try:
            checkpoint = read_checkpoint(path)
        except Damaged as error:
            problem = problem or error
            continue
        if path.name == BEST:
            log.warning("%s; resuming from %s", problem or f"{NEWEST}: missing", path)
        return checkpoint
    if problem is not None:
        raise problem
    return None


def _files(folder: Path) -> list[Path]:
    """Return the checkpoints and logs that a folder holds."""
    named = [folder / name for name in (NEWEST, BEST, METRICS, RUN, LOG)]
    return [path for path in (*named, *folder.glob(EVENTS)) if os.path.lexists(path)]


def clear(folder: Path) -> None:
    """Delete the files of an earlier run."""
    cached = folder.glob(STATES.format("*") + "*")  # also a partial file
    with explain_os_errors(folder, "a folder to write to"):
        for path in (*_files(folder), *cached):
            path.unlink()


@dataclass(frozen=True)
class CheckpointManager:
    """Writes the checkpoints of one run and resumes it from one, bit for bit."""

    config: TrainConfig
    train_step: TrainStep
    bert: Bert
    batches: TrainingBatches
    dev: Split
    # Read at the start, since the files may change while the run lasts.
    backbone: dict[str, Any] | None  # of the training data, if extract_regions made it
    commit: str | None = field(default_factory=lambda: provenance.commit())

    def write(self, name: str, state: TrainState, metrics: dict[str, float] | None) -> None:
        """Write a checkpoint; `metrics` are those of the same weights on dev, if validated.

        Of several processes the first one writes; a checkpoint does not know their number.
        """
        if self.train_step.world.rank:
            return
        device, model = self.train_step.device, self.train_step.model
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        epoch, position = divmod(state.step, len(self.batches))
        content = {
            **asdict(state),
            "epoch": epoch,  # of the next batch
            "position": position,
            "optimizer": self.train_step.optimizer.state_dict(),
            "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "train_data": self.batches.split.fingerprint,
            "dev_data": self.dev.fingerprint,
            "backbone": self.backbone,
            "commit": self.commit,
            "metrics": metrics,
        }
        path = self.config.folder / name
        write_checkpoint(path, model, asdict(self.config), self.bert, **content)

    def restore(self, checkpoint: Checkpoint) -> TrainState:
        """Load model, optimiser and random states from a checkpoint; returns the run's state.

        Raises InputError if the checkpoint is damaged or of a run with other options or data.
        """
        path, content, device = checkpoint.path, checkpoint.state, self.train_step.device
        require("optimizer" in content, f"{path}: has no optimiser to resume with; {AFRESH}")
        self._check_same_run(checkpoint)
        load_state_dict_strict(self.train_step.model, checkpoint.weights, path, keep=BERT_KEYS)
        # DEVIATION: a resumed run continues exactly where it stopped (the published one started
        # again at epoch 0, without its optimiser and best scores).
        try:
            state = TrainState.read(content)
            self._restore_adam(content["optimizer"]["state"], state.step - state.skipped)
            torch.set_rng_state(content["random"]["cpu"])
            if device.type == "cuda" and content["random"]["cuda"] is not None:
                torch.cuda.set_rng_state(content["random"]["cuda"], device)
        except Exception as error:  # the content of a file can be wrong in any way
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{path}: no run can resume from it: {reason}") from error
        return self._forget_lost_best(state)

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        """Raise InputError if a checkpoint is of a run with other options, data or BERT."""
        path = checkpoint.path
        for option in fields(self.config):
            then = checkpoint.options.get(option.name, option.default)
            now = getattr(self.config, option.name)
            if option.name not in FREE and then != now:
                reason = f"was trained with --{option.name} {then}, not {now}"
                raise InputError(f"{path}: {reason}; {AFRESH}")
        check_same_bert(checkpoint, self.bert)
        for name, split in (("train_data", self.batches.split), ("dev_data", self.dev)):
            is_same = checkpoint.state.get(name) == split.fingerprint
            require(is_same, f"{path}: was trained on other data than {split.path}; {AFRESH}")

    def _restore_adam(self, moments: dict[int, dict[str, Tensor]], steps: int) -> None:
        """Load Adam's moments. Raises an exception unless they fit the weights and `steps`."""
        optimizer, parameters = self.train_step.optimizer, self.train_step.parameters
        if sorted(moments) != list(range(len(parameters) if steps else 0)):
            raise ValueError(f"moments of {len(moments)} weights after {steps} steps")
        for i, moment in moments.items():
            shapes = {"exp_avg": parameters[i].shape, "exp_avg_sq": parameters[i].shape, "step": ()}
            for name, shape in shapes.items():
                tensor = moment[name]
                if tensor.shape != shape or tensor.dtype != torch.float32:
                    raise ValueError(f"{name} is {tensor.dtype}, shape {list(tensor.shape)}")
                if not tensor.isfinite().all():
                    raise ValueError(f"{name} holds NaN or infinite numbers")
            if moment["step"].item() != steps:
                raise ValueError(f"Adam's step is {moment['step'].item()}, not {steps}")
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})

    def _forget_lost_best(self, state: TrainState) -> TrainState:
        """Return the state without its best scores if their model is missing, damaged or newer.

        A newer one was saved at a step that is done again, and goes with it. If the file is lost, a
        validation of the resumed step is done again, too, since it may have been the best.
        """
        path, validated = self.config.folder / BEST, 0
        if state.best_rsum < 0 and not os.path.lexists(path):
            return state
        try:
            best = read_checkpoint(path).state.get("step") if os.path.lexists(path) else None
            if type(best) is int and best <= state.step:
                return state
            reason = f"{path}: missing, or of no step"
            if best is not None:
                reason, validated = f"{path}: is of step {best}, discarded", state.validated
        except Damaged as error:
            reason = str(error)
        log.warning("%s; the next validation writes a new best model", reason)
        return replace(
            state, best_rsum=-1.0, best_r1=-1.0, best_step=state.step, validated=validated
        )

    def is_newest(self, path: Path) -> bool:
        """Return whether `path` is the newest checkpoint of the run's folder."""
        return os.path.realpath(path) == os.path.realpath(self.config.folder / NEWEST)

    def discard_later_steps(
        self, resumed: Path, state: TrainState, metrics: dict[str, float] | None
    ) -> None:
        """Make the resumed checkpoint the newest one; delete a best model of a later step."""
        if not self.is_newest(resumed):
            self.write(NEWEST, state, metrics)
        if state.best_rsum < 0 and self.train_step.world.rank == 0:
            (self.config.folder / BEST).unlink(missing_ok=True)
