"""trainer.py — the training loop and its options (SPEC §8, §9): steps, validation, checkpoints.

Kept apart from train.py, which is its command line, so that either can be read at one go. The
mathematics is in model.py, the logs in runlog.py.
"""

import logging
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import runlog
from checkpoint import BERT_KEYS, Bert, Checkpoint, check_same_bert, load_strictly, write_checkpoint
from data import CAPTIONS_PER_IMAGE, Batch, DataConfig, Split, TrainingBatches
from evaluation import owners, retrieval, score_split
from model import DIME, ModelConfig, path_loss, triplet_loss
from options import InputError, Precision, check_range, require

log = logging.getLogger(__name__)

NEWEST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
LR_DECAY = 0.1
NO_EFFECT = "accepted for the published command lines; changes nothing with precomputed features"

# What a resumed run may change: how far it goes, where things are, how often it tells and saves.
FREE = {
    *("num_epochs", "max_steps", "logger_name", "data_path", "bert_path", "workers", "device"),
    *("log_step", "val_step", "resume", "overwrite", "compile"),
    *("drop", "measure", "finetune", "use_restval", "reset_train"),
}


@dataclass(frozen=True)
class TrainConfig(DataConfig, ModelConfig):
    """Every option of training. Defaults are the published ones."""

    bert_path: Annotated[str, "folder with vocab.txt, configuration and weights of BERT"] = "./"
    logger_name: Annotated[str, "checkpoints and logs go to its subfolder i2t or t2i"] = "runs/runX"
    num_epochs: Annotated[int, "passes over the training captions"] = 30
    max_steps: Annotated[int, "end at this step, counted over resumes; 0: after num_epochs"] = 0
    learning_rate: Annotated[float, "Adam's learning rate"] = 0.0002
    lr_update: Annotated[int, "epochs until the learning rate falls to a tenth"] = 15
    grad_clip: Annotated[float, "longest gradient; 0: any length"] = 2.0
    margin: Annotated[float, "margin of the triplet loss"] = 0.2
    max_violation: Annotated[bool, "hardest negative only, else the sum over all"] = True
    trade_off: Annotated[float, "weight of the path regulariser"] = 0.5
    log_step: Annotated[int, "steps from one log line to the next"] = 10
    val_step: Annotated[int, "steps from one validation to the next"] = 2000
    val_captions: Annotated[int, "dev captions to validate on, whole images only"] = 5000
    resume: Annotated[str, "go on with a run: auto (newest checkpoint of its folder) or a file"] = (
        ""
    )
    overwrite: Annotated[bool, "start again in a folder that holds a run, which is lost"] = False
    device: Annotated[str, "auto, cpu, cuda, cuda:1, ..."] = "auto"
    precision: Annotated[Precision, "bf16 computes products in bfloat16, weights stay float32"] = (
        "fp32"
    )
    compile: Annotated[bool, "compile the routing space (takes minutes, needs a compiler)"] = False
    drop: Annotated[float, NO_EFFECT] = 0.0
    measure: Annotated[str, NO_EFFECT] = "cosine"
    finetune: Annotated[bool, NO_EFFECT] = False
    use_restval: Annotated[bool, NO_EFFECT] = False
    reset_train: Annotated[bool, NO_EFFECT] = False

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        DataConfig.__post_init__(self)
        require(bool(self.logger_name), "--logger_name is empty; expected a folder")
        check_range(self, ("num_epochs", "lr_update", "log_step", "val_step"), 1)
        check_range(self, ("max_steps", "grad_clip", "learning_rate", "margin", "trade_off"), 0)
        i2t = self.direction == "i2t"
        require(not (i2t and self.extra_img), "--extra_img goes with --direction t2i alone")
        require(i2t or not self.extra_stc, "--extra_stc goes with --direction i2t alone")
        require(
            self.val_captions >= CAPTIONS_PER_IMAGE,
            f"--val_captions {self.val_captions}: expected the {CAPTIONS_PER_IMAGE} of an image",
        )
        require(not (self.resume and self.overwrite), "--resume and --overwrite exclude each other")

    def skips_single(self, regions: int) -> bool:
        """Whether a batch of one item is a single value to some batch normalisation.

        In t2i it is a single image, in i2t with one region an image a single token.
        """
        if self.direction == "t2i":
            return self.extra_img == 0
        return self.extra_stc == 0 and regions == 1

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        return Path(self.logger_name) / self.direction


