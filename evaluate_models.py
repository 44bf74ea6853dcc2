"""evaluate_models.py — retrieval results of one model or an ensemble (SPEC §10).

It turns checkpoints, native or official, or saved score matrices into one score matrix, and
computes every metric from that. torch and transformers are imported inside functions, once the
options are parsed, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from common.cli import parse, pick_device, print_line, run
from common.config import Precision
from common.errors import InputError, check_range, require
from common.files import check_writable, write_array, write_json
from common.layout import files_of, read_groups_of_scores, split_files
from common.precision import has_tf32, warn_if_bf16_is_slow
from common.results import MSCOCO_IMAGES, EvaluationResult, ProtocolResult

if TYPE_CHECKING:
    import numpy as np
    import torch

    from checkpoint import Checkpoint
    from checkpoint.bert import Bert
    from data import Split
    from model import DIME

log = logging.getLogger(__name__)

DESCRIPTION = """Evaluate one DIME model, or an ensemble of several, on a split.

  python evaluate_models.py --model_path runs/f30k/i2t/model_best.pth.tar --data_path data
  python evaluate_models.py --model_path I2T.pth.tar T2I.pth.tar --data_path data --fold5
  python evaluate_models.py --scores i2t.npy t2i.npy --bootstrap 1000

Prints R@1 R@5 R@10, median and mean rank in both directions; for 5,000 images as the mean of five
folds (MSCOCO 1K) and for all images (5K). Reads this project's checkpoints, the official ones, and
.safetensors."""

EvaluatedSplit = Literal["dev", "test", "testall"]
THEIRS = " (default: the checkpoint's)"
LEAST_SAMPLES = 100  # of the bootstrap: with fewer, a single sample would be a bound
GROUPS = {
    "models and data": ("model_path", "scores", "data_path", "data_name", "bert_path", "split"),
    "metrics": ("fold5", "bootstrap", "shortlist"),
    "output": ("save_scores", "json"),
    "hardware": ("device", "precision", "compile", "workers"),
}


@dataclass(frozen=True)
class EvaluateConfig:
    """Every option of evaluation. Data, BERT and precision default to the checkpoints'."""

    model_path: Annotated[
        list[str] | None, "checkpoints, native, official or .safetensors; several are an ensemble"
    ] = None
    scores: Annotated[
        list[str] | None,
        "instead of models: saved score matrices, whose mean is an ensemble's; also pass "
        "--data_path, --data_name and --split to say which split they belong to",
    ] = None
    data_path: Annotated[str | None, "folder of the data sets' folders" + THEIRS] = None
    data_name: Annotated[str | None, "data set's folder, like f30k_precomp" + THEIRS] = None
    bert_path: Annotated[str | None, "folder of the BERT it was trained with" + THEIRS] = None
    split: Annotated[EvaluatedSplit | None, "default: test; --fold5: testall, if it exists"] = None
    fold5: Annotated[bool, "mean of five equal slices of the images (MSCOCO 1K)"] = False
    bootstrap: Annotated[int, "95 %% intervals from so many samples, at least 100; 0: none"] = 0
    shortlist: Annotated[
        int | None,
        "approximate: score only the best N captions of an image and images of a caption, by the "
        "product of their pooled vectors",
    ] = None
    save_scores: Annotated[str | None, "write the score matrix (images, captions), .npy"] = None
    json: Annotated[str | None, "write the result, unrounded"] = None
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps, ..."] = "auto"
    precision: Annotated[Precision | None, "of products; tf32: CUDA only" + THEIRS] = None
    compile: Annotated[bool | None, "compile the routing (default: if it saves time)"] = None
    workers: Annotated[int, "processes that read features; 0: the program itself"] = 2

    def __post_init__(self) -> None:
        if bool(self.model_path) == bool(self.scores):
            raise InputError("expected either --model_path or --scores")
        check_range(self, ("workers", "bootstrap"), 0)
        check_range(self, ("shortlist",), 1)
        if 0 < self.bootstrap < LEAST_SAMPLES:
            raise InputError(
                f"--bootstrap {self.bootstrap}: expected 0 or at least {LEAST_SAMPLES}"
            )
        if self.scores:
            for name in ("shortlist", "precision", "bert_path", "compile", "device", "workers"):
                unused = getattr(self, name) == getattr(EvaluateConfig, name)  # the default
                require(unused, f"--{name} goes with --model_path, not with --scores")
            if (self.data_path or self.data_name) and not (
                self.data_path and self.data_name and self.split
            ):
                raise InputError("--scores: give --data_path, --data_name and --split together")


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(EvaluateConfig, argv, DESCRIPTION, groups=GROUPS)
    result, scores = _evaluate(config)
    _write(config, result, scores, printed=True)


