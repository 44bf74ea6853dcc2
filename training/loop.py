"""trainer.py — the training loop (SPEC §8): epochs, validation, checkpoints.

Kept apart from train.py, which is its command line, so that either can be read at one go. A step is
in learner.py, the options in trainconfig.py, what a checkpoint holds in snapshots.py, the logs in
runlog.py.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from checkpoint.bert import Bert
from checkpoint.checkpoint import Checkpoint
from common.errors import InputError, require
from common.layout import CAPTIONS_PER_IMAGE
from common.memory import describe_oom, is_oom
from common.signals import Signals, Stopped
from data import Batch, Split, TrainingBatches
from evaluation import BadScores, image_of_caption, retrieval, score_split
from model import DIME
from training import log as runlog
from training.config import TrainConfig
from training.resume import CheckpointManager
from training.runfolder import BEST, NEWEST, PREVIOUS, TrainState
from training.step import BadBatch, TrainStep

log = logging.getLogger(__name__)

LR_DECAY = 0.1
MENDED = "once that is mended, "
LONGEST_TIME = 1e9  # seconds that are told


class Trainer:
    """A model on its way: steps, validation, checkpoints."""

    def __init__(
        self,
        config: TrainConfig,
        model: DIME,
        bert: Bert,
        batches: TrainingBatches,
        dev: Split,
        device: torch.device,
    ) -> None:
        self.config, self.model, self.bert = config, model, bert
        self.batches, self.dev, self.device = batches, dev, device
        self.learner = TrainStep(config, model, device)
        self.snapshots = CheckpointManager(config, self.learner, bert, batches, dev)
        self.place = TrainState()
        self.metrics: dict[str, float] | None = None  # on dev, of the model as it is, if validated
        self.restored: Path | None = None  # the checkpoint that is gone on from

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint was written. Raises InputError where the run is another."""
        self.place, self.metrics = self.snapshots.restore(checkpoint), checkpoint.metrics
        self.restored = checkpoint.path

    @property
    def finished(self) -> bool:
        """Whether the run has made all its steps."""
        enough = 0 < self.config.max_steps <= self.place.step
        return enough or self.place.epoch >= self.config.num_epochs

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do, the last validation included."""
        return self.finished and not self._unvalidated

    @property
    def _unvalidated(self) -> bool:
        """Whether a validation is due that has not been done."""
        place = self.place
        due = self.finished or place.position == 0 or place.step % self.config.val_step == 0
        return due and place.validated < place.step

    @property
    def last_step(self) -> int:
        """The step that the run ends at."""
        total = self.config.num_epochs * len(self.batches)
        return min(total, self.config.max_steps or total)

    def train(self) -> None:
        """Train to the end. Raises Stopped where a signal ended it earlier, in good order."""
        if self.complete:
            newest = self.snapshots.is_newest(self.restored)
            found = f"{self.restored}: its run is complete at step {self.place.step}"
            require(newest, f"{found}; expected more of --max_steps or --num_epochs")
            log.info("%s: complete at step %d", self.config.folder, self.place.step)
            runlog.completed(self.config.folder, self.place.step)
            return
        if self.restored is not None:
            self.snapshots.discard_later_steps(self.restored, self.place, self.metrics)
        place, terminal = self.place, sys.stderr.isatty()
        validated = place.validated == place.step
        options = asdict(self.config)
        self.log = runlog.RunLog(self.config.folder, options, self.device, place.step, validated)
        steps = {"total": self.last_step, "initial": place.step, "unit": "step"}
        redirected = logging_redirect_tqdm() if terminal else nullcontext()
        with self.log, tqdm(**steps, disable=not terminal) as self.bar, redirected:
            self._train()

    def _train(self) -> None:
        with Signals() as self.signals:
            self._announce()
            i2t = self.config.direction == "i2t"
            refined = self.batches.split.regions_per_image if i2t else self.config.max_words
            # steps of the whole run, so that a resumed one computes as one never stopped
            self.learner.prepare(refined, self.last_step)
            try:
                if self._unvalidated:  # cut off in the middle of it
                    self._validate()
                while not self.finished:
                    self._epoch()
            except Stopped as stop:
                log.info("stopped by %s at step %d; %s", stop, self.place.step, self._further())
                raise
            except Exception as error:
                if not is_oom(error):
                    raise
                said = f"step {self.place.step}: {describe_oom(error)}; {self._further()}"
                raise InputError(said) from error
            log.info("done: the best model is %s", self.config.folder / BEST)

    def _announce(self) -> None:
        c, data = self.config, self.batches.split
        weights = sum(p.numel() for p in self.learner.parameters)
        log.info("%s on %s, %s: %s", c.direction, self.device, c.precision, c.folder)
        log.info("%s: %d images, %d captions", data.path, data.images, len(data.captions))
        log.info("%.1f million weights to train, BERT's frozen beside", weights / 1e6)
        if self.batches.skip_single and len(data.captions) % c.batch_size == 1:
            log.info("the last batch of an epoch holds one item and is skipped: it needs two")
        log.info("step %d of %d, %d an epoch", self.place.step, self.last_step, len(self.batches))

    def _epoch(self) -> None:
        """From the run's place to the end of its epoch, or of the run."""
        config, epoch = self.config, self.place.epoch
        lr = config.learning_rate * LR_DECAY ** (epoch // config.lr_update)
        for group in self.learner.optimizer.param_groups:
            group["lr"] = lr
        window = runlog.Meter()
        for batch in self._batches():
            window.loaded()
            figures = self._step_or_skip(batch)
            window.resumed() if figures is None else window.stepped(figures)
            self._advance()
            self.bar.update()
            if window.steps and self.place.step % config.log_step == 0:
                self._report(epoch, lr, window)
                window = runlog.Meter()
            if self._save_and_validate():
                window.resumed()
            if self.place.epoch > epoch or self.finished:
                return

    def _batches(self) -> Iterator[Batch]:
        """The rest of the epoch. What ends a run between two steps loses none of them."""
        pin = self.device.type == "cuda"
        try:
            yield from self.batches.epoch(self.place.epoch, self.place.position, pin)
        except InputError as error:
            if self.place.step:
                self._save(NEWEST)
            self.signals.obey()  # one that ends a worker, too
            raise InputError(f"{error}; {self._further(MENDED)}") from error

    def _save_and_validate(self) -> bool:
        """Save and validate where the step asks for it, end where a signal does.

        Returns whether there was anything to do.
        """
        due = self._unvalidated
        told = self.signals.number is not None
        save = due or told or self.place.step % self.config.save_step == 0
        if save:
            self._save(NEWEST)
        self.signals.obey()
        if due:
            self._validate()
        if not self.finished:
            self.signals.obey()
        return save

    def _advance(self) -> None:
        epoch, position = divmod(self.place.position + 1, len(self.batches))
        self.place = replace(
            self.place, epoch=self.place.epoch + epoch, position=position, step=self.place.step + 1
        )
        self.log.step, self.metrics = self.place.step, None

    def _step_or_skip(self, batch: Batch) -> dict[str, Tensor] | None:
        """A step's figures, or None where the batch was bad and may be skipped."""
        allowed = self.place.skipped < self.config.skip_bad_batches
        # batch normalisation's running statistics have seen the batch by the time its loss is known
        before = [buffer.clone() for buffer in self.model.buffers()] if allowed else []
        try:
            return self._step(batch)
        except BadBatch as error:
            found = f"step {self.place.step + 1}: {error}"
            if not allowed:
                advice = "--skip_bad_batches skips such a batch"
                raise InputError(f"{found}; {self._kept()}; {advice}") from error
            for buffer, value in zip(self.model.buffers(), before, strict=True):
                buffer.copy_(value)
            self.place = replace(self.place, skipped=self.place.skipped + 1)
            limit = self.config.skip_bad_batches
            log.warning("%s; skipped, %d of %d", found, self.place.skipped, limit)
            return None

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        """A step's figures. Raises Stopped where a signal ended the compiler in it, too."""
        compiled = self.model.space.is_compiled
        try:
            return self.learner.step(batch.to(self.device))
        finally:
            if compiled and not self.model.space.is_compiled:
                self.signals.obey()  # what was computed without it has other bits

    def _kept(self) -> str:
        newest = self.config.folder / NEWEST
        return f"the last checkpoint is {newest}" if newest.exists() else "no checkpoint yet"

    def _further(self, when: str = "") -> str:
        instead = " in place of --overwrite" if self.config.overwrite else ""
        return f"{self._kept()}; {when}the same command with --resume auto{instead} goes on"

    def _report(self, epoch: int, lr: float, window: runlog.Meter) -> None:
        figures = window.mean()
        step, speed = self.place.step, figures.pop("pairs") / figures["batch_time"]
        self.log.record(epoch=epoch, lr=lr, **figures, pairs_per_s=speed)
        loss = f"loss {figures['Le']:.3f}"
        self.bar.set_postfix_str(f"{loss}, {speed:.0f} pairs/s")
        if self.bar.disable:
            seconds = (self.last_step - step) * figures["batch_time"]
            left = timedelta(seconds=round(min(seconds, LONGEST_TIME)))
            progress = f"epoch {epoch} step {step}/{self.last_step}"
            parts = f"rank {figures['Rank']:.3f}, path {figures['Path']:.3f}"
            log.info("%s %s (%s), %.0f pairs/s, %s left", progress, loss, parts, speed, left)

    def _validate(self) -> None:
        """Score dev, keep the best model, write the checkpoint."""
        place, scores = self.place, self._dev_scores()
        result = retrieval(scores, image_of_caption(scores.shape[1]))
        better = result.selection > place.best_rsum
        self.place = replace(
            place,
            validated=place.step,
            best_rsum=max(place.best_rsum, result.selection),
            best_r1=max(place.best_r1, result.i2t.r1),
        )
        self.metrics = runlog.tags(result)
        self.log.record(epoch=place.last_epoch, **self.metrics)
        log.info(
            "step %d: rsum %.1f, R@1+R@5 %.1f (best %.1f)",
            *(place.step, result.rsum, result.selection, self.place.best_rsum),
        )
        if better:  # first: were it last, a run cut off in between would not have it
            self._save(BEST)
        self._save(NEWEST)

    def _dev_scores(self) -> np.ndarray:
        """Scores `[I, T]` of the dev images that are validated on."""
        config, step = self.config, self.place.step
        images = min(self.dev.images, config.val_captions // CAPTIONS_PER_IMAGE)
        log.info("step %d: validating on %d dev images", step, images)
        how = {"device": self.device, "images": images, "workers": config.workers}
        try:
            with self.signals.at_once():  # the checkpoint of this step is written
                return score_split(self.model, self.dev, self.bert.vocabulary, **how)
        except BadScores as error:
            best = config.folder / BEST
            other = f"the best one before it is {best}" if best.exists() else "there is no other"
            message = f"step {step}: {error}, so its checkpoint is no good; {other}"
            raise InputError(message) from error
        except InputError as error:
            self.signals.obey()  # one that ends a worker, too
            raise InputError(f"{error}; {self._further(MENDED)}") from error

    def _save(self, name: str) -> None:
        keep = self.config.folder / PREVIOUS if name == NEWEST else None
        self.snapshots.write(self.config.folder / name, self.place, self.metrics, keep)
        self.log.write_run(self.complete)