@dataclass(frozen=True)
class Place:
    """Where a run stands: the next batch, and the best scores so far."""

    epoch: int = 0
    position: int = 0  # of the next batch in the epoch
    step: int = 0  # batches done
    best_rsum: float = -1.0  # REFERENCE: R@1 + R@5 of both ways, under its published name
    best_r1: float = -1.0  # image-to-text


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
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.learning_rate)
        self.place = Place()
        model.precision = config.precision
        if config.compile:
            model.compile_routing()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint was written. Raises InputError where the run is another."""
        path, state = checkpoint.path, checkpoint.state
        require("optimizer" in state, f"{path}: holds no optimiser, so it cannot be gone on with")
        for field in fields(self.config):
            then = checkpoint.options.get(field.name, field.default)
            now = getattr(self.config, field.name)
            if field.name not in FREE:
                require(then == now, f"{path}: was trained with --{field.name} {then}, not {now}")
        check_same_bert(checkpoint, self.bert)
        captions = len(self.batches.split.captions)
        require(
            state.get("train_captions") == captions,
            f"{self.batches.split.path}: {captions} captions; {path} was trained on "
            f"{state.get('train_captions')}",
        )
        load_strictly(self.model, checkpoint.weights, path, keep=BERT_KEYS)
        # DEVIATION: a resumed run goes on exactly where it was (the published one started again at
        # epoch 0, its optimiser and best scores forgotten).
        try:
            self.place = Place(**{field.name: state[field.name] for field in fields(Place)})
            self._check_place()
            self.optimizer.load_state_dict(state["optimizer"])
            self._check_moments()
            torch.set_rng_state(state["random"]["cpu"])
            if self.device.type == "cuda" and state["random"]["cuda"] is not None:
                torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{path}: cannot be gone on with: {reason}") from error
        if not (self.config.folder / BEST).exists():
            log.info("%s: no best model here, the next one is", self.config.folder)
            self.place = replace(self.place, best_rsum=-1.0, best_r1=-1.0)

    def _check_place(self) -> None:
        """Raise ValueError where the place is none of this run."""
        place, length = self.place, len(self.batches)
        for field in fields(Place):
            value = getattr(place, field.name)
            if type(value) is not type(field.default):
                raise ValueError(f"{field.name} is {value!r}")
        if not (0 <= place.position < length and place.epoch >= 0):
            raise ValueError(f"position {place.position} of epoch {place.epoch}")
        if place.step != place.epoch * length + place.position:
            raise ValueError(f"step {place.step} is not position {place.position} there")

    def _check_moments(self) -> None:
        """Raise an error where Adam has not the moments that its steps left it."""
        for parameter in self.parameters if self.place.step else []:
            moments = self.optimizer.state[parameter]
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].shape != parameter.shape:
                    raise ValueError(f"{name} is {list(moments[name].shape)}")

    @property
    def finished(self) -> bool:
        """Whether the run has made all its steps."""
        enough = 0 < self.config.max_steps <= self.place.step
        return enough or self.place.epoch >= self.config.num_epochs

    @property
    def last_step(self) -> int:
        """The step that the run ends at."""
        total = self.config.num_epochs * len(self.batches)
        return min(total, self.config.max_steps or total)

    def train(self) -> None:
        """Train to the end."""
        if self.finished:
            log.info("%s: complete at step %d", self.config.folder, self.place.step)
            return
        self.log = runlog.RunLog(
            self.config.folder, asdict(self.config), self.device, self.place.step
        )
        self._announce()
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=self.last_step, initial=self.place.step, unit="step", disable=not terminal
        )
        with self.bar, logging_redirect_tqdm() if terminal else nullcontext():
            while not self.finished:
                self._epoch()
        self.log.close()
        log.info("done: the best model is %s", self.config.folder / BEST)

    def _announce(self) -> None:
        c, data = self.config, self.batches.split
        weights = sum(p.numel() for p in self.parameters)
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
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        pin = self.device.type == "cuda"
        window = runlog.Window()
        for batch in self.batches.epoch(epoch, self.place.position, pin):
            window.loaded()
            figures = self.step(batch.to(self.device))
            window.stepped(figures)
            self._advance()
            self.bar.update()
            if self.place.step % config.log_step == 0:
                self._report(epoch, lr, window)
                window = runlog.Window()
            over = self.place.epoch > epoch or self.finished
            if over or self.place.step % config.val_step == 0:
                self._validate(epoch)
                window.resumed()
            if over:
                return

    def _advance(self) -> None:
        epoch, position = divmod(self.place.position + 1, len(self.batches))
        self.place = replace(
            self.place, epoch=self.place.epoch + epoch, position=position, step=self.place.step + 1
        )

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step; its losses, and the number of pairs scored."""
        config = self.config
        self.model.train()
        output = self.model(batch.regions, batch.ids, batch.mask, batch.pairs)
        rank = triplet_loss(output.scores, batch.pairs, config.margin, config.max_violation)
        path = path_loss(output.paths, output.meanings, config.batch_size)
        loss = rank + config.trade_off * path
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, config.grad_clip or torch.inf)
        if not (loss + norm).isfinite():
            raise InputError(self._lost(loss.item(), norm.item(), batch))
        self.optimizer.step()
        pairs = torch.tensor(output.scores.numel())
        losses = {"Rank": rank, "Path": path, "Le": loss, "grad_norm": norm}
        return {name: value.detach() for name, value in losses.items()} | {"pairs": pairs}

    def _lost(self, loss: float, norm: float, batch: Batch) -> str:
        """What is said of a loss or a gradient that is no number."""
        captions = ", ".join(map(str, batch.captions.tolist()))
        found = f"the loss is {loss}, its gradient's length {norm}"
        return f"step {self.place.step + 1}: {found}; {self._kept()}; captions {captions}"

    def _kept(self) -> str:
        newest = self.config.folder / NEWEST
        return f"the last checkpoint is {newest}" if newest.exists() else "no checkpoint yet"

    def _report(self, epoch: int, lr: float, window: runlog.Window) -> None:
        figures = window.mean()
        step, speed = self.place.step, figures.pop("pairs") / figures["batch_time"]
        self.log.record(step, epoch=epoch, lr=lr, **figures, pairs_per_s=speed)
        loss = f"loss {figures['Le']:.3f}"
        self.bar.set_postfix_str(f"{loss}, {speed:.0f} pairs/s")
        if self.bar.disable:
            seconds = (self.last_step - step) * figures["batch_time"]
            left = timedelta(seconds=round(seconds))
            progress = f"epoch {epoch} step {step}/{self.last_step}"
            parts = f"rank {figures['Rank']:.3f}, path {figures['Path']:.3f}"
            log.info("%s %s (%s), %.0f pairs/s, %s left", progress, loss, parts, speed, left)

    def _validate(self, epoch: int) -> None:
        """Score dev, keep the best model, write the checkpoint."""
        config, place = self.config, self.place
        images = min(self.dev.images, config.val_captions // CAPTIONS_PER_IMAGE)
        log.info("step %d: validating on %d dev images", place.step, images)
        scores = score_split(
            self.model,
            self.dev,
            self.bert.vocabulary,
            config.max_words,
            device=self.device,
            images=images,
            workers=config.workers,
        )
        found = f"step {place.step}: the scores of dev hold NaN or inf; {self._kept()}"
        require(bool(np.isfinite(scores).all()), found)
        result = retrieval(scores, owners(scores.shape[1]))
        better = result.selection > place.best_rsum
        self.place = replace(
            place,
            best_rsum=max(place.best_rsum, result.selection),
            best_r1=max(place.best_r1, result.i2t.r1),
        )
        self.log.record(place.step, epoch=epoch, **runlog.tags(result))
        log.info(
            "step %d: rsum %.1f, R@1+R@5 %.1f (best %.1f)",
            *(place.step, result.rsum, result.selection, self.place.best_rsum),
        )
        if better:  # first: were it last, a run cut off in between would not have it
            self._save(BEST)
        self._save(NEWEST)
        self.log.write_run()

    def _save(self, name: str) -> None:
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        state: dict[str, Any] = {
            **asdict(self.place),
            "optimizer": self.optimizer.state_dict(),
            "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "train_captions": len(self.batches.split.captions),
        }
        path = self.config.folder / name
        write_checkpoint(path, self.model, asdict(self.config), self.bert, **state)