def evaluate(
    model_paths: str | Path | Sequence[str | Path] | None = None,
    data_path: str | Path | None = None,
    data_name: str | None = None,
    bert_path: str | Path | None = None,
    split: EvaluatedSplit | None = None,
    fold5: bool = False,
    **options: Any,
) -> EvaluationResult:
    """Return the result of one model, or of an ensemble: the mean of the models' score matrices.

    `options` are further options of `EvaluateConfig`; `scores=[paths]` evaluates saved matrices.
    Data, BERT and precision default to the checkpoints'; the split is test, or with `fold5` testall
    if it exists. Raises InputError if a file or a combination cannot be used.
    """
    config = EvaluateConfig(
        model_path=_as_list(model_paths),
        scores=_as_list(options.pop("scores", None)),
        data_path=None if data_path is None else str(data_path),
        data_name=data_name,
        bert_path=None if bert_path is None else str(bert_path),
        split=split,
        fold5=fold5,
        **options,
    )
    result, scores = _evaluate(config)
    _write(config, result, scores)
    return result


def _as_list(paths: str | Path | Sequence[str | Path] | None) -> list[str] | None:
    if paths is None:
        return None
    return [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def _evaluate(config: EvaluateConfig) -> tuple[EvaluationResult, np.ndarray]:
    """Return the result and the score matrix; nothing is written yet."""
    from evaluation import evaluate_folds, evaluate_whole

    paths = config.scores or config.model_path or []
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise InputError(f"{', '.join(paths)}: one file twice; expected different ones")
    read = _scores_of_files if config.scores else _scores_of_models
    about, scores, owner = read(config)
    images, captions = scores.shape
    folds = config.fold5 or images == MSCOCO_IMAGES
    unknown = dict.fromkeys(("models", "scores", "fingerprints", "seconds", "shortlist"))
    result = EvaluationResult(
        **unknown | about,
        images=images,
        captions=captions,
        whole=evaluate_whole(scores, owner, config.bootstrap),
        fold5=evaluate_folds(scores, owner, config.bootstrap) if folds else None,
        fold5_asked=config.fold5,
    )
    return result, scores


def _write(
    config: EvaluateConfig, result: EvaluationResult, scores: np.ndarray, printed: bool = False
) -> None:
    """Write every output. Raises InputError, but even then prints the result."""
    try:
        if config.json:
            write_json(Path(config.json), result.to_json())
        if config.save_scores:
            write_array(Path(config.save_scores), scores)
    finally:  # a full disk does not lose what hours of scoring gave
        if printed:
            print_line(as_text(result))


def _check_outputs(config: EvaluateConfig, inputs: Sequence[str | Path]) -> None:
    """Raise InputError before the long work if an output cannot be written or is an input."""
    outputs = [Path(path) for path in (config.save_scores, config.json) if path]
    for number, path in enumerate(outputs):
        check_writable(path, [*inputs, *outputs[:number]])


def _scores_of_files(config: EvaluateConfig) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Return what the options say about saved score matrices, their mean, and `owner`."""
    import numpy as np

    import evaluation as ev
    from checkpoint.checkpoint import warn_of_selection

    paths, split = config.scores or [], config.split
    folder = Path(config.data_path) / str(config.data_name) if config.data_path and split else None
    _check_outputs(config, [*paths, *(files_of(folder, split) if folder and split else [])])
    matrices = [ev.map_scores(Path(path)) for path in paths]
    groups = read_groups_of_scores(Path(paths[0]), matrices[0].shape, folder, split)
    if folder is None:
        log.info("five captions an image are assumed, since --data_path is not given")
    for path, matrix in zip(paths, matrices, strict=True):
        if matrix.shape != matrices[0].shape:
            raise InputError(
                f"{path}: shape {matrix.shape}; expected {matrices[0].shape}, that of {paths[0]}"
            )
        warn_of_selection(path, split)
        if ev.is_reranked(matrix):
            log.warning("%s: looks like scores of a shortlist; the result is approximate", path)
    if config.fold5:
        ev.check_folds(groups.images, paths[0])
    about = {"scores": paths, "data_name": config.data_name, "split": split}
    dtype = np.result_type(np.float32, *matrices)
    mean = ev.mean_matrix(np.array(matrix, dtype) for matrix in matrices)
    return about, mean, groups.image_of_caption


def _scores_of_models(config: EvaluateConfig) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Return what is known of models and data, the mean of the models' scores, and `owner`."""
    from checkpoint.bert_files import bert_files
    from checkpoint.checkpoint import (
        APART,
        bert_folder,
        common_option,
        json_beside,
        read_checkpoint,
    )

    paths, device = config.model_path or [], pick_device(config.device, config.precision)
    checkpoints = [read_checkpoint(path) for path in paths]
    widths = sorted({checkpoint.config.img_dim for checkpoint in checkpoints})
    require(
        len(widths) == 1,
        f"--model_path: models of features {widths} wide; expected one width; {APART}",
    )
    data_name = config.data_name or common_option(checkpoints, "data_name")
    folder = Path(config.data_path or common_option(checkpoints, "data_path")) / data_name
    split = config.split
    if split is None:
        has_testall = os.path.isfile(split_files(folder, "testall")[0])
        split = "testall" if config.fold5 and has_testall else "test"
    of_models = [json_beside(Path(path)) for path in paths]
    of_berts = [f for c in checkpoints for f in bert_files(bert_folder(c, config.bert_path))]
    _check_outputs(config, [*paths, *of_models, *of_berts, *files_of(folder, split)])
    # Every model is opened before the first one is run: a fault of the second is not found late.
    models = [_open_model(checkpoint, folder, split, config, device) for checkpoint in checkpoints]
    since = time.monotonic()
    scores, limits = _ensemble_scores(models, config, device)
    about = {
        "models": paths,
        "data_name": data_name,
        "split": split,
        "fingerprints": [model.fingerprints for model in models],
        "seconds": round(time.monotonic() - since, 2),
        "shortlist": limits,
    }
    return about, scores, models[0].split.groups.image_of_caption


@dataclass(frozen=True)
class _OpenModel:
    """One model, and the split it is evaluated on."""

    checkpoint: Checkpoint
    split: Split
    bert: Bert
    model: DIME

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """SHA-256 of what the model reads now, and of the data it was trained on."""
        inputs = {"data": self.split.fingerprint, "bert": self.bert.fingerprint}
        return inputs | {"training": self.checkpoint.state.get("train_data")}


def _open_model(
    checkpoint: Checkpoint,
    folder: Path,
    name: EvaluatedSplit,
    config: EvaluateConfig,
    device: torch.device,
) -> _OpenModel:
    """Return a model that is ready to encode a split. Raises InputError if they do not fit."""
    from checkpoint.checkpoint import bert_of, build_model, warn_of_selection
    from data import Split
    from evaluation import check_folds

    split = Split.open(folder, name, checkpoint.config.img_dim)
    dev_data = checkpoint.state.get("dev_data")
    warn_of_selection(checkpoint.path, name, dev_data, split.fingerprint)
    if config.fold5:
        check_folds(split.images, split.path)
    bert = bert_of(checkpoint, config.bert_path, split.captions)
    model = build_model(checkpoint, bert, device)
    model.precision = config.precision or _trained_precision(checkpoint, device)
    warn_if_bf16_is_slow(model.precision, device)
    return _OpenModel(checkpoint, split, bert, model)


def _trained_precision(checkpoint: Checkpoint, device: torch.device) -> Precision:
    """Return the precision that a model was trained in, fp32 instead of a TF32 that is missing."""
    precision = checkpoint.options.get("precision", "fp32")
    if precision not in get_args(Precision):
        expected = ", ".join(get_args(Precision))
        raise InputError(f"{checkpoint.path}: precision {precision!r}; expected one of {expected}")
    if precision == "tf32" and not has_tf32(device):
        log.info("%s: precision tf32 needs a CUDA GPU; computing in fp32", checkpoint.path)
        return "fp32"
    return precision


def _ensemble_scores(
    models: Sequence[_OpenModel], config: EvaluateConfig, device: torch.device
) -> tuple[np.ndarray, dict[str, Any] | None]:
    """Return the mean of the models' scores; with --shortlist also what it left out."""
    import evaluation as ev

    encoded: list[ev.Encoded] = []
    for each in models:
        log.info(
            "%s (%s on %s): %d images and %d captions of %s",
            *(each.checkpoint.path, each.model.direction, device),
            *(each.split.images, len(each.split.captions), each.split.path),
        )
        inputs = (each.model, each.split, each.bert.vocabulary)
        encoded.append(ev.encode_split(*inputs, device=device, workers=config.workers))
    runs = [(m.model, e, str(m.checkpoint.path)) for m, e in zip(models, encoded, strict=True)]
    if config.shortlist is None:
        for model, items, _ in runs:
            model.compile_if_it_pays(config.compile, items.pairs)
        return ev.mean_matrix(ev.score_all(m, e, device, name) for m, e, name in runs), None
    coarse = ev.mean_matrix(items.coarse_scores() for items in encoded)
    wanted = ev.shortlist(coarse, config.shortlist)
    for model, _, _ in runs:  # one query at a time is scored, and compiled code takes at least two
        model.compile_if_it_pays(bool(config.compile), 0)
    exact = ev.mean_matrix(ev.score_some(m, e, wanted, device, name) for m, e, name in runs)
    bound = ev.recall_upper_bound(wanted, models[0].split.groups.image_of_caption)
    share = float(wanted.mean())
    limits = {"count": config.shortlist, "share": share, "recall_upper_bound": bound}
    return ev.rank_last(exact, coarse, wanted), limits


def as_text(result: EvaluationResult) -> str:
    """Return the lines that an evaluation prints (SPEC §10)."""
    text = []
    if result.shortlist:
        count, bound = result.shortlist["count"], result.shortlist["recall_upper_bound"]
        text.append(
            f"Approximate: only the best {count} in each direction by pooled vectors were scored, "
            f"{100 * result.shortlist['share']:.1f} % of all pairs; they hold a correct answer for "
            f"{bound['i2t']:.1f} % of the images and {bound['t2i']:.1f} % of the captions"
        )
    if result.fold5:
        for number, fold in enumerate(result.fold5.folds, 1):
            text += [f"Fold {number}", *_lines(ProtocolResult(fold))]
        text += [f"Mean of {len(result.fold5.folds)} folds", *_lines(result.fold5)]
    if not result.fold5 or result.images == MSCOCO_IMAGES:
        text += ["All images"] if result.fold5 else []
        text += _lines(result.whole)
    return "\n".join(text)


def _lines(result: ProtocolResult) -> list[str]:
    """Return the family's lines for one protocol, with its intervals if there are some."""
    metrics, intervals = result.metrics, result.intervals
    text = [f"rsum: {metrics.rsum:.1f}"]
    for side, title in (("i2t", "Image to text"), ("t2i", "Text to image")):
        recall = getattr(metrics, side)
        mean = (recall.r1 + recall.r5 + recall.r10) / 3
        text.append(f"Average {side} Recall: {mean:.1f}")
        text.append(f"{title}: {' '.join(f'{value:.1f}' for value in asdict(recall).values())}")
        if intervals:
            bounds = (intervals[side][name] for name in asdict(recall))
            text.append(
                f"95 % intervals: {' '.join(f'{low:.1f}-{high:.1f}' for low, high in bounds)}"
            )
    if intervals:
        low, high = intervals["rsum"]
        text.append(f"95 % interval of rsum: {low:.1f}-{high:.1f}")
    return text


if __name__ == "__main__":
    run(main)
