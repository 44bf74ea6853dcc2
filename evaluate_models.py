"""evaluate_models.py — retrieval results of one model or an ensemble (SPEC §10).

Turns checkpoints, own or published, into one score matrix; every figure is computed from it.
"""

import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from bert import bert_files
from checkpoint import (
    Checkpoint,
    bert_folder,
    bert_of,
    build_model,
    common_option,
    json_beside,
    read_checkpoint,
    warn_of_selection,
)
from data import Split
from evalconfig import EvaluateConfig, check_outputs
from evaluation import (
    MSCOCO_IMAGES,
    as_text,
    ceiling,
    check_folds,
    map_scores,
    mean_matrix,
    measured,
    owners,
    ranked,
)
from files import write_array, write_arrays, write_json
from layout import SplitName, count_images, files_of, read_captions, split_files
from mscoco import eccv_metrics, extended, known_ids
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
from scoring import Scorer, behind, encode_split, shortlist, shortlisted

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(EvaluateConfig, argv, DESCRIPTION)
    _write(config, *_evaluated(config), printed=True)


def _write(
    config: EvaluateConfig,
    result: dict[str, Any],
    scores: np.ndarray,
    found: dict[str, np.ndarray],
    printed: bool,
) -> None:
    """Write what was asked for. Raises InputError, once all of it was tried."""
    files = (
        (write_array, config.save_scores, scores),
        (write_arrays, config.ranks, found),
        (write_json, config.json, result),
    )
    works = [partial(write, Path(path), content) for write, path, content in files if path]
    works += [partial(say, as_text(result))] if printed else []
    problems = []
    for work in works:
        try:
            work()
        except InputError as error:  # which loses no other output
            problems.append(str(error))
    require(not problems, "; ".join(problems))


