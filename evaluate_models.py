"""evaluate_models.py — retrieval results of one model or an ensemble (SPEC §10).

Turns checkpoints, own or published, into one score matrix; every figure is computed from it.
"""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from checkpoint.bert import Bert, bert_files
from checkpoint.checkpoint import (
    Checkpoint,
    bert_folder,
    bert_of,
    build_model,
    common_option,
    json_beside,
    read_checkpoint,
    warn_of_selection,
)
from common.cli import parse, pick_device, print_line, run, warn_if_bf16_is_slow
from common.config import Precision
from common.errors import InputError, require
from common.files import write_array, write_arrays, write_json
from common.layout import SplitName, count_images, files_of, read_captions, split_files
from data import Split
from evalconfig import DESCRIPTION, EvaluateConfig, EvaluatedSplit, check_different, check_outputs
from evaluation import (
    MSCOCO_IMAGES,
    as_text,
    ceiling,
    check_folds,
    image_of_caption,
    map_scores,
    mean_matrix,
    mean_of_files,
    measured,
    ranked,
)
from model import DIME
from scoring import Scorer, behind, encode_split, shortlist, shortlisted
from scripts.parts.mscoco import eccv_metrics, extended, known_ids

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
    works += [partial(print_line, as_text(result))] if printed else []
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
    split: EvaluatedSplit | None = None,
    fold5: bool = False,
    precision: Precision | None = None,
    device: str = "auto",
    workers: int = 2,
    save_scores: str | Path | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Results of one model, or of an ensemble: the mean of the models' score matrices.

    Data, BERT and precision that are not given are the checkpoints'; the split is test, or for
    fold5, protocols and extended testall where there is one. `more` are further options of
    `EvaluateConfig`. Raises InputError where a file or a combination cannot be used.

    Returns what `--json` writes, None where it is not known:

    * `models`, `scores`, `data_name`, `split`, `images`, `captions`: what was evaluated;
    * `fingerprints`: what each model read and was trained on: `data`, `bert`, `training`;
    * `seconds` of scoring, and `closed`, the share of closed gates `[model][layer][cell]`;
    * `shortlist`: `count`, the `share` of pairs that were scored, `ceiling` of the recalls, %;
    * `extended`: figures by name and direction, %;
    * `protocols`: by name `metrics`, the `folds` whose mean they are, and `intervals`;
    * `metrics`, `folds`, `intervals` of the first protocol.
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
    check_different(config)
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
        check_folds(len(matrices[0]), paths[0])
    ids = known_ids(package, folder, config.split, len(matrices[0])) if package else None
    scores = matrices[0] if len(matrices) == 1 else mean_of_files(paths, matrices)
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
    opened = [_open(checkpoint, folder, split, config, device) for checkpoint in checkpoints]
    ids = known_ids(package, folder, split, opened[0].split.images) if package else None
    scorers = [each.scorer(config, device) for each in opened]
    since = time.monotonic()
    scores, limits = _scores(scorers, config.shortlist, config.compile)
    about = {
        "models": [str(path) for path in paths],
        "scores": None,
        "data_name": data_name,
        "split": split,
        "fingerprints": [each.fingerprints for each in opened],
        "seconds": round(time.monotonic() - since, 2),
        "closed": [(scorer.closed / scorer.scored).tolist() for scorer in scorers],
        "shortlist": limits,
    }
    return about, scores, ids


@dataclass(frozen=True)
class _Opened:
    """One model, and what it is evaluated on."""

    checkpoint: Checkpoint
    split: Split
    bert: Bert
    model: DIME

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """Of what the model read, and was trained on."""
        read = {"data": self.split.fingerprint, "bert": self.bert.fingerprint}
        return read | {"training": self.checkpoint.state.get("train_data")}

    def scorer(self, config: EvaluateConfig, device: torch.device) -> Scorer:
        """The model with all images and captions of the split, encoded by it."""
        path, sizes = self.checkpoint.path, self.checkpoint.config
        log.info(
            "%s (%s on %s): %d images and %d captions of %s",
            *(path, sizes.direction, device),
            *(self.split.images, len(self.split.captions), self.split.path),
        )
        where = {"device": device, "workers": config.workers}
        texts = (self.bert.vocabulary, sizes.max_words)
        encoded = encode_split(self.model, self.split, *texts, **where)
        return Scorer(self.model, encoded, device, str(path))


def _open(
    checkpoint: Checkpoint,
    folder: Path,
    name: SplitName,
    config: EvaluateConfig,
    device: torch.device,
) -> _Opened:
    """A model, ready to encode a split. Raises InputError where one does not go with the other."""
    split = Split.open(folder, name, checkpoint.config.img_dim)
    selected_on = checkpoint.state.get("dev_data")
    warn_of_selection(checkpoint.path, name, selected_on, split.fingerprint)
    if "1k5" in config.all_protocols:
        check_folds(split.images, split.path)  # before the long work, not after it
    bert = bert_of(checkpoint, config.bert_path)
    model = build_model(checkpoint, bert, device)
    if not config.skip:
        model.space.skip_nothing()
    model.precision = config.precision or checkpoint.options.get("precision", "fp32")
    require(
        model.precision in get_args(Precision),
        f"{checkpoint.path}: precision {model.precision!r}; expected one of {get_args(Precision)}",
    )
    warn_if_bf16_is_slow(model.precision, device)
    return _Opened(checkpoint, split, bert, model)


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
    return scores, limits | {"ceiling": ceiling(wanted, image_of_caption(wanted.shape[1]))}


if __name__ == "__main__":
    run(main)
