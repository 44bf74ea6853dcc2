"""runfolder.py — a run's folder: one writer, its checkpoints by age, and where the run stands.

Kept apart from trainer.py, which is the loop, and runlog.py, which writes the logs into it.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from checkpoint.checkpoint import Checkpoint, read_checkpoint
from common.errors import InputError, brief_repr, require
from common.files import explain_os_errors
from common.lock import LOCK, check_own, only_writer
from common.torch_files import Damaged
from training import log as runlog

log = logging.getLogger(__name__)

NEWEST, PREVIOUS = "checkpoint.pth.tar", "checkpoint_previous.pth.tar"
BEST = "model_best.pth.tar"
DAMAGED = f"{NEWEST}.damaged"
MOST_STEPS = 2**62  # and more than any score; a larger number is none of a run's
STATES = "text_states_{}.npy"  # of BERT, see textcache.py


@dataclass(frozen=True)
class TrainState:
    """Where a run stands: the next batch, and what is known of the steps before it."""

    epoch: int = 0
    position: int = 0  # of the next batch in the epoch
    step: int = 0  # batches done
    validated: int = 0  # the last step whose model was validated
    skipped: int = 0  # batches whose loss or gradient was no number
    best_rsum: float = -1.0  # REFERENCE: R@1 + R@5 of both ways, under its published name
    best_r1: float = -1.0  # image-to-text

    @classmethod
    def read(cls, state: Mapping[str, Any], length: int) -> "TrainState":
        """The place in a checkpoint's state; `length` is the batches of an epoch.

        Raises ValueError where it is none of this run.
        """
        place = cls(**{field.name: state.get(field.name) for field in fields(cls)})
        for field in fields(cls):
            value = getattr(place, field.name)
            if type(value) is not type(field.default) or not abs(value) <= MOST_STEPS:
                raise ValueError(f"{field.name} is {brief_repr(value)}")
        if not (0 <= place.position < length and place.epoch >= 0):
            raise ValueError(f"position {place.position} of epoch {place.epoch}")
        if place.step != place.epoch * length + place.position:
            raise ValueError(f"step {place.step} is not position {place.position} there")
        return place

    @property
    def last_epoch(self) -> int:
        """The epoch that the last batch was of."""
        return self.epoch - (self.position == 0 < self.step)


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make a run's folder, and be the only program that writes there. Raises InputError."""
    with explain_os_errors(folder, "a folder to write to"):
        folder.mkdir(parents=True, exist_ok=True)
    for name in (runlog.METRICS, runlog.LOG):  # written in place
        check_own(folder / name)
    with only_writer(folder / LOCK):
        yield


def to_resume(folder: Path, resume: str, overwrite: bool) -> Checkpoint | None:
    """The checkpoint to go on from, or None to start afresh.

    Raises InputError where the folder holds a run that is neither gone on with nor given up.
    """
    written = any(os.path.lexists(folder / name) for name in (NEWEST, PREVIOUS, BEST))
    held = written or runlog.held_by_run(folder)
    if resume == "auto":
        return newest_whole(folder)
    if resume:
        path = Path(resume)
        require(
            not held or os.path.dirname(os.path.realpath(path)) == os.path.realpath(folder),
            f"{folder}: holds another run than {path}; give another --logger_name",
        )
        return read_checkpoint(path)
    # DEVIATION: a folder that holds a run is not written over (the published one was).
    require(
        not held or overwrite,
        f"{folder}: holds a run; --resume auto goes on with it, --overwrite starts again",
    )
    return None


def newest_whole(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None where there is none at all.

    One that is damaged is set aside with a warning. Raises InputError where all are damaged, or
    one cannot be read for another reason, which may pass.
    """
    problem = None
    for name in (NEWEST, PREVIOUS, BEST):
        path = folder / name
        if not os.path.lexists(path):
            continue
        try:
            checkpoint = read_checkpoint(path)
        except Damaged as error:
            problem = error
            log.warning("%s; taking the one before it", error)
            continue
        if name != NEWEST:
            log.warning("going on from %s: %s is damaged or missing", path, NEWEST)
        _set_aside(folder / NEWEST, problem)
        return checkpoint
    if problem is not None:
        raise problem
    return None


def _set_aside(path: Path, problem: InputError | None) -> None:
    """Rename a damaged newest checkpoint, which would be kept in place of a whole one else."""
    if problem is not None and os.path.lexists(path):
        with explain_os_errors(path, "a file to rename"):
            path.replace(path.with_name(DAMAGED))


def clear(folder: Path) -> None:
    """Delete what an earlier run left."""
    for name in (NEWEST, PREVIOUS, BEST):
        runlog.remove(folder / name)
    for path in folder.glob(STATES.format("*") + "*"):  # and one that was not finished
        runlog.remove(path)
    runlog.clear(folder)
