"""evaluate_models.py — retrieval results of one model or an ensemble (SPEC §10).

Turns checkpoints, own or published, into one score matrix; every figure is computed from it.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch

from checkpoint import Checkpoint, bert_of, build_model, read_checkpoint
from data import Split, SplitName
from evaluation import FOLDS, Retrieval, check_folds, folds, mean_of, owners, retrieval, score_split
from files import write_array, write_json
from options import Precision, parse, pick_device, require, run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateConfig:
    """Every option of evaluation. What is not given comes from the checkpoints."""

    model_path: Annotated[list[str], "checkpoints, own or published; two or more are an ensemble"]
    data_path: Annotated[str | None, "folder that holds the data sets' folders"] = None
    data_name: Annotated[str | None, "data set's folder: f30k_precomp, coco_precomp, ..."] = None
    bert_path: Annotated[str | None, "folder of the BERT that the models were trained with"] = None
    split: Annotated[
        Literal["dev", "test", "testall"] | None,
        "default: test, or with --fold5 testall where there is one",
    ] = None
    fold5: Annotated[bool, "average over five slices of the images (MSCOCO 1K)"] = False
    precision: Annotated[Precision | None, "bf16 computes products in bfloat16"] = None
    device: Annotated[str, "auto, cpu, cuda, cuda:1, ..."] = "auto"
    workers: Annotated[int, "processes that read features; 0 reads in the program itself"] = 2
    save_scores: Annotated[str | None, "write the float32 matrix (images, captions) here, .npy"] = (
        None
    )
    json: Annotated[str | None, "write the results here, unrounded"] = None


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(EvaluateConfig, argv, DESCRIPTION)
    options = dict(vars(config))
    report = options.pop("json")
    _check_output("--json", report, [*config.model_path, config.save_scores])
    result = evaluate(options.pop("model_path"), **options)
    for number, fold in enumerate(result["folds"], 1):
        sys.stdout.write(f"Fold {number}\n{_lines(fold)}")
    if result["folds"]:
        sys.stdout.write(f"Mean of {FOLDS} folds\n")
    sys.stdout.write(_lines(result["metrics"]))
    if report:
        write_json(Path(report), result)


def evaluate(
    model_paths: str | Path | Sequence[str | Path],
    data_path: str | Path | None = None,
    data_name: str | None = None,
    bert_path: str | Path | None = None,
    split: SplitName | None = None,
    fold5: bool = False,
    precision: Precision | None = None,
    device: str = "auto",
    workers: int = 2,
    save_scores: str | Path | None = None,
) -> dict[str, Any]:
    """Results of one model, or of an ensemble: the mean of the models' score matrices.

    What is not given comes from the checkpoints. Returns what `--json` writes: models, data_name,
    split, images, captions, metrics, and with `fold5` the folds, whose mean the metrics are.
    Raises InputError where a file or a combination cannot be used.
    """
    paths = [model_paths] if isinstance(model_paths, str | Path) else list(model_paths)
    require(len(paths) > 0, "no model given")
    require(workers >= 0, f"--workers {workers}: expected 0 or more")
    _check_output("--save_scores", save_scores, paths)
    where = pick_device(device)
    checkpoints = [read_checkpoint(path) for path in paths]
    data_name = data_name or _common(checkpoints, "data_name")
    folder = Path(data_path or _common(checkpoints, "data_path")) / data_name
    if split is None:
        split = "testall" if fold5 and (folder / "testall_ims.npy").is_file() else "test"
    matrices = [
        _score(checkpoint, folder, split, bert_path, precision, where, workers, fold5)
        for checkpoint in checkpoints
    ]
    scores = np.mean(matrices, axis=0, dtype=np.float32)
    if save_scores:
        write_array(Path(save_scores), scores)
    return {
        "models": [str(path) for path in paths],
        "data_name": data_name,
        "split": split,
        "images": scores.shape[0],
        "captions": scores.shape[1],
    } | _measure(scores, fold5)


def _check_output(
    option: str, path: str | Path | None, others: Sequence[str | Path | None]
) -> None:
    """Raise InputError before the long work where its result could not be written.

    So it is where the result would take the place of one of `others`.
    """
    if path:
        fits = Path(path).parent.is_dir() and not Path(path).is_dir()
        require(fits, f"{option} {path}: expected a file in a folder that is there")
        taken = {Path(other).resolve() for other in others if other}
        require(Path(path).resolve() not in taken, f"{option} {path}: is a model or another result")


def _measure(scores: np.ndarray, fold5: bool) -> dict[str, Any]:
    owner = owners(scores.shape[1])
    if not fold5:
        return {"metrics": retrieval(scores, owner).as_dict(), "folds": []}
    results: list[Retrieval] = [retrieval(*fold) for fold in folds(scores, owner)]
    return {"metrics": mean_of(results).as_dict(), "folds": [r.as_dict() for r in results]}


def _score(
    checkpoint: Checkpoint,
    folder: Path,
    name: SplitName,
    bert_path: str | Path | None,
    precision: Precision | None,
    device: torch.device,
    workers: int,
    fold5: bool,
) -> np.ndarray:
    """The score matrix of one model."""
    split = Split.open(folder, name, checkpoint.config.img_dim)
    if fold5:
        check_folds(split.images)  # before the long work, not after it
    bert = bert_of(checkpoint, bert_path)
    model = build_model(checkpoint, bert, device)
    model.precision = precision or checkpoint.options.get("precision", "fp32")
    require(
        model.precision in get_args(Precision),
        f"{checkpoint.path}: precision {model.precision!r}; expected one of {get_args(Precision)}",
    )
    log.info(
        "%s (%s): %d images and %d captions of %s",
        *(checkpoint.path, checkpoint.config.direction),
        *(split.images, len(split.captions), split.path),
    )
    words = checkpoint.config.max_words
    scores = score_split(model, split, bert.vocabulary, words, device=device, workers=workers)
    require(bool(np.isfinite(scores).all()), f"{checkpoint.path}: gives scores of NaN or inf")
    return scores


def _common(checkpoints: Sequence[Checkpoint], option: str) -> str:
    """What the checkpoints agree on for an option that was not given."""
    values = {str(checkpoint.options.get(option)) for checkpoint in checkpoints}
    require(
        len(values) == 1 and "None" not in values,
        f"--{option} is needed: the checkpoints say {', '.join(sorted(values))}",
    )
    return values.pop()


def _lines(metrics: dict[str, Any]) -> str:
    """The family's lines for both ways of retrieval."""
    lines = [f"rsum: {metrics['rsum']:.1f}"]
    for side, title in (("i2t", "Image to text"), ("t2i", "Text to image")):
        figures = metrics[side]
        mean = (figures["r1"] + figures["r5"] + figures["r10"]) / 3
        lines.append(f"Average {side} Recall: {mean:.1f}")
        lines.append(f"{title}: {' '.join(f'{value:.1f}' for value in figures.values())}")
    return "\n".join(lines) + "\n"


DESCRIPTION = """Evaluate one DIME model, or an ensemble of several, on a split.

  python evaluate_models.py --model_path runs/f30k/i2t/model_best.pth.tar --data_path data
  python evaluate_models.py --model_path I2T.pth.tar T2I.pth.tar --data_path data --fold5

Prints R@1 R@5 R@10, median and mean rank, both ways. Reads this project's checkpoints and the
published ones."""


if __name__ == "__main__":
    run(main)
