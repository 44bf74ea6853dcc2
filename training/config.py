"""config.py — every option of training, and which ones a resumed run may change (SPEC §8, §9)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common.config import DataConfig, ModelConfig, Precision
from common.errors import InputError, check_range, require

NO_EFFECT = "accepted for the published command lines; changes nothing with precomputed features"

GROUPS = {
    "model": (
        *("direction", "embed_size", "img_dim", "max_words", "num_head_IMRC", "hid_IMRC"),
        *("raw_feature_norm_CMRC", "lambda_softmax_CMRC", "hid_router", "use_abs", "no_imgnorm"),
    ),
    "data": ("data_path", "data_name", "bert_path", "extra_stc", "extra_img", "seed"),
    "optimisation": (
        *("num_epochs", "max_steps", "patience", "batch_size", "learning_rate", "lr_update"),
        *("grad_clip", "margin", "max_violation", "trade_off", "skip_bad_batches"),
    ),
    "validation and checkpoints": (
        *("logger_name", "log_step", "val_step", "val_captions", "save_step"),
        *("init", "resume", "overwrite"),
    ),
    "hardware": (
        *("device", "precision", "workers", "features_on_device", "compile"),
        "activation_checkpointing",
    ),
    "ablations": ("routing", "num_layer_routing", "cells", "cache_text"),
    "accepted and ignored": ("drop", "measure", "finetune", "use_restval", "reset_train"),
}

# What a resumed run may change: its length, its paths, its hardware, how often it logs and saves.
FREE = {
    *("num_epochs", "max_steps", "patience", "logger_name", "data_path", "bert_path", "workers"),
    *("device", "log_step", "val_step", "save_step", "skip_bad_batches", "compile"),
    *("init", "resume", "overwrite", "activation_checkpointing", "features_on_device"),
    *GROUPS["accepted and ignored"],
}


@dataclass(frozen=True)
class TrainConfig(DataConfig, ModelConfig):
    """Every option of training. Defaults are the published ones except `img_dim`."""

    # train.py replaces None by the data's width before it builds the model.
    # DEVIATION: the width of the features is that of the data unless it is given (the published
    # default was 2048).
    img_dim: Annotated[int | None, "width of the region features (default: the data's)"] = None  # type: ignore[assignment]
    bert_path: Annotated[str, "folder with vocab.txt, configuration and weights of BERT"] = "./"
    logger_name: Annotated[str, "checkpoints and logs go to its subfolder i2t or t2i"] = "runs/runX"
    num_epochs: Annotated[int, "passes over the training captions"] = 30
    max_steps: Annotated[int, "end at this step, counted over resumes; 0: after num_epochs"] = 0
    patience: Annotated[
        int, "end after so many epochs without a better result on dev; 0: do not"
    ] = 0
    learning_rate: Annotated[float, "Adam's learning rate"] = 0.0002
    lr_update: Annotated[int, "epochs until the learning rate falls to a tenth"] = 15
    grad_clip: Annotated[float, "maximum gradient norm; 0: no clipping"] = 2.0
    margin: Annotated[float, "margin of the triplet loss"] = 0.2
    max_violation: Annotated[bool, "hardest negative only, else the sum over all"] = True
    trade_off: Annotated[float, "weight of the path regulariser"] = 0.5
    log_step: Annotated[int, "log every so many steps"] = 10
    val_step: Annotated[int, "validate every so many steps, and after each epoch"] = 2000
    save_step: Annotated[int, "save a checkpoint every so many steps, and at validations"] = 500
    skip_bad_batches: Annotated[
        int, "skip up to so many batches whose loss or gradient is NaN or infinite"
    ] = 0
    val_captions: Annotated[int, "dev captions to validate on, whole images only"] = 5000
    init: Annotated[
        str | None, "begin with the weights of a checkpoint: native, official or .safetensors"
    ] = None
    resume: Annotated[
        str, "resume a run: auto (the newest checkpoint of its folder) or a checkpoint file"
    ] = ""
    overwrite: Annotated[bool, "delete the run in the folder and start again"] = False
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps, ..."] = "auto"
    precision: Annotated[
        Precision, "of products: tf32 rounds their inputs to 10 bits (CUDA only), bf16 to 7"
    ] = "fp32"
    features_on_device: Annotated[
        bool | None,
        "load all features to the device once; no workers are needed "
        "(default: on a CUDA GPU if they fit into half of its free memory)",
    ] = None
    cache_text: Annotated[
        bool, "encode the captions with BERT once, without dropout: not the paper's method"
    ] = False
    compile: Annotated[
        bool | None,
        "compile the routing (default: if it is faster); if negated, no CUDA graph is recorded",
    ] = None
    activation_checkpointing: Annotated[
        bool, "recompute activations in the backward pass: less memory, but slower"
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
            self, ("max_steps", "patience", "skip_bad_batches", "grad_clip", "learning_rate"), 0
        )
        check_range(self, ("margin", "trade_off"), 0)
        check_range(self, ("val_captions",), 1)
        if self.extra_img and self.direction == "i2t":
            raise InputError("--extra_img: expected --direction t2i")
        if self.extra_stc and self.direction == "t2i":
            raise InputError("--extra_stc: expected --direction i2t")
        if self.resume and self.overwrite:
            raise InputError("--resume and --overwrite exclude each other")
        if self.init and self.resume not in ("", "auto"):
            raise InputError("--init and --resume FILE exclude each other")

    def skips_single(self, regions: int) -> bool:
        """Return whether batch normalisation would see a single value in a batch of one item.

        In t2i that is one image; in i2t it is one token of an image with one region.
        """
        if self.direction == "t2i":
            return self.extra_img == 0
        return self.extra_stc == 0 and regions == 1

    @property
    def folder(self) -> Path:
        """Folder of the run's files."""
        return Path(self.logger_name) / self.direction
