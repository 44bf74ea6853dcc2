"""evaluate_models.py — retrieval results of one model or an ensemble (SPEC §10).

Turns checkpoints, own or published, into one score matrix; every figure is computed from it.
"""

import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch

from checkpoint import Checkpoint, bert_of, build_model, read_checkpoint
from data import Split, SplitName, split_files
from evaluation import (
    FOLDS,
    Retrieval,
    ceiling,
    check_folds,
    folds,
    mean_of,
    owners,
    retrieval,
)
from files import beside, check_writable, write_array, write_json
from options import (
    InputError,
    Precision,
    parse,
    pick_device,
    require,
    run,
    say,
    warn_of_slow,
)
from scoring import Scorer, behind, encode_split, shortlist

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
    shortlist: Annotated[
        int | None,
        "approximate: score only the best N captions of an image and images of a caption, as the "
        "product of their pooled vectors ranks them",
    ] = None
    skip: Annotated[
        bool, "leave out of a cell the pairs whose gates are closed (exact; not if compiled)"
    ] = True
    compile: Annotated[
        bool | None, "compile the routing (default: where a compiler is found and it pays)"
    ] = None
    save_scores: Annotated[str | None, "write the float32 matrix (images, captions) here, .npy"] = (
        None
    )
    json: Annotated[str | None, "write the results here, unrounded"] = None


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(EvaluateConfig, argv, DESCRIPTION)
    _check_output("--json", config.json, [*config.model_path, config.save_scores])
    result, scores = _evaluated(config)
    problems = []  # each output is tried, so that no other's fault loses it
    for write, path, content in (
        (write_array, config.save_scores, scores),
        (write_json, config.json, result),
        (_print, "standard output", result),
    ):
        try:
            if path:
                write(Path(path), content)
        except InputError as error:
            problems.append(str(error))
    require(not problems, "; ".join(problems))


def _print(path: Path, result: dict[str, Any]) -> None:
    """Print the results. Raises InputError where nobody takes them."""
    lines = [_approximate(result["shortlist"])] if result["shortlist"] else []
    for number, fold in enumerate(result["folds"], 1):
        lines.append(f"Fold {number}\n{_lines(fold)}")
    if result["folds"]:
        lines.append(f"Mean of {FOLDS} folds\n")
    say("".join([*lines, _lines(result["metrics"])]))


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
    *,
    shortlist: int | None = None,
    skip: bool = True,
    compile: bool | None = None,
) -> dict[str, Any]:
    """Results of one model, or of an ensemble: the mean of the models' score matrices.

    What is not given comes from the checkpoints. Returns what `--json` writes: models, data_name,
    split, images, captions, the seconds of scoring, the share of closed gates by model, layer and
    cell, metrics, with `fold5` the folds, whose mean the metrics are, and with `shortlist` how far
    they can be right. Raises InputError where a file or a combination cannot be used.
    """
    paths = [model_paths] if isinstance(model_paths, str | Path) else model_paths
    given = (paths, data_path, data_name, bert_path, split, fold5, precision, device, workers)
    config = EvaluateConfig(*given, shortlist, skip, compile, save_scores)
    result, scores = _evaluated(config)
    if save_scores:
        write_array(Path(save_scores), scores)
    return result


def _evaluated(config: EvaluateConfig) -> tuple[dict[str, Any], np.ndarray]:
    """What `evaluate` gives, and the score matrix, which is not written yet."""
    paths, count = config.model_path, config.shortlist
    require(len(paths) > 0, "no model given")
    require(config.workers >= 0, f"--workers {config.workers}: expected 0 or more")
    require(count is None or count > 0, f"--shortlist {count}: expected 1 or more")
    _check_output("--save_scores", config.save_scores, paths)
    device = pick_device(config.device)
    checkpoints = [read_checkpoint(path) for path in paths]
    data_name = config.data_name or _common(checkpoints, "data_name")
    folder = Path(config.data_path or _common(checkpoints, "data_path")) / data_name
    split = config.split
    if split is None:
        whole = config.fold5 and os.path.isfile(folder / "testall_ims.npy")
        split = "testall" if whole else "test"
    for option, path in (("--save_scores", config.save_scores), ("--json", config.json)):
        _check_output(option, path, split_files(folder, split))
    scorers = [_scorer(checkpoint, folder, split, config, device) for checkpoint in checkpoints]
    since = time.monotonic()
    scores, limits = _scores(scorers, count, config.compile)
    result = {
        "models": [str(path) for path in paths],
        "data_name": data_name,
        "split": split,
        "images": scores.shape[0],
        "captions": scores.shape[1],
        "seconds": round(time.monotonic() - since, 2),
        "closed": [(scorer.closed / scorer.scored).tolist() for scorer in scorers],
        "shortlist": limits,
    }
    return result | _measure(scores, config.fold5), scores


