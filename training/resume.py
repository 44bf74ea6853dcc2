"""snapshots.py — a run's checkpoints: what is in them beside the model, and going on from one.

Kept apart from trainer.py, which is the loop, and checkpoint.py, which knows nothing of training.
"""

import logging
import os
from dataclasses import asdict, fields, replace
from pathlib import Path

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
from common.errors import InputError, require
from data import Split, TrainingBatches
from training import log as runlog
from training.config import FREE, TrainConfig
from training.runfolder import BEST, NEWEST, PREVIOUS, TrainState
from training.step import TrainStep

log = logging.getLogger(__name__)


class CheckpointManager:
    """The checkpoints of one run: it goes on from one exactly where that was written."""

    def __init__(
        self,
        config: TrainConfig,
        learner: TrainStep,
        bert: Bert,
        batches: TrainingBatches,
        dev: Split,
    ) -> None:
        self.config, self.bert, self.batches, self.dev = config, bert, batches, dev
        self.commit = provenance.commit()  # of what is loaded; the files may change while it runs
        self.model, self.optimizer, self.device = learner.model, learner.optimizer, learner.device

    def write(
        self,
        path: Path,
        place: TrainState,
        metrics: dict[str, float] | None,
        keep: Path | None = None,
    ) -> None:
        """Write a checkpoint; what had the name before is then found at `keep`, if one is given.

        `metrics` are those of this very model on dev, None where it was not validated.
        """
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        state = {
            **asdict(place),
            "optimizer": self.optimizer.state_dict(),
            "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "train_data": self.batches.split.fingerprint,
            "dev_data": self.dev.fingerprint,
            "commit": self.commit,
            "metrics": metrics,
        }
        write_checkpoint(path, self.model, asdict(self.config), self.bert, keep, **state)

    def restore(self, checkpoint: Checkpoint) -> TrainState:
        """Have model, optimiser and random numbers be those of a checkpoint; the run's place.

        Raises InputError where the checkpoint is of another run, or damaged.
        """
        path, state = checkpoint.path, checkpoint.state
        require("optimizer" in state, f"{path}: holds no optimiser, so it cannot be gone on with")
        self._check_same_run(checkpoint)
        load_state_dict_strict(self.model, checkpoint.weights, path, keep=BERT_KEYS)
        # DEVIATION: a resumed run goes on exactly where it was (the published one started again at
        # epoch 0, its optimiser and best scores forgotten).
        try:
            place = TrainState.read(state, len(self.batches))
            self._restore_adam(state["optimizer"]["state"], place.step - place.skipped)
            torch.set_rng_state(state["random"]["cpu"])
            if self.device.type == "cuda" and state["random"]["cuda"] is not None:
                torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        except Exception as error:  # what a file holds can be wrong in any way
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{path}: cannot be gone on with: {reason}") from error
        return self._with_best(place, self.is_newest(path))

    def is_newest(self, path: Path) -> bool:
        """Whether a checkpoint is the newest whole one of the run's folder."""
        return self.config.resume == "auto" or self._is(path, NEWEST)

    def _is(self, path: Path, name: str) -> bool:
        return os.path.realpath(path) == os.path.realpath(self.config.folder / name)

    def discard_later_steps(
        self, restored: Path, place: TrainState, metrics: dict[str, float] | None
    ) -> None:
        """Have the newest checkpoint be the one that is gone on from, before the logs are cut."""
        folder = self.config.folder
        if not self._is(restored, NEWEST):
            if not self._is(restored, PREVIOUS):
                runlog.remove(folder / PREVIOUS)
            if place.best_rsum < 0:  # the best model is of later steps, or damaged
                runlog.remove(folder / BEST)
            self.write(folder / NEWEST, place, metrics)

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        """Raise InputError where a checkpoint is of a run with other options, data or BERT."""
        path = checkpoint.path
        for field in fields(self.config):
            then = checkpoint.options.get(field.name, field.default)
            now = getattr(self.config, field.name)
            if field.name not in FREE:
                require(then == now, f"{path}: was trained with --{field.name} {then}, not {now}")
        check_same_bert(checkpoint, self.bert)
        for name, split in (("train_data", self.batches.split), ("dev_data", self.dev)):
            found = checkpoint.state.get(name)
            same = type(found) is str and found == split.fingerprint
            require(same, f"{path}: was trained on other data than {split.path} and its captions")

    def _with_best(self, place: TrainState, newest: bool) -> TrainState:
        """The place with the best scores of the best model that is there.

        One of a later step than the checkpoint that the user named is given up, as that step is.
        Where the newest checkpoint's is lost, its own model is validated again, if that was due.
        """
        path = self.config.folder / BEST
        try:
            checkpoint = read_checkpoint(path)
            self._check_same_run(checkpoint)
            best = TrainState.read(checkpoint.state, len(self.batches))
            later = best.step > place.step and self.config.resume != "auto"
            require(not later, f"{path}: is of step {best.step}, which is given up")
            rsum, r1 = best.best_rsum, best.best_r1
            # it may be newer than the checkpoint, where a run was cut off between the two
            rsum, r1 = max(rsum, place.best_rsum), max(r1, place.best_r1)
        except (InputError, ValueError) as error:
            if os.path.lexists(path):
                log.warning("%s; the next one takes its place", error)
            elif place.best_rsum >= 0:
                found = f"{path}: not found, whose R@1+R@5 was {place.best_rsum:.1f}"
                log.warning("%s; the next one takes its place", found)
            lost = newest and place.best_rsum >= 0  # else it was given up
            validated = 0 if lost else place.validated
            return replace(place, best_rsum=-1.0, best_r1=-1.0, validated=validated)
        return replace(place, best_rsum=rsum, best_r1=r1)

    def _restore_adam(self, moments: dict[int, dict[str, Tensor]], steps: int) -> None:
        """Give Adam its moments back. Raises an error where they are not those of its steps."""
        (parameters,) = (group["params"] for group in self.optimizer.param_groups)
        if sorted(moments) != list(range(len(parameters) if steps else 0)):
            raise ValueError(f"moments of {len(moments)} weights after {steps} steps")
        for i, parameter in enumerate(parameters if steps else []):
            for name in ("exp_avg", "exp_avg_sq"):
                shape = moments[i][name].shape
                if shape != parameter.shape or moments[i][name].dtype != parameter.dtype:
                    raise ValueError(f"{name} is {list(shape)}, {moments[i][name].dtype}")
            if moments[i]["step"].item() != steps:
                raise ValueError(f"Adam's step is {moments[i]['step'].item()}, not {steps}")
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict(own | {"state": moments})
