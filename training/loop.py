"""loop.py — the training loop (SPEC §8): epochs, validation, checkpoints, logs."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint.bert import Bert
from checkpoint.checkpoint import Checkpoint
from common.distributed import ProcessLost, gather_objects, largest
from common.errors import InputError, require
from common.layout import read_backbone
from common.memory import describe_oom, is_oom
from common.results import Retrieval
from common.signals import Signals, Stopped
from common.world import ALONE, World
from data import Batch, Split, TrainingBatches
from evaluation import retrieval, score_split
from model import DIME
from training.config import TrainConfig
from training.log import Meter, NoLog, RunLog, mark_complete, tags
from training.resume import BEST, NEWEST, CheckpointManager, TrainState
from training.step import TrainStep

log = logging.getLogger(__name__)

LR_DECAY = 0.1  # every `lr_update` epochs
# Options that may differ between the processes of a run.
OF_A_MACHINE = {"data_path", "bert_path", "logger_name", "workers", "init", "resume"}
DROPOUT = 3  # first number of the seed of a step's dropout
LESS_MEMORY = "--activation_checkpointing, --no-features_on_device or a smaller --batch_size help"


class Trainer:
    """A training run, from its first step or from a checkpoint to its end."""

    def __init__(
        self,
        config: TrainConfig,
        model: DIME,
        bert: Bert,
        batches: TrainingBatches,
        dev: Split,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        self.config, self.model, self.bert, self.world = config, model, bert, world
        self.batches, self.dev, self.device = batches, dev, device
        self.val_images = dev.groups.whole_images(config.val_captions)
        problem = f"--val_captions {config.val_captions}: expected at least {dev.groups.counts[0]}"
        require(self.val_images > 0, f"{problem}, those of the first image of {dev.path}")
        self.train_step = TrainStep(config, model, device, world)
        backbone = read_backbone(batches.split.path.parent, "train")
        self.checkpoints = CheckpointManager(config, self.train_step, bert, batches, dev, backbone)
        new_log = NoLog if world.rank else RunLog
        self.log = new_log(config.folder, asdict(config), device)
        self.log.run["processes"] = world.size
        self.signals = Signals()
        self.meter = Meter()
        self.state = TrainState()
        self.metrics: dict[str, float] | None = None  # on dev, if the present weights are validated
        self.resumed: Path | None = None  # the checkpoint that the run resumes from

    def restore(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint. Raises InputError if it is of another run."""
        self.state, self.metrics = self.checkpoints.restore(checkpoint), checkpoint.metrics
        self.resumed = checkpoint.path

    def facts(self) -> dict[str, Any]:
        """Return what all processes of a run have in common, wherever they read it."""
        options = {f"--{k}": v for k, v in asdict(self.config).items() if k not in OF_A_MACHINE}
        return options | {
            "training data": self.batches.split.fingerprint,
            "dev data": self.dev.fingerprint,
            "BERT": self.bert.fingerprint,
            "step to resume from": self.state.step,
        }

    @property
    def last_step(self) -> int:
        """The step that the run ends at."""
        total = self.config.num_epochs * len(self.batches)
        return min(total, self.config.max_steps or total)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or dev has not improved for --patience epochs."""
        epochs = (self.state.step - self.state.best_step) // len(self.batches)
        return self.state.step >= self.last_step or 0 < self.config.patience <= epochs

    @property
    def validation_due(self) -> bool:
        """Whether the present weights have to be validated and are not yet."""
        state = self.state
        at = (len(self.batches), self.config.val_step)
        due = self.finished or any(state.step % steps == 0 for steps in at)
        return due and state.validated < state.step

    @property
    def complete(self) -> bool:
        """Whether all steps and the last validation are done."""
        return self.finished and not self.validation_due

    def train(self) -> None:
        """Train to the end. Raises Stopped after a signal, with a checkpoint of the last step."""
        config, state = self.config, self.state
        if self.resumed is not None:
            if self.complete:
                self._confirm_complete(self.resumed)
                return
            self.checkpoints.discard_later_steps(self.resumed, state, self.metrics)
        with self.log.open(state.step, not self.validation_due), self.signals:
            self._announce()
            # Of the whole run, so that a resumed run makes the same choice.
            self.train_step.prepare(self.last_step)
            try:
                if self.validation_due:  # the run was cut off in the middle of it
                    self._validate()
                while not self.finished:
                    self._epoch()
            except Stopped as stop:
                log.info("stopped by %s at step %d; %s", stop, self.state.step, self._advice())
                raise
            except ProcessLost as error:
                reason = f"step {self.state.step + 1}: {error}"
                raise InputError(f"{reason}; {self._advice()}") from error
            except Exception as error:
                if not is_oom(error):
                    raise
                reason = f"step {self.state.step + 1}: {describe_oom(error)}; {LESS_MEMORY}"
                raise self._own_error(reason) from error
            log.info("done: the best model is %s", config.folder / BEST)

    def _confirm_complete(self, resumed: Path) -> None:
        """Log that the run is complete. Raises InputError if `resumed` is an older checkpoint."""
        complete = f"{resumed}: its run is complete at step {self.state.step}"
        is_newest = self.checkpoints.is_newest(resumed)
        require(is_newest, f"{complete}; expected a larger --max_steps, --num_epochs or --patience")
        log.info(complete)
        if self.world.rank == 0:
            mark_complete(self.config.folder, self.state.step)

    def _announce(self) -> None:
        config, data = self.config, self.batches.split
        weights = sum(p.numel() for p in self.train_step.parameters) / 1e6
        run = (config.direction, weights, self.device, config.precision, config.folder)
        log.info("%s, %.1f million weights beside BERT's, on %s in %s: %s", *run)
        if self.world.size > 1:
            log.info("%d processes share each batch", self.world.size)
        log.info("%s: %d images, %d captions", data.path, data.images, len(data.captions))
        if self.batches.skip_single and len(data.captions) % config.batch_size == 1:
            log.info("the last batch of an epoch is skipped: batch normalisation needs two items")
        log.info("step %d of %d, %d an epoch", self.state.step, self.last_step, len(self.batches))

    def _epoch(self) -> None:
        """Train from the present position to the end of the epoch, or of the run."""
        config, (epoch, position) = self.config, divmod(self.state.step, len(self.batches))
        rate = config.learning_rate * LR_DECAY ** (epoch // config.lr_update)
        self.train_step.set_learning_rate(rate)
        self.meter = Meter()
        for batch in self._batches(epoch, position):
            self.meter.note_loaded()
            self._seed_dropout()
            figures = self.train_step.step(batch)
            self.state = replace(self.state, step=self.state.step + 1)
            self.log.step, self.metrics = self.state.step, None
            self.meter.add(self.state.step, batch, figures)
            if self.state.step % config.log_step == 0:
                self._report(epoch, rate)
            self._save_and_validate()
            if self.finished:
                return
            self.meter.start()

    def _seed_dropout(self) -> None:
        """Seed a step's dropout by its number, so that any number of processes can resume."""
        if self.world.size > 1:
            key = (DROPOUT, self.config.seed, self.state.step, self.world.rank)
            (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64).tolist()
            torch.manual_seed(seed)

    def _batches(self, epoch: int, position: int) -> Iterator[Batch]:
        """Yield the remaining batches of the epoch. If reading fails, save a checkpoint first."""
        try:
            yield from self.batches.epoch(epoch, position, self.device)
        except InputError as error:
            if self.state.step:
                self._save(NEWEST)
            self.signals.check()  # a signal to the process group ends the workers, too
            raise self._own_error(str(error)) from error

    def _own_error(self, reason: str) -> InputError:
        """Return an error of this process, which prints it: the others only see that it ends."""
        reason = f"{reason}; {self._advice()}"
        if self.world.rank:
            log.error("process %d: %s", self.world.rank, reason)
        return InputError(reason)

    def _fetch_figures(self) -> None:
        """Fetch the figures of the steps so far and count bad batches.

        Raises InputError if there are too many. Until then the run has trained on; a bad batch has
        changed neither the model nor the optimiser.
        """
        limit = self.config.skip_bad_batches
        for message in self.meter.fetch():
            if self.state.skipped == limit:
                advice = "--skip_bad_batches skips such batches"
                raise InputError(f"{message}; {self._advice()}; {advice}")
            self.state = replace(self.state, skipped=self.state.skipped + 1)
            log.warning("%s; skipped, %d of %d", message, self.state.skipped, limit)

    def _report(self, epoch: int, rate: float) -> None:
        """Log the means since the last report, unless all batches were bad."""
        self._fetch_figures()
        if not self.meter.steps:
            return
        means, step = self.meter.means(), self.state.step
        self.meter = Meter()
        speed = means.pop("pairs") / means["batch_time"]
        self.log.record(epoch=epoch, lr=rate, **means, pairs_per_s=speed)
        left = timedelta(seconds=round((self.last_step - step) * means["batch_time"]))
        log.info(
            "epoch %d step %d/%d loss %.3f (rank %.3f, path %.3f), %.0f pairs/s, %s left",
            *(epoch, step, self.last_step, means["Le"], means["Rank"], means["Path"], speed, left),
        )

    def _save_and_validate(self) -> None:
        """Save and validate if the step asks for it. Raises Stopped if a signal came."""
        # Asked on the hosts: to read a number that the GPUs add up, a host would wait for its GPU.
        due, received = self.validation_due, largest(self.world, self.signals.received or 0)
        if due or received or self.state.step % self.config.save_step == 0:
            self._save(NEWEST)  # before the validation, which can take long
        if received:  # one that comes after this line waits for the next step or tile
            raise Stopped(received)
        if due:
            self._validate()

    def _validate(self) -> None:
        """Score dev, keep the best model, save a checkpoint."""
        state = self.state
        log.info("step %d: validating on %d dev images", state.step, self.val_images)
        try:
            result = self._evaluate_dev()
        except InputError as error:
            self.signals.check()  # a signal to the process group ends the workers, too
            raise InputError(f"step {state.step}: {error}; {self._advice()}") from error
        self.state = replace(
            state,
            validated=state.step,
            best_rsum=max(state.best_rsum, result.selection),
            best_r1=max(state.best_r1, result.i2t.r1),
            best_step=state.step if result.selection > state.best_rsum else state.best_step,
        )
        self.metrics = tags(result)
        self.log.record(epoch=(state.step - 1) // len(self.batches), **self.metrics)
        log.info(
            "step %d: rsum %.1f, R@1+R@5 %.1f (best %.1f)",
            *(state.step, result.rsum, result.selection, self.state.best_rsum),
        )
        # The best model first: a run that is killed in between validates this step again.
        if result.selection > state.best_rsum:
            self._save(BEST)
        self._save(NEWEST)

    def _evaluate_dev(self) -> Retrieval:
        """Return the metrics on dev, in every process. Raises Stopped in all if a signal came."""
        scores = score_split(
            self.model,
            self.dev,
            self.bert.vocabulary,
            device=self.device,
            images=self.val_images,
            workers=self.config.workers,
            stop=self._stop_if_signalled,
            world=self.world,
        )
        result = None
        if self.world.rank == 0:  # it has the scores
            result = retrieval(scores, self.dev.groups.image_of_caption[: scores.shape[1]])
        return gather_objects(self.world, result)[0]

    def _stop_if_signalled(self) -> None:
        """Raise Stopped in all processes if one of them has received a signal."""
        if received := largest(self.world, self.signals.received or 0):
            raise Stopped(received)

    def _save(self, name: str) -> None:
        self._fetch_figures()  # so that a checkpoint has all of its bad batches counted
        self.checkpoints.write(name, self.state, self.metrics)
        self.log.write_run(self.complete)

    def _advice(self) -> str:
        newest = self.config.folder / NEWEST
        if not newest.exists():
            return "no checkpoint yet"
        return f"the last checkpoint is {newest}; run the same command with --resume auto"
