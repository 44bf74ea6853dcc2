"""trainconfig.py — every option of training, and which a resumed run may change (SPEC §8, §9).

Kept apart from trainer.py, so that the loop can be read at one go.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common.config import DataConfig, ModelConfig, Precision
from common.errors import check_range, require
from common.layout import CAPTIONS_PER_IMAGE

NO_EFFECT = "accepted for the published command lines; changes nothing with precomputed features"

# What a resumed run may change: how far it goes, where things are, how often it tells and saves.
FREE = {
    *("num_epochs", "max_steps", "logger_name", "data_path", "bert_path", "workers", "device"),
    *("log_step", "val_step", "save_step", "skip_bad_batches", "resume", "overwrite", "compile"),
    "activation_checkpointing",
    *("drop", "measure", "finetune", "use_restval", "reset_train"),
}


@dataclass(frozen=True)
class TrainConfig(DataConfig, ModelConfig):
    """Every option of training. Defaults are the published ones, but for `img_dim`."""

    # DEVIATION: the width of the features is that of the data unless it is given (the published
    # default was 2048).
    img_dim: Annotated[int | None, "width of the region features (default: that of the data)"] = (
        None
    )
    bert_path: Annotated[str, "folder with vocab.txt, configuration and weights of BERT"] = "./"
    logger_name: Annotated[str, "checkpoints and logs go to its subfolder i2t or t2i"] = "runs/runX"
    num_epochs: Annotated[int, "passes over the training captions"] = 30
    max_steps: Annotated[int, "end at this step, counted over resumes; 0: after num_epochs"] = 0
    learning_rate: Annotated[float, "Adam's learning rate"] = 0.0002
    lr_update: Annotated[int, "epochs until the learning rate falls to a tenth"] = 15
    grad_clip: Annotated[float, "maximum gradient norm; 0: any"] = 2.0
    margin: Annotated[float, "margin of the triplet loss"] = 0.2
    max_violation: Annotated[bool, "hardest negative only, else the sum over all"] = True
    trade_off: Annotated[float, "weight of the path regulariser"] = 0.5
    log_step: Annotated[int, "steps from one log line to the next"] = 10
    val_step: Annotated[int, "steps from one validation to the next"] = 2000
    save_step: Annotated[int, "steps from one checkpoint to the next, between validations"] = 500
    skip_bad_batches: Annotated[
        int, "batches of the run to skip whose loss or gradient is no number, before it stops"
    ] = 0
    val_captions: Annotated[int, "dev captions to validate on, whole images only"] = 5000
    resume: Annotated[str, "go on with a run: auto (newest checkpoint of its folder) or a file"] = (
        ""
    )
    overwrite: Annotated[bool, "start again in a folder that holds a run, which is lost"] = False
    device: Annotated[str, "auto, cpu, cuda, cuda:1, ..."] = "auto"
    precision: Annotated[Precision, "bf16 computes products in bfloat16, weights stay float32"] = (
        "fp32"
    )
    cache_text: Annotated[
        bool,
        "let BERT read the captions once, in float32 and without its dropout, and not in every "
        "step: not the paper's method",
    ] = False
    compile: Annotated[bool | None, "compile the routing (default: where it pays)"] = None
    activation_checkpointing: Annotated[
        bool,
        "recompute activations in the backward pass: less memory, about a third slower",
    ] = False
    drop: Annotated[float, NO_EFFECT] = 0.0
    measure: Annotated[str, NO_EFFECT] = "cosine"
    finetune: Annotated[bool, NO_EFFECT] = False
    use_restval: Annotated[bool, NO_EFFECT] = False
    reset_train: Annotated[bool, NO_EFFECT] = False

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        DataConfig.__post_init__(self)
        require(bool(self.logger_name), "--logger_name is empty; expected a folder")
        check_range(self, ("num_epochs", "lr_update", "log_step", "val_step", "save_step"), 1)
        check_range(
            self,
            (
                "max_steps",
                "skip_bad_batches",
                "grad_clip",
                "learning_rate",
                "margin",
                "trade_off",
            ),
            0,
        )
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