def _check_output(
    option: str, path: str | Path | None, others: Sequence[str | Path | None]
) -> None:
    """Raise InputError before the long work where its result could not be written.

    So it is where the result would take the place of one of `others`.
    """
    if path:
        taken = {os.path.realpath(other) for other in others if other}
        ways = (os.path.realpath(path), os.path.realpath(beside(Path(path))))
        unused = not taken.intersection(ways)
        require(unused, f"{option} {path}: is a model, its data or another result")
        try:
            check_writable(Path(path))
        except InputError as error:
            raise InputError(f"{option} {error}") from error


def _measure(scores: np.ndarray, fold5: bool) -> dict[str, Any]:
    owner = owners(scores.shape[1])
    if not fold5:
        return {"metrics": retrieval(scores, owner).as_dict(), "folds": []}
    results: list[Retrieval] = [retrieval(*fold) for fold in folds(scores, owner)]
    return {"metrics": mean_of(results).as_dict(), "folds": [r.as_dict() for r in results]}


def _scorer(
    checkpoint: Checkpoint,
    folder: Path,
    name: SplitName,
    config: EvaluateConfig,
    device: torch.device,
) -> Scorer:
    """One model with a split's images and captions, encoded by it."""
    split = Split.open(folder, name, checkpoint.config.img_dim)
    if config.fold5:
        check_folds(split.images)  # before the long work, not after it
    bert = bert_of(checkpoint, config.bert_path)
    model = build_model(checkpoint, bert, device)
    if not config.skip:
        model.space.skip_nothing()
    model.precision = config.precision or checkpoint.options.get("precision", "fp32")
    require(
        model.precision in get_args(Precision),
        f"{checkpoint.path}: precision {model.precision!r}; expected one of {get_args(Precision)}",
    )
    warn_of_slow(model.precision, device)
    log.info(
        "%s (%s): %d images and %d captions of %s",
        *(checkpoint.path, checkpoint.config.direction),
        *(split.images, len(split.captions), split.path),
    )
    words, workers = checkpoint.config.max_words, config.workers
    encoded = encode_split(model, split, bert.vocabulary, words, device=device, workers=workers)
    return Scorer(model, encoded, device, str(checkpoint.path))


def _scores(
    scorers: Sequence[Scorer], count: int | None, compiled: bool | None
) -> tuple[np.ndarray, dict[str, Any] | None]:
    """The mean of the models' scores; with a shortlist of `count`, what it leaves out, too."""
    if count is None:
        for scorer in scorers:
            scorer.model.space.compile_where_it_pays(compiled, scorer.encoded.pairs)
        return _mean(scorer.all_pairs() for scorer in scorers), None
    products = _mean(scorer.encoded.products() for scorer in scorers)
    wanted = shortlist(products, count)
    for scorer in scorers:
        scorer.model.space.compile_where_it_pays(compiled, int(wanted.sum()))
    scores = behind(_mean(scorer.some_pairs(wanted) for scorer in scorers), products, wanted)
    limits = {"count": count, "share": float(wanted.mean())}
    return scores, limits | {"ceiling": ceiling(wanted, owners(wanted.shape[1]))}


def _mean(matrices: Iterable[np.ndarray]) -> np.ndarray:
    """The mean of matrices, which are made one after the other."""
    total, count = None, 0
    for matrix in matrices:
        total = matrix if total is None else np.add(total, matrix, out=total)
        count += 1
    return np.divide(total, np.float32(count), out=total)


def _approximate(limits: dict[str, Any]) -> str:
    """What is said of results by a shortlist."""
    best = limits["ceiling"]
    return (
        f"Approximate: only the best {limits['count']} each way by pooled vectors were scored, "
        f"{100 * limits['share']:.1f} % of all pairs; a right answer is among them for "
        f"{best['i2t']:.1f} % of the images and {best['t2i']:.1f} % of the captions, which no R@k "
        f"of the whole split with k up to {limits['count']} can exceed\n"
    )


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