def evaluate(
    model_paths: str | Path | Sequence[str | Path] | None = None,
    data_path: str | Path | None = None,
    data_name: str | None = None,
    bert_path: str | Path | None = None,
    split: SplitName | None = None,
    fold5: bool = False,
    precision: Precision | None = None,
    device: str = "auto",
    workers: int = 2,
    save_scores: str | Path | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Results of one model, or of an ensemble: the mean of the models' score matrices.

    What is not given comes from the checkpoints, but the split: that is test, or for fold5,
    protocols and extended testall where there is one. `more` are further options of
    `EvaluateConfig`.

    Returns what `--json` writes, None where it is not known: models, scores, data_name, split,
    images, captions, by model fingerprints of data, BERT and training data, the seconds of scoring,
    the share of closed gates by model, layer and cell, with `shortlist` how far the figures can be
    right, the extended figures, and by protocol (the first one's at the top, too) metrics, folds,
    whose mean the metrics are, and intervals. Raises InputError where a file or a combination
    cannot be used.
    """
    paths, more["scores"] = _several(model_paths), _several(more.get("scores"))
    config = EvaluateConfig(
        model_path=paths,
        data_path=data_path,
        data_name=data_name,
        bert_path=bert_path,
        split=split,
        fold5=fold5,
        precision=precision,
        device=device,
        workers=workers,
        save_scores=save_scores,
        **more,
    )
    result, scores, found = _evaluated(config)
    _write(config, result, scores, found, printed=False)
    return result


def _several(paths: str | Path | Sequence[str | Path] | None) -> Sequence[str | Path] | None:
    return [paths] if isinstance(paths, str | Path) else paths


def _evaluated(
    config: EvaluateConfig,
) -> tuple[dict[str, Any], np.ndarray, dict[str, np.ndarray]]:
    """What `evaluate` gives, the score matrix, and every query's rank: none is written yet."""
    package = eccv_metrics() if config.extended else None  # before the long work
    about, scores, ids = (_of_files if config.scores else _of_models)(config, package)
    images, captions = scores.shape
    about |= {"images": images, "captions": captions, "extended": None}
    if images != MSCOCO_IMAGES and (config.fold5 or config.protocols):
        found = f"the protocols 1k5 and 5k are MSCOCO's, of {MSCOCO_IMAGES} images"
        log.warning("%d images: %s; 5k is the whole split here, 1k5 fifths of it", images, found)
    if ids is not None:
        about["extended"] = extended(package, scores, ids)
    protocols, every = {}, {}
    for protocol in config.all_protocols:
        folds = ranked(scores, protocol)
        protocols[protocol] = measured(folds, protocol, config.bootstrap)
        sides = [np.concatenate(side) for side in zip(*folds, strict=True)]
        prefix = f"{protocol}." if len(config.all_protocols) > 1 else ""
        every |= {f"{prefix}i2t": sides[0], f"{prefix}t2i": sides[1]}
    first = next(iter(protocols.values()))
    return about | first | {"protocols": protocols}, scores, every


def _of_files(
    config: EvaluateConfig, package: Any
) -> tuple[dict[str, Any], np.ndarray, np.ndarray | None]:
    """Scores that were saved; what they are of is known where data is named."""
    paths = config.scores
    folder = None if config.data_path is None else Path(config.data_path) / config.data_name
    data = files_of(folder, config.split) if folder else []
    check_outputs(config, [*paths, *data])
    matrices = [map_scores(Path(path)) for path in paths]
    if data:
        captions = split_files(folder, config.split)[1]
        images, found = count_images(captions, read_captions(captions)), len(matrices[0])
        require(images == found, f"{paths[0]}: scores of {found} images; {captions} has {images}")
    for path, matrix in zip(paths, matrices, strict=True):
        shapes = f"{matrix.shape}; {paths[0]} has {matrices[0].shape}"
        require(matrix.shape == matrices[0].shape, f"{path}: scores of shape {shapes}")
        warn_of_selection(path, config.split)  # of what model they are is not known
        if shortlisted(matrix):
            log.warning("%s: if these are scores of a shortlist, the results are approximate", path)
    if "1k5" in config.all_protocols:
        check_folds(len(matrices[0]))
    ids = known_ids(package, folder, config.split, len(matrices[0])) if package else None
    scores = (
        matrices[0]
        if len(matrices) == 1
        else mean_matrix(np.array(m, np.result_type(np.float32, *matrices)) for m in matrices)
    )
    known = {"scores": [str(path) for path in paths], "data_name": config.data_name}
    unknown = dict.fromkeys(("models", "fingerprints", "seconds", "closed", "shortlist"))
    return unknown | known | {"split": config.split}, scores, ids


def _of_models(
    config: EvaluateConfig, package: Any
) -> tuple[dict[str, Any], np.ndarray, np.ndarray | None]:
    """Scores that the models give."""
    paths, device = config.model_path, pick_device(config.device)
    models = [*paths, *(json_beside(Path(path)) for path in paths)]
    check_outputs(config, models)  # before they are read
    checkpoints = [read_checkpoint(path) for path in paths]
    data_name = config.data_name or common_option(checkpoints, "data_name")
    folder = Path(config.data_path or common_option(checkpoints, "data_path")) / data_name
    split = config.split
    if split is None:
        whole = config.of_whole_split and os.path.isfile(folder / "testall_ims.npy")
        split = "testall" if whole else "test"
    berts = [bert_folder(checkpoint, config.bert_path) for checkpoint in checkpoints]
    inputs = [*models, *files_of(folder, split), *(f for b in berts for f in bert_files(b))]
    check_outputs(config, inputs)
    opened = [_scorer(checkpoint, folder, split, config, device) for checkpoint in checkpoints]
    scorers = [scorer for scorer, _ in opened]
    ids = known_ids(package, folder, split, len(scorers[0].encoded.images)) if package else None
    since = time.monotonic()
    scores, limits = _scores(scorers, config.shortlist, config.compile)
    about = {
        "models": [str(path) for path in paths],
        "scores": None,
        "data_name": data_name,
        "split": split,
        "fingerprints": [fingerprints for _, fingerprints in opened],
        "seconds": round(time.monotonic() - since, 2),
        "closed": [(scorer.closed / scorer.scored).tolist() for scorer in scorers],
        "shortlist": limits,
    }
    return about, scores, ids


def _scorer(
    checkpoint: Checkpoint,
    folder: Path,
    name: SplitName,
    config: EvaluateConfig,
    device: torch.device,
) -> tuple[Scorer, dict[str, str | None]]:
    """One model with a split's images and captions, encoded by it; fingerprints of what it read."""
    split = Split.open(folder, name, checkpoint.config.img_dim)
    selected_on = checkpoint.state.get("dev_data")
    warn_of_selection(checkpoint.path, name, selected_on, split.fingerprint)
    if "1k5" in config.all_protocols:
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
        "%s (%s on %s): %d images and %d captions of %s",
        *(checkpoint.path, checkpoint.config.direction, device),
        *(split.images, len(split.captions), split.path),
    )
    words, workers = checkpoint.config.max_words, config.workers
    encoded = encode_split(model, split, bert.vocabulary, words, device=device, workers=workers)
    read = {"data": split.fingerprint, "bert": bert.fingerprint}
    read["training"] = checkpoint.state.get("train_data")
    return Scorer(model, encoded, device, str(checkpoint.path)), read


def _scores(
    scorers: Sequence[Scorer], count: int | None, compiled: bool | None
) -> tuple[np.ndarray, dict[str, Any] | None]:
    """The mean of the models' scores; with a shortlist of `count`, what it leaves out, too."""
    if count is None:
        for scorer in scorers:
            scorer.model.compile_where_it_pays(compiled, scorer.encoded.pairs)
        return mean_matrix(scorer.all_pairs() for scorer in scorers), None
    products = mean_matrix(scorer.encoded.products() for scorer in scorers)
    wanted = shortlist(products, count)
    for scorer in scorers:
        # on request alone: a query at a time is scored, and compiled code takes no fewer than two
        scorer.model.compile_where_it_pays(bool(compiled), 0)
    scores = behind(mean_matrix(scorer.some_pairs(wanted) for scorer in scorers), products, wanted)
    limits = {"count": count, "share": float(wanted.mean())}
    return scores, limits | {"ceiling": ceiling(wanted, owners(wanted.shape[1]))}


DESCRIPTION = """Evaluate one DIME model, or an ensemble of several, on a split.

  python evaluate_models.py --model_path runs/f30k/i2t/model_best.pth.tar --data_path data
  python evaluate_models.py --model_path I2T.pth.tar T2I.pth.tar --data_path data --fold5
  python evaluate_models.py --scores i2t.npy t2i.npy --protocols 1k5 5k --bootstrap 1000

Prints R@1 R@5 R@10, median and mean rank, both ways. Reads this project's checkpoints and the
published ones."""


if __name__ == "__main__":
    run(main)
